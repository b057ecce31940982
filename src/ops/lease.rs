//! Leadership. Of the replicas one leads, the one that holds the Lease; and whoever writes asks the [`LeadershipGuard`], which is a
//! deadline by our own clock. Everything here is plain: [`crate::ops::election`] talks to the API server.
//!
//! Clocks of two machines are never compared. Who renews counts from before the request was sent; who waits counts from
//! when it saw the renewal, which is later. Both count the same duration, so that the one has stopped before the other
//! begins, however wrong their wall clocks are.

use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;

use crate::ops::shutdown::Shutdown;

/// How long a Lease is good for after it was renewed. A leader that dies is followed in this time at the latest; a second
/// less than the 15 that we promise.
pub const TERM: Duration = Duration::from_secs(14);

/// How often it is renewed.
pub const RENEW_EVERY: Duration = Duration::from_secs(3);

/// The leader stops so much earlier: for what it has sent and the API server has not done yet, and for clocks that go at
/// different speed.
const MARGIN: Duration = Duration::from_secs(2);

/// How long a leader may write after it asked for a renewal.
const WRITE_TERM: Duration = TERM.saturating_sub(MARGIN);

/// After this a request for the lease is given up. A leader has time for two before its fence closes.
pub const LONGEST_REQUEST: Duration = Duration::from_secs(3);

/// After this one that failed is tried again.
pub const RETRY: Duration = Duration::from_secs(1);

/// How long a leader may still write at any moment while at most one renewal in a row fails.
const SAFE_TO_BEGIN: Duration = WRITE_TERM
    .saturating_sub(RENEW_EVERY)
    .saturating_sub(LONGEST_REQUEST)
    .saturating_sub(RETRY);

/// A term in somebody else's Lease counts up to this: nobody shall hold it for ever.
const LONGEST_TERM: Duration = Duration::from_mins(1);

/// Time since the machine started, sleep included: what a lease is measured by. A monotonic clock that stands still in
/// suspend (`CLOCK_MONOTONIC`, `clock_gettime(2)`) would wake up as leader.
#[must_use]
pub fn now() -> Duration {
    // Nothing is negative before 1970: it begins at zero.
    Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default()
}

/// Whether, and how long at least, this process may write.
#[derive(Clone, Debug)]
pub struct LeadershipGuard {
    /// Until then, by [`now`].
    until: watch::Receiver<Duration>,
    shutdown: Shutdown,
}

/// Opens and closes a [`LeadershipGuard`].
#[derive(Debug)]
pub struct Leadership(watch::Sender<Duration>);

/// Another replica leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotLeading;

impl Leadership {
    /// A lease was renewed by a request that was sent at `sent`.
    pub fn renewed(&self, sent: Duration) {
        self.0.send_replace(sent + WRITE_TERM);
    }

    /// Another replica leads, or may.
    pub fn close(&self) {
        self.0.send_replace(Duration::ZERO);
    }
}

impl LeadershipGuard {
    /// A fence that is closed, and who opens it.
    #[must_use]
    pub fn new(shutdown: Shutdown) -> (Leadership, Self) {
        let (sender, until) = watch::channel(Duration::ZERO);
        (Leadership(sender), Self { until, shutdown })
    }

    /// The fence of a process that runs alone.
    #[must_use]
    pub fn always(shutdown: Shutdown) -> Self {
        let until = watch::channel(Duration::MAX).1;
        Self { until, shutdown }
    }

    /// How long this process may still write, if the lease is not renewed.
    pub fn remaining(&self) -> Result<Duration, NotLeading> {
        let until = *self.until.borrow();
        until
            .checked_sub(now())
            .filter(|left| !left.is_zero())
            .ok_or(NotLeading)
    }

    /// Whether this process leads.
    #[must_use]
    pub fn is_leading(&self) -> bool {
        self.remaining().is_ok()
    }

    /// Whether something may begin whose write comes last: not once the process was asked to end, nor while the lease is
    /// in danger. What takes longer than the lease lasts costs what a crash would if the lease is lost meanwhile.
    #[must_use]
    pub fn may_begin(&self) -> bool {
        !self.shutdown.is_requested() && self.remaining().is_ok_and(|left| left >= SAFE_TO_BEGIN)
    }

    /// Completes when this process leads.
    pub async fn leading(&self) {
        let mut until = self.until.clone();
        while !self.is_leading() {
            if until.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Does `work` as long as this process leads. What the lease does not cover is dropped where it is: the clock is
    /// asked at each step, since a process that was stopped goes on before its timers do.
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

    /// Completes when this process does not lead.
    async fn lapsed(&self) {
        let mut until = self.until.clone();
        while let Ok(left) = self.remaining() {
            let changed = async {
                if until.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            // Either way the clock is asked again.
            let _ = tokio::time::timeout(left, changed).await;
        }
    }
}

/// What a candidate does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Take the lease: nobody holds it, or not any more.
    Acquire,
    /// Renew the lease: it is ours.
    Renew,
    /// Another holds it, so long at least.
    Wait(Duration),
}

/// A Lease as it was seen, and since when it is so, by [`now`].
#[derive(Clone, Debug, PartialEq)]
pub struct ObservedLease {
    /// Without a version: it was deleted. That frees nothing, since its holder may not have noticed.
    lease: Lease,
    since: Duration,
}

impl ObservedLease {
    /// What is known after `before`, now that `lease` was seen. A Lease that only got another label is not renewed.
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

    /// The Lease was deleted while `me`, whom it named, did not lead: another may hold what was made in its place, and we
    /// have not seen it. It counts like a lease of another that begins now.
    #[must_use]
    pub fn disowned(mut self, me: &str, now: Duration) -> Self {
        if !self.exists() && self.holder() == Some(me) {
            self.lease.spec.get_or_insert_default().holder_identity = Some("nobody that is known".to_owned());
            self.since = now;
        }
        self
    }

    /// Whether there is a Lease that can be replaced.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.lease.metadata.resource_version.is_some()
    }

    /// Who holds it.
    #[must_use]
    pub fn holder(&self) -> Option<&str> {
        let holder = self.lease.spec.as_ref()?.holder_identity.as_deref();
        holder.filter(|holder| !holder.is_empty())
    }

    /// For how long, as its holder wrote: that may be another version of us.
    fn term(&self) -> Duration {
        let told = self.lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds);
        let told = told.and_then(|seconds| u64::try_from(seconds).ok());
        told.map_or(TERM, Duration::from_secs).min(LONGEST_TERM)
    }

    /// The Lease once it is given back: the next may take it at once.
    #[must_use]
    pub fn released(&self) -> Lease {
        let mut lease = self.lease.clone();
        let spec = lease.spec.get_or_insert_default();
        // Not empty, which the API server refuses.
        spec.holder_identity = None;
        spec.acquire_time = None;
        spec.renew_time = None;
        lease
    }
}

/// What `me` does about the Lease, of which nothing was ever seen if it is none.
#[must_use]
pub fn evaluate(sight: Option<&ObservedLease>, me: &str, now: Duration) -> Step {
    let Some(sight) = sight else {
        return Step::Acquire;
    };
    match sight.holder() {
        None => Step::Acquire,
        Some(holder) if holder == me => Step::Renew,
        Some(_) => {
            let left = (sight.since + sight.term()).saturating_sub(now);
            if left.is_zero() {
                Step::Acquire
            } else {
                Step::Wait(left)
            }
        }
    }
}

/// The Lease as `me` writes it, over exactly what was seen. The times in it are for people: nobody of us reckons by them.
#[must_use]
pub fn claimed(sight: Option<&ObservedLease>, name: &str, me: &str, clock: Timestamp) -> Lease {
    let mut lease = sight.map(|sight| sight.lease.clone()).unwrap_or_default();
    lease.metadata.name = Some(name.to_owned());
    let renews = sight.and_then(ObservedLease::holder) == Some(me);
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
