package main

import (
	"strings"
	"testing"
	"time"
)

const (
	create = adminService + "CreateAdministrator"
	update = adminService + "UpdateAdministrator"
	remov  = adminService + "DeleteAdministrator"
	listAd = adminService + "ListAdministrators"
)

// grant is the body of a request for a manager role. No roles means no field.
func grant(userID, resource string, roles ...string) string {
	body := `{"userId":"` + userID + `","resource":` + resource
	if roles != nil {
		body += `,"roles":["` + strings.Join(roles, `","`) + `"]`
	}
	return body + `}`
}

// dated reads the date in the answer to a change of a manager role, or an empty text.
func (s *stand) dated(token, method, body string) string {
	s.t.Helper()
	var said struct{ CreationDate, ChangeDate, DeletionDate string }
	decodeReply(s.t, s.rpc(token, method, body), &said)
	return said.CreationDate + said.ChangeDate + said.DeletionDate
}

// docs/reference/zitadel-protocol.md#manager-roles
func TestManagerRoleLifecycle(t *testing.T) {
	s := startWithOrganizations(t)
	admin := s.own(`{"administrator":true}`)
	for _, row := range []struct{ name, resource, first, second, taken, absent string }{
		{"instance", onInstance, "IAM_OWNER", "IAM_OWNER_VIEWER",
			rpcError(409, "already_exists", "INSTA-pFDwe", "Errors.Instance.Member.AlreadyExists"),
			rpcError(404, "not_found", "INSTANCE-D8JxR", "Errors.NotFound")},
		{"organization", onOrgA, "ORG_OWNER", "ORG_USER_MANAGER",
			rpcError(409, "already_exists", "ORG-poWwe", "Errors.Org.Member.AlreadyExists"),
			rpcError(404, "not_found", "Org-D8JxR", "Errors.NotFound")},
		{"project", onProject, "PROJECT_OWNER", "PROJECT_GRANT_OWNER",
			rpcError(409, "already_exists", "PROJECT-PtXi1", "Project member already exists"),
			rpcError(404, "not_found", "PROJECT-D8JxR", "Errors.NotFound")},
		{"project grant", onGrant, "PROJECT_GRANT_OWNER", "PROJECT_GRANT_OWNER_VIEWER",
			rpcError(404, "not_found", "PROJECT-37fug", "Errors.AlreadyExists"),
			rpcError(404, "not_found", "PROJECT-37fug", "Errors.NotFound")},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := *s
			s.t = t
			id := s.newUser(`{}`)
			expect(t, s.rpc(admin.token, update, grant(id, row.resource, row.first)), row.absent)
			expect(t, s.rpc(admin.token, remov, grant(id, row.resource)), "200 {}")

			created := s.dated(admin.token, create, grant(id, row.resource, row.first))
			expect(t, s.rpc(admin.token, create, grant(id, row.resource, row.first)), row.taken)
			expect(t, s.rpc(admin.token, create, grant(id, row.resource, row.second)), row.taken)
			if got := s.dated(admin.token, update, grant(id, row.resource, row.first)); got != created {
				t.Errorf("an unchanged role has the date %s, want %s", got, created)
			}
			both := s.dated(admin.token, update, grant(id, row.resource, row.first, row.second))
			swapped := s.dated(admin.token, update, grant(id, row.resource, row.second, row.first))
			if both == created || swapped == both {
				t.Errorf("dates of changes: %s, %s, %s", created, both, swapped)
			}
			var shown shownUser
			s.order("GET", "/users/"+id, "", &shown)
			if len(shown.ManagerRoles) != 1 || strings.Join(shown.ManagerRoles[0].Roles, " ") != row.second+" "+row.first {
				t.Errorf("%+v", shown.ManagerRoles)
			}
			deleted := s.dated(admin.token, remov, grant(id, row.resource))
			if again := s.dated(admin.token, remov, grant(id, row.resource)); deleted == "" || again != deleted {
				t.Errorf("removed at %q, then %q", deleted, again)
			}
			expect(t, s.rpc(admin.token, update, grant(id, row.resource, row.first)), row.absent)
			if again := s.dated(admin.token, create, grant(id, row.resource, row.second)); again == deleted || again == created {
				t.Errorf("created again at %s", again)
			}
		})
	}
}

// docs/reference/zitadel-protocol.md#manager-roles
func TestInvalidManagerRoles(t *testing.T) {
	s := startWithOrganizations(t)
	admin := s.caller(`{"administrator":true}`)
	id := s.newUser(`{}`)
	member := s.newUser(`{"managerRoles":[{"resource":` + onInstance + `,"roles":["IAM_OWNER"]},{"resource":` + onOrgA + `,"roles":["ORG_OWNER"]},` +
		`{"resource":` + onProject + `,"roles":["PROJECT_OWNER"]},{"resource":` + onGrant + `,"roles":["PROJECT_GRANT_OWNER"]}]}`)
	invalid := func(id, message string) string { return rpcError(400, "invalid_argument", id, message) }
	failed := func(id, message string) string { return rpcError(400, "failed_precondition", id, message) }
	plain := func(message string) string { return `400 {"code":"invalid_argument","message":"` + message + `"}` }
	const caused = ".Resource: embedded message failed validation | caused by: invalid ResourceType."

	for _, row := range []struct{ name, method, body, want string }{
		{"instance, unknown role", create, grant(id, onInstance, "IAM_KING"), invalid("INSTANCE-4m0fS", "Member is invalid")},
		{"instance, role of another level", create, grant(id, onInstance, "ORG_OWNER"), invalid("INSTANCE-4m0fS", "Member is invalid")},
		{"instance, one of two roles unknown", create, grant(id, onInstance, "IAM_OWNER", "IAM_KING"), invalid("INSTANCE-4m0fS", "Member is invalid")},
		{"organization, unknown role", create, grant(id, onOrgA, "ORG_KING"), invalid("Org-4N8es", "Errors.Org.MemberInvalid")},
		{"organization, self-management", create, grant(id, onOrgA, "SELF_MANAGEMENT_GLOBAL"), "200"},
		{"project, unknown role", create, grant(id, onProject, "PROJECT_KING"), invalid("PROJECT-3m9ds", "Project member is invalid")},
		{"grant, role of a project", create, grant(id, onGrant, "PROJECT_OWNER"), invalid("PROJECT-m9gKK", "Errors.Project.Grant.Member.Invalid")},
		{"instance, unknown role, update", update, grant(member, onInstance, "IAM_KING"), invalid("INSTANCE-3m9fs", "Member is invalid")},
		{"organization, unknown role, update", update, grant(member, onOrgA, "IAM_OWNER"), invalid("INST-m9fG8", "Errors.Org.MemberInvalid")},
		{"project, unknown role, update", update, grant(member, onProject, "ORG_OWNER"), invalid("PROJECT-3m9d", "Project member is invalid")},
		{"grant, unknown role, update", update, grant(member, onGrant, "ORG_OWNER"), invalid("PROJECT-m0sDf", "Errors.Project.Grant.Member.Invalid")},
		{"instance, no role, update", update, grant(member, onInstance), invalid("INSTANCE-LiaZi", "Member is invalid")},
		{"organization, no role, update", update, grant(member, onOrgA), invalid("Org-LiaZi", "Errors.Org.MemberInvalid")},
		{"project, no role, update", update, grant(member, onProject), invalid("PROJECT-LiaZi", "Project member is invalid")},
		{"repeated role", update, grant(member, onOrgA, "ORG_OWNER", "ORG_OWNER"), plain("invalid UpdateAdministratorRequest.Roles[1]: repeated value must contain unique items")},
		{"instance, unknown user", create, grant("1", onInstance, "IAM_OWNER"), failed("INSTA-GSXOn", "User could not be found")},
		{"organization, unknown user", create, grant("1", onOrgA, "ORG_OWNER"), failed("ORG-GoXOn", "User could not be found")},
		{"project, unknown user", create, grant("1", onProject, "PROJECT_OWNER"), failed("COMMAND-uXHNj", "User could not be found")},
		{"unknown organization", create, grant(id, `{"organizationId":"1"}`, "ORG_OWNER"), failed("COMMAND-QXPGs", "Organisation not found")},
		{"unknown project", create, grant(id, `{"projectId":"1"}`, "PROJECT_OWNER"), failed("COMMAND-EbFMN", "Project not found")},
		{"unknown grant", create, grant(id, `{"projectGrant":{"projectId":"`+projectA+`","organizationId":"1"}}`, "PROJECT_GRANT_OWNER"), rpcError(404, "not_found", "PROJECT-D8JxR", "Errors.Project.Grant.NotFound")},
		{"no resource", create, `{"userId":"1","roles":["IAM_OWNER"]}`, invalid("ADMIN-IbPp47HDP5", "Errors.Invalid.Argument")},
		{"instance false", create, grant(id, `{"instance":false}`, "IAM_OWNER"), plain("invalid CreateAdministratorRequest" + caused + "Instance: value must equal true")},
		{"empty resource", remov, grant(id, `{}`), plain("invalid DeleteAdministratorRequest" + caused + "Resource: value is required")},
		{"no user", remov, `{"resource":{"instance":true}}`, plain("invalid DeleteAdministratorRequest.UserId: value length must be between 1 and 200 runes, inclusive")},
	} {
		t.Run(row.name, func(t *testing.T) { expect(t, s.rpc(admin.token, row.method, row.body), row.want) })
	}
}

// docs/reference/zitadel-protocol.md#permissions-of-callers
func TestWhoMayGrantManagerRoles(t *testing.T) {
	s := startWithOrganizations(t)
	nobody := s.own(`{}`) // the others have a personal access token
	iamUsers := s.manager(onInstance, "IAM_USER_MANAGER")
	owner, users, elsewhere := s.manager(onOrgA, "ORG_OWNER"), s.manager(onOrgA, "ORG_USER_MANAGER"), s.manager(onOrgB, "ORG_OWNER")
	projectOwner, granted := s.manager(onProject, "PROJECT_OWNER"), s.manager(onGrant, "PROJECT_GRANT_OWNER")
	s.order("POST", "/projects", `{"id":"5","organizationId":"`+orgA+`"}`, nil)
	other := s.manager(`{"projectId":"5"}`, "PROJECT_OWNER")
	const any200 = "200"

	for _, row := range []struct {
		name                         string
		caller                       own
		instance, org, project, grnt string // answers to CreateAdministrator
	}{
		{"nobody", nobody, rpcNotAMember, rpcNotAMember, rpcNotAMember, rpcNotAMember},
		{"IAM_USER_MANAGER", iamUsers, rpcNoPermission, rpcNoPermission, rpcNoPermission, rpcNoPermission},
		{"IAM_LOGIN_CLIENT", s.manager(onInstance, "IAM_LOGIN_CLIENT"), any200, any200, any200, any200},
		{"IAM_ORG_MANAGER", s.manager(onInstance, "IAM_ORG_MANAGER"), rpcNoPermission, any200, any200, any200},
		{"IAM_OWNER_VIEWER", s.manager(onInstance, "IAM_OWNER_VIEWER"), rpcNoPermission, rpcNoPermission, rpcNoPermission, rpcNoPermission},
		{"ORG_OWNER", owner, rpcNotAMember, any200, any200, rpcNotAMember},
		{"ORG_USER_MANAGER", users, rpcNotAMember, rpcNoPermission, rpcNoPermission, rpcNotAMember},
		{"ORG_OWNER of the other organization", elsewhere, rpcNotAMember, rpcNotAMember, rpcNotAMember, any200},
		{"PROJECT_OWNER", projectOwner, rpcNotAMember, rpcNoPermission, any200, rpcNotAMember},
		{"PROJECT_OWNER of another project", other, rpcNotAMember, rpcNoPermission, rpcElsewhere, rpcNotAMember},
		{"PROJECT_GRANT_OWNER", granted, rpcNotAMember, rpcNoPermission, rpcNoPermission, any200},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := *s
			s.t = t
			id := s.newUser(`{}`)
			expect(t, s.rpc(row.caller.token, create, grant(id, onInstance, "IAM_OWNER_VIEWER")), row.instance)
			expect(t, s.rpc(row.caller.token, create, grant(id, onOrgA, "ORG_OWNER_VIEWER")), row.org)
			expect(t, s.rpc(row.caller.token, create, grant(id, onProject, "PROJECT_OWNER_VIEWER")), row.project)
			expect(t, s.rpc(row.caller.token, create, grant(id, onGrant, "PROJECT_GRANT_OWNER_VIEWER")), row.grnt)
		})
	}
	t.Run("removal", func(t *testing.T) {
		member, stranger := granted.UserID, s.newUser(`{}`)
		s.order("PUT", "/users/"+member+"/manager-roles", `{"resource":`+onOrgA+`,"roles":["ORG_OWNER"]}`, nil)
		s.order("PUT", "/users/"+member+"/manager-roles", `{"resource":`+onInstance+`,"roles":["IAM_OWNER"]}`, nil)
		expect(t, s.rpc(nobody.token, remov, grant(member, onOrgA)), rpcNotAMember)
		expect(t, s.rpc(users.token, remov, grant(member, onOrgA)), rpcNoPermission)
		expect(t, s.rpc(nobody.token, remov, grant(member, onInstance)), rpcNotAMember)
		// Without a member, only the instance checks the permission.
		for _, resource := range []string{onOrgA, onProject, onGrant} {
			expect(t, s.rpc(nobody.token, remov, grant(stranger, resource)), "200 {}")
		}
		expect(t, s.rpc(nobody.token, remov, grant(stranger, onInstance)), rpcNotAMember)
		expect(t, s.rpc(iamUsers.token, remov, grant(stranger, onInstance)), rpcNoPermission)
		// IAM_USER_MANAGER may remove members of organizations, IAM_LOGIN_CLIENT may only add them.
		expect(t, s.rpc(s.manager(onInstance, "IAM_LOGIN_CLIENT").token, remov, grant(member, onOrgA)), rpcNoPermission)
		expect(t, s.rpc(iamUsers.token, remov, grant(member, onOrgA)), "200")
	})
}

// docs/reference/zitadel-protocol.md#manager-roles
func TestListAdministrators(t *testing.T) {
	s := startWithOrganizations(t)
	admin := s.caller(`{"username":"root","administrator":true}`)
	me := s.caller(`{"username":"robot"}`)
	nobody := s.caller(`{}`)
	id := me.UserID
	dates := map[string]string{}
	for resource, role := range map[string]string{onInstance: "IAM_OWNER_VIEWER", onOrgA: "ORG_OWNER", onProject: "PROJECT_OWNER", onGrant: "PROJECT_GRANT_OWNER"} {
		dates[resource] = s.dated(admin.token, create, grant(id, resource, role))
	}
	var granted struct{ Administrators []administratorRow }
	decodeReply(t, s.rpc(admin.token, listAd, `{"filters":[{"resource":`+onGrant+`}]}`), &granted)
	if len(granted.Administrators) != 1 || granted.Administrators[0].ProjectGrant == nil {
		t.Fatalf("%+v", granted)
	}
	row := func(resource, shown, role string) string {
		return `200 {"pagination":{"totalResult":"1","appliedLimit":"100"},"administrators":[{"creationDate":"` + dates[resource] + `","changeDate":"` + dates[resource] +
			`","user":{"id":"` + id + `","preferredLoginName":"robot","organizationId":"` + defaultOrganizationID + `"},` + shown + `,"roles":["` + role + `"]}]}`
	}
	for resource, want := range map[string]string{
		onInstance: row(onInstance, `"instance":true`, "IAM_OWNER_VIEWER"),
		onOrgA:     row(onOrgA, `"organization":{"id":"`+orgA+`","name":"Acme"}`, "ORG_OWNER"),
		onProject:  row(onProject, `"project":{"id":"`+projectA+`","name":"Shop","organizationId":"`+orgA+`"}`, "PROJECT_OWNER"),
		onGrant: row(onGrant, `"projectGrant":{"id":"`+granted.Administrators[0].ProjectGrant.ID+`","projectId":"`+projectA+`","projectName":"Shop","organizationId":"`+orgA+
			`","grantedOrganizationId":"`+orgB+`"}`, "PROJECT_GRANT_OWNER"),
		onOrgB: `200 {"pagination":{"appliedLimit":"100"}}`,
	} {
		body := `{"filters":[{"resource":` + resource + `},{"inUserIdsFilter":{"ids":["` + id + `"]}}]}`
		for _, caller := range []own{admin, me} { // own roles need no permission
			expect(t, s.rpc(caller.token, listAd, body), want)
		}
	}
	for _, row := range []struct{ name, token, body, want string }{
		{"nobody", nobody.token, `{}`, `200 {"pagination":{"totalResult":"5","appliedLimit":"100"}}`},
		{"no token", "", `{}`, rpcNoToken},
		{"too many", admin.token, `{"pagination":{"limit":2000}}`, rpcError(400, "invalid_argument", "QUERY-4M0fs", "Limit exceeded")},
		{"no filter", admin.token, `{"filters":[{}]}`, rpcError(400, "invalid_argument", "ORG-vR9nC", "List.Query.Invalid")},
	} {
		t.Run(row.name, func(t *testing.T) { expect(t, s.rpc(row.token, listAd, row.body), row.want) })
	}
	t.Run("roles decide what a caller sees", func(t *testing.T) {
		for name, row := range map[string]struct {
			caller own
			sees   int // of the five, and its own role
		}{
			"IAM_OWNER_VIEWER": {s.manager(onInstance, "IAM_OWNER_VIEWER"), 5},
			"ORG_OWNER_VIEWER": {s.manager(onOrgA, "ORG_OWNER_VIEWER"), 2},
			"ORG_USER_MANAGER": {s.manager(onOrgA, "ORG_USER_MANAGER"), 0},
		} {
			var all struct{ Administrators []administratorRow }
			decodeReply(t, s.rpc(row.caller.token, listAd, `{"filters":[{"inUserIdsFilter":{"ids":["`+id+`","`+admin.UserID+`"]}}]}`), &all)
			if len(all.Administrators) != row.sees {
				t.Errorf("%s sees %d: %+v", name, len(all.Administrators), all.Administrators)
			}
		}
	})
}

// Permission checks and lists read projections. A first membership is seen at once
// (docs/reference/zitadel-protocol.md#eventual-consistency).
func TestManagerRolesLag(t *testing.T) {
	const lag = 400 * time.Millisecond
	s := startWithOrganizations(t, "--projection-lag", lag.String())
	settle := func() { s.order("GET", "/settled", "", nil) }
	ids := []string{s.newUser(`{"administrator":true}`), s.newUser(`{}`), s.newUser(`{}`)}
	keys := []credential{s.newKey(ids[0], `{}`), s.newKey(ids[1], `{}`)}
	settle()
	admin, me := s.mint(keys[0], zitadelScope).AccessToken, s.mint(keys[1], zitadelScope).AccessToken
	target := ids[2]
	shown := func() string {
		return s.rpc(admin, listAd, `{"filters":[{"inUserIdsFilter":{"ids":["`+ids[1]+`"]}}]}`).body
	}

	changed := time.Now()
	inTime := func() bool { return time.Since(changed) < lag }
	s.dated(admin, create, grant(ids[1], onOrgA, "ORG_USER_MANAGER"))
	expect(t, s.rpc(me, create, grant(target, onOrgA, "ORG_OWNER")), rpcNoPermission)
	if got := shown(); inTime() && strings.Contains(got, "ORG_USER_MANAGER") {
		t.Error("listed at once:", got)
	}
	settle()
	if got := shown(); !strings.Contains(got, "ORG_USER_MANAGER") {
		t.Error("not listed:", got)
	}

	changed = time.Now()
	s.dated(admin, update, grant(ids[1], onOrgA, "ORG_OWNER"))
	if got := s.rpc(me, create, grant(target, onOrgA, "ORG_OWNER")); inTime() {
		expect(t, got, rpcNoPermission)
	}
	settle()
	expect(t, s.rpc(me, create, grant(target, onOrgA, "ORG_OWNER")), "200")

	changed = time.Now()
	s.dated(admin, remov, grant(ids[1], onOrgA))
	if got := s.rpc(me, update, grant(target, onOrgA, "ORG_OWNER_VIEWER")); inTime() {
		expect(t, got, "200")
	}
	settle()
	expect(t, s.rpc(me, update, grant(target, onOrgA, "ORG_OWNER")), rpcNotAMember)
}
