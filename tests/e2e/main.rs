//! `make e2e`: the operator as people get it, on a real node.
#![allow(missing_docs, clippy::expect_used, reason = "tests fail by panicking")]

#[path = "../support/mod.rs"]
mod support;

mod consumer;

use std::time::{Duration, Instant};

use consumer::Consumer;
use serde_json::json;
use support::cluster::{Cluster, install_crds};
use support::issuer::Issuer;
use support::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn a_pod() {
    let t = Instant::now();
    let issuer = Issuer::start(&["--tls"]);
    let port = issuer.url.rsplit(':').next().unwrap().parse().unwrap();
    let cluster = Box::leak(Box::new(Cluster::start_with_node(&[], &[port])));
    println!("node {:?}", t.elapsed());
    install_crds(&cluster.client().await).await;
    let world = World::on(cluster, "e2e", issuer).await;
    let _operator = world.operator().await;
    let mut spec = world.instance_spec();
    spec["connection"] = json!({"caBundle": world.issuer.ca});
    world.apply_instance(spec).await.unwrap();
    world.simple("billing", json!({"tokenType": "JWT", "lifetimeSeconds": 30})).await;
    let first = world.token("billing-token").await;
    println!("token {:?}", t.elapsed());
    let consumer = Consumer::start(&world, "busybox:testbed", "billing-token", Duration::from_secs(60)).await;
    println!("consumer {:?}", t.elapsed());
    println!("{}", cluster.kubectl(&["get", "pods,nodes", "-A", "-o", "wide"], "").1);
    let second = consumer.reads_other_than(&first).await;
    println!("refresh {:?}", t.elapsed());
    assert_ne!(first, second);
    println!("{}", consumer.never_read_an_expired_token().await);
    println!("{}", cluster.kubectl(&["-n", &world.name, "exec", "consumer", "--", "ls", "-la", "/token"], "").1);
}
