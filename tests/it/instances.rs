//! Instances: how the operator connects to ZITADEL, and the status of the instance.

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use zitadel_tokens::api::{ZitadelInstance, ZitadelServiceUser};

use crate::support::SOON;
use crate::support::issuer::Issuer;
use crate::support::operator::Operator;
use crate::support::world::{World, condition, one_token, until};

#[tokio::test(flavor = "multi_thread")]
async fn private_ca_is_accepted_inline_from_a_config_map_and_from_a_secret() {
    let world = World::with_issuer("ca", Issuer::start(&["--tls"])).await;
    let home = format!("{}-home", world.name);
    world.namespace(&home).await;
    let flags = ["--namespace", &home];
    let _operator = Operator::start_with(&world.cluster.kubeconfig, &world.selector(), &flags).await;
    let connect = async |connection: Value| {
        let mut spec = world.instance_spec();
        spec["connection"] = connection;
        world.apply_instance(spec).await.expect("an instance");
    };
    connect(json!({})).await;
    world.instance_ready("False", "TLSFailure").await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "False", "TLSFailure").await;

    connect(json!({"caBundle": world.issuer.ca})).await;
    world.instance_ready("True", "InstanceReady").await;
    world.ready("billing", "True", "Issued").await;

    // The operator reads the referenced object in its own namespace. The object may be created later.
    connect(json!({"caConfigMapRef": {"name": "zitadel-ca"}})).await;
    world.instance_ready("False", "CABundleUnusable").await;
    let apply = PatchParams::apply("tests").force();
    let config_map = |pem: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "zitadel-ca"}, "data": {"ca.crt": pem}});
    let config_maps: Api<ConfigMap> = Api::namespaced(world.client.clone(), &home);
    config_maps
        .patch("zitadel-ca", &apply, &Patch::Apply(&config_map("no certificate")))
        .await
        .expect("written");
    world.instance_ready("False", "CABundleUnusable").await;
    config_maps
        .patch("zitadel-ca", &apply, &Patch::Apply(&config_map(&world.issuer.ca)))
        .await
        .expect("written");
    world.instance_ready("True", "InstanceReady").await;

    let secrets: Api<Secret> = Api::namespaced(world.client.clone(), &home);
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "zitadel-ca"}, "stringData": {"root.pem": world.issuer.ca}});
    secrets
        .patch("zitadel-ca", &apply, &Patch::Apply(&secret))
        .await
        .expect("written");
    connect(json!({"caSecretRef": {"name": "zitadel-ca", "key": "root.pem"}})).await;
    world.instance_ready("True", "InstanceReady").await;
    // A changed connection costs no token request.
    assert_eq!(world.issuer.mints().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_server_name_may_differ_from_the_endpoint_host() {
    let world = World::with_issuer("sni", Issuer::start(&["--tls"])).await;
    let _operator = world.operator().await;
    let port = world.issuer.url.rsplit(':').next().expect("a port").to_owned();
    let mut spec = world.instance_spec();
    // The same server listens on 127.0.0.2, but its certificate does not contain this address.
    spec["connection"] = json!({"caBundle": world.issuer.ca, "endpoint": format!("https://127.0.0.2:{port}")});
    world.apply_instance(spec.clone()).await.expect("an instance");
    let refused = until(
        Api::<ZitadelInstance>::all(world.client.clone()),
        &world.instance,
        SOON,
        |i| i.status.iter().flat_map(|s| &s.conditions).any(|c| c.status == "False"),
    );
    let reason = refused.await.status.expect("a status").conditions[0].reason.clone();
    assert!(
        ["TLSFailure", "InstanceUnreachable"].contains(&reason.as_str()),
        "{reason}"
    );

    spec["connection"] = json!({
        "caBundle": world.issuer.ca, "endpoint": format!("https://127.0.0.1:{port}"), "tlsServerName": "zitadel.zitadel.svc",
    });
    world.apply_instance(spec).await.expect("an instance");
    world.instance_ready("True", "InstanceReady").await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "True", "Issued").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn instance_status_shows_an_outage_and_its_end() {
    let world = World::new("seen").await;
    let _operator = world.operator().await;
    world.instance().await;
    world.instance_ready("True", "InstanceReady").await;
    for path in ["/.well-known/openid-configuration", "/oauth/v2/token"] {
        world.issuer.fault(json!({"path": path, "status": 503})).await;
    }
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "False", "ServerError").await;
    world.instance_ready("False", "ServerError").await;
    world.issuer.clear_faults().await;
    world.instance_ready("True", "InstanceReady").await;
    world.ready("billing", "True", "Issued").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pinned_project_id_mismatch_stops_token_requests() {
    let world = World::new("pinned").await;
    let _operator = world.operator().await;
    world
        .issuer
        .settings(json!({"zitadelProjectId": "401085856582077478"}))
        .await;
    let mut spec = world.instance_spec();
    spec["zitadelProjectID"] = json!("999");
    world.apply_instance(spec.clone()).await.expect("an instance");
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "False", "ProjectIDMismatch").await;
    world.instance_ready("False", "ProjectIDMismatch").await;
    assert_eq!(world.issuer.mints().await, 0);

    spec["zitadelProjectID"] = json!("401085856582077478");
    world.apply_instance(spec).await.expect("an instance");
    world.ready("billing", "True", "Issued").await;
    world.instance_ready("True", "InstanceReady").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn service_user_in_the_operator_namespace_is_refused() {
    let world = World::new("home").await;
    world.instance().await;
    let flags = ["--namespace", &world.name];
    let _operator = Operator::start_with(&world.cluster.kubeconfig, &world.selector(), &flags).await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "False", "OperatorNamespace").await;
    assert_eq!(world.issuer.mints().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn operator_ignores_service_users_of_unselected_instances() {
    let world = World::new("mine").await;
    let _operator = world.operator().await;
    world.instance().await;
    let mut elsewhere = one_token("other-token");
    elsewhere["instanceRef"] = json!({"name": "another-operators"});
    elsewhere["keySecretRef"] = json!({"name": "other-key"});
    world.service_user("other", elsewhere).await.expect("accepted");
    world.sentinel().await;
    let other = world.users().get("other").await.expect("there");
    assert_eq!(other.status.expect("the default").observed_generation, Some(-1));
}

#[tokio::test(flavor = "multi_thread")]
async fn field_selectors_find_service_users_by_instance_and_key_secret() {
    let world = World::new("select").await;
    for name in ["one", "two"] {
        world
            .service_user(name, one_token(&format!("{name}-token")))
            .await
            .expect("accepted");
    }
    for (selector, found) in [
        (format!("spec.instanceRef.name={}", world.instance), 2),
        ("spec.instanceRef.name=other".to_owned(), 0),
        ("spec.keySecretRef.name=two-key".to_owned(), 1),
    ] {
        let list = world
            .users()
            .list(&kube::api::ListParams::default().fields(&selector))
            .await
            .expect("listed");
        assert_eq!(list.items.len(), found, "{selector}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn suspended_instance_gets_no_token_request_and_deletions_go_on() {
    let world = World::new("suspended-instance").await;
    let _operator = world.rotating_operator().await;
    world.instance().await;
    let suspend = async |suspend: bool| {
        let mut spec = world.instance_spec();
        spec["suspend"] = json!(suspend);
        world.apply_instance(spec).await.expect("an instance");
    };
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    let token = world.token("billing-token").await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("orders-key", &user).await;
    let mut spec = one_token("orders-token");
    spec["keyRotation"] = json!({"interval": "1h"});
    world.service_user("orders", spec).await.expect("accepted");
    let rotated = |user: &ZitadelServiceUser| condition(user, "KeyRotated").is_some_and(|(s, _, _)| s == "True");
    world.user_until("orders", rotated).await;

    suspend(true).await;
    world.instance_ready("True", "Suspended").await;
    world.renew("billing").await;
    let paused = |user: &ZitadelServiceUser| {
        condition(user, "UpToDate").is_some_and(|(s, r, _)| (s, r) == ("Unknown", "Suspended"))
    };
    world.user_until("billing", paused).await;
    assert_eq!(world.token("billing-token").await, token);
    assert_eq!(world.issuer.mints().await, 2);
    world.delete("orders").await;
    world.user_gone("orders").await;
    let keys = world.issuer.keys(&user.id).await;
    assert_eq!(keys.into_iter().map(|key| key.id).collect::<Vec<_>>(), [user.key_id]);

    suspend(false).await;
    world.secret_until("billing-token", |data| data["token"] != token).await;
    world.ready("billing", "True", "Issued").await;
}
