//! Running as a service: logs, health, leadership, shutdown, memory protection, file descriptors. This module depends
//! on no other module of the operator and knows nothing about tokens.

pub mod clock_jump;
pub mod descriptors;
pub mod election;
pub mod exposition;
pub mod http;
pub mod lease;
pub mod memory;
pub mod shutdown;
pub mod telemetry;
