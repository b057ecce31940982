//! Users that the operator creates in ZITADEL: a crash at each step of a creation, and many at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt, stream};
use kube::api::ListParams;
use serde_json::{Value, json};
use zitadel_tokens::api::ZitadelServiceUser;

use crate::places::{Place, stop_at};
use crate::reduced;
use crate::support::eventually;
use crate::support::managed::{CLUSTER, Managed};
use crate::support::operator::Operator;
use crate::support::proxy::{Hold, Proxy};
use crate::support::world::{World, condition, one_token, until};

/// `None` is the moment after ZITADEL added the first key, whose path has the id of the user.
const PLACES: &[Option<Place>] = &[
    Some(Place::Zitadel("/v2/users/new", true)),
    None,
    Some(Place::Kubernetes("PUT", LEDGER, 1, false)),
    Some(Place::Kubernetes("PUT", LEDGER, 4, true)),
    Some(Place::Zitadel("/oauth/v2/token", false)),
    Some(Place::Zitadel("/oauth/v2/token", true)),
    Some(Place::Zitadel("/v2/users/new", false)),
    Some(Place::Kubernetes("PATCH", OBJECT, 1, false)),
    Some(Place::Kubernetes("PATCH", OBJECT, 1, true)),
    Some(Place::Kubernetes("POST", CREATE, 1, false)),
    Some(Place::Kubernetes("POST", CREATE, 1, true)),
    Some(Place::Kubernetes("PUT", LEDGER, 1, true)),
    Some(Place::Kubernetes("PUT", LEDGER, 2, false)),
    Some(Place::Kubernetes("PUT", LEDGER, 2, true)),
    Some(Place::Kubernetes("PUT", LEDGER, 3, false)),
    Some(Place::Kubernetes("PUT", LEDGER, 3, true)),
    Some(Place::Kubernetes("PUT", LEDGER, 4, false)),
    Some(Place::Kubernetes("PUT", STATUS, 1, true)),
];

const LEDGER: &str = "/secrets/service-user-key-";
const CREATE: &str = "-home/secrets?";
const OBJECT: &str = "/zitadelserviceusers/user-";
const STATUS: &str = "/status";

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_step_of_a_creation_makes_no_second_user_and_loses_no_key() {
    let (mut managed, proxy) = behind_proxy("usersteps").await;
    managed.credential_is("True", "AdminCredentialReady").await;
    let places = if reduced() { &PLACES[..4] } else { PLACES };
    for (n, place) in places.iter().enumerate() {
        let started = Instant::now();
        let name = format!("user-{n}");
        let hold = if let Some(place) = *place {
            let begin = async || managed.user(&name, json!({})).await;
            stop_at(&managed.world.issuer, &proxy, place, begin).await
        } else {
            stop_at_the_first_key(&managed, &proxy, &name).await;
            None
        };
        kill(&mut managed, &proxy, hold).await;
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

/// A world whose operator creates users and reaches the API server through a proxy.
pub async fn behind_proxy(test: &str) -> (Managed, Proxy) {
    let world = World::new(test).await;
    world.namespace(&world.home()).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let operator = start(&world, &proxy).await;
    (Managed::with_operator(world, operator).await, proxy)
}

/// Kills the operator at the place where it is held, and starts another one.
pub async fn kill(managed: &mut Managed, proxy: &Proxy, hold: Option<Arc<Hold>>) {
    let operator = start(&managed.world, proxy).await;
    std::mem::replace(&mut managed.operator, operator).kill();
    if let Some(hold) = hold {
        hold.release();
    }
    managed.world.issuer.clear_faults().await;
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

/// Applies the object and waits until ZITADEL has added its first key.
async fn stop_at_the_first_key(managed: &Managed, proxy: &Proxy, name: &str) {
    let issuer = &managed.world.issuer;
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
}

#[tokio::test(flavor = "multi_thread")]
async fn many_users_are_created_within_the_budget() {
    let (objects, limit) = if reduced() {
        (60, Duration::from_mins(2))
    } else {
        (500, Duration::from_mins(8))
    };
    let managed = Managed::new("userfleet").await;
    // The budget that an instance has by default, except that the idle time before the test earns less.
    let (per_second, burst) = (30, 30);
    let mut spec = managed.world.instance_spec();
    spec["connection"]["requestsPerSecond"] = json!(per_second);
    spec["connection"]["burst"] = json!(burst);
    spec["adminCredential"] = json!({"secretRef": {"name": "zitadel-admin"}});
    managed.world.apply_instance(spec).await.expect("an instance");
    managed.world.instance_ready("True", "InstanceReady").await;
    let before = managed.world.issuer.requests().await.len();
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
    let requests = managed.world.issuer.requests().await.len() - before;
    let budget = burst + per_second * (usize::try_from(took.as_secs()).expect("minutes") + 1);
    assert!(requests <= budget, "{requests} requests in {took:?}");
    println!(
        "{objects} users with a key and a token after {:.0} s; {requests} requests to ZITADEL",
        took.as_secs_f64()
    );
}

/// An outage of a minute while an object with a user and a manager role is deleted.
#[tokio::test(flavor = "multi_thread")]
async fn deletion_waits_for_zitadel_and_then_removes_user_and_role() {
    let outage = if reduced() {
        Duration::from_secs(15)
    } else {
        Duration::from_mins(1)
    };
    let managed = Managed::new("userdown").await;
    managed.promote("IAM_OWNER").await;
    let world = &managed.world;
    let organization = world.issuer.organization().await;
    managed
        .allow_roles(json!([{"organizationIDs": [organization], "roles": ["ORG_OWNER"]}]))
        .await;
    let mut spec = one_token("billing-token");
    spec["user"] = json!({"organizationID": managed.organization});
    spec["managerRoles"] = json!([{"organizationID": organization, "roles": ["ORG_OWNER"]}]);
    world.service_user("billing", spec).await.expect("accepted");
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    world.ready("billing", "True", "Issued").await;
    for path in ["/oauth/v2/token", "/.well-known/openid-configuration"] {
        world.issuer.fault(json!({"path": path, "status": 503})).await;
    }
    world.delete("billing").await;
    let waits = |user: &ZitadelServiceUser| {
        condition(user, "Ready")
            .is_some_and(|(status, _, text)| status == "False" && text.starts_with("The deletion waits"))
    };
    until(world.users(), "billing", outage, waits).await;
    tokio::time::sleep(outage).await;
    let users = managed.users().await;
    let [user] = &users[..] else { panic!("one user") };
    let user = user["id"].as_str().expect("an id");
    let scope = json!({"organizationId": organization});
    assert_eq!(world.issuer.manager_roles(user, &scope).await, ["ORG_OWNER"]);
    let started = Instant::now();
    world.issuer.clear_faults().await;
    until_gone(world, "billing").await;
    assert_eq!(managed.users().await, Vec::<Value>::new());
    // The role is revoked before the user is deleted.
    let requests = world.issuer.requests().await;
    let position = |path: &str| {
        requests
            .iter()
            .position(|request| request.path.ends_with(path) && request.status == 200)
    };
    let revoked = position("/DeleteAdministrator").expect("revoked");
    let deleted = requests
        .iter()
        .rposition(|request| request.method == "DELETE" && request.path.ends_with(user));
    assert!(revoked < deleted.expect("deleted"));
    println!(
        "deleted {:.0} s after the end of the outage",
        started.elapsed().as_secs_f64()
    );
}

/// The operator tries again after at most five minutes.
async fn until_gone(world: &World, name: &str) {
    let started = Instant::now();
    while world.users().get_opt(name).await.expect("readable").is_some() {
        assert!(started.elapsed() < Duration::from_mins(6), "{name} is still there");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
