package main

import "net/http"

// addAPI adds the routes of ZITADEL's API.
func addAPI(mux *http.ServeMux, i *issuer, keys keyMaker) {
	m := management{i, keys}
	m.addManagementV1(mux)
	m.addUserV2(mux)
	m.addOrganizations(mux)
	m.addAdministrators(mux)
}

// rest adds a method with a REST address. absent is the answer of a version without it.
func (m management) rest(mux *http.ServeMux, pattern string, has func(settings) bool, absent error, handle method) {
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		if !has(m.users.settings()) {
			writeError(w, absent)
			return
		}
		caller, err := m.caller(r)
		var body any
		if err == nil {
			body, err = handle(caller, r)
		}
		if err != nil {
			writeError(w, err)
			return
		}
		writeJSON(w, http.StatusOK, body)
	})
}

func always(settings) bool { return true }

func (m management) addManagementV1(mux *http.ServeMux) {
	const users = "/management/v1/users"
	for pattern, handle := range map[string]method{
		"GET /admin/v1/instances/me":           m.instanceV1,
		"POST " + users + "/machine":           m.createUserV1,
		"PUT " + users + "/{id}/machine":       m.inOrganization(userWrite, m.updateUserV1),
		"POST " + users + "/{id}/keys":         m.inOrganization(userWrite, m.addKeyV1),
		"DELETE " + users + "/{id}/keys/{key}": m.inOrganization(userWrite, m.removeKey),
		"POST " + users + "/{id}/_deactivate":  m.inOrganization(userWrite, m.setStateV1(stateInactive)),
		"POST " + users + "/{id}/_reactivate":  m.inOrganization(userWrite, m.setStateV1(stateActive)),
		"DELETE " + users + "/{id}":            m.inOrganization(userDelete, m.deleteUserV1),
	} {
		m.rest(mux, pattern, always, nil, handle)
	}
}

// addUserV2 adds user v2. ZITADEL 3 has the methods without a version, and not over Connect.
func (m management) addUserV2(mux *http.ServeMux) {
	const users = "/v2/users"
	for _, row := range []struct {
		connect, pattern string
		since4           bool
		absent           error // of REST in ZITADEL 3
		handle           method
	}{
		{"CreateUser", "POST " + users + "/new", true, errNoMethod, m.createUser},
		{"UpdateUser", "PATCH " + users + "/{id}", true, errNoMethod, m.updateUser},
		{"GetUserByID", "GET " + users + "/{id}", false, nil, m.getUser},
		{"ListUsers", "POST " + users, false, nil, m.listUsers},
		{"DeleteUser", "DELETE " + users + "/{id}", false, nil, m.deleteUser},
		{"DeactivateUser", "POST " + users + "/{id}/deactivate", false, nil, m.setState(stateInactive)},
		{"ReactivateUser", "POST " + users + "/{id}/reactivate", false, nil, m.setState(stateActive)},
		{"LockUser", "POST " + users + "/{id}/lock", false, nil, m.setState(stateLocked)},
		{"UnlockUser", "POST " + users + "/{id}/unlock", false, nil, m.setState(stateActive)},
		{"AddKey", "POST " + users + "/{id}/keys", true, errAbsent, m.addKey},
		{"ListKeys", "POST " + users + "/keys/search", true, errAbsent, m.listKeys},
		{"RemoveKey", "DELETE " + users + "/{id}/keys/{key}", true, errAbsent, m.removeOwnKey},
		{"AddPersonalAccessToken", "POST " + users + "/{id}/pats", true, errAbsent, m.addPAT},
		{"ListPersonalAccessTokens", "POST " + users + "/pats/search", true, errAbsent, m.listPATs},
		{"RemovePersonalAccessToken", "DELETE " + users + "/{id}/pats/{pat}", true, errAbsent, m.removePAT},
		{"SetUserMetadata", "POST " + users + "/{id}/metadata", true, errAbsent, m.setMetadata},
		{"ListUserMetadata", "POST " + users + "/{id}/metadata/search", true, errAbsent, m.listMetadata},
		{"DeleteUserMetadata", "DELETE " + users + "/{id}/metadata", true, errAbsent, m.deleteMetadata},
	} {
		has := always
		if row.since4 {
			has = settings.hasUserV2
		}
		m.rest(mux, row.pattern, has, row.absent, row.handle)
		mux.HandleFunc("/zitadel.user.v2.UserService/"+row.connect, m.connect(settings.hasUserV2, row.handle))
	}
}

func (m management) addOrganizations(mux *http.ServeMux) {
	m.rest(mux, "POST /v2/organizations/_search", always, nil, m.listOrganizations)
	mux.HandleFunc("/zitadel.org.v2.OrganizationService/ListOrganizations", m.connect(settings.hasUserV2, m.listOrganizations))
	const projects = "/zitadel.project.v2.ProjectService/"
	mux.HandleFunc(projects+"ListProjects", m.connect(settings.hasInternalPermissionV2, m.listProjects))
	mux.HandleFunc(projects+"ListProjectGrants", m.connect(settings.hasInternalPermissionV2, m.listProjectGrants))
}

// addAdministrators adds internal_permission v2, which has no REST addresses.
func (m management) addAdministrators(mux *http.ServeMux) {
	for name, handle := range map[string]method{
		"CreateAdministrator": m.createAdministrator,
		"UpdateAdministrator": m.updateAdministrator,
		"DeleteAdministrator": m.deleteAdministrator,
		"ListAdministrators":  m.listAdministrators,
	} {
		mux.HandleFunc("/zitadel.internal_permission.v2.InternalPermissionService/"+name, m.connect(settings.hasInternalPermissionV2, handle))
	}
}
