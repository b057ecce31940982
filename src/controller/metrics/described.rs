//! All metrics with name, labels and meaning. `/metrics` and `docs/metrics.md` are both generated from this table.

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
    /// Type of the metric.
    pub kind: MetricType,
    /// Names of the labels.
    pub labels: &'static [&'static str],
    /// Help text, without the full stop.
    pub help: &'static str,
}

/// Label values of one series, with their names.
pub type Labels = Vec<(&'static str, String)>;

macro_rules! metrics {
    ($($id:ident: $kind:ident $name:literal [$($label:literal)*] $help:literal;)*) => {
        $(
            #[doc = $help]
            #[allow(clippy::doc_markdown, reason = "users read these texts as plain text, not as Markdown")]
            pub const $id: Described = Described {
                name: $name,
                kind: MetricType::$kind,
                labels: &[$($label),*],
                help: $help,
            };
        )*

        /// All metrics, in the order of the documentation.
        pub const ALL: &[Described] = &[$($id),*];
    };
}

// The label is `zitadel_instance` because Prometheus uses `instance` for the scrape target.
metrics! {
    SERVICE_USER_READY: Gauge "zitadel_tokens_service_user_ready" ["namespace" "name" "zitadel_instance" "reason"]
        "1 if the condition Ready of the service user is True, otherwise 0; reason is the reason of the condition UpToDate";
    TOKEN_EXPIRATION: Gauge "zitadel_tokens_token_expiration_timestamp_seconds" ["namespace" "name" "token" "zitadel_instance"]
        "Expiry of the token, by the clock of the ZITADEL server";
    TOKEN_REFRESH: Gauge "zitadel_tokens_token_refresh_timestamp_seconds" ["namespace" "name" "token" "zitadel_instance"]
        "Scheduled refresh of the token, by the clock of the ZITADEL server; absent while the service user is suspended";
    TOKEN_FAILING_SINCE: Gauge "zitadel_tokens_token_failing_since_timestamp_seconds" ["namespace" "name" "token" "zitadel_instance" "reason"]
        "Time since which attempts to issue or refresh the token fail, and the reason; absent while they succeed";
    KEY_EXPIRATION: Gauge "zitadel_tokens_key_expiration_timestamp_seconds" ["namespace" "name" "zitadel_instance"]
        "Expiry of the key; absent if it is unknown, or while the operator rotates the key on schedule";
    SERVICE_USERS: Gauge "zitadel_tokens_service_users" ["zitadel_instance" "ready" "reason"]
        "Number of service users, by status of the condition Ready and reason of the condition UpToDate; both are Unknown before the first reconcile";
    TOKENS: Gauge "zitadel_tokens_tokens" ["zitadel_instance" "state"]
        "Number of tokens by state: fresh; due (a refresh is due); stale (half of the time between the scheduled refresh and the expiry has passed); expired; missing; suspended";
    EARLIEST_KEY_EXPIRATION: Gauge "zitadel_tokens_earliest_key_expiration_timestamp_seconds" ["zitadel_instance"]
        "Earliest expiry of the keys that are used with the instance; absent if none is known; keys that the operator rotates on schedule do not count";
    NAMESPACES_OVER_LIMIT: Gauge "zitadel_tokens_namespaces_over_limit" []
        "Number of namespaces with service users that the operator does not serve because the namespace has reached its memory limit";
    INSTANCE_UP: Gauge "zitadel_tokens_instance_up" ["zitadel_instance" "reason"]
        "1 if the condition Ready of the instance is True, otherwise 0; reason is the reason of the condition";
    ADMIN_CREDENTIAL_UP: Gauge "zitadel_tokens_admin_credential_up" ["zitadel_instance" "reason"]
        "1 if ZITADEL accepts the admin credential of the instance and its key is rotated on schedule, if at all, otherwise 0; reason is that of the condition AdminCredentialReady, or of KeyRotated if the rotation fails; absent without an admin credential";
    INSTANCE_CLOCK_SKEW: Gauge "zitadel_tokens_instance_clock_skew_seconds" ["zitadel_instance"]
        "How far the clock of the ZITADEL server is ahead of the operator's clock; negative if it is behind";
    INSTANCE_CIRCUIT_OPEN: Gauge "zitadel_tokens_instance_circuit_open" ["zitadel_instance"]
        "1 while the circuit breaker of the instance's host is open and blocks token requests, otherwise 0; also 0 after seven minutes without a token request";
    MINTS: Counter "zitadel_tokens_token_requests_total" ["zitadel_instance" "result" "reason"]
        "Number of attempts to request a token, by result (success or failure) and reason";
    MINT_DURATION: Histogram "zitadel_tokens_token_request_duration_seconds" ["zitadel_instance" "result"]
        "Duration of a token request, including the wait for the request budget of the instance";
    KEY_ROTATIONS: Counter "zitadel_tokens_key_rotations_total" ["zitadel_instance"]
        "Number of keys that the operator has replaced";
    USER_CHANGES: Counter "zitadel_tokens_service_user_changes_total" ["zitadel_instance" "action"]
        "Number of service users that the operator has created or deleted in ZITADEL, by action: create, delete";
    ROLE_CHANGES: Counter "zitadel_tokens_manager_role_changes_total" ["zitadel_instance" "action"]
        "Number of manager roles that the operator has granted or revoked in ZITADEL, by action: grant, revoke";
    RECONCILE_DURATION: Histogram "zitadel_tokens_reconcile_duration_seconds" ["kind"]
        "Duration of a reconcile";
    QUEUE_WAITING: Gauge "zitadel_tokens_queue_waiting" ["kind"]
        "Number of objects that are due and wait for a reconcile";
    QUEUE_RUNNING: Gauge "zitadel_tokens_queue_running" ["kind"]
        "Number of reconciles in progress";
    QUEUE_OLDEST: Gauge "zitadel_tokens_queue_oldest_seconds" ["kind"]
        "Time that the longest-waiting due object has waited for its reconcile to start or to finish";
    LEADER: Gauge "zitadel_tokens_leader" []
        "1 if this replica is the leader, otherwise 0";
    PANICS: Counter "zitadel_tokens_panics_total" []
        "Number of panics in the process";
    BUILD: Info "zitadel_tokens_build_info" ["version"]
        "Always 1; version is the version of the operator";
}

impl Described {
    /// Whether the metric has one series per object. `--metrics-per-object=false` omits these metrics.
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

    /// Writes one gauge for each entry of `series`, which holds the label values and the value. Writes nothing if
    /// `series` is empty.
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

    /// The label names of this metric with the given values.
    #[must_use]
    pub fn labels<const N: usize>(&self, values: [&str; N]) -> Labels {
        let values = values.map(str::to_owned);
        self.labels.iter().copied().zip(values).collect()
    }

    /// The name without unit and suffix, and the unit. The library adds both to the name.
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

/// Label names, and the values in the same order.
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
    fn names_follow_prometheus_conventions() {
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
                    "{name}: Prometheus reserves the label {reserved}"
                );
            }
        }
    }
}
