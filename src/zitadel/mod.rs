//! HTTP to ZITADEL: discovery, the token request, the API for users and manager roles, and the limits on what the
//! operator sends. This module does not use the Kubernetes API, and its errors never contain text from a response.

mod administrators;
mod api_call;
mod api_error;
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
mod users;

pub use administrators::Manager;
pub use api_call::{APIToken, MOST_LISTED};
pub use api_error::APIError;
pub use circuit_breaker::{Breaker, Permit};
pub use client::{Exchanged, ZitadelClient};
pub use clock::Clock;
pub use discovery::Discovery;
pub use limits::{Hosts, Limits};
pub use settings::{RequestBudget, Settings};
pub use transport::{Call, Dial, Request, Transport, dial};
pub use users::NewUser;
