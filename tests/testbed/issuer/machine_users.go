package main

import (
	"cmp"
	"errors"
	"net/http"
	"strings"
)

// Service users in user v2 (docs/reference/zitadel-protocol.md#service-users).

// machine are the fields of a service user in both APIs.
type machine struct {
	Name            string `json:"name"`
	Description     string `json:"description"`
	AccessTokenType string `json:"accessTokenType"`
}

func (m machine) tokenType() string {
	return strings.TrimPrefix(m.AccessTokenType, "ACCESS_TOKEN_TYPE_")
}

func (m machine) settings(username string) userSettings {
	return userSettings{Username: username, Name: m.Name, Description: m.Description, TokenType: m.tokenType()}
}

// createUser is CreateUser. A request can choose the id. Metadata in the request is ignored, like an unknown field.
func (m management) createUser(caller user, r *http.Request) (any, error) {
	var in struct {
		OrganizationID string   `json:"organizationId"`
		UserID         string   `json:"userId"`
		Username       string   `json:"username"`
		Machine        *machine `json:"machine"`
	}
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	const length = ": value length must be between 1 and 200 runes, inclusive"
	switch {
	case in.OrganizationID == "":
		return nil, errors.New("invalid CreateUserRequest.OrganizationId" + length)
	case in.Machine == nil:
		return nil, errors.New("the stand-in creates service users only")
	case in.Machine.Name == "":
		return nil, errors.New("invalid CreateUserRequest.Machine: embedded message failed validation | caused by: invalid CreateUserRequest_Machine.Name" + length)
	}
	if err := m.users.permit(caller.id, userWrite, in.OrganizationID, in.UserID); err != nil {
		return nil, err
	}
	id := cmp.Or(in.UserID, m.users.newID())
	made, err := m.users.createUser(user{
		userSettings:   in.Machine.settings(cmp.Or(in.Username, id)),
		id:             id,
		organizationID: in.OrganizationID,
	})
	return struct {
		ID           string `json:"id"`
		CreationDate string `json:"creationDate"`
	}{made.id, timestamp(made.created)}, err
}

// updateUser is UpdateUser. Absent fields stay. A user may change itself.
func (m management) updateUser(caller user, r *http.Request) (any, error) {
	var in struct {
		Username *string `json:"username"`
		Machine  struct {
			Name            *string `json:"name"`
			Description     *string `json:"description"`
			AccessTokenType *string `json:"accessTokenType"`
		} `json:"machine"`
	}
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	u, err := m.users.user(r.PathValue("id"))
	if err != nil {
		return nil, withID(codeNotFound, "COMMAND-ugjs0upun6", "User could not be found")
	}
	if err := m.mayManage(caller, u.id); err != nil {
		return nil, err
	}
	u, err = m.change(u, func(s *userSettings) {
		for to, from := range map[*string]*string{&s.Username: in.Username, &s.Name: in.Machine.Name, &s.Description: in.Machine.Description} {
			if from != nil {
				*to = *from
			}
		}
		if kind := in.Machine.AccessTokenType; kind != nil {
			s.TokenType = machine{AccessTokenType: *kind}.tokenType()
		}
	})
	return map[string]string{"changeDate": timestamp(u.changed)}, err
}

// change changes the settings of a user.
func (m management) change(u user, change func(*userSettings)) (user, error) {
	changed := u.userSettings
	change(&changed)
	if err := changed.check(); err != nil {
		return user{}, err
	}
	return m.users.changeUser(u.id, changed)
}

// setState changes the state of a user. A user may not change its own.
func (m management) setState(state string) method {
	return func(caller user, r *http.Request) (any, error) {
		if err := m.mayOn(caller, userWrite, r.PathValue("id")); err != nil {
			return nil, err
		}
		return m.setStateV1(state)(r)
	}
}

// deleteUser is DeleteUser.
func (m management) deleteUser(caller user, r *http.Request) (any, error) {
	u, err := m.users.user(r.PathValue("id"))
	if err != nil {
		return nil, withID(codeNotFound, "COMMAND-bd4ir1mblj", "User could not be found")
	}
	if err := m.mayOn(caller, userDelete, u.id); err != nil {
		return nil, err
	}
	return m.deleteUserV1(r)
}
