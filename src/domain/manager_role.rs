//! Manager roles, which ZITADEL's API calls administrators (`docs/reference/zitadel-protocol.md#manager-roles`), and
//! which of them an object is to have.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::api::service_user::{ManagerRole, RoleMode, ZitadelServiceUserSpec};
use crate::domain::access::{Allowed, RoleAccess};
use crate::domain::hash;

/// What a manager role is for.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[serde(rename_all = "camelCase")]
pub enum RoleScope {
    /// The whole instance.
    Instance,
    /// The organization with this id.
    Organization(String),
    /// The project with this id.
    Project(String),
    /// The grant of a project to another organization.
    #[serde(rename_all = "camelCase")]
    ProjectGrant {
        /// The project.
        project_id: String,
        /// The organization that the project is granted to.
        organization_id: String,
    },
}

impl fmt::Display for RoleScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Instance => f.write_str("instance"),
            Self::Organization(id) => write!(f, "organization {id}"),
            Self::Project(id) => write!(f, "project {id}"),
            Self::ProjectGrant {
                project_id,
                organization_id,
            } => write!(f, "project {project_id} granted to organization {organization_id}"),
        }
    }
}

impl RoleScope {
    /// The scope of an entry in the spec. `None` if it has none or several.
    #[must_use]
    pub fn of(entry: &ManagerRole) -> Option<Self> {
        match (
            entry.instance,
            &entry.organization_id,
            &entry.project_id,
            &entry.granted_organization_id,
        ) {
            (Some(true), None, None, None) => Some(Self::Instance),
            (None, Some(id), None, None) => Some(Self::Organization(id.clone())),
            (None, None, Some(id), None) => Some(Self::Project(id.clone())),
            (None, None, Some(project_id), Some(organization_id)) => Some(Self::ProjectGrant {
                project_id: project_id.clone(),
                organization_id: organization_id.clone(),
            }),
            _ => None,
        }
    }

    /// Whether ZITADEL accepts the role at this level. Its own check also accepts roles of a grant for a project.
    #[must_use]
    pub fn fits(&self, role: &str) -> bool {
        let of_grant = role.starts_with("PROJECT_GRANT_");
        match self {
            Self::Instance => role.starts_with("IAM_"),
            Self::Organization(_) => role.starts_with("ORG_"),
            Self::Project(_) => role.starts_with("PROJECT_") && !of_grant,
            Self::ProjectGrant { .. } => of_grant,
        }
    }
}

/// The manager roles of a user in one scope.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ManagerRoles {
    /// What the roles are for.
    pub scope: RoleScope,
    /// Names of the roles.
    pub roles: BTreeSet<String>,
}

impl ManagerRoles {
    /// Each role with what it is for, as the status shows it.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.roles.iter().map(|role| format!("{}: {}", shown(role), self.scope))
    }
}

/// The roles that an object is to have in one scope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedRoles {
    /// What the roles are for.
    pub scope: RoleScope,
    /// Those that the access policies allow.
    pub roles: BTreeSet<String>,
    /// Those of `roles` that are allowed only if their holder cannot take over a user with roles of the instance.
    pub if_unprivileged: BTreeSet<String>,
    /// Roles of the spec that the access policies deny.
    pub denied: BTreeSet<String>,
    /// Whether to remove every other role. Only if none is denied: a policy that is withdrawn must not remove roles that
    /// a person granted.
    pub exclusive: bool,
}

/// The name of a role as messages show it. Names of custom roles are the server's text, so others are not quoted.
#[must_use]
pub fn shown(role: &str) -> &str {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    if (1..=64).contains(&role.len()) && role.bytes().all(plain) {
        role
    } else {
        "another role"
    }
}

/// Whether the holder of a role can act as other users of its scope: with a new key or password, by impersonation, with an
/// identity provider of its own, or, in the project of ZITADEL's own applications, by changing where their logins lead
/// (`docs/adr/0022-manager-roles-are-granted-by-a-ledger.md`).
#[must_use]
pub fn takes_over_users(scope: &RoleScope, role: &str) -> bool {
    match scope {
        RoleScope::Organization(_) => {
            matches!(role, "ORG_OWNER" | "ORG_USER_MANAGER" | "ORG_SETTINGS_MANAGER") || role.ends_with("_IMPERSONATOR")
        }
        RoleScope::Project(_) => matches!(role, "PROJECT_OWNER" | "PROJECT_OWNER_GLOBAL"),
        // Each role of the instance is privileged, and a policy has to name it.
        RoleScope::Instance | RoleScope::ProjectGrant { .. } => false,
    }
}

/// What the operator granted, as far as the policies still allow it, whatever the spec asks for.
#[must_use]
pub fn still_allowed<'a>(
    granted: impl IntoIterator<Item = (&'a RoleScope, &'a BTreeSet<String>)>,
    allowed: &Allowed,
) -> Vec<WantedRoles> {
    let entries = granted.into_iter().map(|(scope, roles)| {
        let is_denied = |role: &String| allowed.role_access(scope, role) == RoleAccess::Denied;
        let (denied, roles) = roles.iter().cloned().partition(is_denied);
        WantedRoles {
            scope: scope.clone(),
            roles,
            if_unprivileged: BTreeSet::new(),
            denied,
            exclusive: false,
        }
    });
    entries.collect()
}

/// What the spec asks for, as far as the policies allow it. Entries without a scope are left out (`validate.rs` refuses
/// them).
#[must_use]
pub fn wanted(spec: &ZitadelServiceUserSpec, allowed: &Allowed) -> Vec<WantedRoles> {
    let entries = spec.manager_roles.iter();
    let entries = entries.filter_map(|entry| {
        let scope = RoleScope::of(entry)?;
        let access = |role: &String| allowed.role_access(&scope, role);
        let (denied, roles): (BTreeSet<_>, BTreeSet<_>) = entry
            .roles
            .iter()
            .cloned()
            .partition(|role| access(role) == RoleAccess::Denied);
        let depends = |role: &&String| takes_over_users(&scope, role) && access(role) == RoleAccess::Unprivileged;
        Some(WantedRoles {
            if_unprivileged: roles.iter().filter(depends).cloned().collect(),
            exclusive: entry.mode == Some(RoleMode::Exclusive) && denied.is_empty(),
            scope,
            roles,
            denied,
        })
    });
    entries.collect()
}

/// A hash of what is to be granted, to whom and by which instance, to notice that it changed.
#[must_use]
pub fn hash(wanted: &[WantedRoles], instance: &str, user_id: &str) -> String {
    let lines = wanted.iter().map(|wanted| {
        let roles: Vec<&str> = wanted.roles.iter().map(String::as_str).collect();
        let depends: Vec<&str> = wanted.if_unprivileged.iter().map(String::as_str).collect();
        let mode = if wanted.exclusive { "only" } else { "also" };
        format!("{} {mode} {} {}", wanted.scope, roles.join(","), depends.join(","))
    });
    let mut lines: Vec<String> = lines.collect();
    lines.sort_unstable();
    hash::of(
        [instance.as_bytes(), user_id.as_bytes()]
            .into_iter()
            .chain(lines.iter().map(String::as_bytes)),
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::{Value, json};

    use super::*;

    fn spec(roles: &Value) -> ZitadelServiceUserSpec {
        serde_json::from_value(json!({
            "instanceRef": {"name": "main"}, "keySecretRef": {"name": "k"}, "tokens": [], "managerRoles": roles,
        }))
        .expect("a spec")
    }

    fn allowed(roles: &Value) -> Allowed {
        let policy = serde_json::from_value(json!({
            "instanceRef": {"name": "main"}, "namespaceSelector": {}, "managerRoles": roles,
        }))
        .expect("a policy");
        Allowed::of([&policy], &BTreeMap::new())
    }

    fn set(roles: &[&str]) -> BTreeSet<String> {
        roles.iter().map(|role| (*role).to_owned()).collect()
    }

    #[test]
    fn policies_limit_the_roles_and_the_exclusive_mode() {
        let spec = spec(&json!([
            {"instance": true, "roles": ["IAM_OWNER_VIEWER"]},
            {"organizationID": "1", "roles": ["ORG_OWNER", "ORG_OWNER_VIEWER"], "mode": "Exclusive"},
            {"organizationID": "2", "roles": ["ORG_END_USER_IMPERSONATOR", "ORG_OWNER_VIEWER"], "mode": "Exclusive"},
            {"projectID": "5", "grantedOrganizationID": "1", "roles": ["PROJECT_GRANT_OWNER"], "mode": "Merge"},
        ]));
        let allowed = allowed(&json!([
            {"roles": ["ORG_OWNER"], "organizationIDs": ["1"], "allowPrivileged": true},
            {"roles": ["ORG_END_USER_IMPERSONATOR", "ORG_OWNER_VIEWER"], "organizationIDs": ["2"]},
            {"roles": ["PROJECT_GRANT_OWNER"], "projectIDs": ["5"], "grantedOrganizationIDs": ["1"]},
        ]));
        let wanted = wanted(&spec, &allowed);
        let shown: Vec<_> = wanted
            .iter()
            .map(|w| {
                (
                    w.scope.to_string(),
                    w.roles.clone(),
                    w.if_unprivileged.clone(),
                    w.denied.clone(),
                    w.exclusive,
                )
            })
            .collect();
        let none = BTreeSet::new();
        let viewer = "ORG_OWNER_VIEWER";
        let impersonator = "ORG_END_USER_IMPERSONATOR";
        assert_eq!(
            shown,
            [
                (
                    "instance".into(),
                    none.clone(),
                    none.clone(),
                    set(&["IAM_OWNER_VIEWER"]),
                    false
                ),
                (
                    "organization 1".into(),
                    set(&["ORG_OWNER"]),
                    none.clone(),
                    set(&[viewer]),
                    false
                ),
                (
                    "organization 2".into(),
                    set(&[impersonator, viewer]),
                    set(&[impersonator]),
                    none.clone(),
                    true
                ),
                (
                    "project 5 granted to organization 1".into(),
                    set(&["PROJECT_GRANT_OWNER"]),
                    none.clone(),
                    none,
                    false
                ),
            ]
        );
        let mut turned = wanted.clone();
        turned.reverse();
        assert_eq!(hash(&wanted, "main", "7"), hash(&turned, "main", "7"));
        turned[0].exclusive = true;
        assert_ne!(hash(&wanted, "main", "7"), hash(&turned, "main", "7"));
        assert_ne!(hash(&wanted, "main", "7"), hash(&wanted, "main", "8"));
    }

    #[test]
    fn a_role_fits_one_level() {
        let levels = [
            (RoleScope::Instance, "IAM_OWNER"),
            (RoleScope::Organization("1".into()), "ORG_OWNER"),
            (RoleScope::Project("1".into()), "PROJECT_OWNER"),
            (
                RoleScope::ProjectGrant {
                    project_id: "1".into(),
                    organization_id: "1".into(),
                },
                "PROJECT_GRANT_OWNER",
            ),
        ];
        for (i, (scope, _)) in levels.iter().enumerate() {
            for (j, (_, role)) in levels.iter().enumerate() {
                assert_eq!(scope.fits(role), i == j, "{scope} {role}");
            }
        }
    }
}
