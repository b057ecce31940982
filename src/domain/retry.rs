//! Retries: the class of a failure, pending retries, and when an object is reconciled next.

use std::collections::BTreeMap;

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::domain::reason::Reason;
use crate::domain::time::shifted;

/// How a failed attempt is retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Retry {
    /// Nothing failed.
    No,
    /// Waits for a change of any input, plus a slow retry.
    Permanent,
    /// Like `Permanent`, but the retry comes after six hours, because it costs the server requests that rarely succeed.
    Rare,
    /// Like `Permanent`, after a few early retries: a new key or a reactivated user takes effect in ZITADEL with a
    /// delay.
    Eventual,
    /// The backoff grows from one second to five minutes.
    Transient,
    /// The backoff grows from one second to ten. Retries reach only the cluster's API server, and a token that became
    /// due during its outage must not wait long.
    Soon,
}

/// Pending retries, by token name.
pub type PendingRetries = BTreeMap<String, PendingRetry>;

/// A failure that the operator retries after its backoff.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingRetry {
    /// The reason for the failure.
    pub reason: Reason,
    /// When the operator retries.
    pub until: Timestamp,
    /// Whether the next attempt repeats a failed one, as opposed to an attempt that a change of the object caused.
    pub is_retry: bool,
}

/// When an object is reconciled next. If both fields are empty, the next change triggers the reconcile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wake {
    /// At this time.
    pub at: Option<Timestamp>,
    /// After a backoff that the queue computes for each of these failures.
    pub failed: Vec<Failed>,
}

impl Wake {
    /// The same times by a clock that is ahead by `by`.
    #[must_use]
    pub fn shifted(self, by: SignedDuration) -> Self {
        let shift = |at: Option<Timestamp>| at.map(|at| shifted(at, by));
        let failed = self.failed.into_iter().map(|failed| Failed {
            not_before: shift(failed.not_before),
            not_after: shift(failed.not_after),
            ..failed
        });
        Self {
            at: shift(self.at),
            failed: failed.collect(),
        }
    }
}

/// A failure to retry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// Name of the token. Empty for the object as a whole.
    pub what: String,
    /// The reason for the failure.
    pub reason: Reason,
    /// The earliest time of the retry.
    pub not_before: Option<Timestamp>,
    /// The latest time of the retry: the backoff must not outlast a token that is still valid.
    pub not_after: Option<Timestamp>,
    /// Not attempted in this reconcile, so that the backoff does not grow.
    pub deferred: bool,
}

impl Failed {
    /// A failure of this reconcile.
    #[must_use]
    pub fn now(what: &str, reason: Reason) -> Self {
        Self {
            what: what.to_owned(),
            reason,
            not_before: None,
            not_after: None,
            deferred: false,
        }
    }
}
