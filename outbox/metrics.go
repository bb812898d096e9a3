package outbox

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the promises of DESIGN.md that the outbox keeps; sender keeps those of attempts.
type metrics struct {
	routed, unmatched, unmappable prometheus.Counter
	deliveries                    *prometheus.CounterVec
	latency                       prometheus.Histogram
	parked, dead                  *prometheus.GaugeVec
	oldest                        oldestParked
	labels                        *Labels
	reg                           prometheus.Registerer
}

// laneMetrics are those of one endpoint, found once.
type laneMetrics struct {
	delivered, deadTotal prometheus.Counter
	parked, dead         gauge
}

// leave ends what is shown of an endpoint that is gone.
func (m *laneMetrics) leave() {
	m.parked.leave()
	m.dead.leave()
}

// gauge is a number that is set and counted from several goroutines and shown as a metric: by
// itself, or in the sum of those that share its label.
type gauge struct {
	show   prometheus.Gauge
	shared bool

	mu   sync.Mutex // guards what follows
	n    int64
	left bool // nothing is shown of it any more
}

func (g *gauge) Load() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.n
}

func (g *gauge) Add(d int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.set(g.n + d)
}

func (g *gauge) Store(v int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.set(v)
}

// set is called with mu locked.
func (g *gauge) set(v int64) {
	was := g.n
	g.n = v
	switch {
	case g.left:
	case g.shared:
		g.show.Add(float64(v - was))
	default:
		g.show.Set(float64(v))
	}
}

// leave takes the number out of the sum.
func (g *gauge) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shared && !g.left {
		g.show.Sub(float64(g.n))
	}
	g.left = true
}

// oldestParked shows since when the first delivery in each endpoint's queue has been parked, as
// the store had it at the last look. It counts on between looks, and where none succeeds.
type oldestParked struct {
	since atomic.Pointer[map[string]time.Time] // by label
}

var oldestParkedDesc = prometheus.NewDesc("walhook_oldest_parked_seconds",
	"For how long the first delivery of an endpoint's queue has been parked, looked at every 30 s; no series where nothing is parked. Of the endpoints in other, the longest. Worry when it passes what your receivers may be late by: the endpoint is down, or too slow for its traffic.",
	[]string{"endpoint"}, nil)

func (o *oldestParked) Describe(ch chan<- *prometheus.Desc) { ch <- oldestParkedDesc }

func (o *oldestParked) Collect(ch chan<- prometheus.Metric) {
	since := o.since.Load()
	if since == nil {
		return
	}
	for label, at := range *since {
		ch <- prometheus.MustNewConstMetric(oldestParkedDesc, prometheus.GaugeValue, max(0, time.Since(at).Seconds()), label)
	}
}

func newMetrics(reg prometheus.Registerer, labels *Labels) *metrics {
	events := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "walhook_events_total",
		Help: "Outbox rows read, by what became of them: routed to an endpoint, unmatched (no endpoint wants them) or unmappable (a dead letter). Worry when unmappable grows: rows do not look as the config says.",
	}, []string{"outcome"})
	m := &metrics{
		reg:        reg,
		labels:     labels,
		routed:     events.WithLabelValues("routed"),
		unmatched:  events.WithLabelValues("unmatched"),
		unmappable: events.WithLabelValues("unmappable"),
		deliveries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "walhook_deliveries_total",
			Help: "Deliveries that ended: delivered, dead or discarded. Worry when dead grows: nobody will send those again unless told to.",
		}, []string{"endpoint", "outcome"}),
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "walhook_commit_to_delivery_seconds",
			Help:    "From the commit of a row, by the clock in its WAL, to the receiver's 2xx. Worry when it leaves what is usual for you while nothing is parked.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 60, 600, 3600, 86400},

			NativeHistogramBucketFactor:     1.1,
			NativeHistogramMaxBucketNumber:  160,
			NativeHistogramMinResetDuration: time.Hour,
		}),
		parked: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "walhook_parked",
			Help: "Deliveries that wait in walhook.deliveries. Worry when it grows although the breaker is closed.",
		}, []string{"endpoint"}),
		dead: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "walhook_dead",
			Help: "Dead deliveries in walhook.deliveries, until somebody retries or discards them; without an endpoint, rows that could not be mapped. Worry when it grows.",
		}, []string{"endpoint"}),
	}
	reg.MustRegister(events, m.deliveries, m.latency, m.parked, m.dead, &m.oldest)
	return m
}

func (m *metrics) lane(id string) *laneMetrics {
	label, own := m.labels.Of(id)
	return &laneMetrics{
		delivered: m.deliveries.WithLabelValues(label, "delivered"),
		deadTotal: m.deliveries.WithLabelValues(label, "dead"),
		parked:    gauge{show: m.parked.WithLabelValues(label), shared: !own},
		dead:      gauge{show: m.dead.WithLabelValues(label), shared: !own},
	}
}

func (m *metrics) discarded(id string, n int64) {
	label, _ := m.labels.Of(id)
	m.deliveries.WithLabelValues(label, "discarded").Add(float64(n))
}

// unmapped shows how many dead deliveries there are of rows that could not be mapped. They have
// no endpoint, and while there are none, no series.
func (m *metrics) unmapped(dead int64) {
	if dead == 0 {
		m.dead.DeleteLabelValues("")
		return
	}
	m.dead.WithLabelValues("").Set(float64(dead))
}

// forget removes the series of an endpoint that is gone. What it counted among others stays counted.
func (m *metrics) forget(id string) {
	if label, own := m.labels.Of(id); own {
		m.deliveries.DeletePartialMatch(prometheus.Labels{"endpoint": label})
		m.parked.DeleteLabelValues(label)
		m.dead.DeleteLabelValues(label)
	}
	m.labels.free(id)
}
