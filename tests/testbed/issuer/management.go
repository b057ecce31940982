package main

import (
	"encoding/json"
	"net/http"
	"strings"

	"github.com/zitadel/oidc/v3/pkg/op"
)

// gRPC codes with the HTTP status that ZITADEL's REST gateway gives them (zitadel.md §5.5).
const (
	codeNotFound        = 5
	codeUnauthenticated = 16
)

var statusOfCode = map[int]int{
	codeNotFound:        http.StatusNotFound,
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

var (
	errNoAuthHeader = apiError{Code: codeUnauthenticated, Message: "auth header missing"}
	errTokenInvalid = apiError{
		Code:    codeUnauthenticated,
		Message: "Errors.Token.Invalid (AUTH-7fs1e)",
		Details: []apiErrorDetail{{
			Type:    "type.googleapis.com/zitadel.v1.ErrorDetail",
			ID:      "AUTH-7fs1e",
			Message: "Errors.Token.Invalid",
		}},
	}
)

func writeAPIError(w http.ResponseWriter, e apiError) { writeJSON(w, statusOfCode[e.Code], e) }

func writeJSON(w http.ResponseWriter, status int, body any) {
	text, err := json.Marshal(body)
	if err != nil {
		panic(err) // only a type that JSON cannot hold, a mistake in this program
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(text)
}

// iam answers GET /management/v1/iam: the call by which a client proves that its token is good for
// ZITADEL's own API, that is, has the zitadel audience (zitadel.md §4.2, §10.3).
func (i *issuer) iam(w http.ResponseWriter, r *http.Request) {
	header := r.Header.Get("Authorization")
	if header == "" {
		writeAPIError(w, errNoAuthHeader)
		return
	}
	s := i.users.settings()
	token, _ := strings.CutPrefix(header, "Bearer ")
	session, err := i.users.session(token)
	if err != nil || !session.isFor(s.ZitadelProjectID) || !session.isFrom(op.IssuerFromContext(r.Context())) {
		writeAPIError(w, errTokenInvalid)
		return
	}
	writeJSON(w, http.StatusOK, map[string]string{
		"globalOrgId":  defaultOrganizationID,
		"defaultOrgId": defaultOrganizationID,
		"iamProjectId": s.ZitadelProjectID,
	})
}
