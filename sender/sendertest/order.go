package sendertest

import (
	"encoding/json"
	"errors"
	"fmt"
)

// Place says where a request stands in the order that the sender promised: events with one key
// have to come with rising numbers. A request with an empty key has no order.
type Place func(Request) (key string, number int64)

// Fields reads a request's place from two fields of its data: {"key": "a", "seq": 7}.
func Fields(key, number string) Place {
	return func(r Request) (string, int64) {
		var data map[string]json.RawMessage
		if json.Unmarshal(r.Data, &data) != nil {
			return "", 0
		}
		var k string
		var n int64
		if json.Unmarshal(data[key], &k) != nil {
			k = string(data[key]) // a number is a key too
		}
		if json.Unmarshal(data[number], &n) != nil {
			return "", 0
		}
		return k, n
	}
}

// Disorder returns an error that names each accepted request that came behind a later one of
// its key. Only the first acceptance of an event counts: a repeat is at-least-once, not disorder.
func Disorder(requests []Request, place Place) error {
	var errs []error
	type last struct {
		number int64
		id     string
	}
	newest := make(map[string]last)
	seen := make(map[string]bool)
	for _, r := range requests {
		if !r.accepted() || seen[r.ID] {
			continue
		}
		seen[r.ID] = true
		key, n := place(r)
		if key == "" {
			continue
		}
		if before, ok := newest[key]; ok && n < before.number {
			errs = append(errs, fmt.Errorf("key %s: %s (%d) came behind %s (%d)", key, r.ID, n, before.id, before.number))
			continue
		}
		newest[key] = last{n, r.ID}
	}
	return errors.Join(errs...)
}

// Duplicates returns the events accepted more than once, with how often they were.
func Duplicates(requests []Request) map[string]int {
	count := make(map[string]int)
	for _, r := range requests {
		if r.accepted() {
			count[r.ID]++
		}
	}
	for id, n := range count {
		if n == 1 {
			delete(count, id)
		}
	}
	return count
}

func (r Request) accepted() bool { return r.Status/100 == 2 }
