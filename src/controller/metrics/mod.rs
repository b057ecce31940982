//! Metrics of the controllers.

pub mod described;
pub mod objects;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::controller::metrics::described::Labels;
use crate::controller::queue::Queue;
use crate::domain::reason::Reason;
use crate::ops::http::Probe;

/// Histogram buckets in seconds: from the latency of a nearby server to the longest timeout of an instance (60 s) and
/// of a reconcile (300 s).
const BUCKETS: [f64; 13] = [
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];

const RESULTS: [&str; 2] = ["success", "failure"];

const USER_ACTIONS: [&str; 2] = ["create", "delete"];

const ROLE_ACTIONS: [&str; 2] = ["grant", "revoke"];

/// Counters and histograms. Label values come from closed sets, except the names of existing instances.
#[derive(Clone, Debug)]
pub struct Metrics {
    mints: Family<Labels, Counter>,
    mint_duration: Family<Labels, Histogram>,
    key_rotations: Family<Labels, Counter>,
    users: Family<Labels, Counter>,
    manager_roles: Family<Labels, Counter>,
    reconcile_duration: Family<Labels, Histogram>,
}

impl Metrics {
    /// Creates and registers the metrics. The panic hook increments `panics`. `leads` returns whether this process is
    /// the leader.
    pub fn register(registry: &mut Registry, panics: Counter, leads: Probe) -> Self {
        let histogram = || Histogram::new(BUCKETS);
        let metrics = Self {
            mints: Family::default(),
            mint_duration: Family::new_with_constructor(histogram),
            key_rotations: Family::default(),
            users: Family::default(),
            manager_roles: Family::default(),
            reconcile_duration: Family::new_with_constructor(histogram),
        };
        described::MINTS.register(registry, metrics.mints.clone());
        described::MINT_DURATION.register(registry, metrics.mint_duration.clone());
        described::KEY_ROTATIONS.register(registry, metrics.key_rotations.clone());
        described::USER_CHANGES.register(registry, metrics.users.clone());
        described::ROLE_CHANGES.register(registry, metrics.manager_roles.clone());
        described::RECONCILE_DURATION.register(registry, metrics.reconcile_duration.clone());
        described::PANICS.register(registry, panics);
        described::BUILD.register(registry, Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        registry.register_collector(Box::new(Leader(leads)));
        metrics
    }

    /// Counts an attempt to request a token from `instance`, with its result.
    pub fn minted(&self, instance: &str, reason: Reason) {
        let labels = described::MINTS.labels([instance, result(reason == Reason::Issued), reason.name()]);
        self.mints.get_or_create(&labels).inc();
    }

    /// Records how long a token request took, whether it succeeded or failed.
    pub fn asked(&self, instance: &str, took: Duration, successful: bool) {
        let labels = described::MINT_DURATION.labels([instance, result(successful)]);
        self.mint_duration.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// Counts a key of `instance` that the operator replaced.
    pub fn rotated(&self, instance: &str) {
        let labels = described::KEY_ROTATIONS.labels([instance]);
        self.key_rotations.get_or_create(&labels).inc();
    }

    /// Counts a service user of `instance` that the operator created or deleted.
    pub fn user_changed(&self, instance: &str, created: bool) {
        let labels = described::USER_CHANGES.labels([instance, USER_ACTIONS[usize::from(!created)]]);
        self.users.get_or_create(&labels).inc();
    }

    /// Counts manager roles of `instance` that the operator granted and revoked.
    pub fn roles_changed(&self, instance: &str, granted: usize, revoked: usize) {
        for (action, count) in ROLE_ACTIONS.into_iter().zip([granted, revoked]) {
            let labels = described::ROLE_CHANGES.labels([instance, action]);
            self.manager_roles.get_or_create(&labels).inc_by(count as u64);
        }
    }

    /// Starts to measure a reconcile. The measurement ends when the returned value is dropped, including after a panic
    /// or a timeout.
    #[must_use]
    pub fn reconcile(&self, kind: &str) -> ReconcileTimer {
        let labels = described::RECONCILE_DURATION.labels([kind]);
        ReconcileTimer {
            duration: self.reconcile_duration.get_or_create_owned(&labels),
            began: Instant::now(),
        }
    }

    /// Removes the series of an instance that no longer exists.
    pub fn forget(&self, instance: &str) {
        self.key_rotations.remove(&described::KEY_ROTATIONS.labels([instance]));
        for action in USER_ACTIONS {
            self.users.remove(&described::USER_CHANGES.labels([instance, action]));
        }
        for action in ROLE_ACTIONS {
            self.manager_roles
                .remove(&described::ROLE_CHANGES.labels([instance, action]));
        }
        for result in RESULTS {
            self.mint_duration
                .remove(&described::MINT_DURATION.labels([instance, result]));
            for reason in Reason::ALL {
                self.mints
                    .remove(&described::MINTS.labels([instance, result, reason.name()]));
            }
        }
    }
}

fn result(successful: bool) -> &'static str {
    RESULTS[usize::from(!successful)]
}

/// A reconcile in progress.
#[derive(Debug)]
pub struct ReconcileTimer {
    duration: Histogram,
    began: Instant,
}

impl Drop for ReconcileTimer {
    fn drop(&mut self) {
        self.duration.observe(self.began.elapsed().as_secs_f64());
    }
}

/// Reports whether this process is the leader.
struct Leader(Probe);

impl fmt::Debug for Leader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Leader")
    }
}

impl Collector for Leader {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        described::LEADER.encode(&mut encoder, [([], f64::from(u8::from(self.0())))])
    }
}

/// The queues, by kind of object. Their metrics are computed at each scrape.
pub struct Queues(pub Vec<(&'static str, Arc<Queue>)>);

impl fmt::Debug for Queues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(kind, _)| kind)).finish()
    }
}

impl Collector for Queues {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let loads: Vec<_> = self.0.iter().map(|(kind, queue)| (*kind, queue.load())).collect();
        #[allow(clippy::cast_precision_loss, reason = "counts of objects are small")]
        let count = |n: usize| n as f64;
        let waiting = loads.iter().map(|(kind, load)| ([*kind], count(load.waiting)));
        described::QUEUE_WAITING.encode(&mut encoder, waiting)?;
        let running = loads.iter().map(|(kind, load)| ([*kind], count(load.running)));
        described::QUEUE_RUNNING.encode(&mut encoder, running)?;
        let oldest = loads.iter().map(|(kind, load)| ([*kind], load.oldest.as_secs_f64()));
        described::QUEUE_OLDEST.encode(&mut encoder, oldest)
    }
}
