//! Retries: the class of a failure, what waits for its retry, and when an object is reconciled next.

use std::collections::BTreeMap;

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::domain::reason::Reason;
use crate::domain::time::shifted;

/// How a failed attempt is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Retry {
    /// Nothing failed.
    No,
    /// Waits for a change of any input, plus a slow retry.
    Permanent,
    /// The same, after a few early retries: a new key or a reactivated user takes effect in ZITADEL with a delay.
    Eventual,
    /// Grows from a second to five minutes.
    Transient,
    /// Grows from a second to ten: nobody is asked but the cluster's own API server, and a token that was due while it
    /// was away has not long to wait.
    Soon,
}

/// What failed before and is not to be tried yet, by token name.
pub type PendingRetries = BTreeMap<String, PendingRetry>;

/// A back-off that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingRetry {
    /// What failed.
    pub reason: Reason,
    /// Until when.
    pub until: Timestamp,
    /// What is tried next is a retry of the same, not something that a change asks for.
    pub is_retry: bool,
}

/// When an object is looked at again; without either, when something changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wake {
    /// At this time.
    pub at: Option<Timestamp>,
    /// After a back-off that the queue computes for each of these.
    pub failed: Vec<Failed>,
}

impl Wake {
    /// The same by another clock that is so far ahead.
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

/// Something that failed and is to be tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// Name of the token; empty for the object as a whole.
    pub what: String,
    /// Why.
    pub reason: Reason,
    /// Not to be tried before this.
    pub not_before: Option<Timestamp>,
    /// To be tried by then at the latest: a back-off must not outlast the token that is still good.
    pub not_after: Option<Timestamp>,
    /// It was not tried this time, so that its back-off does not grow.
    pub deferred: bool,
}

impl Failed {
    /// A failure of just now.
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
