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

// The two ways ZITADEL answers a rejected assertion, by version (zitadel.md §2.1).
const (
	dialectInvalidGrant   = "invalid_grant"
	dialectErrorsInternal = "errors_internal"
)

// settings can be changed while serving.
type settings struct {
	Dialect           string `json:"dialect"`
	ZitadelProjectID  string `json:"zitadelProjectId"`
	LifetimeSeconds   int64  `json:"lifetimeSeconds"`
	ClockOffsetMillis int64  `json:"clockOffsetMillis"`
	ExternalDomain    string `json:"externalDomain"`
	ExternalSecure    bool   `json:"externalSecure"`
	// How long the token endpoint does not see a change of a user.
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

// Access token kinds (zitadel.md §4.3).
const (
	tokenTypeJWT    = "JWT"
	tokenTypeBearer = "BEARER"
)

const stateActive = "active"

// userSettings is the part of a user that can be changed.
type userSettings struct {
	Username        string `json:"username"`
	State           string `json:"state"`
	TokenType       string `json:"tokenType"`
	LifetimeSeconds int64  `json:"lifetimeSeconds"` // 0: as in settings
	Administrator   bool   `json:"administrator"`   // may manage other users
}

type user struct {
	userSettings
	id             string
	organizationID string
	roles          map[string][]string // granted role keys by project id
	keys           map[string]userKey
}

// version is a user as it is since a change; nil if it was removed.
type version struct {
	since time.Time
	user  *user
}

type userKey struct {
	public  crypto.PublicKey
	expires time.Time
}

// app is an API application: a resource server that introspects tokens.
type app struct {
	secret    string
	projectID string
}

// session is what ZITADEL remembers of an access token.
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

// directory is everything the stand-in knows, safe for concurrent use. Users are never changed in
// place: a reader may keep the value it was given.
type directory struct {
	mu       sync.Mutex
	current  settings
	users    map[string]user
	versions map[string][]version // by user id, the last is in users
	changed  time.Time            // the last change of a user
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
	errNoUser  = errors.New("there is no such user")
	errNoKey   = errors.New("the user has no such key")
	errTaken   = errors.New("a user with this id or username exists")
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

// newID returns a number that looks like one of ZITADEL's ids.
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

// find needs the lock.
func (d *directory) find(id string) (user, error) {
	u, found := d.users[id]
	if !found {
		return user{}, errNoUser
	}
	return u, nil
}

// put needs the lock.
func (d *directory) put(id string, u *user) {
	if u == nil {
		delete(d.users, id)
	} else {
		d.users[id] = *u
	}
	d.changed = time.Now()
	d.versions[id] = append(d.versions[id], version{d.changed, u})
}

// projected returns the user as the token endpoint sees it: ZITADEL reads a projection, which
// lags behind.
func (d *directory) projected(id string) (user, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.findProjected(id)
}

// findProjected needs the lock.
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

// settlesIn returns how long it takes until the token endpoint sees every change so far.
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

// hasUsername needs the lock.
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

// endSessions needs the lock. The tokens of a user who was deactivated, locked or removed are dead for
// ever, also after a reactivation (zitadel.md §4.5).
func (d *directory) endSessions(userID string) {
	maps.DeleteFunc(d.sessions, func(_ string, s session) bool { return s.userID == userID })
}

func (d *directory) addKey(userID, keyID string, key userKey) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	u, err := d.find(userID)
	if err != nil {
		return err
	}
	u.keys = maps.Clone(u.keys)
	u.keys[keyID] = key
	d.put(userID, &u)
	return nil
}

// deleteKey leaves the tokens alone that were issued with the key (zitadel.md §4.5).
func (d *directory) deleteKey(userID, keyID string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	u, err := d.find(userID)
	if err != nil {
		return err
	}
	if _, found := u.keys[keyID]; !found {
		return errNoKey
	}
	u.keys = maps.Clone(u.keys)
	delete(u.keys, keyID)
	d.put(userID, &u)
	return nil
}

// GetKeyByIDAndClientID is the key lookup of the library's assertion verifier: by key id and user id,
// and only while the key is valid (zitadel.md §2, check 7).
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
	if d.issued%10_000 == 0 { // a long test must not fill the memory with dead tokens
		now := d.current.now()
		maps.DeleteFunc(d.sessions, func(_ string, s session) bool { return !s.expires.After(now) })
	}
}

// session returns what is known of an access token that is still good.
func (d *directory) session(accessToken string) (session, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s, found := d.sessions[accessToken]
	if !found || !s.expires.After(d.current.now()) {
		return session{}, errNotLive
	}
	return s, nil
}

// isFor tells whether a project is in the audience of the token.
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
