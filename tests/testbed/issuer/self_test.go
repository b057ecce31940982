package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const (
	zitadelScope = "urn:zitadel:iam:org:project:id:zitadel:aud"
	keySearch    = "/v2/users/keys/search"
)

// own is a user without roles that manages its own keys.
type own struct {
	*stand
	credential
	token string
}

func (s *stand) own(fields string) own {
	s.t.Helper()
	key := s.newKey(s.newUser(fields), `{}`)
	return own{s, key, s.mint(key, zitadelScope).AccessToken}
}

// call sends a request with a token, or without one.
func (s *stand) call(token, method, path, body string) reply {
	s.t.Helper()
	header := http.Header{}
	if token != "" {
		header.Set("Authorization", "Bearer "+token)
	}
	return s.must(method, s.Issuer+path, header, body)
}

func (o own) call(method, path, body string) reply {
	o.t.Helper()
	return o.stand.call(o.token, method, path, body)
}

// keys is the path of the user's keys.
func (o own) keys() string { return "/v2/users/" + o.UserID + "/keys" }

// keyAnswer has the fields of AddKey.
type keyAnswer struct {
	CreationDate time.Time
	KeyID        string
	KeyContent   []byte
}

func (o own) add(body string) (made keyAnswer) {
	o.t.Helper()
	got := o.call("POST", o.keys(), body)
	if got.status != 200 {
		o.t.Fatal(got)
	}
	if err := json.Unmarshal([]byte(got.body), &made); err != nil {
		o.t.Fatal(err)
	}
	return made
}

// listed is an answer of a search, and the ids in it.
type listed struct {
	Pagination struct{ TotalResult, AppliedLimit string }
	Result     []row
	reply      reply
}

func (l listed) ids() string {
	var ids []string
	for _, row := range l.Result {
		ids = append(ids, row.ID)
	}
	return strings.Join(ids, " ")
}

func (o own) list(path, body string) (all listed) {
	o.t.Helper()
	all.reply = o.call("POST", path, body)
	if all.reply.status != 200 {
		o.t.Fatal(all.reply)
	}
	if err := json.Unmarshal([]byte(all.reply.body), &all); err != nil {
		o.t.Fatal(err)
	}
	return all
}

// mine is a search for the user's own keys, the oldest first.
func (o own) mine() listed {
	o.t.Helper()
	return o.list(keySearch, `{"pagination":{"asc":true},"sortingColumn":"KEY_FIELD_NAME_CREATED_DATE","filters":[{"userIdFilter":{"id":"`+o.UserID+`"}}]}`)
}

func pkixPEM(t *testing.T, public any) string {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

func encoded(text string) string { return base64.StdEncoding.EncodeToString([]byte(text)) }

func errorBody(status, code int, id, message string) string {
	return fmt.Sprintf(`%d {"code":%d,"message":"%s (%s)","details":[{"@type":"type.googleapis.com/zitadel.v1.ErrorDetail","id":"%s","message":"%s"}]}`, status, code, message, id, id, message)
}

var (
	badKey       = errorBody(400, 3, "COMMAND-5F3h1", "Public key is not a valid RSA public key in PKIX format with PEM encoding")
	expired      = errorBody(400, 3, "DOMAIN-dv3t5", "Errors.AuthNKey.ExpireBeforeNow")
	notAMember   = errorBody(404, 5, "AUTHZ-cdgFk", "membership not found")
	noSuchKey    = errorBody(404, 5, "COMMAND-4m77G", "Machine key not found")
	noSuchPAT    = errorBody(404, 5, "COMMAND-4m77G", "Personal Access Token not found")
	noPermission = errorBody(403, 7, "AUTH-AWfge", "No matching permissions found")
	badToken     = errorBody(401, 16, "AUTH-7fs1e", "Errors.Token.Invalid")
	tooMany      = errorBody(400, 3, "QUERY-4M0fs", "Limit exceeded")
)

const noToken = `401 {"code":16,"message":"auth header missing"}`

// docs/reference/zitadel-protocol.md#self-management-of-keys
func TestOwnKeyByPublicKey(t *testing.T) {
	s := start(t)
	me := s.own(`{}`)
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	text := pkixPEM(t, private.Public())
	body := `{"expirationDate":"2100-01-01T00:00:00Z","publicKey":"` + encoded(text) + `"}`
	got := me.call("POST", me.keys(), body)
	var first keyAnswer
	json.Unmarshal([]byte(got.body), &first)
	expect(t, got, `200 {"creationDate":"`+timestamp(first.CreationDate)+`","keyId":"`+first.KeyID+`"}`)

	second := me.add(body)
	if second.KeyID == first.KeyID || second.KeyContent != nil {
		t.Errorf("%+v", second)
	}
	for _, id := range []string{first.KeyID, second.KeyID} {
		expect(t, s.exchange(form(sign(t, jose.RS256, private, id, s.claims(me.UserID)), "openid")), "200")
	}

	var truth struct{ Keys []storedKey }
	s.order("GET", "/users/"+me.UserID+"/keys", "", &truth)
	der, _ := pem.Decode([]byte(text))
	hash := fmt.Sprintf("%x", sha256.Sum256(der.Bytes))
	if len(truth.Keys) != 3 || truth.Keys[0].ID != me.KeyID || truth.Keys[0].SPKISHA256 == hash || truth.Keys[0].ExpirationDate != "9999-12-31T23:59:59Z" {
		t.Fatalf("%+v", truth)
	}
	want := []storedKey{
		{first.KeyID, timestamp(first.CreationDate), "2100-01-01T00:00:00Z", hash},
		{second.KeyID, timestamp(second.CreationDate), "2100-01-01T00:00:00Z", hash},
	}
	if truth.Keys[1] != want[0] || truth.Keys[2] != want[1] {
		t.Errorf("%+v", truth.Keys)
	}
}

// docs/reference/zitadel-protocol.md#self-management-of-keys
func TestOwnKeyByServer(t *testing.T) {
	s := start(t)
	me := s.own(`{}`)
	made := me.add(`{"expirationDate":"2100-01-01T00:00:00.1234567Z"}`)
	var file keyFile
	if err := json.Unmarshal(made.KeyContent, &file); err != nil || file.KeyID != made.KeyID || file.UserID != me.UserID || file.Type != "serviceaccount" {
		t.Fatalf("%s %v", made.KeyContent, err)
	}
	block, _ := pem.Decode([]byte(file.Key))
	private, err := x509.ParsePKCS1PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	s.mint(credential{file, private}, "openid")
}

// docs/reference/zitadel-protocol.md#public-keys-supplied-by-the-caller
func TestOwnKeyInput(t *testing.T) {
	s := start(t)
	me := s.own(`{}`)
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ed, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	good := pkixPEM(t, private.Public())
	der, _ := pem.Decode([]byte(good))
	block := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	raw, _ := json.Marshal(good)
	quoted := func(text string) string { return `"` + text + `"` }
	for name, row := range map[string]struct{ date, public, want string }{
		"RSA":              {"2100-01-01T00:00:00Z", quoted(encoded(good)), "200"},
		"EC":               {"2100-01-01T00:00:00Z", quoted(encoded(pkixPEM(t, ec.Public()))), "200"},
		"Ed25519":          {"2100-01-01T00:00:00Z", quoted(encoded(pkixPEM(t, ed))), "200"},
		"another block":    {"2100-01-01T00:00:00Z", quoted(encoded(block("RSA PUBLIC KEY", der.Bytes))), "200"},
		"no padding":       {"2100-01-01T00:00:00Z", quoted(base64.RawURLEncoding.EncodeToString([]byte(good))), "200"},
		"year 9999":        {"9999-12-31T23:59:59Z", quoted(encoded(good)), "200"},
		"null":             {"2100-01-01T00:00:00Z", "null", "200"},
		"PKCS#1":           {"2100-01-01T00:00:00Z", quoted(encoded(block("RSA PUBLIC KEY", x509.MarshalPKCS1PublicKey(&private.PublicKey)))), badKey},
		"DER":              {"2100-01-01T00:00:00Z", quoted(base64.StdEncoding.EncodeToString(der.Bytes)), badKey},
		"private key":      {"2100-01-01T00:00:00Z", quoted(encoded(block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(private)))), badKey},
		"bad key and date": {"2000-01-01T00:00:00Z", quoted(encoded("key")), badKey},
		"past":             {"2000-01-01T00:00:00Z", quoted(encoded(good)), expired},
	} {
		t.Run(name, func(t *testing.T) {
			expect(t, me.call("POST", me.keys(), `{"expirationDate":"`+row.date+`","publicKey":`+row.public+`}`), row.want)
		})
	}
	t.Run("no date", func(t *testing.T) {
		expect(t, me.call("POST", me.keys(), `{}`), `400 {"code":3,"message":"invalid AddKeyRequest.ExpirationDate: value is required"}`)
		expect(t, me.call("POST", me.keys(), ``), `400 {"code":3,"message":"invalid AddKeyRequest.ExpirationDate: value is required"}`)
	})
	t.Run("raw PEM", func(t *testing.T) {
		got := me.call("POST", me.keys(), `{"expirationDate":"2100-01-01T00:00:00Z","publicKey":`+string(raw)+`}`)
		var said apiError
		json.Unmarshal([]byte(got.body), &said)
		if got.status != 400 || said.Code != 3 || !strings.HasSuffix(said.Message, "invalid value for bytes field publicKey: "+string(raw)) {
			t.Error(got)
		}
	})
	t.Run("the server's clock decides what is past", func(t *testing.T) {
		late := `{"expirationDate":"` + timestamp(time.Now().Add(time.Minute)) + `"}`
		me.add(late)
		s.order("PATCH", "/settings", `{"clockOffsetMillis":120000}`, nil)
		expect(t, me.call("POST", me.keys(), late), expired)
	})
}

// docs/reference/zitadel-protocol.md#self-management-of-keys
func TestExpirationKeepsMicroseconds(t *testing.T) {
	s := start(t)
	me := s.own(`{}`)
	for given, want := range map[string]string{
		"2100-01-01T00:00:00.123456789Z":   "2100-01-01T00:00:00.123456Z",
		"2100-01-01T00:00:00.999999999Z":   "2100-01-01T00:00:00.999999Z",
		"2100-01-01T00:00:00.000001Z":      "2100-01-01T00:00:00.000001Z",
		"2100-01-01T00:00:00.120Z":         "2100-01-01T00:00:00.120Z",
		"2100-01-01T01:00:00.123400+01:00": "2100-01-01T00:00:00.123400Z",
		"2100-01-01T00:00:00Z":             "2100-01-01T00:00:00Z",
	} {
		made := me.add(`{"expirationDate":"` + given + `"}`)
		all := me.mine()
		last := all.Result[len(all.Result)-1]
		created := timestamp(made.CreationDate)
		org := defaultOrganizationID
		if last.ID != made.KeyID || last.ExpirationDate != want || last.CreationDate != created || last.ChangeDate != created || last.UserID != me.UserID || last.OrganizationID != org {
			t.Errorf("%s: %+v", given, last)
		}
	}
}

// docs/reference/zitadel-protocol.md#self-management-of-keys
func TestListKeys(t *testing.T) {
	s := start(t)
	me := s.own(`{}`)
	admin := s.own(`{"administrator":true}`)
	other := s.newKey(s.newUser(`{}`), `{}`)
	old := s.newKey(me.UserID, `{"expirationDate":"2000-01-01T00:00:00Z"}`)
	newest := me.add(`{"expirationDate":"2100-01-01T00:00:00Z"}`)
	mine := strings.Join([]string{me.KeyID, old.KeyID, newest.KeyID}, " ")
	newestFirst := strings.Join([]string{newest.KeyID, old.KeyID, me.KeyID}, " ")
	of := func(id string) string { return `"filters":[{"userIdFilter":{"id":"` + id + `"}}]` }
	asc := `"sortingColumn":"KEY_FIELD_NAME_CREATED_DATE","pagination":{"asc":true`

	for _, row := range []struct{ name, body, total, limit, ids string }{
		{"own, expired ones too", `{` + asc + `},` + of(me.UserID) + `}`, "3", "100", mine},
		{"the newest first", `{` + of(me.UserID) + `}`, "3", "100", newestFirst},
		{"no filter", `{` + asc + `}}`, "5", "100", mine},
		{"no body", ``, "5", "100", newestFirst},
		{"null", `{"pagination":{"offset":null,"limit":null},"filters":null}`, "5", "100", newestFirst},
		{"two filters", `{"filters":[{"userIdFilter":{"id":"` + me.UserID + `"}},{"userIdFilter":{"id":"1"}}]}`, "", "100", ""},
		{"the first page", `{` + asc + `,"limit":2},` + of(me.UserID) + `}`, "3", "2", me.KeyID + " " + old.KeyID},
		{"the second page", `{` + asc + `,"limit":2,"offset":"2"},` + of(me.UserID) + `}`, "3", "2", newest.KeyID},
		{"offset as a number", `{` + asc + `,"limit":"2","offset":1},` + of(me.UserID) + `}`, "3", "2", old.KeyID + " " + newest.KeyID},
		{"after the last page", `{` + asc + `,"limit":2,"offset":4},` + of(me.UserID) + `}`, "", "2", ""},
		{"a page of others", `{` + asc + `,"limit":2,"offset":1}}`, "5", "2", ""},
		{"the largest limit", `{` + asc + `,"limit":1000},` + of(me.UserID) + `}`, "3", "1000", mine},
	} {
		t.Run(row.name, func(t *testing.T) {
			got := me.list(keySearch, row.body)
			if got.ids() != row.ids || got.Pagination.TotalResult != row.total || got.Pagination.AppliedLimit != row.limit {
				t.Errorf("%s\nwant %s of %s", got.reply, row.ids, row.total)
			}
		})
	}
	t.Run("form", func(t *testing.T) {
		expect(t, me.call("POST", keySearch, `{"pagination":{"limit":10},`+of(other.UserID)+`}`), `200 {"pagination":{"totalResult":"1","appliedLimit":"10"}}`)
		expect(t, me.call("POST", keySearch, `{`+of("1")+`}`), `200 {"pagination":{"appliedLimit":"100"}}`)
		created := me.mine().Result[2].CreationDate
		want := `200 {"pagination":{"totalResult":"3","appliedLimit":"1"},"result":[{"creationDate":"` + created + `","changeDate":"` + created + `","id":"` + newest.KeyID +
			`","userId":"` + me.UserID + `","organizationId":"` + defaultOrganizationID + `","expirationDate":"2100-01-01T00:00:00Z"}]}`
		expect(t, me.call("POST", keySearch, `{"pagination":{"limit":1},`+of(me.UserID)+`}`), want)
	})
	t.Run("an administrator sees all", func(t *testing.T) {
		want := strings.Join([]string{me.KeyID, admin.KeyID, other.KeyID, old.KeyID, newest.KeyID}, " ")
		if got := admin.list(keySearch, `{`+asc+`}}`); got.ids() != want {
			t.Error(got.reply)
		}
	})
	t.Run("refused", func(t *testing.T) {
		expect(t, me.call("POST", keySearch, `{"pagination":{"limit":1001}}`), tooMany)
		for _, body := range []string{`{"filters":[{}]}`, `{"filters":[{"keyIdFilter":{"id":"1"}}]}`, `{"sortingColumn":"KEY_FIELD_NAME_ID"}`, `{"pagination":{"offset":-1}}`, `{"pagination":{"limit":"x"}}`} {
			if got := me.call("POST", keySearch, body); got.status != 400 {
				t.Errorf("%s: %s", body, got)
			}
		}
	})
}

// docs/reference/zitadel-protocol.md#self-management-of-keys
func TestRemoveOwnKey(t *testing.T) {
	s := start(t)
	me := s.own(`{}`)
	next := me.add(`{"expirationDate":"2100-01-01T00:00:00Z"}`)
	var said struct{ DeletionDate time.Time }
	got := me.call("DELETE", me.keys()+"/"+me.KeyID, "")
	if err := json.Unmarshal([]byte(got.body), &said); got.status != 200 || err != nil || time.Since(said.DeletionDate).Abs() > time.Minute {
		t.Error(got, err)
	}
	expect(t, s.exchange(form(s.assertion(me.credential), "openid")), ia)
	// The access token that the removed key got stays valid.
	if all := me.mine(); all.ids() != next.KeyID {
		t.Error(all.reply)
	}
	expect(t, me.call("DELETE", me.keys()+"/"+me.KeyID, ""), noSuchKey)
}

// docs/reference/zitadel-protocol.md#self-management-of-keys
func TestOwnPATs(t *testing.T) {
	s := start(t)
	me, other := s.own(`{}`), s.own(`{}`)
	path, search := "/v2/users/"+me.UserID+"/pats", "/v2/users/pats/search"
	made := func(o own) (id string) {
		var pat struct {
			CreationDate   time.Time
			TokenID, Token string
		}
		got := o.call("POST", "/v2/users/"+o.UserID+"/pats", `{"expirationDate":"2100-01-01T00:00:00.5Z"}`)
		if err := json.Unmarshal([]byte(got.body), &pat); got.status != 200 || err != nil || pat.Token == "" || pat.CreationDate.IsZero() {
			t.Fatal(got, err)
		}
		return pat.TokenID
	}
	first, second := made(me), made(me)
	made(other)
	mine := me.list(search, `{"pagination":{"asc":true},"sortingColumn":"PERSONAL_ACCESS_TOKEN_FIELD_NAME_CREATED_DATE","filters":[{"userIdFilter":{"id":"`+me.UserID+`"}}]}`)
	if mine.ids() != first+" "+second || mine.Pagination.TotalResult != "2" || mine.Result[0].ExpirationDate != "2100-01-01T00:00:00.500Z" {
		t.Error(mine.reply)
	}
	if all := me.list(search, `{}`); all.ids() != second+" "+first || all.Pagination.TotalResult != "3" {
		t.Error(all.reply)
	}
	expect(t, me.call("POST", path, `{}`), `400 {"code":3,"message":"invalid AddPersonalAccessTokenRequest.ExpirationDate: value is required"}`)
	expect(t, me.call("POST", path, `{"expirationDate":"2000-01-01T00:00:00Z"}`), expired)
	expect(t, me.call("DELETE", path+"/"+first, ""), "200")
	expect(t, me.call("DELETE", path+"/"+first, ""), noSuchPAT)
	if all := me.list(search, `{}`); all.ids() != second {
		t.Error(all.reply)
	}
	if keys := me.mine(); keys.ids() != me.KeyID {
		t.Error(keys.reply)
	}
}

// docs/reference/zitadel-protocol.md#self-management-of-keys
func TestWhoMayManageKeys(t *testing.T) {
	s := start(t)
	me, other, refused := s.own(`{}`), s.own(`{}`), s.own(`{"selfManagementRefused":true}`)
	admin := s.own(`{"administrator":true,"selfManagementRefused":true}`)
	foreign := s.mint(me.credential, "openid").AccessToken
	const date = `{"expirationDate":"2100-01-01T00:00:00Z"}`
	absent := `404 {"code":5,"message":"Not Found"}`
	pats := func(o own) string { return "/v2/users/" + o.UserID + "/pats" }

	type request struct{ method, path, body string }
	on := func(o own) []request {
		return []request{
			{"POST", o.keys(), date},
			{"DELETE", o.keys() + "/" + o.KeyID, ""},
			{"POST", pats(o), date},
			{"DELETE", pats(o) + "/1", ""},
		}
	}
	search := []request{{"POST", keySearch, ""}, {"POST", "/v2/users/pats/search", ""}}
	nobody := []request{{"POST", "/v2/users/1/keys", date}, {"DELETE", "/v2/users/1/keys/1", ""}}
	for _, row := range []struct {
		name, token string
		requests    []request
		want        string
	}{
		{"another user", me.token, on(other), notAMember},
		{"an unknown user", me.token, nobody, notAMember},
		{"another audience", foreign, append(on(me), search...), badToken},
		{"no token", "", append(on(me), search...), noToken},
		{"refused by a policy", refused.token, append(on(refused), search...), noPermission},
		{"refused by a policy, another user", refused.token, on(other), notAMember},
		{"an administrator", admin.token, append([]request{on(other)[0], on(other)[2], on(admin)[0]}, search...), "200"},
		{"an administrator, an unknown user", admin.token, nobody[:1], errorBody(400, 9, "COMMAND-bnipwm1", "User could not be found")},
		{"an administrator, an unknown key", admin.token, nobody[1:], errorBody(400, 9, "COMMAND-bnipwm1", "User could not be found")},
	} {
		t.Run(row.name, func(t *testing.T) {
			for _, r := range row.requests {
				if got := s.call(row.token, r.method, r.path, r.body); got.String() != row.want && (row.want != "200" || got.status != 200) {
					t.Errorf("%s %s: %s\nwant %s", r.method, r.path, got, row.want)
				}
			}
		})
	}
	t.Run("ZITADEL 3", func(t *testing.T) {
		s.order("PATCH", "/settings", `{"userV2":false}`, nil)
		for _, r := range append(on(me), search...) {
			expect(t, s.call(me.token, r.method, r.path, r.body), absent)
		}
		expect(t, me.call("POST", "/management/v1/users/"+me.UserID+"/keys", `{"type":"KEY_TYPE_JSON"}`), notAMember)
	})
}

// ListKeys and the token endpoint read projections, RemoveKey the events
// (docs/reference/zitadel-protocol.md#self-management-of-keys).
func TestListsLag(t *testing.T) {
	const lag = 300 * time.Millisecond
	s := start(t, "--projection-lag", lag.String())
	id := s.newUser(`{}`)
	key := s.newKey(id, `{}`)
	s.order("GET", "/settled", "", nil)
	me := own{s, key, s.mint(key, zitadelScope).AccessToken}

	// inTime reports whether a request was answered before the lag had passed. Otherwise the machine was too slow to
	// observe the old state.
	changed := time.Now()
	inTime := func() bool { return time.Since(changed) < lag }
	added := me.add(`{"expirationDate":"2100-01-01T00:00:00Z"}`)
	var file keyFile
	json.Unmarshal(added.KeyContent, &file)
	block, _ := pem.Decode([]byte(file.Key))
	private, err := x509.ParsePKCS1PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	made := credential{file, private}
	if all := me.mine(); inTime() && all.ids() != key.KeyID {
		t.Error("listed at once:", all.reply)
	}
	if got := s.exchange(form(s.assertion(made), "openid")); inTime() {
		expect(t, got, ia)
	}
	s.order("GET", "/settled", "", nil)
	if all := me.mine(); all.ids() != key.KeyID+" "+added.KeyID {
		t.Error("not listed:", all.reply)
	}
	s.mint(made, "openid")

	changed = time.Now()
	expect(t, me.call("DELETE", me.keys()+"/"+added.KeyID, ""), "200")
	expect(t, me.call("DELETE", me.keys()+"/"+added.KeyID, ""), noSuchKey)
	if all := me.mine(); inTime() && all.ids() != key.KeyID+" "+added.KeyID {
		t.Error("gone at once:", all.reply)
	}
	s.order("GET", "/settled", "", nil)
	if all := me.mine(); all.ids() != key.KeyID {
		t.Error("still listed:", all.reply)
	}
}

func TestRecorderNamesTheCaller(t *testing.T) {
	s := start(t)
	me := s.own(`{}`)
	other := s.own(`{}`)
	s.order("DELETE", "/requests", "", nil)
	me.call("POST", keySearch, "")
	me.call("DELETE", other.keys()+"/"+other.KeyID, "")
	other.call("POST", other.keys(), `{"expirationDate":"2100-01-01T00:00:00Z"}`)
	s.call("garbage", "POST", keySearch, "")
	s.call("", "POST", keySearch, "")

	got := s.must("GET", s.Control+"/requests", nil, "")
	var all recorded
	if err := json.Unmarshal([]byte(got.body), &all); err != nil {
		t.Fatal(err)
	}
	var callers []string
	for _, r := range all.Requests {
		callers = append(callers, r.UserID)
	}
	if want := []string{me.UserID, me.UserID, other.UserID, "", ""}; fmt.Sprint(callers) != fmt.Sprint(want) {
		t.Errorf("%v, want %v", callers, want)
	}
	for _, token := range []string{me.token, other.token, "garbage"} {
		if bytes.Contains([]byte(got.body), []byte(token)) {
			t.Error("a bearer token is recorded")
		}
	}
	s.order("POST", "/faults", `{"path":"`+keySearch+`","userId":"`+me.UserID+`","status":503}`, nil)
	expect(t, other.call("POST", keySearch, ""), "200")
	if got := me.call("POST", keySearch, ""); got.status != 503 {
		t.Error(got)
	}
}
