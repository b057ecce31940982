//! The controllers: watches, queues, reads and writes. Decides nothing itself; asks the domain.

pub mod cache;
pub mod guarded;
pub mod instance;
pub mod metrics;
pub mod queue;
pub mod read;
pub mod service_user;
pub mod triggers;
pub mod watch;
pub mod watched;
pub mod write;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kube::Client;

use crate::controller::cache::Cache;
use crate::controller::instance::Connections;
use crate::controller::metrics::Metrics;
use crate::controller::queue::Queue;
use crate::controller::read::Reader;
use crate::controller::service_user::Memory;
use crate::controller::write::Writer;
use crate::domain::allow_list::AllowList;
use crate::domain::allowance::Allowances;
use crate::domain::backoff::Recovery;
use crate::domain::failure::Failure;
use crate::domain::limits::Rate;
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::Reason;
use crate::zitadel::{Breaker, ZitadelClient};

/// What a pass needs.
pub struct Context {
    /// For reads that no tenant chooses.
    pub client: Client,
    /// For all other reads.
    pub reader: Reader,
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
    /// What this process remembers of service users.
    pub memory: Memory,
    /// How many tokens may be requested besides the scheduled refreshes.
    pub requests: Requests,
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
    pub fn wake_failing_users_of(&self, instance: &str, recovery: Recovery) {
        let users = self.cache.users_of(instance);
        self.users.wake_failing(users, recovery);
    }

    /// Tells the circuit breaker how discovery ended.
    pub fn record_discovery(&self, connection: &ZitadelClient, ended: Result<(), Failure>) {
        let breaker = connection.limits().breaker();
        if breaker.record_discovery(&connection.settings().name, ended) {
            self.breaker_closed(breaker);
        }
    }

    /// Wakes those whom the breaker refused, of all instances that share it.
    pub fn breaker_closed(&self, breaker: &Arc<Breaker>) {
        for instance in self.connections.that_share(breaker) {
            self.wake_failing_users_of(&instance, Recovery::Breaker);
        }
    }

    /// Whether service users of this instance are ours to serve. An instance that does not exist may be another
    /// operator's.
    #[must_use]
    pub fn serves(&self, instance: &str) -> bool {
        let missing = || matches!(self.cache.instance(instance), Err(Reason::InstanceMissing));
        !self.serves_some_instances_only || !missing()
    }
}

/// Token requests for one object besides its scheduled refreshes: three changes of 16 tokens at once.
const REQUESTS_OF_OBJECT: Rate = Rate {
    burst: 48.0,
    per_second: 1.0 / 20.0,
};

/// The same for all objects of a namespace.
const REQUESTS_OF_NAMESPACE: Rate = Rate {
    burst: 1_000.0,
    per_second: 5.0,
};

/// How many tokens may be requested besides the scheduled refreshes.
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
    /// Takes one for `id`, or says when its turn comes.
    pub fn claim(&self, id: &ObjectRef) -> Result<(), Duration> {
        self.lock().claim(self.started.elapsed(), id)
    }

    /// What `id` took was not used.
    pub fn give_back(&self, id: &ObjectRef) {
        self.lock().give_back(self.started.elapsed(), id);
    }

    fn lock(&self) -> MutexGuard<'_, Allowances> {
        self.allowances.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
