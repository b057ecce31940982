//! What a user would notice, on a real API server and the ZITADEL stand-in. One control plane for all; each test has
//! its own namespace, instance, issuer and operator.
#![allow(missing_docs, clippy::expect_used, reason = "tests fail by panicking")]

#[path = "../support/mod.rs"]
mod support;

mod access;
mod amplification;
mod api_server;
mod architecture;
mod chart;
mod clock;
mod failures;
mod gitops;
mod hostile;
mod instances;
mod keys;
mod leadership;
mod main_job;
mod monitoring;
mod schema;
mod secrecy;
mod secrets;
mod service;
mod tenants;
