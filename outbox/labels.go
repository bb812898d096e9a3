package outbox

import "sync"

// OtherEndpoints is the label that endpoints share which have none of their own. An endpoint of
// this id is one of them.
const OtherEndpoints = "other"

// Labels says by which label metrics know an endpoint, so that ten thousand of them do not make
// ten thousand series of each kind: the first ones have their id, all that come later share
// OtherEndpoints. An endpoint keeps its label for as long as it is there, and what becomes free goes to
// the next new one, so nothing is ever counted under two labels at once. A nil Labels gives each its id.
//
// Endpoints of the file come first, then the others as they get their first delivery.
type Labels struct {
	max int

	mu  sync.Mutex // guards what follows
	own map[string]bool
	n   int // of those in own that are true
}

// NewLabels gives at most that many endpoints a label of their own.
func NewLabels(most int) *Labels { return &Labels{max: most, own: map[string]bool{}} }

// Of is the label of an endpoint, and tells whether it is its own.
func (l *Labels) Of(endpointID string) (label string, own bool) {
	if l == nil {
		return endpointID, true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	own, known := l.own[endpointID]
	if !known {
		if own = l.n < l.max && endpointID != OtherEndpoints; own {
			l.n++
		}
		l.own[endpointID] = own
	}
	if own {
		return endpointID, true
	}
	return OtherEndpoints, false
}

// free gives the label of an endpoint back that is gone.
func (l *Labels) free(endpointID string) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.own[endpointID] {
		l.n--
	}
	delete(l.own, endpointID)
}
