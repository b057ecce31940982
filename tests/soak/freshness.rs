//! A token Secret never holds an expired token while ZITADEL can be reached, and a token is minted once per lifetime.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::reduced;
use crate::sampler::sample;
use crate::support::operator::Operator;
use crate::support::proxy::Proxy;
use crate::support::world::{World, one_token};

const LIFETIME: u64 = 8;

fn lifetimes() -> u64 {
    if reduced() { 5 } else { 20 }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_sample_holds_an_expired_token() {
    let world = World::new("fresh").await;
    let _operator = world.operator().await;
    world.instance().await;
    let mut names = Vec::new();
    for user in ["one", "two", "three"] {
        let made = world
            .issuer
            .user(json!({"tokenType": "JWT", "lifetimeSeconds": LIFETIME}))
            .await;
        world.key_secret(&format!("{user}-key"), &made).await;
        let mut spec = one_token(&format!("{user}-token"));
        names.push(format!("{user}-token"));
        if user == "three" {
            let more = json!({"name": "more", "projectIDs": ["2"], "secret": {"name": "more-token"}});
            spec["tokens"].as_array_mut().expect("a list").push(more);
            names.push("more-token".to_owned());
        }
        world.service_user(user, spec).await.expect("accepted");
    }
    for name in &names {
        world.token(name).await;
    }

    let started = Instant::now();
    let going = || started.elapsed() < Duration::from_secs(LIFETIME * lifetimes());
    let seen = sample(&world, &names, going).await;
    let distinct = seen.tokens;
    let mints = world.issuer.mints().await;
    println!("{seen}, {mints} mints");
    // Those that were minted in the very last moment are not seen any more.
    assert!(
        mints >= distinct && mints <= distinct + names.len(),
        "{mints} mints for {distinct} tokens"
    );

    // One Secret write for each mint. A status holds all tokens of an object: one write for each pass that minted, which
    // may be two tokens of one object at once.
    let all = world.cluster.audit.requests(&world.name);
    let count = |verb: &str, resource: &str, ending: &str| {
        let those = all.iter().filter(|r| r.verb == verb && r.resource == resource);
        those.filter(|r| r.name.ends_with(ending)).count()
    };
    let (writes, statuses) = (
        count("patch", "secrets", "-token"),
        count("update", "zitadelserviceusers/status", ""),
    );
    let after = world.issuer.mints().await;
    println!("{writes} Secret writes, {statuses} status writes");
    // Until the first write to the namespace succeeds, each first token's is tried before.
    assert!(
        (mints..=after + names.len()).contains(&writes),
        "{writes} Secret writes for {mints} to {after} mints"
    );
    assert!(
        statuses <= writes,
        "{statuses} status writes for {writes} Secret writes"
    );
}

/// Design §3.8: a stop is like a suspend. The monotonic clock goes on meanwhile, the process does not.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_that_was_stopped_for_longer_than_a_token_lives_renews_it_at_once() {
    let (lifetime, stopped) = if reduced() { (12, 15) } else { (60, 150) };
    let world = World::new("stopped").await;
    let operator = world.operator().await;
    world.instance().await;
    world
        .simple("billing", json!({"tokenType": "JWT", "lifetimeSeconds": lifetime}))
        .await;
    let old = world.token("billing-token").await;
    world.ready("billing", "True", "Issued").await;
    operator.signal("STOP");
    tokio::time::sleep(Duration::from_secs(stopped)).await;
    let going_on = Instant::now();
    operator.signal("CONT");
    world.secret_until("billing-token", |d| d["token"] != old).await;
    println!(
        "a fresh token {:.1} s after a stop of {stopped} s",
        going_on.elapsed().as_secs_f64()
    );
    world.ready("billing", "True", "Issued").await;
    assert_eq!(world.issuer.mints().await, 2);
}

/// While no token is due, only the watches are opened anew, once in five minutes each (kube's own time for a watch); they
/// do not end for want of events.
#[tokio::test(flavor = "multi_thread")]
async fn idle_costs_nothing() {
    let world = World::new("idle").await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let _operator = Operator::start_with(&proxy.kubeconfig, &world.selector(), &[]).await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "True", "Issued").await;
    world.instance_ready("True", "InstanceReady").await;
    world.sentinel().await;
    let requests = async || world.issuer.requests().await.len();
    let before = (proxy.count(), requests().await);
    let time = Duration::from_secs(if reduced() { 110 } else { 600 });
    tokio::time::sleep(time).await;
    let after = (proxy.count() - before.0, requests().await - before.1);
    println!("{after:?} requests to the API server and to ZITADEL in {time:?}");
    let watches = u64::try_from(after.0).expect("few");
    assert!(watches <= 4 * (1 + time.as_secs() / 290), "{after:?}");
    assert_eq!(after.1, 0);
}
