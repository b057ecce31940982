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

/// A user with manager roles of the instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceManager {
    /// The id of the user.
    pub user_id: String,
    /// The organization that the user belongs to. Empty if ZITADEL does not tell it.
    pub organization_id: String,
}

impl ZitadelClient {
    /// The roles of a user in all scopes. A scope without roles does not prove that the user has none there: ZITADEL also
    /// leaves out what the caller may not see. A caller always sees its own roles.
    pub async fn list_roles(&self, token: &APIToken, user_id: &str) -> Result<Vec<ManagerRoles>, APIError> {
        let filters = json!([{"inUserIdsFilter": {"ids": [user_id]}}]);
        let listed = self.list_administrators(token, &filters).await?;
        let of_user = listed.into_iter().filter(|entry| entry.user.id == user_id);
        Ok(of_user.filter_map(Administrator::roles).collect())
    }

    /// The users with manager roles of the instance, as far as the caller may see them.
    pub async fn list_instance_managers(&self, token: &APIToken) -> Result<Vec<InstanceManager>, APIError> {
        let filters = json!([{"resource": resource(&RoleScope::Instance)}]);
        let listed = self.list_administrators(token, &filters).await?;
        let of_instance = listed.into_iter().filter(|entry| entry.instance);
        let managers = of_instance.map(|entry| InstanceManager {
            user_id: entry.user.id,
            organization_id: entry.user.organization_id,
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
