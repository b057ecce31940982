package main

import (
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
	// Delay until the token endpoint and the lists of keys and tokens see a change of a user.
	ProjectionLagMillis int64 `json:"projectionLagMillis"`
	// ZITADEL 3 has no user v2.
	UserV2 bool `json:"userV2"`
}

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

const stateActive = "active"

// userSettings are the fields of a user that can be changed.
type userSettings struct {
	Username        string `json:"username"`
	State           string `json:"state"`
	TokenType       string `json:"tokenType"`
	LifetimeSeconds int64  `json:"lifetimeSeconds"` // 0: the value in settings
	Administrator   bool   `json:"administrator"`   // can manage other users
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
}

// directory is the state of the stand-in, safe for concurrent use. Users are never changed in place, so
// a reader can keep a value.
type directory struct {
	mu       sync.Mutex
	current  settings
	users    map[string]user
	versions map[string][]version // by user id; the last one is also in users
	changed  time.Time            // time of the last change of a user
	apps     map[string]app
	sessions map[string]session // by access token
	issued   int
	lastID   int64
}

func newDirectory(s settings) *directory {
	return &directory{
		current:  s,
		users:    map[string]user{},
		versions: map[string][]version{},
		apps:     map[string]app{},
		sessions: map[string]session{},
		lastID:   401085850000000000,
	}
}

var (
	errNoUser  = errors.New("user not found")
	errNoKey   = errors.New("the user has no such key")
	errNoPAT   = errors.New("the user has no such personal access token")
	errTaken   = errors.New("a user with this id or username already exists")
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

// projected returns the user as the token endpoint sees it. ZITADEL reads a projection that lags
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

// projectedUsers returns all users as the lists of keys and tokens see them, with the same lag.
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

// settlesIn returns the time until the token endpoint sees all changes made so far.
func (d *directory) settlesIn() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	return time.Until(d.changed.Add(d.current.projectionLag()))
}

func (d *directory) addUser(u user) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, found := d.users[u.id]; found || d.hasUsername(u.Username) {
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

func (d *directory) changeUser(id string, changed userSettings) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	u, err := d.find(id)
	if err != nil {
		return err
	}
	if changed.Username != u.Username && d.hasUsername(changed.Username) {
		return errTaken
	}
	u.userSettings = changed
	d.put(id, &u)
	if u.State != stateActive {
		d.endSessions(id)
	}
	return nil
}

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

func (d *directory) addPAT(userID, id string, pat dates) error {
	return d.edit(userID, func(u *user) error {
		u.pats[id] = pat
		return nil
	})
}

func (d *directory) deletePAT(userID, id string) error {
	return d.edit(userID, func(u *user) error { return remove(u.pats, id, errNoPAT) })
}

// edit changes the keys and tokens of a copy of a user, and keeps the copy unless the change fails.
func (d *directory) edit(userID string, change func(*user) error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	u, err := d.find(userID)
	if err != nil {
		return err
	}
	u.keys, u.pats = maps.Clone(u.keys), maps.Clone(u.pats)
	if err := change(&u); err != nil {
		return err
	}
	d.put(userID, &u)
	return nil
}

func remove[V any](from map[string]V, id string, absent error) error {
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
	if !found || !s.expires.After(d.current.now()) {
		return session{}, errNotLive
	}
	return s, nil
}

// isFor reports whether a project is in the audience of the token.
func (s session) isFor(projectID string) bool { return slices.Contains(s.audience, projectID) }

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
