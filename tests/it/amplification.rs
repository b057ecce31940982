//! Changes that a tenant makes in a loop to its own objects cost ZITADEL and the API server few requests. The last
//! change takes effect.

use std::time::Instant;

use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, PostParams};
use serde_json::{Value, json};

use crate::support::world::{World, one_token};

/// The number of unscheduled token requests that an object may make at once. One more is allowed every 20 s.
const BURST: usize = 48;

/// 16 tokens for the key of `billing`, with this scope.
fn sixteen(scope: &str) -> Value {
    let token = |i| json!({"name": format!("t{i}"), "projectIDs": ["1"], "scopes": [scope], "secret": {"name": format!("s{i}")}});
    json!({"keySecretRef": {"name": "billing-key"}, "tokens": (0..16).map(token).collect::<Vec<_>>()})
}

async fn with_key(test: &str) -> World {
    let world = World::new(test).await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    world
}

/// The highest number of token requests since `since`.
fn request_limit(since: Instant) -> usize {
    BURST + 1 + usize::try_from(since.elapsed().as_secs() / 20).expect("few")
}

#[tokio::test(flavor = "multi_thread")]
async fn changing_scopes_in_a_loop_is_throttled_and_reported() {
    let world = with_key("scopes").await;
    let _operator = world.operator().await;
    let since = Instant::now();
    for round in 0..6 {
        let scope = if round % 2 == 0 { "openid" } else { "profile" };
        world.service_user("billing", sixteen(scope)).await.expect("accepted");
        // Three changes of 16 tokens use up the burst.
        if round < 3 {
            world.ready("billing", "True", "Issued").await;
        }
    }
    world.ready("billing", "False", "RequestsThrottled").await;
    let mints = world.issuer.mints().await;
    assert!((BURST..=request_limit(since)).contains(&mints), "{mints} requests");
    // The operator still serves another object.
    world.simple("other", json!({"tokenType": "JWT"})).await;
    world.ready("other", "True", "Issued").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn recreating_an_object_in_a_loop_costs_few_requests() {
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
    assert!(mints <= request_limit(since), "{mints} requests");
}

#[tokio::test(flavor = "multi_thread")]
async fn suspending_in_a_loop_costs_few_reads_and_events_and_the_last_change_wins() {
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
    // Each reconcile reads the key Secret and 16 token Secrets. The API server writes the audit log a moment later.
    let limit = 17 * (30 + seconds);
    assert!(
        reads() - before.0 <= limit,
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

async fn create_secret(world: &World, object: Value) {
    let object: Secret = serde_json::from_value(object).expect("a Secret");
    let created = world.secrets().create(&PostParams::default(), &object).await;
    created.expect("created");
}

/// The record in a Secret says when a refresh is scheduled. Every user with write access to Secrets can forge it.
#[tokio::test(flavor = "multi_thread")]
async fn forged_records_do_not_bypass_the_request_limit() {
    let world = World::new("forged").await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    let _operator = world.operator().await;
    let mut probe = sixteen("openid");
    probe["tokens"].as_array_mut().expect("a list").truncate(1);
    world.service_user("probe", probe).await.expect("accepted");
    world.ready("probe", "True", "Issued").await;
    let secret = world.secrets().get("s0").await.expect("there");
    let record = secret.metadata.annotations.expect("annotations")["zitadel-tokens.dev/record"].clone();
    let mut record: Value = serde_json::from_str(&record).expect("a record");
    record["issuedAt"] = json!("2020-01-01T00:00:00Z");
    record["expiresAt"] = json!("2020-01-01T12:00:00Z");
    let deleted = world.users().delete("probe", &DeleteParams::default()).await;
    deleted.expect("deleted");
    world.secret_gone("s0").await;
    world.issuer.remove_key(&user.id, &user.key_id).await;

    let mut spec = sixteen("openid");
    spec["suspend"] = json!(true);
    let billing = world.service_user("billing", spec).await.expect("accepted");
    record["owner"] = json!(billing.metadata.uid);
    for i in 0..16 {
        let annotations =
            json!({"zitadel-tokens.dev/adopt": "billing", "zitadel-tokens.dev/record": record.to_string()});
        create_secret(
            &world,
            json!({"metadata": {"name": format!("s{i}"), "annotations": annotations}}),
        )
        .await;
    }
    let token_requests = async || {
        let requests = world.issuer.requests().await;
        requests.iter().filter(|r| r.path == "/oauth/v2/token").count()
    };
    let (before, since) = (token_requests().await, Instant::now());
    world
        .service_user("billing", sixteen("openid"))
        .await
        .expect("accepted");
    world.ready("billing", "False", "KeyRejected").await;
    for round in 0..40 {
        world.annotate("billing", "renew-request", &round.to_string()).await;
    }
    world.ready("billing", "False", "RequestsThrottled").await;
    // Beyond the limit, each token may cause one request that does not count, and at most three early retries.
    let bound = request_limit(since) + 16 * 4;
    let requests = token_requests().await - before;
    assert!(requests <= bound, "{requests} requests, at most {bound}");
}

/// A finalizer keeps each Secret that the operator deletes.
#[tokio::test(flavor = "multi_thread")]
async fn secrets_held_by_finalizers_are_not_deleted_repeatedly() {
    const JUNK: usize = 40;
    let world = World::new("stay").await;
    world.instance().await;
    let _operator = world.operator().await;
    let user = world.simple("billing", json!({"tokenType": "JWT"})).await;
    let uid = world.ready("billing", "True", "Issued").await.metadata.uid;
    for i in 0..JUNK {
        let owner = json!({"apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelServiceUser", "name": "billing",
            "uid": uid, "controller": true});
        let metadata = json!({"name": format!("junk-{i}"), "finalizers": ["example.com/hold"],
            "labels": {"zitadel-tokens.dev/service-user": "billing"}, "ownerReferences": [owner]});
        create_secret(&world, json!({"metadata": metadata})).await;
    }
    for round in 0..20 {
        let mut spec = one_token("billing-token");
        spec["tokens"][0]["projectIDs"] = json!([format!("{round}")]);
        world.service_user("billing", spec).await.expect("accepted");
        world.ready("billing", "True", "Issued").await;
    }
    world.sentinel().await;
    let requests = world.cluster.audit.requests(&world.name);
    let deletes = requests
        .iter()
        .filter(|r| r.verb == "delete" && r.name.starts_with("junk-"))
        .count();
    assert!((1..=2 * JUNK).contains(&deletes), "{deletes} deletes of {JUNK} Secrets");
    // Without this, the finalizers would block the deletion of the namespace.
    for i in 0..JUNK {
        world
            .edit_secret(&format!("junk-{i}"), json!({"metadata": {"finalizers": null}}))
            .await;
    }
    drop(user);
}
