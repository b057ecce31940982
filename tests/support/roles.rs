//! Manager roles in an organization.

use serde_json::{Value, json};

use super::eventually;
use super::issuer::User;
use super::managed::Managed;

/// The service of ZITADEL's API that grants and revokes manager roles.
pub const ADMINISTRATORS: &str = "/zitadel.internal_permission.v2.InternalPermissionService";

/// An organization, in the form of ZITADEL's API.
pub fn on(organization: &str) -> Value {
    json!({"organizationId": organization})
}

/// An entry of `spec.managerRoles`.
pub fn roles_on(organization: &str, roles: &[&str]) -> Value {
    json!({"organizationID": organization, "roles": roles})
}

/// An entry of a policy.
pub fn allowed_on(organization: &str, roles: &[&str]) -> Value {
    json!({"organizationIDs": [organization], "roles": roles})
}

/// A world whose administrator owns the instance, and an organization without users with roles of the instance.
pub async fn owned(test: &str) -> (Managed, String) {
    let managed = Managed::new(test).await;
    managed.promote("IAM_OWNER").await;
    let organization = managed.world.issuer.organization().await;
    (managed, organization)
}

pub async fn key_user(managed: &Managed) -> User {
    managed.world.issuer.user(json!({"tokenType": "JWT"})).await
}

/// Waits until the user has exactly these roles in the organization.
pub async fn has(managed: &Managed, user: &str, organization: &str, roles: &[&str]) {
    eventually(&format!("the roles {roles:?}"), async || {
        managed.world.issuer.manager_roles(user, &on(organization)).await == roles
    })
    .await;
}
