package main

import (
	"errors"
	"net/http"
	"slices"
	"time"
)

// The part of the control port for manager roles, personal access tokens and metadata, which a test changes by hand
// like an administrator in ZITADEL's console.

// heldRoles are the roles of a user for one resource.
type heldRoles struct {
	Resource namedResource `json:"resource"`
	Roles    []string      `json:"roles"`
}

// check refuses roles that ZITADEL would refuse too, so that a misspelled role is an error.
func (h heldRoles) check(d *directory) (resource, error) {
	of, err := h.Resource.resource()
	if err != nil {
		return of, err
	}
	if invalidRoles(h.Roles, of.level().prefix) {
		return of, errors.New("a role is unknown, or not one of this kind of resource")
	}
	return of, d.has(of)
}

// setRoles gives a user exactly these roles for a resource. Without roles, the user is no longer a member.
func (c *control) setRoles(r *http.Request) (any, error) {
	var in heldRoles
	if err := read(r, &in); err != nil {
		return nil, err
	}
	of, err := in.check(c.users)
	if err != nil {
		return nil, err
	}
	return nil, c.users.hold(r.PathValue("id"), of, in.Roles)
}

func (d *directory) hold(userID string, of resource, roles []string) error {
	if len(roles) == 0 {
		_, err := d.removeMember(userID, of)
		return err
	}
	_, err := d.addMember(userID, of, roles)
	if errors.Is(err, errMember) {
		_, err = d.changeMember(userID, of, roles)
	}
	return err
}

// shownRoles are the roles of a user for one resource in an answer.
type shownRoles struct {
	Resource map[string]any `json:"resource"`
	Roles    []string       `json:"roles"`
}

func (of resource) shown() map[string]any {
	switch of.level() {
	case instanceLevel:
		return map[string]any{"instance": true}
	case orgLevel:
		return map[string]any{"organizationId": of.organizationID}
	case projectLevel:
		return map[string]any{"projectId": of.projectID}
	}
	return map[string]any{"projectGrant": map[string]any{"projectId": of.projectID, "organizationId": of.organizationID}}
}

// shownUser is a user in an answer of the control port.
type shownUser struct {
	userSettings
	ID             string            `json:"id"`
	OrganizationID string            `json:"organizationId"`
	CreationDate   string            `json:"creationDate"`
	ChangeDate     string            `json:"changeDate"`
	Keys           int               `json:"keys"`
	PATs           []string          `json:"pats"`
	Metadata       map[string]string `json:"metadata"`
	ManagerRoles   []shownRoles      `json:"managerRoles"`
}

func (u user) shown() shownUser {
	shown := shownUser{
		userSettings:   u.userSettings,
		ID:             u.id,
		OrganizationID: u.organizationID,
		CreationDate:   timestamp(u.created),
		ChangeDate:     timestamp(u.changed),
		Keys:           len(u.keys),
		PATs:           []string{},
		Metadata:       map[string]string{},
		ManagerRoles:   []shownRoles{},
	}
	for id := range u.pats {
		shown.PATs = append(shown.PATs, id)
	}
	slices.Sort(shown.PATs)
	for key, value := range u.metadata {
		shown.Metadata[key] = string(value.value)
	}
	for of, member := range u.memberships {
		if member.exists() {
			shown.ManagerRoles = append(shown.ManagerRoles, shownRoles{of.shown(), member.roles})
		}
	}
	slices.SortFunc(shown.ManagerRoles, func(a, b shownRoles) int { return slices.Compare(a.Roles, b.Roles) })
	return shown
}

// user shows a user without projection lag.
func (c *control) user(r *http.Request) (any, error) {
	u, err := c.users.user(r.PathValue("id"))
	return u.shown(), err
}

// listUsers shows all users without projection lag, the oldest first.
func (c *control) listUsers(*http.Request) (any, error) {
	shown := []shownUser{}
	for _, u := range c.users.currentUsers() {
		shown = append(shown, u.shown())
	}
	return map[string]any{"users": shown}, nil
}

func (c *control) addPAT(r *http.Request) (any, error) {
	var in struct {
		ExpirationDate time.Time `json:"expirationDate"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	if in.ExpirationDate.IsZero() {
		in.ExpirationDate = noExpiry
	}
	id, token, err := c.users.createPAT(r.PathValue("id"), newDates(c.users.settings().now(), in.ExpirationDate))
	return map[string]string{"id": id, "token": token}, err
}

func (c *control) deletePAT(r *http.Request) (any, error) {
	return nil, c.users.deletePAT(r.PathValue("id"), r.PathValue("pat"))
}

// changeMetadata sets keys. A null value removes a key.
func (c *control) changeMetadata(r *http.Request) (any, error) {
	var in map[string]*string
	if err := read(r, &in); err != nil {
		return nil, err
	}
	values, removed := map[string][]byte{}, []string{}
	for key, value := range in {
		if value == nil {
			removed = append(removed, key)
		} else {
			values[key] = []byte(*value)
		}
	}
	if _, err := c.users.setMetadata(r.PathValue("id"), values); err != nil {
		return nil, err
	}
	return nil, c.users.deleteMetadata(r.PathValue("id"), removed)
}
