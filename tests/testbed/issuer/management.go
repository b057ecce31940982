package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/zitadel/oidc/v3/pkg/op"
)

// gRPC codes and the HTTP statuses of ZITADEL's REST gateway (docs/reference/zitadel-protocol.md#api-errors).
const (
	codeInvalidArgument = 3
	codeNotFound        = 5
	codeAlreadyExists   = 6
	codeNoPermission    = 7
	codeFailed          = 9
	codeUnimplemented   = 12
	codeUnauthenticated = 16
)

var statusOfCode = map[int]int{
	codeInvalidArgument: http.StatusBadRequest,
	codeNotFound:        http.StatusNotFound,
	codeAlreadyExists:   http.StatusConflict,
	codeNoPermission:    http.StatusForbidden,
	codeFailed:          http.StatusBadRequest,
	codeUnimplemented:   http.StatusMethodNotAllowed,
	codeUnauthenticated: http.StatusUnauthorized,
}

// apiError is the error envelope of ZITADEL's REST API.
type apiError struct {
	Code    int              `json:"code"`
	Message string           `json:"message"`
	Details []apiErrorDetail `json:"details,omitempty"`
}

type apiErrorDetail struct {
	Type    string `json:"@type"`
	ID      string `json:"id"`
	Message string `json:"message"`
}

// withID returns an error with one of ZITADEL's error ids.
func withID(code int, id, message string) apiError {
	detail := apiErrorDetail{Type: "type.googleapis.com/zitadel.v1.ErrorDetail", ID: id, Message: message}
	return apiError{Code: code, Message: message + " (" + id + ")", Details: []apiErrorDetail{detail}}
}

var (
	errNoAuthHeader = apiError{Code: codeUnauthenticated, Message: "auth header missing"}
	errTokenInvalid = withID(codeUnauthenticated, "AUTH-7fs1e", "Errors.Token.Invalid")
	// ZITADEL returns it also to hide from the caller whether the user exists.
	errNoMembership = withID(codeNotFound, "AUTHZ-cdgFk", "membership not found")
	errAbsent       = apiError{Code: codeNotFound, Message: "Not Found"}
	errNoMethod     = apiError{Code: codeUnimplemented, Message: "Method Not Allowed"}
)

func (e apiError) Error() string { return e.Message }

func writeAPIError(w http.ResponseWriter, e apiError) { writeJSON(w, statusOfCode[e.Code], e) }

func writeJSON(w http.ResponseWriter, status int, body any) {
	text, err := json.Marshal(body)
	if err != nil {
		panic(err) // only for a type that JSON cannot represent: a bug in this program
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(text)
}

// caller returns the user of the token in a request to ZITADEL's own API. The token needs the ZITADEL API's
// audience.
func (i *issuer) caller(r *http.Request) (user, error) {
	if r.Header.Get("Authorization") == "" {
		return user{}, errNoAuthHeader
	}
	session, err := i.users.session(bearer(r))
	if err != nil || !session.isFor(i.users.settings().ZitadelProjectID) || !session.isFrom(op.IssuerFromContext(r.Context())) {
		return user{}, errTokenInvalid
	}
	u, err := i.users.user(session.userID)
	if err != nil {
		return user{}, errTokenInvalid
	}
	return u, nil
}

// iam answers GET /management/v1/iam, from which a client learns the id behind the alias zitadel.
func (i *issuer) iam(w http.ResponseWriter, r *http.Request) {
	if _, err := i.caller(r); err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, map[string]string{
		"globalOrgId":  defaultOrganizationID,
		"defaultOrgId": defaultOrganizationID,
		"iamProjectId": i.users.settings().ZitadelProjectID,
	})
}

// writeError writes a directory error in ZITADEL's form.
func writeError(w http.ResponseWriter, err error) {
	var known apiError
	switch {
	case errors.As(err, &known):
	case errors.Is(err, errTaken):
		known = withID(codeAlreadyExists, "V3-DKcYh", "User already exists")
	case errors.Is(err, errNoKey):
		known = withID(codeNotFound, "COMMAND-4m77G", "Machine key not found")
	case errors.Is(err, errNoPAT):
		known = withID(codeNotFound, "COMMAND-4m77G", "Personal Access Token not found")
	case errors.Is(err, errNoUser):
		known = withID(codeFailed, "COMMAND-bnipwm1", "User could not be found")
	default:
		known = apiError{Code: codeInvalidArgument, Message: err.Error()}
	}
	writeAPIError(w, known)
}

// management is the part of ZITADEL's API for users and keys: user v2 and management v1. ZITADEL 3 has only
// management v1.
type management struct {
	*issuer
	keys keyMaker
}

// machine are the fields of a service user in both APIs.
type machine struct {
	Name            string `json:"name"`
	AccessTokenType string `json:"accessTokenType"`
}

func (m machine) tokenType() string {
	return strings.TrimPrefix(m.AccessTokenType, "ACCESS_TOKEN_TYPE_")
}

func addManagement(mux *http.ServeMux, i *issuer, keys keyMaker) {
	m := management{i, keys}
	handleFor := func(pattern string, absent error, handle func(user, *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if absent != nil && !i.users.settings().UserV2 {
				writeError(w, absent)
				return
			}
			caller, err := i.caller(r)
			var body any
			if err == nil {
				body, err = handle(caller, r)
			}
			if err != nil {
				writeError(w, err)
				return
			}
			writeJSON(w, http.StatusOK, body)
		})
	}
	handle := func(pattern string, absent error, handle func(*http.Request) (any, error)) {
		handleFor(pattern, absent, func(caller user, r *http.Request) (any, error) {
			if !caller.Administrator {
				return nil, errNoMembership
			}
			return handle(r)
		})
	}
	v2, v1 := "/v2/users", "/management/v1/users"
	handle("GET /admin/v1/instances/me", nil, m.instance)
	// Since v4.0.0.
	handle("POST "+v2+"/new", errNoMethod, m.createUser)
	handle("PATCH "+v2+"/{id}", errNoMethod, m.updateUser)
	handleFor("POST "+v2+"/{id}/keys", errAbsent, m.addKey)
	handleFor("POST "+v2+"/keys/search", errAbsent, m.listKeys)
	handleFor("DELETE "+v2+"/{id}/keys/{key}", errAbsent, m.removeOwnKey)
	handleFor("POST "+v2+"/{id}/pats", errAbsent, m.addPAT)
	handleFor("POST "+v2+"/pats/search", errAbsent, m.listPATs)
	handleFor("DELETE "+v2+"/{id}/pats/{pat}", errAbsent, m.removePAT)
	handle("POST "+v2+"/{id}/deactivate", nil, m.setState("inactive"))
	handle("POST "+v2+"/{id}/reactivate", nil, m.setState(stateActive))
	handle("DELETE "+v2+"/{id}", nil, m.deleteUser)

	handle("POST "+v1+"/machine", nil, m.createUserV1)
	handle("PUT "+v1+"/{id}/machine", nil, m.updateUserV1)
	handle("POST "+v1+"/{id}/keys", nil, m.addKeyV1)
	handle("DELETE "+v1+"/{id}/keys/{key}", nil, m.removeKey)
	handle("POST "+v1+"/{id}/_deactivate", nil, m.setState("inactive"))
	handle("POST "+v1+"/{id}/_reactivate", nil, m.setState(stateActive))
	handle("DELETE "+v1+"/{id}", nil, m.deleteUser)
}

// fields decodes a body. Like ZITADEL's API, it ignores unknown fields and accepts an empty body.
func fields(r *http.Request, into any) error {
	if err := json.NewDecoder(r.Body).Decode(into); err != io.EOF {
		return err
	}
	return nil
}

// now is the time of a change by the server's clock.
func (m management) now() string { return timestamp(m.users.settings().now()) }

// timestamp formats a time as ZITADEL's API does: in microseconds, the resolution of its database, with 0, 3 or 6
// digits of the fraction (https://protobuf.dev/programming-guides/json/).
func timestamp(t time.Time) string {
	text := t.UTC().Format("2006-01-02T15:04:05.000000")
	text = strings.TrimSuffix(text, "000")
	return strings.TrimSuffix(text, ".000") + "Z"
}

func (m management) instance(*http.Request) (any, error) {
	version := "v4-stand-in"
	if !m.users.settings().UserV2 {
		version = "v3-stand-in"
	}
	return map[string]any{"instance": map[string]string{"version": version}}, nil
}

func (m management) createUser(r *http.Request) (any, error) {
	var in struct {
		OrganizationID string  `json:"organizationId"`
		UserID         string  `json:"userId"`
		Username       string  `json:"username"`
		Machine        machine `json:"machine"`
	}
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	settings := userSettings{Username: in.Username, TokenType: in.Machine.tokenType()}
	made, err := m.users.createUser(user{userSettings: settings, id: in.UserID, organizationID: in.OrganizationID})
	return map[string]string{"id": made.id, "creationDate": m.now()}, err
}

func (m management) createUserV1(r *http.Request) (any, error) {
	var in struct {
		machine
		UserName string `json:"userName"`
	}
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	if in.Name == "" {
		return nil, errors.New("invalid AddMachineUserRequest.Name: value length must be between 1 and 200 runes, inclusive")
	}
	settings := userSettings{Username: in.UserName, TokenType: in.tokenType()}
	made, err := m.users.createUser(user{userSettings: settings, organizationID: r.Header.Get("x-zitadel-orgid")})
	return map[string]string{"userId": made.id}, err
}

func (m management) updateUser(r *http.Request) (any, error) {
	var in struct {
		Machine machine `json:"machine"`
	}
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	_, err := m.change(r, func(s *userSettings) { s.TokenType = cmp.Or(in.Machine.tokenType(), s.TokenType) })
	return map[string]string{"changeDate": m.now()}, err
}

// updateUserV1 replaces the fields of a service user. A call that changes nothing fails.
func (m management) updateUserV1(r *http.Request) (any, error) {
	var in machine
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	changed, err := m.change(r, func(s *userSettings) { s.TokenType = cmp.Or(in.tokenType(), tokenTypeBearer) })
	if err == nil && !changed {
		err = withID(codeFailed, "COMMAND-2n8vs", "Errors.User.NotChanged")
	}
	return struct{}{}, err
}

func (m management) setState(state string) func(*http.Request) (any, error) {
	return func(r *http.Request) (any, error) {
		_, err := m.change(r, func(s *userSettings) { s.State = state })
		return map[string]string{"changeDate": m.now()}, err
	}
}

// change changes a user and reports whether anything differs.
func (m management) change(r *http.Request, change func(*userSettings)) (bool, error) {
	u, err := m.users.user(r.PathValue("id"))
	if err != nil {
		return false, err
	}
	changed := u.userSettings
	change(&changed)
	if err := changed.check(); err != nil {
		return false, err
	}
	return changed != u.userSettings, m.users.changeUser(u.id, changed)
}

func (m management) deleteUser(r *http.Request) (any, error) {
	return map[string]string{"deletionDate": m.now()}, m.users.deleteUser(r.PathValue("id"))
}

// addKeyV1 is AddMachineKey. Its expiration date is optional.
func (m management) addKeyV1(r *http.Request) (any, error) {
	var in struct {
		keyRequest
		Type string `json:"type"`
	}
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	if in.Type != "KEY_TYPE_JSON" {
		return nil, errors.New("invalid AddMachineKeyRequest.Type: value must not be in list [0]")
	}
	if err := in.check(m.users.settings().now()); err != nil {
		return nil, err
	}
	made, err := m.createKey(r.PathValue("id"), in.keyRequest)
	if err != nil {
		return nil, err
	}
	return struct {
		KeyID      string `json:"keyId"`
		KeyDetails []byte `json:"keyDetails,omitempty"`
	}{made.KeyID, made.content()}, nil
}

func (m management) removeKey(r *http.Request) (any, error) {
	return map[string]string{"deletionDate": m.now()}, m.users.deleteKey(r.PathValue("id"), r.PathValue("key"))
}
