//! One tenant tries to disturb another (docs/adr/0006-own-priority-queue.md,
//! docs/adr/0012-circuit-breaker-evidence.md).

use std::time::{Duration, Instant};

use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::ResourceQuota;
use kube::Api;
use kube::api::{DeleteParams, ListParams, PostParams};
use serde_json::{Value, json};

use crate::reduced;
use crate::sampler::sample;
use crate::support::eventually;
use crate::support::issuer::Issuer;
use crate::support::operator::Operator;
use crate::support::world::{World, one_token};

/// Number of objects of each noisy kind.
const TROUBLE: usize = 30;

/// How long a request of a slow user takes.
const SLOW: Duration = Duration::from_secs(8);

/// A quiet namespace beside a noisy one. The noisy one has refused keys that look like an outage, slow token requests,
/// Secrets that are deleted repeatedly, constant renew requests, and Secrets that a quota refuses.
#[tokio::test(flavor = "multi_thread")]
async fn a_noisy_tenant_does_not_delay_a_quiet_one() {
    let (lifetime, lifetimes) = if reduced() { (20, 3) } else { (60, 5) };
    let quiet = World::new("quiet").await;
    let noisy = World::beside(&quiet, "noisy").await;
    quiet.issuer.settings(json!({"dialect": "errors_internal"})).await;
    let operator = quiet.operator().await;
    quiet.instance_for_all().await;

    let mut names = Vec::new();
    for name in ["one", "two", "three"] {
        let fields = json!({"tokenType": "JWT", "lifetimeSeconds": lifetime});
        quiet.simple(name, fields).await;
        names.push(format!("{name}-token"));
    }
    for name in &names {
        quiet.token(name).await;
    }
    make_trouble(&noisy).await;

    let started = Instant::now();
    let time = Duration::from_secs(lifetime * lifetimes);
    let going = || started.elapsed() < time;
    let trouble = async {
        let mut round = 0;
        while going() {
            round += 1;
            for i in 0..TROUBLE {
                // The Secret may not exist at the moment.
                let secret = format!("deleted-{i}-token");
                let _ = noisy.secrets().delete(&secret, &DeleteParams::default()).await;
                noisy
                    .annotate(&format!("asking-{i}"), "renew-request", &round.to_string())
                    .await;
                noisy
                    .annotate(&format!("bad-{i}"), "renew-request", &round.to_string())
                    .await;
            }
        }
        round
    };
    // A new service user arrives while the noise lasts.
    let newcomer = async {
        tokio::time::sleep(time / 2).await;
        let arrived = Instant::now();
        quiet.simple("late", json!({"tokenType": "JWT"})).await;
        quiet.token("late-token").await;
        assert!(going(), "not measured: the noise had ended");
        arrived.elapsed()
    };
    let (seen, rounds, waited) = tokio::join!(sample(&quiet, &names, going), trouble, newcomer);
    println!(
        "{seen}; {rounds} rounds of noise with {} objects; a new service user had its token after {:.2} s",
        5 * TROUBLE,
        waited.as_secs_f64()
    );
    // The first token and refreshes in each lifetime. The sampler may miss tokens that were issued at the very end.
    let most = names.len() * usize::try_from(2 * lifetimes + 2).expect("few");
    assert!(
        (names.len() * 3..=most).contains(&seen.tokens),
        "{} tokens",
        seen.tokens
    );
    // The fair queue reserves the last slot for a namespace without any, so the new object did not wait for a slow
    // request.
    assert!(waited < SLOW, "a new service user waited {waited:?}");
    // A token is due a third of its lifetime before it expires. In the last third of that window it has the highest
    // priority.
    let window = Duration::from_secs(lifetime - 1).as_secs_f64() / 3.0;
    assert!(seen.margin > window / 4.0, "{seen}");
    quiet.ready("late", "True", "Issued").await;
    drop(operator);
}

/// Requests that fail in two namespaces at the same time look like an outage.
#[tokio::test(flavor = "multi_thread")]
async fn two_failing_tenants_do_not_open_the_circuit_breaker_for_others() {
    let (objects, lifetime, lifetimes) = if reduced() { (20, 20, 3) } else { (50, 60, 3) };
    let quiet = World::new("served").await;
    let failing = [World::beside(&quiet, "one").await, World::beside(&quiet, "two").await];
    let user = quiet.issuer.user(json!({"tokenType": "JWT"})).await;
    let fault = json!({"path": "/oauth/v2/token", "userId": user.id, "status": 503});
    quiet.issuer.fault(fault).await;
    let operator = quiet.operator().await;
    quiet.instance_for_all().await;
    for world in &failing {
        world.key_secret("key", &user).await;
        for i in 0..15 {
            let tokens = (0..4).map(|token| {
                let mut entry = one_token(&format!("failing-{i}-{token}"))["tokens"][0].clone();
                entry["name"] = json!(format!("token-{token}"));
                entry
            });
            let tokens: Vec<Value> = tokens.collect();
            let spec = json!({"keySecretRef": {"name": "key"}, "tokens": tokens});
            world
                .service_user(&format!("failing-{i}"), spec)
                .await
                .expect("accepted");
        }
    }
    let fields = json!({"tokenType": "JWT", "lifetimeSeconds": lifetime});
    quiet.key_secret("key", &quiet.issuer.user(fields).await).await;
    let names: Vec<String> = (0..objects).map(|i| format!("token-{i}")).collect();
    for name in &names {
        let mut spec = one_token(name);
        spec["keySecretRef"] = json!({"name": "key"});
        quiet.service_user(name, spec).await.expect("accepted");
    }
    for name in &names {
        quiet.token(name).await;
    }

    let started = Instant::now();
    let time = Duration::from_secs(lifetime * lifetimes);
    let going = || started.elapsed() < time;
    let is_open = format!("circuit_open{{zitadel_instance=\"{}\"}} 1", quiet.instance);
    let watch = async {
        let (mut open, mut last) = (Duration::ZERO, Instant::now());
        while going() {
            if operator.get("/metrics").await.1.contains(&is_open) {
                open += last.elapsed();
            }
            last = Instant::now();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        open
    };
    let before = quiet.issuer.requests().await.len();
    let (seen, open) = tokio::join!(sample(&quiet, &names, going), watch);
    let failed = quiet.issuer.requests().await.split_off(before).into_iter();
    let failed = failed.filter(|r| r.user_id == user.id).count();
    println!(
        "{seen}; circuit open for {:.1} s of {} s; {failed} failed requests",
        open.as_secs_f64(),
        time.as_secs()
    );
    assert!(open < time / 20, "circuit open for {open:?}");
    // As in `a_noisy_tenant_does_not_delay_a_quiet_one`.
    let window = Duration::from_secs(lifetime - 1).as_secs_f64() / 3.0;
    assert!(seen.margin > window / 4.0, "{seen}");
}

/// An unavailable server gets few requests, and its objects do not affect the tokens of another instance.
#[tokio::test(flavor = "multi_thread")]
async fn objects_of_an_unavailable_instance_send_few_requests() {
    let (objects, time, lifetime) = if reduced() { (200, 30, 12) } else { (1_000, 120, 20) };
    let alive = World::new("alive").await;
    let dead = World::with_issuer("dead", Issuer::start(&[])).await;
    let selector = format!("test in ({}, {})", alive.instance, dead.instance);
    let _operator = Operator::start(alive.cluster, &selector).await;
    alive.instance().await;
    dead.instance().await;
    dead.instance_ready("True", "InstanceReady").await;
    let mut names = Vec::new();
    for name in ["one", "two", "three"] {
        let fields = json!({"tokenType": "JWT", "lifetimeSeconds": lifetime});
        alive.simple(name, fields).await;
        names.push(format!("{name}-token"));
    }
    for name in &names {
        alive.token(name).await;
    }
    for path in ["/oauth/v2/token", "/.well-known/openid-configuration"] {
        dead.issuer.fault(json!({"path": path, "reset": true})).await;
    }
    let user = dead.issuer.user(json!({"tokenType": "JWT"})).await;
    dead.key_secret("key", &user).await;

    let before = dead.issuer.requests().await.len();
    let mints = alive.issuer.mints().await;
    let started = Instant::now();
    let going = || started.elapsed() < Duration::from_secs(time);
    let arrive = stream::iter(0..objects).for_each_concurrent(8, async |i| {
        let mut spec = one_token(&format!("user-{i}-token"));
        spec["keySecretRef"] = json!({"name": "key"});
        dead.service_user(&format!("user-{i}"), spec).await.expect("accepted");
    });
    let (seen, ()) = tokio::join!(sample(&alive, &names, going), arrive);
    let calls = dead.issuer.requests().await.len() - before;
    println!("{objects} objects of an unavailable instance for {time} s: {calls} requests; other instance: {seen}");
    // One probe at a time, each with a possible discovery request, and the checks of the instance itself.
    assert!(calls < 60, "{calls} requests");
    let mints = alive.issuer.mints().await - mints;
    assert!(
        mints <= names.len() * usize::try_from(2 * time / lifetime + 1).expect("few"),
        "{mints} token requests"
    );

    dead.issuer.clear_faults().await;
    let back = Instant::now();
    let last = async |i: u32| dead.token(&format!("user-{i}-token")).await;
    // A thousand objects take half a minute on an idle machine, mostly because of the instance's request budget.
    tokio::time::timeout(Duration::from_mins(3), async {
        for i in 0..objects {
            last(i).await;
        }
    })
    .await
    .expect("all objects have their token");
    println!(
        "all objects have their token {:.1} s after the instance is available again",
        back.elapsed().as_secs_f64()
    );
    assert_eq!(dead.issuer.mints().await, usize::try_from(objects).expect("few"));
}

/// Objects of five kinds that cause repeated work.
async fn make_trouble(noisy: &World) {
    let good = noisy.issuer.user(json!({"tokenType": "JWT"})).await;
    let bad = noisy.issuer.user(json!({"tokenType": "JWT"})).await;
    noisy.issuer.remove_key(&bad.id, &bad.key_id).await;
    let slow = noisy.issuer.user(json!({"tokenType": "JWT"})).await;
    let latency = json!({"path": "/oauth/v2/token", "userId": slow.id, "latencyMillis": u64::try_from(SLOW.as_millis()).expect("few")});
    noisy.issuer.fault(latency).await;
    for i in 0..TROUBLE {
        for (kind, user) in [("bad", &bad), ("slow", &slow), ("deleted", &good), ("asking", &good)] {
            let name = format!("{kind}-{i}");
            noisy.key_secret(&format!("{name}-key"), user).await;
            noisy
                .service_user(&name, one_token(&format!("{name}-token")))
                .await
                .expect("accepted");
        }
    }
    noisy.key_secret("refused-key", &good).await;
    let secrets = async || {
        noisy
            .secrets()
            .list(&ListParams::default())
            .await
            .expect("Secrets")
            .items
            .len()
    };
    // Two Secrets for each object that gets a token (the key and the token), one for each that does not.
    eventually("the Secrets exist", async || secrets().await > 6 * TROUBLE).await;
    let quota = json!({"metadata": {"name": "none-more"}, "spec": {"hard": {"count/secrets": "1"}}});
    Api::<ResourceQuota>::namespaced(noisy.client.clone(), &noisy.name)
        .create(&PostParams::default(), &serde_json::from_value(quota).expect("a quota"))
        .await
        .expect("created");
    for i in 0..TROUBLE {
        let mut spec = one_token(&format!("refused-{i}-token"));
        spec["keySecretRef"] = json!({"name": "refused-key"});
        noisy
            .service_user(&format!("refused-{i}"), spec)
            .await
            .expect("accepted");
    }
}
