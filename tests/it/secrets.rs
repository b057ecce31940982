//! The token Secret: ownership, changes by other clients, and that the operator takes over no foreign Secret.

use k8s_openapi::api::core::v1::{ResourceQuota, Secret};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::support::world::{World, claims, condition, one_token, until};
use crate::support::{SOON, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn foreign_secret_created_just_before_the_write_is_not_taken_over() {
    let world = World::new("race").await;
    let _operator = world.operator().await;
    world.instance().await;
    world.simple("first", json!({"tokenType": "JWT"})).await;
    world.token("first-token").await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    // The server delays its answer, and the test creates the Secret after the operator has seen that none exists.
    let slow = json!({"path": "/oauth/v2/token", "userId": user.id, "times": 1, "latencyMillis": 3000});
    world.issuer.fault(slow).await;
    world
        .service_user("billing", one_token("billing-token"))
        .await
        .expect("accepted");
    eventually("the token request is in flight", async || {
        world.issuer.requests().await.iter().any(|r| r.user_id == user.id)
    })
    .await;
    world.secret("billing-token", json!({"password": "theirs"})).await;
    let before = world.secrets().get("billing-token").await.expect("there");

    world.ready("billing", "False", "SecretConflict").await;
    let after = world.secrets().get("billing-token").await.expect("there");
    assert_eq!(before.metadata.resource_version, after.metadata.resource_version);

    // After the foreign Secret is deleted, the operator writes the token that it already has.
    world
        .secrets()
        .delete("billing-token", &DeleteParams::default())
        .await
        .expect("deleted");
    world.ready("billing", "True", "Issued").await;
    assert_eq!(world.issuer.mints().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn immutable_secrets_and_secrets_of_another_type_stay_unchanged() {
    let world = World::new("kinds").await;
    let _operator = world.operator().await;
    world.instance().await;
    let adopt = json!({"zitadel-tokens.dev/adopt": "billing"});
    for (name, kind, immutable) in [("typed", "example.com/other", false), ("frozen", "Opaque", true)] {
        let object = json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "annotations": adopt},
            "type": kind, "immutable": immutable, "stringData": {"a": "b"},
        });
        world
            .secrets()
            .patch(name, &PatchParams::apply("tests"), &Patch::Apply(&object))
            .await
            .expect("a Secret");
    }
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    for name in ["typed", "frozen"] {
        world.service_user("billing", one_token(name)).await.expect("accepted");
        let object = world.ready("billing", "False", "SecretConflict").await;
        assert_eq!(object.status.expect("a status").tokens[0].secret_name, name);
    }
    assert_eq!(world.issuer.mints().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn retained_secret_outlives_its_object() {
    let world = World::new("retain").await;
    let _operator = world.operator().await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    let mut spec = one_token("billing-token");
    spec["tokens"][0]["secret"]["deletionPolicy"] = json!("Retain");
    world.service_user("billing", spec).await.expect("accepted");
    let token = world.token("billing-token").await;
    world.ready("billing", "True", "Issued").await;
    let secret = world.secrets().get("billing-token").await.expect("there");
    assert_eq!(secret.metadata.owner_references, None);

    // A change of deletionPolicy in either direction changes only the owner reference and costs no token request.
    world
        .service_user("billing", one_token("billing-token"))
        .await
        .expect("accepted");
    until(world.secrets(), "billing-token", SOON, |s: &Secret| {
        s.metadata.owner_references.is_some()
    })
    .await;
    let mut spec = one_token("billing-token");
    spec["tokens"][0]["secret"]["deletionPolicy"] = json!("Retain");
    world.service_user("billing", spec).await.expect("accepted");
    until(world.secrets(), "billing-token", SOON, |s: &Secret| {
        s.metadata.owner_references.is_none()
    })
    .await;
    assert_eq!(world.token("billing-token").await, token);
    assert_eq!(world.issuer.mints().await, 1);

    // The Secret of a second object has an owner. Its deletion shows that garbage collection has run.
    world.simple("witness", json!({"tokenType": "JWT"})).await;
    world.token("witness-token").await;
    for name in ["billing", "witness"] {
        world
            .users()
            .delete(name, &DeleteParams::default())
            .await
            .expect("deleted");
    }
    world.secret_gone("witness-token").await;
    assert_eq!(world.token("billing-token").await, token);
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_the_secret_in_a_loop_costs_few_token_requests() {
    let world = World::new("contest").await;
    let _operator = world.operator().await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.token("billing-token").await;
    for _ in 0..3 {
        let old = world.secrets().get("billing-token").await.expect("there").metadata.uid;
        world
            .secrets()
            .delete("billing-token", &DeleteParams::default())
            .await
            .expect("deleted");
        until(world.secrets(), "billing-token", SOON, |s: &Secret| {
            s.metadata.uid != old
        })
        .await;
    }
    world
        .secrets()
        .delete("billing-token", &DeleteParams::default())
        .await
        .expect("deleted");
    let object = world.ready("billing", "False", "SecretContested").await;
    assert!(
        condition(&object, "Ready")
            .expect("a condition")
            .2
            .contains("audit log")
    );
    assert_eq!(world.issuer.mints().await, 4);
}

/// Creates a service user whose token the operator writes. From then on, the operator does not test by a dry run
/// whether writes to the namespace succeed.
async fn first(world: &World) {
    world.simple("first", json!({"tokenType": "JWT"})).await;
    world.ready("first", "True", "Issued").await;
}

/// A quota `full` that leaves room for no further Secret.
async fn no_more_secrets(world: &World) -> Api<ResourceQuota> {
    let quotas = Api::namespaced(world.client.clone(), &world.name);
    let quota = json!({"metadata": {"name": "full"}, "spec": {"hard": {"secrets": "1"}}});
    let quota = serde_json::from_value(quota).expect("a quota");
    quotas.create(&PostParams::default(), &quota).await.expect("created");
    quotas
}

/// Creates the service user `billing`, whose token Secret a quota refuses, and waits until its status says so.
async fn refused_by_a_quota(world: &World) -> Api<ResourceQuota> {
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    let quotas = no_more_secrets(world).await;
    world
        .service_user("billing", one_token("billing-token"))
        .await
        .expect("accepted");
    let object = world.ready("billing", "False", "SecretWriteFailed").await;
    let (_, _, message) = condition(&object, "Ready").expect("a condition");
    assert!(message.contains("refused by ResourceQuota `full`"), "{message}");
    quotas
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_write_is_retried_without_another_token_request() {
    let world = World::new("quota").await;
    let _operator = world.operator().await;
    world.instance().await;
    first(&world).await;
    let quotas = refused_by_a_quota(&world).await;
    let writes = || {
        world
            .cluster
            .audit
            .requests(&world.name)
            .iter()
            .filter(|r| r.verb == "patch" && r.name == "billing-token")
            .count()
    };
    eventually("the operator retries the write", async || writes() >= 3).await;
    assert_eq!(world.issuer.mints().await, 2);
    quotas.delete("full", &DeleteParams::default()).await.expect("deleted");
    world.ready("billing", "True", "Issued").await;
    assert_eq!(world.issuer.mints().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn namespace_without_room_for_secrets_costs_no_token_request() {
    let world = World::new("full").await;
    let _operator = world.operator().await;
    world.instance().await;
    let quotas = refused_by_a_quota(&world).await;
    assert_eq!(world.issuer.mints().await, 0);
    quotas.delete("full", &DeleteParams::default()).await.expect("deleted");
    world.ready("billing", "True", "Issued").await;
    assert_eq!(world.issuer.mints().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn operator_stops_repairing_against_a_conflicting_writer() {
    let world = World::new("fight").await;
    let _operator = world.operator().await;
    world.instance().await;
    world.simple("label", json!({"tokenType": "JWT"})).await;
    world.token("label-token").await;
    let ours = "zitadel-tokens.dev/service-user";
    for _ in 0..3 {
        world
            .edit_secret("label-token", json!({"metadata": {"labels": {ours: "theirs"}}}))
            .await;
        let repaired = |s: &Secret| s.metadata.labels.as_ref().is_some_and(|l| l[ours] == "label");
        until(world.secrets(), "label-token", SOON, repaired).await;
    }
    world
        .edit_secret("label-token", json!({"metadata": {"labels": {ours: "theirs"}}}))
        .await;
    // The token in the Secret is still valid.
    world.ready("label", "True", "SecretContested").await;
    assert_eq!(world.issuer.mints().await, 1);

    // Another client restores an expired token with its record, as a backup or sync tool does.
    let user = world
        .simple("old", json!({"tokenType": "JWT", "lifetimeSeconds": 7}))
        .await;
    world.token("old-token").await;
    let backup = world.secrets().get("old-token").await.expect("there");
    let stale = crate::support::world::data(&backup)["expires_at"].clone();
    world
        .issuer
        .change_user(&user.id, json!({"lifetimeSeconds": 3600}))
        .await;
    world.secret_until("old-token", |d| d["expires_at"] != stale).await;
    let restored = json!({"data": backup.data, "metadata": {"annotations": backup.metadata.annotations}});
    let deadline = std::time::Instant::now() + SOON;
    loop {
        let reason = world
            .users()
            .get("old")
            .await
            .expect("there")
            .status
            .and_then(|s| s.tokens.first()?.reason.clone());
        if reason.as_deref() == Some("SecretContested") {
            break;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "the operator did not stop: {reason:?}"
        );
        world.edit_secret("old-token", restored.clone()).await;
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    }
    assert!(
        world.issuer.mints().await <= 1 + 2 + 5,
        "{} mints",
        world.issuer.mints().await
    );
}

/// Before the next token request, the operator tests by a dry run whether the write would succeed.
#[tokio::test(flavor = "multi_thread")]
async fn expired_unwritten_token_is_not_replaced_while_the_write_is_refused() {
    let world = World::new("room").await;
    let operator = world.operator().await;
    world.instance().await;
    first(&world).await;
    let fields = json!({"tokenType": "JWT", "lifetimeSeconds": 8});
    let user = world.issuer.user(fields).await;
    world.key_secret("billing-key", &user).await;
    let quotas = no_more_secrets(&world).await;
    world
        .service_user("billing", one_token("billing-token"))
        .await
        .expect("accepted");
    world.ready("billing", "False", "SecretWriteFailed").await;
    let first = world.issuer.requests().await;
    let first = first.iter().rfind(|r| !r.access_token.is_empty()).expect("a token");
    let exp = claims(&first.access_token)["exp"].as_i64().expect("exp");
    let past = |text: &str| text.parse::<Timestamp>().is_ok_and(|at| at.as_second() > exp);
    eventually("the operator retries after the first token has expired", async || {
        let log = operator.log();
        let tried = log
            .iter()
            .filter(|l| l.contains("token reconciled") && l.contains("SecretWriteFailed"));
        tried.into_iter().any(|l| past(l.split(' ').next().unwrap_or_default()))
    })
    .await;
    assert_eq!(world.issuer.mints().await, 2);
    world
        .issuer
        .change_user(&user.id, json!({"lifetimeSeconds": 600}))
        .await;
    quotas.delete("full", &DeleteParams::default()).await.expect("deleted");
    world.renew("billing").await;
    world.ready("billing", "True", "Issued").await;
    assert_eq!(world.issuer.mints().await, 3);
}

/// A token is requested once per lifetime, also if the name of its Secret changes.
#[tokio::test(flavor = "multi_thread")]
async fn renaming_the_secret_moves_the_token_without_a_token_request() {
    let world = World::new("rename").await;
    let _operator = world.operator().await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    let token = world.token("billing-token").await;
    let rename = async |name: &str| {
        let mut spec = one_token(name);
        spec["keySecretRef"] = json!({"name": "billing-key"});
        world.service_user("billing", spec).await.expect("accepted");
    };
    let mut before = "billing-token".to_owned();
    for i in 0..6 {
        let name = format!("renamed-{i}");
        rename(&name).await;
        assert_eq!(world.token(&name).await, token);
        world.secret_gone(&before).await;
        before = name;
    }
    // The new name is that of a foreign Secret: the operator keeps the old Secret.
    world.secret("foreign", json!({"password": "theirs"})).await;
    rename("foreign").await;
    world.ready("billing", "False", "SecretConflict").await;
    assert_eq!(world.token(&before).await, token);
    rename("last").await;
    assert_eq!(world.token("last").await, token);
    world.secret_gone(&before).await;
    assert_eq!(world.issuer.mints().await, 1);
}
