package main

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	screenWidth = 100
	// progressEvery is how often progress is printed where it cannot be rewritten in place.
	progressEvery = 5 * time.Second
)

// screen is where the demo is seen: lines that stay, and under them, on a terminal, one line of
// progress that is rewritten in place.
type screen struct {
	w      io.Writer
	live   bool
	began  time.Time
	unread func() // called when nobody reads any more

	mu      sync.Mutex // guards what follows
	under   string     // the line of progress
	printed time.Time
}

func newScreen(w io.Writer) *screen {
	s := &screen{w: w, began: time.Now(), unread: func() {}}
	if f, ok := w.(*os.File); ok && os.Getenv("TERM") != "dumb" {
		info, err := f.Stat()
		s.live = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	return s
}

// line prints text that stays, as it is.
func (s *screen) line(text string) { _, _ = s.Write([]byte(text + "\n")) }

// say prints what happens, with the time since the beginning.
func (s *screen) say(text string) {
	const margin = "          "
	at := fmt.Sprintf("%7.1fs  ", time.Since(s.began).Seconds())
	var b strings.Builder
	column := 0
	for _, word := range strings.Fields(text) {
		n := len([]rune(word))
		switch {
		case column == 0:
			b.WriteString(at)
			column = len(margin)
		case column+1+n > screenWidth:
			b.WriteString("\n" + margin)
			column = len(margin)
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += n
	}
	s.line(b.String())
}

// progress shows the numbers of the moment.
func (s *screen) progress(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	text = fmt.Sprintf("%7.1fs  %s", time.Since(s.began).Seconds(), text)
	switch {
	case s.live && text != s.under:
		s.under = text
		s.put("\r" + text + "\x1b[K")
	case !s.live && time.Since(s.printed) >= progressEvery:
		s.printed = time.Now()
		s.put(text + "\n")
	}
}

// clear takes the line of progress away.
func (s *screen) clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.under != "" {
		s.under = ""
		s.put("\r\x1b[K")
	}
}

// Write prints above the line of progress.
func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	text := string(p)
	if s.under != "" {
		text = "\r\x1b[K" + text + s.under
	}
	s.put(text)
	return len(p), nil
}

func (s *screen) put(text string) {
	if _, err := io.WriteString(s.w, text); err != nil {
		s.unread()
	}
}

// thousands is 12345 as 12,345.
func thousands(n int) string {
	text := strconv.Itoa(n)
	for i := len(text) - 3; i > 0 && text[i-1] != '-'; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// shortly is a duration with two or three digits that matter.
func shortly(d time.Duration) string {
	switch ms := float64(d) / float64(time.Millisecond); {
	case d <= 0:
		return "-"
	case ms < 10:
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 1000:
		return fmt.Sprintf("%.0f ms", ms)
	default:
		return fmt.Sprintf("%.1f s", ms/1000)
	}
}

func size(bytes int64) string {
	switch {
	case bytes < 10_000:
		return thousands(int(max(bytes, 0))) + " B"
	case bytes < 10<<20:
		return thousands(int(bytes>>10)) + " kB"
	}
	return thousands(int(bytes>>20)) + " MB"
}
