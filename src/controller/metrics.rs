//! Metrics of the controllers.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use crate::controller::queue::Queue;

/// The counters. Labels never hold names of users, keys or objects.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    mints: Family<ByReason, Counter>,
    passes: Family<ByKind, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByReason {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByKind {
    kind: &'static str,
}

impl Metrics {
    /// Makes and registers them. `panics` counts by itself.
    pub fn register(registry: &mut Registry, panics: Counter) -> Self {
        let metrics = Self::default();
        registry.register("zitadel_tokens_panics", "Panics, each of which ended one pass", panics);
        registry.register(
            "zitadel_tokens_mints",
            "Token requests, by how they ended",
            metrics.mints.clone(),
        );
        registry.register(
            "zitadel_tokens_passes",
            "Passes over objects, by kind",
            metrics.passes.clone(),
        );
        metrics
    }

    /// A token was asked for.
    pub fn minted(&self, reason: &'static str) {
        self.mints.get_or_create(&ByReason { reason }).inc();
    }

    /// An object had a pass.
    pub fn passed(&self, kind: &'static str) {
        self.passes.get_or_create(&ByKind { kind }).inc();
    }
}

/// What the queues have to do, by kind of object; looked at when somebody scrapes.
pub struct Queues(pub Vec<(&'static str, Arc<Queue>)>);

impl fmt::Debug for Queues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(kind, _)| kind)).finish()
    }
}

impl Collector for Queues {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let loads: Vec<_> = self.0.iter().map(|(kind, queue)| (*kind, queue.load())).collect();
        let mut gauge = |name, help, unit: Option<&Unit>, value: &dyn Fn(usize) -> f64| {
            let mut family = encoder.encode_descriptor(name, help, unit, ConstGauge::<f64>::new(0.0).metric_type())?;
            for (i, (kind, _)) in loads.iter().enumerate() {
                ConstGauge::new(value(i)).encode(family.encode_family(&ByKind { kind })?)?;
            }
            Ok(())
        };
        #[allow(clippy::cast_precision_loss, reason = "counts of objects are small")]
        let count = |n: usize| n as f64;
        gauge(
            "zitadel_tokens_queue_waiting",
            "Objects that are due and wait for a pass",
            None,
            &|i| count(loads[i].1.waiting),
        )?;
        gauge("zitadel_tokens_queue_running", "Passes under way", None, &|i| {
            count(loads[i].1.running)
        })?;
        gauge(
            "zitadel_tokens_queue_oldest",
            "For how long the object that is due longest waits for its pass, or for the end of it",
            Some(&Unit::Seconds),
            &|i| loads[i].1.oldest.as_secs_f64(),
        )
    }
}
