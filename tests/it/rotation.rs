//! Key rotation: the operator replaces the key of a service user with keys of its own.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, ListParams, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use zitadel_tokens::api::ZitadelServiceUser;

use crate::support::eventually;
use crate::support::issuer::User;
use crate::support::world::{World, condition, everything, one_token};

/// A service user that rotates its key, with one token in the Secret `NAME-token`.
async fn rotating(world: &World, name: &str, rotation: Value) -> User {
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret(&format!("{name}-key"), &user).await;
    apply(world, name, rotation).await;
    user
}

async fn apply(world: &World, name: &str, rotation: Value) {
    let mut spec = one_token(&format!("{name}-token"));
    spec["keyRotation"] = rotation;
    world.service_user(name, spec).await.expect("accepted");
}

/// Waits until `KeyRotated` has this status and reason.
async fn rotated(world: &World, name: &str, status: &str, reason: &str) -> ZitadelServiceUser {
    world
        .user_until(name, |user| {
            condition(user, "KeyRotated").is_some_and(|(s, r, _)| (s, r) == (status, reason))
        })
        .await
}

fn key_id(user: &ZitadelServiceUser) -> String {
    let status = user.status.as_ref().expect("a status");
    status.key_id.clone().expect("a key id")
}

fn has_finalizer(user: &ZitadelServiceUser) -> bool {
    user.finalizers().iter().any(|f| f == "zitadel-tokens.dev/keys")
}

/// Waits until the object is gone, and then its ledger is gone too.
async fn gone(world: &World, object: &ZitadelServiceUser) {
    let name = object.name_any();
    world.user_gone(&name).await;
    assert!(world.ledger(object).await.is_none());
}

async fn key_ids(world: &World, user: &User) -> Vec<String> {
    let keys = world.issuer.keys(&user.id).await;
    keys.into_iter().map(|key| key.id).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn key_is_replaced_and_the_bootstrap_key_removed() {
    let world = World::new("rotation").await;
    let operator = world.rotating_operator().await;
    world.instance().await;
    let rotation = json!({"interval": "1h", "overlap": "10s", "deleteBootstrapKey": true});
    let user = rotating(&world, "billing", rotation).await;
    let token = world.token("billing-token").await;
    let object = rotated(&world, "billing", "True", "KeyRotationOnSchedule").await;
    let first = key_id(&object);
    assert_ne!(first, user.key_id);
    assert!(has_finalizer(&object));
    let ledger = world.ledger(&object).await.expect("a ledger");
    assert!(
        ledger.contains_key("current.der") && !ledger.contains_key("pending.der"),
        "{:?}",
        ledger.keys()
    );

    // The bootstrap key is gone at ZITADEL after the overlap, and the tenant may delete its Secret.
    eventually("only the operator's key remains", async || {
        key_ids(&world, &user).await == [first.clone()]
    })
    .await;
    let gone = world.secrets().delete("billing-key", &DeleteParams::default()).await;
    gone.expect("deleted");
    world.renew("billing").await;
    world.secret_until("billing-token", |data| data["token"] != token).await;
    let object = world.ready("billing", "True", "Issued").await;
    assert_eq!(
        condition(&object, "KeyValid").map(|(s, r, _)| (s, r)),
        Some(("True", "KeyUsable"))
    );
    // Neither a rotation nor its end requested a token for the workload.
    assert_eq!(world.issuer.mints().await, 2);

    world.annotate("billing", "rotate-request", "1").await;
    let object = world.user_until("billing", |user| key_id(user) != first).await;
    let second = key_id(&object);
    eventually("the first key is gone", async || {
        key_ids(&world, &user).await == [second.clone()]
    })
    .await;
    let object = world
        .user_until("billing", |user| {
            let status = user.status.as_ref().and_then(|status| status.key_rotation.as_ref());
            status.is_some_and(|s| {
                s.last_handled_rotate_request.as_deref() == Some("1") && s.foreign_credentials == Some(0)
            })
        })
        .await;
    assert_eq!(
        condition(&object, "ForeignCredentials").map(|(s, _, _)| s),
        Some("False")
    );
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, 2);
    operator.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deletion_removes_the_operators_keys_and_waits_for_zitadel() {
    let world = World::new("rotation-deleted").await;
    let _operator = world.rotating_operator().await;
    world.instance().await;
    let user = rotating(&world, "billing", json!({"interval": "1h"})).await;
    let object = rotated(&world, "billing", "True", "KeyRotationOnSchedule").await;
    assert_eq!(key_ids(&world, &user).await.len(), 2);
    let fault = world
        .issuer
        .fault(json!({"path": "/oauth/v2/token", "status": 503}))
        .await;
    world.delete("billing").await;
    let waiting = world
        .user_until("billing", |user| {
            condition(user, "Ready").is_some_and(|(_, r, _)| r == "ServerError")
        })
        .await;
    let (_, _, message) = condition(&waiting, "Ready").expect("a condition");
    assert!(message.contains("abandon"), "{message}");
    assert!(!fault.is_null());
    world.issuer.clear_faults().await;
    gone(&world, &object).await;
    assert_eq!(key_ids(&world, &user).await, std::slice::from_ref(&user.key_id));
}

#[tokio::test(flavor = "multi_thread")]
async fn abandoned_keys_stay_and_are_named() {
    let world = World::new("rotation-abandoned").await;
    let _operator = world.rotating_operator().await;
    world.instance().await;
    let user = rotating(&world, "billing", json!({"interval": "1h"})).await;
    let object = rotated(&world, "billing", "True", "KeyRotationOnSchedule").await;
    world
        .issuer
        .fault(json!({"path": "/oauth/v2/token", "status": 503}))
        .await;
    world.delete("billing").await;
    world
        .user_until("billing", |user| {
            condition(user, "Ready").is_some_and(|(_, r, _)| r == "ServerError")
        })
        .await;
    let uid = object.metadata.uid.clone().expect("a UID");
    world.annotate("billing", "abandon", "another").await;
    world.annotate("billing", "abandon", &uid).await;
    gone(&world, &object).await;
    assert_eq!(key_ids(&world, &user).await.len(), 2);
    eventually("an Event", async || {
        world.events("billing").await.contains("Warning KeysLeftBehind")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_self_management_tokens_go_on_and_a_condition_says_so() {
    let world = World::new("rotation-refused").await;
    let _operator = world.rotating_operator().await;
    world.instance().await;
    let user = world
        .issuer
        .user(json!({"tokenType": "JWT", "selfManagementRefused": true}))
        .await;
    world.key_secret("billing-key", &user).await;
    apply(&world, "billing", json!({"interval": "1h"})).await;
    let object = rotated(&world, "billing", "False", "KeyManagementForbidden").await;
    assert!(!has_finalizer(&object));
    world.ready("billing", "True", "Issued").await;
    assert_eq!(key_ids(&world, &user).await, std::slice::from_ref(&user.key_id));

    world.issuer.settings(json!({"userV2": false})).await;
    rotating(&world, "orders", json!({"interval": "1h"})).await;
    rotated(&world, "orders", "False", "KeyManagementUnavailable").await;
    world.ready("orders", "True", "Issued").await;
    let secrets: Api<Secret> = Api::namespaced(world.client.clone(), &world.home());
    assert_eq!(
        secrets.list(&ListParams::default()).await.expect("listed").items.len(),
        0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn object_without_rotation_goes_back_to_the_bootstrap_key() {
    let world = World::new("rotation-ended").await;
    let _operator = world.rotating_operator().await;
    world.instance().await;
    let user = rotating(&world, "billing", json!({"interval": "1h"})).await;
    rotated(&world, "billing", "True", "KeyRotationOnSchedule").await;
    world
        .service_user("billing", one_token("billing-token"))
        .await
        .expect("accepted");
    let object = world
        .user_until("billing", |u| !has_finalizer(u) && key_id(u) == user.key_id)
        .await;
    assert_eq!(condition(&object, "KeyRotated"), None);
    assert_eq!(key_ids(&world, &user).await, std::slice::from_ref(&user.key_id));
    assert!(world.ledger(&object).await.is_none());
    assert_eq!(world.issuer.mints().await, 1);
}

fn ledgers(world: &World) -> Api<Secret> {
    Api::namespaced(world.client.clone(), &world.home())
}

fn ledger_name(user: &ZitadelServiceUser) -> String {
    format!("service-user-key-{}", user.metadata.uid.as_deref().expect("a UID"))
}

/// Requests a rotation and waits until it has happened. Returns the id of the new key.
async fn rotate(world: &World, name: &str, request: &str) -> String {
    world.annotate(name, "rotate-request", request).await;
    let served = |user: &ZitadelServiceUser| {
        let status = user.status.as_ref().and_then(|status| status.key_rotation.as_ref());
        status.and_then(|s| s.last_handled_rotate_request.clone()) == Some(request.to_owned())
    };
    let object = world.user_until(name, served).await;
    key_id(&object)
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_that_share_a_user_rotate_independently() {
    let world = World::new("rotation-shared").await;
    let _operator = world.rotating_operator().await;
    world.instance().await;
    let rotation = json!({"interval": "1h", "overlap": "10s", "deleteBootstrapKey": true});
    let user = rotating(&world, "billing", rotation.clone()).await;
    world.key_secret("orders-key", &user).await;
    apply(&world, "orders", rotation).await;
    // Neither removes the key that the other one began with.
    for name in ["billing", "orders"] {
        rotated(&world, name, "False", "BootstrapKeyInUse").await;
    }
    let foreign = world.issuer.key(&user.id, json!({})).await.0;
    let [billing, orders] = [
        rotate(&world, "billing", "1").await,
        rotate(&world, "orders", "1").await,
    ];
    let mut left = [user.key_id.clone(), foreign, billing, orders];
    left.sort();
    eventually("each has one key", async || {
        let mut keys = key_ids(&world, &user).await;
        keys.sort();
        keys == left
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn key_secret_with_many_entries_neither_hides_a_key_nor_keeps_others_alive() {
    let world = World::new("rotation-many").await;
    let _operator = world.rotating_operator().await;
    world.allow(world.selector_of_namespace(), everything()).await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    // No policy allows these objects a token, so no reconcile reads their key Secrets.
    let tenant = World::beside(&world, "tenant").await;
    let mut entries: BTreeMap<String, &str> = (0..65).map(|n| (format!("{n}.json"), "{}")).collect();
    entries.insert("key.json".to_owned(), &user.key);
    tenant.secret("many", json!(entries)).await;
    for (name, entry) in [("sharing", "key.json"), ("other", "0.json")] {
        let mut spec = one_token(&format!("{name}-token"));
        spec["keySecretRef"] = json!({"name": "many", "key": entry});
        tenant.service_user(name, spec).await.expect("accepted");
        tenant.ready(name, "False", "AccessDenied").await;
    }

    let rotation = json!({"interval": "1h", "overlap": "10s", "deleteBootstrapKey": true});
    apply(&world, "billing", rotation).await;
    rotated(&world, "billing", "False", "BootstrapKeyInUse").await;
    // What a rotation replaced is removed nevertheless.
    let second = rotate(&world, "billing", "1").await;
    eventually("the first key is gone", async || {
        let keys = key_ids(&world, &user).await;
        keys.len() == 2 && keys.contains(&second) && keys.contains(&user.key_id)
    })
    .await;
    tenant.delete("sharing").await;
    let third = rotate(&world, "billing", "2").await;
    eventually("the bootstrap key is gone", async || {
        key_ids(&world, &user).await == [third.clone()]
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_credentials_are_counted_and_reported() {
    let world = World::new("rotation-foreign").await;
    let _operator = world.rotating_operator().await;
    world.instance().await;
    let user = rotating(&world, "billing", json!({"interval": "1h", "overlap": "10s"})).await;
    let counted = async |count: i32, status: &str| {
        world
            .user_until("billing", |user| {
                let rotation = user.status.as_ref().and_then(|status| status.key_rotation.as_ref());
                rotation.and_then(|rotation| rotation.foreign_credentials) == Some(count)
                    && condition(user, "ForeignCredentials").is_some_and(|(s, _, _)| s == status)
            })
            .await
    };
    counted(0, "False").await;
    let (foreign, _) = world.issuer.key(&user.id, json!({})).await;
    rotate(&world, "billing", "1").await;
    counted(1, "True").await;
    eventually("an Event", async || {
        world.events("billing").await.contains("Warning ForeignCredentials")
    })
    .await;
    rotate(&world, "billing", "2").await;
    counted(1, "False").await;
    assert!(key_ids(&world, &user).await.contains(&foreign));
}

#[tokio::test(flavor = "multi_thread")]
async fn key_of_another_user_wins_at_once_and_the_former_keys_are_removed() {
    let world = World::new("rotation-moved").await;
    let _operator = world.rotating_operator().await;
    world.instance().await;
    let former = rotating(&world, "billing", json!({"interval": "1h"})).await;
    rotated(&world, "billing", "True", "KeyRotationOnSchedule").await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    world
        .user_until("billing", |object| {
            let status = object.status.as_ref().expect("a status");
            status.user_id.as_ref() == Some(&user.id)
                && status.key_id.as_ref() != Some(&user.key_id)
                && condition(object, "KeyRotated").is_some_and(|(s, _, _)| s == "True")
        })
        .await;
    assert_eq!(key_ids(&world, &former).await, std::slice::from_ref(&former.key_id));
    world.ready("billing", "True", "Issued").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn former_keys_that_cannot_be_removed_are_reported_and_can_be_abandoned() {
    let world = World::new("rotation-stuck").await;
    let _operator = world.rotating_operator().await;
    world.instance().await;
    let former = rotating(&world, "billing", json!({"interval": "1h"})).await;
    let object = rotated(&world, "billing", "True", "KeyRotationOnSchedule").await;
    let state = json!({"state": "inactive"});
    world.issuer.change_user(&former.id, state).await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    let stuck = rotated(&world, "billing", "False", "OldKeysRemain").await;
    assert!(
        condition(&stuck, "KeyRotated")
            .expect("a condition")
            .2
            .contains("abandon")
    );
    world.ready("billing", "True", "Issued").await;
    world
        .annotate("billing", "abandon", &object.metadata.uid.clone().expect("a UID"))
        .await;
    rotated(&world, "billing", "True", "KeyRotationOnSchedule").await;
    assert_eq!(key_ids(&world, &former).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_or_damaged_ledger_stops_no_token() {
    let world = World::new("rotation-ledger").await;
    let _operator = world.rotating_operator().await;
    world.instance().await;
    let user = rotating(&world, "billing", json!({"interval": "1h", "overlap": "10s"})).await;
    let object = rotated(&world, "billing", "True", "KeyRotationOnSchedule").await;
    let name = ledger_name(&object);
    let first = key_id(&object);

    // Damaged: the bootstrap key signs, and the Secret stays for a person to look at.
    let edit = json!({"stringData": {"ledger.json": "{}"}});
    let backup = ledgers(&world).get(&name).await.expect("a ledger");
    let patch = kube::api::Patch::Merge(&edit);
    ledgers(&world)
        .patch(&name, &PatchParams::default(), &patch)
        .await
        .expect("edited");
    world.renew("billing").await;
    let damaged = rotated(&world, "billing", "False", "KeyLedgerInvalid").await;
    assert_eq!(key_id(&damaged), user.key_id);
    world.ready("billing", "True", "Issued").await;

    // Restored from a backup: the key in it is used again.
    let data = json!({"data": backup.data});
    ledgers(&world)
        .patch(&name, &PatchParams::default(), &kube::api::Patch::Merge(&data))
        .await
        .expect("edited");
    let second = rotate(&world, "billing", "1").await;
    eventually("the first key is gone", async || {
        !key_ids(&world, &user).await.contains(&first)
    })
    .await;

    // Deleted: the operator begins anew, and what it does not know, it does not remove.
    ledgers(&world)
        .delete(&name, &DeleteParams::default())
        .await
        .expect("deleted");
    let third = rotate(&world, "billing", "2").await;
    let mut left = [user.key_id.clone(), second, third];
    left.sort();
    let mut keys = key_ids(&world, &user).await;
    keys.sort();
    assert_eq!(keys, left);
    world.ready("billing", "True", "Issued").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn namespace_and_foreground_deletion_remove_the_operators_keys() {
    let world = World::new("rotation-gone").await;
    let _operator = world.rotating_operator().await;
    world.instance().await;
    let user = rotating(&world, "billing", json!({"interval": "1h"})).await;
    rotated(&world, "billing", "True", "KeyRotationOnSchedule").await;
    world
        .users()
        .delete("billing", &DeleteParams::foreground())
        .await
        .expect("accepted");
    world.user_gone("billing").await;
    assert_eq!(key_ids(&world, &user).await, std::slice::from_ref(&user.key_id));

    apply(&world, "billing", json!({"interval": "1h"})).await;
    rotated(&world, "billing", "True", "KeyRotationOnSchedule").await;
    assert_eq!(key_ids(&world, &user).await.len(), 2);
    let namespaces: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(world.client.clone());
    namespaces
        .delete(&world.name, &DeleteParams::default())
        .await
        .expect("accepted");
    eventually("the namespace is gone", async || {
        namespaces.get_opt(&world.name).await.expect("readable").is_none()
    })
    .await;
    assert_eq!(key_ids(&world, &user).await, std::slice::from_ref(&user.key_id));
    assert_eq!(
        ledgers(&world)
            .list(&ListParams::default())
            .await
            .expect("listed")
            .items
            .len(),
        0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn orphaned_keys_stay() {
    let world = World::new("rotation-orphan").await;
    let _operator = world.rotating_operator().await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    let mut spec = one_token("billing-token");
    spec["keyRotation"] = json!({"interval": "1h"});
    spec["deletionPolicy"] = json!("Orphan");
    world.service_user("billing", spec).await.expect("accepted");
    let object = rotated(&world, "billing", "True", "KeyRotationOnSchedule").await;
    world
        .issuer
        .fault(json!({"path": "/oauth/v2/token", "status": 503}))
        .await;
    world.delete("billing").await;
    gone(&world, &object).await;
    assert_eq!(key_ids(&world, &user).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn new_bootstrap_key_of_the_same_user_is_not_used() {
    let world = World::new("rotation-second").await;
    let _operator = world.rotating_operator().await;
    world.instance().await;
    let user = rotating(&world, "billing", json!({"interval": "1h", "overlap": "10s"})).await;
    let object = rotated(&world, "billing", "True", "KeyRotationOnSchedule").await;
    let (_, file) = world.issuer.key(&user.id, json!({})).await;
    let version = object.metadata.resource_version.clone();
    world.secret("billing-key", json!({"key.json": file})).await;
    world.renew("billing").await;
    let again = world
        .user_until("billing", |u| {
            u.metadata.resource_version != version
                && u.status
                    .as_ref()
                    .is_some_and(|s| s.last_handled_renew_request.as_deref() == Some("now"))
        })
        .await;
    assert_eq!(key_id(&again), key_id(&object));
    // A person keeps it for the case that the operator's keys are lost, so it is not foreign.
    rotate(&world, "billing", "1").await;
    world
        .user_until("billing", |user| {
            let status = user.status.as_ref().and_then(|status| status.key_rotation.as_ref());
            status.and_then(|status| status.foreign_credentials) == Some(0)
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replacement_without_rotation_and_finalizer_hands_the_key_back() {
    let world = World::new("rotation-replaced").await;
    let _operator = world.rotating_operator().await;
    world.instance().await;
    let user = rotating(&world, "billing", json!({"interval": "1h"})).await;
    let mut object = rotated(&world, "billing", "True", "KeyRotationOnSchedule").await;
    // `kubectl replace` with a manifest that has neither.
    object.spec.key_rotation = None;
    object.metadata.finalizers = None;
    object.metadata.managed_fields = None;
    let replaced = world.users().replace("billing", &PostParams::default(), &object).await;
    replaced.expect("replaced");
    eventually("only the bootstrap key remains", async || {
        key_ids(&world, &user).await == std::slice::from_ref(&user.key_id) && world.ledger(&object).await.is_none()
    })
    .await;
    world
        .user_until("billing", |u| !has_finalizer(u) && key_id(u) == user.key_id)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operator_of_other_instances_does_not_touch_an_object_that_is_being_deleted() {
    let world = World::new("rotation-others").await;
    let operator = world.rotating_operator().await;
    world.instance().await;
    rotating(&world, "billing", json!({"interval": "1h"})).await;
    let object = rotated(&world, "billing", "True", "KeyRotationOnSchedule").await;
    operator.terminate().await;
    // It serves no instance of this world, and knows no namespace of its own.
    let other = World::new("rotation-other").await;
    let _other = other.operator().await;
    let uid = object.metadata.uid.clone().expect("a UID");
    world.annotate("billing", "abandon", &uid).await;
    let before = world.users().delete("billing", &DeleteParams::default()).await;
    let before = before.expect("accepted").left().expect("it waits");
    other.instance().await;
    other.simple("sentinel", json!({"tokenType": "JWT"})).await;
    other.ready("sentinel", "True", "Issued").await;
    let after = world.users().get("billing").await.expect("still there");
    assert_eq!(after.metadata.resource_version, before.metadata.resource_version);
    let _operator = world.rotating_operator().await;
    gone(&world, &object).await;
}
