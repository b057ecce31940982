//! The controllers: watches, queues, reads and writes. Decides nothing itself; asks the domain.

pub mod guarded;
pub mod instance;
pub mod metrics;
pub mod queue;
pub mod secrets;
pub mod service_user;
pub mod triggers;
pub mod write;

use std::sync::Arc;

use kube::Client;

use crate::controller::instance::Connections;
use crate::controller::metrics::Metrics;
use crate::controller::queue::Queue;
use crate::controller::service_user::{Forced, UnwrittenTokens};
use crate::controller::triggers::Cache;
use crate::controller::write::Writer;
use crate::domain::allow_list::AllowList;

/// What a pass needs.
pub struct Context {
    /// For reads.
    pub client: Client,
    /// What the watches say.
    pub cache: Arc<Cache>,
    /// For writes.
    pub writer: Writer,
    /// Connections to ZITADEL.
    pub connections: Arc<Connections>,
    /// The queue of the instances, to wake one whose state changed.
    pub instances: Arc<Queue>,
    /// The queue of the service users, to wake those that waited for their instance.
    pub users: Arc<Queue>,
    /// Tokens that wait for their write.
    pub unwritten: UnwrittenTokens,
    /// Mints and repairs that somebody forced.
    pub forced: Forced,
    /// Counters.
    pub metrics: Metrics,
    /// The labels and annotations that users may set on token Secrets.
    pub allowed_metadata: Arc<AllowList>,
    /// The namespace that the operator runs in, if it runs in one.
    pub operator_namespace: Option<String>,
    /// Whether an instance that is not there may be another operator's.
    pub serves_some_instances_only: bool,
    /// Whether the status of instances is ours to write; several operators may serve one instance.
    pub writes_instance_status: bool,
}

impl Context {
    /// What kept the service users of an instance from their tokens is over.
    pub fn wake_failing_users_of(&self, instance: &str) {
        self.users.wake_failing(self.cache.users(|user| user.is_of(instance)));
    }
}
