package main

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestStopsWhenStdinCloses(t *testing.T) {
	s := start(t)
	s.stdin.Close()
	select {
	case err := <-s.stopped:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("still running")
	}
	if got, err := s.send("GET", s.Control+"/settings", nil, ""); err == nil {
		t.Fatalf("still serving: %s", got)
	}
}

func TestTLS(t *testing.T) {
	s := start(t, "--tls")
	if !strings.HasPrefix(s.Issuer, "https://127.0.0.1:") {
		t.Fatal(s.Issuer)
	}
	me := s.newKey(s.newUser(`{}`), `{}`)
	s.mint(me, "openid")
	s.order("POST", "/faults", `{"path":"`+tokenPath+`","reset":true,"times":1}`, nil)
	if got, err := s.send("POST", s.Issuer+tokenPath, formHeader, form(s.assertion(me), "").Encode()); err == nil {
		t.Errorf("no reset: %s", got)
	}
}

// docs/reference/zitadel-protocol.md#key-file
func TestKeyFile(t *testing.T) {
	s := start(t)
	id := s.newUser(`{}`)
	if len(id) != 18 || strings.Trim(id, "0123456789") != "" {
		t.Errorf("not in the form of a ZITADEL id: %s", id)
	}
	text := s.must("POST", s.Control+"/users/"+id+"/keys", nil, "").body
	if !strings.HasPrefix(text, `{"type":"serviceaccount","keyId":"`) || !strings.Contains(text, `","key":"-----BEGIN RSA PRIVATE KEY-----\n`) ||
		!strings.HasSuffix(text, `-----END RSA PRIVATE KEY-----\n","expirationDate":"9999-12-31T23:59:59Z","userId":"`+id+`"}`) {
		t.Error(text)
	}
	var file keyFile
	s.order("POST", "/users/"+id+"/keys", `{"pkcs8":true,"expirationDate":"2030-01-02T03:04:05Z"}`, &file)
	block, _ := pem.Decode([]byte(file.Key))
	if _, err := x509.ParsePKCS8PrivateKey(block.Bytes); err != nil || block.Type != "PRIVATE KEY" {
		t.Error(err, block.Type)
	}
	if got := file.ExpirationDate.Format(time.RFC3339); got != "2030-01-02T03:04:05Z" {
		t.Error(got)
	}
}

func TestControlRefusesInvalidRequests(t *testing.T) {
	s := start(t)
	id := s.newUser(`{"username":"taken"}`)
	for _, row := range []struct {
		method, path, body string
		status             int
	}{
		{"POST", "/users", `{"tokentyp":"JWT"}`, 400},
		{"POST", "/users", `{"tokenType":"SAML"}`, 400},
		{"POST", "/users", `{"username":"taken"}`, 409},
		{"POST", "/users", `{"id":"` + id + `"}`, 409},
		{"POST", "/users", `{}{}`, 400},
		{"PATCH", "/users/" + id, `{"state":"dead"}`, 400},
		{"PATCH", "/users/1", `{}`, 404},
		{"DELETE", "/users/1", ``, 404},
		{"POST", "/users/1/keys", `{}`, 404},
		{"POST", "/users/" + id + "/keys", `{"publicKey":"x"}`, 400},
		{"DELETE", "/users/" + id + "/keys/1", ``, 404},
		{"POST", "/apps", `{}`, 400},
		{"PATCH", "/settings", `{"dialect":"klingon"}`, 400},
		{"PATCH", "/settings", `{"lifetimeSeconds":0}`, 400},
		{"PATCH", "/settings", `{"externalDomain":"https://auth.example.com"}`, 400},
		{"GET", "/requests?since=yesterday", ``, 400},
		{"POST", "/faults", `{}`, 400},
		{"POST", "/faults", `{"path":"/","status":42}`, 400},
		{"POST", "/faults", `{"path":"/","bodyBase64":"?"}`, 400},
		{"POST", "/faults", `{"path":"/","hang":true,"reset":true}`, 400},
		{"DELETE", "/faults/1", ``, 404},
	} {
		got := s.must(row.method, s.Control+row.path, nil, row.body)
		var said struct{ Error string }
		if json.Unmarshal([]byte(got.body), &said); got.status != row.status || said.Error == "" {
			t.Errorf("%s %s %s: %s", row.method, row.path, row.body, got)
		}
	}
}

type recorded struct {
	Next     int64    `json:"next"`
	Requests []record `json:"requests"`
}

func TestRecorder(t *testing.T) {
	s := start(t)
	me := s.newKey(s.newUser(`{}`), `{}`)
	signed := s.assertion(me)
	minted := s.tokens(s.exchange(form(signed, "openid  profile")))
	s.mint(me, "openid  profile")
	s.exchange(form("garbage", "openid"))
	s.must("GET", s.Issuer+keysPath+"?a=b", http.Header{"X-Zitadel-Instance-Host": {"127.0.0.1"}}, "")

	var all recorded
	s.order("GET", "/requests", "", &all)
	if all.Next != 5 || len(all.Requests) != 4 {
		t.Fatalf("%+v", all)
	}
	first, third, last := all.Requests[0], all.Requests[2], all.Requests[3]
	if first.Seq != 1 || first.Method != "POST" || first.Path != tokenPath || first.UserID != me.UserID || strings.Join(first.Scopes, ",") != "openid,profile" ||
		first.Form.Get("assertion") != signed || first.Form.Get("scope") != "openid  profile" || first.Status != 200 ||
		first.AccessToken != minted.AccessToken || first.ExpiresIn != 43199 || "http://"+first.Host != s.Issuer {
		t.Errorf("%+v", first)
	}
	if !strings.Contains(string(first.Assertion.Header), `"kid":"`+me.KeyID+`"`) || !strings.Contains(string(first.Assertion.Claims), `"aud":"`+s.Issuer+`"`) {
		t.Errorf("%s %s", first.Assertion.Header, first.Assertion.Claims)
	}
	if third.Status != 400 || third.Error != "invalid_grant" || third.Assertion != nil || third.AccessToken != "" {
		t.Errorf("%+v", third)
	}
	if last.Query != "a=b" || last.InstanceHost != "127.0.0.1" || last.Status != 200 {
		t.Errorf("%+v", last)
	}
	var some recorded
	if s.order("GET", "/requests?since=4", "", &some); len(some.Requests) != 1 || some.Requests[0].Seq != 4 {
		t.Errorf("%+v", some)
	}
	want := `200 {"requests":{"GET /oauth/v2/keys":1,"POST /oauth/v2/token":3},"mints":[{"userId":"` + me.UserID + `","scope":"openid  profile","count":2}]}`
	expect(t, s.must("GET", s.Control+"/counts", nil, ""), want)
	s.order("DELETE", "/requests", "", nil)
	expect(t, s.must("GET", s.Control+"/requests", nil, ""), `200 {"next":5,"requests":[]}`)
	expect(t, s.must("GET", s.Control+"/counts", nil, ""), `200 {"requests":{},"mints":[]}`)
}

func TestRecorderKeepsTheLastRequests(t *testing.T) {
	var l recorder
	const surplus = 7
	request, _ := http.NewRequest("GET", "/", http.NoBody)
	for range 2*recordsKept + surplus {
		l.arrived(request, "")
	}
	kept, next := l.since(0)
	if len(kept) != recordsKept || kept[0].Seq != recordsKept+surplus+1 || next != 2*recordsKept+surplus+1 {
		t.Errorf("%d from %d, next %d", len(kept), kept[0].Seq, next)
	}
}

func TestFaults(t *testing.T) {
	s := start(t)
	me := s.newKey(s.newUser(`{}`), `{}`)
	fault := func(fields string) (id int) {
		var made struct{ ID int }
		s.order("POST", "/faults", `{"path":"`+tokenPath+`",`+fields+`}`, &made)
		return made.ID
	}
	exchange := func(scope string) (reply, error) {
		return s.send("POST", s.Issuer+tokenPath, formHeader, form(s.assertion(me), scope).Encode())
	}
	mints := func() int {
		var c counts
		s.order("GET", "/counts", "", &c)
		sum := 0
		for _, m := range c.Mints {
			sum += m.Count
		}
		return sum
	}
	must := func(scope string) reply {
		t.Helper()
		got, err := exchange(scope)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}

	t.Run("status, headers and body, twice", func(t *testing.T) {
		fault(`"times":2,"status":429,"headers":{"retry-after":"7"},"body":"slow down"`)
		for range 2 {
			got := must("")
			expect(t, got, "429 slow down")
			if got.header.Get("Retry-After") != "7" {
				t.Error(got.header)
			}
		}
		expect(t, must(""), "200")
		if n := mints(); n != 1 {
			t.Errorf("%d mints", n)
		}
	})
	t.Run("only matching requests", func(t *testing.T) {
		fault(`"status":503,"userId":"` + me.UserID + `","scopeContains":"profile"`)
		expect(t, must("openid"), "200")
		expect(t, must("openid profile"), "503 ")
		expect(t, must("openid profile"), "503 ")
		s.order("DELETE", "/faults", "", nil)
		id := fault(`"status":503,"userId":"1"`)
		expect(t, must("openid profile"), "200")
		s.order("DELETE", "/faults/"+strconv.Itoa(id), "", nil)
	})
	t.Run("latency alone", func(t *testing.T) {
		fault(`"times":1,"latencyMillis":150`)
		began := time.Now()
		expect(t, must(""), "200")
		if took := time.Since(began); took < 150*time.Millisecond {
			t.Error(took)
		}
	})
	t.Run("after handling", func(t *testing.T) {
		before := mints()
		fault(`"times":1,"status":502,"bodyBase64":"/w==","afterHandling":true`)
		expect(t, must(""), "502 \xff")
		fault(`"times":1,"reset":true,"afterHandling":true`)
		if got, err := exchange(""); err == nil || !strings.Contains(err.Error(), "reset") {
			t.Errorf("%s %v", got, err)
		}
		if n := mints() - before; n != 2 {
			t.Errorf("%d mints", n)
		}
		var all recorded
		s.order("GET", "/requests", "", &all)
		if last := all.Requests[len(all.Requests)-1]; last.Status != 0 || last.AccessToken == "" {
			t.Errorf("%+v", last)
		}
	})
	t.Run("hang", func(t *testing.T) {
		fault(`"times":1,"hang":true`)
		patient := s.client.Timeout
		s.client.Timeout = 200 * time.Millisecond
		if got, err := exchange(""); err == nil {
			t.Errorf("unexpected answer: %s", got)
		}
		s.client.Timeout = patient
		expect(t, must(""), "200")
	})
	t.Run("reset", func(t *testing.T) {
		fault(`"times":1,"reset":true`)
		if got, err := exchange(""); err == nil || !strings.Contains(err.Error(), "reset") {
			t.Errorf("%s %v", got, err)
		}
	})
	t.Run("drip", func(t *testing.T) {
		fault(`"times":1,"dripMillisPerByte":20,"body":"0123456789"`)
		began := time.Now()
		expect(t, must(""), "200 0123456789")
		if took := time.Since(began); took < 200*time.Millisecond {
			t.Error(took)
		}
	})
	t.Run("endless body", func(t *testing.T) {
		fault(`"times":1,"repeatBodyBytes":3000001,"body":"ab"`)
		if got := must(""); len(got.body) != 3_000_001 || !strings.HasPrefix(got.body, "abab") {
			t.Error(len(got.body))
		}
	})
	t.Run("clock", func(t *testing.T) {
		s.order("PATCH", "/settings", `{"clockOffsetMillis":-7200000}`, nil)
		defer s.order("PATCH", "/settings", `{"clockOffsetMillis":0}`, nil)
		got := must("")
		expect(t, got, ia) // iat is two hours ahead of the server's clock
		date, err := http.ParseTime(got.header.Get("Date"))
		if err != nil || time.Since(date).Round(time.Minute) != 2*time.Hour {
			t.Errorf("Date: %s", got.header.Get("Date"))
		}
	})
}
