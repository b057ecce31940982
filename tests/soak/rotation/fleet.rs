//! Many objects turn the rotation on at once.

use std::cell::Cell;
use std::time::{Duration, Instant};

use futures::{StreamExt, stream};
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::json;

use crate::reduced;
use crate::rotation::subject::{is_for_workload, is_rotated};
use crate::sampler::sample;
use crate::support::issuer::User;
use crate::support::world::{World, one_token};

/// Namespaces of the fleet.
const NAMESPACES: usize = 3;

/// Objects that share a ZITADEL user.
const SHARED: usize = 5;

/// Lifetime of the tokens in the quiet namespace, in seconds.
const LIFETIME: u64 = 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_that_turns_rotation_on_does_not_delay_refreshes() {
    let (objects, limit) = if reduced() {
        (60, Duration::from_mins(1))
    } else {
        (300, Duration::from_mins(5))
    };
    let quiet = World::new("rotquiet").await;
    let mut fleet = Vec::new();
    for n in 0..NAMESPACES {
        fleet.push(World::beside(&quiet, &format!("fleet{n}")).await);
    }
    let operator = quiet.rotating_operator().await;
    quiet.instance_for_all().await;
    let mut names = Vec::new();
    for name in ["one", "two", "three"] {
        quiet
            .simple(name, json!({"tokenType": "JWT", "lifetimeSeconds": LIFETIME}))
            .await;
        names.push(format!("{name}-token"));
    }
    let setting_up = Instant::now();
    let (users, all) = create(&fleet, objects).await;
    for name in &names {
        quiet.token(name).await;
    }
    println!(
        "{objects} objects with a token after {:.0} s",
        setting_up.elapsed().as_secs_f64()
    );

    let fleet = &fleet;
    let ended = Cell::new(false);
    let rotation = async {
        let started = Instant::now();
        stream::iter(&all)
            .for_each_concurrent(8, async |(user, name)| {
                let change = json!({"spec": {"keyRotation": {"interval": "1h"}}});
                let users = fleet[user % NAMESPACES].users();
                let changed = users.patch(name, &PatchParams::default(), &Patch::Merge(&change)).await;
                changed.expect("accepted");
            })
            .await;
        let enabled = started.elapsed();
        loop {
            let mut rotated = 0;
            for world in fleet {
                let listed = world.users().list(&ListParams::default()).await.expect("listed");
                rotated += listed.iter().filter(|object| is_rotated(object)).count();
            }
            if rotated == objects {
                break;
            }
            assert!(
                started.elapsed() < limit,
                "{rotated} of {objects} objects have rotated in {limit:?}"
            );
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let rotated = started.elapsed();
        // At least one lifetime is measured.
        tokio::time::sleep(Duration::from_secs(LIFETIME).saturating_sub(rotated)).await;
        ended.set(true);
        (enabled, rotated)
    };
    let (seen, (enabled, rotated)) = tokio::join!(sample(&quiet, &names, || !ended.get()), rotation);
    let mut keys = 0;
    for user in &users {
        keys += quiet.issuer.keys(&user.id).await.len();
    }
    let requests = quiet.issuer.requests().await;
    let adds = requests
        .iter()
        .filter(|r| r.path.starts_with("/v2/users/") && r.path.ends_with("/keys"));
    println!(
        "{objects} objects in {NAMESPACES} namespaces turned the rotation on within {:.1} s; all had rotated after {:.1} s \
         ({:.2} s for each); {keys} keys at ZITADEL, {} requests to add one; quiet namespace: {seen}",
        enabled.as_secs_f64(),
        rotated.as_secs_f64(),
        (rotated / u32::try_from(objects).expect("few")).as_secs_f64(),
        adds.count()
    );
    // Each user has its bootstrap key, and one key for each object.
    assert_eq!(keys, users.len() + objects);
    let fleet_users: Vec<&str> = users.iter().map(|user| &*user.id).collect();
    let tokens = requests
        .iter()
        .filter(|r| is_for_workload(r) && fleet_users.contains(&&*r.user_id));
    assert_eq!(tokens.count(), objects, "a rotation requested a token for a workload");
    // As in `a_noisy_tenant_does_not_delay_a_quiet_one`.
    let window = Duration::from_secs(LIFETIME - 1).as_secs_f64() / 3.0;
    assert!(seen.margin > window / 4.0, "{seen}");
    operator.terminate().await;
}

/// Creates objects without a rotation, and waits until they have their tokens. Returns their ZITADEL users, and the
/// number of the user and the name of each object.
async fn create(fleet: &[World], objects: usize) -> (Vec<User>, Vec<(usize, String)>) {
    let mut users: Vec<User> = Vec::new();
    for n in 0..objects / SHARED {
        let user = fleet[0].issuer.user(json!({"tokenType": "JWT"})).await;
        fleet[n % NAMESPACES].key_secret(&format!("user-{n}-key"), &user).await;
        users.push(user);
    }
    let all: Vec<(usize, String)> = (0..objects).map(|n| (n / SHARED, format!("object-{n}"))).collect();
    stream::iter(&all)
        .for_each_concurrent(8, async |(user, name)| {
            let mut spec = one_token(&format!("{name}-token"));
            spec["keySecretRef"] = json!({"name": format!("user-{user}-key")});
            let world = &fleet[user % NAMESPACES];
            world.service_user(name, spec).await.expect("accepted");
        })
        .await;
    for (user, name) in &all {
        fleet[user % NAMESPACES].token(&format!("{name}-token")).await;
    }
    (users, all)
}
