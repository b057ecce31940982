package main

import (
	"strings"
	"testing"
)

func TestControlOfManagerRoles(t *testing.T) {
	s := startWithOrganizations(t)
	id := s.newUser(`{"username":"robot","name":"Robot"}`)
	hold := func(resource, roles string) {
		t.Helper()
		s.order("PUT", "/users/"+id+"/manager-roles", `{"resource":`+resource+`,"roles":[`+roles+`]}`, nil)
	}
	hold(onOrgA, `"ORG_OWNER"`)
	hold(onGrant, `"PROJECT_GRANT_OWNER"`)
	hold(onOrgA, `"ORG_USER_MANAGER","ORG_OWNER"`)
	s.order("PATCH", "/users/"+id+"/metadata", `{"owner":"a","gone":"b"}`, nil)
	s.order("PATCH", "/users/"+id+"/metadata", `{"gone":null}`, nil)
	got := s.must("GET", s.Control+"/users/"+id, nil, "").String()
	for _, part := range []string{
		`"username":"robot"`, `"name":"Robot"`, `"metadata":{"owner":"a"}`, `"keys":0,"pats":[]`, `"organizationId":"` + defaultOrganizationID + `"`,
		`"managerRoles":[{"resource":` + onOrgA + `,"roles":["ORG_USER_MANAGER","ORG_OWNER"]},`,
		`{"resource":{"projectGrant":{"organizationId":"` + orgB + `","projectId":"` + projectA + `"}},"roles":["PROJECT_GRANT_OWNER"]}]`,
	} {
		if !strings.Contains(got, part) {
			t.Errorf("%s\nwant %s", got, part)
		}
	}
	hold(onOrgA, ``)
	var all struct{ Users []shownUser }
	if s.order("GET", "/users", "", &all); len(all.Users) != 1 || len(all.Users[0].ManagerRoles) != 1 {
		t.Errorf("%+v", all)
	}
}

func TestControlRefusesInvalidRoles(t *testing.T) {
	s := startWithOrganizations(t)
	id := s.newUser(`{}`)
	for _, row := range []struct {
		method, path, body string
		status             int
	}{
		{"PUT", "/users/" + id + "/manager-roles", `{"resource":{"instance":true},"roles":["IAM_KING"]}`, 400},
		{"PUT", "/users/" + id + "/manager-roles", `{"resource":{"organizationId":"1"},"roles":["ORG_OWNER"]}`, 404},
		{"PUT", "/users/1/manager-roles", `{"resource":{"instance":true},"roles":["IAM_OWNER"]}`, 404},
		{"POST", "/users", `{"managerRoles":[{"resource":{"projectId":"1"},"roles":["PROJECT_OWNER"]}]}`, 404},
		{"POST", "/users", `{"managerRoles":[{"resource":{},"roles":["PROJECT_OWNER"]}]}`, 400},
		{"GET", "/users/1", ``, 404},
		{"POST", "/users/1/pats", `{}`, 404},
		{"DELETE", "/users/" + id + "/pats/1", ``, 404},
		{"PATCH", "/users/" + id + "/metadata", `{"k":null}`, 404},
		{"PATCH", "/users/1/metadata", `{"k":"v"}`, 404},
		{"POST", "/organizations", `{"id":"` + orgA + `"}`, 409},
		{"POST", "/projects", `{"id":"` + projectA + `"}`, 409},
		{"POST", "/projects", `{"organizationId":"1"}`, 404},
		{"POST", "/projects/1/grants", `{"organizationId":"` + orgB + `"}`, 404},
		{"POST", "/projects/" + projectA + "/grants", `{"organizationId":"` + orgB + `"}`, 409},
		{"DELETE", "/projects/1", ``, 404},
		{"DELETE", "/projects/" + projectA + "/grants/1", ``, 404},
	} {
		if got := s.must(row.method, s.Control+row.path, nil, row.body); got.status != row.status {
			t.Errorf("%s %s %s: %s", row.method, row.path, row.body, got)
		}
	}
}
