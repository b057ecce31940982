//! Rotation of the key of an administrator.

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};
use zitadel_tokens::api::ZitadelInstance;
use zitadel_tokens::api::instance::AdminCredentialStatus;

use crate::support::managed::{CLUSTER, Managed, admin, admin_credential};
use crate::support::world::{data, until};
use crate::support::{SOON, eventually};

/// Waits until the status describes the present spec.
async fn has_generation(managed: &Managed) {
    let is = |instance: &ZitadelInstance| {
        let observed = instance.status.as_ref().and_then(|status| status.observed_generation);
        observed == instance.metadata.generation
    };
    until(managed.instances(), &managed.world.instance, SOON, is).await;
}

fn key_id(credential: &AdminCredentialStatus) -> String {
    credential.key_id.clone().expect("a key id")
}

/// The key ledger of the administrator.
async fn ledger(managed: &Managed) -> Option<Secret> {
    let secrets: Api<Secret> = Api::namespaced(managed.world.client.clone(), &managed.world.home());
    let name = format!("admin-key-{}", managed.world.instance);
    secrets.get_opt(&name).await.expect("readable")
}

/// Waits until ZITADEL has exactly these keys of the user.
async fn has_keys(managed: &Managed, user_id: &str, wanted: &[&str]) {
    eventually("the keys", async || {
        let keys = managed.world.issuer.keys(user_id).await;
        let mut keys: Vec<String> = keys.into_iter().map(|key| key.id).collect();
        let mut wanted: Vec<String> = wanted.iter().map(|&id| id.to_owned()).collect();
        keys.sort();
        wanted.sort();
        keys == wanted
    })
    .await;
}

/// The number of requests by this user.
async fn requests_of(managed: &Managed, user_id: &str) -> usize {
    let requests = managed.world.issuer.requests().await;
    requests.iter().filter(|request| request.user_id == user_id).count()
}

fn every_hour() -> Value {
    json!({"interval": "1h", "overlap": "10s", "deleteBootstrapKey": true})
}

#[tokio::test(flavor = "multi_thread")]
async fn administrator_works_with_rotated_keys() {
    let managed = Managed::new("admin-rotated").await;
    managed.rotates(every_hour()).await;
    let first = key_id(&managed.key_rotated("True", "KeyRotationOnSchedule").await);
    assert_ne!(first, managed.admin.key_id);
    let stored = data(&ledger(&managed).await.expect("a ledger"));
    assert!(stored.contains_key("current.der") && !stored.contains_key("pending.der"));
    has_keys(&managed, &managed.admin.id, &[&first]).await;
    managed.user("billing", json!({})).await;
    managed.world.ready("billing", "True", "Issued").await;

    let second = managed.rotate_admin("1").await;
    has_keys(&managed, &managed.admin.id, &[&second]).await;
    // Another process finds the key in the ledger.
    managed.operator.terminate().await;
    let operator = managed.world.rotating_operator_with(&CLUSTER).await;
    let managed = Managed { operator, ..managed };
    managed.user("orders", json!({})).await;
    managed.world.ready("orders", "True", "Issued").await;

    // The annotations of the Secret also bind the operator's own keys.
    let elsewhere = "https://other.example.com";
    managed.bound_credential(&managed.admin.key, elsewhere).await;
    managed.credential_is("False", "CredentialNotBound").await;
    let requests = requests_of(&managed, &managed.admin.id).await;
    managed.user("third", json!({})).await;
    managed.user_is("third", "False", "CredentialNotBound").await;
    assert_eq!(requests_of(&managed, &managed.admin.id).await, requests);
    managed.credential(&managed.admin.key).await;
    managed.world.ready("third", "True", "Issued").await;

    // The ledger outlives the instance.
    let (api, name) = (managed.instances(), &managed.world.instance);
    api.delete(name, &DeleteParams::default()).await.expect("deleted");
    managed.rotates(every_hour()).await;
    let status = managed.key_rotated("True", "KeyRotationOnSchedule").await;
    assert_eq!(key_id(&status), second);
    managed.deleted("third").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn administrator_goes_back_to_the_key_of_the_secret() {
    let managed = Managed::new("admin-back").await;
    managed.rotates(json!({"interval": "1h"})).await;
    let own = key_id(&managed.key_rotated("True", "KeyRotationOnSchedule").await);
    has_keys(&managed, &managed.admin.id, &[&own, &managed.admin.key_id]).await;

    // A user without roles cannot be the administrator.
    let wrong = managed.world.issuer.user(json!({})).await;
    managed.credential(&wrong.key).await;
    managed.key_rotated("False", "AdminForbidden").await;
    has_keys(&managed, &managed.admin.id, &[&own, &managed.admin.key_id]).await;
    has_keys(&managed, &wrong.id, &[&wrong.key_id]).await;

    // Another administrator: the operator's keys of the former one are removed.
    let resource = json!({"organizationId": managed.organization});
    let other = admin(&managed.world, resource, "ORG_USER_MANAGER").await;
    managed.credential(&other.key).await;
    has_keys(&managed, &managed.admin.id, &[&managed.admin.key_id]).await;
    let is_other = |instance: &ZitadelInstance| {
        admin_credential(instance).is_some_and(|it| it.user_id == other.id && it.key_id.as_ref() != Some(&other.key_id))
    };
    let instance = until(managed.instances(), &managed.world.instance, SOON, is_other).await;
    let own = key_id(&admin_credential(&instance).expect("a credential"));
    has_keys(&managed, &other.id, &[&own, &other.key_id]).await;

    managed.instance().await;
    has_keys(&managed, &other.id, &[&other.key_id]).await;
    let is_back = |instance: &ZitadelInstance| {
        let conditions = instance.status.iter().flat_map(|status| &status.conditions);
        let about_keys = conditions.filter(|c| c.type_ == "KeyRotated").count();
        about_keys == 0 && admin_credential(instance).is_some_and(|it| it.key_id.as_ref() == Some(&other.key_id))
    };
    until(managed.instances(), &managed.world.instance, SOON, is_back).await;
    assert!(ledger(&managed).await.is_none());
    managed.user("billing", json!({})).await;
    managed.world.ready("billing", "True", "Issued").await;
}

/// Someone may edit the instance and create a Secret, but cannot read the Secrets of the operator.
#[tokio::test(flavor = "multi_thread")]
async fn rotated_keys_sign_only_for_the_destination_of_the_bootstrap_key() {
    let managed = Managed::new("admin-bound").await;
    managed.rotates(every_hour()).await;
    let own = key_id(&managed.key_rotated("True", "KeyRotationOnSchedule").await);
    let issuer = &managed.world.issuer;
    let stranger = issuer.user(json!({})).await;
    let mut forged: Value = serde_json::from_str(&stranger.key).expect("a key file");
    forged["userId"] = json!(managed.admin.id);
    let forged = forged.to_string();
    // With another file of the same user, the destination stays.
    managed.credential(&forged).await;
    managed.user("billing", json!({})).await;
    managed.world.ready("billing", "True", "Issued").await;

    let endpoint = issuer.url.replace("127.0.0.1", "localhost");
    let destination = format!("{endpoint} for {}", issuer.url);
    managed.bound_credential(&forged, &destination).await;
    let mut spec = managed.world.instance_spec();
    spec["connection"]["endpoint"] = json!(endpoint);
    spec["adminCredential"] = json!({"secretRef": {"name": "zitadel-admin"}, "keyRotation": every_hour()});
    managed.world.apply_instance(spec).await.expect("an instance");
    managed.credential_is("False", "CredentialNotBound").await;
    has_generation(&managed).await;
    let requests = requests_of(&managed, &managed.admin.id).await;
    managed.user("orders", json!({})).await;
    managed.user_is("orders", "False", "CredentialNotBound").await;
    assert_eq!(requests_of(&managed, &managed.admin.id).await, requests);

    // The platform team moves the endpoint.
    managed.bound_credential(&managed.admin.key, &destination).await;
    managed.credential_is("True", "AdminCredentialReady").await;
    managed.world.ready("orders", "True", "Issued").await;
    assert_eq!(key_id(&managed.key_rotated("True", "KeyRotationOnSchedule").await), own);
    managed.bound_credential(&forged, &destination).await;
    managed.user("third", json!({})).await;
    managed.world.ready("third", "True", "Issued").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn personal_access_token_is_not_rotated() {
    let managed = Managed::new("admin-token").await;
    let token = managed.world.issuer.personal_token(&managed.admin.id).await;
    managed.credential(&token).await;
    managed.rotates(json!({"interval": "1h"})).await;
    let status = managed.key_rotated("False", "KeyFileNeeded").await;
    assert_eq!((status.key_id, status.key_rotation), (None, None));
    managed.credential_is("True", "AdminCredentialReady").await;
    assert!(ledger(&managed).await.is_none());
    managed.credential(&managed.admin.key).await;
    let own = key_id(&managed.key_rotated("True", "KeyRotationOnSchedule").await);

    // Without a key file, the operator cannot remove its own keys. It goes on to say so.
    managed.credential(&token).await;
    managed.key_rotated("False", "KeyFileNeeded").await;
    managed.instance().await;
    has_generation(&managed).await;
    managed.key_rotated("False", "KeyFileNeeded").await;
    has_keys(&managed, &managed.admin.id, &[&own, &managed.admin.key_id]).await;
    managed.credential("unknown-token").await;
    managed.key_rotated("False", "CredentialRejected").await;
    managed.credential(&managed.admin.key).await;
    has_keys(&managed, &managed.admin.id, &[&managed.admin.key_id]).await;
    eventually("no ledger", async || ledger(&managed).await.is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn administrator_works_while_the_rotation_ends_and_keys_remain() {
    let managed = Managed::new("admin-ends").await;
    managed.rotates(json!({"interval": "1h"})).await;
    let own = key_id(&managed.key_rotated("True", "KeyRotationOnSchedule").await);
    // ZITADEL removes the key, and the operator does not learn of it.
    let path = format!("/v2/users/{}/keys/{own}", managed.admin.id);
    let lost = json!({"path": path, "afterHandling": true, "reset": true});
    managed.world.issuer.fault(lost).await;
    managed.instance().await;
    has_keys(&managed, &managed.admin.id, &[&managed.admin.key_id]).await;
    let status = managed.key_rotated("False", "InstanceUnreachable").await;
    assert_eq!(key_id(&status), managed.admin.key_id);
    managed.credential_is("True", "AdminCredentialReady").await;
    managed.user("billing", json!({})).await;
    managed.user_is("billing", "True", "UserReady").await;
    managed.world.issuer.clear_faults().await;
    eventually("no ledger", async || ledger(&managed).await.is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_a_former_administrator_that_stay_are_reported() {
    let managed = Managed::new("admin-former").await;
    managed.rotates(every_hour()).await;
    let former = key_id(&managed.key_rotated("True", "KeyRotationOnSchedule").await);
    has_keys(&managed, &managed.admin.id, &[&former]).await;
    let issuer = &managed.world.issuer;
    issuer
        .change_user(&managed.admin.id, json!({"state": "inactive"}))
        .await;
    let resource = json!({"organizationId": managed.organization});
    let other = admin(&managed.world, resource, "ORG_USER_MANAGER").await;
    managed.credential(&other.key).await;
    let status = managed.key_rotated("False", "OldKeysRemain").await;
    assert_eq!((&status.user_id, key_id(&status)), (&other.id, other.key_id.clone()));
    assert_eq!(status.key_rotation, None);
    managed.user("billing", json!({})).await;
    managed.user_is("billing", "True", "UserReady").await;
    // The platform team gives them up.
    let secrets: Api<Secret> = Api::namespaced(managed.world.client.clone(), &managed.world.home());
    let name = format!("admin-key-{}", managed.world.instance);
    secrets.delete(&name, &DeleteParams::default()).await.expect("deleted");
    managed.key_rotated("True", "KeyRotationOnSchedule").await;
    has_keys(&managed, &managed.admin.id, &[&former]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bootstrap_key_of_another_administrator_stays() {
    let managed = Managed::new("admin-shared").await;
    let world = &managed.world;
    // Another instance with the same server and administrator, which does not rotate.
    let name = format!("{}-two", world.instance);
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret",
        "metadata": {"name": "second-admin", "annotations": {
            "zitadel-tokens.dev/instance": name, "zitadel-tokens.dev/send-to": world.issuer.url,
        }},
        "stringData": {"key.json": managed.admin.key},
    });
    let secrets: Api<Secret> = Api::namespaced(world.client.clone(), &world.home());
    let params = PatchParams::apply("tests").force();
    let applied = secrets.patch("second-admin", &params, &Patch::Apply(&secret)).await;
    applied.expect("a Secret");
    let mut spec = world.instance_spec();
    spec["adminCredential"] = json!({"secretRef": {"name": "second-admin"}});
    let instance = json!({
        "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelInstance",
        "metadata": {"name": name, "labels": {"test": world.instance}}, "spec": spec,
    });
    let applied = managed
        .instances()
        .patch(&name, &params, &Patch::Apply(&instance))
        .await;
    applied.expect("an instance");
    let is_ready = |instance: &ZitadelInstance| admin_credential(instance).is_some();
    until(managed.instances(), &name, SOON, is_ready).await;

    managed.rotates(every_hour()).await;
    let own = key_id(&managed.key_rotated("False", "BootstrapKeyInUse").await);
    has_keys(&managed, &managed.admin.id, &[&own, &managed.admin.key_id]).await;
    let deleted = managed.instances().delete(&name, &DeleteParams::default()).await;
    deleted.expect("deleted");
    let second = managed.rotate_admin("1").await;
    has_keys(&managed, &managed.admin.id, &[&second]).await;
}
