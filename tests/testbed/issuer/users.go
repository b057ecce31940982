package main

import (
	"cmp"
	"context"
	"crypto"
	"errors"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// The two answers of ZITADEL versions to a rejected assertion
// (docs/reference/zitadel-protocol.md#errors-of-the-token-endpoint).
const (
	dialectInvalidGrant   = "invalid_grant"
	dialectErrorsInternal = "errors_internal"
)

// settings can be changed at run time.
type settings struct {
	Dialect           string `json:"dialect"`
	ZitadelProjectID  string `json:"zitadelProjectId"`
	LifetimeSeconds   int64  `json:"lifetimeSeconds"`
	ClockOffsetMillis int64  `json:"clockOffsetMillis"`
	ExternalDomain    string `json:"externalDomain"`
	ExternalSecure    bool   `json:"externalSecure"`
	// Delay until the token endpoint, permission checks and reads of the API see a change of a user.
	ProjectionLagMillis int64 `json:"projectionLagMillis"`
	// ZITADEL 3 has no user v2, and neither internal_permission v2 nor project v2.
	UserV2 bool `json:"userV2"`
	// ZITADEL 4.0 to 4.4 have user v2, but neither internal_permission v2 nor project v2.
	InternalPermissionV2 bool `json:"internalPermissionV2"`
}

// hasUserV2 and hasInternalPermissionV2 report which services the configured version of ZITADEL has.
func (s settings) hasUserV2() bool               { return s.UserV2 }
func (s settings) hasInternalPermissionV2() bool { return s.UserV2 && s.InternalPermissionV2 }

func (s settings) projectionLag() time.Duration {
	return millis(s.ProjectionLagMillis)
}

func (s settings) clockOffset() time.Duration {
	return millis(s.ClockOffsetMillis)
}

func (s settings) now() time.Time { return time.Now().Add(s.clockOffset()) }

// Access token types (docs/reference/zitadel-protocol.md#token-formats).
const (
	tokenTypeJWT    = "JWT"
	tokenTypeBearer = "BEARER"
)

// States of a user.
const (
	stateActive   = "active"
	stateInactive = "inactive"
	stateLocked   = "locked"
)

// userSettings are the fields of a user that can be changed.
type userSettings struct {
	Username        string `json:"username"`
	State           string `json:"state"`
	TokenType       string `json:"tokenType"`
	LifetimeSeconds int64  `json:"lifetimeSeconds"` // 0: the value in settings
	Name            string `json:"name"`
	Description     string `json:"description"`
	Human           bool   `json:"human"` // a person instead of a service user
	// Refuses the user what it may do with its own keys and tokens, as a policy of the server would.
	SelfManagementRefused bool `json:"selfManagementRefused"`
}

type user struct {
	userSettings
	id             string
	organizationID string
	roles          map[string][]string // granted role keys by project id
	keys           map[string]userKey
	pats           map[string]dates // personal access tokens
	metadata       map[string]metadataValue
	memberships    map[resource]membership
	created        time.Time
	changed        time.Time // last change of userSettings
	sequence       uint64    // number of changes of userSettings
}

// version is the state of a user after a change. user is nil if the user was removed.
type version struct {
	since time.Time
	user  *user
}

// dates are those of a key or a personal access token.
type dates struct {
	created time.Time
	expires time.Time
}

// newDates rounds down to the resolution of ZITADEL's database
// (docs/reference/zitadel-protocol.md#self-management-of-keys).
func newDates(created, expires time.Time) dates {
	return dates{created.Truncate(time.Microsecond), expires.UTC().Truncate(time.Microsecond)}
}

type userKey struct {
	dates
	public crypto.PublicKey
}

// app is an API application: a resource server that introspects tokens.
type app struct {
	secret    string
	projectID string
}

// session is what ZITADEL stores about an access token.
type session struct {
	id       string
	userID   string
	username string
	issuer   string
	scopes   []string
	audience []string
	issued   time.Time
	expires  time.Time
	personal bool // a personal access token, not one of the token endpoint
}

// directory is the state of the stand-in, safe for concurrent use. Users are never changed in place, so
// a reader can keep a value.
type directory struct {
	mu            sync.Mutex
	current       settings
	users         map[string]user
	versions      map[string][]version // by user id; the last one is also in users
	changed       time.Time            // time of the last change of a user
	organizations map[string]owner
	projects      map[string]project
	grants        map[resource]projectGrant
	apps          map[string]app
	sessions      map[string]session // by access token
	patOwners     map[string]patOwner
	issued        int
	lastID        int64
}

func newDirectory(s settings) *directory {
	return &directory{
		current:       s,
		users:         map[string]user{},
		versions:      map[string][]version{},
		organizations: map[string]owner{defaultOrganizationID: {defaultOrganizationID, defaultOrganizationName, s.now()}},
		projects:      map[string]project{},
		grants:        map[resource]projectGrant{},
		apps:          map[string]app{},
		sessions:      map[string]session{},
		patOwners:     map[string]patOwner{},
		lastID:        401085850000000000,
	}
}

var (
	errNoUser  = errors.New("user not found")
	errNoKey   = errors.New("the user has no such key")
	errNoPAT   = errors.New("the user has no such personal access token")
	errTaken   = errors.New("a user with this username already exists")
	errIDTaken = errors.New("a user with this id already exists")
	errNotLive = errors.New("the access token is unknown, expired or revoked")
)

func (d *directory) settings() settings {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.current
}

func (d *directory) setSettings(s settings) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.current = s
}

// newID returns an id in the form of ZITADEL's ids.
func (d *directory) newID() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lastID += 65537
	return strconv.FormatInt(d.lastID, 10)
}

func (d *directory) user(id string) (user, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.find(id)
}

// find requires the lock.
func (d *directory) find(id string) (user, error) {
	u, found := d.users[id]
	if !found {
		return user{}, errNoUser
	}
	return u, nil
}

// put requires the lock.
func (d *directory) put(id string, u *user) {
	if u == nil {
		delete(d.users, id)
	} else {
		d.users[id] = *u
	}
	d.changed = time.Now()
	d.versions[id] = append(d.versions[id], version{d.changed, u})
}

// projected returns the user as the token endpoint and reads of the API see it. ZITADEL reads a projection that lags
// behind (docs/reference/zitadel-protocol.md#eventual-consistency).
func (d *directory) projected(id string) (user, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.findProjected(id)
}

// findProjected requires the lock.
func (d *directory) findProjected(id string) (user, error) {
	visible := time.Now().Add(-d.current.projectionLag())
	versions := d.versions[id]
	for len(versions) > 1 && !versions[1].since.After(visible) {
		versions = versions[1:]
	}
	d.versions[id] = versions
	if len(versions) == 0 || versions[0].user == nil || versions[0].since.After(visible) {
		return user{}, errNoUser
	}
	return *versions[0].user, nil
}

// projectedUsers returns all users as the lists of the API see them, with the same lag.
func (d *directory) projectedUsers() []user {
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []user
	for id := range d.versions {
		if u, err := d.findProjected(id); err == nil {
			all = append(all, u)
		}
	}
	return all
}

// currentUsers returns all users without lag, the oldest first.
func (d *directory) currentUsers() []user {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.SortedFunc(maps.Values(d.users), func(a, b user) int {
		return cmp.Or(a.created.Compare(b.created), cmp.Compare(a.id, b.id))
	})
}

// settlesIn returns the time until all readers see all changes made so far.
func (d *directory) settlesIn() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	return time.Until(d.changed.Add(d.current.projectionLag()))
}

func (d *directory) addUser(u user) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, found := d.users[u.id]; found {
		return errIDTaken
	}
	if d.hasUsername(u.Username) {
		return errTaken
	}
	d.put(u.id, &u)
	return nil
}

// hasUsername requires the lock.
func (d *directory) hasUsername(name string) bool {
	for _, u := range d.users {
		if u.Username == name {
			return true
		}
	}
	return false
}

// changeUser changes the settings of a user. A change to the same values is none, and keeps the date of the last one.
func (d *directory) changeUser(id string, changed userSettings) (user, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	u, err := d.find(id)
	if err != nil {
		return user{}, err
	}
	if changed.Username != u.Username && d.hasUsername(changed.Username) {
		return user{}, errTaken
	}
	if changed == u.userSettings {
		return u, nil
	}
	u.userSettings = changed
	u.changed = d.now()
	u.sequence++
	d.put(id, &u)
	if u.State != stateActive {
		d.endSessions(id)
	}
	return u, nil
}

// now is the server's time with the resolution of ZITADEL's database. It requires the lock.
func (d *directory) now() time.Time { return d.current.now().Truncate(time.Microsecond) }

func (d *directory) deleteUser(id string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.find(id); err != nil {
		return err
	}
	d.put(id, nil)
	d.endSessions(id)
	return nil
}

// endSessions requires the lock. Tokens of a deactivated, locked or removed user become invalid for good,
// also after a reactivation (docs/reference/zitadel-protocol.md#revocation).
func (d *directory) endSessions(userID string) {
	maps.DeleteFunc(d.sessions, func(_ string, s session) bool { return s.userID == userID })
}

func (d *directory) addKey(userID, keyID string, key userKey) error {
	return d.edit(userID, func(u *user) error {
		u.keys[keyID] = key
		return nil
	})
}

// deleteKey removes a key. Tokens that were issued with it stay valid
// (docs/reference/zitadel-protocol.md#revocation).
func (d *directory) deleteKey(userID, keyID string) error {
	return d.edit(userID, func(u *user) error { return remove(u.keys, keyID, errNoKey) })
}

// edit changes a copy of a user, but not its settings, and keeps the copy unless the change fails.
func (d *directory) edit(userID string, change func(*user) error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	u, err := d.find(userID)
	if err != nil {
		return err
	}
	u.keys, u.pats = maps.Clone(u.keys), maps.Clone(u.pats)
	u.metadata, u.memberships = maps.Clone(u.metadata), maps.Clone(u.memberships)
	if err := change(&u); err != nil {
		return err
	}
	d.put(userID, &u)
	return nil
}

func remove[K comparable, V any](from map[K]V, id K, absent error) error {
	if _, found := from[id]; !found {
		return absent
	}
	delete(from, id)
	return nil
}

// GetKeyByIDAndClientID is the key lookup of the library's assertion verifier: by key id and user id,
// among unexpired keys (docs/reference/zitadel-protocol.md#key-lookup).
func (d *directory) GetKeyByIDAndClientID(_ context.Context, keyID, userID string) (*jose.JSONWebKey, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	u, err := d.findProjected(userID)
	if err != nil {
		return nil, err
	}
	key, found := u.keys[keyID]
	if !found || !key.expires.After(d.current.now()) {
		return nil, errNoKey
	}
	return &jose.JSONWebKey{KeyID: keyID, Use: "sig", Key: key.public}, nil
}

func (d *directory) addSession(accessToken string, s session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sessions[accessToken] = s
	d.issued++
	if d.issued%10_000 == 0 { // expired tokens must not fill the memory in a long test
		now := d.current.now()
		maps.DeleteFunc(d.sessions, func(_ string, s session) bool { return !s.expires.After(now) })
	}
}

// session returns the session of a valid access token.
func (d *directory) session(accessToken string) (session, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s, found := d.sessions[accessToken]
	if !found {
		s, found = d.personalSession(accessToken)
	}
	if !found || !s.expires.After(d.current.now()) {
		return session{}, errNotLive
	}
	return s, nil
}

// isFor reports whether a project is in the audience of the token. A personal access token is valid for all projects
// (docs/reference/zitadel-protocol.md#personal-access-tokens).
func (s session) isFor(projectID string) bool {
	return s.personal || slices.Contains(s.audience, projectID)
}

func (d *directory) addApp(clientID string, a app) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.apps[clientID] = a
}

func (d *directory) app(clientID string) (app, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	a, found := d.apps[clientID]
	return a, found
}
