//! Hostile namespaces against the chart's memory limit. The cluster has CRDs without validation rules: a cluster with
//! older CRDs may have stored objects that today's schema refuses.

use std::time::Duration;

use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::{Namespace, Secret};
use kube::api::{DynamicObject, ListParams, PostParams};
use kube::core::ApiResource;
use kube::{Api, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use zitadel_tokens::api::ZitadelServiceUser;

use crate::reduced;
use crate::support::cluster::{Cluster, install_relaxed_crds};
use crate::support::issuer::Issuer;
use crate::support::operator::Operator;
use crate::support::world::{World, condition, one_token};

/// `resources.limits.memory` of the chart.
const LIMIT: u64 = 256 * 1024 * 1024;

const MEGABYTE: usize = 1_000_000;

async fn create_all<K>(api: Api<K>, objects: impl Iterator<Item = Value>)
where
    K: Resource + Clone + std::fmt::Debug + DeserializeOwned + Serialize,
{
    stream::iter(objects)
        .for_each_concurrent(4, async |object| {
            let object = serde_json::from_value(object).expect("an object");
            api.create(&PostParams::default(), &object).await.expect("created");
        })
        .await;
}

async fn users(world: &World, objects: impl Iterator<Item = Value>) {
    let resource = ApiResource::erase::<ZitadelServiceUser>(&());
    let api: Api<DynamicObject> = Api::namespaced_with(world.client.clone(), &world.name, &resource);
    create_all(api, objects).await;
}

fn user(name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelServiceUser",
        "metadata": {"name": name}, "spec": spec})
}

/// A service user with 16 tokens. `secret` makes the `secret` field of each.
fn sixteen(instance: &str, key: &str, secret: impl Fn(usize) -> Value) -> Value {
    let tokens = (0..16).map(|i| json!({"name": format!("t{i}"), "projectIDs": ["1"], "secret": secret(i)}));
    json!({"instanceRef": {"name": instance}, "keySecretRef": {"name": key}, "tokens": tokens.collect::<Vec<_>>()})
}

fn secret(name: &str, metadata: &Value, data: &Value) -> Value {
    let mut object =
        json!({"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "metadata": {"name": name}, "stringData": data});
    for (key, value) in metadata.as_object().expect("an object") {
        object["metadata"][key] = value.clone();
    }
    object
}

/// Objects of 1.3 MB each. They name an instance that does not exist, so they need no key and no access policy.
async fn large_objects(world: &World) {
    let text = "x".repeat(16_000);
    let template: serde_json::Map<String, Value> = (0..5).map(|i| (format!("k{i}"), json!(text))).collect();
    let spec = |i: usize| {
        sixteen(
            "no-such-instance",
            "key",
            |j| json!({"name": format!("large-{i}-{j}"), "template": template}),
        )
    };
    let count = if reduced() { 60 } else { 100 };
    users(world, (0..count).map(|i| user(&format!("large-{i}"), &spec(i)))).await;
}

/// Service users with allowed tokens that refer to Secrets of a megabyte, which several objects share.
async fn large_secrets(world: &World) {
    let text = "x".repeat(MEGABYTE);
    let large = (0..16).map(|i| secret(&format!("secret-{i}"), &json!({}), &json!({"token": text})));
    let secrets: Api<Secret> = Api::namespaced(world.client.clone(), &world.name);
    create_all(secrets.clone(), large).await;
    let entries: serde_json::Map<String, Value> = (0..40_000).map(|i| (format!("entry-{i}"), json!("x"))).collect();
    create_all(
        secrets,
        std::iter::once(secret("entries", &json!({}), &Value::Object(entries))),
    )
    .await;
    let spec = |i: usize| {
        let key = if i.is_multiple_of(2) {
            "entries".to_owned()
        } else {
            format!("secret-{}", i % 16)
        };
        sixteen(&world.instance, &key, |j| json!({"name": format!("secret-{j}")}))
    };
    users(world, (0..60).map(|i| user(&format!("reader-{i}"), &spec(i)))).await;
}

/// Secrets with the operator's label, some of them with metadata as large as Kubernetes accepts.
async fn large_metadata(world: &World) {
    let annotation = "\u{1}".repeat(250_000);
    let labels: serde_json::Map<String, Value> = (0..8_000)
        .map(|i| (format!("label-{i:040}"), json!("v".repeat(50))))
        .chain([("zitadel-tokens.dev/service-user".to_owned(), json!("nobody"))])
        .collect();
    let metadata = json!({"annotations": {"note": annotation}, "labels": labels});
    let many = (0..40).map(|i| secret(&format!("meta-{i}"), &metadata, &json!({})));
    create_all::<Secret>(Api::namespaced(world.client.clone(), &world.name), many).await;
    // As many as fit into etcd.
    let labelled = json!({"labels": {"zitadel-tokens.dev/service-user": "nobody"}});
    let count = if reduced() { 3_000 } else { 20_000 };
    let many = (0..count).map(|i| secret(&format!("labelled-{i}"), &labelled, &json!({})));
    create_all::<Secret>(Api::namespaced(world.client.clone(), &world.name), many).await;
}

/// Namespaces with as many labels as fit into an object.
async fn large_namespaces(world: &World) {
    let labels: serde_json::Map<String, Value> = (0..9_000)
        .map(|i| (format!("label-{i:040}"), json!("v".repeat(50))))
        .collect();
    let many = (0..40).map(|i| json!({"metadata": {"name": format!("{}-{i}", world.name), "labels": labels}}));
    create_all::<Namespace>(Api::all(world.client.clone()), many).await;
}

/// Many objects that are valid by the schema, each with as much content as it accepts and the operator keeps in memory.
async fn many_objects(world: &World) {
    let spec = |i: usize| {
        sixteen(
            &world.instance,
            "no-such-key",
            |j| json!({"name": format!("{:x<240}-{i}-{j}", "s")}),
        )
    };
    let count = if reduced() { 1_500 } else { 6_000 };
    users(world, (0..count).map(|i| user(&format!("many-{i}"), &spec(i)))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_namespace_exhausts_the_operators_memory() {
    let cluster: &'static Cluster = Box::leak(Box::new(Cluster::start()));
    install_relaxed_crds(&cluster.client().await).await;
    let quiet = World::without_policy(cluster, "quiet", Issuer::start(&[])).await;
    quiet.instance_for_all().await;
    let fields = json!({"tokenType": "JWT", "lifetimeSeconds": 30});
    let good = quiet.issuer.user(fields).await;
    quiet.key_secret("good-key", &good).await;
    quiet
        .service_user("good", one_token("good-token"))
        .await
        .expect("accepted");

    let mut worlds = Vec::new();
    for kind in ["nothing", "objects", "secrets", "metadata", "namespaces", "many", "all"] {
        let world = World::beside(&quiet, kind).await;
        match kind {
            "objects" => large_objects(&world).await,
            "secrets" => large_secrets(&world).await,
            "metadata" => large_metadata(&world).await,
            "namespaces" => large_namespaces(&world).await,
            "many" => many_objects(&world).await,
            // The last round runs with the objects of all rounds.
            _ => {}
        }
        worlds.push(world);
        // Each operator starts with all existing objects and serves all instances.
        let mut operator = Operator::start_limited(cluster, "", LIMIT).await;
        // A refresh and a first token while the operator reconciles the hostile objects.
        quiet.renew("good").await;
        let name = format!("late-{kind}");
        let mut spec = one_token(&format!("{name}-token"));
        spec["keySecretRef"] = json!({"name": "good-key"});
        quiet.service_user(&name, spec).await.expect("accepted");
        let token = tokio::time::timeout(Duration::from_secs(30), quiet.token(&format!("{name}-token"))).await;
        assert!(!operator.has_ended(), "{kind}: the operator exited");
        token.expect("a token in time");
        // Wait for a scheduled refresh.
        let before = quiet.token("good-token").await;
        quiet.secret_until("good-token", |data| data["token"] != before).await;
        assert!(!operator.has_ended(), "{kind}: the operator exited");
        let (status, metrics) = operator.get("/metrics").await;
        assert_eq!(status, 200);
        let peak = operator.peak_memory();
        println!(
            "a namespace with large {kind}: peak {} MiB of {}; /metrics has {} KiB",
            peak >> 20,
            LIMIT >> 20,
            metrics.len() >> 10
        );
        assert!(peak < LIMIT, "{kind}: {peak} bytes");
    }
    // Objects over the limit of a namespace report it.
    let many = worlds.iter().find(|world| world.name.ends_with("many")).expect("one");
    let listed = many.users().list(&ListParams::default()).await.expect("listed");
    let refused =
        |user: &&ZitadelServiceUser| condition(user, "Ready").is_some_and(|(_, reason, _)| reason == "NamespaceLimit");
    assert!(
        listed.iter().filter(refused).count() >= 32,
        "too few objects report the limit"
    );
}
