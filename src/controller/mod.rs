//! The controllers: watches, queues, reads and writes. All decisions are made in `domain`.

pub mod cache;
pub mod crd_version;
pub mod evidence;
pub mod guarded;
pub mod instance;
pub mod key_generator;
pub mod key_rotation;
pub mod ledger;
pub mod metrics;
pub mod queue;
pub mod read;
pub mod refused;
pub mod service_user;
pub mod session;
pub mod triggers;
pub mod watch;
pub mod watched;
pub mod write;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::{Client, ResourceExt};
use tokio::time::Instant;

use crate::api::{ZitadelInstance, ZitadelServiceUser};
use crate::controller::cache::Cache;
use crate::controller::instance::Connections;
use crate::controller::key_generator::KeyGenerator;
use crate::controller::key_rotation::KeyMemory;
use crate::controller::metrics::Metrics;
use crate::controller::queue::Queue;
use crate::controller::read::Reader;
use crate::controller::service_user::Memory;
use crate::controller::triggers::reference;
use crate::controller::write::Writer;
use crate::domain::allow_list::AllowList;
use crate::domain::allowance::Allowances;
use crate::domain::backoff::Recovery;
use crate::domain::failure::Failure;
use crate::domain::limits::Rate;
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::Reason;
use crate::domain::report::EventDraft;
use crate::zitadel::{Breaker, Clock, ZitadelClient};

/// What a reconcile needs.
pub struct Context {
    /// The operator's clock.
    pub clock: Clock,
    /// For reads of objects that a tenant cannot choose.
    pub client: Client,
    /// For all other reads.
    pub reader: Reader,
    /// The objects that the watches have reported.
    pub cache: Arc<Cache>,
    /// For writes.
    pub writer: Writer,
    /// Connections to ZITADEL.
    pub connections: Arc<Connections>,
    /// The queue of instances, to wake an instance whose state changed.
    pub instances: Arc<Queue>,
    /// The queue of service users, to wake those that wait for their instance.
    pub users: Arc<Queue>,
    /// What this process remembers about service users.
    pub memory: Memory,
    /// What this process remembers about keys.
    pub keys: Arc<KeyMemory>,
    /// Generates keys for rotations.
    pub key_generator: Arc<KeyGenerator>,
    /// The limit for token requests other than scheduled refreshes.
    pub requests: Requests,
    /// The limit for comparisons of manager roles, which token requests must not delay.
    pub role_requests: Requests,
    /// The metrics.
    pub metrics: Metrics,
    /// The labels and annotations that users may set on token Secrets.
    pub allowed_metadata: Arc<AllowList>,
    /// The namespace that the operator runs in, if it is known.
    pub operator_namespace: Option<String>,
    /// The namespaces that the operator watches. `None` means all.
    pub watched_namespaces: Vec<Option<String>>,
    /// The name of the cluster, if it is known.
    pub cluster_name: Option<String>,
    /// Whether a missing instance may belong to another operator.
    pub serves_some_instances_only: bool,
    /// Whether this operator writes the status of instances. Several operators may serve one instance.
    pub writes_instance_status: bool,
}

impl Context {
    /// Wakes the failing service users of an instance after the cause of their failures has ended.
    pub fn wake_failing_users_of(&self, instance: &str, recovery: Recovery) {
        let users = self.cache.users_of(instance);
        self.users.wake_failing(users, recovery);
    }

    /// Records the result of discovery in the circuit breaker.
    pub fn record_discovery(&self, connection: &ZitadelClient, ended: Result<(), Failure>) {
        let breaker = connection.limits().breaker();
        if breaker.record_discovery(&connection.settings().name, ended) {
            self.breaker_closed(breaker);
        }
    }

    /// Wakes the service users that the breaker refused, for all instances that share it.
    pub fn breaker_closed(&self, breaker: &Arc<Breaker>) {
        for instance in self.connections.instances_sharing(breaker) {
            self.wake_failing_users_of(&instance, Recovery::Breaker);
        }
    }

    /// The present time by the clock of an instance.
    #[must_use]
    pub fn server_time(&self, instance: &ZitadelInstance) -> Timestamp {
        let skew = self.connections.skew(&instance.name_any());
        skew.theirs(self.clock.now())
    }

    /// Says in the log and in an Event what the operator has done for a service user at ZITADEL.
    pub async fn tell(&self, user: &ZitadelServiceUser, action: &str, event: EventDraft) {
        tracing::info!(object = %reference(user), reason = %event.reason, "{}", event.text);
        self.writer.event_of_its_own(user, action, event).await;
    }

    /// Whether this operator watches the service users of a namespace.
    #[must_use]
    pub fn watches(&self, namespace: &str) -> bool {
        let mut watched = self.watched_namespaces.iter().map(Option::as_deref);
        watched.any(|watched| watched.is_none_or(|watched| watched == namespace))
    }

    /// Whether this operator serves the service users of this instance. A missing instance may belong to another
    /// operator.
    #[must_use]
    pub fn serves(&self, instance: &str) -> bool {
        let missing = || matches!(self.cache.instance(instance), Err(Reason::InstanceMissing));
        !self.serves_some_instances_only || !missing()
    }
}

/// Token requests for one object other than scheduled refreshes. The burst allows three changes of 16 tokens.
const REQUESTS_OF_OBJECT: Rate = Rate {
    burst: 48.0,
    per_second: 1.0 / 20.0,
};

/// The same limit for all objects of a namespace together.
const REQUESTS_OF_NAMESPACE: Rate = Rate {
    burst: 1_000.0,
    per_second: 5.0,
};

/// The limit for token requests other than scheduled refreshes.
pub struct Requests {
    allowances: Mutex<Allowances>,
    started: Instant,
}

impl Default for Requests {
    fn default() -> Self {
        Self {
            allowances: Mutex::new(Allowances::new(REQUESTS_OF_OBJECT, REQUESTS_OF_NAMESPACE)),
            started: Instant::now(),
        }
    }
}

impl Requests {
    /// Takes one request for `id`, or returns how long `id` must wait for it.
    pub fn claim(&self, id: &ObjectRef) -> Result<(), Duration> {
        self.lock().claim(self.started.elapsed(), id)
    }

    /// Returns a request that `id` took and did not use.
    pub fn give_back(&self, id: &ObjectRef) {
        self.lock().give_back(self.started.elapsed(), id);
    }

    fn lock(&self) -> MutexGuard<'_, Allowances> {
        self.allowances.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
