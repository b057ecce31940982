package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/pkg/oidc"
)

// stand is a client of a running stand-in.
type stand struct {
	t *testing.T
	announcement
	client  *http.Client
	stdin   *io.PipeWriter
	stopped chan error
}

func start(t *testing.T, args ...string) *stand {
	t.Helper()
	stdinReader, stdin := io.Pipe()
	stdoutReader, stdout := io.Pipe()
	s := &stand{t: t, stdin: stdin, stopped: make(chan error, 1)}
	go func() {
		err := run(context.Background(), args, stdinReader, stdout)
		stdout.CloseWithError(fmt.Errorf("stopped: %w", err))
		s.stopped <- err
	}()
	t.Cleanup(func() { stdin.Close() })
	line, err := bufio.NewReader(stdoutReader).ReadBytes('\n')
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(line, &s.announcement); err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	if s.CA != "" {
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM([]byte(s.CA))
		transport.TLSClientConfig = &tls.Config{RootCAs: roots}
	}
	s.client = &http.Client{Transport: transport, Timeout: 10 * time.Second}
	t.Cleanup(transport.CloseIdleConnections)
	return s
}

// reply is an answer with its body, without the trailing newline.
type reply struct {
	status int
	header http.Header
	body   string
}

func (r reply) String() string { return fmt.Sprintf("%d %s", r.status, r.body) }

func (s *stand) send(method, address string, header http.Header, body string) (reply, error) {
	request, err := http.NewRequest(method, address, strings.NewReader(body))
	if err != nil {
		return reply{}, err
	}
	for name, values := range header {
		request.Header[http.CanonicalHeaderKey(name)] = values
	}
	if host := header.Get("Host"); host != "" {
		request.Host = host
	}
	response, err := s.client.Do(request)
	if err != nil {
		return reply{}, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return reply{response.StatusCode, response.Header, strings.TrimSuffix(string(text), "\n")}, err
}

func (s *stand) must(method, address string, header http.Header, body string) reply {
	s.t.Helper()
	got, err := s.send(method, address, header, body)
	if err != nil {
		s.t.Fatal(err)
	}
	return got
}

// order sends a request to the control port, requires success, and decodes the answer.
func (s *stand) order(method, path, body string, into any) {
	s.t.Helper()
	got := s.must(method, s.Control+path, nil, body)
	if got.status/100 != 2 {
		s.t.Fatalf("%s %s %s: %s", method, path, body, got)
	}
	if into != nil {
		if err := json.Unmarshal([]byte(got.body), into); err != nil {
			s.t.Fatal(err)
		}
	}
}

func (s *stand) newUser(fields string) (id string) {
	s.t.Helper()
	var created struct{ ID string }
	s.order("POST", "/users", fields, &created)
	return created.ID
}

// credential is a key file and its parsed private key.
type credential struct {
	keyFile
	private any
}

func (s *stand) newKey(userID, fields string) credential {
	s.t.Helper()
	var made credential
	s.order("POST", "/users/"+userID+"/keys", fields, &made.keyFile)
	if block, _ := pem.Decode([]byte(made.Key)); block != nil {
		var err error
		if made.private, err = x509.ParsePKCS1PrivateKey(block.Bytes); err != nil {
			s.t.Fatal(err)
		}
	}
	return made
}

type claims map[string]any

func (s *stand) claims(userID string) claims {
	now := time.Now()
	return claims{"iss": userID, "sub": userID, "aud": s.Issuer, "iat": now.Unix(), "exp": now.Add(time.Hour).Unix()}
}

func (c claims) with(name string, value any) claims {
	c[name] = value
	return c
}

func (c claims) without(name string) claims {
	delete(c, name)
	return c
}

func sign(t *testing.T, alg jose.SignatureAlgorithm, key any, kid string, c claims) string {
	t.Helper()
	options := &jose.SignerOptions{}
	if kid != "" {
		options.WithHeader("kid", kid)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, options)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	compact, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return compact
}

func (s *stand) assertion(c credential) string {
	return sign(s.t, jose.RS256, c.private, c.KeyID, s.claims(c.UserID))
}

func form(assertion, scope string) url.Values {
	return url.Values{"grant_type": {string(oidc.GrantTypeBearer)}, "assertion": {assertion}, "scope": {scope}}
}

var formHeader = http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}

func (s *stand) exchange(values url.Values) reply {
	s.t.Helper()
	return s.must("POST", s.Issuer+tokenPath, formHeader, values.Encode())
}

type tokens struct {
	AccessToken  string  `json:"access_token"`
	TokenType    string  `json:"token_type"`
	ExpiresIn    *uint64 `json:"expires_in"`
	IDToken      string  `json:"id_token"`
	RefreshToken *string `json:"refresh_token"`
	Scope        *string `json:"scope"`
}

func (s *stand) mint(c credential, scope string) tokens {
	s.t.Helper()
	return s.tokens(s.exchange(form(s.assertion(c), scope)))
}

func (s *stand) tokens(got reply) tokens {
	s.t.Helper()
	if got.status != 200 {
		s.t.Fatalf("no token: %s", got)
	}
	var t tokens
	if err := json.Unmarshal([]byte(got.body), &t); err != nil {
		s.t.Fatal(err)
	}
	return t
}

// decode returns the header and the claims of a JWT.
func decode(t *testing.T, jwt string) (header string, c claims) {
	t.Helper()
	parts := strings.Split(jwt, ".")
	if len(parts) != 3 {
		t.Fatalf("not a JWT: %s", jwt)
	}
	raw, err := base64.RawURLEncoding.DecodeString(parts[0])
	if err != nil {
		t.Fatal(err)
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	decoder := json.NewDecoder(bytes.NewReader(payload))
	if err := decoder.Decode(&c); err != nil {
		t.Fatal(err)
	}
	return string(raw), c
}

// decodeReply requires success and decodes the answer.
func decodeReply(t *testing.T, got reply, into any) {
	t.Helper()
	if got.status != 200 {
		t.Fatal(got)
	}
	if err := json.Unmarshal([]byte(got.body), into); err != nil {
		t.Fatal(got, err)
	}
}

const (
	orgA = "311000000000000001"
	orgB = "311000000000000002"
	// A project of organization A that is granted to organization B.
	projectA = "311000000000000003"
)

// startWithOrganizations starts a stand-in with two organizations, a project and its grant.
func startWithOrganizations(t *testing.T, args ...string) *stand {
	t.Helper()
	s := start(t, args...)
	s.order("POST", "/organizations", `{"id":"`+orgA+`","name":"Acme"}`, nil)
	s.order("POST", "/organizations", `{"id":"`+orgB+`","name":"Big Blue"}`, nil)
	s.order("POST", "/projects", `{"id":"`+projectA+`","name":"Shop","organizationId":"`+orgA+`"}`, nil)
	s.order("POST", "/projects/"+projectA+"/grants", `{"organizationId":"`+orgB+`"}`, nil)
	return s
}

// Resources in requests.
var (
	onInstance = `{"instance":true}`
	onOrgA     = `{"organizationId":"` + orgA + `"}`
	onOrgB     = `{"organizationId":"` + orgB + `"}`
	onProject  = `{"projectId":"` + projectA + `"}`
	onGrant    = `{"projectGrant":{"projectId":"` + projectA + `","organizationId":"` + orgB + `"}}`
)

// caller is a user with a personal access token. Unlike own, it needs no key, which takes long to generate.
func (s *stand) caller(fields string) own {
	s.t.Helper()
	id := s.newUser(fields)
	var pat struct{ Token string }
	s.order("POST", "/users/"+id+"/pats", `{}`, &pat)
	return own{s, credential{keyFile: keyFile{UserID: id}}, pat.Token}
}

// manager is a caller of the default organization with one role.
func (s *stand) manager(resource, role string) own {
	s.t.Helper()
	return s.caller(`{"managerRoles":[{"resource":` + resource + `,"roles":["` + role + `"]}]}`)
}
