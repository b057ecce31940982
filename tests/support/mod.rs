//! Parts shared by the tests, the demo and the benchmark: a real control plane, the ZITADEL stand-in, the operator as a
//! child process, and a namespace and an instance for each test.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::expect_used,
    clippy::missing_panics_doc,
    clippy::must_use_candidate,
    reason = "shared by several binaries, none of which uses all of it; helpers fail by panicking"
)]

pub mod audit;
pub mod cgroup;
pub mod child;
pub mod clock;
pub mod cluster;
pub mod helm;
pub mod issuer;
pub mod managed;
pub mod operator;
pub mod prometheus;
pub mod proxy;
pub mod replicas;
pub mod roles;
pub mod world;

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;

/// Polls until `done` returns true, for conditions that no watch reports.
pub async fn eventually(what: &str, done: impl AsyncFn() -> bool) {
    eventually_within(what, SOON, done).await;
}

pub async fn eventually_within(what: &str, limit: Duration, done: impl AsyncFn() -> bool) {
    let deadline = std::time::Instant::now() + limit;
    while !done().await {
        assert!(std::time::Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits more than one second. Status times are whole seconds, so a refresh within the same second would not change
/// the status.
pub async fn next_second() {
    let second = Timestamp::now().as_second();
    while Timestamp::now().as_second() <= second + 1 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Timeout for actions of the operator.
pub const SOON: Duration = Duration::from_secs(30);

/// Timeout for actions of Kubernetes' own controllers.
pub const EVENTUALLY: Duration = Duration::from_mins(1);
