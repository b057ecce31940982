package main

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
)

// CreateAdministrator, UpdateAdministrator and DeleteAdministrator of internal_permission v2
// (docs/reference/zitadel-protocol.md#manager-roles).

// level holds what differs between the kinds of resources: the prefix of the roles, the permissions and the errors.
type level struct {
	prefix string
	member string // permission without its suffix

	createEmpty, createRoles, createUser, createTaken error
	updateEmpty, updateRoles, updateAbsent            error
}

const (
	instanceInvalid = "Member is invalid"
	orgInvalid      = "Errors.Org.MemberInvalid"
	projectInvalid  = "Project member is invalid"
	grantInvalid    = "Errors.Project.Grant.Member.Invalid"
	memberAbsent    = "Errors.NotFound"
	userUnknown     = "User could not be found"
)

var (
	instanceLevel = &level{
		prefix: "IAM", member: instanceMember,
		createEmpty:  withID(codeInvalidArgument, "INSTANCE-4m0fS", instanceInvalid),
		createRoles:  withID(codeInvalidArgument, "INSTANCE-4m0fS", instanceInvalid),
		createUser:   withID(codeFailed, "INSTA-GSXOn", userUnknown),
		createTaken:  withID(codeAlreadyExists, "INSTA-pFDwe", "Errors.Instance.Member.AlreadyExists"),
		updateEmpty:  withID(codeInvalidArgument, "INSTANCE-LiaZi", instanceInvalid),
		updateRoles:  withID(codeInvalidArgument, "INSTANCE-3m9fs", instanceInvalid),
		updateAbsent: withID(codeNotFound, "INSTANCE-D8JxR", memberAbsent),
	}
	orgLevel = &level{
		prefix: "ORG", member: orgMember,
		createEmpty:  withID(codeInvalidArgument, "ORG-4Mlfs", "Errors.Invalid.Argument"),
		createRoles:  withID(codeInvalidArgument, "Org-4N8es", orgInvalid),
		createUser:   withID(codeFailed, "ORG-GoXOn", userUnknown),
		createTaken:  withID(codeAlreadyExists, "ORG-poWwe", "Errors.Org.Member.AlreadyExists"),
		updateEmpty:  withID(codeInvalidArgument, "Org-LiaZi", orgInvalid),
		updateRoles:  withID(codeInvalidArgument, "INST-m9fG8", orgInvalid),
		updateAbsent: withID(codeNotFound, "Org-D8JxR", memberAbsent),
	}
	projectLevel = &level{
		prefix: "PROJECT", member: projectMember,
		createEmpty:  withID(codeInvalidArgument, "PROJECT-W8m4l", projectInvalid),
		createRoles:  withID(codeInvalidArgument, "PROJECT-3m9ds", projectInvalid),
		createUser:   withID(codeFailed, "COMMAND-uXHNj", userUnknown),
		createTaken:  withID(codeAlreadyExists, "PROJECT-PtXi1", "Project member already exists"),
		updateEmpty:  withID(codeInvalidArgument, "PROJECT-LiaZi", projectInvalid),
		updateRoles:  withID(codeInvalidArgument, "PROJECT-3m9d", projectInvalid),
		updateAbsent: withID(codeNotFound, "PROJECT-D8JxR", memberAbsent),
	}
	grantLevel = &level{
		prefix: "PROJECT_GRANT", member: grantMember,
		createEmpty: withID(codeInvalidArgument, "PROJECT-8fi7G", grantInvalid),
		createRoles: withID(codeInvalidArgument, "PROJECT-m9gKK", grantInvalid),
		createUser:  withID(codeFailed, "COMMAND-uXHNj", userUnknown),
		// Not the kind that the text says.
		createTaken:  withID(codeNotFound, "PROJECT-37fug", "Errors.AlreadyExists"),
		updateEmpty:  withID(codeInvalidArgument, "PROJECT-109fs", grantInvalid),
		updateRoles:  withID(codeInvalidArgument, "PROJECT-m0sDf", grantInvalid),
		updateAbsent: withID(codeNotFound, "PROJECT-37fug", memberAbsent),
	}
)

func (of resource) level() *level {
	switch {
	case of == instanceResource:
		return instanceLevel
	case of.projectID == "":
		return orgLevel
	case of.organizationID == "":
		return projectLevel
	}
	return grantLevel
}

// namedResource is a resource in a request. Exactly one field is set.
type namedResource struct {
	Instance       *bool   `json:"instance"`
	OrganizationID *string `json:"organizationId"`
	ProjectID      *string `json:"projectId"`
	ProjectGrant   *struct {
		ProjectID      string `json:"projectId"`
		OrganizationID string `json:"organizationId"`
	} `json:"projectGrant"`
}

// resource returns the resource, or the error of ZITADEL's check of messages.
func (n namedResource) resource() (resource, error) {
	switch {
	case n.Instance != nil && !*n.Instance:
		return resource{}, errors.New("invalid ResourceType.Instance: value must equal true")
	case n.Instance != nil:
		return instanceResource, nil
	case n.OrganizationID != nil && *n.OrganizationID != "":
		return resource{organizationID: *n.OrganizationID}, nil
	case n.ProjectID != nil && *n.ProjectID != "":
		return resource{projectID: *n.ProjectID}, nil
	case n.ProjectGrant != nil && n.ProjectGrant.ProjectID != "" && n.ProjectGrant.OrganizationID != "":
		return resource{n.ProjectGrant.OrganizationID, n.ProjectGrant.ProjectID}, nil
	}
	return resource{}, errors.New("invalid ResourceType.Resource: value is required")
}

// administrator are the fields of the three requests. DeleteAdministrator has no roles.
type administrator struct {
	UserID   string         `json:"userId"`
	Resource *namedResource `json:"resource"`
	Roles    []string       `json:"roles"`

	of resource
}

// administratorOf reads a request. missing is the id of ZITADEL's error for an absent resource.
func administratorOf(r *http.Request, message, missing string) (in administrator, err error) {
	if err := fields(r, &in); err != nil {
		return in, err
	}
	if in.UserID == "" {
		return in, fmt.Errorf("invalid %s.UserId: value length must be between 1 and 200 runes, inclusive", message)
	}
	for at, role := range in.Roles {
		if role == "" {
			return in, fmt.Errorf("invalid %s.Roles[%d]: value length must be between 1 and 200 runes, inclusive", message, at)
		}
		if slices.Contains(in.Roles[:at], role) {
			return in, fmt.Errorf("invalid %s.Roles[%d]: repeated value must contain unique items", message, at)
		}
	}
	if in.Resource == nil {
		return in, withID(codeInvalidArgument, missing, "Errors.Invalid.Argument")
	}
	if in.of, err = in.Resource.resource(); err != nil {
		return in, fmt.Errorf("invalid %s.Resource: embedded message failed validation | caused by: %w", message, err)
	}
	return in, nil
}

// mayOnMembers refuses a caller without a permission on the members of a resource.
func (m management) mayOnMembers(caller user, suffix string, of resource) error {
	organizationID, somethingID := m.users.where(of)
	return m.users.permit(caller.id, of.level().member+suffix, organizationID, somethingID)
}

// createAdministrator is CreateAdministrator. The order of the checks differs between the kinds of resources.
func (m management) createAdministrator(caller user, r *http.Request) (any, error) {
	in, err := administratorOf(r, "CreateAdministratorRequest", "ADMIN-IbPp47HDP5")
	if err != nil {
		return nil, err
	}
	level := in.of.level()
	found := func() error { return m.users.has(in.of) }
	allowed := func() error { return m.mayOnMembers(caller, memberWrite, in.of) }
	valid := func() error {
		switch {
		case len(in.Roles) == 0:
			return level.createEmpty
		case level == orgLevel && !invalidRoles(in.Roles, "SELF_MANAGEMENT_GLOBAL"):
		case invalidRoles(in.Roles, level.prefix):
			return level.createRoles
		}
		return nil
	}
	known := func() error {
		if _, err := m.users.user(in.UserID); err != nil {
			return level.createUser
		}
		return nil
	}
	free := func() error {
		if u, _ := m.users.user(in.UserID); u.memberships[in.of].exists() {
			return level.createTaken
		}
		return nil
	}
	checks := map[string][]func() error{
		instanceLevel.prefix: {allowed, valid, known, free},
		orgLevel.prefix:      {found, allowed, valid, known, free},
		projectLevel.prefix:  {valid, known, found, allowed, free},
		grantLevel.prefix:    {valid, known, found, free, allowed},
	}
	for _, check := range checks[level.prefix] {
		if err := check(); err != nil {
			return nil, err
		}
	}
	made, err := m.users.addMember(in.UserID, in.of, in.Roles)
	if errors.Is(err, errMember) { // added since the check
		err = level.createTaken
	}
	return map[string]string{"creationDate": timestamp(made.created)}, err
}

// updateAdministrator is UpdateAdministrator. It replaces all roles.
func (m management) updateAdministrator(caller user, r *http.Request) (any, error) {
	in, err := administratorOf(r, "UpdateAdministratorRequest", "ADMIN-i0V2IbdloZ")
	if err != nil {
		return nil, err
	}
	level := in.of.level()
	if len(in.Roles) == 0 {
		return nil, level.updateEmpty
	}
	if invalidRoles(in.Roles, level.prefix) {
		return nil, level.updateRoles
	}
	if u, _ := m.users.user(in.UserID); !u.memberships[in.of].exists() {
		return nil, level.updateAbsent
	}
	if err := m.mayOnMembers(caller, memberWrite, in.of); err != nil {
		return nil, err
	}
	changed, err := m.users.changeMember(in.UserID, in.of, in.Roles)
	if err != nil { // removed since the check
		err = level.updateAbsent
	}
	return map[string]string{"changeDate": timestamp(changed.changed)}, err
}

// deleteAdministrator is DeleteAdministrator. It succeeds for a user that is not a member: with the date of an earlier
// removal, or without a date. Except for the instance, ZITADEL does not check the permission in this case.
func (m management) deleteAdministrator(caller user, r *http.Request) (any, error) {
	in, err := administratorOf(r, "DeleteAdministratorRequest", "ADMIN-3UOjLtuohh")
	if err != nil {
		return nil, err
	}
	u, _ := m.users.user(in.UserID)
	if u.memberships[in.of].exists() || in.of == instanceResource {
		if err := m.mayOnMembers(caller, memberDelete, in.of); err != nil {
			return nil, err
		}
	}
	removed, err := m.users.removeMember(in.UserID, in.of)
	if errors.Is(err, errNoUser) {
		err = nil
	}
	if removed.IsZero() {
		return struct{}{}, err
	}
	return map[string]string{"deletionDate": timestamp(removed)}, err
}
