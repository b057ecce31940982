package main

import (
	"cmp"
	"net/http"
)

// The part of the control port for organizations, projects and project grants.

// named are the fields of a new organization or project.
type named struct {
	ID             string `json:"id"`
	Name           string `json:"name"`
	OrganizationID string `json:"organizationId"`
}

func (c *control) addOrganization(r *http.Request) (any, error) {
	var in struct {
		ID   string `json:"id"`
		Name string `json:"name"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	made, err := c.users.addOrganization(in.ID, in.Name)
	return map[string]string{"id": made.id, "name": made.name}, err
}

func (c *control) addProject(r *http.Request) (any, error) {
	var in named
	if err := read(r, &in); err != nil {
		return nil, err
	}
	made, err := c.users.addProject(in.ID, in.Name, cmp.Or(in.OrganizationID, defaultOrganizationID))
	return named{made.id, made.name, made.organizationID}, err
}

func (c *control) deleteProject(r *http.Request) (any, error) {
	return nil, c.users.removeResource(resource{projectID: r.PathValue("project")})
}

// addGrant grants a project to an organization.
func (c *control) addGrant(r *http.Request) (any, error) {
	var in struct {
		OrganizationID string `json:"organizationId"`
	}
	if err := read(r, &in); err != nil {
		return nil, err
	}
	made, err := c.users.addGrant(r.PathValue("project"), in.OrganizationID)
	return map[string]string{"id": made.id}, err
}

func (c *control) deleteGrant(r *http.Request) (any, error) {
	return nil, c.users.removeResource(resource{r.PathValue("organization"), r.PathValue("project")})
}
