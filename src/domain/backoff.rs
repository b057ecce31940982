//! The backoff after a failure, such as a 429 with its `Retry-After`, computed from the failure and the previous backoff.
//! `failure.rs` finds the reason of a failure, and `circuit_breaker.rs` decides what it means for other users of the host.

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::domain::hash;
use crate::domain::reason::{Reason, Subject};
use crate::domain::retry::{Failed, PendingRetry, Retry};
use crate::domain::time::shifted;

/// Maximum delay that the operator accepts from `Retry-After`.
pub const LONGEST_RETRY_AFTER: SignedDuration = SignedDuration::from_mins(15);

/// A running backoff, with the state that the next one depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// Number of consecutive failures.
    pub failures: u32,
    /// The failure, and when the operator retries.
    pub hold: PendingRetry,
    /// The `Retry-After` deadline of the server.
    asked: Option<Timestamp>,
    /// The next attempt is earlier than the full backoff. The next failure therefore does not increase `failures`.
    cut_short: bool,
    /// Not attempted, because the circuit breaker refused it.
    refused: bool,
}

/// The dependency that recovered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Recovery {
    /// The key that the object waits for was generated.
    Key,
    /// The circuit breaker closed.
    Breaker,
    /// The instance became Ready.
    Instance,
}

impl Backoff {
    /// The backoff after `failed`. It grows with each failure and does not change while the attempt is deferred. `seed`
    /// spreads objects that failed together.
    #[must_use]
    pub fn after(failed: &Failed, last: Option<&Self>, seed: &str, now: Timestamp) -> Self {
        let reason = failed.reason;
        // The backoff must not outlast a token that is still valid.
        let until = |at: Timestamp| failed.not_after.map_or(at, |not_after| at.min(not_after));
        match (last, failed.not_before) {
            (Some(last), None) if failed.deferred => *last,
            // No request was sent, so this is not a failure (docs/adr/0012-circuit-breaker-evidence.md).
            (last, not_before) if failed.deferred => Self {
                failures: last.map_or(0, |last| last.failures),
                hold: PendingRetry {
                    reason,
                    until: until(not_before.unwrap_or(now)),
                    is_retry: last.is_some_and(|last| last.failures > 0),
                },
                asked: None,
                cut_short: true,
                refused: reason != Reason::RequestsThrottled,
            },
            (last, not_before) => {
                // Retries that were brought forward to beat an expiry do not lengthen the backoff after it.
                let failures = last.map_or(1, |last| last.failures.saturating_add(u32::from(!last.cut_short)));
                let patient = shifted(now, delay(reason.retry(), failures, seed));
                let until = until(patient);
                let until = not_before.map_or(until, |not_before| until.max(not_before));
                Self {
                    failures,
                    hold: PendingRetry {
                        reason,
                        until,
                        is_retry: true,
                    },
                    asked: not_before,
                    cut_short: until < patient,
                    refused: false,
                }
            }
        }
    }

    /// The part of the backoff that a change of the object leaves: the server's `Retry-After` deadline. Otherwise,
    /// edits in a loop would send a request each time. The deadline is at most [`LONGEST_RETRY_AFTER`] from now,
    /// because the operator's own clock may have been set meanwhile.
    #[must_use]
    pub fn anew(self, now: Timestamp) -> Option<Self> {
        let until = self.asked?.min(shifted(now, LONGEST_RETRY_AFTER));
        Some(Self {
            failures: 0,
            hold: PendingRetry {
                until,
                is_retry: false,
                ..self.hold
            },
            asked: Some(until),
            cut_short: false,
            refused: false,
        })
    }

    /// The part of the backoff that a recovery leaves. Attempts that the circuit breaker refused are retried now.
    /// Objects that failed keep their backoff, unless the instance was the cause. Otherwise, each recovery would retry
    /// every object that fails for its own reasons.
    #[must_use]
    pub fn after_recovery(self, recovery: Recovery, now: Timestamp) -> Option<Self> {
        if recovery == Recovery::Instance && self.hold.reason.subject() == Subject::Instance {
            return self.anew(now);
        }
        let until = if self.refused { now } else { self.hold.until };
        Some(Self {
            hold: PendingRetry { until, ..self.hold },
            ..self
        })
    }
}

/// Number of early retries, after 1 s, 2 s and 4 s. A change in ZITADEL took up to 750 ms to take effect, measured on
/// one server in a burst.
const EARLY_RETRIES: u32 = 3;

/// The backoff after `failures` consecutive failures: it starts at one second and doubles up to the limit of `retry`,
/// or is about ten minutes, or six hours, for failures that only a change can fix. `seed` spreads objects that failed together.
fn delay(retry: Retry, failures: u32, seed: &str) -> SignedDuration {
    let base = match retry {
        Retry::No => return SignedDuration::ZERO,
        Retry::Eventual if failures <= EARLY_RETRIES => growing(failures),
        Retry::Permanent | Retry::Eventual => SignedDuration::from_mins(10),
        Retry::Rare => SignedDuration::from_hours(6),
        Retry::Transient => growing(failures).min(SignedDuration::from_mins(5)),
        Retry::Soon => growing(failures).min(SignedDuration::from_secs(10)),
    };
    let jitter = 0.8 + 0.4 * hash::fraction(&format!("{seed}/{failures}"));
    SignedDuration::try_from_secs_f64(base.as_secs_f64() * jitter).unwrap_or(SignedDuration::ZERO)
}

/// One second, doubled with each further failure.
fn growing(failures: u32) -> SignedDuration {
    SignedDuration::from_secs(1_i64 << failures.saturating_sub(1).min(9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_grows_to_five_minutes_and_spreads() {
        let wait = |retry, n| delay(retry, n, "shop/billing").as_secs_f64();
        for (failures, base) in [(1, 1.0), (2, 2.0), (3, 4.0), (9, 256.0), (10, 300.0), (u32::MAX, 300.0)] {
            let got = wait(Retry::Transient, failures);
            assert!(got >= 0.8 * base && got <= 1.2 * base, "{failures}: {got}");
        }
        assert!(wait(Retry::Permanent, 1) >= 480.0 && wait(Retry::Rare, 1) >= 17_280.0);
        for (failures, most) in [(1, 1.2), (2, 2.4), (3, 4.8)] {
            assert!(wait(Retry::Eventual, failures) <= most, "{failures}");
        }
        assert!(wait(Retry::Eventual, 4) >= 480.0);
        assert!(wait(Retry::Soon, 1) <= 1.2 && (8.0..=12.0).contains(&wait(Retry::Soon, 99)));
        assert_ne!(delay(Retry::Transient, 5, "a"), delay(Retry::Transient, 5, "b"));
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_secs(second)
    }

    #[test]
    fn deferred_attempt_does_not_outlast_a_valid_token() {
        for (not_before, not_after, until) in [(300, None, 300), (300, Some(40), 40), (30, Some(40), 30)] {
            let failed = Failed {
                not_before: Some(at(not_before)),
                not_after: not_after.map(at),
                deferred: true,
                ..Failed::now("t", Reason::InstanceUnreachable)
            };
            assert_eq!(Backoff::after(&failed, None, "", at(0)).hold.until, at(until));
        }
    }

    #[test]
    fn change_clears_the_backoff_but_not_retry_after() {
        let after = |not_before: Option<i64>, times: usize| {
            let failed = Failed {
                not_before: not_before.map(at),
                ..Failed::now("t", Reason::ServerError)
            };
            let once = |last: Option<Backoff>| Some(Backoff::after(&failed, last.as_ref(), "", at(0)));
            (0..times).fold(None, |last, _| once(last)).expect("a failure")
        };
        // The server sends `Retry-After: 1` each time, and the operator's own backoff grows far beyond it.
        let long = after(Some(1), 12);
        assert!(long.hold.until > at(60));
        let left = long.anew(at(0)).expect("Retry-After remains");
        assert_eq!((left.hold.until, left.failures), (at(1), 0));
        assert_eq!(after(Some(900), 1).anew(at(0)).map(|b| b.hold.until), Some(at(900)));
        assert_eq!(after(None, 5).anew(at(0)), None);
        // The operator's own clock was far ahead when the server sent `Retry-After`.
        let left = after(Some(1_000_000), 1).anew(at(0)).expect("Retry-After remains");
        assert_eq!(left.hold.until, at(900));
    }
}
