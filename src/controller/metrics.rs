//! Metrics of the controllers.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

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
    /// Makes and registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
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
