//! Kubernetes operator that keeps fresh, audience-scoped ZITADEL access tokens in Secrets.
//!
//! The modules and the modules that each may use (`tests/it/architecture.rs` enforces this):
//!
//! * [`cli`] may use all modules
//! * [`controller`] may use [`zitadel`], [`domain`], [`api`] and [`ops`]
//! * [`zitadel`] may use [`domain`]
//! * [`domain`] may use [`api`]
//! * [`ops`] and [`api`] use no other module of this crate

pub mod api;
pub mod cli;
pub mod controller;
pub mod domain;
pub mod ops;
#[cfg(test)]
mod tests;
pub mod zitadel;
