//! How the keys, the user or the manager roles of an object stand after a reconcile.

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::domain::reason::Reason;
use crate::domain::retry::{Failed, Retry};
use crate::domain::time::shifted;

/// What failed is retried within this time once there is something to lose or to revoke.
const RETRIED_WITHIN: SignedDuration = SignedDuration::from_mins(10);

/// How it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Whether all is as the spec asks for, or why not.
    pub reason: Reason,
    /// When the next step is due.
    pub next: Option<Timestamp>,
    /// The earliest time of the next attempt after a failure.
    pub not_before: Option<Timestamp>,
    /// The latest time of the next attempt after a failure.
    pub not_after: Option<Timestamp>,
    /// Not attempted in this reconcile.
    pub deferred: bool,
    /// Whether this reconcile replaced the key.
    pub rotated: bool,
    /// Whether it waits for something else, which has a retry of its own.
    pub waits: bool,
}

impl Progress {
    /// After an attempt.
    #[must_use]
    pub fn new(reason: Reason) -> Self {
        Self {
            reason,
            next: None,
            not_before: None,
            not_after: None,
            deferred: false,
            rotated: false,
            waits: false,
        }
    }

    /// Something else has to be repaired first.
    #[must_use]
    pub fn waiting(reason: Reason) -> Self {
        Self {
            waits: true,
            ..Self::new(reason)
        }
    }

    /// This reconcile did not attempt it.
    #[must_use]
    pub fn deferred(reason: Reason) -> Self {
        Self {
            deferred: true,
            ..Self::new(reason)
        }
    }

    /// The same for an object that must not wait long: a key of the operator could expire, or a role is to be revoked.
    #[must_use]
    pub fn retried_in_time(self, now: Timestamp) -> Self {
        Self {
            not_after: Some(shifted(now, RETRIED_WITHIN)),
            ..self
        }
    }

    /// What the queue retries, under this name. `None` if nothing failed.
    #[must_use]
    pub fn failed(&self, what: &str) -> Option<Failed> {
        (self.reason.retry() != Retry::No && !self.waits).then(|| Failed {
            not_before: self.not_before,
            not_after: self.not_after,
            deferred: self.deferred,
            ..Failed::now(what, self.reason)
        })
    }
}
