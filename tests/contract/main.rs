//! The contract with ZITADEL: what the product's own code (`zitadel`, `domain::answer`, `domain::failure`) sends, and
//! how it interprets the answers. Facts and anchors: docs/reference/zitadel-protocol.md.
//!
//! [`any_server`] runs on the stand-in in `make test`, and on a real server in `make test-zitadel`. [`only_stand_in`],
//! [`limits`] and [`hostile`] need a server that can inject faults, so `make test-zitadel` leaves them out.
#![allow(missing_docs, clippy::expect_used, reason = "tests fail by panicking")]

#[path = "../support/mod.rs"]
mod support;

mod any_server;
mod client;
mod hostile;
mod limits;
mod only_stand_in;
mod server;
