//! A leader is suspended (SIGSTOP) in the middle of a rotation, another replica takes over, and the first one resumes.

use std::cell::Cell;
use std::time::Instant;

use futures::FutureExt;
use serde_json::json;

use crate::reduced;
use crate::rotation::kills::in_parallel;
use crate::rotation::place::{
    Call::{AddKey, ReplaceLedger, RequestToken},
    Place,
    Side::{After, Before},
    Trap,
};
use crate::rotation::subject::{Subject, TOKEN, within};
use crate::sampler::sample;
use crate::support::proxy::{AGENT, Proxy};
use crate::support::replicas::Replicas;
use crate::support::world::World;

/// Lifetime of the token that the sampler watches, in seconds. Its last third is longer than the lease.
const LIFETIME: u64 = 75;

/// After the other replica has added the key again: it takes over within 15 s, and adds the key 30 s after it was stored.
const LATE_MILLIS: u64 = 35_000;

/// Where the leader is suspended.
#[derive(Clone, Copy, Debug)]
enum Stopped {
    /// At a call that never takes effect, or whose answer never arrives.
    At(Place),
    /// At `AddKey`, which ZITADEL handles while the other replica continues with the same key.
    AtLateAddKey,
    /// At this write of the ledger, which arrives after the other replica has rotated the key.
    AtLedger(usize),
    /// At this write of the ledger, which arrives as soon as the other replica leads.
    AtLedgerOnTakeover(usize),
}

const STOPS: &[Stopped] = &[
    Stopped::At(Place(AddKey, 1, After)),
    Stopped::AtLedger(1),
    Stopped::AtLateAddKey,
    Stopped::At(Place(AddKey, 1, Before)),
    Stopped::At(Place(RequestToken, 2, After)),
    Stopped::AtLedger(2),
    Stopped::AtLedger(3),
    Stopped::AtLedgerOnTakeover(1),
    Stopped::AtLedgerOnTakeover(3),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_suspended_during_a_rotation_changes_nothing_after_it_resumes() {
    let started = Instant::now();
    let stops = if reduced() { &STOPS[..3] } else { STOPS };
    let all = stops.iter().enumerate();
    let all = all.map(|(n, stopped)| (format!("{stopped:?}"), suspend(n, *stopped).boxed_local()));
    in_parallel(all.collect()).await;
    println!(
        "{} suspensions in {:.0} s",
        stops.len(),
        started.elapsed().as_secs_f64()
    );
}

async fn suspend(n: usize, stopped: Stopped) {
    let world = World::new(&format!("rotstop{n}")).await;
    if let Stopped::At(Place(RequestToken, ..)) = stopped {
        // Otherwise ZITADEL rejects the first request with the new key.
        world.issuer.settings(json!({"projectionLagMillis": 0})).await;
    }
    let replicas = Replicas::of(&world).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let mut old = replicas.start_behind(&proxy, "old").await;
    world.instance().await;
    let fields = json!({"tokenType": "JWT", "lifetimeSeconds": LIFETIME});
    world.simple("steady", fields).await;
    world.token("steady-token").await;
    let rotation = json!({"interval": "1h", "overlap": "10s"});
    let mut subject = Subject::rotated(&world, "billing", rotation).await;
    subject.assert_settled(&world).await;
    let _new = replicas.start("new").await;

    let ended = Cell::new(false);
    let names = ["steady-token".to_owned()];
    let stopping = async {
        let started = Instant::now();
        let place = match stopped {
            Stopped::At(place) => Some(place),
            Stopped::AtLedger(nth) | Stopped::AtLedgerOnTakeover(nth) => Some(Place(ReplaceLedger, nth, Before)),
            Stopped::AtLateAddKey => None,
        };
        let path = format!("/v2/users/{}/keys", subject.user.id);
        let adds = async || {
            let all = world.issuer.requests().await;
            all.into_iter().filter(|r| r.path == path).collect::<Vec<_>>()
        };
        let before = adds().await.len();
        let mut hold = None;
        if let Some(place) = place {
            let trap = Trap::set(&world, &proxy, &subject, place).await;
            subject.request(&world).await;
            hold = trap.reached().await;
        } else {
            let late = json!({"path": path, "times": 1, "latencyMillis": LATE_MILLIS});
            world.issuer.fault(late).await;
            subject.request(&world).await;
            within("the key is being added", async || adds().await.len() > before).await;
        }
        old.signal("STOP");
        replicas.led_by("new").await;
        let at_once = matches!(stopped, Stopped::AtLedgerOnTakeover(_));
        if let Some(hold) = hold.as_ref().filter(|_| at_once) {
            hold.release();
        }
        subject.handled(&world).await;
        println!(
            "{stopped:?}: the other replica has rotated the key {:.1} s after the request",
            started.elapsed().as_secs_f64()
        );
        if let Some(hold) = hold.as_ref().filter(|_| !at_once) {
            hold.release();
            let refused = || {
                let all = world.cluster.audit.requests(&replicas.home);
                let mut writes = all.iter().filter(|r| r.agent == AGENT && r.verb == "update");
                writes.any(|r| r.resource == "secrets" && r.code == 409)
            };
            within("the late write is refused", async || refused()).await;
        }
        if place.is_none() {
            within("the late key is added", async || adds().await[before].status == 200).await;
        }
        old.signal("CONT");
        old.await_line("leadership lost").await;
        if place.is_none() {
            let adds = adds().await.len() - before;
            assert_eq!(adds, 2, "not measured: the other replica did not add the key too");
            // The surplus key is removed with the replaced ones, at the latest after the next rotation.
            subject.handled(&world).await;
            subject.request(&world).await;
        }
        subject.assert_settled(&world).await;
        world.sentinel().await;
        assert_eq!(replicas.leader().await.as_deref(), Some("new"));
        ended.set(true);
    };
    let (seen, ()) = tokio::join!(sample(&world, &names, || !ended.get()), stopping);
    println!("{stopped:?}: {seen}");
    let requests = world.issuer.requests().await;
    let failed = requests.iter().filter(|r| r.path == TOKEN && r.status >= 300);
    println!("{stopped:?}: {} rejected token requests", failed.count());
}
