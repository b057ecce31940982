//! A token Secret never holds an expired token while ZITADEL can be reached, and a token is minted once per lifetime.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use serde_json::json;

use crate::support::world::{World, claims, data, one_token};

const LIFETIME: u64 = 8;
const SAMPLE: Duration = Duration::from_millis(100);
/// A sampler that slept longer than this has seen nothing.
const GAP: Duration = Duration::from_secs(1);

fn lifetimes() -> u64 {
    if std::env::var("CI").is_ok_and(|v| v == "true") {
        5
    } else {
        20
    }
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
            let more = json!({"name": "more", "projectIds": ["2"], "secret": {"name": "more-token"}});
            spec["tokens"].as_array_mut().expect("a list").push(more);
            names.push("more-token".to_owned());
        }
        world.service_user(user, spec).await.expect("accepted");
    }
    for name in &names {
        world.token(name).await;
    }

    let mut seen: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let (started, mut last, mut widest, mut samples) = (Instant::now(), Instant::now(), Duration::ZERO, 0_u32);
    let mut margin = f64::MAX;
    while started.elapsed() < Duration::from_secs(LIFETIME * lifetimes()) {
        for name in &names {
            let secret = data(&world.secrets().get(name).await.expect("there"));
            let now = Timestamp::now();
            let told: Timestamp = secret["expires_at"].parse().expect("a time");
            let real = Timestamp::from_second(claims(&secret["token"])["exp"].as_i64().expect("exp")).expect("a time");
            assert!(told <= real, "{name}: the Secret tells a later end than the token has");
            assert!(now < told, "{name}: an expired token at {now}, it ended at {told}");
            margin = margin.min(told.duration_since(now).as_secs_f64());
            seen.entry(name).or_default().insert(secret["token"].clone());
            samples += 1;
        }
        widest = widest.max(last.elapsed());
        last = Instant::now();
        tokio::time::sleep(SAMPLE).await;
    }
    assert!(widest < GAP, "not measured: a gap of {widest:?} between samples");
    let distinct: usize = seen.values().map(BTreeSet::len).sum();
    let mints = world.issuer.mints().await;
    println!(
        "{samples} samples, widest gap {widest:?}, least time left {margin:.1} s, {distinct} tokens, {mints} mints"
    );
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
    assert!(
        (mints..=after).contains(&writes),
        "{writes} Secret writes for {mints} to {after} mints"
    );
    assert!(
        statuses <= writes,
        "{statuses} status writes for {writes} Secret writes"
    );
}
