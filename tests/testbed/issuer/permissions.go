package main

import "slices"

// The permissions that the stand-in checks.
const (
	instanceRead = "iam.read"
	orgRead      = "org.read"
	userRead     = "user.read"
	userWrite    = "user.write"
	userDelete   = "user.delete"
	projectRead  = "project.read"
	grantRead    = "project.grant.read"

	instanceMember = "iam.member"
	orgMember      = "org.member"
	projectMember  = "project.member"
	grantMember    = "project.grant.member"

	// Suffixes of the four above.
	memberRead   = ".read"
	memberWrite  = ".write"
	memberDelete = ".delete"
)

// permissionsOf maps ZITADEL's default roles to those of their permissions that the stand-in checks
// (docs/reference/zitadel-protocol.md#manager-roles).
var permissionsOf = map[string][]string{
	"SYSTEM_OWNER":           {},
	"SYSTEM_OWNER_VIEWER":    {},
	"SELF_MANAGEMENT_GLOBAL": {},

	"IAM_OWNER":                 join(reads, instanceReads, userWrites, all(instanceMember), all(orgMember), all(projectMember), all(grantMember)),
	"IAM_OWNER_VIEWER":          join(reads, instanceReads),
	"IAM_ORG_MANAGER":           join(reads, userWrites, all(orgMember), all(projectMember), all(grantMember)),
	"IAM_USER_MANAGER":          join(reads, userWrites, []string{orgMember + memberDelete}),
	"IAM_ADMIN_IMPERSONATOR":    {},
	"IAM_END_USER_IMPERSONATOR": {},
	"IAM_LOGIN_CLIENT": join(reads, instanceReads, []string{userWrite,
		instanceMember + memberWrite, orgMember + memberWrite, projectMember + memberWrite, grantMember + memberWrite}),

	"ORG_OWNER":                     join(reads, userWrites, all(orgMember), all(projectMember), all(grantMember)),
	"ORG_OWNER_VIEWER":              reads,
	"ORG_USER_MANAGER":              join(userWrites, []string{orgRead, userRead, projectRead}),
	"ORG_SETTINGS_MANAGER":          {orgRead, orgMember + memberRead},
	"ORG_USER_PERMISSION_EDITOR":    reads,
	"ORG_PROJECT_PERMISSION_EDITOR": reads,
	"ORG_PROJECT_CREATOR":           {},
	"ORG_ADMIN_IMPERSONATOR":        {},
	"ORG_END_USER_IMPERSONATOR":     {},
	"ORG_USER_SELF_MANAGER":         {},

	"PROJECT_OWNER":               join(projectReads, all(projectMember), all(grantMember), []string{userRead}),
	"PROJECT_OWNER_VIEWER":        join(projectReads, []string{userRead}),
	"PROJECT_OWNER_GLOBAL":        join(all(projectMember), []string{projectRead}),
	"PROJECT_OWNER_VIEWER_GLOBAL": projectReads,

	"PROJECT_GRANT_OWNER":        join(all(grantMember), []string{projectRead, grantRead, userRead}),
	"PROJECT_GRANT_OWNER_VIEWER": {projectRead, grantRead, grantMember + memberRead, userRead},
}

var (
	instanceReads = []string{instanceRead, instanceMember + memberRead}
	projectReads  = []string{projectRead, projectMember + memberRead, grantRead, grantMember + memberRead}
	reads         = join(projectReads, []string{orgRead, orgMember + memberRead, userRead})
	userWrites    = []string{userWrite, userDelete}
)

func all(member string) []string {
	return []string{member + memberRead, member + memberWrite, member + memberDelete}
}

func join(lists ...[]string) []string { return slices.Concat(lists...) }

var (
	// ZITADEL returns it also to hide from the caller whether something exists.
	errNoMembership = withID(codeNotFound, "AUTHZ-cdgFk", "membership not found")
	errNoPermission = withID(codeNoPermission, "AUTH-AWfge", "No matching permissions found")
	// The caller has the permission for another project only.
	errElsewhere = withID(codeNoPermission, "AUTH-Swrgg2", "No matching permissions found")
)

// permit refuses a caller without a permission for something in an organization, or in the instance if the
// organization is empty (docs/reference/zitadel-protocol.md#permissions-of-callers).
func (d *directory) permit(callerID, permission, organizationID, somethingID string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	// Permission checks read a projection. If it shows no membership, ZITADEL updates it and reads again.
	u, _ := d.findProjected(callerID)
	memberships := d.membershipsIn(u, organizationID)
	if len(memberships) == 0 {
		memberships = d.membershipsIn(d.users[callerID], organizationID)
	}
	if len(memberships) == 0 {
		return errNoMembership
	}
	refusal := errNoPermission
	for of, member := range memberships {
		if !slices.ContainsFunc(member.roles, func(role string) bool { return slices.Contains(permissionsOf[role], permission) }) {
			continue
		}
		if bound := d.boundTo(of); bound == "" || bound == somethingID {
			return nil
		}
		refusal = errElsewhere
	}
	return refusal
}

// membershipsIn returns the memberships that count in an organization: those of the instance, of the organization, of
// its projects, and of grants from and to it. It requires the lock.
func (d *directory) membershipsIn(u user, organizationID string) map[resource]membership {
	counting := map[resource]membership{}
	for of, member := range u.memberships {
		counts := of == instanceResource ||
			organizationID != "" && (of.organizationID == organizationID || d.project(of.projectID).organizationID == organizationID)
		if member.exists() && counts {
			counting[of] = member
		}
	}
	return counting
}

// boundTo returns the id to which the permissions of a membership are bound: that of the project or of the grant.
// Roles of the instance and of organizations are not bound. It requires the lock.
func (d *directory) boundTo(of resource) string {
	if of.projectID != "" && of.organizationID != "" {
		return d.grants[of].id
	}
	return of.projectID
}

// mayManage refuses a caller who may not change a user, its keys or its tokens.
func (m management) mayManage(caller user, id string) error {
	if caller.id == id && !caller.SelfManagementRefused {
		return nil
	}
	err := m.mayOn(caller, userWrite, id)
	if caller.id == id && err != nil {
		return errNoPermission
	}
	return err
}

// mayOn refuses a caller without a permission on a user. If the user does not exist, only roles of the instance count.
func (m management) mayOn(caller user, permission, id string) error {
	u, _ := m.users.user(id)
	return m.users.permit(caller.id, permission, u.organizationID, id)
}

// mayRead reports whether a caller sees a user.
func (m management) mayRead(caller user, id string) bool {
	return caller.id == id || m.mayOn(caller, userRead, id) == nil
}
