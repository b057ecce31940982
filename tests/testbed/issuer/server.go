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

// endpoints are ZITADEL's default paths (zitadel.md §5.1). Those that the issuer does not implement
// answer with the library's "not implemented on this server".
var endpoints = op.Endpoints{
	Token:         op.NewEndpoint(tokenPath),
	Introspection: op.NewEndpoint("/oauth/v2/introspect"),
	Userinfo:      op.NewEndpoint("/oidc/v1/userinfo"),
	Revocation:    op.NewEndpoint("/oauth/v2/revoke"),
	JwksURI:       op.NewEndpoint(keysPath),
}

// issuer is ZITADEL's side of the library: routing, parameter checks, the checks of an assertion and
// the error envelopes are the library's own (zitadel.md §8).
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
	go i.signingKey() // the first token need not wait for it

	instance := http.NewServeMux()
	instance.HandleFunc("GET /management/v1/iam", i.iam)
	addManagement(instance, i, keys)
	instance.Handle("/", op.RegisterServer(i, endpoints, op.WithFallbackLogger(slog.New(slog.DiscardHandler))))

	// Probes need no host that names the instance (zitadel.md §5.3).
	all := http.NewServeMux()
	all.HandleFunc("/debug/healthz", func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("ok")) })
	all.HandleFunc("/debug/ready", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, "ok") })
	all.Handle("/", selectInstance(users, neverStore(instance)))
	return all
}

// neverStore forbids caching of everything but the key set (zitadel.md §4.4).
func neverStore(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != keysPath {
			w.Header().Set("Cache-Control", "no-store")
			w.Header().Set("Pragma", "no-cache")
		}
		next.ServeHTTP(w, r)
	})
}

// signingKey signs tokens, in the form in which the library wants it.
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

// Discovery names what this issuer has; all addresses follow the request (zitadel.md §5.1).
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

// Keys is the only answer that may be kept for a while (zitadel.md §10.6).
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

// VerifyClient knows no user with a secret (zitadel.md §10.1, last row).
func (i *issuer) VerifyClient(ctx context.Context, r *op.Request[op.ClientCredentials]) (op.Client, error) {
	if oidc.GrantType(r.Form.Get("grant_type")) == oidc.GrantTypeClientCredentials {
		return nil, oidc.ErrInvalidClient().WithDescription("client not found")
	}
	return i.UnimplementedServer.VerifyClient(ctx, r)
}

// JWTProfile exchanges an assertion for an access token, in ZITADEL's order: assertion, scopes, state
// of the user (zitadel.md §2).
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
	org := u.organization(s)
	scopes, err := op.ValidateAuthReqScopes(machineClient{org: org}, r.Data.Scope)
	if err != nil {
		return nil, err
	}
	if u.State != stateActive {
		return nil, oidc.ErrInvalidRequest().WithDescription("Errors.User.NotActive")
	}
	return i.issue(ctx, s, u, org, scopes)
}

// verifier checks assertions like ZITADEL's. The library reads the real clock; moving its two limits
// by the offset is the same as moving the clock.
func (i *issuer) verifier(ctx context.Context, s settings) *op.JWTProfileVerifier {
	maxAge := time.Hour - s.clockOffset()
	if maxAge == 0 {
		maxAge = -1 // to the library, 0 means "any age"
	}
	return op.NewJWTProfileVerifier(i.users, op.IssuerFromContext(ctx), maxAge, time.Second+s.clockOffset())
}

// rejected is the one answer to every assertion that does not hold, whatever the reason
// (zitadel.md §2.1, both dialects).
func rejected(s settings, reason error) error {
	if s.Dialect == dialectErrorsInternal {
		return oidc.ErrServerError().WithDescription("Errors.Internal").WithParent(reason)
	}
	return oidc.ErrInvalidGrant().WithDescription("invalid assertion").WithParent(reason)
}

// issue makes the tokens of an accepted request (zitadel.md §4.3, §4.4, §10.6).
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
		ExpiresIn:   uint64(lifetime - 1), // the seconds that remain, rounded down
	}
	if slices.Contains(scopes, oidc.ScopeOpenID) {
		response.IDToken, err = i.idToken(ctx, s, session, claims, accessToken)
	}
	return op.NewResponse(response), err
}

// idToken is over when it is issued: ZITADEL sets no lifetime for it on this path (zitadel.md §4.4).
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

// isFrom tells whether a token may be used at this issuer: a JWT only at the one that its iss names, an
// opaque token, which names none, anywhere (zitadel.md §4.3).
func (s session) isFrom(issuer string) bool { return s.issuer == "" || s.issuer == issuer }

// Introspect answers an API app about tokens with its project in the audience (zitadel.md §10.9).
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
	org := u.organization(i.users.settings())
	claims := claimsOf(u, org, session.scopes, session.audience)
	// The caller's own project needs no roles scope.
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
