//! `kill -9` at each external call of a rotation.

use std::cell::Cell;
use std::panic::AssertUnwindSafe;
use std::time::Instant;

use futures::FutureExt;
use futures::future::{LocalBoxFuture, join_all};
use kube::api::DeleteParams;
use serde_json::{Value, json};

use crate::reduced;
use crate::rotation::place::{
    Call::{self, *},
    Place,
    Side::{self, After, Before},
    Trap,
};
use crate::rotation::subject::Subject;
use crate::sampler::sample;
use crate::support::operator::Operator;
use crate::support::proxy::Proxy;
use crate::support::world::World;

/// Number of operators that are killed at the same time, each in a world of its own.
const LANES: usize = 6;

/// Lifetime of the token that the sampler watches, in seconds. The operator has the last third of it for a restart.
const LIFETIME: u64 = 45;

/// What the operator does when it is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The first rotation.
    First,
    /// A later rotation, on request.
    Later,
    /// After the overlap of the first rotation.
    FirstSettlement,
    /// The same with `deleteBootstrapKey`.
    BootstrapRemoval,
    /// After the overlap of a later rotation.
    Settlement,
    /// The deletion of an object with a current and a previous key.
    Deletion,
    /// The end of the rotation of such an object.
    HandBack,
    /// A later rotation. The object is deleted before the next start.
    DeletedLater,
    /// A later rotation. The rotation is turned off before the next start.
    HandedBackLater,
}
use Phase::*;

type Kill = (Phase, Place);

/// Each call is a place before and after it.
const CALLS: &[(Phase, Call, usize)] = &[
    (First, GetLedger, 1),
    (First, RequestToken, 1),
    (First, ListKeys, 1),
    (First, PatchFinalizer, 1),
    (First, CreateLedger, 1),
    // The session that adds the key.
    (First, RequestToken, 2),
    (First, AddKey, 1),
    // With the id.
    (First, ReplaceLedger, 1),
    // With the new key.
    (First, RequestToken, 3),
    // The new key is the current one.
    (First, ReplaceLedger, 2),
    // The first status says that the rotation is in progress.
    (First, PutStatus, 1),
    (First, PutStatus, 2),
    (Later, GetLedger, 1),
    (Later, ReplaceLedger, 1),
    (Later, RequestToken, 1),
    (Later, AddKey, 1),
    (Later, ReplaceLedger, 2),
    (Later, RequestToken, 2),
    (Later, ReplaceLedger, 3),
    (Later, PutStatus, 2),
    (FirstSettlement, RequestToken, 1),
    (FirstSettlement, ReplaceLedger, 1),
    (FirstSettlement, CountPersonalTokens, 1),
    // With the count.
    (FirstSettlement, ReplaceLedger, 2),
    (FirstSettlement, PutStatus, 1),
    (BootstrapRemoval, ListKeys, 1),
    (BootstrapRemoval, RemoveBootstrapKey, 1),
    (BootstrapRemoval, ReplaceLedger, 1),
    (Settlement, RequestToken, 1),
    (Settlement, ListKeys, 1),
    (Settlement, RemovePreviousKey, 1),
    (Settlement, ReplaceLedger, 1),
    (Deletion, GetLedger, 1),
    (Deletion, RequestToken, 1),
    (Deletion, ListKeys, 1),
    (Deletion, RemovePreviousKey, 1),
    (Deletion, RemoveCurrentKey, 1),
    (Deletion, DeleteLedger, 1),
    (Deletion, PatchFinalizer, 1),
    (HandBack, RequestToken, 1),
    (HandBack, ListKeys, 1),
    (HandBack, RemovePreviousKey, 1),
    (HandBack, RemoveCurrentKey, 1),
    (HandBack, DeleteLedger, 1),
    (HandBack, PatchFinalizer, 1),
    (DeletedLater, AddKey, 1),
    (HandedBackLater, AddKey, 1),
];

/// With `CI=true`: a kill of each kind.
const FEW: &[Kill] = &[
    (First, Place(CreateLedger, 1, After)),
    (First, Place(AddKey, 1, After)),
    (Later, Place(ReplaceLedger, 2, Before)),
    (Later, Place(RequestToken, 2, After)),
    (Settlement, Place(RemovePreviousKey, 1, After)),
    (BootstrapRemoval, Place(RemoveBootstrapKey, 1, After)),
    (Deletion, Place(RemoveCurrentKey, 1, After)),
    (HandBack, Place(DeleteLedger, 1, After)),
    (DeletedLater, Place(AddKey, 1, After)),
];

fn kills() -> Vec<Kill> {
    if reduced() {
        return FEW.to_vec();
    }
    let both = |(phase, call, nth): &(Phase, Call, usize)| {
        let place = |side: Side| (*phase, Place(*call, *nth, side));
        [place(Before), place(After)]
    };
    CALLS.iter().flat_map(both).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_step_of_a_rotation_loses_no_key_and_leaves_none() {
    let started = Instant::now();
    let kills = kills();
    let lanes = (0..LANES.min(kills.len())).map(|lane| {
        let kills: Vec<Kill> = kills.iter().copied().skip(lane).step_by(LANES).collect();
        (format!("lane {lane}"), work(lane, kills).boxed_local())
    });
    in_parallel(lanes.collect()).await;
    println!("{} kills in {:.0} s", kills.len(), started.elapsed().as_secs_f64());
}

/// Runs all to their end, then fails if one of them failed.
pub async fn in_parallel(all: Vec<(String, LocalBoxFuture<'_, ()>)>) {
    let ended = join_all(all.into_iter().map(async |(name, one)| {
        let ended = AssertUnwindSafe(one).catch_unwind().await;
        ended.is_err().then_some(name)
    }));
    let failed: Vec<String> = ended.await.into_iter().flatten().collect();
    assert!(failed.is_empty(), "failed, see above: {failed:?}");
}

/// Kills the operator of one world at these places, one after another, while the sampler watches a token that expires
/// soon.
async fn work(lane: usize, kills: Vec<Kill>) {
    let world = World::new(&format!("rotkill{lane}")).await;
    // ZITADEL knows a new key at once. Otherwise it rejects the first request with it, and the requests cannot be counted.
    world.issuer.settings(json!({"projectionLagMillis": 0})).await;
    world.namespace(&world.home()).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let mut operator = start(&world, &proxy).await;
    world.instance().await;
    let fields = json!({"tokenType": "JWT", "lifetimeSeconds": LIFETIME});
    world.simple("steady", fields).await;
    world.token("steady-token").await;

    let ended = Cell::new(false);
    let names = ["steady-token".to_owned()];
    let killing = async {
        let (mut lasting, mut done) = (None, Vec::new());
        for (n, (phase, place)) in kills.iter().enumerate() {
            let doing = Doing(format!("lane {lane}: {phase:?}, {place}"));
            let started = Instant::now();
            let mut subject = match (phase, lasting.take()) {
                (Later | Settlement, Some(subject)) => subject,
                _ => prepare(&world, *phase, n).await,
            };
            let prepared = started.elapsed();
            operator = kill(&world, &proxy, operator, &mut subject, *phase, *place).await;
            let killed = Instant::now();
            match phase {
                Deletion | DeletedLater => subject.assert_deleted(&world).await,
                HandBack | HandedBackLater => subject.assert_handed_back(&world).await,
                _ => subject.assert_settled(&world).await,
            }
            println!(
                "{}: {:.1} s of preparation, settled {:.1} s after the restart",
                doing.0,
                prepared.as_secs_f64(),
                killed.elapsed().as_secs_f64()
            );
            match phase {
                Later | Settlement => lasting = Some(subject),
                First | FirstSettlement | BootstrapRemoval => done.push(subject),
                _ => {}
            }
        }
        // Those whose overlap had not passed.
        for mut subject in lasting.into_iter().chain(done) {
            let doing = Doing(format!("lane {lane}: {} in the end", subject.name));
            subject.assert_ended(&world).await;
            drop(doing);
        }
        ended.set(true);
    };
    let (seen, ()) = tokio::join!(sample(&world, &names, || !ended.get()), killing);
    println!("lane {lane}: {seen}");
}

async fn start(world: &World, proxy: &Proxy) -> Operator {
    let home = world.home();
    Operator::start_with(&proxy.kubeconfig, &world.selector(), &["--namespace", &home]).await
}

/// An object as it is before the phase.
async fn prepare(world: &World, phase: Phase, n: usize) -> Subject {
    let name = format!("user-{n}");
    match phase {
        First | FirstSettlement | BootstrapRemoval => Subject::create(world, &name).await,
        Later | Settlement => {
            let mut subject = Subject::rotated(world, &name, short()).await;
            subject.assert_settled(world).await;
            subject
        }
        DeletedLater | HandedBackLater => Subject::rotated(world, &name, long()).await,
        Deletion | HandBack => {
            let mut subject = Subject::rotated(world, &name, long()).await;
            subject.request(world).await;
            subject.handled(world).await;
            subject
        }
    }
}

/// A rotation with the shortest overlap.
fn short() -> Value {
    json!({"interval": "1h", "overlap": "10s"})
}

/// A rotation whose overlap does not pass during the test.
fn long() -> Value {
    json!({"interval": "1h"})
}

/// Kills the operator at a place, and starts it again.
async fn kill(
    world: &World,
    proxy: &Proxy,
    operator: Operator,
    subject: &mut Subject,
    phase: Phase,
    place: Place,
) -> Operator {
    match phase {
        FirstSettlement => subject.enable(world, short()).await,
        BootstrapRemoval => {
            let rotation = json!({"interval": "1h", "overlap": "10s", "deleteBootstrapKey": true});
            subject.enable(world, rotation).await;
        }
        Settlement => subject.request(world).await,
        _ => {}
    }
    if matches!(phase, FirstSettlement | BootstrapRemoval | Settlement) {
        subject.handled(world).await;
    }
    let trap = Trap::set(world, proxy, subject, place).await;
    match phase {
        First => subject.enable(world, short()).await,
        Later | DeletedLater | HandedBackLater => subject.request(world).await,
        Deletion => delete(world, subject).await,
        HandBack => subject.disable(world).await,
        // The overlap passes.
        FirstSettlement | BootstrapRemoval | Settlement => {}
    }
    // A held request is not released: it never arrives.
    trap.reached().await;
    operator.kill();
    world.issuer.clear_faults().await;
    match phase {
        DeletedLater => delete(world, subject).await,
        HandedBackLater => subject.disable(world).await,
        _ => {}
    }
    start(world, proxy).await
}

async fn delete(world: &World, subject: &Subject) {
    let deleted = world.users().delete(&subject.name, &DeleteParams::default()).await;
    deleted.expect("accepted");
}

/// Names the place in the output of a failure.
struct Doing(String);

impl Drop for Doing {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed: {}", self.0);
        }
    }
}
