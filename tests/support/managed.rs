//! A world in which the operator creates service users in ZITADEL.

use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use zitadel_tokens::api::instance::AdminCredentialStatus;
use zitadel_tokens::api::{ZitadelInstance, ZitadelServiceUser};

use super::SOON;
use super::issuer::User;
use super::operator::Operator;
use super::world::{World, condition, everything, one_token, until};

/// The flags of an operator that creates users.
pub const CLUSTER: [&str; 2] = ["--cluster-name", "prod"];

/// A world whose instance has the credential of an administrator of one organization.
pub struct Managed {
    pub world: World,
    pub operator: Operator,
    pub organization: String,
    pub admin: User,
}

impl Managed {
    pub async fn new(test: &str) -> Self {
        let world = World::new(test).await;
        let operator = world.rotating_operator_with(&CLUSTER).await;
        Self::with_operator(world, operator).await
    }

    pub async fn with_operator(world: World, operator: Operator) -> Self {
        let organization = world.issuer.organization().await;
        let admin = admin(&world, json!({"organizationId": organization}), "ORG_USER_MANAGER").await;
        let managed = Self {
            world,
            operator,
            organization,
            admin,
        };
        managed.allow(json!({"organizationIDs": [managed.organization]})).await;
        managed.credential(&managed.admin.key).await;
        managed.instance().await;
        managed
    }

    /// Applies the policy of the world with these users.
    pub async fn allow(&self, users: Value) {
        self.policy(json!({"users": users})).await;
    }

    /// Applies the policy of the world with these manager roles, and users of the organization.
    pub async fn allow_roles(&self, roles: Value) {
        let users = json!({"organizationIDs": [self.organization]});
        self.policy(json!({"users": users, "managerRoles": roles})).await;
    }

    async fn policy(&self, mut spec: Value) {
        let world = &self.world;
        spec["instanceRef"] = json!({"name": world.instance});
        spec["namespaceSelector"] = world.selector_of_namespace();
        spec["audiences"] = everything();
        let policy = json!({
            "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelAccessPolicy",
            "metadata": {"name": world.policy_name()}, "spec": spec,
        });
        let params = PatchParams::apply("tests").force();
        let applied = world
            .policies()
            .patch(&world.policy_name(), &params, &Patch::Apply(&policy))
            .await;
        applied.expect("a policy");
    }

    /// Stores the admin credential, bound to the instance.
    pub async fn credential(&self, text: &str) {
        self.bound_credential(text, &self.world.issuer.url).await;
    }

    pub async fn bound_credential(&self, text: &str, send_to: &str) {
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret",
            "metadata": {"name": "zitadel-admin", "annotations": {
                "zitadel-tokens.dev/instance": self.world.instance, "zitadel-tokens.dev/send-to": send_to,
            }},
            "stringData": {"credential": text},
        });
        let secrets: Api<Secret> = Api::namespaced(self.world.client.clone(), &self.world.home());
        let params = PatchParams::apply("tests").force();
        let applied = secrets.patch("zitadel-admin", &params, &Patch::Apply(&secret)).await;
        applied.expect("a Secret");
    }

    pub async fn instance(&self) {
        let mut spec = self.world.instance_spec();
        spec["adminCredential"] = json!({"secretRef": {"name": "zitadel-admin"}});
        self.world.apply_instance(spec).await.expect("an instance");
    }

    /// Suspends the instance.
    pub async fn suspended(&self) {
        let mut spec = self.world.instance_spec();
        spec["adminCredential"] = json!({"secretRef": {"name": "zitadel-admin"}});
        spec["suspend"] = json!(true);
        self.world.apply_instance(spec).await.expect("an instance");
    }

    pub fn instances(&self) -> Api<ZitadelInstance> {
        Api::all(self.world.client.clone())
    }

    /// Applies the instance with this rotation of the administrator's key.
    pub async fn rotates(&self, rotation: Value) {
        let mut spec = self.world.instance_spec();
        spec["adminCredential"] = json!({"secretRef": {"name": "zitadel-admin"}, "keyRotation": rotation});
        self.world.apply_instance(spec).await.expect("an instance");
    }

    /// Waits until the instance's `KeyRotated` has this status and reason, and returns what the status says about the
    /// credential.
    pub async fn key_rotated(&self, status: &str, reason: &str) -> AdminCredentialStatus {
        let is = |instance: &ZitadelInstance| {
            let mut conditions = instance.status.iter().flat_map(|status| &status.conditions);
            conditions.any(|c| c.type_ == "KeyRotated" && c.status == status && c.reason == reason)
        };
        let instance = until(self.instances(), &self.world.instance, SOON, is).await;
        admin_credential(&instance).unwrap_or_default()
    }

    /// Requests a rotation of the administrator's key.
    pub async fn request_rotation(&self, request: &str) {
        let annotation = json!({"metadata": {"annotations": {"zitadel-tokens.dev/rotate-request": request}}});
        let (api, params) = (self.instances(), PatchParams::default());
        let name = &self.world.instance;
        let annotated = api.patch(name, &params, &Patch::Merge(&annotation)).await;
        annotated.expect("annotated");
    }

    /// Waits until a requested rotation has happened. Returns the id of the new key.
    pub async fn rotation_served(&self, request: &str, limit: Duration) -> String {
        let served = |instance: &ZitadelInstance| {
            let rotation = admin_credential(instance).and_then(|credential| credential.key_rotation);
            rotation
                .and_then(|rotation| rotation.last_handled_rotate_request)
                .as_deref()
                == Some(request)
        };
        let instance = until(self.instances(), &self.world.instance, limit, served).await;
        let credential = admin_credential(&instance).expect("a credential");
        credential.key_id.expect("a key id")
    }

    pub async fn rotate_admin(&self, request: &str) -> String {
        self.request_rotation(request).await;
        self.rotation_served(request, SOON).await
    }

    /// Waits until the instance's `AdminCredentialReady` has this status and reason.
    pub async fn credential_is(&self, status: &str, reason: &str) -> ZitadelInstance {
        until(
            self.instances(),
            &self.world.instance,
            SOON,
            |instance: &ZitadelInstance| {
                let mut conditions = instance.status.iter().flat_map(|status| &status.conditions);
                conditions.any(|c| c.type_ == "AdminCredentialReady" && c.status == status && c.reason == reason)
            },
        )
        .await
    }

    /// Applies a service user with one token in `NAME-token`.
    pub async fn user(&self, name: &str, mut user: Value) {
        user["organizationID"] = json!(self.organization);
        let mut spec = one_token(&format!("{name}-token"));
        spec["user"] = user;
        self.world.service_user(name, spec).await.expect("accepted");
    }

    /// Applies a service user with the key of `user`, one token in `NAME-token`, and these manager roles.
    pub async fn with_roles(&self, name: &str, user: &User, roles: Value) {
        self.world.key_secret(&format!("{name}-key"), user).await;
        let mut spec = one_token(&format!("{name}-token"));
        spec["managerRoles"] = roles;
        self.world.service_user(name, spec).await.expect("accepted");
    }

    /// Waits until `UserReady` has this status and reason.
    pub async fn user_is(&self, name: &str, status: &str, reason: &str) -> ZitadelServiceUser {
        self.condition_is(name, "UserReady", (status, reason)).await
    }

    /// Waits until `ManagerRolesGranted` has this status and reason, and returns its message.
    pub async fn roles_are(&self, name: &str, status: &str, reason: &str) -> String {
        let kind = "ManagerRolesGranted";
        let user = self.condition_is(name, kind, (status, reason)).await;
        condition(&user, kind).expect("a condition").2.to_owned()
    }

    /// Waits until the message of `ManagerRolesGranted` has these pieces.
    pub async fn roles_say(&self, name: &str, pieces: &[&str]) {
        let says = |user: &ZitadelServiceUser| {
            condition(user, "ManagerRolesGranted")
                .is_some_and(|(_, _, text)| pieces.iter().all(|piece| text.contains(piece)))
        };
        self.world.user_until(name, says).await;
    }

    async fn condition_is(&self, name: &str, kind: &str, wanted: (&str, &str)) -> ZitadelServiceUser {
        let is = |user: &ZitadelServiceUser| condition(user, kind).is_some_and(|(s, r, _)| (s, r) == wanted);
        self.world.user_until(name, is).await
    }

    /// Gives the administrator this role for the whole instance.
    pub async fn promote(&self, role: &str) {
        let instance = json!({"instance": true});
        self.world
            .issuer
            .set_manager_roles(&self.admin.id, &instance, &[role])
            .await;
    }

    /// The users of the organization, except its administrator.
    pub async fn users(&self) -> Vec<Value> {
        let all = self.world.issuer.users().await.into_iter();
        let here = all.filter(|user| user["organizationId"] == *self.organization);
        here.filter(|user| user["id"] != *self.admin.id).collect()
    }

    /// Deletes a service user, and waits until it says that the deletion waits for this reason.
    pub async fn deletion_waits(&self, name: &str, reason: &str) {
        self.world.delete(name).await;
        let waits = |user: &ZitadelServiceUser| condition(user, "Ready").is_some_and(|(_, r, _)| r == reason);
        self.world.user_until(name, waits).await;
    }

    pub async fn deleted(&self, name: &str) {
        self.world.delete(name).await;
        self.world.user_gone(name).await;
    }
}

/// Creates a user with a manager role.
pub async fn admin(world: &World, resource: Value, role: &str) -> User {
    let roles = json!([{"resource": resource, "roles": [role]}]);
    let organization = &resource["organizationId"];
    world
        .issuer
        .user(json!({"managerRoles": roles, "organizationId": organization}))
        .await
}

/// What the status says about the credential.
pub fn admin_credential(instance: &ZitadelInstance) -> Option<AdminCredentialStatus> {
    instance.status.as_ref()?.admin_credential.clone()
}
