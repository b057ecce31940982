//! Running as a service: logs, health, leadership, shutdown, memory, descriptors. A leaf: knows nothing of tokens.

pub mod clock_jump;
pub mod descriptors;
pub mod election;
pub mod exposition;
pub mod http;
pub mod lease;
pub mod memory;
pub mod shutdown;
pub mod telemetry;
