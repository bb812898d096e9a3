package main

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

const (
	// logQueueBytes of lines may wait for whoever reads the log: half of it gathers while the
	// other half is being written.
	logQueueBytes = 1 << 20
	// logPatience is how long an end waits for the lines before it to be written.
	logPatience = time.Second
)

var errLogStuck = errors.New("the log is not being read")

// logQueue stands between the log and where it goes, which may be a pipe that nobody reads or
// a disk that is full. Write never waits: a line that finds the queue full is dropped and
// counted, and when lines flow again one of them says how many are missing at that place. A
// line that could not be written is dropped too.
//
// (zap's BufferedWriteSyncer waits when its buffer is full. zerolog's diode bounds the number of
// lines and not their bytes, drops the oldest without leaving a mark where, and closes only
// when all is written, which may be never.)
//
// It needs no Close: its writer is a goroutine that ends when there is nothing to write.
type logQueue struct {
	to      io.Writer
	encode  zapcore.Encoder // of the line about dropped lines; nil says nothing
	dropped atomic.Int64

	mu      sync.Mutex    // guards what follows
	next    logLines      // what the writer takes next
	gap     int64         // lines dropped behind next
	writing chan struct{} // closed when the writer has nothing left; nil while there is none

	// The writer's own, of which there is one at a time.
	now    logLines
	unsaid int64 // lines dropped that no line tells of yet
	torn   bool  // a line was written in part
}

// logLines are whole lines, one behind the other.
type logLines struct {
	text []byte
	ends []int
}

func (l *logLines) add(p []byte) {
	l.text = append(l.text, p...)
	l.ends = append(l.ends, len(l.text))
}

func (l *logLines) reset() { l.text, l.ends = l.text[:0], l.ends[:0] }

func newLogQueue(to io.Writer) *logQueue { return &logQueue{to: to} }

// logOutput is what a logger with this encoder writes w through.
func logOutput(w io.Writer, encode zapcore.Encoder) zapcore.WriteSyncer {
	if q, ok := w.(*logQueue); ok {
		q.encode = encode
		return q
	}
	return zapcore.Lock(zapcore.AddSync(w))
}

// Write takes a line, or drops it. It always tells that it took it.
func (q *logQueue) Write(p []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.gap > 0 || len(q.next.text)+len(p) > logQueueBytes/2 {
		q.gap++ // also what would still fit: the gap is in one place
		q.dropped.Add(1)
	} else {
		q.next.add(p)
	}
	if q.writing == nil {
		q.writing = make(chan struct{})
		go q.write()
	}
	return len(p), nil
}

// Sync waits a moment for what was taken to be written. A logger calls it before it lets the
// process die.
func (q *logQueue) Sync() error {
	q.mu.Lock()
	writing := q.writing
	q.mu.Unlock()
	if writing == nil {
		return nil
	}
	t := time.NewTimer(logPatience)
	defer t.Stop()
	select {
	case <-writing:
		return nil
	case <-t.C:
		return errLogStuck
	}
}

func (q *logQueue) write() {
	for {
		q.mu.Lock()
		if len(q.next.ends) == 0 && q.gap == 0 {
			close(q.writing)
			q.writing = nil
			q.mu.Unlock()
			return
		}
		q.now, q.next = q.next, q.now
		gap := q.gap
		q.gap = 0
		q.mu.Unlock()

		begin := 0
		for _, end := range q.now.ends {
			if !q.line(q.now.text[begin:end]) {
				q.dropped.Add(1)
				q.unsaid++
			}
			begin = end
		}
		q.now.reset()
		if q.unsaid += gap; q.unsaid > 0 && q.line(q.notice()) {
			q.unsaid = 0
		}
	}
}

// line writes one line, and tells whether it is written.
func (q *logQueue) line(p []byte) bool {
	if q.torn {
		if _, err := q.to.Write([]byte("\n")); err != nil {
			return false
		}
		q.torn = false
	}
	n, err := q.to.Write(p)
	q.torn = err != nil && n > 0
	return err == nil
}

func (q *logQueue) notice() []byte {
	if q.encode == nil {
		return nil
	}
	line, err := q.encode.Clone().EncodeEntry(zapcore.Entry{
		Level: zapcore.WarnLevel, Time: time.Now(), LoggerName: "log", Message: "log lines were dropped here: nobody read them in time",
	}, []zapcore.Field{zap.Int64("lines", q.unsaid)})
	if err != nil {
		return nil
	}
	return line.Bytes()
}

// metric counts what was dropped.
func (q *logQueue) metric() prometheus.Collector {
	return prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "walhook_log_dropped_total",
		Help: "Log lines that could not be written, or not in time. Worry when it grows: look at what reads the log.",
	}, func() float64 { return float64(q.dropped.Load()) })
}
