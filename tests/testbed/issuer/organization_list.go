package main

import (
	"errors"
	"net/http"
	"slices"
	"time"
)

// Lists of organizations, projects and project grants, with which a client checks that they exist
// (docs/reference/zitadel-protocol.md#organizations-and-projects).

type organizationRow struct {
	ID            string  `json:"id"`
	Details       details `json:"details"`
	State         string  `json:"state"`
	Name          string  `json:"name"`
	PrimaryDomain string  `json:"primaryDomain"`

	created time.Time
}

func (r organizationRow) order() (time.Time, string) { return r.created, r.ID }

func (d *directory) organizationRows() (rows []organizationRow) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, o := range d.organizations {
		date := timestamp(o.created)
		rows = append(rows, organizationRow{id, details{1, date, id, date}, "ORGANIZATION_STATE_ACTIVE", o.name, d.primaryDomain(o.name), o.created})
	}
	return rows
}

// listOrganizations is ListOrganizations of org v2.
func (m management) listOrganizations(caller user, r *http.Request) (any, error) {
	var in struct {
		Query   paging `json:"query"`
		Queries []struct {
			IDQuery   *struct{ ID string } `json:"idQuery"`
			NameQuery *nameQuery           `json:"nameQuery"`
		} `json:"queries"`
	}
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	if err := in.Query.check(); err != nil {
		return nil, err
	}
	rows := m.users.organizationRows()
	for _, query := range in.Queries {
		switch {
		case query.IDQuery != nil:
			rows = keep(rows, func(row organizationRow) bool { return row.ID == query.IDQuery.ID })
		case query.NameQuery != nil && query.NameQuery.check() == nil:
			rows = keep(rows, func(row organizationRow) bool { return row.Name == query.NameQuery.Name })
		default:
			return nil, errors.New("the stand-in knows idQuery and nameQuery with EQUALS only")
		}
	}
	part, total := page(in.Query, rows)
	part = keep(part, func(row organizationRow) bool { return m.users.permit(caller.id, orgRead, row.ID, row.ID) == nil })
	return struct {
		Details listDetails       `json:"details"`
		Result  []organizationRow `json:"result,omitempty"`
	}{listDetails{total.TotalResult, m.now()}, part}, nil
}

type projectRow struct {
	ProjectID      string `json:"projectId"`
	OrganizationID string `json:"organizationId"`
	CreationDate   string `json:"creationDate"`
	ChangeDate     string `json:"changeDate"`
	Name           string `json:"name"`
	State          string `json:"state"`

	created time.Time
}

func (r projectRow) order() (time.Time, string) { return r.created, r.ProjectID }

func (d *directory) projectRows() (rows []projectRow) {
	d.mu.Lock()
	defer d.mu.Unlock()
	rows = append(rows, d.project(d.current.ZitadelProjectID).row())
	for _, p := range d.projects {
		rows = append(rows, p.row())
	}
	return rows
}

func (p project) row() projectRow {
	date := timestamp(p.created)
	return projectRow{p.id, p.organizationID, date, date, p.name, "PROJECT_STATE_ACTIVE", p.created}
}

// projectFilter is one condition of the two lists of project v2.
type projectFilter struct {
	InProjectIDsFilter          *struct{ IDs []string }          `json:"inProjectIdsFilter"`
	ProjectNameFilter           *nameQuery                       `json:"projectNameFilter"`
	OrganizationIDFilter        *struct{ OrganizationID string } `json:"organizationIdFilter"`
	GrantedOrganizationIDFilter *struct{ ID string }             `json:"grantedOrganizationIdFilter"`
}

// listProjects is ListProjects of project v2, without the projects that were granted to an organization.
func (m management) listProjects(caller user, r *http.Request) (any, error) {
	in, err := projectSearchOf(r)
	if err != nil {
		return nil, err
	}
	rows := m.users.projectRows()
	for _, filter := range in.Filters {
		switch {
		case filter.InProjectIDsFilter != nil:
			rows = keep(rows, func(row projectRow) bool { return slices.Contains(filter.InProjectIDsFilter.IDs, row.ProjectID) })
		case filter.ProjectNameFilter != nil && filter.ProjectNameFilter.check() == nil:
			rows = keep(rows, func(row projectRow) bool { return row.Name == filter.ProjectNameFilter.ProjectName })
		case filter.OrganizationIDFilter != nil:
			rows = keep(rows, func(row projectRow) bool { return row.OrganizationID == filter.OrganizationIDFilter.OrganizationID })
		default:
			return nil, errors.New("the stand-in knows inProjectIdsFilter, projectNameFilter with EQUALS and organizationIdFilter only")
		}
	}
	part, total := page(in.Pagination, rows)
	part = keep(part, func(row projectRow) bool {
		return m.users.permit(caller.id, projectRead, row.OrganizationID, row.ProjectID) == nil
	})
	return struct {
		Pagination pagination   `json:"pagination"`
		Projects   []projectRow `json:"projects,omitempty"`
	}{total, part}, nil
}

// projectSearch are the fields of the two lists of project v2.
type projectSearch struct {
	Pagination paging          `json:"pagination"`
	Filters    []projectFilter `json:"filters"`
}

func projectSearchOf(r *http.Request) (in projectSearch, err error) {
	if err := fields(r, &in); err != nil {
		return in, err
	}
	return in, in.Pagination.check()
}

type projectGrantRow struct {
	OrganizationID          string `json:"organizationId"`
	CreationDate            string `json:"creationDate"`
	ChangeDate              string `json:"changeDate"`
	GrantedOrganizationID   string `json:"grantedOrganizationId"`
	GrantedOrganizationName string `json:"grantedOrganizationName"`
	ProjectID               string `json:"projectId"`
	ProjectName             string `json:"projectName"`
	State                   string `json:"state"`

	id      string
	created time.Time
}

func (r projectGrantRow) order() (time.Time, string) { return r.created, r.id }

func (d *directory) projectGrantRows() (rows []projectGrantRow) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for of, grant := range d.grants {
		p, date := d.project(of.projectID), timestamp(grant.created)
		rows = append(rows, projectGrantRow{p.organizationID, date, date, of.organizationID, d.organizations[of.organizationID].name,
			p.id, p.name, "PROJECT_GRANT_STATE_ACTIVE", grant.id, grant.created})
	}
	return rows
}

// listProjectGrants is ListProjectGrants of project v2.
func (m management) listProjectGrants(caller user, r *http.Request) (any, error) {
	in, err := projectSearchOf(r)
	if err != nil {
		return nil, err
	}
	rows := m.users.projectGrantRows()
	for _, filter := range in.Filters {
		switch {
		case filter.InProjectIDsFilter != nil:
			rows = keep(rows, func(row projectGrantRow) bool { return slices.Contains(filter.InProjectIDsFilter.IDs, row.ProjectID) })
		case filter.GrantedOrganizationIDFilter != nil:
			rows = keep(rows, func(row projectGrantRow) bool {
				return row.GrantedOrganizationID == filter.GrantedOrganizationIDFilter.ID
			})
		default:
			return nil, errors.New("the stand-in knows inProjectIdsFilter and grantedOrganizationIdFilter only")
		}
	}
	part, total := page(in.Pagination, rows)
	part = keep(part, func(row projectGrantRow) bool {
		return m.users.permit(caller.id, grantRead, row.OrganizationID, row.ProjectID) == nil ||
			m.users.permit(caller.id, grantRead, row.GrantedOrganizationID, row.id) == nil
	})
	return struct {
		Pagination    pagination        `json:"pagination"`
		ProjectGrants []projectGrantRow `json:"projectGrants,omitempty"`
	}{total, part}, nil
}
