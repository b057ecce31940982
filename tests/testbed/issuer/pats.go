package main

import (
	"crypto/rand"
	"errors"
	"net/http"
	"time"
)

// patOwner says whose personal access token a text is.
type patOwner struct{ userID, id string }

// createPAT adds a personal access token, and returns its id and its text.
func (d *directory) createPAT(userID string, pat dates) (id, token string, err error) {
	id, token = d.newID(), rand.Text()
	err = d.edit(userID, func(u *user) error {
		u.pats[id] = pat
		d.patOwners[token] = patOwner{userID, id}
		return nil
	})
	return id, token, err
}

func (d *directory) deletePAT(userID, id string) error {
	return d.edit(userID, func(u *user) error { return remove(u.pats, id, errNoPAT) })
}

// personalSession returns what a personal access token stands for while its user is active. It requires the lock.
// ZITADEL fixes the scopes when the token is created (docs/reference/zitadel-protocol.md#personal-access-tokens).
func (d *directory) personalSession(token string) (session, bool) {
	owner := d.patOwners[token]
	u := d.users[owner.userID]
	pat, found := u.pats[owner.id]
	return session{
		id:       owner.id,
		userID:   u.id,
		username: u.Username,
		scopes:   []string{"openid", "profile", scopeUserMetadata, scopeResourceOwner},
		issued:   pat.created,
		expires:  pat.expires,
		personal: true,
	}, found && u.State == stateActive
}

// addPAT is AddPersonalAccessToken.
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
	if err := m.mayManage(caller, userID); err != nil {
		return nil, err
	}
	pat := newDates(now, in.ExpirationDate)
	id, token, err := m.users.createPAT(userID, pat)
	if errors.Is(err, errNoUser) {
		err = withID(codeFailed, "COMMAND-Dggw2", "User could not be found")
	}
	return struct {
		CreationDate string `json:"creationDate"`
		TokenID      string `json:"tokenId"`
		Token        string `json:"token"`
	}{timestamp(pat.created), id, token}, err
}

// removePAT is RemovePersonalAccessToken.
func (m management) removePAT(caller user, r *http.Request) (any, error) {
	if err := m.mayManage(caller, r.PathValue("id")); err != nil {
		return nil, err
	}
	return map[string]string{"deletionDate": m.now()}, m.users.deletePAT(r.PathValue("id"), r.PathValue("pat"))
}

func (m management) listPATs(caller user, r *http.Request) (any, error) {
	return m.list(caller, r, func(u user) (rows []row) {
		for id, pat := range u.pats {
			rows = append(rows, u.row(id, pat))
		}
		return rows
	})
}
