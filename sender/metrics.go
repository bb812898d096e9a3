package sender

import (
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/walhook/walhook/outbox"
)

// metrics are the package's series on the given registry.
type metrics struct {
	attempts  *prometheus.CounterVec
	duration  prometheus.Histogram
	breaker   *prometheus.GaugeVec
	shortages prometheus.Counter
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		attempts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "walhook_attempts_total",
			Help: "Requests made, by the answer's status, or the reason where no answer came. Worry when an endpoint has no 2xx for hours.",
		}, []string{"endpoint", "code"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                            "walhook_attempt_duration_seconds",
			Help:                            "From the beginning of a request to its answer or its failure. Worry when it nears the endpoints' timeout: lanes fill up.",
			Buckets:                         []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 15, 30},
			NativeHistogramBucketFactor:     1.1,
			NativeHistogramMaxBucketNumber:  100,
			NativeHistogramMinResetDuration: time.Hour,
		}),
		breaker: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "walhook_breaker_state",
			Help: "The endpoint's circuit: 0 closed, 1 half-open, 2 open. Worry when it stays open: its deliveries are parked and wait.",
		}, []string{"endpoint"}),
		shortages: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "walhook_shortages_total",
			Help: "Attempts put off because this host had no descriptor, port or memory to spare for them. Worry when it grows: raise the limit of open files.",
		}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.attempts, m.duration, m.breaker, m.shortages} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// forget drops the series of an endpoint. An attempt still in flight brings none of them back.
func (m *metrics) forget(c *codes) {
	c.mu.Lock()
	c.by = nil
	c.mu.Unlock()
	m.attempts.DeletePartialMatch(prometheus.Labels{"endpoint": c.endpoint})
	m.breaker.DeleteLabelValues(c.endpoint)
}

// maxCodes bounds the series that a receiver can make by answering with ever new statuses.
const maxCodes = 64

// codes are the counters of one endpoint's attempts, looked up without making a label.
type codes struct {
	endpoint string
	attempts *prometheus.CounterVec

	mu sync.RWMutex                // guards by
	by map[code]prometheus.Counter // nil when the endpoint is forgotten
}

func (m *metrics) codes(endpoint string) *codes {
	return &codes{endpoint: endpoint, attempts: m.attempts, by: make(map[code]prometheus.Counter)}
}

// code is a status, or the reason where there was none.
type code struct {
	status int
	reason outbox.Reason
}

func (c *codes) inc(o outbox.Outcome) {
	k := code{status: o.Status}
	if o.Status == 0 {
		k.reason = o.Reason
	}
	c.mu.RLock()
	counter := c.by[k]
	c.mu.RUnlock()
	if counter == nil {
		if counter = c.add(k); counter == nil {
			return
		}
	}
	counter.Inc()
}

// add makes the counter of a code that is new to the endpoint; nil when that is forgotten.
func (c *codes) add(k code) prometheus.Counter {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.by == nil || c.by[k] != nil {
		return c.by[k]
	}
	label := string(k.reason)
	if k.status != 0 {
		label = strconv.Itoa(k.status)
	}
	if len(c.by) >= maxCodes {
		return c.attempts.WithLabelValues(c.endpoint, "other")
	}
	c.by[k] = c.attempts.WithLabelValues(c.endpoint, label)
	return c.by[k]
}
