package main

import (
	"cmp"
	"errors"
	"strings"
	"time"
)

const defaultOrganizationName = "ZITADEL"

// owner is an organization. Organizations, projects and grants have no projection lag, because only the control port
// changes them.
type owner struct {
	id      string
	name    string
	created time.Time
}

type project struct {
	id             string
	name           string
	organizationID string
	created        time.Time
}

// projectGrant is the grant of a project to another organization.
type projectGrant struct {
	id      string
	created time.Time
}

var (
	errNoOrganization = errors.New("organization not found")
	errNoProject      = errors.New("project not found")
	errNoGrant        = errors.New("project grant not found")
	errOwnerTaken     = errors.New("an organization, project or grant with this id already exists")
)

// organization is what claims say about the organization of a user (docs/reference/zitadel-protocol.md#scopes).
type organization struct {
	id            string
	name          string
	primaryDomain string
}

func (d *directory) organizationOf(u user) organization {
	d.mu.Lock()
	defer d.mu.Unlock()
	name := d.organizations[u.organizationID].name
	return organization{id: u.organizationID, name: name, primaryDomain: d.primaryDomain(name)}
}

func (d *directory) primaryDomain(name string) string {
	return strings.ReplaceAll(strings.ToLower(name), " ", "-") + "." + d.current.ExternalDomain
}

// addOrganization adds an organization. An empty id means a new one.
func (d *directory) addOrganization(id, name string) (owner, error) {
	id = cmp.Or(id, d.newID())
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, found := d.organizations[id]; found {
		return owner{}, errOwnerTaken
	}
	made := owner{id, cmp.Or(name, "organization-"+id), d.now()}
	d.organizations[id] = made
	return made, nil
}

func (d *directory) hasOrganization(id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, found := d.organizations[id]
	return found
}

func (d *directory) addProject(id, name, organizationID string) (project, error) {
	id = cmp.Or(id, d.newID())
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.project(id).id != "" {
		return project{}, errOwnerTaken
	}
	if _, found := d.organizations[organizationID]; !found {
		return project{}, errNoOrganization
	}
	made := project{id, cmp.Or(name, "project-"+id), organizationID, d.now()}
	d.projects[id] = made
	return made, nil
}

// project returns a project, or an empty value. ZITADEL's own project always exists. It requires the lock.
func (d *directory) project(id string) project {
	if id != "" && id == d.current.ZitadelProjectID {
		return project{id, "ZITADEL", defaultOrganizationID, d.organizations[defaultOrganizationID].created}
	}
	return d.projects[id]
}

func (d *directory) addGrant(projectID, organizationID string) (projectGrant, error) {
	id := d.newID()
	d.mu.Lock()
	defer d.mu.Unlock()
	of := resource{organizationID, projectID}
	if d.project(projectID).id == "" {
		return projectGrant{}, errNoProject
	}
	if _, found := d.organizations[organizationID]; !found {
		return projectGrant{}, errNoOrganization
	}
	if _, found := d.grants[of]; found {
		return projectGrant{}, errOwnerTaken
	}
	made := projectGrant{id, d.now()}
	d.grants[of] = made
	return made, nil
}

// has returns an error if a resource does not exist.
func (d *directory) has(of resource) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, hasOrganization := d.organizations[of.organizationID]
	_, hasGrant := d.grants[of]
	switch {
	case of == instanceResource:
	case of.projectID == "" && !hasOrganization:
		return errNoOrganization
	case of.organizationID == "" && d.project(of.projectID).id == "":
		return errNoProject
	case of.projectID != "" && of.organizationID != "" && !hasGrant:
		return errNoGrant
	}
	return nil
}

// where returns the organization in which permissions for a resource are checked, and the id to which they can be
// bound. For a grant it is the organization that the project was granted to.
func (d *directory) where(of resource) (organizationID, somethingID string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case of.projectID == "":
		return of.organizationID, of.organizationID
	case of.organizationID == "":
		return d.project(of.projectID).organizationID, of.projectID
	}
	return of.organizationID, d.grants[of].id
}

// removeResource removes a project or a grant, with its members. Removing a project removes its grants.
func (d *directory) removeResource(of resource) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	gone := func(other resource) bool { return other == of }
	if of.organizationID != "" {
		if err := remove(d.grants, of, errNoGrant); err != nil {
			return err
		}
	} else {
		if err := remove(d.projects, of.projectID, errNoProject); err != nil {
			return err
		}
		gone = func(other resource) bool { return other.projectID == of.projectID }
		for grant := range d.grants {
			if gone(grant) {
				delete(d.grants, grant)
			}
		}
	}
	d.removeMembersOf(gone)
	return nil
}
