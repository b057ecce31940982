//! What goes wrong is told by its own reason, and a valid token stays where it is.

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
async fn the_older_dialect_of_a_refused_key_is_told_from_an_outage() {
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
async fn while_a_refresh_fails_the_old_token_stays_and_the_new_one_comes_when_it_can() {
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

    // Ready, because the token is valid; the reason tells that its renewal fails.
    let object = world.ready("billing", "True", "ServerError").await;
    assert_eq!(condition(&object, "Stalled"), None);
    assert!(object.status.expect("a status").tokens[0].failing_since.is_some());
    assert_eq!(world.token("billing-token").await, token);
    // It expires: the condition says so, the Secret stays.
    world.ready("billing", "False", "ServerError").await;
    assert_eq!(world.token("billing-token").await, token);

    world.issuer.clear_faults().await;
    world.ready("billing", "True", "Issued").await;
    assert_ne!(world.token("billing-token").await, token);
    let status = world.ready("billing", "True", "Issued").await.status.expect("a status");
    assert_eq!(status.tokens[0].failing_since, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_is_missing_unreachable_or_another() {
    let world = World::new("instances").await;
    let _operator = world.operator().await;
    let mut spec = world.instance_spec();
    // Nobody listens on the discard port.
    spec["connection"]["endpoint"] = json!("http://127.0.0.1:9");
    world.apply_instance(spec.clone()).await.expect("an instance");
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "False", "InstanceUnreachable").await;

    // Another ZITADEL answers there: it does not know the issuer's host.
    let other = Issuer::start(&[]);
    other.settings(json!({"externalDomain": "elsewhere.example.com"})).await;
    spec["connection"]["endpoint"] = json!(other.url);
    world.apply_instance(spec.clone()).await.expect("an instance");
    world.ready("billing", "False", "MalformedAnswer").await;
    assert!(
        other.requests().await.iter().all(|r| r.path != "/oauth/v2/token"),
        "no assertion was sent there"
    );

    // The right one behind another address: the instance header names it.
    spec["connection"]["endpoint"] = json!(world.issuer.url.replace("127.0.0.1", "localhost"));
    world.apply_instance(spec).await.expect("an instance");
    world.ready("billing", "True", "Issued").await;
    let requests = world.issuer.requests().await;
    let mint = requests.iter().rfind(|r| r.path == "/oauth/v2/token").expect("a mint");
    assert_eq!(format!("http://{}", mint.instance_host), world.issuer.url);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_asks_to_wait_is_not_asked_again_because_another_token_is_due() {
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
    let asked = world.issuer.requests().await;
    let asked = asked.iter().filter(|r| r.scopes.iter().any(|s| s == limited)).count();
    assert_eq!(asked, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn discovery_is_not_asked_again_before_the_server_wants_it() {
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
    assert!(pause >= wait, "asked again after {pause:#}");
}

/// The users of an instance do not each find out that its discovery fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_discovery_is_shared_by_the_users_of_the_instance() {
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
    let asked = world.issuer.requests().await.len();
    assert!(asked < USERS / 2, "{asked} requests for {USERS} objects");
    world.issuer.clear_faults().await;
    for name in &names {
        world.ready(name, "True", "Issued").await;
    }
}

/// Its own next discovery would be five minutes later.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_gives_a_token_becomes_ready() {
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
async fn each_cause_is_told_by_its_own_reason() {
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

    // What is within each limit may be too much together.
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("large-key", &user).await;
    let mut spec = one_token("large-token");
    let text = "{{ token }}".repeat(16);
    let entries = (0..32).map(|i| (format!("entry-{i}"), json!(text)));
    spec["tokens"][0]["secret"]["template"] = Value::Object(entries.collect());
    world.service_user("large", spec).await.expect("accepted");
    world.ready("large", "False", "SecretTooLarge").await;
    assert!(world.issuer.requests().await.iter().all(|r| r.user_id != user.id));

    // One that is being deleted, and whose successor has the same name.
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

/// Design §3.5: one at a time asks a host that is down, and all come back as soon as it works.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_down_is_asked_by_one_at_a_time() {
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
    let asked = requests.iter().filter(|r| r.path == "/oauth/v2/token").count();
    assert!(asked < USERS, "{asked} requests for {USERS} objects");

    world.issuer.clear_faults().await;
    for name in &names {
        world.ready(name, "True", "Issued").await;
    }
    assert_eq!(world.issuer.mints().await, USERS);
}
