//! Users that the operator creates in ZITADEL: a crash at each step of a creation, and many at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt, stream};
use kube::api::ListParams;
use serde_json::{Value, json};
use zitadel_tokens::api::ZitadelServiceUser;

use crate::reduced;
use crate::support::eventually;
use crate::support::managed::{CLUSTER, Managed};
use crate::support::operator::Operator;
use crate::support::proxy::{Hold, Proxy};
use crate::support::world::{World, condition, until};

/// Where the operator is killed.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// At the n-th such request to the API server, before it takes effect or after.
    Kubernetes(&'static str, &'static str, usize, bool),
    /// At a request of the administrator to ZITADEL, before it takes effect or after.
    Zitadel(&'static str, bool),
    /// After ZITADEL added the first key.
    AddKey,
}

const PLACES: &[Place] = &[
    Place::Zitadel("/v2/users/new", true),
    Place::AddKey,
    Place::Kubernetes("PUT", LEDGER, 1, false),
    Place::Kubernetes("PUT", LEDGER, 4, true),
    Place::Zitadel("/oauth/v2/token", false),
    Place::Zitadel("/oauth/v2/token", true),
    Place::Zitadel("/v2/users/new", false),
    Place::Kubernetes("PATCH", OBJECT, 1, false),
    Place::Kubernetes("PATCH", OBJECT, 1, true),
    Place::Kubernetes("POST", CREATE, 1, false),
    Place::Kubernetes("POST", CREATE, 1, true),
    Place::Kubernetes("PUT", LEDGER, 1, true),
    Place::Kubernetes("PUT", LEDGER, 2, false),
    Place::Kubernetes("PUT", LEDGER, 2, true),
    Place::Kubernetes("PUT", LEDGER, 3, false),
    Place::Kubernetes("PUT", LEDGER, 3, true),
    Place::Kubernetes("PUT", LEDGER, 4, false),
    Place::Kubernetes("PUT", STATUS, 1, true),
];

const LEDGER: &str = "/secrets/service-user-key-";
const CREATE: &str = "-home/secrets?";
const OBJECT: &str = "/zitadelserviceusers/user-";
const STATUS: &str = "/status";

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_step_of_a_creation_makes_no_second_user_and_loses_no_key() {
    let world = World::new("usersteps").await;
    world.namespace(&world.home()).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let operator = start(&world, &proxy).await;
    let mut managed = Managed::with_operator(world, operator).await;
    managed.credential_is("True", "AdminCredentialReady").await;
    let places = if reduced() { &PLACES[..4] } else { PLACES };
    for (n, place) in places.iter().enumerate() {
        let started = Instant::now();
        let name = format!("user-{n}");
        let hold = stop_at(&managed, &proxy, *place, &name).await;
        let operator = start(&managed.world, &proxy).await;
        std::mem::replace(&mut managed.operator, operator).kill();
        if let Some(hold) = hold {
            hold.release();
        }
        managed.world.issuer.clear_faults().await;
        // A key that ZITADEL may have gets half a minute to show.
        let object = until(managed.world.users(), &name, Duration::from_secs(100), is_served).await;
        let status = object.status.expect("a status");
        let user_id = status.user_id.expect("a user id");
        let users = managed.users().await;
        assert_eq!(users.len(), n + 1, "{place:?}: {users:?}");
        let owner = format!("prod/{}/{name}", managed.world.name);
        let user = users.iter().find(|user| user["id"] == *user_id).expect("the user");
        assert_eq!(user["metadata"]["zitadel-tokens.dev/owner"], json!(owner), "{place:?}");
        let keys: Vec<String> = managed
            .world
            .issuer
            .keys(&user_id)
            .await
            .into_iter()
            .map(|key| key.id)
            .collect();
        assert_eq!(keys, Vec::from_iter(status.key_id), "{place:?}");
        println!(
            "{place:?}: one user and one key after {:.1} s",
            started.elapsed().as_secs_f64()
        );
    }
    for n in 0..places.len() {
        managed.deleted(&format!("user-{n}")).await;
    }
    assert_eq!(managed.users().await, Vec::<Value>::new());
}

async fn start(world: &World, proxy: &Proxy) -> Operator {
    let home = world.home();
    let flags = [&["--namespace", &home], &CLUSTER[..]].concat();
    Operator::start_with(&proxy.kubeconfig, &world.selector(), &flags).await
}

fn is_served(user: &ZitadelServiceUser) -> bool {
    condition(user, "UserReady").is_some_and(|(status, _, _)| status == "True")
        && condition(user, "Ready").is_some_and(|(status, _, _)| status == "True")
}

/// Applies the object and waits until the operator is at the place.
async fn stop_at(managed: &Managed, proxy: &Proxy, place: Place, name: &str) -> Option<Arc<Hold>> {
    let issuer = &managed.world.issuer;
    let hold = |method, piece, after| {
        if after {
            proxy.hold_after(method, piece)
        } else {
            proxy.hold_before(method, piece)
        }
    };
    match place {
        Place::Kubernetes(method, piece, nth, after) => {
            let mut at = hold(method, piece, after && nth == 1);
            managed.user(name, json!({})).await;
            for n in 2..=nth {
                at.reached().await;
                let next = hold(method, piece, after && n == nth);
                at.release();
                at = next;
            }
            at.reached().await;
            Some(at)
        }
        Place::Zitadel(path, after) => {
            let before = issuer
                .requests()
                .await
                .iter()
                .filter(|request| request.path == path)
                .count();
            issuer
                .fault(json!({"path": path, "times": 1, "hang": true, "afterHandling": after}))
                .await;
            managed.user(name, json!({})).await;
            eventually("the request is there", async || {
                issuer
                    .requests()
                    .await
                    .iter()
                    .filter(|request| request.path == path)
                    .count()
                    > before
            })
            .await;
            None
        }
        Place::AddKey => {
            let at = proxy.hold_before("PUT", LEDGER);
            managed.user(name, json!({})).await;
            at.reached().await;
            let users = managed.users().await;
            let newest = users.iter().find(|user| user["keys"] == 0).expect("a user without key");
            let user_id = newest["id"].as_str().expect("an id").to_owned();
            let path = format!("/v2/users/{user_id}/keys");
            issuer
                .fault(json!({"path": path, "times": 1, "hang": true, "afterHandling": true}))
                .await;
            at.release();
            eventually("the key is there", async || issuer.keys(&user_id).await.len() == 1).await;
            None
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_users_are_created_within_the_budget() {
    let (objects, limit) = if reduced() {
        (60, Duration::from_mins(2))
    } else {
        (500, Duration::from_mins(8))
    };
    let managed = Managed::new("userfleet").await;
    let started = Instant::now();
    stream::iter(0..objects)
        .for_each_concurrent(8, async |n| managed.user(&format!("user-{n}"), json!({})).await)
        .await;
    loop {
        let listed = managed
            .world
            .users()
            .list(&ListParams::default())
            .await
            .expect("listed");
        let served = listed.iter().filter(|object| is_served(object)).count();
        if served == objects {
            break;
        }
        assert!(started.elapsed() < limit, "{served} of {objects} users in {limit:?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let took = started.elapsed();
    assert_eq!(managed.users().await.len(), objects);
    let requests = managed.world.issuer.requests().await.len();
    println!(
        "{objects} users with a key and a token after {:.0} s; {requests} requests to ZITADEL",
        took.as_secs_f64()
    );
}
