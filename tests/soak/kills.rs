//! `kill -9` at each step of a refresh: no token expires, and at most the token request in flight is lost.

use std::sync::Arc;
use std::time::Instant;

use k8s_openapi::jiff::Timestamp;
use serde_json::json;

use crate::support::operator::Operator;
use crate::support::proxy::{Hold, Proxy};
use crate::support::world::World;
use crate::support::{eventually, next_second};

/// At least four times as long as a restart, so that no token expires because the test is slow.
const LIFETIME: u64 = 60;

/// Where the operator is killed, which proxied request stops it there, and the number of extra token requests.
type Place = (&'static str, fn(&Proxy) -> Arc<Hold>, usize);

const PLACES: &[Place] = &[
    (
        "before the Secret is read",
        |p| p.hold_before("GET", "/secrets/billing-token"),
        0,
    ),
    (
        "between the token request and the write",
        |p| p.hold_before("PATCH", "/secrets/billing-token"),
        1,
    ),
    (
        "between the write and its answer",
        |p| p.hold_after("PATCH", "/secrets/billing-token"),
        0,
    ),
    (
        "between the Secret and the status",
        |p| p.hold_before("PUT", "/zitadelserviceusers/billing/status"),
        0,
    ),
    (
        "between the status and its answer",
        |p| p.hold_after("PUT", "/zitadelserviceusers/billing/status"),
        0,
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_step_costs_at_most_one_token_request() {
    for (place, find, extra) in PLACES {
        let world = World::new("kill").await;
        let proxy = Proxy::start(world.cluster, &world.name).await;
        let operator = Operator::start_with(&proxy.kubeconfig, &world.selector(), &[]).await;
        world.instance().await;
        world
            .simple("billing", json!({"tokenType": "JWT", "lifetimeSeconds": LIFETIME}))
            .await;
        let old = world.secret_until("billing-token", |d| d.contains_key("token")).await;
        world.ready("billing", "True", "Issued").await;
        let expires: Timestamp = old["expires_at"].parse().expect("a time");
        next_second().await;

        let hold = find(&proxy);
        world.renew("billing").await;
        hold.reached().await;
        operator.kill();
        hold.release();
        let before = world.issuer.mints().await;
        let killed = Instant::now();
        let _operator = world.operator().await;
        let new = world
            .secret_until("billing-token", |d| d["token"] != old["token"])
            .await;
        world
            .user_until("billing", |u| {
                let expires = u.status.as_ref().and_then(|s| s.expires_at.as_ref());
                expires.is_some_and(|t| t.0.to_string() == new["expires_at"])
            })
            .await;
        assert!(Timestamp::now() < expires, "{place}: the old token had expired");
        world.sentinel().await;
        let mints = world.issuer.mints().await;
        println!(
            "{place}: {mints} token requests, recovered in {:.1} s",
            killed.elapsed().as_secs_f64()
        );
        assert_eq!(mints, 2 + extra, "{place}: {before} before the restart");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_during_the_token_request_costs_one_token_request() {
    let world = World::new("exchange").await;
    let operator = world.operator().await;
    world.instance().await;
    world
        .simple("billing", json!({"tokenType": "JWT", "lifetimeSeconds": LIFETIME}))
        .await;
    let old = world.token("billing-token").await;
    world.ready("billing", "True", "Issued").await;
    // The server issues a token and its answer never arrives.
    world
        .issuer
        .fault(json!({"path": "/oauth/v2/token", "times": 1, "afterHandling": true, "hang": true}))
        .await;
    world.renew("billing").await;
    eventually("the token is issued", async || world.issuer.mints().await == 2).await;
    operator.kill();
    assert_eq!(world.token("billing-token").await, old);
    let _operator = world.operator().await;
    world.secret_until("billing-token", |d| d["token"] != old).await;
    world.ready("billing", "True", "Issued").await;
    assert_eq!(world.issuer.mints().await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_deleted_during_its_token_request_can_be_created_again() {
    let world = World::new("deleted").await;
    let operator = world.operator().await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    let slow = json!({"path": "/oauth/v2/token", "userId": user.id, "scopeContains": "openid", "times": 1, "latencyMillis": 2000});
    world.issuer.fault(slow).await;
    world
        .service_user("billing", crate::support::world::one_token("billing-token"))
        .await
        .expect("accepted");
    eventually("the token request is in flight", async || {
        let requests = world.issuer.requests().await;
        requests.iter().any(|r| r.scopes.iter().any(|s| s == "openid"))
    })
    .await;
    world
        .users()
        .delete("billing", &kube::api::DeleteParams::default())
        .await
        .expect("deleted");
    world
        .service_user("billing", crate::support::world::one_token("billing-token"))
        .await
        .expect("accepted");
    let again = world.ready("billing", "True", "Issued").await;
    let owned = |secret: &k8s_openapi::api::core::v1::Secret| {
        let owners = secret.metadata.owner_references.iter().flatten();
        owners.into_iter().any(|o| Some(&o.uid) == again.metadata.uid.as_ref())
    };
    crate::support::world::until(world.secrets(), "billing-token", crate::support::EVENTUALLY, owned).await;
    assert!(
        operator.log().iter().all(|l| !l.contains("panic")),
        "{:?}",
        operator.log()
    );
}
