package main

import (
	"strings"
	"testing"
)

// docs/reference/zitadel-protocol.md#organizations-and-projects
func TestOrganizationsAndProjects(t *testing.T) {
	s := startWithOrganizations(t)
	admin, nobody := s.caller(`{"administrator":true}`), s.caller(`{}`)
	member, granted := s.manager(onOrgA, "ORG_OWNER_VIEWER"), s.manager(onOrgB, "ORG_OWNER_VIEWER")
	const (
		orgs     = orgService + "ListOrganizations"
		projects = projectService + "ListProjects"
		grants   = projectService + "ListProjectGrants"
	)
	for _, row := range []struct {
		name   string
		caller own
		method string
		body   string
		total  string
		sees   []string // in the answer
	}{
		{"an organization", admin, orgs, `{"queries":[{"idQuery":{"id":"` + orgA + `"}}]}`, "1", []string{`"id":"` + orgA + `"`, `"name":"Acme"`, `"primaryDomain":"acme.127.0.0.1"`}},
		{"by name", admin, orgs, `{"queries":[{"nameQuery":{"name":"Big Blue"}}]}`, "1", []string{`"id":"` + orgB + `"`}},
		{"all organizations", admin, orgs, `{}`, "3", []string{orgA, orgB, defaultOrganizationID}},
		{"an unknown organization", admin, orgs, `{"queries":[{"idQuery":{"id":"1"}}]}`, "", nil},
		{"a hidden organization", nobody, orgs, `{"queries":[{"idQuery":{"id":"` + orgA + `"}}]}`, "1", nil},
		{"own organization", member, orgs, `{}`, "3", []string{orgA}},
		{"a project", admin, projects, `{"filters":[{"inProjectIdsFilter":{"ids":["` + projectA + `"]}}]}`, "1", []string{`"projectId":"` + projectA + `","organizationId":"` + orgA + `"`, `"name":"Shop"`}},
		{"by name", admin, projects, `{"filters":[{"projectNameFilter":{"projectName":"Shop"}}]}`, "1", []string{projectA}},
		{"by organization", admin, projects, `{"filters":[{"organizationIdFilter":{"organizationId":"` + orgA + `"}}]}`, "1", []string{projectA}},
		{"all projects", admin, projects, `{}`, "2", []string{projectA, "401085856582077478"}},
		{"a hidden project", nobody, projects, `{"filters":[{"inProjectIdsFilter":{"ids":["` + projectA + `"]}}]}`, "1", nil},
		{"own projects", member, projects, `{}`, "2", []string{projectA}},
		{"a grant", admin, grants, `{"filters":[{"inProjectIdsFilter":{"ids":["` + projectA + `"]}},{"grantedOrganizationIdFilter":{"id":"` + orgB + `"}}]}`, "1",
			[]string{`"organizationId":"` + orgA + `"`, `"grantedOrganizationId":"` + orgB + `","grantedOrganizationName":"Big Blue","projectId":"` + projectA + `","projectName":"Shop"`}},
		{"an unknown grant", admin, grants, `{"filters":[{"grantedOrganizationIdFilter":{"id":"` + orgA + `"}}]}`, "", nil},
		{"a grant to own organization", granted, grants, `{}`, "1", []string{projectA}},
		{"a hidden grant", nobody, grants, `{}`, "1", nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			got := s.rpc(row.caller.token, row.method, row.body)
			expect(t, got, "200")
			if total := `"totalResult":"` + row.total + `"`; strings.Contains(got.body, total) != (row.total != "") {
				t.Errorf("%s\nwant %s", got, total)
			}
			for _, part := range row.sees {
				if !strings.Contains(got.body, part) {
					t.Errorf("%s\nwant %s", got, part)
				}
			}
			if len(row.sees) == 0 && strings.Contains(got.body, "[") {
				t.Error(got)
			}
		})
	}
	expect(t, admin.call("POST", "/v2/organizations/_search", `{"queries":[{"idQuery":{"id":"`+orgA+`"}}]}`), "200")
	expect(t, s.rpc("", projects, `{}`), rpcNoToken)

	t.Run("removing a project removes its grants and members", func(t *testing.T) {
		id := s.newUser(`{"managerRoles":[{"resource":` + onProject + `,"roles":["PROJECT_OWNER"]},{"resource":` + onGrant + `,"roles":["PROJECT_GRANT_OWNER"]}]}`)
		s.order("DELETE", "/projects/"+projectA+"/grants/"+orgB, "", nil)
		var shown shownUser
		if s.order("GET", "/users/"+id, "", &shown); len(shown.ManagerRoles) != 1 {
			t.Errorf("%+v", shown)
		}
		s.order("DELETE", "/projects/"+projectA, "", nil)
		if s.order("GET", "/users/"+id, "", &shown); len(shown.ManagerRoles) != 0 {
			t.Errorf("%+v", shown)
		}
		expect(t, s.rpc(admin.token, create, grant(id, onProject, "PROJECT_OWNER")), rpcError(400, "failed_precondition", "COMMAND-EbFMN", "Project not found"))
	})
}
