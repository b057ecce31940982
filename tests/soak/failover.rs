//! Failover between replicas: how long it takes, and that two replicas never act at the same time. The quick case is in
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

/// Lease duration that the documentation promises, independent of the product's constant.
const TERM: SignedDuration = SignedDuration::from_secs(14);
/// The leader stops this long after its last renewal.
const OURS: SignedDuration = SignedDuration::from_secs(12);
/// Maximum time of a handover at shutdown.
const HANDED_OVER: Duration = Duration::from_secs(5);
/// Maximum time from a crash until another replica has acquired the lease.
const TAKEN: Duration = Duration::from_secs(15);
/// Maximum time until another replica has also issued a token, on a busy machine.
const TAKEN_OVER: Duration = Duration::from_secs(20);

/// Number of objects with a fresh token. A failover must not refresh any of them.
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

/// Waits until each object has its token.
async fn all_there(world: &World) {
    world.ready("billing", "True", "Issued").await;
    for i in 1..FRESH {
        world.ready(&format!("fresh-{i}"), "True", "Issued").await;
    }
    assert_eq!(world.issuer.mints().await, FRESH);
}

/// Requests a refresh of `billing-token` and returns the time from `since` until the new token is there.
async fn renewed(world: &World, run: usize, since: Instant) -> Duration {
    let old = world.token("billing-token").await;
    world.annotate("billing", "renew-request", &run.to_string()).await;
    world.secret_until("billing-token", |d| d["token"] != old).await;
    since.elapsed()
}

fn report(what: &str, mut took: Vec<Duration>, limit: Duration) {
    took.sort();
    let seconds: Vec<String> = took.iter().map(|t| format!("{:.2}", t.as_secs_f64())).collect();
    println!("{what}, {} runs, seconds: {}", took.len(), seconds.join(" "));
    assert!(took.iter().all(|t| *t < limit), "{what}: not under {limit:?}");
}

/// Successful writes of operators to a world's token Secrets and status. `proxied` selects the operators behind a proxy
/// or the others.
fn written(world: &World, proxied: bool) -> Vec<Request> {
    let mut all = world.cluster.audit.requests(&world.name);
    let tokens = |r: &Request| r.resource == "secrets" && r.name.ends_with("-token");
    all.retain(|r| r.writes() && r.code < 300 && (tokens(r) || r.resource == "zitadelserviceusers/status"));
    all.retain(|r| (r.agent == AGENT) == proxied);
    all
}

/// Successful writes to the Lease.
fn written_leases(replicas: &Replicas<'_>) -> Vec<Request> {
    let mut all = replicas.audit().requests(&replicas.home);
    all.retain(|r| r.resource == "leases" && r.writes() && r.code < 300);
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminated_leader_hands_over_quickly_without_extra_tokens() {
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
    report("SIGTERM until the other replica issues a token", took, HANDED_OVER);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_leader_is_replaced_within_the_lease_without_extra_tokens() {
    let world = fresh("crash").await;
    let replicas = Replicas::of(&world).await;
    let mut leader = replicas.start("r0").await;
    all_there(&world).await;
    let (mut took, mut taken) = (Vec::new(), Vec::new());
    for run in 1..=runs() {
        let next = format!("r{run}");
        let standby = replicas.start(&next).await;
        // A different moment between two renewals in each run.
        replicas.renewed().await;
        tokio::time::sleep(Duration::from_millis(700 * run as u64 % 3_000)).await;
        let (since, killed) = (Instant::now(), Timestamp::now());
        leader.kill();
        took.push(renewed(&world, run, since).await);
        // `acquireTime` is when the new leader sent its write; the audit log says when it arrived. A last renewal of
        // the old leader arrived before.
        let asked = replicas.led_by(&next).await.acquire_time.expect("a time").0;
        let leases = written_leases(&replicas);
        let arrived = leases.iter().find(|r| r.at >= asked).expect("acquired").at;
        taken.push(arrived.duration_since(killed).unsigned_abs());
        leader = standby;
    }
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, FRESH + runs());
    report("SIGKILL until the other replica issues a token", took, TAKEN_OVER);
    // Measured by the API server's log, so that the test's own time does not count. The lease lasts 14 s, and the
    // leader died some time after its last renewal. That time and one second are the reserve for a busy machine.
    report("SIGKILL until the other replica has the lease", taken, TAKEN);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partitioned_leader_is_replaced_and_can_lead_again() {
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
        // The same process is a standby now, and leads again once the other replica ends.
        standby.terminate().await;
        replicas.led_by_within("cut", EVENTUALLY).await;
    }
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, FRESH + runs());
    leader.terminate().await;
    report("partition until the other replica issues a token", took, TAKEN_OVER);
}

/// The hard case: only the renewals are lost and every other request succeeds, so the leader must stop by its own
/// clock.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_without_renewals_stops_before_the_next_one_starts() {
    let world = World::new("lost").await;
    let replicas = Replicas::of(&world).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let mut old = replicas.start_behind(&proxy, "old").await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "True", "Issued").await;
    let _new = replicas.start("new").await;

    // Each edit leads to one write by the current leader.
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
    // The answer to the last renewal is late. The lease counts from when the renewal was sent.
    let late = proxy.hold_after("PUT", "/leases/");
    late.reached().await;
    proxy.lose("PUT", "/leases/");
    tokio::time::sleep(Duration::from_secs(2)).await;
    late.release();
    let (round, _) = tokio::join!(edits, replicas.led_by("new"));
    old.await_line("leadership lost").await;
    until_labelled(&world, &round).await;

    let leases = written_leases(&replicas).into_iter();
    let (olds, news): (Vec<_>, Vec<_>) = leases.partition(|r| r.agent == AGENT);
    let renewed = olds.last().expect("renewed").at;
    let after = |at: Timestamp| at.duration_since(renewed);
    let taken = after(news.first().expect("acquired").at);
    let last = after(written(&world, true).last().expect("wrote").at);
    let first = after(written(&world, false).first().expect("wrote").at);
    println!(
        "after the last renewal: the old leader wrote until {:.2} s; the new one acquired the lease at {:.2} s and \
         wrote from {:.2} s",
        last.as_secs_f64(),
        taken.as_secs_f64(),
        first.as_secs_f64()
    );
    assert!(
        last > OURS - SignedDuration::from_secs(1),
        "not measured: the old leader stopped too early"
    );
    // Not `last < OURS`: `last` is when a write arrived at the API server, `OURS` bounds when the old leader sends one.
    assert!(last < taken && taken > TERM - SignedDuration::from_millis(100) && first > taken);
    assert_eq!(world.issuer.mints().await, 1);

    // With its connection back, the old leader is a standby.
    proxy.find();
    let (reconciles, writes) = (old.passes().await, written(&world, true).len());
    world.sentinel().await;
    assert_eq!(old.passes().await, reconciles);
    assert_eq!(written(&world, true).len(), writes);
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
async fn a_leader_suspended_during_a_token_request_writes_nothing_after_it_resumes() {
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

    // One token request is in flight, and the other waits for the single slot.
    let slow = json!({"path": "/oauth/v2/token", "times": 1, "latencyMillis": 3_000});
    world.issuer.fault(slow).await;
    let before = world.issuer.requests().await.len();
    world.renew("billing").await;
    eventually("the request is in flight", async || {
        world.issuer.requests().await.len() > before
    })
    .await;
    let reads = world.cluster.audit.count(&world.name, "get", "secrets");
    world.renew("orders").await;
    eventually("the second request waits", async || {
        world.cluster.audit.count(&world.name, "get", "secrets") >= reads + 2
    })
    .await;
    old.signal("STOP");
    replicas.led_by("new").await;
    let second = world.secret_until("billing-token", |d| d["token"] != first[0]).await;
    world.secret_until("orders-token", |d| d["token"] != first[1]).await;
    world.ready("billing", "True", "Issued").await;
    world.ready("orders", "True", "Issued").await;
    let resumed = Timestamp::now();
    old.signal("CONT");
    old.await_line("leadership lost").await;
    world.sentinel().await;

    assert_eq!(world.token("billing-token").await, second["token"]);
    assert!(written(&world, true).iter().all(|r| r.at < resumed));
    // The first two tokens, the one in flight at the suspension, and two of the new leader.
    assert_eq!(world.issuer.mints().await, 5);
    assert!(new.passes().await > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_in_flight_while_the_leader_is_suspended_is_refused() {
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
    eventually("the write is refused", async || refused()).await;
    old.signal("CONT");
    old.await_line("leadership lost").await;
    world.sentinel().await;
    assert_eq!(world.token("billing-token").await, second["token"]);
    assert_eq!(world.issuer.mints().await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_request_in_flight_is_written_before_the_lease_is_released() {
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

    // Longer than the lease, so the leader must keep renewing it during the shutdown.
    let slow = json!({"path": "/oauth/v2/token", "times": 1, "latencyMillis": 16_000});
    world.issuer.fault(slow).await;
    let before = world.issuer.requests().await.len();
    world.renew("billing").await;
    eventually("the request is in flight", async || {
        world.issuer.requests().await.len() > before
    })
    .await;
    old.terminate().await;
    assert_ne!(world.token("billing-token").await, first);
    replicas.led_by("new").await;
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_shorter_than_the_lease_keeps_the_leader() {
    let world = World::new("short").await;
    let replicas = Replicas::of(&world).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let leader = replicas.start_behind(&proxy, "leader").await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "True", "Issued").await;
    let standby = replicas.start("standby").await;
    let before = replicas.led_by("leader").await;

    // As long as docs/high-availability.md promises. The outage starts right after a renewal, which leaves a busy
    // machine 4 s until the leader must stop.
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
            .any(|l| l.contains("the lease could not be acquired or renewed")),
        "not measured"
    );
    assert!(log.iter().all(|l| !l.contains("leadership lost")));
    assert_eq!(world.issuer.mints().await, 2);
}

/// After a lost answer the Lease has a version that the leader does not know. The leader may have less time left than
/// it waits between two attempts.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_renewal_was_handled_without_an_answer_renews_at_the_next_attempt() {
    let world = World::new("answer").await;
    let replicas = Replicas::of(&world).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let leader = replicas.start_behind(&proxy, "leader").await;
    let before = replicas.led_by("leader").await;

    let unanswered = proxy.hold_after("PUT", "/leases/");
    unanswered.reached().await;
    let writes = || {
        let mut all = replicas.audit().requests(&replicas.home);
        all.retain(|r| r.resource == "leases" && r.writes());
        all
    };
    eventually("the write with the old version is refused", async || {
        writes().iter().any(|r| r.code == 409)
    })
    .await;
    replicas.renewed().await;
    let all = writes();
    let refused = all.iter().position(|r| r.code == 409).expect("refused");
    let (refused, renewed) = (&all[refused], &all[refused + 1]);
    assert_eq!(renewed.code, 200);
    let between = renewed.at.duration_since(refused.at);
    assert!(between < SignedDuration::from_secs(1), "renewed {between} later");
    assert_eq!(replicas.led_by("leader").await.acquire_time, before.acquire_time);
    assert!(leader.log().iter().all(|l| !l.contains("leadership lost")));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_longer_than_the_lease_keeps_the_unwritten_token() {
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
    eventually("the token is issued", async || world.issuer.mints().await == 2).await;
    proxy.refuse("");
    leader.await_line("leadership lost").await;
    proxy.open();
    proxy.find();
    world.secret_until("billing-token", |d| d["token"] != first).await;
    world.ready("billing", "True", "Issued").await;
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, 2);
    assert_eq!(replicas.led_by("leader").await.acquire_time, before.acquire_time);
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_minutes_apart_cause_no_second_leader() {
    let world = World::new("clocks").await;
    let replicas = Replicas::of(&world).await;
    let (behind, ahead) = (Clock::new(), Clock::new());
    behind.set(-600);
    ahead.set(600);
    let leader = replicas.start_on_clock(&behind, "behind").await;
    let before = replicas.led_by("behind").await;
    let standby = replicas.start_on_clock(&ahead, "ahead").await;
    let offset = before.renew_time.expect("a time").0.duration_since(Timestamp::now());
    assert!(
        offset < SignedDuration::from_secs(-500),
        "not measured: the leader's clock is off by {offset}"
    );

    let watched = Instant::now();
    while watched.elapsed() < Duration::from_secs(20) {
        let now = replicas.led_by("behind").await;
        assert_eq!(now.acquire_time, before.acquire_time);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // Clocks may also change while a replica leads.
    behind.set(600);
    ahead.set(-600);
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(replicas.led_by("behind").await.acquire_time, before.acquire_time);
    assert_eq!(standby.passes().await, 0);
    let since = Instant::now();
    leader.kill();
    replicas.led_by_within("ahead", SOON).await;
    println!(
        "a replica whose clock is 20 minutes behind leads after {:.1} s",
        since.elapsed().as_secs_f64()
    );
    assert!(since.elapsed() < TAKEN_OVER);
}

/// A replica that leads again does not use the clock skew that it measured in its earlier term.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_clock_changed_while_another_replica_led_costs_no_extra_token() {
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
    old.await_line("leadership lost").await;
    proxy.open();
    // By the earlier skew, each token of this server has expired when it is issued.
    world.issuer.settings(json!({"clockOffsetMillis": -280_000})).await;
    let mut spec = world.instance_spec();
    spec["connection"]["timeout"] = json!("9s");
    world.apply_instance(spec).await.expect("accepted");
    world.instance_ready("True", "InstanceReady").await;
    renewed(&world, 1, Instant::now()).await;
    world.ready("billing", "True", "Issued").await;
    let mints = world.issuer.mints().await;
    // The server's clock stays unknown for one second.
    let slow = json!({"path": "/.well-known/openid-configuration", "latencyMillis": 1_000});
    world.issuer.fault(slow).await;
    new.terminate().await;
    replicas.led_by_within("old", EVENTUALLY).await;
    world.sentinel().await;
    // Token requests of one object run one after another: an earlier request has ended once this one has.
    renewed(&world, 2, Instant::now()).await;
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, mints + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reconcile_that_outlives_the_lease_writes_nothing_until_the_lease_is_renewed() {
    let world = World::new("outlives").await;
    let replicas = Replicas::of(&world).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let mut leader = replicas.start_behind(&proxy, "leader").await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "True", "Issued").await;

    // The last read that the write needs is answered after the lease has expired.
    let hold = proxy.hold_before("GET", "/secrets/billing-token");
    let mut spec = one_token("billing-token");
    spec["tokens"][0]["secret"]["labels"] = json!({"app.kubernetes.io/version": "1"});
    world.service_user("billing", spec).await.expect("accepted");
    hold.reached().await;
    proxy.lose("PUT", "/leases/");
    leader.await_line("leadership lost").await;
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
