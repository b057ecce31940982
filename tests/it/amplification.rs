//! What a tenant does in a loop with its own objects costs ZITADEL and the API server little, and the last change counts.

use std::time::Instant;

use kube::api::DeleteParams;
use serde_json::{Value, json};

use crate::support::world::World;

/// So many tokens of an object may be requested at once besides the scheduled refreshes, and one more in 20 s.
const BURST: usize = 48;

/// 16 tokens for the key of `billing`, with this scope.
fn sixteen(scope: &str) -> Value {
    let token = |i| json!({"name": format!("t{i}"), "projectIds": ["1"], "scopes": [scope], "secret": {"name": format!("s{i}")}});
    json!({"keySecretRef": {"name": "billing-key"}, "tokens": (0..16).map(token).collect::<Vec<_>>()})
}

async fn with_key(test: &str) -> World {
    let world = World::new(test).await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    world
}

/// The bound after `since`.
fn most(since: Instant) -> usize {
    BURST + 1 + usize::try_from(since.elapsed().as_secs() / 20).expect("few")
}

#[tokio::test(flavor = "multi_thread")]
async fn changing_the_scopes_in_a_loop_costs_few_requests_and_is_told() {
    let world = with_key("scopes").await;
    let _operator = world.operator().await;
    let since = Instant::now();
    for round in 0..6 {
        let scope = if round % 2 == 0 { "openid" } else { "profile" };
        world.service_user("billing", sixteen(scope)).await.expect("accepted");
        // At three changes of 16 tokens the burst is spent.
        if round < 3 {
            world.ready("billing", "True", "Issued").await;
        }
    }
    world.ready("billing", "False", "RequestsThrottled").await;
    let mints = world.issuer.mints().await;
    assert!((BURST..=most(since)).contains(&mints), "{mints} requests");
    // The object that does not take part is served.
    world.simple("other", json!({"tokenType": "JWT"})).await;
    world.ready("other", "True", "Issued").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn creating_an_object_again_and_again_costs_few_requests() {
    let world = with_key("again").await;
    let _operator = world.operator().await;
    let since = Instant::now();
    for round in 0..5 {
        world
            .service_user("billing", sixteen("openid"))
            .await
            .expect("accepted");
        if round < 3 {
            world.ready("billing", "True", "Issued").await;
        } else {
            world.ready("billing", "False", "RequestsThrottled").await;
        }
        let deleted = world.users().delete("billing", &DeleteParams::default()).await;
        deleted.expect("deleted");
        for i in 0..16 {
            world.secret_gone(&format!("s{i}")).await;
        }
    }
    let mints = world.issuer.mints().await;
    assert!(mints <= most(since), "{mints} requests");
}

#[tokio::test(flavor = "multi_thread")]
async fn suspending_in_a_loop_costs_few_reads_and_events_and_the_last_change_counts() {
    let world = with_key("flips").await;
    let _operator = world.operator().await;
    let mut spec = sixteen("openid");
    world.service_user("billing", spec.clone()).await.expect("accepted");
    world.ready("billing", "True", "Issued").await;
    let count = |verbs: &[&str], resource: &str| {
        let requests = world.cluster.audit.requests(&world.name);
        requests
            .iter()
            .filter(|r| verbs.contains(&&*r.verb) && r.resource == resource)
            .count()
    };
    let reads = || count(&["get"], "secrets");
    let events = || count(&["create", "patch"], "events");
    let (before, began) = ((reads(), events()), Instant::now());
    for round in 0..300 {
        spec["suspend"] = json!(round % 2 == 0);
        world.service_user("billing", spec.clone()).await.expect("accepted");
    }
    world.ready("billing", "True", "Issued").await;
    let seconds = usize::try_from(began.elapsed().as_secs()).expect("few") + 1;
    // Each reconcile reads the key and 16 token Secrets. The audit log is written a moment later.
    let most = 17 * (30 + seconds);
    assert!(
        reads() - before.0 <= most,
        "{} reads in {seconds} s",
        reads() - before.0
    );
    assert!(
        events() - before.1 <= 25 + seconds,
        "{} Events in {seconds} s",
        events() - before.1
    );
    assert_eq!(world.issuer.mints().await, 16);
}
