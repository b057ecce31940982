//! The request budget of a host, measured at the host (docs/adr/0013-request-budget-per-host.md).

use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::json;
use zitadel_tokens::zitadel::{Hosts, RequestBudget, Settings, ZitadelClient};

use super::client::{connect, settings};
use super::only_stand_in::{TOKEN, World};

const RATE: RequestBudget = RequestBudget {
    per_second: 5,
    burst: 1,
    concurrent: 8,
};

#[tokio::test]
async fn two_instances_that_dial_one_host_share_its_budget() {
    let world = World::new().await;
    let hosts = Hosts::default();
    let dial = |name: &str, per_second| {
        let settings = Settings {
            name: name.to_owned(),
            budget: RequestBudget { per_second, ..RATE },
            ..settings(&world.issuer.url)
        };
        ZitadelClient::new(settings, &hosts).expect("a connection")
    };
    // The lower rate applies.
    let both = [dial("one", 100), dial("two", 5)];
    let started = Instant::now();
    join_all((0..8).map(|i| both[i % 2].exchange(&world.key, "openid"))).await;
    let took = started.elapsed();
    let asked = world.issuer.requests().await.len();
    assert!(
        asked > 8,
        "{asked} requests, expected eight token requests and discovery"
    );
    let least = Duration::from_secs(1) / RATE.per_second * u32::try_from(asked - 1).expect("few");
    assert!(took >= least, "{asked} requests in {took:?}");
}

#[tokio::test]
async fn concurrent_requests_are_limited() {
    let world = World::new().await;
    let budget = RequestBudget {
        per_second: 1_000,
        burst: 1_000,
        concurrent: 2,
    };
    let instance = connect(Settings {
        budget,
        ..settings(&world.issuer.url)
    });
    instance.discover().await.expect("discovered");
    let each = Duration::from_millis(200);
    world
        .issuer
        .fault(json!({"path": TOKEN, "latencyMillis": each.as_millis()}))
        .await;
    let started = Instant::now();
    let got = join_all((0..6).map(|_| instance.exchange(&world.key, "openid"))).await;
    assert!(got.iter().all(Result::is_ok));
    assert!(started.elapsed() >= each * 3, "{:?}", started.elapsed());
}
