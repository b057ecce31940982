//! Manager roles, which ZITADEL's API calls administrators (`docs/reference/zitadel-protocol.md#manager-roles`).

use std::collections::BTreeSet;

/// What a manager role is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RoleScope {
    /// The whole instance.
    Instance,
    /// The organization with this id.
    Organization(String),
    /// The project with this id.
    Project(String),
    /// The grant of a project to another organization.
    ProjectGrant {
        /// The project.
        project_id: String,
        /// The organization that the project is granted to.
        organization_id: String,
    },
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
        let scope = match &self.scope {
            RoleScope::Instance => "instance".to_owned(),
            RoleScope::Organization(id) => format!("organization {id}"),
            RoleScope::Project(id) => format!("project {id}"),
            RoleScope::ProjectGrant {
                project_id,
                organization_id,
            } => format!("project {project_id} granted to organization {organization_id}"),
        };
        self.roles.iter().map(move |role| format!("{role}: {scope}"))
    }
}
