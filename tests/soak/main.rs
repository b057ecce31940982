//! Endurance and fault-injection tests: `make soak`. They run one after another. `CI=true` reduces counts and times.
#![allow(missing_docs, clippy::expect_used, reason = "tests fail by panicking")]

#[path = "../support/mod.rs"]
mod support;

mod admin_rotation;
mod api_server;
mod failover;
mod freshness;
mod kills;
mod managed_users;
mod manager_roles;
mod memory;
mod neighbours;
mod places;
mod port;
mod rotation;
mod sampler;
mod watches;

/// Whether to use reduced counts and times.
fn reduced() -> bool {
    std::env::var("CI").is_ok_and(|v| v == "true")
}
