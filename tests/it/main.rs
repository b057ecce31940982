//! What a user would notice, on a real API server and the ZITADEL stand-in. One control plane for all; each test has
//! its own namespace, instance, issuer and operator.
#![allow(missing_docs, reason = "tests")]

#[path = "../support/mod.rs"]
mod support;

mod main_job;
