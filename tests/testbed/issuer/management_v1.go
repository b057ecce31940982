package main

import (
	"cmp"
	"errors"
	"net/http"
)

// management v1, which is deprecated in ZITADEL 4, and all that ZITADEL 3 has. All methods need a permission in the
// organization of the request, also on the caller itself.

// instanceV1 is GetMyInstance of the admin API.
func (m management) instanceV1(caller user, _ *http.Request) (any, error) {
	if err := m.users.permit(caller.id, instanceRead, "", ""); err != nil {
		return nil, err
	}
	version := "v4-stand-in"
	if !m.users.settings().UserV2 {
		version = "v3-stand-in"
	}
	return map[string]any{"instance": map[string]string{"version": version}}, nil
}

// inOrganization wraps a method that needs a permission in the organization of the request: that of the header, or the
// caller's own.
func (m management) inOrganization(permission string, handle func(*http.Request) (any, error)) method {
	return func(caller user, r *http.Request) (any, error) {
		if err := m.users.permit(caller.id, permission, organizationOf(caller, r), ""); err != nil {
			return nil, err
		}
		return handle(r)
	}
}

func organizationOf(caller user, r *http.Request) string {
	return cmp.Or(r.Header.Get("x-zitadel-orgid"), caller.organizationID)
}

func (m management) createUserV1(caller user, r *http.Request) (any, error) {
	var in struct {
		machine
		UserName string `json:"userName"`
	}
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	if in.Name == "" {
		return nil, errors.New("invalid AddMachineUserRequest.Name: value length must be between 1 and 200 runes, inclusive")
	}
	organizationID := organizationOf(caller, r)
	if err := m.users.permit(caller.id, userWrite, organizationID, ""); err != nil {
		return nil, err
	}
	made, err := m.users.createUser(user{userSettings: in.settings(in.UserName), organizationID: organizationID})
	return map[string]string{"userId": made.id}, err
}

// updateUserV1 replaces the fields of a service user. A call that changes nothing fails.
func (m management) updateUserV1(r *http.Request) (any, error) {
	var in machine
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	before, err := m.users.user(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	changed, err := m.change(before, func(s *userSettings) {
		s.Name, s.Description, s.TokenType = in.Name, in.Description, cmp.Or(in.tokenType(), tokenTypeBearer)
	})
	if err == nil && changed.sequence == before.sequence {
		err = withID(codeFailed, "COMMAND-2n8vs", "Errors.User.NotChanged")
	}
	return struct{}{}, err
}

// setStateV1 changes the state of a user.
func (m management) setStateV1(state string) func(*http.Request) (any, error) {
	return func(r *http.Request) (any, error) {
		u, err := m.users.user(r.PathValue("id"))
		if err != nil {
			return nil, err
		}
		u, err = m.change(u, func(s *userSettings) { s.State = state })
		return map[string]details{"details": u.details()}, err
	}
}

func (m management) deleteUserV1(r *http.Request) (any, error) {
	u, err := m.users.user(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	return map[string]details{"details": u.details()}, m.users.deleteUser(u.id)
}

// addKeyV1 is AddMachineKey. Its expiration date is optional.
func (m management) addKeyV1(r *http.Request) (any, error) {
	var in struct {
		keyRequest
		Type string `json:"type"`
	}
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	if in.Type != "KEY_TYPE_JSON" {
		return nil, errors.New("invalid AddMachineKeyRequest.Type: value must not be in list [0]")
	}
	if err := in.check(m.users.settings().now()); err != nil {
		return nil, err
	}
	made, err := m.createKey(r.PathValue("id"), in.keyRequest)
	if err != nil {
		return nil, err
	}
	return struct {
		KeyID      string `json:"keyId"`
		KeyDetails []byte `json:"keyDetails,omitempty"`
	}{made.KeyID, made.content()}, nil
}

func (m management) removeKey(r *http.Request) (any, error) {
	return map[string]string{"deletionDate": m.now()}, m.users.deleteKey(r.PathValue("id"), r.PathValue("key"))
}
