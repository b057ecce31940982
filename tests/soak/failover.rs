//! Replicas that stand by for each other: how long it takes, and that two never do one's work. The quick case is in
//! tests/it/leadership.rs.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::json;

use crate::reduced;
use crate::support::audit::Request;
use crate::support::clock::Clock;
use crate::support::proxy::{AGENT, Proxy};
use crate::support::replicas::Replicas;
use crate::support::world::{World, one_token, until};
use crate::support::{EVENTUALLY, SOON, eventually};

/// The lease: what the operator promises, not what it says.
const TERM: SignedDuration = SignedDuration::from_secs(14);
/// The leader stops this much after its last renewal.
const OURS: SignedDuration = SignedDuration::from_secs(12);
/// Longest time of a hand-over.
const HANDED_OVER: Duration = Duration::from_secs(5);
/// Longest time from a crash until another has taken the lease.
const TAKEN: Duration = Duration::from_secs(15);
/// Longest time until another has done a leader's work too, on a busy machine.
const TAKEN_OVER: Duration = Duration::from_secs(20);

/// Objects with a fresh token, none of which may be minted again.
const FRESH: usize = 20;

fn runs() -> usize {
    if reduced() { 2 } else { 10 }
}

/// A world with fresh tokens, one of them in `billing-token`.
async fn fresh(test: &str) -> World {
    let world = World::new(test).await;
    world.instance().await;
    let user = world.simple("billing", json!({"tokenType": "JWT"})).await;
    for i in 1..FRESH {
        let name = format!("fresh-{i}");
        world.key_secret(&format!("{name}-key"), &user).await;
        let spec = one_token(&format!("{name}-token"));
        world.service_user(&name, spec).await.expect("accepted");
    }
    world
}

/// Waits until each has its token.
async fn all_there(world: &World) {
    world.ready("billing", "True", "Issued").await;
    for i in 1..FRESH {
        world.ready(&format!("fresh-{i}"), "True", "Issued").await;
    }
    assert_eq!(world.issuer.mints().await, FRESH);
}

/// Asks for another token in `billing-token`, and tells how long it took to be there since `since`.
async fn renewed(world: &World, run: usize, since: Instant) -> Duration {
    let old = world.token("billing-token").await;
    world.annotate("billing", "renew-request", &run.to_string()).await;
    world.secret_until("billing-token", |d| d["token"] != old).await;
    since.elapsed()
}

fn told(what: &str, mut took: Vec<Duration>, limit: Duration) {
    took.sort();
    let seconds: Vec<String> = took.iter().map(|t| format!("{:.2}", t.as_secs_f64())).collect();
    println!("{what}, {} runs, seconds: {}", took.len(), seconds.join(" "));
    assert!(took.iter().all(|t| *t < limit), "{what}: not under {limit:?}");
}

/// What operators wrote to a world's token Secrets and status with success: those behind a proxy, or the others.
fn written(world: &World, proxied: bool) -> Vec<Request> {
    let mut all = world.cluster.audit.requests(&world.name);
    let tokens = |r: &Request| r.resource == "secrets" && r.name.ends_with("-token");
    all.retain(|r| r.writes() && r.code < 300 && (tokens(r) || r.resource == "zitadelserviceusers/status"));
    all.retain(|r| (r.agent == AGENT) == proxied);
    all
}

/// What was written to the Lease with success.
fn written_leases(replicas: &Replicas<'_>) -> Vec<Request> {
    let mut all = replicas.audit().requests(&replicas.home);
    all.retain(|r| r.resource == "leases" && r.writes() && r.code < 300);
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_asked_to_end_hands_over_in_moments_and_nothing_is_minted_twice() {
    let world = fresh("graceful").await;
    let replicas = Replicas::of(&world).await;
    let mut leader = replicas.start("r0").await;
    all_there(&world).await;
    let mut took = Vec::new();
    for run in 1..=runs() {
        let next = format!("r{run}");
        let standby = replicas.start(&next).await;
        let since = Instant::now();
        let ((), serves) = tokio::join!(async { drop(leader.terminate().await) }, renewed(&world, run, since));
        took.push(serves);
        replicas.led_by(&next).await;
        leader = standby;
    }
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, FRESH + runs());
    told("asked to end until the other serves", took, HANDED_OVER);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_killed_is_followed_within_its_lease_and_nothing_is_minted_twice() {
    let world = fresh("crash").await;
    let replicas = Replicas::of(&world).await;
    let mut leader = replicas.start("r0").await;
    all_there(&world).await;
    let (mut took, mut taken) = (Vec::new(), Vec::new());
    for run in 1..=runs() {
        let next = format!("r{run}");
        let standby = replicas.start(&next).await;
        // At any place between two renewals.
        replicas.renewed().await;
        tokio::time::sleep(Duration::from_millis(700 * run as u64 % 3_000)).await;
        let (since, killed) = (Instant::now(), Timestamp::now());
        leader.kill();
        took.push(renewed(&world, run, since).await);
        // It says when it asked for the lease; the API server, when that came. A last renewal of the other came before.
        let asked = replicas.led_by(&next).await.acquire_time.expect("a time").0;
        let leases = written_leases(&replicas);
        let came = leases.iter().find(|r| r.at >= asked).expect("taken").at;
        taken.push(came.duration_since(killed).unsigned_abs());
        leader = standby;
    }
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, FRESH + runs());
    told("killed until the other serves", took, TAKEN_OVER);
    // By the API server's log, so that nothing counts that the test does. The lease is one of 14 s, and the leader died some
    // time after it had renewed it: that and a second are left for a busy machine.
    told("killed until the other has the lease", taken, TAKEN);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_cut_off_is_followed_and_may_come_back() {
    let world = fresh("cut").await;
    let replicas = Replicas::of(&world).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let leader = replicas.start_behind(&proxy, "cut").await;
    all_there(&world).await;
    let mut took = Vec::new();
    for run in 1..=runs() {
        let standby = replicas.start(&format!("r{run}")).await;
        let since = Instant::now();
        proxy.refuse("");
        took.push(renewed(&world, run, since).await);
        proxy.open();
        // The same process stands by now, and leads again when it is its turn.
        standby.terminate().await;
        replicas.led_by_within("cut", EVENTUALLY).await;
    }
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, FRESH + runs());
    leader.terminate().await;
    told("cut off until the other serves", took, TAKEN_OVER);
}

/// The hard case: it reaches everything, and only its renewals are lost. So that it stops by its own clock alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_renewals_are_lost_has_stopped_before_the_other_begins() {
    let world = World::new("lost").await;
    let replicas = Replicas::of(&world).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let mut old = replicas.start_behind(&proxy, "old").await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "True", "Issued").await;
    let _new = replicas.start("new").await;

    // A write for each edit, by whoever leads.
    let until = Instant::now() + Duration::from_secs(25);
    let edits = async {
        let mut round = 0;
        while Instant::now() < until {
            round += 1;
            let mut spec = one_token("billing-token");
            spec["tokens"][0]["secret"]["labels"] = json!({"app.kubernetes.io/version": round.to_string()});
            world.service_user("billing", spec).await.expect("accepted");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        round.to_string()
    };
    // The answer to the last renewal is late: what counts is when it was asked for.
    let late = proxy.hold_after("PUT", "/leases/");
    late.reached().await;
    proxy.lose("PUT", "/leases/");
    tokio::time::sleep(Duration::from_secs(2)).await;
    late.release();
    let (round, _) = tokio::join!(edits, replicas.led_by("new"));
    old.await_line("not leading any more").await;
    until_labelled(&world, &round).await;

    let leases = written_leases(&replicas).into_iter();
    let (olds, news): (Vec<_>, Vec<_>) = leases.partition(|r| r.agent == AGENT);
    let renewed = olds.last().expect("renewed").at;
    let after = |at: Timestamp| at.duration_since(renewed);
    let taken = after(news.first().expect("taken").at);
    let last = after(written(&world, true).last().expect("wrote").at);
    let first = after(written(&world, false).first().expect("wrote").at);
    println!(
        "after the last renewal: old wrote until {:.2} s, new took the lease at {:.2} s and wrote from {:.2} s",
        last.as_secs_f64(),
        taken.as_secs_f64(),
        first.as_secs_f64()
    );
    assert!(
        last > OURS - SignedDuration::from_secs(1),
        "not measured: it stopped before it had to"
    );
    // Not `last < OURS`: the one is when a write came to the API server, the other when the old one last sends one.
    assert!(last < taken && taken > TERM - SignedDuration::from_millis(100) && first > taken);
    assert_eq!(world.issuer.mints().await, 1);

    // Back on the net it stands by.
    proxy.find();
    let (passes, wrote) = (old.passes().await, written(&world, true).len());
    world.sentinel().await;
    assert_eq!(old.passes().await, passes);
    assert_eq!(written(&world, true).len(), wrote);
    assert_eq!(replicas.leader().await.as_deref(), Some("new"));
}

async fn until_labelled(world: &World, round: &str) {
    let labelled = |secret: &Secret| {
        secret
            .metadata
            .labels
            .as_ref()
            .and_then(|l| l.get("app.kubernetes.io/version"))
            .is_some_and(|l| l == round)
    };
    until(world.secrets(), "billing-token", SOON, labelled).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_was_stopped_during_a_mint_writes_nothing_when_it_goes_on() {
    let world = World::new("stop-mint").await;
    let replicas = Replicas::of(&world).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let mut old = replicas.start_behind(&proxy, "old").await;
    let mut spec = world.instance_spec();
    spec["connection"]["maxConcurrentRequests"] = json!(1);
    world.apply_instance(spec).await.expect("an instance");
    let mut first = Vec::new();
    for name in ["billing", "orders"] {
        world.simple(name, json!({"tokenType": "JWT"})).await;
        world.ready(name, "True", "Issued").await;
        first.push(world.token(&format!("{name}-token")).await);
    }
    let new = replicas.start("new").await;

    // One is asked for, and the other waits for its place.
    let slow = json!({"path": "/oauth/v2/token", "times": 1, "latencyMillis": 3_000});
    world.issuer.fault(slow).await;
    let before = world.issuer.requests().await.len();
    world.renew("billing").await;
    eventually("asked", async || world.issuer.requests().await.len() > before).await;
    let reads = world.cluster.audit.count(&world.name, "get", "secrets");
    world.renew("orders").await;
    eventually("waiting", async || {
        world.cluster.audit.count(&world.name, "get", "secrets") >= reads + 2
    })
    .await;
    old.signal("STOP");
    replicas.led_by("new").await;
    let second = world.secret_until("billing-token", |d| d["token"] != first[0]).await;
    world.secret_until("orders-token", |d| d["token"] != first[1]).await;
    world.ready("billing", "True", "Issued").await;
    world.ready("orders", "True", "Issued").await;
    let going_on = Timestamp::now();
    old.signal("CONT");
    old.await_line("not leading any more").await;
    world.sentinel().await;

    assert_eq!(world.token("billing-token").await, second["token"]);
    assert!(written(&world, true).iter().all(|r| r.at < going_on));
    // The first two, the one in flight when it was stopped, and those of the new leader.
    assert_eq!(world.issuer.mints().await, 5);
    assert!(new.passes().await > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_was_on_its_way_when_the_leader_was_stopped_is_refused() {
    let world = World::new("stop-write").await;
    let replicas = Replicas::of(&world).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let mut old = replicas.start_behind(&proxy, "old").await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    let first = world.token("billing-token").await;
    world.ready("billing", "True", "Issued").await;
    let _new = replicas.start("new").await;

    let hold = proxy.hold_before("PATCH", "/secrets/billing-token");
    world.renew("billing").await;
    hold.reached().await;
    old.signal("STOP");
    replicas.led_by("new").await;
    let second = world.secret_until("billing-token", |d| d["token"] != first).await;
    world.ready("billing", "True", "Issued").await;
    hold.release();
    let refused = || {
        let all = world.cluster.audit.requests(&world.name);
        all.iter()
            .any(|r| r.agent == AGENT && r.name == "billing-token" && r.verb == "patch" && r.code == 409)
    };
    eventually("refused", async || refused()).await;
    old.signal("CONT");
    old.await_line("not leading any more").await;
    world.sentinel().await;
    assert_eq!(world.token("billing-token").await, second["token"]);
    assert_eq!(world.issuer.mints().await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mint_under_way_is_written_before_the_lease_is_given_back() {
    let world = World::new("drain").await;
    let replicas = Replicas::of(&world).await;
    let old = replicas.start("old").await;
    let mut spec = world.instance_spec();
    spec["connection"]["timeout"] = json!("30s");
    world.apply_instance(spec).await.expect("an instance");
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    let first = world.token("billing-token").await;
    world.ready("billing", "True", "Issued").await;
    let _new = replicas.start("new").await;

    // Longer than the lease, which has to be renewed meanwhile.
    let slow = json!({"path": "/oauth/v2/token", "times": 1, "latencyMillis": 16_000});
    world.issuer.fault(slow).await;
    let before = world.issuer.requests().await.len();
    world.renew("billing").await;
    eventually("asked", async || world.issuer.requests().await.len() > before).await;
    old.terminate().await;
    assert_ne!(world.token("billing-token").await, first);
    replicas.led_by("new").await;
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_shorter_than_the_lease_changes_nothing() {
    let world = World::new("short").await;
    let replicas = Replicas::of(&world).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let leader = replicas.start_behind(&proxy, "leader").await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "True", "Issued").await;
    let standby = replicas.start("standby").await;
    let before = replicas.led_by("leader").await;

    // As long as docs/high-availability.md promises. Right after a renewal, so that a busy machine has 4 s to spare until
    // the leader has to stop.
    replicas.renewed().await;
    proxy.refuse("");
    tokio::time::sleep(Duration::from_secs(8)).await;
    proxy.open();
    renewed(&world, 1, Instant::now()).await;
    world.ready("billing", "True", "Issued").await;
    world.sentinel().await;
    assert_eq!(replicas.led_by("leader").await.acquire_time, before.acquire_time);
    assert_eq!(standby.passes().await, 0);
    let log = leader.log();
    assert!(
        log.iter()
            .any(|l| l.contains("the lease could not be taken or renewed")),
        "not measured"
    );
    assert!(log.iter().all(|l| !l.contains("not leading any more")));
    assert_eq!(world.issuer.mints().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_longer_than_the_lease_costs_no_token_that_was_not_written_yet() {
    let world = World::new("long").await;
    let replicas = Replicas::of(&world).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let mut leader = replicas.start_behind(&proxy, "leader").await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    let first = world.token("billing-token").await;
    world.ready("billing", "True", "Issued").await;
    let before = replicas.led_by("leader").await;

    proxy.lose("PATCH", "/secrets/billing-token");
    world.renew("billing").await;
    eventually("minted", async || world.issuer.mints().await == 2).await;
    proxy.refuse("");
    leader.await_line("not leading any more").await;
    proxy.open();
    proxy.find();
    world.secret_until("billing-token", |d| d["token"] != first).await;
    world.ready("billing", "True", "Issued").await;
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, 2);
    assert_eq!(replicas.led_by("leader").await.acquire_time, before.acquire_time);
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_that_are_minutes_apart_make_no_second_leader() {
    let world = World::new("clocks").await;
    let replicas = Replicas::of(&world).await;
    let (behind, ahead) = (Clock::new(), Clock::new());
    behind.set(-600);
    ahead.set(600);
    let leader = replicas.start_on_clock(&behind, "behind").await;
    let before = replicas.led_by("behind").await;
    let standby = replicas.start_on_clock(&ahead, "ahead").await;
    let told = before.renew_time.expect("a time").0.duration_since(Timestamp::now());
    assert!(
        told < SignedDuration::from_secs(-500),
        "not measured: its clock is {told} off"
    );

    let watched = Instant::now();
    while watched.elapsed() < Duration::from_secs(20) {
        let now = replicas.led_by("behind").await;
        assert_eq!(now.acquire_time, before.acquire_time);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // It may be set while it leads.
    behind.set(600);
    ahead.set(-600);
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(replicas.led_by("behind").await.acquire_time, before.acquire_time);
    assert_eq!(standby.passes().await, 0);
    let since = Instant::now();
    leader.kill();
    replicas.led_by_within("ahead", SOON).await;
    println!(
        "another whose clock is 20 minutes behind leads after {:.1} s",
        since.elapsed().as_secs_f64()
    );
    assert!(since.elapsed() < TAKEN_OVER);
}

/// Who leads again does not reckon by what it knew of the server's clock when it led before.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_clock_that_was_set_while_another_led_costs_no_mint() {
    let world = World::new("reset").await;
    let replicas = Replicas::of(&world).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let mut old = replicas.start_behind(&proxy, "old").await;
    world.instance().await;
    let user = json!({"tokenType": "JWT", "lifetimeSeconds": 240});
    world.simple("billing", user).await;
    world.ready("billing", "True", "Issued").await;
    let new = replicas.start("new").await;
    proxy.refuse("");
    replicas.led_by("new").await;
    old.await_line("not leading any more").await;
    proxy.open();
    // By the clock as it was, each token of this server is expired when it is minted.
    world.issuer.settings(json!({"clockOffsetMillis": -280_000})).await;
    let mut spec = world.instance_spec();
    spec["connection"]["timeout"] = json!("9s");
    world.apply_instance(spec).await.expect("looked at again");
    world.instance_ready("True", "InstanceReady").await;
    renewed(&world, 1, Instant::now()).await;
    world.ready("billing", "True", "Issued").await;
    let mints = world.issuer.mints().await;
    // Its clock is not known for a second.
    let slow = json!({"path": "/.well-known/openid-configuration", "latencyMillis": 1_000});
    world.issuer.fault(slow).await;
    new.terminate().await;
    replicas.led_by_within("old", EVENTUALLY).await;
    world.sentinel().await;
    // One at a time: a mint that was under way has ended when this one has.
    renewed(&world, 2, Instant::now()).await;
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, mints + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pass_that_outlives_the_lease_writes_nothing_until_it_is_renewed() {
    let world = World::new("outlives").await;
    let replicas = Replicas::of(&world).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let mut leader = replicas.start_behind(&proxy, "leader").await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "True", "Issued").await;

    // What it reads comes when the lease has run out: it is all that a write needs.
    let hold = proxy.hold_before("GET", "/secrets/billing-token");
    let mut spec = one_token("billing-token");
    spec["tokens"][0]["secret"]["labels"] = json!({"app.kubernetes.io/version": "1"});
    world.service_user("billing", spec).await.expect("accepted");
    hold.reached().await;
    proxy.lose("PUT", "/leases/");
    leader.await_line("not leading any more").await;
    hold.release();
    leader.await_line("Secret billing-token could not be written").await;
    let back = Timestamp::now();
    proxy.find();
    until_labelled(&world, "1").await;
    let writes = written(&world, true);
    let last = writes.iter().rfind(|r| r.resource == "secrets").expect("written").at;
    assert!(
        last > back,
        "written at {last}, before the lease was renewed after {back}"
    );
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, 1);
}
