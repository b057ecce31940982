package main

import (
	"errors"
	"net/http"
	"slices"
	"time"
)

// ListAdministrators of internal_permission v2 (docs/reference/zitadel-protocol.md#manager-roles).

// administratorFilter is one condition of the list.
type administratorFilter struct {
	InUserIDsFilter    *struct{ IDs []string }   `json:"inUserIdsFilter"`
	Resource           *namedResource            `json:"resource"`
	Role               *struct{ RoleKey string } `json:"role"`
	UserOrganizationID *struct{ ID string }      `json:"userOrganizationId"`
	And                any                       `json:"and"`
	Or                 any                       `json:"or"`
	Not                any                       `json:"not"`
	CreationDate       any                       `json:"creationDate"`
	ChangeDate         any                       `json:"changeDate"`
}

func (f administratorFilter) check() error {
	switch {
	case f.Resource != nil:
		_, err := f.Resource.resource()
		return err
	case f.InUserIDsFilter != nil, f.Role != nil, f.UserOrganizationID != nil:
		return nil
	case f.And == nil && f.Or == nil && f.Not == nil && f.CreationDate == nil && f.ChangeDate == nil:
		return withID(codeInvalidArgument, "ORG-vR9nC", "List.Query.Invalid")
	}
	return errors.New("the stand-in knows inUserIdsFilter, resource, role and userOrganizationId only")
}

func (f administratorFilter) matches(row administratorRow) bool {
	switch {
	case f.Resource != nil:
		of, _ := f.Resource.resource()
		return row.of == of
	case f.InUserIDsFilter != nil:
		return slices.Contains(f.InUserIDsFilter.IDs, row.User.ID)
	case f.Role != nil:
		return slices.Contains(row.Roles, f.Role.RoleKey)
	}
	return row.User.OrganizationID == f.UserOrganizationID.ID
}

// administratorRow is a membership in the list. One of the four fields for the resource is set.
type administratorRow struct {
	CreationDate string              `json:"creationDate"`
	ChangeDate   string              `json:"changeDate"`
	User         listedUser          `json:"user"`
	Instance     bool                `json:"instance,omitempty"`
	Organization *listedOwner        `json:"organization,omitempty"`
	Project      *listedProject      `json:"project,omitempty"`
	ProjectGrant *listedProjectGrant `json:"projectGrant,omitempty"`
	Roles        []string            `json:"roles"`

	of      resource
	created time.Time
}

type listedUser struct {
	ID                 string `json:"id"`
	PreferredLoginName string `json:"preferredLoginName"`
	OrganizationID     string `json:"organizationId"`
}

type listedOwner struct {
	ID   string `json:"id"`
	Name string `json:"name"`
}

type listedProject struct {
	ID             string `json:"id"`
	Name           string `json:"name"`
	OrganizationID string `json:"organizationId"`
}

type listedProjectGrant struct {
	ID                    string `json:"id"`
	ProjectID             string `json:"projectId"`
	ProjectName           string `json:"projectName"`
	OrganizationID        string `json:"organizationId"`
	GrantedOrganizationID string `json:"grantedOrganizationId"`
}

func (r administratorRow) order() (time.Time, string) {
	return r.created, r.User.ID + " " + r.of.organizationID + " " + r.of.projectID
}

// administrators returns the memberships of all users, with projection lag.
func (d *directory) administrators() []administratorRow {
	d.mu.Lock()
	defer d.mu.Unlock()
	var rows []administratorRow
	for id := range d.versions {
		u, err := d.findProjected(id)
		if err != nil {
			continue
		}
		for of, member := range u.memberships {
			if member.exists() {
				rows = append(rows, d.administratorRow(u, of, member))
			}
		}
	}
	return rows
}

// administratorRow requires the lock.
func (d *directory) administratorRow(u user, of resource, member membership) administratorRow {
	row := administratorRow{
		CreationDate: timestamp(member.created),
		ChangeDate:   timestamp(member.changed),
		User:         listedUser{u.id, u.Username, u.organizationID},
		Roles:        member.roles,
		of:           of,
		created:      member.created,
	}
	project := d.project(of.projectID)
	switch of.level() {
	case instanceLevel:
		row.Instance = true
	case orgLevel:
		row.Organization = &listedOwner{of.organizationID, d.organizations[of.organizationID].name}
	case projectLevel:
		row.Project = &listedProject{project.id, project.name, project.organizationID}
	case grantLevel:
		row.ProjectGrant = &listedProjectGrant{d.grants[of].id, project.id, project.name, project.organizationID, of.organizationID}
	}
	return row
}

// listAdministrators is ListAdministrators. A caller always sees its own roles.
func (m management) listAdministrators(caller user, r *http.Request) (any, error) {
	var in struct {
		Pagination paging                `json:"pagination"`
		Filters    []administratorFilter `json:"filters"`
	}
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	if err := in.Pagination.check(); err != nil {
		return nil, err
	}
	rows := m.users.administrators()
	for _, filter := range in.Filters {
		if err := filter.check(); err != nil {
			return nil, err
		}
		rows = keep(rows, filter.matches)
	}
	part, total := page(in.Pagination, rows)
	part = keep(part, func(row administratorRow) bool {
		return row.User.ID == caller.id || m.mayOnMembers(caller, memberRead, row.of) == nil
	})
	return struct {
		Pagination     pagination         `json:"pagination"`
		Administrators []administratorRow `json:"administrators,omitempty"`
	}{total, part}, nil
}
