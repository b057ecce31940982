//! One tenant does all that it can to be in the way of another (design §3.5, §3.6).

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

/// Objects of each kind of trouble.
const TROUBLE: usize = 30;

/// How long a request of a slow user takes.
const SLOW: Duration = Duration::from_secs(8);

/// A namespace with bad keys that look like an outage, users whose requests take long, Secrets that are deleted over and
/// over, renewals that are asked for all the time, and Secrets that a quota refuses; and a quiet one beside it.
#[tokio::test(flavor = "multi_thread")]
async fn a_noisy_tenant_costs_a_quiet_one_no_token() {
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
                // Gone already, or not there yet: then there is nothing to delete.
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
    // In the midst of it.
    let newcomer = async {
        tokio::time::sleep(time / 2).await;
        let came = Instant::now();
        quiet.simple("late", json!({"tokenType": "JWT"})).await;
        quiet.token("late-token").await;
        assert!(going(), "not measured: the trouble had ended");
        came.elapsed()
    };
    let (seen, rounds, waited) = tokio::join!(sample(&quiet, &names, going), trouble, newcomer);
    println!(
        "{seen}; {rounds} rounds of trouble with {} objects; a newcomer had its token after {:.2} s",
        5 * TROUBLE,
        waited.as_secs_f64()
    );
    // One for each lifetime and a token at the start; what is minted in the last moment may not be seen.
    let most = names.len() * usize::try_from(2 * lifetimes + 2).expect("few");
    assert!(
        (names.len() * 3..=most).contains(&seen.tokens),
        "{} tokens",
        seen.tokens
    );
    // A place is kept free for a namespace that has none: nobody waited for the end of a slow request.
    assert!(waited < SLOW, "a newcomer waited {waited:?}");
    // Due a third of the lifetime before its end, and before all others in the last third of that.
    let window = Duration::from_secs(lifetime - 1).as_secs_f64() / 3.0;
    assert!(seen.margin > window / 4.0, "{seen}");
    quiet.ready("late", "True", "Issued").await;
    drop(operator);
}

/// Two namespaces whose requests fail at once look like an outage.
#[tokio::test(flavor = "multi_thread")]
async fn two_tenants_whose_requests_fail_keep_the_circuit_breaker_closed_for_others() {
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
        "{seen}; open for {:.1} s of {} s; {failed} failed requests",
        open.as_secs_f64(),
        time.as_secs()
    );
    assert!(open < time / 20, "open for {open:?}");
    // As in `a_noisy_tenant_costs_a_quiet_one_no_token`.
    let window = Duration::from_secs(lifetime - 1).as_secs_f64() / 3.0;
    assert!(seen.margin > window / 4.0, "{seen}");
}

/// A server that is down costs its host few calls, and the tokens of another instance nothing.
#[tokio::test(flavor = "multi_thread")]
async fn many_objects_on_a_dead_instance_are_quiet() {
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
    println!("{objects} objects on a dead instance for {time} s: {calls} calls; beside it {seen}");
    // One attempt at a time, each of which may ask discovery too, and the looks at the instance itself.
    assert!(calls < 60, "{calls} calls");
    let mints = alive.issuer.mints().await - mints;
    assert!(
        mints <= names.len() * usize::try_from(2 * time / lifetime + 1).expect("few"),
        "{mints} mints"
    );

    dead.issuer.clear_faults().await;
    let back = Instant::now();
    let last = async |i: u32| dead.token(&format!("user-{i}-token")).await;
    // Half a minute for a thousand on a quiet machine, most of it the budget of the instance.
    tokio::time::timeout(Duration::from_mins(3), async {
        for i in 0..objects {
            last(i).await;
        }
    })
    .await
    .expect("all have their token");
    println!(
        "all of them have a token {:.1} s after it is back",
        back.elapsed().as_secs_f64()
    );
    assert_eq!(dead.issuer.mints().await, usize::try_from(objects).expect("few"));
}

/// Objects of five kinds that cost something again and again.
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
    // Two for each that is good, and one for each that is not.
    eventually("the good ones are there", async || secrets().await > 6 * TROUBLE).await;
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
