package main

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"
)

// The keys of a service user in user v2. A service user without any role may call these methods on itself
// (docs/reference/zitadel-protocol.md#self-management-of-keys), an administrator on other users too.

var (
	errPast          = withID(codeInvalidArgument, "DOMAIN-dv3t5", "Errors.AuthNKey.ExpireBeforeNow")
	errPublicKey     = withID(codeInvalidArgument, "COMMAND-5F3h1", "Public key is not a valid RSA public key in PKIX format with PEM encoding")
	errInvalidFilter = withID(codeInvalidArgument, "GRPC-vR9nC", "List.Query.Invalid")
)

// keyRequest are the fields of a new key in both APIs.
type keyRequest struct {
	ExpirationDate time.Time  `json:"expirationDate"`
	PublicKey      protoBytes `json:"publicKey"`
}

// check returns ZITADEL's error for an invalid key. ZITADEL checks these fields before the caller's rights.
func (k keyRequest) check(now time.Time) error {
	if len(k.PublicKey) > 0 && !isSupported(string(k.PublicKey)) {
		return errPublicKey
	}
	return notPast(k.ExpirationDate, now)
}

// notPast accepts a missing date, which management v1 allows.
func notPast(expires, now time.Time) error {
	if !expires.IsZero() && expires.Before(now) {
		return errPast
	}
	return nil
}

// isSupported reports whether ZITADEL registers a public key
// (docs/reference/zitadel-protocol.md#public-keys-supplied-by-the-caller).
func isSupported(text string) bool {
	public, err := parsePublicKey(text)
	if err != nil {
		return false
	}
	switch public.(type) {
	case *rsa.PublicKey, *ecdsa.PublicKey, ed25519.PublicKey:
		return true
	}
	return false
}

func (m management) createKey(userID string, in keyRequest) (keyFile, error) {
	return m.users.createKey(m.keys, userID, newKey{ExpirationDate: in.ExpirationDate, PublicKey: string(in.PublicKey)})
}

// addKey is AddKey. The content is absent if the caller has the private key.
func (m management) addKey(caller user, r *http.Request) (any, error) {
	var in keyRequest
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	if in.ExpirationDate.IsZero() {
		return nil, errors.New("invalid AddKeyRequest.ExpirationDate: value is required")
	}
	if err := in.check(m.users.settings().now()); err != nil {
		return nil, err
	}
	if err := m.mayManage(caller, r.PathValue("id")); err != nil {
		return nil, err
	}
	made, err := m.createKey(r.PathValue("id"), in)
	if err != nil {
		return nil, err
	}
	return struct {
		CreationDate string `json:"creationDate"`
		KeyID        string `json:"keyId"`
		KeyContent   []byte `json:"keyContent,omitempty"`
	}{timestamp(made.created), made.KeyID, made.content()}, nil
}

// removeOwnKey is RemoveKey. A user may remove the key that it is using.
func (m management) removeOwnKey(caller user, r *http.Request) (any, error) {
	if err := m.mayManage(caller, r.PathValue("id")); err != nil {
		return nil, err
	}
	return m.removeKey(r)
}

// search are the fields of ListKeys and ListPersonalAccessTokens.
type search struct {
	Pagination    paging                           `json:"pagination"`
	SortingColumn string                           `json:"sortingColumn"`
	Filters       []map[string]struct{ ID string } `json:"filters"`
}

// check refuses what ZITADEL refuses, and what this program does not implement: a wrong list would be worse.
func (s search) check() error {
	if err := s.Pagination.check(); err != nil {
		return err
	}
	column := s.SortingColumn
	if column != "" && !strings.HasSuffix(column, "_FIELD_NAME_UNSPECIFIED") && !strings.HasSuffix(column, "_FIELD_NAME_CREATED_DATE") {
		return errors.New("the stand-in sorts by creation date only")
	}
	for _, filter := range s.Filters {
		if len(filter) == 0 {
			return errInvalidFilter
		}
		if _, known := filter["userIdFilter"]; !known || len(filter) > 1 {
			return errors.New("the stand-in knows userIdFilter only")
		}
	}
	return nil
}

// matches reports whether all filters accept a user.
func (s search) matches(userID string) bool {
	return !slices.ContainsFunc(s.Filters, func(filter map[string]struct{ ID string }) bool {
		return filter["userIdFilter"].ID != userID
	})
}

// row is a key or a personal access token in a list.
type row struct {
	CreationDate   string `json:"creationDate"`
	ChangeDate     string `json:"changeDate"`
	ID             string `json:"id"`
	UserID         string `json:"userId"`
	OrganizationID string `json:"organizationId"`
	ExpirationDate string `json:"expirationDate"`

	created time.Time
}

func (u user) row(id string, d dates) row {
	created := timestamp(d.created)
	return row{created, created, id, u.id, u.organizationID, timestamp(d.expires), d.created}
}

func (m management) listKeys(caller user, r *http.Request) (any, error) {
	return m.list(caller, r, func(u user) (rows []row) {
		for id, key := range u.keys {
			rows = append(rows, u.row(id, key.dates))
		}
		return rows
	})
}

// list answers a search over all users. ZITADEL counts and pages before it drops what the caller may not see, so the
// count includes other users' rows and a page can be short
// (docs/reference/zitadel-protocol.md#self-management-of-keys).
func (m management) list(caller user, r *http.Request, of func(user) []row) (any, error) {
	var in search
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	if err := in.check(); err != nil {
		return nil, err
	}
	if err := m.mayManage(caller, caller.id); err != nil {
		return nil, err
	}
	var rows []row
	for _, u := range m.users.projectedUsers() {
		if in.matches(u.id) {
			rows = append(rows, of(u)...)
		}
	}
	page, total := page(in.Pagination, rows)
	visible := slices.DeleteFunc(page, func(r row) bool { return !m.mayRead(caller, r.UserID) })
	return struct {
		Pagination pagination `json:"pagination"`
		Result     []row      `json:"result,omitempty"`
	}{total, visible}, nil
}

func (r row) order() (time.Time, string) { return r.created, r.ID }

// protoBytes are the bytes of a protobuf message: in JSON base64 with either alphabet, with or without padding
// (https://protobuf.dev/programming-guides/json/).
type protoBytes []byte

func (b *protoBytes) UnmarshalJSON(text []byte) error {
	var plain string
	err := json.Unmarshal(text, &plain)
	encoding := base64.RawStdEncoding
	if strings.ContainsAny(plain, "-_") {
		encoding = base64.RawURLEncoding
	}
	decoded, decodeErr := encoding.DecodeString(strings.TrimRight(plain, "="))
	if err != nil || decodeErr != nil {
		// ZITADEL repeats the value too.
		return fmt.Errorf("proto: (line 1:1): invalid value for bytes field publicKey: %s", text)
	}
	*b = decoded
	return nil
}
