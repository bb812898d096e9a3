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

	labels *outbox.Labels
	others *codes // of endpoints without a label of their own

	mu  sync.Mutex    // guards lit and every lamp
	lit [Open + 1]int // lamps without a label of their own, by state
}

func newMetrics(r prometheus.Registerer, labels *outbox.Labels) (*metrics, error) {
	m := &metrics{
		labels: labels,
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
			Help: "The endpoint's circuit: 0 closed, 1 half-open, 2 open; of the endpoints in other, the highest. Worry when it stays open: its deliveries are parked and wait.",
		}, []string{"endpoint"}),
		shortages: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "walhook_shortages_total",
			Help: "Attempts put off because this host had no descriptor, port or memory to spare for them. Worry when it grows: raise the limit of open files.",
		}),
	}
	m.others = m.newCodes(outbox.OtherEndpoints)
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
func (m *metrics) forget(c *codes, l *lamp) {
	l.out()
	if c == m.others {
		return
	}
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

func (m *metrics) newCodes(label string) *codes {
	return &codes{endpoint: label, attempts: m.attempts, by: make(map[code]prometheus.Counter)}
}

func (m *metrics) codes(endpoint string) *codes {
	if label, own := m.labels.Of(endpoint); own {
		return m.newCodes(label)
	}
	return m.others
}

// lamp shows the state of one endpoint's circuit: by itself, or among others that share its
// label, of which the highest is shown.
type lamp struct {
	m      *metrics
	shared bool
	show   prometheus.Gauge

	on    bool
	state State
	gone  bool
}

func (m *metrics) lamp(endpoint string) *lamp {
	label, own := m.labels.Of(endpoint)
	return &lamp{m: m, shared: !own, show: m.breaker.WithLabelValues(label)}
}

func (l *lamp) set(s State) {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	switch {
	case l.gone:
		return
	case !l.shared:
		l.show.Set(float64(s))
		return
	case l.on:
		l.m.lit[l.state]--
	}
	l.on, l.state = true, s
	l.m.lit[s]++
	l.highest()
}

// out ends what is shown of an endpoint that is gone.
func (l *lamp) out() {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	l.gone = true
	if l.on {
		l.on = false
		l.m.lit[l.state]--
		l.highest()
	}
}

// highest is called with m.mu locked.
func (l *lamp) highest() {
	s := Open
	for ; s > Closed && l.m.lit[s] == 0; s-- {
	}
	l.show.Set(float64(s))
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
