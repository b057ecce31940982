package main

import (
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

// writeError writes an error in the form of ZITADEL's REST API.
func writeError(w http.ResponseWriter, err error) { writeAPIError(w, known(err)) }

// known returns ZITADEL's error for an error of the directory.
func known(err error) (known apiError) {
	switch {
	case errors.As(err, &known):
	case errors.Is(err, errTaken):
		known = withID(codeAlreadyExists, "V3-DKcYh", "User already exists")
	case errors.Is(err, errIDTaken):
		known = withID(codeFailed, "COMMAND-k2una", "User already exists")
	case errors.Is(err, errNoOrganization):
		known = withID(codeFailed, "COMMAND-QXPGs", "Organisation not found")
	case errors.Is(err, errNoProject):
		known = withID(codeFailed, "COMMAND-EbFMN", "Project not found")
	case errors.Is(err, errNoGrant):
		known = withID(codeNotFound, "PROJECT-D8JxR", "Errors.Project.Grant.NotFound")
	case errors.Is(err, errNoKey):
		known = withID(codeNotFound, "COMMAND-4m77G", "Machine key not found")
	case errors.Is(err, errNoPAT):
		known = withID(codeNotFound, "COMMAND-4m77G", "Personal Access Token not found")
	case errors.Is(err, errNoMetadata):
		known = withID(codeNotFound, "META-2nnds", "Errors.Metadata.KeyNotExisting")
	case errors.Is(err, errNoUser):
		known = withID(codeFailed, "COMMAND-bnipwm1", "User could not be found")
	default:
		known = apiError{Code: codeInvalidArgument, Message: err.Error()}
	}
	return known
}

// management is the part of ZITADEL's API that clients of an operator need: user v2 and management v1, organizations,
// projects and administrators.
type management struct {
	*issuer
	keys keyMaker
}

// method answers a request of a known caller.
type method = func(caller user, r *http.Request) (any, error)

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
