package main

import (
	"slices"
	"strings"

	"github.com/zitadel/oidc/v3/pkg/op"
)

// ZITADEL's reserved scopes (docs/reference/zitadel-protocol.md#scopes). Scopes that end in a colon are
// prefixes.
const (
	scopeProject       = "urn:zitadel:iam:org:project:id:"
	scopeAudSuffix     = ":aud"
	scopeProjectsRoles = "urn:zitadel:iam:org:projects:roles"
	scopeProjectRole   = "urn:zitadel:iam:org:project:role:"
	scopeOrgRoles      = "urn:zitadel:iam:org:roles:id:"
	scopeOrgID         = "urn:zitadel:iam:org:id:"
	scopeOrgDomain     = "urn:zitadel:iam:org:domain:primary:"
	scopeOrgIDP        = "urn:zitadel:iam:org:idp:id:"
	scopeResourceOwner = "urn:zitadel:iam:user:resourceowner"
	scopeUserMetadata  = "urn:zitadel:iam:user:metadata"

	aliasZitadel = "zitadel"
)

// machineClient is the allow list of reserved scopes for a service user, as the library's scope filter needs
// it. The filter calls no other method of the client.
type machineClient struct {
	op.Client
	org organization
}

func (c machineClient) IsScopeAllowed(scope string) bool {
	if id, is := strings.CutPrefix(scope, scopeOrgID); is {
		return id == c.org.id // the scope of another organization is dropped silently
	}
	if domain, is := strings.CutPrefix(scope, scopeOrgDomain); is {
		return domain == c.org.primaryDomain
	}
	switch scope {
	case scopeProjectsRoles, scopeResourceOwner, scopeUserMetadata:
		return true
	}
	return slices.ContainsFunc([]string{scopeProject, scopeProjectRole, scopeOrgRoles, scopeOrgIDP},
		func(prefix string) bool { return strings.HasPrefix(scope, prefix) })
}

// audienceOf collects the project ids of the :aud scopes. The ids are not checked
// (docs/reference/zitadel-protocol.md#audience).
func audienceOf(scopes []string, zitadelProjectID string) []string {
	var audience []string
	for _, scope := range scopes {
		rest, isProject := strings.CutPrefix(scope, scopeProject)
		id, isAud := strings.CutSuffix(rest, scopeAudSuffix)
		if !isProject || !isAud {
			continue
		}
		if id == aliasZitadel {
			id = zitadelProjectID
		}
		if !slices.Contains(audience, id) {
			audience = append(audience, id)
		}
	}
	return audience
}

// claimsOf returns the claims that the scopes add
// (docs/reference/zitadel-protocol.md#claims-of-access-tokens).
func claimsOf(u user, org organization, scopes, audience []string) map[string]any {
	claims := map[string]any{}
	for _, scope := range scopes {
		if strings.HasPrefix(scope, scopeOrgID) {
			claims["urn:zitadel:iam:org:id"] = org.id
		}
		if strings.HasPrefix(scope, scopeOrgDomain) {
			claims["urn:zitadel:iam:org:domain:primary"] = org.primaryDomain
		}
		if strings.HasPrefix(scope, scopeOrgID) || scope == scopeResourceOwner {
			claims["urn:zitadel:iam:user:resourceowner:id"] = org.id
			claims["urn:zitadel:iam:user:resourceowner:name"] = org.name
			claims["urn:zitadel:iam:user:resourceowner:primary_domain"] = org.primaryDomain
		}
	}
	asked := func(role string) bool {
		return slices.Contains(scopes, scopeProjectsRoles) || slices.Contains(scopes, scopeProjectRole+role)
	}
	for _, project := range audience {
		if roles := rolesIn(u, org, project, asked); len(roles) > 0 {
			claims["urn:zitadel:iam:org:project:"+project+":roles"] = roles
		}
	}
	return claims
}

// rolesIn returns the user's roles in a project as a role claim, which maps each role to the organization
// that granted it.
func rolesIn(u user, org organization, project string, asked func(role string) bool) map[string]any {
	roles := map[string]any{}
	for _, role := range u.roles[project] {
		if asked(role) {
			roles[role] = map[string]string{org.id: org.primaryDomain}
		}
	}
	return roles
}
