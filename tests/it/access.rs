//! Access policies and Secret ownership: access is closed by default, and the operator takes over no foreign Secret.

use std::collections::BTreeSet;

use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::json;

use crate::support::world::{PROJECT, World, condition, everything, one_token, until};

#[tokio::test(flavor = "multi_thread")]
async fn access_follows_added_changed_and_deleted_policies() {
    let world = World::new("closed").await;
    let _operator = world.operator().await;
    world.instance().await;
    let here = || world.selector_of_namespace();
    let elsewhere = json!({"matchLabels": {"kubernetes.io/metadata.name": "elsewhere"}});
    world.allow(elsewhere.clone(), everything()).await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;

    let object = world.ready("billing", "False", "AccessDenied").await;
    let (_, reason, message) = condition(&object, "Ready").expect("a condition");
    assert_eq!(reason, "AccessDenied");
    assert!(message.contains("`main`"), "{message}");
    assert!(message.contains(&format!("Denied: {PROJECT}.")), "{message}");
    assert_eq!(condition(&object, "Reconciling").map(|c| c.0), Some("True"));
    let secret = world.secrets().get_opt("billing-token").await.expect("readable");
    assert!(secret.is_none());
    let requests = world.issuer.requests().await;
    assert!(
        requests.iter().all(|r| r.path != "/oauth/v2/token"),
        "no assertion was sent"
    );

    // The policy is changed: first its audiences are wrong, then they are right.
    world.allow(here(), json!({"projectIDs": ["1"]})).await;
    world.ready("billing", "False", "AccessDenied").await;
    world.allow(here(), json!({"projectIDs": [PROJECT]})).await;
    let token = world.token("billing-token").await;
    world.ready("billing", "True", "Issued").await;

    // A policy for another namespace or another instance has no effect here.
    let (other, instance) = (format!("{}-other", world.name), format!("{}-missing", world.name));
    world.policy(&other, elsewhere, everything()).await;
    let missing = World::beside(&world, "missing").await.with_instance(&instance);
    missing.policy(&instance, here(), everything()).await;
    world
        .policies()
        .delete(&world.policy_name(), &DeleteParams::default())
        .await
        .expect("deleted");

    // Without the policy the token stays until it expires, and the object is not Ready.
    world.ready("billing", "False", "AccessDenied").await;
    assert_eq!(world.token("billing-token").await, token);
    assert_eq!(world.issuer.mints().await, 1);
    let events = BTreeSet::from(["Normal Issued".to_owned(), "Warning AccessDenied".to_owned()]);
    assert_eq!(world.events("billing").await, events);

    // A policy that is created again allows the token that is already there.
    world.policy(&other, here(), json!({"projectIDs": [PROJECT]})).await;
    world.ready("billing", "True", "Issued").await;
    assert_eq!(world.token("billing-token").await, token);
    assert_eq!(world.issuer.mints().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn policy_may_precede_its_instance() {
    let world = World::new("early").await;
    let _operator = world.operator().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    // An operator that serves selected instances leaves an object of an unknown instance alone.
    world.instance().await;
    world.ready("billing", "True", "Issued").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn overlapping_policies_form_a_union() {
    let world = World::new("overlap").await;
    let _operator = world.operator().await;
    world.instance().await;
    let second = format!("{}-second", world.name);
    world
        .allow(world.selector_of_namespace(), json!({"projectIDs": ["1", "2"]}))
        .await;
    world
        .policy(&second, json!({}), json!({"projectIDs": ["2", "3"]}))
        .await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    let token = |ids: serde_json::Value| json!({"tokens": [{"name": "main", "projectIDs": ids, "secret": {"name": "billing-token"}}]});
    world
        .service_user("billing", token(json!(["1", "2", "3"])))
        .await
        .expect("accepted");
    world.ready("billing", "True", "Issued").await;

    // An audience that both policies allow stays allowed after one is deleted. An audience that only this one allows
    // does not.
    world
        .policies()
        .delete(&second, &DeleteParams::default())
        .await
        .expect("deleted");
    let object = world.ready("billing", "False", "AccessDenied").await;
    let (_, _, message) = condition(&object, "Ready").expect("a condition");
    assert!(message.contains("Denied: 3."), "{message}");
    world
        .service_user("billing", token(json!(["1", "2"])))
        .await
        .expect("accepted");
    world.ready("billing", "True", "Issued").await;
    assert_eq!(world.issuer.mints().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn project_id_of_the_zitadel_api_needs_the_same_permission_as_the_alias() {
    let world = World::new("number").await;
    let _operator = world.operator().await;
    world
        .issuer
        .settings(json!({"zitadelProjectId": "401085856582077478"}))
        .await;
    world.instance().await;
    world
        .allow(world.selector_of_namespace(), json!({"projectIDs": ["*"]}))
        .await;
    let user = world.issuer.user(json!({"tokenType": "BEARER"})).await;
    world.key_secret("sly-key", &user).await;
    let sly =
        json!({"tokens": [{"name": "main", "projectIDs": ["401085856582077478"], "secret": {"name": "sly-token"}}]});
    world.service_user("sly", sly).await.expect("accepted");

    world.ready("sly", "False", "AccessDenied").await;
    assert_eq!(world.issuer.mints().await, 0);
    let instance = until(
        kube::Api::<zitadel_tokens::api::ZitadelInstance>::all(world.client.clone()),
        &world.name,
        crate::support::SOON,
        |i| i.status.as_ref().is_some_and(|s| s.zitadel_project_id.is_some()),
    )
    .await;
    let status = instance.status.expect("a status");
    assert_eq!(status.zitadel_project_id.as_deref(), Some("401085856582077478"));
    assert_eq!(
        status.token_endpoint,
        Some(format!("{}/oauth/v2/token", world.issuer.url))
    );
    world.allow(world.selector_of_namespace(), everything()).await;
    world.ready("sly", "True", "Issued").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_secret_stays_unchanged_without_the_adopt_annotation() {
    let world = World::new("foreign").await;
    let _operator = world.operator().await;
    world.instance().await;
    world.secret("billing-token", json!({"password": "theirs"})).await;
    let before = world.secrets().get("billing-token").await.expect("there");
    world.simple("billing", json!({"tokenType": "JWT"})).await;

    world.ready("billing", "False", "SecretConflict").await;
    let after = world.secrets().get("billing-token").await.expect("there");
    assert_eq!(before.metadata.resource_version, after.metadata.resource_version);
    assert_eq!(
        world.issuer.mints().await,
        0,
        "the operator requests no token that it cannot write"
    );

    world
        .edit_secret(
            "billing-token",
            json!({"metadata": {"annotations": {"zitadel-tokens.dev/adopt": "billing"}}}),
        )
        .await;
    world.ready("billing", "True", "Issued").await;
    assert_eq!(
        world.secret_until("billing-token", |d| d.contains_key("token")).await["password"],
        "theirs"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn second_object_cannot_take_the_secret_of_the_first() {
    let world = World::new("shared").await;
    let _operator = world.operator().await;
    world.instance().await;
    world.simple("first", json!({"tokenType": "JWT"})).await;
    let token = world.token("first-token").await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("second-key", &user).await;
    world
        .service_user("second", one_token("first-token"))
        .await
        .expect("accepted");

    world.ready("second", "False", "SecretConflict").await;
    assert_eq!(world.token("first-token").await, token);
    world.ready("first", "True", "Issued").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn access_follows_namespace_labels() {
    let world = World::new("relabel").await;
    let _operator = world.operator().await;
    world.instance().await;
    let team = json!({"matchExpressions": [{"key": "team", "operator": "In", "values": [world.name]}]});
    world.allow(team, json!({"projectIDs": ["1", "2"]})).await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    let both = json!({"tokens": [{"name": "main", "projectIDs": ["1", "2"], "secret": {"name": "billing-token"}}]});
    world.service_user("billing", both).await.expect("accepted");
    world.ready("billing", "False", "AccessDenied").await;

    let namespaces: kube::Api<k8s_openapi::api::core::v1::Namespace> = kube::Api::all(world.client.clone());
    let label = |value: serde_json::Value| json!({"metadata": {"labels": {"team": value}}});
    let change = PatchParams::default();
    namespaces
        .patch(&world.name, &change, &Patch::Merge(&label(json!(world.name))))
        .await
        .expect("labelled");
    world.ready("billing", "True", "Issued").await;
    let token = world.token("billing-token").await;
    namespaces
        .patch(&world.name, &change, &Patch::Merge(&label(json!(null))))
        .await
        .expect("labelled");
    world.ready("billing", "False", "AccessDenied").await;
    assert_eq!(
        world.token("billing-token").await,
        token,
        "the token stays until it expires"
    );
}
