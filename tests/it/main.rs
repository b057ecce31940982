//! Integration tests of behaviour that users see, with a real API server and the ZITADEL stand-in. All tests share one
//! control plane. Each test has its own namespace, instance, issuer and operator.
#![allow(missing_docs, clippy::expect_used, reason = "tests fail by panicking")]

#[path = "../support/mod.rs"]
mod support;

mod access;
mod admin_rotation;
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
mod managed_users;
mod manager_roles;
mod monitoring;
mod role_revocation;
mod rotation;
mod schema;
mod secrecy;
mod secrets;
mod service;
mod tenants;
