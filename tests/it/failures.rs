//! Failures: each has its own reason, and a valid token stays in its Secret.

use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};
use zitadel_tokens::api::ZitadelInstance;

use crate::support::issuer::Issuer;
use crate::support::world::{World, condition, one_token, until};
use crate::support::{EVENTUALLY, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn key_refused_by_older_zitadel_is_distinguished_from_an_outage() {
    let world = World::new("dialect").await;
    let _operator = world.operator().await;
    world.instance().await;
    world.issuer.settings(json!({"dialect": "errors_internal"})).await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.issuer.remove_key(&user.id, &user.key_id).await;
    world.key_secret("old-key", &user).await;
    world
        .service_user("old", one_token("old-token"))
        .await
        .expect("accepted");
    world.ready("old", "False", "KeyRejected").await;

    world
        .issuer
        .fault(json!({"path": "/.well-known/openid-configuration", "status": 503}))
        .await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.issuer.remove_key(&user.id, &user.key_id).await;
    world.key_secret("out-key", &user).await;
    world
        .service_user("out", one_token("out-token"))
        .await
        .expect("accepted");
    world.ready("out", "False", "ServerError").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn old_token_stays_while_refresh_fails() {
    let world = World::new("outage").await;
    let _operator = world.operator().await;
    world.instance().await;
    world
        .simple("billing", json!({"tokenType": "JWT", "lifetimeSeconds": 20}))
        .await;
    let token = world.token("billing-token").await;
    world
        .issuer
        .fault(json!({"path": "/oauth/v2/token", "status": 503}))
        .await;

    // Ready is True because the token is valid. The reason says why its refresh fails.
    let object = world.ready("billing", "True", "ServerError").await;
    assert_eq!(condition(&object, "Stalled"), None);
    assert!(object.status.expect("a status").tokens[0].failing_since.is_some());
    assert_eq!(world.token("billing-token").await, token);
    // The token expires: Ready becomes False, and the Secret stays.
    world.ready("billing", "False", "ServerError").await;
    assert_eq!(world.token("billing-token").await, token);

    world.issuer.clear_faults().await;
    world.ready("billing", "True", "Issued").await;
    assert_ne!(world.token("billing-token").await, token);
    let status = world.ready("billing", "True", "Issued").await.status.expect("a status");
    assert_eq!(status.tokens[0].failing_since, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_or_wrong_instance_gets_no_assertion() {
    let world = World::new("instances").await;
    let _operator = world.operator().await;
    let mut spec = world.instance_spec();
    // Nothing listens on the discard port.
    spec["connection"]["endpoint"] = json!("http://127.0.0.1:9");
    world.apply_instance(spec.clone()).await.expect("an instance");
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "False", "InstanceUnreachable").await;

    // Another ZITADEL answers at the endpoint. It does not know the issuer's host.
    let other = Issuer::start(&[]);
    other.settings(json!({"externalDomain": "elsewhere.example.com"})).await;
    spec["connection"]["endpoint"] = json!(other.url);
    world.apply_instance(spec.clone()).await.expect("an instance");
    world.ready("billing", "False", "MalformedResponse").await;
    assert!(
        other.requests().await.iter().all(|r| r.path != "/oauth/v2/token"),
        "no assertion was sent to the wrong instance"
    );

    // The right ZITADEL at another address. The instance header selects the instance.
    spec["connection"]["endpoint"] = json!(world.issuer.url.replace("127.0.0.1", "localhost"));
    world.apply_instance(spec).await.expect("an instance");
    world.ready("billing", "True", "Issued").await;
    let requests = world.issuer.requests().await;
    let mint = requests
        .iter()
        .rfind(|r| r.path == "/oauth/v2/token")
        .expect("a token request");
    assert_eq!(format!("http://{}", mint.instance_host), world.issuer.url);
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_holds_when_another_token_is_due() {
    let world = World::new("wait").await;
    let _operator = world.operator().await;
    world.instance().await;
    let user = world
        .issuer
        .user(json!({"tokenType": "JWT", "lifetimeSeconds": 8}))
        .await;
    world.key_secret("billing-key", &user).await;
    let limited = "urn:zitadel:iam:org:project:id:2:aud";
    let fault =
        json!({"path": "/oauth/v2/token", "scopeContains": limited, "status": 429, "headers": {"Retry-After": "300"}});
    world.issuer.fault(fault).await;
    let mut spec = one_token("good-token");
    let other = json!({"name": "limited", "projectIDs": ["2"], "secret": {"name": "limited-token"}});
    spec["tokens"].as_array_mut().expect("a list").push(other);
    world.service_user("billing", spec).await.expect("accepted");

    let mut token = world.token("good-token").await;
    for _ in 0..2 {
        token = world.secret_until("good-token", |d| d["token"] != token).await["token"].clone();
    }
    world.ready("billing", "False", "RateLimited").await;
    let requests = world.issuer.requests().await;
    let limited_requests = requests
        .iter()
        .filter(|r| r.scopes.iter().any(|s| s == limited))
        .count();
    assert_eq!(limited_requests, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn discovery_waits_for_retry_after() {
    let wait = SignedDuration::from_secs(6);
    let world = World::new("later").await;
    let path = "/.well-known/openid-configuration";
    let busy = json!({"path": path, "times": 1, "status": 503, "headers": {"Retry-After": wait.as_secs().to_string()}});
    world.issuer.fault(busy).await;
    let _operator = world.operator().await;
    world.instance().await;
    world.instance_ready("True", "InstanceReady").await;
    let requests = world.issuer.requests().await.into_iter();
    let times = requests.map(|r| r.time.parse::<Timestamp>().expect("a time"));
    let times: Vec<Timestamp> = times.collect();
    let pause = times[1].duration_since(times[0]);
    assert!(pause >= wait, "requested again after {pause:#}");
}

/// The service users of an instance do not each repeat its failed discovery.
#[tokio::test(flavor = "multi_thread")]
async fn service_users_of_an_instance_share_a_failed_discovery() {
    const USERS: usize = 24;
    let world = World::new("shared").await;
    let path = "/.well-known/openid-configuration";
    world.issuer.fault(json!({"path": path, "status": 503})).await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    let names: Vec<String> = (0..USERS).map(|i| format!("user-{i}")).collect();
    for name in &names {
        world.key_secret(&format!("{name}-key"), &user).await;
        let spec = one_token(&format!("{name}-token"));
        world.service_user(name, spec).await.expect("accepted");
    }
    let _operator = world.operator().await;
    for name in &names {
        world.ready(name, "False", "ServerError").await;
    }
    let requests = world.issuer.requests().await.len();
    assert!(requests < USERS / 2, "{requests} requests for {USERS} objects");
    world.issuer.clear_faults().await;
    for name in &names {
        world.ready(name, "True", "Issued").await;
    }
}

/// Without the token, the instance would become ready only at its next discovery, five minutes later.
#[tokio::test(flavor = "multi_thread")]
async fn issued_token_makes_its_instance_ready() {
    let world = World::new("recovered").await;
    let _operator = world.operator().await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.token("billing-token").await;
    let path = "/.well-known/openid-configuration";
    let busy = json!({"path": path, "times": 1, "status": 503, "headers": {"Retry-After": "300"}});
    world.issuer.fault(busy).await;
    let edit = json!({"metadata": {"annotations": {"example.com/edited": "true"}}});
    Api::<ZitadelInstance>::all(world.client.clone())
        .patch(&world.instance, &PatchParams::default(), &Patch::Merge(&edit))
        .await
        .expect("edited");
    world.instance_ready("False", "ServerError").await;
    world.simple("orders", json!({"tokenType": "JWT"})).await;
    world.token("orders-token").await;
    world.instance_ready("True", "InstanceReady").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_cause_has_its_own_reason() {
    let world = World::new("causes").await;
    let _operator = world.operator().await;
    world.instance().await;
    let short = world
        .simple("short", json!({"tokenType": "JWT", "lifetimeSeconds": 2}))
        .await;
    world.ready("short", "False", "LifetimeTooShort").await;
    world.issuer.change_user(&short.id, json!({"state": "inactive"})).await;
    world
        .service_user("inactive", one_token("inactive-token"))
        .await
        .expect("accepted");
    world.key_secret("inactive-key", &short).await;
    world.ready("inactive", "False", "UserInactive").await;

    // Each entry is within its limit, but together they are too large.
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("large-key", &user).await;
    let mut spec = one_token("large-token");
    let text = "{{ token }}".repeat(16);
    let entries = (0..32).map(|i| (format!("entry-{i}"), json!(text)));
    spec["tokens"][0]["secret"]["template"] = Value::Object(entries.collect());
    world.service_user("large", spec).await.expect("accepted");
    world.ready("large", "False", "SecretTooLarge").await;
    assert!(world.issuer.requests().await.iter().all(|r| r.user_id != user.id));

    // The Secret is being deleted, and a new object with the same name uses it.
    world.simple("replaced", json!({"tokenType": "JWT"})).await;
    world.token("replaced-token").await;
    let finalizers = json!({"metadata": {"finalizers": ["example.com/held"]}});
    world.edit_secret("replaced-token", finalizers).await;
    world
        .users()
        .delete("replaced", &DeleteParams::default())
        .await
        .expect("deleted");
    eventually("the object is gone", async || {
        world.users().get_opt("replaced").await.expect("readable").is_none()
    })
    .await;
    world
        .service_user("replaced", one_token("replaced-token"))
        .await
        .expect("accepted");
    world.ready("replaced", "False", "SecretBeingReplaced").await;
    let being_deleted = |s: &Secret| s.metadata.deletion_timestamp.is_some();
    until(world.secrets(), "replaced-token", EVENTUALLY, being_deleted).await;
    world
        .edit_secret("replaced-token", json!({"metadata": {"finalizers": null}}))
        .await;
    world.ready("replaced", "True", "Issued").await;
}

/// The open circuit breaker admits one probe at a time, and all service users recover when the host does
/// (docs/adr/0012-circuit-breaker-evidence.md).
#[tokio::test(flavor = "multi_thread")]
async fn open_breaker_probes_a_host_with_one_request_at_a_time() {
    const USERS: usize = 24;
    let world = World::new("circuit").await;
    let _operator = world.operator().await;
    world.instance().await;
    world.instance_ready("True", "InstanceReady").await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    for path in ["/oauth/v2/token", "/.well-known/openid-configuration"] {
        world.issuer.fault(json!({"path": path, "reset": true})).await;
    }
    let names: Vec<String> = (0..USERS).map(|i| format!("user-{i}")).collect();
    for name in &names {
        world.key_secret(&format!("{name}-key"), &user).await;
        let spec = one_token(&format!("{name}-token"));
        world.service_user(name, spec).await.expect("accepted");
    }
    for name in &names {
        world.ready(name, "False", "InstanceUnreachable").await;
    }
    let requests = world.issuer.requests().await;
    let count = requests.iter().filter(|r| r.path == "/oauth/v2/token").count();
    assert!(count < USERS, "{count} requests for {USERS} objects");

    world.issuer.clear_faults().await;
    for name in &names {
        world.ready(name, "True", "Issued").await;
    }
    assert_eq!(world.issuer.mints().await, USERS);
}
