//! How long something that failed is held back, from how it failed and how it did before.

use k8s_openapi::jiff::Timestamp;

use crate::domain::facts::Hold;
use crate::domain::report::Failed;
use crate::domain::schedule::backoff;

/// A back-off that runs, and what the next one must know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// Failures in a row.
    pub failures: u32,
    /// What failed, and until when it is not tried.
    pub hold: Hold,
    /// The server asked for it (`Retry-After`), so that no edit of the object ends it: else whoever edits in a loop would
    /// ask again each time.
    pub asked: bool,
    /// It is tried before the back-off has run, since a good token is about to expire.
    cut_short: bool,
}

impl Backoff {
    /// Longer with each failure; as long as before if it was not tried. `seed` spreads what failed together.
    #[must_use]
    pub fn after(failed: &Failed, last: Option<&Self>, seed: &str, now: Timestamp) -> Self {
        let reason = failed.reason;
        match (last, failed.not_before) {
            (Some(last), None) if failed.held_back => *last,
            // Nobody was asked, so that it does not count (design §3.5).
            (last, not_before) if failed.held_back => Self {
                failures: last.map_or(0, |last| last.failures),
                hold: Hold {
                    reason,
                    until: not_before.unwrap_or(now),
                },
                asked: false,
                cut_short: true,
            },
            (last, not_before) => {
                // The many tries before an expiry are not held against the object after it.
                let failures = last.map_or(1, |last| last.failures.saturating_add(u32::from(!last.cut_short)));
                let patient = now + backoff(reason.retry(), failures, seed);
                let until = failed.not_after.map_or(patient, |not_after| patient.min(not_after));
                let until = not_before.map_or(until, |not_before| until.max(not_before));
                Self {
                    failures,
                    hold: Hold { reason, until },
                    asked: not_before.is_some(),
                    cut_short: until < patient,
                }
            }
        }
    }
}
