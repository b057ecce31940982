package main

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestProjectionLag(t *testing.T) {
	const lag = 300 * time.Millisecond
	s := start(t, "--projection-lag", lag.String())
	id := s.newUser(`{}`)
	me, other := s.newKey(id, `{}`), s.newKey(id, `{}`)
	expect(t, s.exchange(form(s.assertion(other), "openid")), ia)
	s.order("GET", "/settled", "", nil)
	s.mint(me, "openid")

	for _, change := range []struct {
		name, method, path, body string
		before, after            string
	}{
		{"a key removed", "DELETE", "/users/" + id + "/keys/" + other.KeyID, "", "200", ia},
		{"deactivated", "PATCH", "/users/" + id, `{"state":"inactive"}`, "200", notActive},
		{"reactivated", "PATCH", "/users/" + id, `{"state":"active"}`, notActive, "200"},
		{"removed", "DELETE", "/users/" + id, "", "200", ia},
	} {
		t.Run(change.name, func(t *testing.T) {
			key := me
			if change.name == "a key removed" {
				key = other
			}
			changed := time.Now()
			s.order(change.method, change.path, change.body, nil)
			got := s.exchange(form(s.assertion(key), "openid"))
			if time.Since(changed) < lag { // otherwise the machine was too slow to observe the old state
				expect(t, got, change.before)
			}
			s.order("GET", "/settled", "", nil)
			expect(t, s.exchange(form(s.assertion(key), "openid")), change.after)
		})
	}
}

func TestManagement(t *testing.T) {
	for _, api := range []struct {
		name, settings                  string
		create, key, content, update    string
		updateMethod, deactivate, users string
	}{
		{
			name: "user v2", settings: `{}`, users: "/v2/users/",
			create: `/v2/users/new {"organizationId":"` + defaultOrganizationID + `","username":"u","machine":{"name":"n"}}`,
			key:    `{"expirationDate":"2100-01-01T00:00:00Z"}`, content: "keyContent",
			updateMethod: "PATCH", update: ` {"machine":{"accessTokenType":"ACCESS_TOKEN_TYPE_JWT"}}`, deactivate: "/deactivate",
		},
		{
			name: "management v1", settings: `{"userV2":false}`, users: "/management/v1/users/",
			create: `/management/v1/users/machine {"userName":"u","name":"n"}`,
			key:    `{"type":"KEY_TYPE_JSON"}`, content: "keyDetails",
			updateMethod: "PUT", update: `/machine {"name":"n","accessTokenType":"ACCESS_TOKEN_TYPE_JWT"}`, deactivate: "/_deactivate",
		},
	} {
		t.Run(api.name, func(t *testing.T) {
			s := start(t)
			s.order("PATCH", "/settings", api.settings, nil)
			token := s.mint(s.newKey(s.newUser(`{"administrator":true}`), `{}`), "urn:zitadel:iam:org:project:id:zitadel:aud").AccessToken
			call := func(method, what string) map[string]any {
				t.Helper()
				path, body, _ := strings.Cut(what, " ")
				got := s.must(method, s.Issuer+path, http.Header{"Authorization": {"Bearer " + token}}, body)
				if got.status != 200 {
					t.Fatalf("%s %s: %s", method, path, got)
				}
				var fields map[string]any
				if err := json.Unmarshal([]byte(got.body), &fields); err != nil {
					t.Fatal(err)
				}
				return fields
			}
			made := call("POST", api.create)
			id, _ := made["id"].(string)
			if id == "" {
				id, _ = made["userId"].(string)
			}
			user := api.users + id
			if file, _ := call("POST", user+"/keys "+api.key)[api.content].(string); !strings.HasPrefix(file, "eyJ0eXBlIjoic2VydmljZWFjY291bnQi") {
				t.Errorf("not a base64 key file: %q", file)
			}
			key := s.newKey(id, `{}`)
			if got := s.mint(key, "openid").AccessToken; strings.Count(got, ".") == 2 {
				t.Errorf("a JWT, want an opaque token: %s", got)
			}
			call(api.updateMethod, user+api.update)
			if got := s.mint(key, "openid").AccessToken; strings.Count(got, ".") != 2 {
				t.Errorf("not a JWT: %s", got)
			}
			call("POST", user+api.deactivate+" {}")
			expect(t, s.exchange(form(s.assertion(key), "openid")), notActive)
			call("DELETE", user+"/keys/"+key.KeyID)
			expect(t, s.exchange(form(s.assertion(key), "openid")), ia)
			call("DELETE", user)
		})
	}
}

func TestManagementRefusals(t *testing.T) {
	s := start(t)
	const zitadel = "urn:zitadel:iam:org:project:id:zitadel:aud"
	admin := s.newKey(s.newUser(`{"administrator":true}`), `{}`)
	mine, other := s.mint(admin, zitadel).AccessToken, s.mint(s.newKey(s.newUser(`{}`), `{}`), zitadel).AccessToken
	const (
		member  = `404 {"code":5,"message":"membership not found (AUTHZ-cdgFk)","details":[{"@type":"type.googleapis.com/zitadel.v1.ErrorDetail","id":"AUTHZ-cdgFk","message":"membership not found"}]}`
		noKey   = `404 {"code":5,"message":"Machine key not found (COMMAND-4m77G)","details":[{"@type":"type.googleapis.com/zitadel.v1.ErrorDetail","id":"COMMAND-4m77G","message":"Machine key not found"}]}`
		missing = `400 {"code":3,"message":"invalid AddKeyRequest.ExpirationDate: value is required"}`
	)
	for _, row := range []struct{ name, token, settings, method, path, body, want string }{
		{"no role", other, `{}`, "POST", "/v2/users/new", `{"organizationId":"` + defaultOrganizationID + `","machine":{"name":"n"}}`, member},
		{"no key", mine, `{}`, "DELETE", "/v2/users/" + admin.UserID + "/keys/1", ``, noKey},
		{"no date", mine, `{}`, "POST", "/v2/users/" + admin.UserID + "/keys", `{}`, missing},
		{"ZITADEL 3", mine, `{"userV2":false}`, "POST", "/v2/users/new", `{}`, `405 {"code":12,"message":"Method Not Allowed"}`},
		{"ZITADEL 3", mine, `{"userV2":false}`, "POST", "/v2/users/1/keys", `{}`, `404 {"code":5,"message":"Not Found"}`},
	} {
		t.Run(row.name, func(t *testing.T) {
			s.order("PATCH", "/settings", row.settings, nil)
			expect(t, s.must(row.method, s.Issuer+row.path, http.Header{"Authorization": {"Bearer " + row.token}}, row.body), row.want)
		})
	}
}
