package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"io"
	"mime"
	"net/http"
)

// Connect, the protocol of ZITADEL's v2 services since ZITADEL 4 (docs/reference/zitadel-protocol.md#connect).

// connectCodes are the names of gRPC codes and their HTTP statuses in Connect, which differ from those of REST
// (https://connectrpc.com/docs/protocol/#error-codes).
var connectCodes = map[int]struct {
	name   string
	status int
}{
	codeInvalidArgument: {"invalid_argument", http.StatusBadRequest},
	codeNotFound:        {"not_found", http.StatusNotFound},
	codeAlreadyExists:   {"already_exists", http.StatusConflict},
	codeNoPermission:    {"permission_denied", http.StatusForbidden},
	codeFailed:          {"failed_precondition", http.StatusBadRequest},
	codeUnimplemented:   {"unimplemented", http.StatusNotImplemented},
	codeUnauthenticated: {"unauthenticated", http.StatusUnauthorized},
}

// connectError is the error envelope of Connect.
type connectError struct {
	Code    string               `json:"code"`
	Message string               `json:"message"`
	Details []connectErrorDetail `json:"details,omitempty"`
}

// connectErrorDetail has the detail twice: as a protobuf message and as JSON.
type connectErrorDetail struct {
	Type  string `json:"type"`
	Value string `json:"value"`
	Debug struct {
		ID      string `json:"id"`
		Message string `json:"message"`
	} `json:"debug"`
}

func writeConnectError(w http.ResponseWriter, err apiError) {
	code := connectCodes[err.Code]
	envelope := connectError{Code: code.name, Message: err.Message}
	for _, detail := range err.Details {
		said := connectErrorDetail{
			Type:  "zitadel.v1.ErrorDetail",
			Value: base64.RawStdEncoding.EncodeToString(append(protoString(1, detail.ID), protoString(2, detail.Message)...)),
		}
		said.Debug.ID, said.Debug.Message = detail.ID, detail.Message
		envelope.Details = append(envelope.Details, said)
	}
	writeJSON(w, code.status, envelope)
}

// protoString encodes a string field with fewer than 128 bytes (https://protobuf.dev/programming-guides/encoding/).
func protoString(number byte, text string) []byte {
	return append([]byte{number<<3 | 2, byte(len(text))}, text...)
}

// connect wraps a method for Connect. An absent method is an unknown address.
func (m management) connect(has func(settings) bool, handle method) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		kind, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
		switch {
		case !has(m.users.settings()):
			http.NotFound(w, r)
			return
		case r.Method != http.MethodPost:
			w.Header().Set("Allow", http.MethodPost)
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		case kind != "application/json":
			w.Header().Set("Accept-Post", "application/json")
			w.WriteHeader(http.StatusUnsupportedMediaType)
			return
		}
		caller, err := m.caller(r)
		var body any
		if err == nil {
			err = pathFromBody(r)
		}
		if err == nil {
			body, err = handle(caller, r)
		}
		if err != nil {
			writeConnectError(w, known(err))
			return
		}
		writeJSON(w, http.StatusOK, body)
	}
}

// pathFromBody copies the ids in the body to the names of REST's paths, so that a method works with both.
func pathFromBody(r *http.Request) error {
	text, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	var ids struct {
		UserID  string `json:"userId"`
		KeyID   string `json:"keyId"`
		TokenID string `json:"tokenId"`
	}
	if err := json.Unmarshal(text, &ids); err != nil && len(text) > 0 {
		return err
	}
	for name, id := range map[string]string{"id": ids.UserID, "key": ids.KeyID, "pat": ids.TokenID} {
		r.SetPathValue(name, id)
	}
	r.Body = io.NopCloser(bytes.NewReader(text))
	return nil
}
