//! Running as a service: logs, health, leadership, shutdown. A leaf: knows nothing of tokens.

pub mod clock;
pub mod http;
pub mod lease;
pub mod shutdown;
pub mod telemetry;
