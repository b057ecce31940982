package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// front wraps the issuer: it records every request and applies faults.
type front struct {
	next   http.Handler
	users  *directory
	log    recorder
	faults faults
}

func (f *front) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	request, err := f.log.arrived(r, f.caller(r))
	if err != nil {
		return // the client closed the connection while sending
	}
	fault := f.faults.take(request)
	answer := &answer{header: http.Header{}, status: http.StatusOK}
	handle := func() {
		f.next.ServeHTTP(answer, r)
		f.log.handled(request, answer)
	}

	if fault.AfterHandling {
		handle()
	}
	if !wait(r.Context(), millis(fault.LatencyMillis)) {
		return
	}
	if fault.Hang {
		<-r.Context().Done()
		return
	}
	if fault.Reset {
		reset(w)
		return
	}
	if !fault.AfterHandling && !fault.replacesAnswer() {
		handle()
	}
	answer.header.Set("Date", f.users.settings().now().UTC().Format(http.TimeFormat))
	fault.change(answer)
	f.log.answered(request, answer)

	var body io.Reader = &answer.body
	if fault.RepeatBodyBytes > 0 {
		body = repeated(answer.body.Bytes(), fault.RepeatBodyBytes)
	}
	answer.send(r.Context(), w, body, fault.DripMillisPerByte)
}

// caller returns the id of the user whose valid access token is in the request, or an empty string. The token
// itself is not recorded.
func (f *front) caller(r *http.Request) string {
	session, err := f.users.session(bearer(r))
	if err != nil {
		return ""
	}
	return session.userID
}

// bearer returns the access token in a request.
func bearer(r *http.Request) string {
	return strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
}

// answer is a buffered response.
type answer struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (a *answer) Header() http.Header            { return a.header }
func (a *answer) WriteHeader(status int)         { a.status = status }
func (a *answer) Write(text []byte) (int, error) { return a.body.Write(text) }

func (a *answer) send(ctx context.Context, w http.ResponseWriter, body io.Reader, millisPerByte int64) {
	for name, values := range a.header {
		w.Header()[name] = values
	}
	w.WriteHeader(a.status)
	if millisPerByte == 0 {
		io.Copy(w, body)
		return
	}
	flusher := http.NewResponseController(w)
	for {
		if _, err := io.CopyN(w, body, 1); err != nil {
			return
		}
		flusher.Flush()
		if !wait(ctx, millis(millisPerByte)) {
			return
		}
	}
}

func millis(n int64) time.Duration { return time.Duration(n) * time.Millisecond }

// wait returns false if the context ends first.
func wait(ctx context.Context, passed time.Duration) bool {
	if passed <= 0 {
		return true
	}
	select {
	case <-time.After(passed):
		return true
	case <-ctx.Done():
		return false
	}
}

// reset closes the connection so that the client sees "connection reset by peer", not an orderly end.
func reset(w http.ResponseWriter) {
	connection, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err) // only with HTTP/2, which the issuer port does not serve
	}
	if wrapped, isTLS := connection.(interface{ NetConn() net.Conn }); isTLS {
		connection = wrapped.NetConn()
	}
	connection.(*net.TCPConn).SetLinger(0)
	connection.Close()
}
