package main

import (
	"cmp"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

const defaultOrganizationID = "401085856582143014"

// noExpiry is the date of a key without an expiration date (docs/reference/zitadel-protocol.md#key-file).
var noExpiry = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)

// control serves the control port, with which a test sets up users and faults and reads recorded requests.
type control struct {
	users *directory
	keys  keyMaker
	front *front
}

func newControl(users *directory, keys keyMaker, front *front) http.Handler {
	c := &control{users: users, keys: keys, front: front}
	mux := http.NewServeMux()
	for pattern, handle := range map[string]func(*http.Request) (any, error){
		"POST /users":                                      c.addUser,
		"GET /users":                                       c.listUsers,
		"GET /users/{id}":                                  c.user,
		"PATCH /users/{id}":                                c.changeUser,
		"DELETE /users/{id}":                               c.deleteUser,
		"POST /users/{id}/keys":                            c.addKey,
		"GET /users/{id}/keys":                             c.listKeys,
		"DELETE /users/{id}/keys/{key}":                    c.deleteKey,
		"PUT /users/{id}/manager-roles":                    c.setRoles,
		"PATCH /users/{id}/metadata":                       c.changeMetadata,
		"POST /users/{id}/pats":                            c.addPAT,
		"DELETE /users/{id}/pats/{pat}":                    c.deletePAT,
		"POST /organizations":                              c.addOrganization,
		"POST /projects":                                   c.addProject,
		"DELETE /projects/{project}":                       c.deleteProject,
		"POST /projects/{project}/grants":                  c.addGrant,
		"DELETE /projects/{project}/grants/{organization}": c.deleteGrant,
		"GET /settled":                                     c.settled,
		"POST /apps":                                       c.addApp,
		"GET /settings":                                    c.settings,
		"PATCH /settings":                                  c.changeSettings,
		"GET /requests":                                    c.requests,
		"DELETE /requests":                                 c.clearRequests,
		"GET /counts":                                      c.counts,
		"POST /faults":                                     c.addFault,
		"DELETE /faults/{id}":                              c.deleteFault,
		"DELETE /faults":                                   c.clearFaults,
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			body, err := handle(r)
			switch {
			case err != nil:
				writeJSON(w, statusOf(err), map[string]string{"error": err.Error()})
			case body == nil:
				w.WriteHeader(http.StatusNoContent)
			case r.Method == http.MethodPost:
				writeJSON(w, http.StatusCreated, body)
			default:
				writeJSON(w, http.StatusOK, body)
			}
		})
	}
	return mux
}

var errNoFault = errors.New("fault not found")

func statusOf(err error) int {
	is := func(target error) bool { return errors.Is(err, target) }
	switch {
	case slices.ContainsFunc([]error{errNoUser, errNoKey, errNoPAT, errNoFault, errNoOrganization, errNoProject, errNoGrant, errNoMetadata}, is):
		return http.StatusNotFound
	case slices.ContainsFunc([]error{errTaken, errIDTaken, errOwnerTaken}, is):
		return http.StatusConflict
	}
	return http.StatusBadRequest
}

// read decodes a body strictly, so that a misspelled field is an error. An empty body means no fields.
func read(r *http.Request, into any) error {
	decoder := json.NewDecoder(r.Body)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil && err != io.EOF {
		return fmt.Errorf("the body is invalid: %w", err)
	}
	if decoder.More() {
		return errors.New("the body has more than one JSON value")
	}
	return nil
}

func (s userSettings) check() error {
	switch {
	case s.Username == "":
		return errors.New("username must not be empty")
	case !slices.Contains([]string{stateActive, stateInactive, stateLocked}, s.State):
		return errors.New("state must be active, inactive or locked")
	case s.TokenType != tokenTypeJWT && s.TokenType != tokenTypeBearer:
		return errors.New("tokenType must be JWT or BEARER")
	case s.LifetimeSeconds < 0:
		return errors.New("lifetimeSeconds must not be negative")
	}
	return nil
}

// addUser adds a user, and its organization if it does not exist. An administrator has the role IAM_OWNER.
func (c *control) addUser(r *http.Request) (any, error) {
	var in struct {
		userSettings
		ID             string              `json:"id"`
		OrganizationID string              `json:"organizationId"`
		Roles          map[string][]string `json:"roles"`
		Administrator  bool                `json:"administrator"`
		ManagerRoles   []heldRoles         `json:"managerRoles"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	held := map[resource][]string{}
	if in.Administrator {
		held[instanceResource] = []string{"IAM_OWNER"}
	}
	for _, roles := range in.ManagerRoles {
		of, err := roles.check(c.users)
		if err != nil {
			return nil, err
		}
		held[of] = roles.Roles
	}
	organizationID := cmp.Or(in.OrganizationID, defaultOrganizationID)
	if !c.users.hasOrganization(organizationID) {
		c.users.addOrganization(organizationID, defaultOrganizationName)
	}
	added, err := c.users.createUser(user{
		userSettings:   in.userSettings,
		id:             in.ID,
		organizationID: organizationID,
		roles:          in.Roles,
	})
	if err != nil {
		return nil, err
	}
	for of, roles := range held {
		if err := c.users.hold(added.id, of, roles); err != nil {
			return nil, err
		}
	}
	return map[string]string{"id": added.id, "username": added.Username, "organizationId": added.organizationID}, nil
}

// createUser adds a user to an existing organization, with defaults for missing fields.
func (d *directory) createUser(u user) (user, error) {
	if !d.hasOrganization(u.organizationID) {
		return user{}, errNoOrganization
	}
	u.id = cmp.Or(u.id, d.newID())
	u.Username = cmp.Or(u.Username, "machine-"+u.id)
	u.State = cmp.Or(u.State, stateActive)
	u.TokenType = cmp.Or(u.TokenType, tokenTypeBearer)
	u.keys, u.pats = map[string]userKey{}, map[string]dates{}
	u.metadata, u.memberships = map[string]metadataValue{}, map[resource]membership{}
	u.created = d.settings().now().Truncate(time.Microsecond)
	u.changed, u.sequence = u.created, 1
	if err := u.check(); err != nil {
		return user{}, err
	}
	return u, d.addUser(u)
}

func (c *control) changeUser(r *http.Request) (any, error) {
	u, err := c.users.user(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	changed := u.userSettings
	if err := read(r, &changed); err != nil {
		return nil, err
	}
	if err := changed.check(); err != nil {
		return nil, err
	}
	_, err = c.users.changeUser(u.id, changed)
	return changed, err
}

// settled answers once the token endpoint and the API see all earlier changes.
func (c *control) settled(r *http.Request) (any, error) {
	if !wait(r.Context(), c.users.settlesIn()) {
		return nil, r.Context().Err()
	}
	return nil, nil
}

func (c *control) deleteUser(r *http.Request) (any, error) {
	return nil, c.users.deleteUser(r.PathValue("id"))
}

// keyFile is a key file with ZITADEL's order of fields (docs/reference/zitadel-protocol.md#key-file). Key is
// empty if the caller supplied a public key
// (docs/reference/zitadel-protocol.md#public-keys-supplied-by-the-caller).
type keyFile struct {
	Type           string    `json:"type"`
	KeyID          string    `json:"keyId"`
	Key            string    `json:"key,omitempty"`
	ExpirationDate time.Time `json:"expirationDate"`
	UserID         string    `json:"userId"`

	created time.Time // not in the file
}

// content is the text of the file, or nothing if the caller has the private key.
func (f keyFile) content() []byte {
	if f.Key == "" {
		return nil
	}
	text, err := json.Marshal(f)
	if err != nil {
		panic(err) // only for a type that JSON cannot represent: a bug in this program
	}
	return text
}

func (c *control) addKey(r *http.Request) (any, error) {
	var in newKey
	if err := read(r, &in); err != nil {
		return nil, err
	}
	return c.users.createKey(c.keys, r.PathValue("id"), in)
}

// newKey are the options of a new key.
type newKey struct {
	ExpirationDate time.Time `json:"expirationDate"`
	PKCS8          bool      `json:"pkcs8"`
	PublicKey      string    `json:"publicKey"`
}

func (d *directory) createKey(keys keyMaker, userID string, in newKey) (keyFile, error) {
	if in.PKCS8 && in.PublicKey != "" {
		return keyFile{}, errors.New("pkcs8 and publicKey are mutually exclusive")
	}
	if in.ExpirationDate.IsZero() {
		in.ExpirationDate = noExpiry
	}
	public, private, err := keys.pair(in.PublicKey, in.PKCS8)
	if err != nil {
		return keyFile{}, err
	}
	kept := newDates(d.settings().now(), in.ExpirationDate)
	file := keyFile{
		Type:           "serviceaccount",
		KeyID:          d.newID(),
		Key:            private,
		ExpirationDate: in.ExpirationDate.UTC(),
		UserID:         userID,
		created:        kept.created,
	}
	return file, d.addKey(file.UserID, file.KeyID, userKey{kept, public})
}

// pair parses the given public key, or generates a key pair and returns its private key as PEM.
func (k keyMaker) pair(publicPEM string, pkcs8 bool) (crypto.PublicKey, string, error) {
	if publicPEM != "" {
		public, err := parsePublicKey(publicPEM)
		return public, "", err
	}
	private := k.take()
	block := &pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(private)}
	if pkcs8 {
		der, err := x509.MarshalPKCS8PrivateKey(private)
		if err != nil {
			return nil, "", err
		}
		block = &pem.Block{Type: "PRIVATE KEY", Bytes: der}
	}
	return private.Public(), string(pem.EncodeToMemory(block)), nil
}

func parsePublicKey(text string) (crypto.PublicKey, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, errors.New("publicKey is not PEM")
	}
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("publicKey is not in PKIX format: %w", err)
	}
	return public, nil
}

// storedKey is a key in a list of the control port.
type storedKey struct {
	ID             string `json:"id"`
	CreationDate   string `json:"creationDate"`
	ExpirationDate string `json:"expirationDate"`
	// SHA-256 of the public key in PKIX (SPKI) DER, in hexadecimal. ZITADEL's lists have no public key, so
	// a test that must know whose key an id stands for reads it here.
	SPKISHA256 string `json:"spkiSha256"`
}

// listKeys returns a user's keys without projection lag, the oldest first.
func (c *control) listKeys(r *http.Request) (any, error) {
	u, err := c.users.user(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	keys := []storedKey{}
	for id, key := range u.keys {
		der, err := x509.MarshalPKIXPublicKey(key.public)
		if err != nil {
			return nil, err
		}
		keys = append(keys, storedKey{id, timestamp(key.created), timestamp(key.expires), fmt.Sprintf("%x", sha256.Sum256(der))})
	}
	// Ids increase with time.
	slices.SortFunc(keys, func(a, b storedKey) int { return cmp.Compare(a.ID, b.ID) })
	return map[string]any{"keys": keys}, nil
}

func (c *control) deleteKey(r *http.Request) (any, error) {
	return nil, c.users.deleteKey(r.PathValue("id"), r.PathValue("key"))
}

func (c *control) addApp(r *http.Request) (any, error) {
	var in struct {
		ProjectID string `json:"projectId"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	if in.ProjectID == "" {
		return nil, errors.New("projectId must not be empty")
	}
	clientID, secret := c.users.newID(), "secret-"+c.users.newID()
	c.users.addApp(clientID, app{secret: secret, projectID: in.ProjectID})
	return map[string]string{"clientId": clientID, "clientSecret": secret}, nil
}

func (s settings) check() error {
	switch {
	case s.Dialect != dialectInvalidGrant && s.Dialect != dialectErrorsInternal:
		return errors.New("dialect must be " + dialectInvalidGrant + " or " + dialectErrorsInternal)
	case s.ZitadelProjectID == "":
		return errors.New("zitadelProjectId must not be empty")
	case s.LifetimeSeconds <= 0:
		return errors.New("lifetimeSeconds must be positive")
	case s.ExternalDomain == "" || strings.ContainsAny(s.ExternalDomain, ":/"):
		return errors.New("externalDomain must be a host name without scheme and port")
	case s.ProjectionLagMillis < 0:
		return errors.New("projectionLagMillis must not be negative")
	}
	return nil
}

func (c *control) settings(*http.Request) (any, error) { return c.users.settings(), nil }

func (c *control) changeSettings(r *http.Request) (any, error) {
	changed := c.users.settings()
	if err := read(r, &changed); err != nil {
		return nil, err
	}
	if err := changed.check(); err != nil {
		return nil, err
	}
	c.users.setSettings(changed)
	return changed, nil
}

func (c *control) requests(r *http.Request) (any, error) {
	since, err := strconv.ParseInt(cmp.Or(r.URL.Query().Get("since"), "0"), 10, 64)
	if err != nil {
		return nil, errors.New("since must be a sequence number")
	}
	requests, next := c.front.log.since(since)
	return map[string]any{"next": next, "requests": requests}, nil
}

func (c *control) clearRequests(*http.Request) (any, error) {
	c.front.log.clear()
	return nil, nil
}

func (c *control) counts(*http.Request) (any, error) { return c.front.log.counts(), nil }

func (c *control) addFault(r *http.Request) (any, error) {
	var in fault
	if err := read(r, &in); err != nil {
		return nil, err
	}
	if err := in.check(); err != nil {
		return nil, err
	}
	return map[string]int{"id": c.front.faults.add(in)}, nil
}

func (c *control) deleteFault(r *http.Request) (any, error) {
	id, err := strconv.Atoi(r.PathValue("id"))
	if err != nil || !c.front.faults.remove(id) {
		return nil, errNoFault
	}
	return nil, nil
}

func (c *control) clearFaults(*http.Request) (any, error) {
	c.front.faults.clear()
	return nil, nil
}
