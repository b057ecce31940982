//! Kubernetes operator that keeps fresh, audience-scoped ZITADEL access tokens in Secrets.
//!
//! The rooms and who may use whom: [`cli`] all of them; [`controller`] [`zitadel`], [`domain`], [`api`] and [`ops`];
//! [`zitadel`] [`domain`]; [`domain`] [`api`]; [`ops`] and [`api`] nothing of ours. `tests/it/architecture.rs` checks it.

pub mod api;
pub mod cli;
pub mod controller;
pub mod domain;
pub mod ops;
#[cfg(test)]
mod tests;
pub mod zitadel;
