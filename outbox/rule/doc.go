// Package rule is the language of walhook's configuration: CEL expressions, parsed and
// type-checked when the configuration is loaded and bounded in what they may cost when they run.
// It alone knows cel-go.
//
// It promises that a rule which cannot work fails the configuration and never a request, with
// the line, the column and a caret under the mistake; that evaluation ends, whatever the
// expression and whatever the data (CEL has no unbounded loop, regular expressions are linear,
// and a cost limit bounds the rest); that a panic inside cel-go comes back as an error; and that
// equal input gives equal text, byte for byte, or a re-sent event would have another signature.
//
// It never does input or output, starts no goroutine, and knows nothing of Postgres: the caller
// brings Go values (string, int64, uint64, float64, bool, nil, time.Time, []byte, and what
// ParseJSON returns) and takes text.
//
// Numbers beyond what Go can hold, and decimals, keep the text they were read from (Number) until a
// function computes with them; guard.go stands between the two, and makes a rule pay for what a
// function walks through before it does.
//
// A rule's kind is what it reads and what it gives. Column reads one variable, row, and gives
// text. Filter, Body, Form, Headers and Target read an Event.
package rule
