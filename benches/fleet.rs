//! The fleet benchmark measures the operator with many objects. It compares the result with a baseline: the same
//! clients in a bare loop on the same machine. It prints figures and ratios and does not fail on them.
#![allow(missing_docs, clippy::expect_used, reason = "a benchmark fails by panicking")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, ResourceExt};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use support::issuer::User;
use support::operator::Operator;
use support::world::{PROJECT, World, condition};
use zitadel_tokens::api::ZitadelServiceUser;
use zitadel_tokens::domain::key;
use zitadel_tokens::zitadel::{Hosts, RequestBudget, Settings, ZitadelClient};

const NAMESPACES: usize = 10;
const EACH: usize = 100;
const OBJECTS: usize = NAMESPACES * EACH;
const CONCURRENT: usize = 32;
const LIMIT: Duration = Duration::from_mins(5);

#[tokio::main]
async fn main() {
    if std::env::args().all(|a| a != "quick") {
        // `cargo test --benches` runs benchmarks too.
        return;
    }
    println!(
        "{OBJECTS} objects in {NAMESPACES} namespaces. Request budgets: 1,000/s with burst 10,000 (burst, restart), and \
         the default of 30/s with burst 300 (wave).\n"
    );
    println!(
        "| run | wall s | operator CPU s | peak RSS MB | tokens issued | Secret reads | Secret writes | status writes |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let world = World::new("fleet").await;
    let user = world
        .issuer
        .user(json!({"tokenType": "JWT", "lifetimeSeconds": 3600}))
        .await;
    open_budget(&world).await;

    let floor = floor(&world, &user).await;
    let fleet: Vec<String> = (0..NAMESPACES).map(|i| format!("{}-fleet-{i}", world.name)).collect();
    create(&world, &fleet, &user).await;

    let before = Counts::of(&world, &fleet).await;
    let started = Instant::now();
    let operator = world.operator().await;
    all_ready(&world, &fleet).await;
    let burst = started.elapsed();
    row(
        "1,000 first tokens, from the start of the operator",
        burst,
        Some(&operator),
        &Counts::of(&world, &fleet).await.since(&before),
    );

    operator.kill();
    let before = Counts::of(&world, &fleet).await;
    let started = Instant::now();
    let operator = world.operator().await;
    world.sentinel().await;
    idle(&world, &fleet, &before).await;
    row(
        "restart with fresh tokens",
        started.elapsed(),
        Some(&operator),
        &Counts::of(&world, &fleet).await.since(&before),
    );

    let (newcomers, wave) = newcomers(&world, &fleet, &operator).await;
    let median = newcomers[newcomers.len() / 2];
    let worst = newcomers.last().copied().unwrap_or_default();
    println!("\nburst / baseline: {:.2}", burst.as_secs_f64() / floor.as_secs_f64());
    println!(
        "first token of a new object during the wave ({:.0} s): median {:.0} ms, worst of {} {:.0} ms",
        wave.as_secs_f64(),
        median.as_secs_f64() * 1e3,
        newcomers.len(),
        worst.as_secs_f64() * 1e3
    );
}

fn allow_all(world: &World, connection: Value) -> Value {
    let mut spec = world.instance_spec();
    spec["connection"] = connection;
    spec
}

async fn open_budget(world: &World) {
    let open = json!({"allowInsecureHTTP": true, "requestsPerSecond": 1000, "burst": 10000});
    world.apply_instance(allow_all(world, open)).await.expect("an instance");
}

/// The baseline: the same reads, token requests and writes, with the same clients and concurrency, without the
/// operator.
async fn floor(world: &World, user: &User) -> Duration {
    let namespaces: Vec<String> = (0..NAMESPACES).map(|i| format!("{}-floor-{i}", world.name)).collect();
    create(world, &namespaces, user).await;
    let settings = Settings {
        name: world.name.clone(),
        issuer: world.issuer.url.clone(),
        endpoint: None,
        ca: None,
        tls_server_name: None,
        proxy: None,
        timeout: Duration::from_secs(10),
        allow_insecure_http: true,
        budget: RequestBudget {
            per_second: 1000,
            burst: 10_000,
            concurrent: 8,
        },
    };
    // The provider may be installed already.
    let _ = jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER.install_default();
    let instance = ZitadelClient::new(settings, &Hosts::default()).expect("an instance");
    let (before, cpu, started) = (Counts::of(world, &namespaces).await, cpu("self"), Instant::now());
    let objects = namespaces.iter().flat_map(|ns| (0..EACH).map(move |i| (ns, i)));
    stream::iter(objects)
        .for_each_concurrent(CONCURRENT, |(ns, i)| by_hand(world, &instance, ns, i))
        .await;
    let elapsed = started.elapsed();
    let counts = Counts::of(world, &namespaces).await.since(&before);
    println!(
        "| baseline: bare loop | {:.1} | {:.1} | | {} | {} | {} | {} |",
        elapsed.as_secs_f64(),
        crate::cpu("self") - cpu,
        counts.mints,
        counts.reads,
        counts.writes,
        counts.statuses
    );
    elapsed
}

async fn by_hand(world: &World, instance: &ZitadelClient, namespace: &str, i: usize) {
    let secrets: Api<Secret> = Api::namespaced(world.client.clone(), namespace);
    let users: Api<ZitadelServiceUser> = Api::namespaced(world.client.clone(), namespace);
    let (name, token_name) = (format!("u{i}"), format!("u{i}-token"));
    let file = secrets.get("key").await.expect("a key").data.expect("data")["key.json"]
        .0
        .clone();
    secrets.get_opt(&token_name).await.expect("readable");
    let key = key::parse(&file).expect("a key");
    let scope = format!("openid urn:zitadel:iam:org:project:id:{PROJECT}:aud");
    let token = instance
        .exchange(&key, &scope)
        .await
        .expect("a token")
        .answer
        .access_token;
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": token_name}, "stringData": {"token": token.expose_secret()}});
    secrets
        .patch(
            &token_name,
            &PatchParams::apply("floor").force(),
            &Patch::Apply(&secret),
        )
        .await
        .expect("written");
    let mut user = users.get(&name).await.expect("a user");
    user.status = Some(serde_json::from_value(json!({"userID": key.user_id, "tokensReady": "1/1"})).expect("a status"));
    users
        .replace_status(&name, &PostParams::default(), &user)
        .await
        .expect("written");
}

/// Namespaces with a key Secret and [`EACH`] service users.
async fn create(world: &World, namespaces: &[String], user: &User) {
    for ns in namespaces {
        world.namespace(ns).await;
        key_secret(world, ns, user).await;
    }
    let objects = namespaces.iter().flat_map(|ns| (0..EACH).map(move |i| (ns, i)));
    stream::iter(objects)
        .for_each_concurrent(CONCURRENT, |(ns, i)| service_user(world, ns, format!("u{i}")))
        .await;
}

async fn key_secret(world: &World, namespace: &str, user: &User) {
    let secrets: Api<Secret> = Api::namespaced(world.client.clone(), namespace);
    let object = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "stringData": {"key.json": user.key}});
    secrets
        .patch("key", &PatchParams::apply("bench").force(), &Patch::Apply(&object))
        .await
        .expect("a key Secret");
}

async fn service_user(world: &World, namespace: &str, name: String) {
    let api: Api<ZitadelServiceUser> = Api::namespaced(world.client.clone(), namespace);
    let object = json!({
        "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelServiceUser", "metadata": {"name": name},
        "spec": {
            "instanceRef": {"name": world.name}, "keySecretRef": {"name": "key"},
            "tokens": [{"name": "main", "projectIDs": [PROJECT], "secret": {"name": format!("{name}-token")}}],
        },
    });
    api.create(&PostParams::default(), &serde_json::from_value(object).expect("a user"))
        .await
        .expect("created");
}

/// Waits with one watch until every object of the fleet is Ready.
async fn all_ready(world: &World, namespaces: &[String]) {
    let namespaces: HashSet<&str> = namespaces.iter().map(String::as_str).collect();
    let api: Api<ZitadelServiceUser> = Api::all(world.client.clone());
    let mut events = std::pin::pin!(
        watcher(api, watcher::Config::default())
            .default_backoff()
            .applied_objects()
    );
    let mut ready = HashSet::new();
    let all = async {
        while let Some(user) = events.try_next().await.expect("watched") {
            let namespace = user.namespace().unwrap_or_default();
            if namespaces.contains(&*namespace) && condition(&user, "Ready").is_some_and(|c| c.0 == "True") {
                ready.insert((namespace, user.name_any()));
                if ready.len() == OBJECTS {
                    return;
                }
            }
        }
    };
    tokio::time::timeout(LIMIT, all).await.expect("all Ready in time");
}

/// Waits until the operator has reconciled every object again. Each reconcile reads two Secrets.
async fn idle(world: &World, namespaces: &[String], before: &Counts) {
    let deadline = Instant::now() + LIMIT;
    while Counts::of(world, namespaces).await.since(before).reads < 2 * OBJECTS {
        assert!(Instant::now() < deadline, "not every object was reconciled in time");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Starts a wave: the whole fleet gets a new key, so that all tokens are due at once, with the default budget.
/// Meanwhile, creates ten new objects in a namespace of their own. Returns how long each of them waits for its token,
/// sorted, and the duration of the wave.
async fn newcomers(world: &World, fleet: &[String], operator: &Operator) -> (Vec<Duration>, Duration) {
    let default = json!({"allowInsecureHTTP": true});
    world
        .apply_instance(allow_all(world, default))
        .await
        .expect("an instance");
    let user = world
        .issuer
        .user(json!({"tokenType": "JWT", "lifetimeSeconds": 3600}))
        .await;
    let quiet = format!("{}-quiet", world.name);
    world.namespace(&quiet).await;
    key_secret(world, &quiet, &user).await;
    let (before, started) = (Counts::of(world, fleet).await, Instant::now());
    for ns in fleet {
        key_secret(world, ns, &user).await;
    }
    // The wave uses up the burst of the budget first. From then on the rate limits it.
    while world.issuer.mints().await < before.mints + 350 {
        assert!(started.elapsed() < LIMIT, "the wave did not start in time");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let secrets: Api<Secret> = Api::namespaced(world.client.clone(), &quiet);
    let mut waits = Vec::new();
    for i in 0..10 {
        let name = format!("newcomer{i}");
        let asked = Instant::now();
        service_user(world, &quiet, name.clone()).await;
        support::world::until(secrets.clone(), &format!("{name}-token"), LIMIT, |_| true).await;
        waits.push(asked.elapsed());
    }
    while world.issuer.mints().await < before.mints + OBJECTS + waits.len() {
        assert!(started.elapsed() < LIMIT, "the wave did not end in time");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let wave = started.elapsed();
    let counts = Counts::of(world, fleet).await.since(&before);
    row(
        "wave: 1,000 tokens due at once, 10 new objects meanwhile",
        wave,
        Some(operator),
        &counts,
    );
    waits.sort();
    (waits, wave)
}

struct Counts {
    mints: usize,
    reads: usize,
    writes: usize,
    statuses: usize,
}

impl Counts {
    async fn of(world: &World, namespaces: &[String]) -> Self {
        let mut counted: BTreeMap<(String, String), usize> = BTreeMap::new();
        for ns in namespaces {
            for request in world.cluster.audit.requests(ns) {
                *counted.entry((request.verb, request.resource)).or_default() += 1;
            }
        }
        let count = |verb: &str, resource: &str| {
            counted
                .get(&(verb.to_owned(), resource.to_owned()))
                .copied()
                .unwrap_or(0)
        };
        Self {
            mints: world.issuer.mints().await,
            reads: count("get", "secrets"),
            writes: count("patch", "secrets"),
            statuses: count("update", "zitadelserviceusers/status"),
        }
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            mints: self.mints - before.mints,
            reads: self.reads - before.reads,
            writes: self.writes - before.writes,
            statuses: self.statuses - before.statuses,
        }
    }
}

fn row(what: &str, wall: Duration, operator: Option<&Operator>, counts: &Counts) {
    let pid = operator.map(|o| o.pid.to_string()).unwrap_or_default();
    println!(
        "| {what} | {:.1} | {:.1} | {:.0} | {} | {} | {} | {} |",
        wall.as_secs_f64(),
        cpu(&pid),
        peak_rss(&pid),
        counts.mints,
        counts.reads,
        counts.writes,
        counts.statuses
    );
}

/// User and system time of a process, in seconds (proc(5); a tick is 10 ms).
fn cpu(pid: &str) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
    let ticks = |i: usize| fields[i].parse::<f64>().expect("a number");
    (ticks(11) + ticks(12)) / 100.0
}

/// Peak resident set size of a process, in MB.
fn peak_rss(pid: &str) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).expect("VmHWM");
    let kb: f64 = line
        .split_whitespace()
        .nth(1)
        .expect("a number")
        .parse()
        .expect("a number");
    kb / 1024.0
}
