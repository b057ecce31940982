//! How long something that failed is held back, from how it failed and how it did before.

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::domain::reason::{Reason, Subject};
use crate::domain::retry::{Failed, PendingRetry};
use crate::domain::schedule::backoff;
use crate::domain::time::shifted;

/// `Retry-After` is believed up to this.
pub const LONGEST_RETRY_AFTER: SignedDuration = SignedDuration::from_mins(15);

/// A back-off that runs, and what the next one must know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// Failures in a row.
    pub failures: u32,
    /// What failed, and until when it is not tried.
    pub hold: PendingRetry,
    /// The server asked not to come back before (`Retry-After`).
    asked: Option<Timestamp>,
    /// It is tried before the back-off has run, since a good token is about to expire.
    cut_short: bool,
    /// It was not tried, because the circuit breaker refused it.
    refused: bool,
}

/// What works again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Recovery {
    /// The circuit breaker closed.
    Breaker,
    /// The instance became Ready.
    Instance,
}

impl Backoff {
    /// Longer with each failure; as long as before if it was not tried. `seed` spreads what failed together.
    #[must_use]
    pub fn after(failed: &Failed, last: Option<&Self>, seed: &str, now: Timestamp) -> Self {
        let reason = failed.reason;
        // A token that is still good must not expire meanwhile.
        let until = |at: Timestamp| failed.not_after.map_or(at, |not_after| at.min(not_after));
        match (last, failed.not_before) {
            (Some(last), None) if failed.deferred => *last,
            // Nobody was asked, so that it does not count (design §3.5).
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
                // The many tries before an expiry are not held against the object after it.
                let failures = last.map_or(1, |last| last.failures.saturating_add(u32::from(!last.cut_short)));
                let patient = shifted(now, backoff(reason.retry(), failures, seed));
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

    /// What a change of the object leaves of it: the time that the server asked for, else whoever edits in a loop would
    /// ask again each time. Our own clock may have been set since: no server is believed to ask for more from now on.
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

    /// What a recovery leaves of it. What the breaker refused is tried now. What failed by itself keeps its back-off,
    /// unless the instance was the cause: else each recovery would bring back all who fail through their own fault.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_secs(second)
    }

    #[test]
    fn whoever_was_not_asked_waits_no_longer_than_a_good_token_lasts() {
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
    fn a_change_leaves_what_the_server_asked_for_and_nothing_of_what_we_chose() {
        let after = |not_before: Option<i64>, times: usize| {
            let failed = Failed {
                not_before: not_before.map(at),
                ..Failed::now("t", Reason::ServerError)
            };
            let once = |last: Option<Backoff>| Some(Backoff::after(&failed, last.as_ref(), "", at(0)));
            (0..times).fold(None, |last, _| once(last)).expect("one")
        };
        // A server that asks for a second each time, until our own back-off is far longer.
        let long = after(Some(1), 12);
        assert!(long.hold.until > at(60));
        let left = long.anew(at(0)).expect("the second");
        assert_eq!((left.hold.until, left.failures), (at(1), 0));
        assert_eq!(after(Some(900), 1).anew(at(0)).map(|b| b.hold.until), Some(at(900)));
        assert_eq!(after(None, 5).anew(at(0)), None);
        // Our own clock was years ahead when the server asked.
        let left = after(Some(1_000_000), 1).anew(at(0)).expect("the server asked");
        assert_eq!(left.hold.until, at(900));
    }
}
