package main

import (
	"net/http"
	"net/url"
	"testing"
	"time"
)

// docs/reference/zitadel-protocol.md#personal-access-tokens
func TestPersonalAccessToken(t *testing.T) {
	s := start(t)
	id := s.newUser(`{"username":"root","administrator":true}`)
	var made struct{ ID, Token string }
	s.order("POST", "/users/"+id+"/pats", `{}`, &made)
	list := func(token string) reply { return s.rpc(token, adminService+"ListAdministrators", `{}`) }
	expect(t, list(made.Token), "200")
	expect(t, s.call(made.Token, "GET", "/management/v1/iam", ""), "200")

	t.Run("a token of the API works like one of the control port", func(t *testing.T) {
		var pat struct{ TokenID, Token string }
		decodeReply(t, s.call(made.Token, "POST", "/v2/users/"+id+"/pats", `{"expirationDate":"2100-01-01T00:00:00Z"}`), &pat)
		expect(t, list(pat.Token), "200")
		expect(t, s.call(pat.Token, "DELETE", "/v2/users/"+id+"/pats/"+pat.TokenID, ""), "200")
		expect(t, list(pat.Token), rpcError(401, "unauthenticated", "AUTH-7fs1e", "Errors.Token.Invalid"))
	})
	t.Run("introspection", func(t *testing.T) {
		var app struct{ ClientID, ClientSecret string }
		s.order("POST", "/apps", `{"projectId":"5"}`, &app)
		header := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
		form := url.Values{"token": {made.Token}, "client_id": {app.ClientID}, "client_secret": {app.ClientSecret}}
		var said struct {
			Active   bool
			Username string
		}
		decodeReply(t, s.must("POST", s.Issuer+"/oauth/v2/introspect", header, form.Encode()), &said)
		if !said.Active || said.Username != "root" {
			t.Errorf("%+v", said)
		}
	})
	t.Run("expired", func(t *testing.T) {
		var short struct{ ID, Token string }
		s.order("POST", "/users/"+id+"/pats", `{"expirationDate":"`+timestamp(time.Now().Add(-time.Second))+`"}`, &short)
		expect(t, list(short.Token), rpcError(401, "unauthenticated", "AUTH-7fs1e", "Errors.Token.Invalid"))
	})
	t.Run("inactive user", func(t *testing.T) {
		s.order("PATCH", "/users/"+id, `{"state":"inactive"}`, nil)
		expect(t, s.call(made.Token, "GET", "/management/v1/iam", ""), badToken)
		s.order("PATCH", "/users/"+id, `{"state":"active"}`, nil)
		expect(t, s.call(made.Token, "GET", "/management/v1/iam", ""), "200")
	})
	t.Run("removed by hand", func(t *testing.T) {
		s.order("DELETE", "/users/"+id+"/pats/"+made.ID, "", nil)
		expect(t, s.call(made.Token, "GET", "/management/v1/iam", ""), badToken)
	})
}
