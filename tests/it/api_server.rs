//! Failures between the operator and the API server lose no token and cost no extra token request.

use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, RoleBinding};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::config::Kubeconfig;
use kube::{Api, Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::support::cluster::{Cluster, install_crds};
use crate::support::operator::Operator;
use crate::support::proxy::Proxy;
use crate::support::world::{World, data, one_token};
use crate::support::{eventually, next_second};

#[tokio::test(flavor = "multi_thread")]
async fn api_server_errors_cause_retries_but_no_extra_token_requests() {
    let world = World::new("errors").await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let _operator = Operator::start_with(&proxy.kubeconfig, &world.selector(), &[]).await;
    world.instance().await;
    let errors = [
        ("GET", "/secrets/{}-token", 500, 2),
        ("GET", "/secrets/{}-key", 429, 2),
        ("PATCH", "/secrets/{}-token", 500, 2),
        ("PATCH", "/secrets/{}-token", 429, 1),
        ("PATCH", "/secrets/{}-token", 409, 1),
        ("PUT", "/zitadelserviceusers/{}/status", 500, 2),
        ("PUT", "/zitadelserviceusers/{}/status", 409, 1),
        // A 404 may come from a proxy, or for a kind that the API server does not serve at the moment. It says nothing
        // about the object.
        ("PUT", "/zitadelserviceusers/{}/status", 404, 2),
        ("GET", "/zitadelserviceusers/{}", 404, 2),
        ("GET", "/secrets/{}-token", 404, 1),
        ("GET", "/secrets/{}-key", 404, 1),
        ("PATCH", "/secrets/{}-token", 404, 1),
        ("POST", "/events", 500, 3),
    ];
    for (i, (method, path, code, times)) in errors.into_iter().enumerate() {
        let name = format!("user-{i}");
        proxy.answer(method, &path.replace("{}", &name), code, times);
        world.simple(&name, json!({"tokenType": "JWT"})).await;
    }
    for (i, errors) in errors.iter().enumerate() {
        let user = world.ready(&format!("user-{i}"), "True", "Issued").await;
        let expires_at = user.status.and_then(|s| s.expires_at).expect("an expiry").0.to_string();
        let secret = world.secrets().get(&format!("user-{i}-token")).await.expect("a Secret");
        assert_eq!(data(&secret)["expires_at"], expires_at, "{errors:?}");
    }
    assert!(proxy.answered());
    assert_eq!(world.issuer.mints().await, errors.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn forbidden_secrets_in_one_namespace_do_not_affect_others() {
    let world = World::new("forbidden").await;
    let other = World::beside(&world, "other").await;
    let kubeconfig = account(&world, &[&world.name]).await;
    let _operator = Operator::start_with(&kubeconfig, &world.selector(), &[]).await;
    world.instance_for_all().await;
    other.simple("billing", json!({"tokenType": "JWT"})).await;
    other.ready("billing", "False", "SecretsForbidden").await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "True", "Issued").await;

    // No event reports the new permission. The operator retries.
    bind(&other, &world.name).await;
    other.ready("billing", "True", "Issued").await;
    assert_eq!(world.issuer.mints().await, 2);
}

/// The watch of Secrets reports that garbage collection deleted the token Secret. No watch reports the deleted object.
#[tokio::test(flavor = "multi_thread")]
async fn object_deleted_while_its_watch_is_down_costs_at_most_one_token_request() {
    let world = World::new("deaf").await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let mut operator = Operator::start_with(&proxy.kubeconfig, &world.selector(), &[]).await;
    world.instance().await;
    for name in ["billing", "witness"] {
        world.simple(name, json!({"tokenType": "JWT"})).await;
        world.ready(name, "True", "Issued").await;
    }
    next_second().await;
    proxy.refuse("/v1alpha1/zitadelserviceusers?");
    let deleted = world.users().delete("billing", &DeleteParams::default()).await;
    deleted.expect("deleted");
    // The test deletes the Secret as garbage collection does, which may have been faster.
    let _ = world.secrets().delete("billing-token", &DeleteParams::default()).await;
    operator
        .await_line("INFO zitadel_tokens::controller::service_user::gather: the service user no longer exists")
        .await;
    let mints = world.issuer.mints().await;
    assert!(mints <= 3, "{mints}");
    let _ = world.secrets().delete("billing-token", &DeleteParams::default()).await;
    // The second repair of another Secret starts long after any reconcile that the deletion could have started.
    for _ in 0..2 {
        world
            .edit_secret("witness-token", json!({"stringData": {"token": "edited"}}))
            .await;
        world.secret_until("witness-token", |d| d["token"] != "edited").await;
    }
    assert_eq!(world.issuer.mints().await, mints + 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_finishes_the_token_request_in_flight_and_starts_no_other() {
    let world = World::new("drain").await;
    let operator = world.operator().await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    let late =
        json!({"path": "/oauth/v2/token", "scopeContains": "openid", "afterHandling": true, "latencyMillis": 3000});
    world.issuer.fault(late).await;
    let mut spec = one_token("first-token");
    let second = json!({"name": "second", "projectIDs": ["2"], "secret": {"name": "second-token"}});
    spec["tokens"].as_array_mut().expect("a list").push(second);
    world.service_user("billing", spec).await.expect("accepted");
    eventually("the first token request is in flight", async || {
        world.issuer.mints().await == 1
    })
    .await;
    operator.terminate().await;
    world.token("first-token").await;
    assert_eq!(world.issuer.mints().await, 1);

    world.issuer.clear_faults().await;
    let _operator = world.operator().await;
    world.ready("billing", "True", "Issued").await;
    assert_eq!(world.issuer.mints().await, 2);
}

/// At shutdown, the operator waits for a request to ZITADEL and for the write of its token: 2 s and 5 s here. Without
/// shutdown, the write would time out after 15 s.
#[tokio::test(flavor = "multi_thread")]
async fn shutdown_does_not_wait_for_a_hanging_write() {
    let world = World::new("endless").await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let operator = Operator::start_with(&proxy.kubeconfig, &world.selector(), &[]).await;
    let mut spec = world.instance_spec();
    spec["connection"]["timeout"] = json!("2s");
    world.apply_instance(spec).await.expect("an instance");
    // After this first write, the operator does not test with a dry run whether writes to the namespace succeed.
    world.simple("first", json!({"tokenType": "JWT"})).await;
    world.token("first-token").await;
    proxy.lose("PATCH", "/secrets/billing-token");
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    eventually("the write is in flight", async || world.issuer.mints().await == 2).await;
    let began = Instant::now();
    operator.terminate().await;
    assert!(began.elapsed() < Duration::from_secs(14), "{:?}", began.elapsed());
    proxy.find();
}

/// Sets the schema version that an installed CRD states.
async fn set_schema_version(client: &Client, version: &Value) {
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    let change = json!({"metadata": {"annotations": {"zitadel-tokens.dev/schema-version": version}}});
    let name = "zitadelaccesspolicies.zitadel-tokens.dev";
    let params = PatchParams::default();
    crds.patch(name, &params, &Patch::Merge(&change))
        .await
        .expect("patched");
}

#[tokio::test(flavor = "multi_thread")]
async fn operator_waits_until_the_crds_are_as_new_as_itself() {
    let cluster = Cluster::start();
    let client = cluster.client().await;
    install_crds(&client).await;
    for outdated in [json!("0"), json!(null)] {
        set_schema_version(&client, &outdated).await;
        let mut operator = Operator::spawn(&cluster.kubeconfig, "", &[], &[]);
        operator.await_line("the CRD is older than this operator version").await;
        assert_eq!(operator.get("/livez").await.0, 200);
        assert_eq!(operator.get("/readyz").await.0, 503);
        set_schema_version(&client, &json!("99")).await;
        operator.await_line("watching").await;
        operator.terminate().await;
    }
}

/// A kubeconfig of a service account with the operator's permissions, but with access to Secrets only in these
/// namespaces.
async fn account(world: &World, namespaces: &[&str]) -> std::path::PathBuf {
    let name = &world.name;
    let may = |group: &str, resources: Value, verbs: Value| json!({"apiGroups": [group], "resources": resources, "verbs": verbs});
    let ours = "zitadel-tokens.dev";
    let everywhere = json!({"metadata": {"name": name}, "rules": [
        may(ours, json!(["zitadelinstances", "zitadelaccesspolicies", "zitadelserviceusers"]), json!(["get", "list", "watch"])),
        may(ours, json!(["zitadelinstances/status", "zitadelserviceusers/status"]), json!(["update"])),
        may("", json!(["namespaces", "secrets"]), json!(["list", "watch"])),
        may("events.k8s.io", json!(["events"]), json!(["create", "patch"])),
    ]});
    let here = json!({"metadata": {"name": format!("{name}-secrets")}, "rules": [
        may("", json!(["secrets"]), json!(["get", "create", "patch", "delete"])),
    ]});
    create::<ClusterRole>(Api::all(world.client.clone()), everywhere).await;
    create::<ClusterRole>(Api::all(world.client.clone()), here).await;
    let subject = json!([{"kind": "ServiceAccount", "name": name, "namespace": name}]);
    let role = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name});
    let binding = json!({"metadata": {"name": name}, "subjects": subject, "roleRef": role});
    create::<ClusterRoleBinding>(Api::all(world.client.clone()), binding).await;
    for namespace in namespaces {
        assert_eq!(*namespace, world.name);
        bind(world, name).await;
    }
    let accounts: Api<ServiceAccount> = Api::namespaced(world.client.clone(), name);
    create(accounts.clone(), json!({"metadata": {"name": name}})).await;
    let request: TokenRequest = serde_json::from_value(json!({"spec": {"audiences": []}})).expect("a request");
    let token = accounts
        .create_token_request(name, &PostParams::default(), &request)
        .await
        .expect("a token");
    let mut config = Kubeconfig::read_from(&world.cluster.kubeconfig).expect("a kubeconfig");
    let info = config.auth_infos[0].auth_info.as_mut().expect("a user");
    info.token = Some(token.status.expect("a status").token.into());
    let path = std::path::Path::new(world.cluster.ready["dir"].as_str().expect("a folder"))
        .join(format!("{name}.account.kubeconfig"));
    std::fs::write(&path, serde_json::to_string(&config).expect("JSON")).expect("written");
    path
}

/// Allows the account to read and write Secrets in this world's namespace.
async fn bind(world: &World, account: &str) {
    let subject = json!([{"kind": "ServiceAccount", "name": account, "namespace": account}]);
    let role =
        json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": format!("{account}-secrets")});
    let binding = json!({"metadata": {"name": "operator"}, "subjects": subject, "roleRef": role});
    create::<RoleBinding>(Api::namespaced(world.client.clone(), &world.name), binding).await;
}

async fn create<K>(api: Api<K>, object: Value) -> K
where
    K: Resource + Clone + std::fmt::Debug + Serialize + DeserializeOwned,
{
    let object = serde_json::from_value(object).expect("an object");
    api.create(&PostParams::default(), &object).await.expect("created")
}
