//! Leadership. The replica that holds the Lease is the leader. Every write checks the [`LeadershipGuard`], which is a
//! deadline by the local clock. This module does no I/O; [`crate::ops::election`] talks to the API server
//! (docs/adr/0014-leadership-has-a-deadline.md).
//!
//! The clocks of two machines are never compared. The leader counts from before it sent the renewal. A standby counts
//! from when it saw the renewal, which is later. The leader also stops `MARGIN` earlier. The leader has therefore
//! stopped before a standby begins, even if their wall clocks differ.

use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;

use crate::ops::shutdown::Shutdown;

/// How long a Lease is valid after a renewal. A standby replaces a crashed leader after at most this time. The
/// documented limit is 15 s, one second more.
pub const TERM: Duration = Duration::from_secs(14);

/// How often the leader renews the lease.
pub const RENEW_EVERY: Duration = Duration::from_secs(3);

/// How much earlier the leader stops. This covers requests that were sent and not processed yet, and clocks that run at
/// different speeds.
const MARGIN: Duration = Duration::from_secs(2);

/// How long the leader may write, counted from when it sent the renewal.
const WRITE_TERM: Duration = TERM.saturating_sub(MARGIN);

/// Timeout of a request for the lease. The leader has time for two requests before its guard expires.
pub const LONGEST_REQUEST: Duration = Duration::from_secs(3);

/// Delay before the retry of a failed request.
pub const RETRY: Duration = Duration::from_secs(1);

/// The least remaining time to write while no two renewals in a row fail.
const SAFE_TO_BEGIN: Duration = WRITE_TERM
    .saturating_sub(RENEW_EVERY)
    .saturating_sub(LONGEST_REQUEST)
    .saturating_sub(RETRY);

/// Longest accepted term in a Lease of another holder, so that no holder keeps the lease forever.
const LONGEST_TERM: Duration = Duration::from_mins(1);

/// Time since boot, including suspend. Leases are measured by this clock. With `CLOCK_MONOTONIC`, which stops during
/// suspend (`clock_gettime(2)`), a process would still be the leader after a suspend.
#[must_use]
pub fn now() -> Duration {
    // The conversion cannot fail: this clock starts at zero and is never negative.
    Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default()
}

/// Tells whether this process may write, and for how long at least.
#[derive(Clone, Debug)]
pub struct LeadershipGuard {
    /// The deadline, by [`now`].
    until: watch::Receiver<Duration>,
    shutdown: Shutdown,
}

/// Sets the deadline of a [`LeadershipGuard`].
#[derive(Debug)]
pub struct Leadership(watch::Sender<Duration>);

/// This process is not the leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotLeading;

impl Leadership {
    /// The lease was acquired or renewed by a request that was sent at `sent`.
    pub fn renewed(&self, sent: Duration) {
        self.0.send_replace(sent + WRITE_TERM);
    }

    /// Ends leadership, because another replica is or may be the leader.
    pub fn close(&self) {
        self.0.send_replace(Duration::ZERO);
    }
}

impl LeadershipGuard {
    /// A guard without leadership, and the handle that grants it.
    #[must_use]
    pub fn new(shutdown: Shutdown) -> (Leadership, Self) {
        let (sender, until) = watch::channel(Duration::ZERO);
        (Leadership(sender), Self { until, shutdown })
    }

    /// A guard that always grants leadership, for a process without leader election.
    #[must_use]
    pub fn always(shutdown: Shutdown) -> Self {
        let until = watch::channel(Duration::MAX).1;
        Self { until, shutdown }
    }

    /// How long this process may still write if the lease is not renewed.
    pub fn remaining(&self) -> Result<Duration, NotLeading> {
        let until = *self.until.borrow();
        until
            .checked_sub(now())
            .filter(|left| !left.is_zero())
            .ok_or(NotLeading)
    }

    /// Whether this process is the leader.
    #[must_use]
    pub fn is_leading(&self) -> bool {
        self.remaining().is_ok()
    }

    /// Whether work that ends in a write may begin. It may not after shutdown was requested, or while renewals of the
    /// lease fail. If the lease is lost during work that takes longer than the lease lasts, the cost is that of a
    /// crash.
    #[must_use]
    pub fn may_begin(&self) -> bool {
        !self.shutdown.is_requested() && self.remaining().is_ok_and(|left| left >= SAFE_TO_BEGIN)
    }

    /// Completes when this process is the leader.
    pub async fn leading(&self) {
        let mut until = self.until.clone();
        while !self.is_leading() {
            if until.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Runs `work` while this process is the leader, and drops it when leadership ends. The clock is checked at each
    /// poll, because a process that was stopped continues before its timers fire.
    pub async fn while_leading<T>(&self, work: impl Future<Output = T>) -> Result<T, NotLeading> {
        let (mut work, mut lapsed) = (pin!(work), pin!(self.lapsed()));
        std::future::poll_fn(|cx| {
            if !self.is_leading() || lapsed.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(NotLeading));
            }
            work.as_mut().poll(cx).map(Ok)
        })
        .await
    }

    /// Completes when this process is not the leader.
    async fn lapsed(&self) {
        let mut until = self.until.clone();
        while let Ok(left) = self.remaining() {
            let changed = async {
                if until.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            // After a change or the timeout, check the clock again.
            let _ = tokio::time::timeout(left, changed).await;
        }
    }
}

/// The next step of a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Acquire the lease: it has no holder, or it has expired.
    Acquire,
    /// Renew the lease: this candidate holds it.
    Renew,
    /// Another candidate holds the lease, for at least this time.
    Wait(Duration),
}

/// A Lease as it was read, and when its current spec was first seen, by [`now`].
#[derive(Clone, Debug, PartialEq)]
pub struct ObservedLease {
    /// Has no resource version if the Lease was deleted. A deletion does not free the lease, because the holder may not
    /// have noticed it.
    lease: Lease,
    since: Duration,
}

impl ObservedLease {
    /// The state after `before` once `lease` was read. Only a change of the spec is a renewal; a changed label is not.
    #[must_use]
    pub fn next(before: Option<Self>, lease: Option<Lease>, now: Duration) -> Option<Self> {
        let Some(lease) = lease else {
            return before.map(|mut deleted| {
                deleted.lease.metadata = ObjectMeta::default();
                deleted
            });
        };
        let since = before
            .filter(|before| before.lease.spec == lease.spec)
            .map_or(now, |before| before.since);
        Some(Self { lease, since })
    }

    /// Handles a Lease that named `me` and was deleted while `me` was not the leader. Another candidate may hold a new
    /// Lease that this process has not seen. The deleted Lease therefore counts like one that another holder renewed
    /// now.
    #[must_use]
    pub fn disowned(mut self, me: &str, now: Duration) -> Self {
        if !self.exists() && self.holder() == Some(me) {
            self.lease.spec.get_or_insert_default().holder_identity = Some("unknown holder".to_owned());
            self.since = now;
        }
        self
    }

    /// Whether there is a Lease that can be replaced.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.lease.metadata.resource_version.is_some()
    }

    /// The identity of the holder.
    #[must_use]
    pub fn holder(&self) -> Option<&str> {
        let holder = self.lease.spec.as_ref()?.holder_identity.as_deref();
        holder.filter(|holder| !holder.is_empty())
    }

    /// The term that the holder wrote. The holder may run another version of the operator.
    fn term(&self) -> Duration {
        let stated = self.lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds);
        let stated = stated.and_then(|seconds| u64::try_from(seconds).ok());
        stated.map_or(TERM, Duration::from_secs).min(LONGEST_TERM)
    }

    /// The released Lease, which another candidate may acquire at once.
    #[must_use]
    pub fn released(&self) -> Lease {
        let mut lease = self.lease.clone();
        let spec = lease.spec.get_or_insert_default();
        // An empty string is invalid for the API server.
        spec.holder_identity = None;
        spec.acquire_time = None;
        spec.renew_time = None;
        lease
    }
}

/// The next step of `me`. `observed` is `None` if no Lease was ever seen.
#[must_use]
pub fn evaluate(observed: Option<&ObservedLease>, me: &str, now: Duration) -> Step {
    let Some(observed) = observed else {
        return Step::Acquire;
    };
    match observed.holder() {
        None => Step::Acquire,
        Some(holder) if holder == me => Step::Renew,
        Some(_) => {
            let left = (observed.since + observed.term()).saturating_sub(now);
            if left.is_zero() {
                Step::Acquire
            } else {
                Step::Wait(left)
            }
        }
    }
}

/// The Lease as `me` writes it, with the resource version that was read as precondition. The times in it are for
/// people; the operator does not use them.
#[must_use]
pub fn claimed(observed: Option<&ObservedLease>, name: &str, me: &str, clock: Timestamp) -> Lease {
    let mut lease = observed.map(|observed| observed.lease.clone()).unwrap_or_default();
    lease.metadata.name = Some(name.to_owned());
    let renews = observed.and_then(ObservedLease::holder) == Some(me);
    let spec: &mut LeaseSpec = lease.spec.get_or_insert_default();
    if !renews {
        spec.holder_identity = Some(me.to_owned());
        spec.acquire_time = Some(MicroTime(clock));
        spec.lease_transitions = Some(spec.lease_transitions.map_or(0, |n| n.saturating_add(1)));
    }
    spec.renew_time = Some(MicroTime(clock));
    spec.lease_duration_seconds = i32::try_from(TERM.as_secs()).ok();
    lease
}

#[cfg(test)]
mod tests;
