//! A token Secret never holds an expired token while ZITADEL is reachable, and each token is refreshed once per
//! lifetime.

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
async fn a_token_secret_never_holds_an_expired_token() {
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
    println!("{seen}, {mints} token requests");
    // The sampler may miss tokens that were issued at the very end.
    assert!(
        mints >= distinct && mints <= distinct + names.len(),
        "{mints} token requests for {distinct} tokens"
    );

    // One Secret write for each token request. A status covers all tokens of an object, so a reconcile that issues two
    // tokens writes it once.
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
    // Until the first write to a namespace succeeds, the operator tries the write of each first token in advance.
    assert!(
        (mints..=after + names.len()).contains(&writes),
        "{writes} Secret writes for {mints} to {after} token requests"
    );
    assert!(
        statuses <= writes,
        "{statuses} status writes for {writes} Secret writes"
    );
}

/// SIGSTOP is like a suspend of the machine: the process stops and the clocks continue
/// (docs/adr/0011-times-follow-the-servers-clock.md).
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_suspended_longer_than_a_token_lifetime_refreshes_at_once() {
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
    let resumed = Instant::now();
    operator.signal("CONT");
    world.secret_until("billing-token", |d| d["token"] != old).await;
    println!(
        "a fresh token {:.1} s after a suspension of {stopped} s",
        resumed.elapsed().as_secs_f64()
    );
    world.ready("billing", "True", "Issued").await;
    assert_eq!(world.issuer.mints().await, 2);
}

/// While no token is due, the only requests are new watches: one for each kind in five minutes, which is kube's timeout
/// of a watch. A watch does not end because it has no events.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_operator_sends_no_requests_except_watches() {
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
    assert!(watches <= 5 * (1 + time.as_secs() / 290), "{after:?}");
    assert_eq!(after.1, 0);
}
