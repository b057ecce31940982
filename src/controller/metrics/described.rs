//! Every metric: its name, labels and meaning. What is scraped and `docs/metrics.md` are made from this one table.

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Metric, Registry, Unit};

/// A metric family.
#[derive(Debug)]
pub struct Described {
    /// The name that queries use.
    pub name: &'static str,
    /// What kind of metric it is.
    pub kind: MetricType,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it tells, without the full stop.
    pub help: &'static str,
}

/// Label values of one series, with their names.
pub type Labels = Vec<(&'static str, String)>;

macro_rules! metrics {
    ($($id:ident: $kind:ident $name:literal [$($label:literal)*] $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $id: Described = Described {
                name: $name,
                kind: MetricType::$kind,
                labels: &[$($label),*],
                help: $help,
            };
        )*

        /// All of them, in the order of the documentation.
        pub const ALL: &[Described] = &[$($id),*];
    };
}

// `zitadel_instance` and not `instance`, which is Prometheus' own name for what it scrapes.
metrics! {
    SERVICE_USER_READY: Gauge "zitadel_tokens_service_user_ready" ["namespace" "name" "zitadel_instance" "reason"]
        "1 while the service user's condition Ready is True, else 0; with the condition's reason";
    TOKEN_EXPIRATION: Gauge "zitadel_tokens_token_expiration_timestamp_seconds" ["namespace" "name" "token" "zitadel_instance"]
        "When the token expires, by the clock of its ZITADEL";
    TOKEN_RENEWAL: Gauge "zitadel_tokens_token_renewal_timestamp_seconds" ["namespace" "name" "token" "zitadel_instance"]
        "When the token is renewed, by the clock of its ZITADEL; absent while its service user is suspended";
    TOKEN_FAILING_SINCE: Gauge "zitadel_tokens_token_failing_since_timestamp_seconds" ["namespace" "name" "token" "zitadel_instance" "reason"]
        "Since when attempts to get the token fail, and why; absent while they succeed";
    KEY_EXPIRATION: Gauge "zitadel_tokens_key_expiration_timestamp_seconds" ["namespace" "name" "zitadel_instance"]
        "When the key expires; absent if its file does not say";
    SERVICE_USERS: Gauge "zitadel_tokens_service_users" ["zitadel_instance" "ready" "reason"]
        "Service users, by status and reason of their condition Ready; both are Unknown before the first look";
    TOKENS: Gauge "zitadel_tokens_tokens" ["zitadel_instance" "state"]
        "Tokens: fresh, due (to be renewed), stale (due for half of the time that was left), expired, missing, suspended";
    EARLIEST_KEY_EXPIRATION: Gauge "zitadel_tokens_earliest_key_expiration_timestamp_seconds" ["zitadel_instance"]
        "When the first of the instance's keys expires; absent if no key file says";
    NAMESPACES_OVER_LIMIT: Gauge "zitadel_tokens_namespaces_over_limit" []
        "Namespaces in which service users are not served because the namespace has reached its memory limit";
    INSTANCE_UP: Gauge "zitadel_tokens_instance_up" ["zitadel_instance" "reason"]
        "1 while the instance's condition Ready is True, else 0; with the condition's reason";
    INSTANCE_CLOCK_SKEW: Gauge "zitadel_tokens_instance_clock_skew_seconds" ["zitadel_instance"]
        "How far the instance's clock is ahead of the operator's";
    INSTANCE_CIRCUIT_OPEN: Gauge "zitadel_tokens_instance_circuit_open" ["zitadel_instance"]
        "1 while the circuit breaker of the instance's host is open and refuses token requests, else 0; 0 too if nobody has asked for seven minutes";
    MINTS: Counter "zitadel_tokens_mints_total" ["zitadel_instance" "result" "reason"]
        "Attempts to get a token, by how they ended: success or failure, and the reason";
    MINT_DURATION: Histogram "zitadel_tokens_mint_duration_seconds" ["zitadel_instance" "result"]
        "How long a token request took, with its wait for the instance's budget";
    RECONCILE_DURATION: Histogram "zitadel_tokens_reconcile_duration_seconds" ["kind"]
        "How long a pass over an object took";
    QUEUE_WAITING: Gauge "zitadel_tokens_queue_waiting" ["kind"]
        "Objects that are due and wait for a pass";
    QUEUE_RUNNING: Gauge "zitadel_tokens_queue_running" ["kind"]
        "Passes under way";
    QUEUE_OLDEST: Gauge "zitadel_tokens_queue_oldest_seconds" ["kind"]
        "For how long the object that is due longest waits for its pass, or for the end of it";
    LEADER: Gauge "zitadel_tokens_leader" []
        "1 while this process is the one that works, else 0";
    PANICS: Counter "zitadel_tokens_panics_total" []
        "Panics, each of which ended one pass";
    BUILD: Info "zitadel_tokens_build_info" ["version"]
        "Always 1; tells the operator's version";
}

impl Described {
    /// Whether it has a series for each object, which `--metrics-per-object=false` leaves out.
    #[must_use]
    pub fn is_per_object(&self) -> bool {
        self.labels.contains(&"namespace")
    }

    /// Registers `metric` under this name.
    pub fn register(&self, registry: &mut Registry, metric: impl Metric) {
        let (name, unit) = self.parts();
        match unit {
            Some(unit) => registry.register_with_unit(name, self.help, unit, metric),
            None => registry.register(name, self.help, metric),
        }
    }

    /// Writes gauges, of which `series` has the label values and the value. Without one nothing is written.
    pub fn encode<'a, const N: usize>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        series: impl IntoIterator<Item = ([&'a str; N], f64)>,
    ) -> fmt::Result {
        let mut series = series.into_iter().peekable();
        if series.peek().is_none() {
            return Ok(());
        }
        let (name, unit) = self.parts();
        let help = format!("{}.", self.help);
        let mut family = encoder.encode_descriptor(name, &help, unit.as_ref(), self.kind)?;
        for (values, value) in series {
            let gauge = ConstGauge::new(value);
            if N == 0 {
                return gauge.encode(family);
            }
            gauge.encode(family.encode_family(&Named(self.labels, &values))?)?;
        }
        Ok(())
    }

    /// The labels of one series.
    #[must_use]
    pub fn labels<const N: usize>(&self, values: [&str; N]) -> Labels {
        let values = values.map(str::to_owned);
        self.labels.iter().copied().zip(values).collect()
    }

    /// The name as the library wants it, which adds unit and suffix itself.
    fn parts(&self) -> (&'static str, Option<Unit>) {
        let suffix = match self.kind {
            MetricType::Counter => "_total",
            MetricType::Info => "_info",
            _ => "",
        };
        let name = self.name.strip_suffix(suffix).unwrap_or(self.name);
        match name.strip_suffix("_seconds") {
            Some(base) => (base, Some(Unit::Seconds)),
            None => (name, None),
        }
    }
}

/// Label names and values side by side.
#[derive(Debug)]
struct Named<'a>(&'static [&'static str], &'a [&'a str]);

impl EncodeLabelSet for Named<'_> {
    fn encode(&self, encoder: &mut prometheus_client::encoding::LabelSetEncoder<'_>) -> fmt::Result {
        use prometheus_client::encoding::EncodeLabel;
        for label in self.0.iter().copied().zip(self.1.iter().copied()) {
            label.encode(encoder.encode_label())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_prometheus_wants_them() {
        for metric in ALL {
            let name = metric.name;
            assert!(name.starts_with("zitadel_tokens_"), "{name}");
            let counts = matches!(metric.kind, MetricType::Counter);
            assert_eq!(name.ends_with("_total"), counts, "{name}");
            let time = name.contains("timestamp") || name.contains("duration");
            assert!(!time || name.ends_with("_seconds"), "{name}");
            for reserved in ["instance", "job", "le", "pod"] {
                assert!(
                    !metric.labels.contains(&reserved),
                    "{name}: {reserved} is the scraper's"
                );
            }
        }
    }
}
