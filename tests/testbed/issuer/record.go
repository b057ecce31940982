package main

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// recordsKept limits the memory use of a long test.
const recordsKept = 100_000

// record is one request to the issuer port. It exists from the arrival of the request. The fields from Status
// on are filled before the answer is sent; Status and Error stay empty if no answer is sent (hang, reset).
type record struct {
	Seq          int64      `json:"seq"`
	Time         string     `json:"time"`
	Method       string     `json:"method"`
	Path         string     `json:"path"`
	Host         string     `json:"host"`
	InstanceHost string     `json:"instanceHost"`
	Authorized   bool       `json:"authorized"` // the request has an Authorization header
	Query        string     `json:"query"`
	Form         url.Values `json:"form"`
	Body         any        `json:"body"` // of a request in JSON
	Assertion    *assertion `json:"assertion,omitempty"`
	UserID       string     `json:"userId"` // of the assertion, or else of the access token
	Scopes       []string   `json:"scopes"`
	Status       int        `json:"status"`
	Error        string     `json:"error"`
	AccessToken  string     `json:"accessToken"`
	ExpiresIn    uint64     `json:"expiresIn"`
}

// assertion is the decoded, unverified assertion of a request.
type assertion struct {
	Header json.RawMessage `json:"header"`
	Claims json.RawMessage `json:"claims"`
}

type mint struct {
	UserID string `json:"userId"`
	Scope  string `json:"scope"`
}

// recorder keeps the last requests and counts all of them. Its zero value is usable.
type recorder struct {
	mu       sync.Mutex
	seq      int64
	records  []*record
	requests map[string]int
	mints    map[mint]int
}

// arrived records a request of a user, or of nobody. Its body can still be read afterwards.
func (l *recorder) arrived(r *http.Request, caller string) (*record, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	copied := r.Clone(r.Context())
	copied.Body = io.NopCloser(bytes.NewReader(body))
	copied.ParseForm() // an invalid form is not recorded; the issuer reports the error
	r.Body = io.NopCloser(bytes.NewReader(body))

	now := &record{
		Time:         time.Now().UTC().Format(time.RFC3339Nano),
		Method:       r.Method,
		Path:         r.URL.Path,
		Host:         r.Host,
		InstanceHost: r.Header.Get("x-zitadel-instance-host"),
		Authorized:   r.Header.Get("Authorization") != "",
		Query:        r.URL.RawQuery,
		Form:         copied.Form,
		Scopes:       strings.Fields(copied.Form.Get("scope")),
	}
	if json.Unmarshal(body, &now.Body) != nil {
		now.Body = nil // not JSON
	}
	now.Assertion, now.UserID = readAssertion(copied.Form.Get("assertion"))
	now.UserID = cmp.Or(now.UserID, caller)

	l.mu.Lock()
	defer l.mu.Unlock()
	l.seq++
	now.Seq = l.seq
	if len(l.records) == 2*recordsKept {
		l.records = slices.Clone(l.records[recordsKept:])
	}
	l.records = append(l.records, now)
	if l.requests == nil {
		l.requests = map[string]int{}
	}
	l.requests[now.Method+" "+now.Path]++
	return now, nil
}

// readAssertion returns the parts of an assertion and its user id, or nothing if it cannot be decoded.
func readAssertion(compact string) (*assertion, string) {
	parts := strings.Split(compact, ".")
	if len(parts) != 3 {
		return nil, ""
	}
	header, headerErr := base64.RawURLEncoding.DecodeString(parts[0])
	claims, claimsErr := base64.RawURLEncoding.DecodeString(parts[1])
	if headerErr != nil || claimsErr != nil || !json.Valid(header) || !json.Valid(claims) {
		return nil, ""
	}
	var named struct {
		Issuer string `json:"iss"`
	}
	json.Unmarshal(claims, &named)
	return &assertion{Header: header, Claims: claims}, named.Issuer
}

// handled records the issuer's own answer, before a fault changes it.
func (l *recorder) handled(r *record, a *answer) {
	if r.Path != tokenPath || a.status != http.StatusOK {
		return
	}
	var tokens struct {
		AccessToken string `json:"access_token"`
		ExpiresIn   uint64 `json:"expires_in"`
	}
	json.Unmarshal(a.body.Bytes(), &tokens)
	l.mu.Lock()
	defer l.mu.Unlock()
	r.AccessToken, r.ExpiresIn = tokens.AccessToken, tokens.ExpiresIn
	if l.mints == nil {
		l.mints = map[mint]int{}
	}
	l.mints[mint{UserID: r.UserID, Scope: r.Form.Get("scope")}]++
}

// answered records the answer that is about to be sent.
func (l *recorder) answered(r *record, a *answer) {
	var failure struct {
		Error string `json:"error"`
	}
	json.Unmarshal(a.body.Bytes(), &failure)
	l.mu.Lock()
	defer l.mu.Unlock()
	r.Status, r.Error = a.status, failure.Error
}

// since returns the kept requests from a sequence number on, and the next sequence number.
func (l *recorder) since(seq int64) (requests []record, next int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	kept := l.records[max(0, len(l.records)-recordsKept):]
	requests = []record{}
	for _, r := range kept {
		if r.Seq >= seq {
			requests = append(requests, *r)
		}
	}
	return requests, l.seq + 1
}

type counts struct {
	Requests map[string]int `json:"requests"`
	Mints    []mintCount    `json:"mints"`
}

type mintCount struct {
	mint
	Count int `json:"count"`
}

func (l *recorder) counts() counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := counts{Requests: map[string]int{}, Mints: []mintCount{}}
	maps.Copy(all.Requests, l.requests)
	for m, n := range l.mints {
		all.Mints = append(all.Mints, mintCount{mint: m, Count: n})
	}
	slices.SortFunc(all.Mints, func(a, b mintCount) int {
		return cmp.Or(cmp.Compare(a.UserID, b.UserID), cmp.Compare(a.Scope, b.Scope))
	})
	return all
}

// clear removes requests and counts. Sequence numbers continue.
func (l *recorder) clear() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.records, l.requests, l.mints = nil, nil, nil
}
