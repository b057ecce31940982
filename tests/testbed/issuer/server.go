package main

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/pkg/crypto"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
)

const (
	tokenPath = "/oauth/v2/token"
	keysPath  = "/oauth/v2/keys"
)

// endpoints are ZITADEL's default paths (docs/reference/zitadel-protocol.md#discovery). Endpoints that the
// issuer does not implement answer with the library's "not implemented on this server".
var endpoints = op.Endpoints{
	Token:         op.NewEndpoint(tokenPath),
	Introspection: op.NewEndpoint("/oauth/v2/introspect"),
	Userinfo:      op.NewEndpoint("/oidc/v1/userinfo"),
	Revocation:    op.NewEndpoint("/oauth/v2/revoke"),
	JwksURI:       op.NewEndpoint(keysPath),
}

// issuer implements ZITADEL's part. Routing, parameter checks, the verification of assertions and the error
// envelopes come from the library (docs/reference/zitadel-protocol.md#sources-and-versions).
type issuer struct {
	op.UnimplementedServer
	users      *directory
	signingKey func() signingKey
	crypto     op.Crypto
}

func newIssuer(users *directory, keys keyMaker) http.Handler {
	var secret [32]byte
	rand.Read(secret[:])
	i := &issuer{
		users: users,
		signingKey: sync.OnceValue(func() signingKey {
			return signingKey{id: users.newID(), private: keys.take()}
		}),
		crypto: op.NewAES256GCMCrypto(secret, "issuer"),
	}
	go i.signingKey() // so that the first token does not wait for it

	instance := http.NewServeMux()
	instance.HandleFunc("GET /management/v1/iam", i.iam)
	addAPI(instance, i, keys)
	instance.Handle("/", op.RegisterServer(i, endpoints, op.WithFallbackLogger(slog.New(slog.DiscardHandler))))

	// Health probes work with any host (docs/reference/zitadel-protocol.md#health-probes).
	all := http.NewServeMux()
	all.HandleFunc("/debug/healthz", func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("ok")) })
	all.HandleFunc("/debug/ready", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, "ok") })
	all.Handle("/", selectInstance(users, neverStore(instance)))
	return all
}

// neverStore forbids caching of all answers except the key set
// (docs/reference/zitadel-protocol.md#token-response).
func neverStore(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != keysPath {
			w.Header().Set("Cache-Control", "no-store")
			w.Header().Set("Pragma", "no-cache")
		}
		next.ServeHTTP(w, r)
	})
}

// signingKey is the key that signs tokens. It implements the library's interface.
type signingKey struct {
	id      string
	private *rsa.PrivateKey
}

func (k signingKey) ID() string                                  { return k.id }
func (k signingKey) Key() any                                    { return k.private }
func (k signingKey) SignatureAlgorithm() jose.SignatureAlgorithm { return jose.RS256 }

func (i *issuer) Health(context.Context, *op.Request[struct{}]) (*op.Response, error) {
	return op.NewResponse(op.Status{Status: "ok"}), nil
}

func (i *issuer) Ready(context.Context, *op.Request[struct{}]) (*op.Response, error) {
	return op.NewResponse(op.Status{Status: "ok"}), nil
}

// Discovery lists the endpoints of this issuer. All addresses follow the host of the request
// (docs/reference/zitadel-protocol.md#discovery).
func (i *issuer) Discovery(ctx context.Context, _ *op.Request[struct{}]) (*op.Response, error) {
	issuer := op.IssuerFromContext(ctx)
	return op.NewResponse(&oidc.DiscoveryConfiguration{
		Issuer:                           issuer,
		AuthorizationEndpoint:            issuer + "/oauth/v2/authorize",
		TokenEndpoint:                    endpoints.Token.Absolute(issuer),
		IntrospectionEndpoint:            endpoints.Introspection.Absolute(issuer),
		UserinfoEndpoint:                 endpoints.Userinfo.Absolute(issuer),
		RevocationEndpoint:               endpoints.Revocation.Absolute(issuer),
		EndSessionEndpoint:               issuer + "/oidc/v1/end_session",
		DeviceAuthorizationEndpoint:      issuer + "/oauth/v2/device_authorization",
		JwksURI:                          endpoints.JwksURI.Absolute(issuer),
		ScopesSupported:                  op.DefaultSupportedScopes,
		ResponseTypesSupported:           op.ResponseTypes(nil),
		GrantTypesSupported:              []oidc.GrantType{oidc.GrantTypeBearer},
		SubjectTypesSupported:            op.SubjectTypes(nil),
		IDTokenSigningAlgValuesSupported: []string{string(jose.RS256)},
	}), nil
}

// Keys returns the key set, the only cacheable answer (docs/reference/zitadel-protocol.md#token-response).
func (i *issuer) Keys(context.Context, *op.Request[struct{}]) (*op.Response, error) {
	key := i.signingKey()
	resp := op.NewResponse(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{
		KeyID:     key.id,
		Algorithm: string(jose.RS256),
		Use:       "sig",
		Key:       key.private.Public(),
	}}})
	resp.Header.Set("Cache-Control", "max-age=300, must-revalidate")
	return resp, nil
}

// VerifyClient refuses client credentials, because no user has a client secret
// (docs/reference/zitadel-protocol.md#token-request).
func (i *issuer) VerifyClient(ctx context.Context, r *op.Request[op.ClientCredentials]) (op.Client, error) {
	if oidc.GrantType(r.Form.Get("grant_type")) == oidc.GrantTypeClientCredentials {
		return nil, oidc.ErrInvalidClient().WithDescription("client not found")
	}
	return i.UnimplementedServer.VerifyClient(ctx, r)
}

// JWTProfile exchanges an assertion for an access token. It checks the assertion, the scopes and the state of
// the user, in ZITADEL's order (docs/reference/zitadel-protocol.md#the-assertion).
func (i *issuer) JWTProfile(ctx context.Context, r *op.Request[oidc.JWTProfileGrantRequest]) (*op.Response, error) {
	s := i.users.settings()
	assertion, err := op.VerifyJWTAssertion(ctx, r.Data.Assertion, i.verifier(ctx, s))
	if err != nil {
		return nil, rejected(s, err)
	}
	u, err := i.users.projected(assertion.Subject)
	if err != nil {
		return nil, rejected(s, err)
	}
	org := i.users.organizationOf(u)
	scopes, err := op.ValidateAuthReqScopes(machineClient{org: org}, r.Data.Scope)
	if err != nil {
		return nil, err
	}
	if u.State != stateActive {
		return nil, oidc.ErrInvalidRequest().WithDescription("Errors.User.NotActive")
	}
	return i.issue(ctx, s, u, org, scopes)
}

// verifier checks assertions like ZITADEL. The library reads the real clock. Shifting its two limits by the
// offset has the same effect as shifting the clock.
func (i *issuer) verifier(ctx context.Context, s settings) *op.JWTProfileVerifier {
	maxAge := time.Hour - s.clockOffset()
	if maxAge == 0 {
		maxAge = -1 // to the library, 0 means "any age"
	}
	return op.NewJWTProfileVerifier(i.users, op.IssuerFromContext(ctx), maxAge, time.Second+s.clockOffset())
}

// rejected is the answer to every invalid assertion, whatever the reason, in the configured dialect
// (docs/reference/zitadel-protocol.md#errors-of-the-token-endpoint).
func rejected(s settings, reason error) error {
	if s.Dialect == dialectErrorsInternal {
		return oidc.ErrServerError().WithDescription("Errors.Internal").WithParent(reason)
	}
	return oidc.ErrInvalidGrant().WithDescription("invalid assertion").WithParent(reason)
}

// issue creates the tokens of an accepted request (docs/reference/zitadel-protocol.md#token-response,
// docs/reference/zitadel-protocol.md#token-formats).
func (i *issuer) issue(ctx context.Context, s settings, u user, org organization, scopes []string) (*op.Response, error) {
	lifetime := s.LifetimeSeconds
	if u.LifetimeSeconds != 0 {
		lifetime = u.LifetimeSeconds
	}
	now := s.now()
	session := session{
		id:       "V2_" + i.users.newID() + "-at_" + i.users.newID(),
		userID:   u.id,
		username: u.Username,
		scopes:   scopes,
		audience: audienceOf(scopes, s.ZitadelProjectID),
		issued:   now,
		expires:  now.Add(time.Duration(lifetime) * time.Second),
	}
	claims := claimsOf(u, org, scopes, session.audience)

	var accessToken string
	var err error
	if u.TokenType == tokenTypeJWT {
		session.issuer = op.IssuerFromContext(ctx)
		jwt := oidc.NewAccessTokenClaims(session.issuer, u.id, session.audience, session.expires, session.id, u.Username, -s.clockOffset())
		jwt.Claims = claims
		accessToken, err = i.sign(jwt)
	} else {
		accessToken, err = op.CreateBearerToken(session.id, u.id, i.crypto)
	}
	if err != nil {
		return nil, err
	}
	i.users.addSession(accessToken, session)

	response := &oidc.AccessTokenResponse{
		AccessToken: accessToken,
		TokenType:   oidc.BearerToken,
		ExpiresIn:   uint64(lifetime - 1), // the remaining seconds, rounded down
	}
	if slices.Contains(scopes, oidc.ScopeOpenID) {
		response.IDToken, err = i.idToken(ctx, s, session, claims, accessToken)
	}
	return op.NewResponse(response), err
}

// idToken creates an id token that has already expired: ZITADEL sets no lifetime for it with this grant
// (docs/reference/zitadel-protocol.md#token-response).
func (i *issuer) idToken(ctx context.Context, s settings, session session, claims map[string]any, accessToken string) (string, error) {
	skew := -s.clockOffset()
	jwt := oidc.NewIDTokenClaims(op.IssuerFromContext(ctx), session.userID, session.audience, session.issued, session.issued.Add(skew), "", "", nil, session.username, skew)
	jwt.Expiration = jwt.IssuedAt
	jwt.Claims = claims
	hash, err := oidc.ClaimHash(accessToken, jose.RS256)
	if err != nil {
		return "", err
	}
	jwt.AccessTokenHash = hash
	return i.sign(jwt)
}

func (i *issuer) sign(claims any) (string, error) {
	signer, err := op.SignerFromKey(i.signingKey())
	if err != nil {
		return "", err
	}
	return crypto.Sign(claims, signer)
}

// isFrom reports whether a token is valid at this issuer. A JWT is valid only at the issuer in its iss. An
// opaque token names no issuer and is valid at all (docs/reference/zitadel-protocol.md#token-formats).
func (s session) isFrom(issuer string) bool { return s.issuer == "" || s.issuer == issuer }

// Introspect answers an API application about tokens with its project in the audience
// (docs/reference/zitadel-protocol.md#introspection).
func (i *issuer) Introspect(ctx context.Context, r *op.Request[op.IntrospectionRequest]) (*op.Response, error) {
	app, found := i.users.app(r.Data.ClientID)
	if !found || app.secret != r.Data.ClientSecret {
		return nil, oidc.ErrUnauthorizedClient()
	}
	issuer := op.IssuerFromContext(ctx)
	session, err := i.users.session(r.Data.Token)
	if err != nil || !session.isFor(app.projectID) || !session.isFrom(issuer) {
		return op.NewResponse(&oidc.IntrospectionResponse{}), nil
	}
	u, err := i.users.user(session.userID)
	if err != nil {
		return op.NewResponse(&oidc.IntrospectionResponse{}), nil
	}
	org := i.users.organizationOf(u)
	claims := claimsOf(u, org, session.scopes, session.audience)
	// Roles in the caller's own project need no scope.
	if roles := rolesIn(u, org, app.projectID, func(string) bool { return true }); len(roles) > 0 {
		claims["urn:zitadel:iam:org:project:roles"] = roles
		claims["urn:zitadel:iam:org:project:"+app.projectID+":roles"] = roles
	}
	return op.NewResponse(&oidc.IntrospectionResponse{
		Active:     true,
		Scope:      session.scopes,
		ClientID:   session.username,
		TokenType:  oidc.BearerToken,
		Expiration: oidc.FromTime(session.expires),
		IssuedAt:   oidc.FromTime(session.issued),
		AuthTime:   oidc.FromTime(session.issued),
		NotBefore:  oidc.FromTime(session.issued),
		Subject:    session.userID,
		Audience:   session.audience,
		Issuer:     issuer,
		JWTID:      session.id,
		Username:   u.Username,
		Claims:     claims,
	}), nil
}
