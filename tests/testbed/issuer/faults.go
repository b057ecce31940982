package main

import (
	"cmp"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
)

// fault changes how the issuer answers. Fields that are not set keep the issuer's own behaviour. For example,
// a fault with only latency, headers or dripping keeps the issuer's answer.
type fault struct {
	Path          string `json:"path"`
	UserID        string `json:"userId"`
	ScopeContains string `json:"scopeContains"`
	Times         int    `json:"times"` // 0: until removed

	AfterHandling     bool              `json:"afterHandling"`
	LatencyMillis     int64             `json:"latencyMillis"`
	Hang              bool              `json:"hang"`
	Reset             bool              `json:"reset"`
	Status            int               `json:"status"`
	Headers           map[string]string `json:"headers"`
	Body              *string           `json:"body"`
	BodyBase64        []byte            `json:"bodyBase64"`
	RepeatBodyBytes   int64             `json:"repeatBodyBytes"`
	DripMillisPerByte int64             `json:"dripMillisPerByte"`
}

func (f fault) check() error {
	switch {
	case !strings.HasPrefix(f.Path, "/"):
		return errors.New("path must be the path of a request, such as " + tokenPath)
	case f.Times < 0 || f.LatencyMillis < 0 || f.DripMillisPerByte < 0 || f.RepeatBodyBytes < 0:
		return errors.New("times, latencyMillis, dripMillisPerByte and repeatBodyBytes must not be negative")
	case f.Status != 0 && (f.Status < 200 || f.Status > 599):
		return errors.New("status must be between 200 and 599")
	case f.Body != nil && f.BodyBase64 != nil:
		return errors.New("body and bodyBase64 are mutually exclusive")
	case f.Hang && f.Reset:
		return errors.New("hang and reset are mutually exclusive")
	}
	return nil
}

func (f fault) matches(r *record) bool {
	return f.Path == r.Path &&
		(f.UserID == "" || f.UserID == r.UserID) &&
		strings.Contains(r.Form.Get("scope"), f.ScopeContains)
}

// replacesAnswer reports whether the fault replaces the issuer's answer.
func (f fault) replacesAnswer() bool {
	return f.Status != 0 || f.Body != nil || f.BodyBase64 != nil || f.RepeatBodyBytes > 0
}

func (f fault) change(a *answer) {
	a.status = cmp.Or(f.Status, a.status)
	if f.Body != nil || f.BodyBase64 != nil {
		a.body.Reset()
		a.body.Write(f.BodyBase64)
		if f.Body != nil {
			a.body.WriteString(*f.Body)
		}
	}
	for name, value := range f.Headers {
		a.header.Set(name, value)
	}
}

// repeated returns a body of the given length that repeats the text.
func repeated(text []byte, length int64) io.Reader {
	if len(text) == 0 {
		text = []byte("x")
	}
	return io.LimitReader(&repeater{text: text}, length)
}

type repeater struct {
	text []byte
	at   int
}

func (r *repeater) Read(into []byte) (int, error) {
	n := 0
	for n < len(into) {
		copied := copy(into[n:], r.text[r.at:])
		n += copied
		r.at = (r.at + copied) % len(r.text)
	}
	return n, nil
}

// faults holds the active faults. Its zero value is usable.
type faults struct {
	mu     sync.Mutex
	lastID int
	active []activeFault
}

type activeFault struct {
	id   int
	used int
	fault
}

func (f *faults) add(added fault) (id int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lastID++
	f.active = append(f.active, activeFault{id: f.lastID, fault: added})
	return f.lastID
}

// take returns the first fault that matches a request and counts its use. Without a match it returns a fault
// that changes nothing.
func (f *faults) take(r *record) fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	at := slices.IndexFunc(f.active, func(a activeFault) bool { return a.matches(r) })
	if at < 0 {
		return fault{}
	}
	taken := &f.active[at]
	taken.used++
	found := taken.fault
	if taken.used == found.Times {
		f.active = slices.Delete(f.active, at, at+1)
	}
	return found
}

// remove removes a fault and reports whether it was active.
func (f *faults) remove(id int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	before := len(f.active)
	f.active = slices.DeleteFunc(f.active, func(a activeFault) bool { return a.id == id })
	return len(f.active) < before
}

func (f *faults) clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.active = nil
}
