//! Endurance, kills and faults, serial: `make soak`. Counts are reduced under `CI=true`.
#![allow(missing_docs, clippy::expect_used, reason = "tests fail by panicking")]

#[path = "../support/mod.rs"]
mod support;

mod api_server;
mod failover;
mod freshness;
mod kills;
mod neighbours;
mod port;
mod sampler;
mod watches;

/// Whether counts and times are reduced.
fn reduced() -> bool {
    std::env::var("CI").is_ok_and(|v| v == "true")
}
