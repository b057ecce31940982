package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// The stand-in must answer like a live server: see the statements marked [M] in
// docs/reference/zitadel-protocol.md.

const (
	ia             = `400 {"error":"invalid_grant","error_description":"invalid assertion"}`
	errorsInternal = `500 {"error":"server_error","error_description":"Errors.Internal"}`
	notActive      = `400 {"error":"invalid_request","error_description":"Errors.User.NotActive"}`
	noAssertion    = `400 {"error":"invalid_request","error_description":"assertion missing"}`
	noGrantType    = `400 {"error":"invalid_request","error_description":"grant_type missing"}`
	noScope        = `400 {"error":"invalid_request","error_description":"The scope of your request is missing. Please ensure some scopes are requested. If you have any questions, you may contact the administrator of the application."}`
)

// expect compares a reply with the expected status and body. "200" matches any body.
func expect(t *testing.T, got reply, want string) {
	t.Helper()
	text := got.String()
	if want == "200" {
		text = text[:3]
	}
	if text != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// docs/reference/zitadel-protocol.md#token-request
func TestGrantType(t *testing.T) {
	s := start(t)
	key := s.newKey(s.newUser(`{}`), `{}`)
	const legacy = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
	signed := s.assertion(key)
	for name, row := range map[string]struct {
		values url.Values
		want   string
	}{
		"client-assertion-type": {url.Values{"grant_type": {legacy}, "assertion": {signed}, "scope": {"openid"}},
			`400 {"error":"unsupported_grant_type","error_description":"` + legacy + ` not supported"}`},
		"jwt-bearer": {form(signed, "openid"), "200"},
		"none":       {url.Values{"assertion": {signed}, "scope": {"openid"}}, noGrantType},
		"client_credentials": {url.Values{"grant_type": {"client_credentials"}, "client_assertion": {signed}, "client_assertion_type": {legacy}},
			`400 {"error":"invalid_client","error_description":"client not found"}`},
	} {
		t.Run(name, func(t *testing.T) {
			got := s.exchange(row.values)
			expect(t, got, row.want)
			for name, want := range map[string]string{"Content-Type": "application/json", "Cache-Control": "no-store", "Pragma": "no-cache"} {
				if got.header.Get(name) != want {
					t.Errorf("%s: %q", name, got.header.Get(name))
				}
			}
		})
	}
	t.Run("JSON body", func(t *testing.T) {
		body, _ := json.Marshal(form(signed, "openid"))
		expect(t, s.must("POST", s.Issuer+tokenPath, http.Header{"Content-Type": {"application/json"}}, string(body)), noGrantType)
	})
	t.Run("GET", func(t *testing.T) {
		expect(t, s.must("GET", s.Issuer+tokenPath, nil, ""), noGrantType)
	})
}

// docs/reference/zitadel-protocol.md#the-assertion
func TestAssertion(t *testing.T) {
	s := start(t)
	me := s.newKey(s.newUser(`{}`), `{}`)
	other := s.newKey(s.newUser(`{}`), `{}`)
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(ec.Public())
	if err != nil {
		t.Fatal(err)
	}
	given, _ := json.Marshal(map[string]string{"publicKey": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))})
	ecKey := s.newKey(me.UserID, string(given))
	if ecKey.Key != "" {
		t.Errorf("a private key for a public key supplied by the caller: %q", ecKey.Key)
	}

	signed := func(c claims) string { return sign(t, jose.RS256, me.private, me.KeyID, c) }
	mine := func() claims { return s.claims(me.UserID) }
	in := func(offset time.Duration) int64 { return time.Now().Add(offset).Unix() }

	for name, row := range map[string]struct {
		assertion func() string
		want      string
	}{
		"good":               {func() string { return signed(mine()) }, "200"},
		"bad signature":      {func() string { return sign(t, jose.RS256, other.private, me.KeyID, mine()) }, ia},
		"unknown kid":        {func() string { return sign(t, jose.RS256, me.private, "401085858779892774", mine()) }, ia},
		"no kid":             {func() string { return sign(t, jose.RS256, me.private, "", mine()) }, ia},
		"another user's kid": {func() string { return sign(t, jose.RS256, other.private, other.KeyID, mine()) }, ia},
		"unknown sub":        {func() string { return signed(s.claims("401085858779892775")) }, ia},
		"garbage":            {func() string { return "garbage" }, ia},
		"HS256":              {func() string { return sign(t, jose.HS256, make([]byte, 32), me.KeyID, mine()) }, ia},
		"RS512":              {func() string { return sign(t, jose.RS512, me.private, me.KeyID, mine()) }, ia},
		"PS256":              {func() string { return sign(t, jose.PS256, me.private, me.KeyID, mine()) }, "200"},
		"ES256 with EC key":  {func() string { return sign(t, jose.ES256, ec, ecKey.KeyID, mine()) }, "200"},
		"expired":            {func() string { return signed(mine().with("exp", in(-time.Minute))) }, ia},
		"exp now":            {func() string { return signed(mine().with("exp", in(0))) }, ia},
		"exp now+1":          {func() string { return signed(mine().with("exp", in(time.Second))) }, ia},
		"exp now+3":          {func() string { return signed(mine().with("exp", in(3*time.Second))) }, "200"},
		"exp 24 h":           {func() string { return signed(mine().with("exp", in(24*time.Hour))) }, "200"},
		"no exp":             {func() string { return signed(mine().without("exp")) }, ia},
		"no iat":             {func() string { return signed(mine().without("iat")) }, ia},
		"iat +1":             {func() string { return signed(mine().with("iat", in(time.Second))) }, "200"},
		"iat +3":             {func() string { return signed(mine().with("iat", in(3*time.Second))) }, ia},
		"iat +5":             {func() string { return signed(mine().with("iat", in(5*time.Second))) }, ia},
		"iat 59 min old":     {func() string { return signed(mine().with("iat", in(-59*time.Minute))) }, "200"},
		"iat 61 min old":     {func() string { return signed(mine().with("iat", in(-61*time.Minute))) }, ia},
		"aud wrong":          {func() string { return signed(mine().with("aud", "https://auth.example.com")) }, ia},
		"aud with slash":     {func() string { return signed(mine().with("aud", s.Issuer+"/")) }, ia},
		"aud token endpoint": {func() string { return signed(mine().with("aud", s.Issuer+tokenPath)) }, ia},
		"aud other host": {func() string {
			return signed(mine().with("aud", strings.Replace(s.Issuer, "127.0.0.1", "localhost", 1)))
		}, ia},
		"aud list":   {func() string { return signed(mine().with("aud", []string{"https://auth.example.com", s.Issuer})) }, "200"},
		"iss != sub": {func() string { return signed(mine().with("sub", other.UserID)) }, ia},
		"empty":      {func() string { return "" }, noAssertion},
	} {
		t.Run(name, func(t *testing.T) { expect(t, s.exchange(form(row.assertion(), "openid")), row.want) })
	}

	t.Run("iat +2 depends on rounding", func(t *testing.T) {
		for half, want := range map[time.Duration]string{100 * time.Millisecond: ia, 600 * time.Millisecond: "200"} {
			time.Sleep(time.Until(time.Now().Truncate(time.Second).Add(time.Second + half)))
			expect(t, s.exchange(form(signed(mine().with("iat", in(2*time.Second))), "openid")), want)
		}
	})
	t.Run("twice", func(t *testing.T) {
		again := signed(mine())
		expect(t, s.exchange(form(again, "openid")), "200")
		expect(t, s.exchange(form(again, "openid")), "200")
	})
	t.Run("no assertion", func(t *testing.T) {
		values := form("", "openid")
		values.Del("assertion")
		expect(t, s.exchange(values), noAssertion)
	})
	t.Run("no scope", func(t *testing.T) {
		values := form(signed(mine()), "")
		values.Del("scope")
		expect(t, s.exchange(values), noScope)
	})
	t.Run("as query parameters", func(t *testing.T) { // docs/reference/zitadel-protocol.md#token-request
		expect(t, s.must("POST", s.Issuer+tokenPath+"?"+form(signed(mine()), "openid").Encode(), formHeader, ""), "200")
	})
	t.Run("older dialect", func(t *testing.T) { // docs/reference/zitadel-protocol.md#errors-of-the-token-endpoint
		s.order("PATCH", "/settings", `{"dialect":"errors_internal"}`, nil)
		defer s.order("PATCH", "/settings", `{"dialect":"invalid_grant"}`, nil)
		expect(t, s.exchange(form("garbage", "openid")), errorsInternal)
		expect(t, s.exchange(form(signed(mine().with("aud", "x")), "openid")), errorsInternal)
		expect(t, s.exchange(form("", "openid")), noAssertion)
	})
}

// docs/reference/zitadel-protocol.md#key-lookup, docs/reference/zitadel-protocol.md#revocation
func TestInvalidKeysAndUsers(t *testing.T) {
	s := start(t)
	me := s.newKey(s.newUser(`{"tokenType":"JWT"}`), `{}`)
	const scope = "urn:zitadel:iam:org:project:id:zitadel:aud"
	exchange := func(c credential) reply { return s.exchange(form(s.assertion(c), scope)) }
	api := func(token string) reply {
		return s.must("GET", s.Issuer+"/management/v1/iam", http.Header{"Authorization": {"Bearer " + token}}, "")
	}
	const iam = `200 {"defaultOrgId":"401085856582143014","globalOrgId":"401085856582143014","iamProjectId":"401085856582077478"}`
	const invalid = `401 {"code":16,"message":"Errors.Token.Invalid (AUTH-7fs1e)","details":[{"@type":"type.googleapis.com/zitadel.v1.ErrorDetail","id":"AUTH-7fs1e","message":"Errors.Token.Invalid"}]}`

	t.Run("expired key", func(t *testing.T) {
		key := s.newKey(me.UserID, `{"expirationDate":"`+time.Now().Add(time.Hour).Format(time.RFC3339)+`"}`)
		expect(t, exchange(key), "200")
		s.order("PATCH", "/settings", `{"clockOffsetMillis":3660000}`, nil)
		c := s.claims(me.UserID).with("iat", time.Now().Add(61*time.Minute).Unix()).with("exp", time.Now().Add(2*time.Hour).Unix())
		expect(t, s.exchange(form(sign(t, jose.RS256, key.private, key.KeyID, c), scope)), ia)
		expect(t, s.exchange(form(sign(t, jose.RS256, me.private, me.KeyID, c), scope)), "200")
		s.order("PATCH", "/settings", `{"clockOffsetMillis":0}`, nil)
		expect(t, exchange(key), "200")
	})
	t.Run("removed key", func(t *testing.T) {
		key := s.newKey(me.UserID, `{}`)
		before := s.mint(key, scope)
		s.order("DELETE", "/users/"+me.UserID+"/keys/"+key.KeyID, "", nil)
		expect(t, exchange(key), ia)
		expect(t, api(before.AccessToken), iam)
	})
	for _, state := range []string{"inactive", "locked"} {
		t.Run(state+" user", func(t *testing.T) {
			before := s.mint(me, scope)
			expect(t, api(before.AccessToken), iam)
			s.order("PATCH", "/users/"+me.UserID, `{"state":"`+state+`"}`, nil)
			expect(t, exchange(me), notActive)
			expect(t, api(before.AccessToken), invalid)
			s.order("PATCH", "/users/"+me.UserID, `{"state":"active"}`, nil)
			expect(t, exchange(me), "200")
			expect(t, api(before.AccessToken), invalid)
		})
	}
	t.Run("token types", func(t *testing.T) {
		jwt := s.mint(me, scope)
		s.order("PATCH", "/users/"+me.UserID, `{"tokenType":"BEARER"}`, nil)
		opaque := s.mint(me, scope)
		if strings.Count(opaque.AccessToken, ".") != 4 || !strings.HasPrefix(opaque.AccessToken, "eyJhbGciOiJBMjU2R0NNS1ci") {
			t.Errorf("not an opaque token: %s", opaque.AccessToken)
		}
		expect(t, api(jwt.AccessToken), iam)
		expect(t, api(opaque.AccessToken), iam)
		expect(t, api(s.mint(me, "openid").AccessToken), invalid)
		expect(t, api("garbage"), invalid)
		expect(t, s.must("GET", s.Issuer+"/management/v1/iam", nil, ""), `401 {"code":16,"message":"auth header missing"}`)
	})
	t.Run("expired token", func(t *testing.T) {
		before := s.mint(me, scope)
		s.order("PATCH", "/settings", `{"clockOffsetMillis":43201000}`, nil)
		expect(t, api(before.AccessToken), invalid)
		s.order("PATCH", "/settings", `{"clockOffsetMillis":0}`, nil)
	})
	t.Run("deleted user", func(t *testing.T) {
		before := s.mint(me, scope)
		s.order("DELETE", "/users/"+me.UserID, "", nil)
		expect(t, exchange(me), ia)
		expect(t, api(before.AccessToken), invalid)
	})
}

// docs/reference/zitadel-protocol.md#scopes, docs/reference/zitadel-protocol.md#claims-of-access-tokens
func TestScopesAndClaims(t *testing.T) {
	s := start(t)
	const p, q, org = "401085858779892001", "401085858779892002", "401085858779892003"
	const pAud, qAud = "urn:zitadel:iam:org:project:id:" + p + ":aud", "urn:zitadel:iam:org:project:id:" + q + ":aud"
	me := s.newKey(s.newUser(`{"username":"robot","tokenType":"JWT","organizationId":"`+org+`","roles":{"`+p+`":["reader"],"`+q+`":["reader","writer"]}}`), `{}`)

	granted := map[string]any{org: "zitadel.127.0.0.1"}
	rolesIn := func(project string, keys ...string) claims {
		roles := map[string]any{}
		for _, key := range keys {
			roles[key] = granted
		}
		return claims{"urn:zitadel:iam:org:project:" + project + ":roles": roles}
	}
	owner := claims{
		"urn:zitadel:iam:user:resourceowner:id":             org,
		"urn:zitadel:iam:user:resourceowner:name":           "ZITADEL",
		"urn:zitadel:iam:user:resourceowner:primary_domain": "zitadel.127.0.0.1",
	}
	both := rolesIn(p, "reader")
	maps.Copy(both, rolesIn(q, "reader", "writer"))
	orgID := maps.Clone(owner)
	orgID["urn:zitadel:iam:org:id"] = org

	for name, row := range map[string]struct {
		scope string
		aud   []any
		more  claims
	}{
		"openid and project":      {"openid " + pAud, []any{p}, nil},
		"project":                 {pAud, []any{p}, nil},
		"openid":                  {"openid", []any{"robot"}, nil},
		"nothing":                 {"", []any{"robot"}, nil},
		"zitadel":                 {"openid profile urn:zitadel:iam:org:project:id:zitadel:aud", []any{"401085856582077478"}, nil},
		"two projects":            {pAud + " " + qAud + " " + pAud, []any{p, q}, nil},
		"roles":                   {pAud + " urn:zitadel:iam:org:projects:roles", []any{p}, rolesIn(p, "reader")},
		"roles of two projects":   {pAud + " " + qAud + " urn:zitadel:iam:org:projects:roles", []any{p, q}, both},
		"roles without a project": {"urn:zitadel:iam:org:projects:roles", []any{"robot"}, nil},
		"one role":                {pAud + " urn:zitadel:iam:org:project:role:reader", []any{p}, rolesIn(p, "reader")},
		"one role of several":     {qAud + " urn:zitadel:iam:org:project:role:writer", []any{q}, rolesIn(q, "writer")},
		"resource owner":          {pAud + " urn:zitadel:iam:user:resourceowner", []any{p}, owner},
		"own organization":        {pAud + " urn:zitadel:iam:org:id:" + org, []any{p}, orgID},
		"foreign organization":    {pAud + " urn:zitadel:iam:org:id:401085858779892999", []any{p}, nil},
		"unknown project":         {"urn:zitadel:iam:org:project:id:nope:aud", []any{"nope"}, nil},
		"spaces":                  {" openid  " + pAud + " ", []any{p}, nil},
		"tab":                     {"openid\t" + pAud, []any{"robot"}, nil},
		"unknown word":            {"nonsense offline_access " + pAud, []any{p}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got := s.mint(me, row.scope)
			if got.TokenType != "Bearer" || got.ExpiresIn == nil || *got.ExpiresIn != 43199 || got.RefreshToken != nil || got.Scope != nil {
				t.Errorf("%+v", got)
			}
			header, c := decode(t, got.AccessToken)
			if !strings.HasPrefix(header, `{"alg":"RS256","kid":"`) || !strings.HasSuffix(header, `","typ":"JWT"}`) {
				t.Errorf("header %s", header)
			}
			exp, iat, nbf, jti := c["exp"].(float64), c["iat"].(float64), c["nbf"].(float64), c["jti"].(string)
			if exp-iat != 43200 && exp-iat != 43199 || nbf != iat || !strings.HasPrefix(jti, "V2_") || !strings.Contains(jti, "-at_") {
				t.Errorf("%v", c)
			}
			want := claims{"iss": s.Issuer, "sub": me.UserID, "aud": row.aud, "client_id": "robot", "exp": exp, "iat": iat, "nbf": nbf, "jti": jti}
			maps.Copy(want, row.more)
			gotText, _ := json.Marshal(c)
			wantText, _ := json.Marshal(want)
			if string(gotText) != string(wantText) {
				t.Errorf("got  %s\nwant %s", gotText, wantText)
			}
			hasOpenID := strings.Contains(" "+row.scope+" ", " openid ")
			if hasOpenID != (got.IDToken != "") {
				t.Errorf("id_token: %q", got.IDToken)
			}
			if hasOpenID {
				if _, c := decode(t, got.IDToken); c["exp"] != c["iat"] || c["iss"] != s.Issuer || c["sub"] != me.UserID {
					t.Errorf("id_token %v", c)
				}
			}
		})
	}

	t.Run("lifetimes", func(t *testing.T) {
		s.order("PATCH", "/users/"+me.UserID, `{"lifetimeSeconds":90}`, nil)
		if got := s.mint(me, ""); *got.ExpiresIn != 89 {
			t.Errorf("%+v", got)
		}
		s.order("PATCH", "/users/"+me.UserID, `{"lifetimeSeconds":1}`, nil)
		if got := s.mint(me, ""); got.ExpiresIn != nil {
			t.Errorf("%+v", got)
		}
	})
	t.Run("key set", func(t *testing.T) {
		got := s.must("GET", s.Issuer+keysPath, nil, "")
		if got.header.Get("Cache-Control") != "max-age=300, must-revalidate" || got.header.Get("Pragma") != "" {
			t.Errorf("%v", got.header)
		}
		var set jose.JSONWebKeySet
		if err := json.Unmarshal([]byte(got.body), &set); err != nil {
			t.Fatal(err)
		}
		token, err := jose.ParseSigned(s.mint(me, pAud).AccessToken, []jose.SignatureAlgorithm{jose.RS256})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := token.Verify(set); err != nil {
			t.Error(err)
		}
	})
	t.Run("introspection", func(t *testing.T) { // docs/reference/zitadel-protocol.md#introspection
		var app struct{ ClientID, ClientSecret string }
		s.order("POST", "/apps", `{"projectId":"`+p+`"}`, &app)
		introspect := func(id, secret, token string) reply {
			request, _ := http.NewRequest("POST", s.Issuer, nil)
			if id != "" {
				request.SetBasicAuth(id, secret)
			}
			request.Header.Set("Content-Type", formHeader.Get("Content-Type"))
			return s.must("POST", s.Issuer+"/oauth/v2/introspect", request.Header, url.Values{"token": {token}}.Encode())
		}
		s.order("PATCH", "/users/"+me.UserID, `{"lifetimeSeconds":60}`, nil)
		good := s.mint(me, pAud).AccessToken
		got := introspect(app.ClientID, app.ClientSecret, good)
		var c claims
		json.Unmarshal([]byte(got.body), &c)
		_, token := decode(t, good)
		for _, name := range []string{"aud", "client_id", "exp", "iat", "iss", "jti", "nbf", "sub"} {
			gotText, _ := json.Marshal(c[name])
			wantText, _ := json.Marshal(token[name])
			if string(gotText) != string(wantText) {
				t.Errorf("%s: got %s, want %s", name, gotText, wantText)
			}
		}
		if c["active"] != true || c["scope"] != pAud || c["token_type"] != "Bearer" || c["username"] != "robot" ||
			c["auth_time"] != c["iat"] || c["urn:zitadel:iam:org:project:roles"] == nil || c["urn:zitadel:iam:org:project:"+p+":roles"] == nil {
			t.Errorf("%s", got)
		}
		expect(t, introspect(app.ClientID, app.ClientSecret, s.mint(me, qAud).AccessToken), `200 {"active":false}`)
		expect(t, introspect(app.ClientID, app.ClientSecret, "garbage"), `200 {"active":false}`)
		expect(t, introspect("", "", good), `400 {"error":"invalid_request","error_description":"client_id or client_assertion must be provided"}`)
		expect(t, introspect(app.ClientID, "wrong", good), `400 {"error":"unauthorized_client"}`)
	})
}

// docs/reference/zitadel-protocol.md#instance-selection, with 127.0.0.1 instead of localhost
func TestHosts(t *testing.T) {
	s := start(t)
	me := s.newKey(s.newUser(`{}`), `{}`)
	own := strings.TrimPrefix(s.Issuer, "http://")
	unknown := func(host string) string {
		return `404 unable to set instance using origin &{` + host + `  http} (ExternalDomain is 127.0.0.1): ID=QUERY-1kIjX Message=Instance not found. Make sure you got the domain right. Check out https://zitadel.com/docs/apis/introduction#domains`
	}
	const instance = "X-Zitadel-Instance-Host"
	for name, row := range map[string]struct {
		header http.Header
		issuer string // or
		refuse string
	}{
		"own host":              {http.Header{"Host": {own}}, "http://" + own, ""},
		"no port":               {http.Header{"Host": {"127.0.0.1"}}, "http://127.0.0.1", ""},
		"other port":            {http.Header{"Host": {"127.0.0.1:9999"}}, "http://127.0.0.1:9999", ""},
		"something else":        {http.Header{"Host": {"something-else"}}, "", unknown("something-else")},
		"instance header":       {http.Header{"Host": {"something-else"}, instance: {own}}, "http://" + own, ""},
		"instance header, bare": {http.Header{"Host": {"something-else"}, instance: {"127.0.0.1"}}, "http://127.0.0.1", ""},
		"instance header wins":  {http.Header{"Host": {own}, instance: {"something-else"}}, "", unknown("something-else")},
		"forwarded host":        {http.Header{"Host": {"something-else"}, "X-Forwarded-Host": {own}}, "http://" + own, ""},
		"Forwarded":             {http.Header{"Host": {"something-else"}, "Forwarded": {"host=" + own}}, "", unknown("something-else")},
		"forwarded proto":       {http.Header{"X-Forwarded-Proto": {"https"}}, "https://" + own, ""},
	} {
		t.Run(name, func(t *testing.T) {
			discovery := s.must("GET", s.Issuer+"/.well-known/openid-configuration", row.header, "")
			header := row.header.Clone()
			header.Set("Content-Type", formHeader.Get("Content-Type"))
			aud := row.issuer
			if aud == "" {
				aud = s.Issuer
			}
			signed := sign(t, jose.RS256, me.private, me.KeyID, s.claims(me.UserID).with("aud", aud))
			token := s.must("POST", s.Issuer+tokenPath, header, form(signed, "openid").Encode())
			if row.refuse != "" {
				expect(t, discovery, row.refuse)
				expect(t, token, row.refuse)
				if kind := token.header.Get("Content-Type"); !strings.HasPrefix(kind, "text/plain") {
					t.Errorf("Content-Type %s", kind)
				}
				return
			}
			expect(t, discovery, "200")
			expect(t, token, "200")
			var said map[string]any
			json.Unmarshal([]byte(discovery.body), &said)
			if said["issuer"] != row.issuer || said["token_endpoint"] != row.issuer+tokenPath || said["jwks_uri"] != row.issuer+keysPath {
				t.Errorf("%s", discovery)
			}
		})
	}
	t.Run("REST", func(t *testing.T) {
		for _, path := range []string{"/management/v1/iam", "/v2/users/1"} {
			got := s.must("GET", s.Issuer+path, http.Header{"Host": {"something-else"}}, "")
			var said apiError
			if err := json.Unmarshal([]byte(got.body), &said); err != nil || got.status != 404 || said.Code != 5 || "404 "+said.Message != unknown("something-else") {
				t.Errorf("%s: %s", path, got)
			}
		}
	})
	t.Run("public host", func(t *testing.T) {
		got := s.must("GET", s.Issuer+"/.well-known/openid-configuration", http.Header{"X-Zitadel-Public-Host": {"evil.example"}}, "")
		if got.status != 404 || !strings.Contains(got.body, "ID=QUERY-IuGh1 ") || !strings.HasSuffix(got.body, ` Parent=(public domain "evil.example" not trusted)`) {
			t.Errorf("%s", got)
		}
	})
	t.Run("probes", func(t *testing.T) { // docs/reference/zitadel-protocol.md#health-probes
		expect(t, s.must("GET", s.Issuer+"/debug/ready", http.Header{"Host": {"something-else"}}, ""), `200 "ok"`)
		expect(t, s.must("GET", s.Issuer+"/debug/healthz", http.Header{"Host": {"something-else"}}, ""), `200 ok`)
	})
	t.Run("external domain", func(t *testing.T) {
		s.order("PATCH", "/settings", `{"externalDomain":"AUTH.example.com","externalSecure":true}`, nil)
		if got := s.must("GET", s.Issuer+keysPath, nil, ""); got.status != 404 {
			t.Errorf("%s", got)
		}
		if got := s.must("GET", s.Issuer+keysPath, http.Header{instance: {"auth.example.com"}}, ""); got.status != 404 { // case matters
			t.Errorf("%s", got)
		}
		s.order("PATCH", "/settings", `{"externalDomain":"auth.example.com"}`, nil)
		signed := sign(t, jose.RS256, me.private, me.KeyID, s.claims(me.UserID).with("aud", "https://auth.example.com"))
		header := http.Header{instance: {"auth.example.com"}, "Content-Type": formHeader["Content-Type"]}
		expect(t, s.must("POST", s.Issuer+tokenPath, header, form(signed, "openid").Encode()), "200")
	})
}
