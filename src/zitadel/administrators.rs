//! Manager roles of users at ZITADEL, which its API calls administrators
//! (`docs/reference/zitadel-protocol.md#manager-roles`).

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::domain::failure::Failure;
use crate::domain::manager_role::{ManagerRoles, RoleScope};
use crate::zitadel::api_call::{APIToken, done};
use crate::zitadel::api_error::{APIError, error_id};
use crate::zitadel::client::ZitadelClient;
use crate::zitadel::http::Answer;
use crate::zitadel::transport::Call;

/// The service has no REST address.
const SERVICE: &str = "/zitadel.internal_permission.v2.InternalPermissionService";

/// Since ZITADEL 4.6.
const LIST_PROJECTS: &str = "/zitadel.project.v2.ProjectService/ListProjects";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Project {
    project_id: String,
    organization_id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Administrator {
    user: User,
    #[serde(default)]
    instance: bool,
    organization: Option<Named>,
    project: Option<Named>,
    project_grant: Option<Grant>,
    #[serde(default)]
    roles: BTreeSet<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct User {
    id: String,
    #[serde(default)]
    organization_id: String,
}

#[derive(Deserialize)]
struct Named {
    id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Grant {
    project_id: String,
    granted_organization_id: String,
}

impl Administrator {
    /// Nothing for a kind of resource that the operator does not know.
    fn roles(self) -> Option<ManagerRoles> {
        let scope = match self {
            Self { instance: true, .. } => RoleScope::Instance,
            Self {
                organization: Some(organization),
                ..
            } => RoleScope::Organization(organization.id),
            Self {
                project: Some(project), ..
            } => RoleScope::Project(project.id),
            Self {
                project_grant: Some(grant),
                ..
            } => RoleScope::ProjectGrant {
                project_id: grant.project_id,
                organization_id: grant.granted_organization_id,
            },
            _ => return None,
        };
        Some(ManagerRoles {
            scope,
            roles: self.roles,
        })
    }
}

/// A user with manager roles in a scope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manager {
    /// The id of the user.
    pub user_id: String,
    /// The organization that the user belongs to. Empty if ZITADEL does not tell it.
    pub organization_id: String,
    /// Names of the roles.
    pub roles: BTreeSet<String>,
}

impl ZitadelClient {
    /// The roles of a user in one scope. An empty set does not prove that the user has none: ZITADEL also answers so if the
    /// caller may not see them. A list of all scopes could be made too long by anyone who may add members somewhere.
    pub async fn list_roles(
        &self,
        token: &APIToken,
        user_id: &str,
        scope: &RoleScope,
    ) -> Result<BTreeSet<String>, APIError> {
        let filters = json!([{"inUserIdsFilter": {"ids": [user_id]}}, {"resource": resource(scope)}]);
        let held = self.list_roles_of(token, user_id, &filters).await?;
        let here = held.into_iter().find(|held| held.scope == *scope);
        Ok(here.map(|held| held.roles).unwrap_or_default())
    }

    /// The roles of the user of the token in all scopes. A caller always sees its own roles.
    pub async fn list_own_roles(&self, token: &APIToken, own_id: &str) -> Result<Vec<ManagerRoles>, APIError> {
        let filters = json!([{"inUserIdsFilter": {"ids": [own_id]}}]);
        self.list_roles_of(token, own_id, &filters).await
    }

    /// The users with roles in a scope, as far as the caller may see them.
    pub async fn list_managers(&self, token: &APIToken, scope: &RoleScope) -> Result<Vec<Manager>, APIError> {
        let filters = json!([{"resource": resource(scope)}]);
        let listed = self.list_administrators(token, &filters).await?;
        let managers = listed.into_iter().filter_map(|entry| {
            let (user_id, organization_id) = (entry.user.id.clone(), entry.user.organization_id.clone());
            let held = entry.roles().filter(|held| held.scope == *scope)?;
            Some(Manager {
                user_id,
                organization_id,
                roles: held.roles,
            })
        });
        Ok(managers.collect())
    }

    /// The organization that a project belongs to. `None` if it does not exist or the caller may not see it.
    pub async fn organization_of_project(&self, token: &APIToken, id: &str) -> Result<Option<String>, APIError> {
        let filters = json!([{"inProjectIdsFilter": {"ids": [id]}}]);
        let listed: Vec<Project> = self.list(LIST_PROJECTS, &filters, None, token).await?;
        let found = listed.into_iter().find(|project| project.project_id == id);
        Ok(found.map(|project| project.organization_id))
    }

    /// Makes a user a manager in a scope where it has no roles. Fails with [`APIError::IsManager`] if it has some.
    pub async fn create_roles(
        &self,
        token: &APIToken,
        user_id: &str,
        scope: &RoleScope,
        roles: &BTreeSet<String>,
    ) -> Result<(), APIError> {
        let body = json!({"userId": user_id, "resource": resource(scope), "roles": roles});
        let created = self.call_administrators("CreateAdministrator", &body, token).await?;
        match error_id(&created).as_deref() {
            // For a grant, ZITADEL answers 404.
            Some("INSTA-pFDwe" | "ORG-poWwe" | "PROJECT-PtXi1" | "PROJECT-37fug") => Err(APIError::IsManager),
            // UpdateAdministrator has another meaning for this id.
            Some("PROJECT-D8JxR") => Err(APIError::UnknownProjectGrant),
            _ => done(&created),
        }
    }

    /// Replaces all roles of a user in a scope. Fails with [`APIError::IsNoManager`] if it has none.
    pub async fn update_roles(
        &self,
        token: &APIToken,
        user_id: &str,
        scope: &RoleScope,
        roles: &BTreeSet<String>,
    ) -> Result<(), APIError> {
        let body = json!({"userId": user_id, "resource": resource(scope), "roles": roles});
        let updated = self.call_administrators("UpdateAdministrator", &body, token).await?;
        match error_id(&updated).as_deref() {
            // For a grant, CreateAdministrator has another meaning for the last id.
            Some("INSTANCE-D8JxR" | "Org-D8JxR" | "PROJECT-D8JxR" | "PROJECT-37fug") => Err(APIError::IsNoManager),
            _ => done(&updated),
        }
    }

    /// Takes all roles in one scope from a user. Success does not prove the permission: for a user without roles in an
    /// organization, project or grant, ZITADEL checks none.
    pub async fn remove_roles(&self, token: &APIToken, user_id: &str, scope: &RoleScope) -> Result<(), APIError> {
        let body = json!({"userId": user_id, "resource": resource(scope)});
        done(&self.call_administrators("DeleteAdministrator", &body, token).await?)
    }

    async fn call_administrators(&self, method: &str, body: &Value, token: &APIToken) -> Result<Answer, Failure> {
        self.send(Call::PostJSON(body), &format!("{SERVICE}/{method}"), token)
            .await
    }

    async fn list_roles_of(
        &self,
        token: &APIToken,
        user_id: &str,
        filters: &Value,
    ) -> Result<Vec<ManagerRoles>, APIError> {
        let listed = self.list_administrators(token, filters).await?;
        let of_user = listed.into_iter().filter(|entry| entry.user.id == user_id);
        Ok(of_user.filter_map(Administrator::roles).collect())
    }

    async fn list_administrators(&self, token: &APIToken, filters: &Value) -> Result<Vec<Administrator>, APIError> {
        let path = format!("{SERVICE}/ListAdministrators");
        self.list(&path, filters, None, token).await
    }
}

/// A scope in a request.
fn resource(scope: &RoleScope) -> Value {
    match scope {
        RoleScope::Instance => json!({"instance": true}),
        RoleScope::Organization(id) => json!({"organizationId": id}),
        RoleScope::Project(id) => json!({"projectId": id}),
        RoleScope::ProjectGrant {
            project_id,
            organization_id,
        } => {
            json!({"projectGrant": {"projectId": project_id, "organizationId": organization_id}})
        }
    }
}
