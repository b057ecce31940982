//! Who may have which token: closed by default, and nobody's Secret is taken over.

use std::collections::BTreeSet;

use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::support::world::{PROJECT, World, condition, one_token};

#[tokio::test(flavor = "multi_thread")]
async fn without_a_rule_there_is_no_token() {
    let world = World::new("closed").await;
    let _operator = world.operator().await;
    let mut spec = world.instance_spec();
    spec["access"] = json!([{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "elsewhere"}}, "projectIds": ["*"]}]);
    world.apply_instance(spec.clone()).await.expect("an instance");
    world.simple("billing", json!({"tokenType": "JWT"})).await;

    let object = world.ready("billing", "False", "AccessDenied").await;
    assert!(
        condition(&object, "Ready").expect("a condition").2.contains("`main`"),
        "the message names the token"
    );
    assert_eq!(condition(&object, "Reconciling").map(|c| c.0), Some("True"));
    assert!(
        world
            .secrets()
            .get_opt("billing-token")
            .await
            .expect("readable")
            .is_none()
    );
    assert!(
        world
            .issuer
            .requests()
            .await
            .iter()
            .all(|r| r.path != "/oauth/v2/token"),
        "no assertion was sent"
    );

    // A rule arrives.
    spec["access"] = json!([{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": world.name}}, "projectIds": [PROJECT]}]);
    world.apply_instance(spec.clone()).await.expect("an instance");
    let token = world.token("billing-token").await;
    world.ready("billing", "True", "Issued").await;

    // It goes again: the token stays to its expiry, the object is not Ready.
    spec["access"] = json!([]);
    world.apply_instance(spec).await.expect("an instance");
    world.ready("billing", "False", "AccessDenied").await;
    assert_eq!(world.token("billing-token").await, token);
    assert_eq!(world.issuer.mints().await, 1);
    let told = BTreeSet::from(["Normal Issued".to_owned(), "Warning AccessDenied".to_owned()]);
    assert_eq!(world.events("billing").await, told);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_zitadel_api_is_not_had_by_its_number() {
    let world = World::new("number").await;
    let _operator = world.operator().await;
    world
        .issuer
        .settings(json!({"zitadelProjectId": "401085856582077478"}))
        .await;
    let mut spec = world.instance_spec();
    spec["access"][0]["zitadelApi"] = json!(false);
    world.apply_instance(spec).await.expect("an instance");
    let user = world.issuer.user(json!({"tokenType": "BEARER"})).await;
    world.key_secret("sly-key", &user).await;
    let sly =
        json!({"tokens": [{"name": "main", "projectIds": ["401085856582077478"], "secret": {"name": "sly-token"}}]});
    world.service_user("sly", sly).await.expect("accepted");

    world.ready("sly", "False", "AccessDenied").await;
    assert_eq!(world.issuer.mints().await, 0);
    let instance = crate::support::world::until(
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
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_secret_is_never_touched_unless_it_asks_for_it() {
    let world = World::new("foreign").await;
    let _operator = world.operator().await;
    world.instance().await;
    world.secret("billing-token", json!({"password": "theirs"})).await;
    let before = world.secrets().get("billing-token").await.expect("there");
    world.simple("billing", json!({"tokenType": "JWT"})).await;

    world.ready("billing", "False", "SecretConflict").await;
    let after = world.secrets().get("billing-token").await.expect("there");
    assert_eq!(before.metadata.resource_version, after.metadata.resource_version);
    assert_eq!(world.issuer.mints().await, 0, "what cannot be written is not minted");

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
async fn two_objects_that_want_one_secret() {
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
async fn a_namespace_that_is_relabelled_gains_and_loses_access() {
    let world = World::new("relabel").await;
    let _operator = world.operator().await;
    let mut spec = world.instance_spec();
    // Two rules make a union: one gives the first project, the other the second.
    let rule = |project: &str| json!({"namespaceSelector": {"matchExpressions": [{"key": "team", "operator": "In", "values": [world.name]}]}, "projectIds": [project]});
    spec["access"] = json!([rule("1"), rule("2")]);
    world.apply_instance(spec).await.expect("an instance");
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    let both = json!({"tokens": [{"name": "main", "projectIds": ["1", "2"], "secret": {"name": "billing-token"}}]});
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
    assert_eq!(world.token("billing-token").await, token, "it stays to its expiry");
}
