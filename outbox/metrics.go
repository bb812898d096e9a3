package outbox

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the promises of DESIGN.md that the outbox keeps; sender keeps those of attempts.
type metrics struct {
	routed, unmatched, unmappable prometheus.Counter
	deliveries                    *prometheus.CounterVec
	latency                       prometheus.Histogram
	parked, dead                  *prometheus.GaugeVec
	reg                           prometheus.Registerer
}

// laneMetrics are those of one endpoint, found once.
type laneMetrics struct {
	delivered, deadTotal prometheus.Counter
	parked, dead         gauge
}

// gauge is a number that is set and counted from several goroutines and shown as a metric.
type gauge struct {
	n    atomic.Int64
	show prometheus.Gauge
}

func (g *gauge) Add(d int64) { g.show.Set(float64(g.n.Add(d))) }

func (g *gauge) Store(v int64) { g.Swap(v) }

func (g *gauge) Swap(v int64) (old int64) {
	old = g.n.Swap(v)
	g.show.Set(float64(v))
	return old
}

func newMetrics(reg prometheus.Registerer) *metrics {
	events := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "walhook_events_total",
		Help: "Outbox rows read, by what became of them: routed to an endpoint, unmatched (no endpoint wants them) or unmappable (a dead letter; worry when it grows).",
	}, []string{"outcome"})
	m := &metrics{
		reg:        reg,
		routed:     events.WithLabelValues("routed"),
		unmatched:  events.WithLabelValues("unmatched"),
		unmappable: events.WithLabelValues("unmappable"),
		deliveries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "walhook_deliveries_total",
			Help: "Deliveries that ended: delivered, dead (worry when it grows) or discarded by an operator.",
		}, []string{"endpoint", "outcome"}),
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "walhook_commit_to_delivery_seconds",
			Help:    "From the commit of a row, by the clock in its WAL, to the receiver's 2xx. Worry when it leaves what is usual for you while nothing is parked.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 60, 600, 3600, 86400},
		}),
		parked: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "walhook_parked",
			Help: "Deliveries that wait in walhook.deliveries. Worry when it grows although the breaker is closed.",
		}, []string{"endpoint"}),
		dead: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "walhook_dead",
			Help: "Dead deliveries in walhook.deliveries, until somebody retries or discards them.",
		}, []string{"endpoint"}),
	}
	reg.MustRegister(events, m.deliveries, m.latency, m.parked, m.dead)
	return m
}

func (m *metrics) lane(id string) *laneMetrics {
	return &laneMetrics{
		delivered: m.deliveries.WithLabelValues(id, "delivered"),
		deadTotal: m.deliveries.WithLabelValues(id, "dead"),
		parked:    gauge{show: m.parked.WithLabelValues(id)},
		dead:      gauge{show: m.dead.WithLabelValues(id)},
	}
}

// forget removes the series of an endpoint that is gone.
func (m *metrics) forget(id string) {
	m.deliveries.DeletePartialMatch(prometheus.Labels{"endpoint": id})
	m.parked.DeleteLabelValues(id)
	m.dead.DeleteLabelValues(id)
}
