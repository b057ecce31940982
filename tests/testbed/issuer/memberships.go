package main

import (
	"errors"
	"slices"
	"strings"
	"time"
)

// resource is what a manager role is for: the instance, an organization, a project, or the grant of a project to an
// organization. A grant has both ids.
type resource struct {
	organizationID string
	projectID      string
}

var instanceResource = resource{}

// membership holds the manager roles of a user for one resource. ZITADEL's events keep the date of a removal, so
// a removed membership stays with its date (docs/reference/zitadel-protocol.md#manager-roles).
type membership struct {
	roles   []string
	created time.Time
	changed time.Time
	removed time.Time // zero while the user is a member
}

func (m membership) exists() bool { return len(m.roles) > 0 }

var (
	errMember    = errors.New("the user is already a member")
	errNotMember = errors.New("the user is not a member")
)

// addMember gives a user roles for a resource for which it has none.
func (d *directory) addMember(userID string, of resource, roles []string) (made membership, err error) {
	err = d.edit(userID, func(u *user) error {
		if u.memberships[of].exists() {
			return errMember
		}
		now := d.now()
		made = membership{roles: slices.Clone(roles), created: now, changed: now}
		u.memberships[of] = made
		return nil
	})
	return made, err
}

// changeMember replaces the roles of a member. ZITADEL compares them with their order. Without a difference, nothing
// happens and the date stays.
func (d *directory) changeMember(userID string, of resource, roles []string) (changed membership, err error) {
	err = d.edit(userID, func(u *user) error {
		changed = u.memberships[of]
		if !changed.exists() {
			return errNotMember
		}
		if !slices.Equal(changed.roles, roles) {
			changed.roles, changed.changed = slices.Clone(roles), d.now()
			u.memberships[of] = changed
		}
		return nil
	})
	return changed, err
}

// removeMember removes all roles of a user for a resource. It returns the date of this removal, or of an earlier
// one, or zero if the user never was a member.
func (d *directory) removeMember(userID string, of resource) (removed time.Time, err error) {
	err = d.edit(userID, func(u *user) error {
		member, found := u.memberships[of]
		if found && member.exists() {
			member = membership{removed: d.now()}
			u.memberships[of] = member
		}
		removed = member.removed
		return nil
	})
	return removed, err
}

// removeMembersOf removes all members of a resource that ceases to exist. It requires the lock.
func (d *directory) removeMembersOf(gone func(resource) bool) {
	for id, u := range d.users {
		kept := map[resource]membership{}
		for of, member := range u.memberships {
			if !gone(of) {
				kept[of] = member
			}
		}
		if len(kept) < len(u.memberships) {
			u.memberships = kept
			d.put(id, &u)
		}
	}
}

// invalidRoles reports whether a role does not exist or belongs to another kind of resource. ZITADEL decides by the
// prefix, so PROJECT_GRANT_OWNER is also a role of projects (docs/reference/zitadel-protocol.md#manager-roles).
func invalidRoles(roles []string, prefix string) bool {
	return slices.ContainsFunc(roles, func(role string) bool {
		_, found := permissionsOf[role]
		return !found || !strings.HasPrefix(role, prefix)
	})
}
