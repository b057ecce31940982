package main

import (
	"cmp"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The methods of user v2 that a service user without any role may call on itself
// (docs/reference/zitadel-protocol.md#self-management-of-keys).

// Page sizes of lists (docs/reference/zitadel-protocol.md#self-management-of-keys).
const (
	defaultLimit = 100
	maxLimit     = 1000
)

var (
	errNoPermission  = withID(codeNoPermission, "AUTH-AWfge", "No matching permissions found")
	errPast          = withID(codeInvalidArgument, "DOMAIN-dv3t5", "Errors.AuthNKey.ExpireBeforeNow")
	errPublicKey     = withID(codeInvalidArgument, "COMMAND-5F3h1", "Public key is not a valid RSA public key in PKIX format with PEM encoding")
	errLimit         = withID(codeInvalidArgument, "QUERY-4M0fs", "Limit exceeded")
	errInvalidFilter = withID(codeInvalidArgument, "GRPC-vR9nC", "List.Query.Invalid")
)

// mayManage refuses a caller who may not change the keys and tokens of a user.
func (u user) mayManage(id string) error {
	switch {
	case u.Administrator:
		return nil
	case u.id != id:
		return errNoMembership
	case u.SelfManagementRefused:
		return errNoPermission
	}
	return nil
}

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
	if err := caller.mayManage(r.PathValue("id")); err != nil {
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
	if err := caller.mayManage(r.PathValue("id")); err != nil {
		return nil, err
	}
	return m.removeKey(r)
}

// addPAT is AddPersonalAccessToken. The token can be listed and removed. No endpoint accepts it.
func (m management) addPAT(caller user, r *http.Request) (any, error) {
	var in struct {
		ExpirationDate time.Time `json:"expirationDate"`
	}
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	if in.ExpirationDate.IsZero() {
		return nil, errors.New("invalid AddPersonalAccessTokenRequest.ExpirationDate: value is required")
	}
	userID, now := r.PathValue("id"), m.users.settings().now()
	if err := notPast(in.ExpirationDate, now); err != nil {
		return nil, err
	}
	if err := caller.mayManage(userID); err != nil {
		return nil, err
	}
	id, pat := m.users.newID(), newDates(now, in.ExpirationDate)
	err := m.users.addPAT(userID, id, pat)
	if errors.Is(err, errNoUser) {
		err = withID(codeFailed, "COMMAND-Dggw2", "User could not be found")
	}
	return struct {
		CreationDate string `json:"creationDate"`
		TokenID      string `json:"tokenId"`
		Token        string `json:"token"`
	}{timestamp(pat.created), id, rand.Text()}, err
}

// removePAT is RemovePersonalAccessToken.
func (m management) removePAT(caller user, r *http.Request) (any, error) {
	if err := caller.mayManage(r.PathValue("id")); err != nil {
		return nil, err
	}
	return map[string]string{"deletionDate": m.now()}, m.users.deletePAT(r.PathValue("id"), r.PathValue("pat"))
}

// search are the fields of ListKeys and ListPersonalAccessTokens.
type search struct {
	Pagination struct {
		Offset protoUint `json:"offset"`
		Limit  protoUint `json:"limit"`
		Asc    bool      `json:"asc"`
	} `json:"pagination"`
	SortingColumn string                           `json:"sortingColumn"`
	Filters       []map[string]struct{ ID string } `json:"filters"`
}

// limit is the size of a page.
func (s search) limit() uint64 { return cmp.Or(uint64(s.Pagination.Limit), defaultLimit) }

// check refuses what ZITADEL refuses, and what this program does not implement: a wrong list would be worse.
func (s search) check() error {
	if s.limit() > maxLimit {
		return errLimit
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

// page returns the requested part of the rows.
func (s search) page(rows []row) []row {
	slices.SortFunc(rows, func(a, b row) int {
		order := cmp.Or(a.created.Compare(b.created), cmp.Compare(a.ID, b.ID))
		if s.Pagination.Asc {
			return order
		}
		return -order
	})
	start := min(uint64(s.Pagination.Offset), uint64(len(rows)))
	return rows[start:min(start+s.limit(), uint64(len(rows)))]
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

// list is an answer of ListKeys or ListPersonalAccessTokens. Like all JSON of ZITADEL's API, it has no field with
// an empty value.
type list struct {
	Pagination struct {
		TotalResult  uint64 `json:"totalResult,string,omitempty"`
		AppliedLimit uint64 `json:"appliedLimit,string"`
	} `json:"pagination"`
	Result []row `json:"result,omitempty"`
}

func (m management) listKeys(caller user, r *http.Request) (any, error) {
	return m.list(caller, r, func(u user) (rows []row) {
		for id, key := range u.keys {
			rows = append(rows, u.row(id, key.dates))
		}
		return rows
	})
}

func (m management) listPATs(caller user, r *http.Request) (any, error) {
	return m.list(caller, r, func(u user) (rows []row) {
		for id, pat := range u.pats {
			rows = append(rows, u.row(id, pat))
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
	if err := caller.mayManage(caller.id); err != nil {
		return nil, err
	}
	var rows []row
	for _, u := range m.users.projectedUsers() {
		if in.matches(u.id) {
			rows = append(rows, of(u)...)
		}
	}
	var answer list
	answer.Pagination.AppliedLimit = in.limit()
	page := in.page(rows)
	if len(page) > 0 { // the database counts in the rows of the page
		answer.Pagination.TotalResult = uint64(len(rows))
	}
	answer.Result = slices.DeleteFunc(page, func(r row) bool { return !caller.Administrator && r.UserID != caller.id })
	return answer, nil
}

// protoUint is an unsigned integer of a protobuf message: in JSON a number or a string
// (https://protobuf.dev/programming-guides/json/).
type protoUint uint64

func (n *protoUint) UnmarshalJSON(text []byte) error {
	if string(text) == "null" {
		return nil
	}
	parsed, err := strconv.ParseUint(strings.Trim(string(text), `"`), 10, 64)
	if err != nil {
		return fmt.Errorf("proto: invalid value for an unsigned field: %s", text)
	}
	*n = protoUint(parsed)
	return nil
}

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
