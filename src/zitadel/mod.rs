//! HTTP to ZITADEL: discovery, the token request, and the limits on what the operator sends. This module does not use
//! the Kubernetes API, and its errors never contain text from a response.

mod circuit_breaker;
mod client;
mod clock;
pub mod discovery;
mod http;
mod keys;
mod limits;
mod settings;
mod token;
mod transport;

pub use circuit_breaker::{Breaker, Permit};
pub use client::{Exchanged, ZitadelClient};
pub use clock::Clock;
pub use discovery::Discovery;
pub use keys::{APIToken, KeyError, MOST_LISTED};
pub use limits::{Hosts, Limits};
pub use settings::{RequestBudget, Settings};
pub use transport::{Call, Dial, Request, Transport, dial};
