//! Where the holder of some manager roles could take over the instance.

use std::collections::BTreeSet;

use crate::controller::instance::admin::Admin;
use crate::controller::refused::{Refused, about_roles};
use crate::controller::service_user::roles::{Roles, at_scope};
use crate::domain::admin_credential::sees_all_managers;
use crate::domain::manager_role::{RoleScope, WantedRoles, takes_over_users};
use crate::domain::reason::Reason;
use crate::domain::role_ledger::RoleLedger;
use crate::domain::role_report::RoleOutcome;
use crate::zitadel::APIError;

/// With more organizations, all count as privileged.
const MOST_PRIVILEGED: usize = 32;

impl Roles<'_> {
    /// Leaves out the roles with which the user could take over the instance, unless a policy allows them in any case. Also
    /// returns why the first of them is left out. If that cannot be found out, only new roles are left out.
    pub(super) async fn unprivileged(
        &self,
        admin: &Admin,
        mut wanted: Vec<WantedRoles>,
        ledger: &RoleLedger,
    ) -> (Vec<WantedRoles>, Option<RoleOutcome>) {
        if wanted.iter().all(|wanted| wanted.if_unprivileged.is_empty()) {
            return (wanted, None);
        }
        let privileged = self.session.ask(Privileged::of(admin, &ledger.user_id)).await;
        let mut failed = None;
        let (privileged, keeps) = match privileged {
            Ok(privileged) => (Some(privileged), false),
            Err(stop) => {
                failed = Some(stop.into());
                (None, true)
            }
        };
        for wanted in &mut wanted {
            let is_privileged = privileged.as_ref().is_none_or(|places| places.contains(&wanted.scope));
            if wanted.if_unprivileged.is_empty() || !is_privileged {
                continue;
            }
            let granted = ledger.granted(&wanted.scope);
            let stays = |role: &String| keeps && granted.is_some_and(|granted| granted.roles.contains(role));
            wanted
                .roles
                .retain(|role| !wanted.if_unprivileged.contains(role) || stays(role));
            wanted.exclusive = false;
            failed.get_or_insert(at_scope(Reason::PrivilegedRolesDenied.into(), &wanted.scope));
        }
        (wanted, failed)
    }
}

/// Where the holder of some roles could take over the instance.
struct Privileged {
    /// The organizations with users through whom this is possible: users with roles of the instance, the administrator, those
    /// who can change ZITADEL's own project, and those who can take over one of these. `None` if they cannot be found out.
    organizations: Option<BTreeSet<String>>,
    /// The project of ZITADEL's own applications.
    project_id: String,
}

impl Privileged {
    /// Leaves out `user_id`, which cannot gain anything by taking over itself.
    async fn of(admin: &Admin, user_id: &str) -> Result<Self, Refused> {
        let project_id = admin.client.project_id_as(&admin.token).await.map_err(about_roles)?;
        let organizations = match Self::organizations(admin, user_id, &project_id).await {
            Err(APIError::TooMany) => None,
            found => found.map_err(about_roles)?,
        };
        Ok(Self {
            organizations,
            project_id,
        })
    }

    async fn organizations(
        admin: &Admin,
        user_id: &str,
        project_id: &str,
    ) -> Result<Option<BTreeSet<String>>, APIError> {
        let (client, token) = (&admin.client, &admin.token);
        let own_roles = client.list_roles(token, &admin.user_id, &RoleScope::Instance).await?;
        if !sees_all_managers(&own_roles) {
            return Ok(None);
        }
        let own = client.user(token, &admin.user_id).await?;
        let owner = client.organization_of_project(token, project_id).await?;
        let first = [own.map(|user| user.organization_id), owner];
        let mut found: BTreeSet<String> = first.map(Option::unwrap_or_default).into();
        let mut scopes = vec![RoleScope::Instance, RoleScope::Project(project_id.to_owned())];
        scopes.extend(found.iter().cloned().map(RoleScope::Organization));
        while let Some(scope) = scopes.pop() {
            for manager in client.list_managers(token, &scope).await? {
                let takes_over = |role: &String| scope == RoleScope::Instance || takes_over_users(&scope, role);
                let counts = manager.user_id != user_id && manager.roles.iter().any(takes_over);
                if counts && found.insert(manager.organization_id.clone()) {
                    scopes.push(RoleScope::Organization(manager.organization_id));
                }
            }
            // An organization that ZITADEL does not name could be any.
            if found.contains("") || found.len() > MOST_PRIVILEGED {
                return Ok(None);
            }
        }
        Ok(Some(found))
    }

    fn contains(&self, scope: &RoleScope) -> bool {
        match scope {
            RoleScope::Organization(id) => self.organizations.as_ref().is_none_or(|all| all.contains(id)),
            RoleScope::Project(id) => *id == self.project_id,
            RoleScope::Instance | RoleScope::ProjectGrant { .. } => false,
        }
    }
}
