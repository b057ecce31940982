//! Endurance of the key rotation (docs/key-rotation.md, docs/adr/0020-keys-rotate-by-a-ledger.md).

mod fleet;
mod kills;
mod place;
mod stopped;
mod subject;

use std::cell::Cell;
use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::json;

use crate::reduced;
use crate::rotation::subject::{RECOVERED, TOKEN, is_for_workload, is_rotated, key_id, within};
use crate::sampler::sample;
use crate::support::world::{World, one_token, until};

/// Lifetime of the tokens, in seconds.
const LIFETIME: u64 = 10;

/// Each object may request 48 tokens at once that are no refreshes. A rotation requests two, and two more if ZITADEL does
/// not know the new key at once.
fn rounds() -> usize {
    if reduced() { 4 } else { 10 }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_refreshed_while_keys_rotate_one_after_another() {
    let world = World::new("rotfresh").await;
    // ZITADEL answers to a key that it does not know yet like to a failure of its database.
    world.issuer.settings(json!({"dialect": "errors_internal"})).await;
    let operator = world.rotating_operator().await;
    world.instance().await;
    let fields = json!({"tokenType": "JWT", "lifetimeSeconds": LIFETIME});
    let shared = world.issuer.user(fields.clone()).await;
    let own = world.issuer.user(fields).await;
    let objects = [("one", &shared), ("two", &shared), ("three", &own)];
    for (name, user) in objects {
        world.key_secret(&format!("{name}-key"), user).await;
        let mut spec = one_token(&format!("{name}-token"));
        spec["keyRotation"] = json!({"interval": "1h", "overlap": "10s"});
        world.service_user(name, spec).await.expect("accepted");
    }
    let names: Vec<String> = objects.iter().map(|(name, _)| format!("{name}-token")).collect();
    for name in &names {
        world.token(name).await;
    }

    let ended = Cell::new(false);
    let started = Instant::now();
    let rotations = async {
        let mut slowest = Duration::ZERO;
        for round in 0..=rounds() {
            let began = Instant::now();
            join_all(objects.iter().map(async |(name, _)| rotate(&world, name, round).await)).await;
            slowest = slowest.max(began.elapsed());
        }
        // The refreshes go on with the last keys.
        let lifetimes = if reduced() { 1 } else { 2 };
        tokio::time::sleep(Duration::from_secs(lifetimes * LIFETIME)).await;
        ended.set(true);
        slowest
    };
    let (seen, slowest) = tokio::join!(sample(&world, &names, || !ended.get()), rotations);

    let requests = world.issuer.requests().await;
    let tokens = requests.iter().filter(|r| is_for_workload(r));
    let (issued, failed): (Vec<_>, Vec<_>) = tokens.partition(|r| r.status == 200);
    let of_operator = requests.iter().filter(|r| r.path == TOKEN && !is_for_workload(r));
    let (accepted, rejected): (Vec<_>, Vec<_>) = of_operator.partition(|r| r.status == 200);
    println!(
        "{} rotations in {:.0} s, the slowest round took {:.1} s; {seen}; {} token requests for workloads; {} of the \
         operator for itself, and {} that ZITADEL rejected because it did not know the new key yet",
        objects.len() * (rounds() + 1),
        started.elapsed().as_secs_f64(),
        slowest.as_secs_f64(),
        issued.len(),
        accepted.len(),
        rejected.len()
    );
    assert!(failed.is_empty(), "{failed:?}");
    // The sampler may miss tokens that were issued at the very end.
    assert!(
        (seen.tokens..=seen.tokens + names.len()).contains(&issued.len()),
        "{} token requests for {} tokens",
        issued.len(),
        seen.tokens
    );
    assert!(
        rejected.len() <= objects.len() * (rounds() + 1),
        "{} rejected requests",
        rejected.len()
    );
    for user in [&shared, &own] {
        // The bootstrap key, and the current key of each object.
        let left = 1 + objects.iter().filter(|(_, of)| of.id == user.id).count();
        within("the replaced keys are gone", async || {
            world.issuer.keys(&user.id).await.len() == left
        })
        .await;
    }
    operator.terminate().await;
}

/// Rotates the key of an object. The first round is the first rotation, which needs no request.
async fn rotate(world: &World, name: &str, round: usize) {
    let request = (round > 0).then(|| round.to_string());
    let before = key_id(&world.users().get(name).await.expect("readable"));
    if let Some(request) = &request {
        world.annotate(name, "rotate-request", request).await;
    }
    let object = until(world.users(), name, RECOVERED, |object| {
        let status = object.status.as_ref().and_then(|status| status.key_rotation.as_ref());
        is_rotated(object) && status.and_then(|status| status.last_handled_rotate_request.clone()) == request
    })
    .await;
    assert!(
        round == 0 || key_id(&object) != before,
        "{name}: round {round}: the same key"
    );
}
