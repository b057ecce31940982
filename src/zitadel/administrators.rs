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
struct User {
    id: String,
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

impl ZitadelClient {
    /// The roles of a user in one scope. An empty set does not prove that the user has no roles: ZITADEL also answers
    /// so if the caller may not see them.
    pub async fn list_roles(
        &self,
        token: &APIToken,
        user_id: &str,
        scope: &RoleScope,
    ) -> Result<BTreeSet<String>, APIError> {
        let filters = json!([{"inUserIdsFilter": {"ids": [user_id]}}, {"resource": resource(scope)}]);
        let listed = self.list_administrators(token, user_id, &filters).await?;
        let here = listed.into_iter().find(|held| held.scope == *scope);
        Ok(here.map(|held| held.roles).unwrap_or_default())
    }

    /// All roles of the user of the token, which are always visible to it. They tell what the caller may do.
    pub async fn own_administrators(&self, token: &APIToken, own_id: &str) -> Result<Vec<ManagerRoles>, APIError> {
        let filters = json!([{"inUserIdsFilter": {"ids": [own_id]}}]);
        self.list_administrators(token, own_id, &filters).await
    }

    /// Gives a user exactly these roles in one scope. Without roles, the user is no longer a manager there. Succeeds if
    /// the user has these roles already.
    pub async fn set_roles(
        &self,
        token: &APIToken,
        user_id: &str,
        scope: &RoleScope,
        roles: &BTreeSet<String>,
    ) -> Result<(), APIError> {
        if roles.is_empty() {
            return self.remove_roles(token, user_id, scope).await;
        }
        let body = json!({"userId": user_id, "resource": resource(scope), "roles": roles});
        let created = self.call_administrators("CreateAdministrator", &body, token).await?;
        match error_id(&created).as_deref() {
            // The user has roles already. For a grant, ZITADEL answers 404.
            Some("INSTA-pFDwe" | "ORG-poWwe" | "PROJECT-PtXi1" | "PROJECT-37fug") => {
                done(&self.call_administrators("UpdateAdministrator", &body, token).await?)
            }
            // UpdateAdministrator has another meaning for this id.
            Some("PROJECT-D8JxR") => Err(APIError::UnknownProjectGrant),
            _ => done(&created),
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

    async fn list_administrators(
        &self,
        token: &APIToken,
        user_id: &str,
        filters: &Value,
    ) -> Result<Vec<ManagerRoles>, APIError> {
        let path = format!("{SERVICE}/ListAdministrators");
        let listed: Vec<Administrator> = self.list(&path, filters, None, token).await?;
        let of_user = listed.into_iter().filter(|entry| entry.user.id == user_id);
        Ok(of_user.filter_map(Administrator::roles).collect())
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
