//! `make e2e`: installs, uses, upgrades and removes the operator on a real node, with the image and the chart that
//! users get.
#![allow(missing_docs, clippy::expect_used, reason = "tests fail by panicking")]

#[path = "../support/mod.rs"]
mod support;

mod consumer;
mod place;

use std::fmt::Debug;
use std::time::{Duration, Instant};

use consumer::Consumer;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, ListParams};
use kube::runtime::wait::{await_condition, conditions::is_deleted};
use kube::{Api, Client, ResourceExt};
use place::Place;
use serde::de::DeserializeOwned;
use serde_json::json;
use support::helm;
use support::world::{World, one_token, until};
use support::{EVENTUALLY, SOON};
use zitadel_tokens::api::ZitadelInstance;

/// Namespace of the operator and its Lease.
const NAMESPACE: &str = "zitadel-tokens";
const TOKEN: &str = "billing-token";

/// One test, because each step needs the state that the previous one left.
#[tokio::test(flavor = "multi_thread")]
async fn a_release_is_installed_used_upgraded_and_removed() {
    let mut clock = Clock::start();
    let (place, issuer) = Place::find();
    let client = place.cluster.client().await;
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    let there = crds.list(&ListParams::default()).await.expect("listed");
    assert!(
        !there.iter().any(|crd| crd.name_any().ends_with(".zitadel-tokens.dev")),
        "zitadel-tokens is installed in this cluster; use a cluster without it, because this test removes it at the end"
    );
    clock.tell("started: a cluster with a node");

    place.release("install", NAMESPACE, &[]);
    clock.tell("installed; both pods are ready");
    place.test(NAMESPACE).await;
    clock.tell("helm test passes");

    let world = World::on(place.cluster, "e2e", issuer).await;
    let mut spec = world.instance_spec();
    spec["connection"] = json!({"endpoint": place.endpoint, "tlsServerName": "localhost", "caBundle": world.issuer.ca});
    world.apply_instance(spec).await.expect("an instance");
    let fields = json!({"tokenType": "JWT", "lifetimeSeconds": place.lifetime});
    world.key_secret("billing-key", &world.issuer.user(fields).await).await;
    world.service_user("billing", one_token(TOKEN)).await.expect("accepted");
    let first = world.token(TOKEN).await;
    clock.tell("the token is in its Secret");
    let consumer = Consumer::start(&world, &place.shell_image, TOKEN, place.patience).await;
    clock.tell("a pod runs and reads the token");

    world.renew("billing").await;
    let second = world.secret_until(TOKEN, |d| d["token"] != first).await["token"].clone();
    clock.tell("refreshed on request");
    consumer.reads(&second).await;
    clock.tell("the running pod reads the new token");

    another_replica_takes_over(&client, &mut clock).await;
    refreshed(&place, &world, &consumer).await;
    clock.tell("the new leader has refreshed the token, and the running pod reads it");

    let before = pods(&client).await;
    place.release("upgrade", NAMESPACE, &["log.level=debug"]);
    let after = pods(&client).await;
    assert!(
        !after.iter().any(|pod| before.contains(pod)),
        "not upgraded: pods {before:?} before, {after:?} after"
    );
    clock.tell("upgraded; both pods are ready");
    refreshed(&place, &world, &consumer).await;
    clock.tell("a new pod has refreshed the token, and the running pod reads it");
    let seen = consumer.seen().await;
    println!("    the pod: {seen}");
    assert_eq!(
        world.issuer.mints().await,
        seen.tokens,
        "an issued token never reached the pod"
    );
    assert_eq!(
        restarts(&client).await,
        0,
        "the kubelet restarted an operator container"
    );

    place.uninstall(NAMESPACE);
    gone::<Deployment>(Api::namespaced(client.clone(), NAMESPACE), helm::NAME).await;
    world.users().get("billing").await.expect("kept, like the CRDs");
    let left = world.token(TOKEN).await;
    clock.tell("uninstalled; the service user and its token are kept");

    place.release("install", NAMESPACE, &[]);
    world.annotate("billing", "renew-request", "of the new release").await;
    let new = world.secret_until(TOKEN, |d| d["token"] != left).await;
    consumer.reads(&new["token"]).await;
    clock.tell("installed again; the running pod reads a new token");

    place.uninstall(NAMESPACE);
    remove(&client, &world).await;
    clock.tell("everything is removed");
}

/// Waits until the next refresh has reached the pod. Requests a refresh if the scheduled one would take too long.
async fn refreshed(place: &Place, world: &World, consumer: &Consumer) {
    let old = world.token(TOKEN).await;
    if Duration::from_secs(place.lifetime) > SOON {
        world.annotate("billing", "renew-request", &old[old.len() - 16..]).await;
    }
    let new = world.secret_until(TOKEN, |d| d["token"] != old).await;
    consumer.reads(&new["token"]).await;
}

/// Deletes the leader's pod and waits until the standby leads.
async fn another_replica_takes_over(client: &Client, clock: &mut Clock) {
    let leases: Api<Lease> = Api::namespaced(client.clone(), NAMESPACE);
    let all = pods(client).await;
    let holder = |lease: &Lease| {
        let identity = lease.spec.as_ref()?.holder_identity.clone()?;
        all.iter().find(|pod| identity.starts_with(pod.as_str())).cloned()
    };
    let lease = until(leases.clone(), "zitadel-tokens", EVENTUALLY, |l| holder(l).is_some()).await;
    let leader = holder(&lease).expect("a leader");
    let api: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let asked = Instant::now();
    api.delete(&leader, &DeleteParams::default()).await.expect("deleted");
    // A pod that was created since then is not in the list, so it does not count as a holder.
    until(leases, "zitadel-tokens", EVENTUALLY, |l| {
        holder(l).is_some_and(|other| other != leader)
    })
    .await;
    println!("    the standby leads {:?} after the deletion", asked.elapsed());
    gone(api, &leader).await;
    clock.tell("the leader's pod is deleted; the standby leads");
}

/// Restores the cluster to its state before the test.
async fn remove(client: &Client, world: &World) {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let params = DeleteParams::default();
    namespaces.delete(&world.name, &params).await.expect("deleted");
    gone(namespaces.clone(), &world.name).await;
    let instances: Api<ZitadelInstance> = Api::all(client.clone());
    instances.delete(&world.instance, &params).await.expect("deleted");
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    for crd in zitadel_tokens::api::crds() {
        crds.delete(&crd.name_any(), &params).await.expect("deleted");
    }
    namespaces.delete(NAMESPACE, &params).await.expect("deleted");
    gone(namespaces, NAMESPACE).await;
}

/// The operator's pods that are not terminating.
async fn living(client: &Client) -> Vec<Pod> {
    let api: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let of_release = ListParams::default().labels("app.kubernetes.io/name=zitadel-tokens");
    let mut all = api.list(&of_release).await.expect("listed").items;
    all.retain(|pod| pod.metadata.deletion_timestamp.is_none());
    all
}

async fn pods(client: &Client) -> Vec<String> {
    living(client).await.iter().map(ResourceExt::name_any).collect()
}

async fn restarts(client: &Client) -> i32 {
    let all = living(client).await;
    let statuses = all
        .iter()
        .filter_map(|pod| pod.status.as_ref()?.container_statuses.as_ref());
    statuses.flatten().map(|container| container.restart_count).sum()
}

async fn gone<K>(api: Api<K>, name: &str)
where
    K: kube::Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let Some(object) = api.get_opt(name).await.expect("readable") else {
        return;
    };
    let uid = object.meta().uid.clone().expect("a UID");
    tokio::time::timeout(EVENTUALLY, await_condition(api, name, is_deleted(&uid)))
        .await
        .expect("gone in time")
        .expect("watched");
}

/// Prints how long each step took.
struct Clock {
    start: Instant,
    last: Instant,
}

impl Clock {
    fn start() -> Self {
        let now = Instant::now();
        Self { start: now, last: now }
    }

    fn tell(&mut self, what: &str) {
        let (all, this) = (self.start.elapsed(), self.last.elapsed());
        println!(
            "==> {what}: {:.1} s (at {:.1} s)",
            this.as_secs_f64(),
            all.as_secs_f64()
        );
        self.last = Instant::now();
    }
}
