//! HTTP to ZITADEL: discovery, the token exchange, and the limits that protect the server. Knows no Kubernetes and
//! passes on no word of the server's.

mod circuit_breaker;
mod client;
pub mod discovery;
mod http;
mod limits;
mod settings;
mod token;

pub use circuit_breaker::{Breaker, Permit};
pub use client::{Exchanged, ZitadelClient};
pub use discovery::Discovery;
pub use limits::{Hosts, Limits};
pub use settings::{RequestBudget, Settings};
