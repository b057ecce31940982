//! The difference between the server's clock and the operator's, measured from the `Date` header of responses
//! (`docs/adr/0011-times-follow-the-servers-clock.md`).
//!
//! The server's clock decides whether an assertion is valid and whether a token or a key has expired. All times in the
//! domain, in records and in the status of a service user are therefore by the server's clock, as far as it is known.
//! `zitadel/http.rs` takes the samples, and `zitadel/client.rs` signs by the server's clock. The controller converts
//! times at the beginning and at the end of a reconcile (`gather.rs`, `act.rs`, `mint.rs` and `mod.rs` of
//! `controller/service_user`, and `controller/instance/mod.rs`). `controller/metrics/objects.rs` and the order of the
//! queue (`cli/run.rs`) also use the skew.

use std::time::Instant;

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::domain::reason::Reason;
use crate::domain::time::shifted;

/// A skew beyond this is reported and never used, neither to sign an assertion nor to check a token. Otherwise, a wrong
/// `Date` could lead to an assertion that becomes valid in the future, or make a valid token seem expired.
const FARTHEST: SignedDuration = SignedDuration::from_mins(5);

/// Maximum difference between two usable skews: each is at most [`FARTHEST`] from zero.
const FARTHEST_APART: SignedDuration = SignedDuration::from_mins(10);

/// `status.clockSkewSeconds` is rounded to a multiple of this, so that it does not change with every response.
const ROUNDED_TO: i64 = 5;

/// A smaller change of the estimate is measurement noise.
const NEWS: SignedDuration = SignedDuration::from_secs(1);

/// Bounds of the server's lead over the operator's clock, from one response.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    least: SignedDuration,
    most: SignedDuration,
}

impl Sample {
    /// Computes the bounds from the server's `Date`, which has whole seconds (RFC 9110 §6.6.1), and from when the
    /// request was `sent` and its response `received` by the operator's clock. Returns `None` if the operator's clock
    /// was set back in between.
    #[must_use]
    pub fn new(date: Timestamp, sent: Timestamp, received: Timestamp) -> Option<Self> {
        let sample = Self {
            least: date.duration_since(received),
            most: date.duration_since(sent).saturating_add(SignedDuration::from_secs(1)),
        };
        (sample.least <= sample.most).then_some(sample)
    }

    fn allows(self, skew: SignedDuration) -> bool {
        self.least <= skew && skew <= self.most
    }

    /// The intersection of both bounds, if there is one.
    fn and(self, other: Self) -> Option<Self> {
        let both = Self {
            least: self.least.max(other.least),
            most: self.most.min(other.most),
        };
        (both.least <= both.most).then_some(both)
    }
}

/// How far the server's clock is ahead of the operator's, negative if it is behind. It starts at zero and changes only
/// if two successive responses agree on another value, because a single `Date` proves nothing.
///
/// The status reports the measured value. Decisions use the last measured value within [`FARTHEST`], or zero.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Skew {
    measured: SignedDuration,
    usable: SignedDuration,
    /// Whether a response confirmed `measured` since the operator's own clock was last set.
    proven: bool,
    /// The last response, if it contradicts `measured`.
    contradiction: Option<Sample>,
}

impl Skew {
    /// Records a response.
    pub fn observe(&mut self, sample: Sample) {
        if sample.allows(self.measured) {
            self.proven = true;
            self.contradiction = None;
        } else if let Some(both) = self.contradiction.and_then(|last| last.and(sample)) {
            // The value nearest to zero that both allow: `Date` lacks fractions of a second, and those are not a skew.
            self.measured = SignedDuration::ZERO.clamp(both.least, both.most);
            self.proven = true;
            self.contradiction = None;
        } else {
            self.contradiction = Some(sample);
        }
        if self.check().is_ok() {
            self.usable = self.measured;
        }
    }

    /// The skew after the operator's own clock was set: the usable value, until a response confirms or corrects it.
    #[must_use]
    pub fn unproven(self) -> Self {
        Self {
            measured: self.usable,
            proven: false,
            contradiction: None,
            ..self
        }
    }

    /// Whether the last response contradicts the measured value, so that another response is needed.
    #[must_use]
    pub fn is_in_doubt(self) -> bool {
        self.contradiction.is_some()
    }

    /// The measured lead of the server's clock, without a bound. For users, not for decisions.
    #[must_use]
    pub fn measured(self) -> SignedDuration {
        self.measured
    }

    /// The lead of the server's clock that decisions use.
    #[must_use]
    pub fn usable(self) -> SignedDuration {
        self.usable
    }

    /// Converts a time of the operator's clock to the server's clock, with the usable skew.
    #[must_use]
    pub fn theirs(self, ours: Timestamp) -> Timestamp {
        shifted(ours, self.usable)
    }

    /// Like [`Self::theirs`], but `None` until a response has confirmed the skew. For actions that cannot be undone.
    #[must_use]
    pub fn certain(self, ours: Timestamp) -> Option<Timestamp> {
        let certain = self.proven && self.check().is_ok();
        certain.then(|| self.theirs(ours))
    }

    /// Whether the skew permits signing an assertion or treating a token as expired.
    pub fn check(self) -> Result<(), Reason> {
        if self.measured.abs() <= FARTHEST {
            Ok(())
        } else {
            Err(Reason::ClockSkew)
        }
    }

    /// The skew in seconds for `status`. `None` if it rounds to zero.
    #[must_use]
    pub fn rounded_seconds(self) -> Option<i64> {
        let seconds = self.measured.as_secs();
        let steps = seconds.saturating_add(seconds.signum() * (ROUNDED_TO / 2)) / ROUNDED_TO;
        (steps != 0).then(|| steps.saturating_mul(ROUNDED_TO))
    }
}

/// The operator's wall clock and monotonic clock at one moment.
pub type Reading = (Timestamp, Instant);

/// Whether the wall clock was set, or the machine was suspended, between two readings.
#[must_use]
pub fn was_set(before: Reading, after: Reading) -> bool {
    let passed = SignedDuration::try_from(after.1.duration_since(before.1)).unwrap_or(SignedDuration::MAX);
    is_news(passed, after.0.duration_since(before.0))
}

/// Whether `time` is not in the future, with a tolerance of `FARTHEST_APART`: `time` and `now` may have been computed
/// with different skews.
#[must_use]
pub fn is_past(time: Timestamp, now: Timestamp) -> bool {
    time <= shifted(now, FARTHEST_APART)
}

/// Whether the usable skew changed so much that times derived from it have to be computed again.
#[must_use]
pub fn is_news(before: SignedDuration, after: SignedDuration) -> bool {
    after.saturating_sub(before).abs() >= NEWS
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(second: f64) -> Timestamp {
        let since = SignedDuration::from_secs_f64(1_800_000_000.0 + second);
        Timestamp::from_duration(since).expect("in range")
    }

    /// The response of a server whose clock is `ahead` seconds ahead, to a request sent at `sent` that took `took`
    /// seconds.
    fn answered(ahead: f64, sent: f64, took: f64) -> Sample {
        let date = at((sent + took / 2.0 + ahead).floor());
        Sample::new(date, at(sent), at(sent + took)).expect("a sample")
    }

    proptest! {
        /// After two responses the error is at most one second plus the response time, wherever in a second they
        /// arrive. For a server with a correct clock, the skew stays zero.
        #[test]
        fn two_responses_determine_the_skew(
            ahead in -100_000_000.0_f64..100_000_000.0, right in any::<bool>(),
            first in 0.0_f64..1.0, second in 1.0_f64..5.0, took in 0.001_f64..2.0,
        ) {
            let ahead = if right { 0.0 } else { ahead };
            let mut skew = Skew::default();
            skew.observe(answered(ahead, first, took));
            prop_assert_eq!(skew.measured(), SignedDuration::ZERO);
            skew.observe(answered(ahead, second, took));
            let error = skew.measured().as_secs_f64() - ahead;
            prop_assert!(error.abs() <= 1.0 + took, "{error}");
            if right {
                prop_assert_eq!(skew.measured(), SignedDuration::ZERO);
            }
        }
    }

    #[test]
    fn only_two_agreeing_responses_change_the_skew() {
        let mut skew = Skew::default();
        let whole = |skew: Skew| skew.measured().as_secs();
        let steps = [
            // Responses alternate, so that no two successive ones agree on a new value.
            (40.0, 0, true),
            (0.0, 0, false),
            (40.0, 0, true),
            // Two successive responses disagree with the estimate and with each other.
            (80.0, 0, true),
            (80.0, 80, false),
            (80.5, 80, false),
            (-20.0, 80, true),
            (80.0, 80, false),
            (-20.0, 80, true),
            // Of the values that both responses allow, the one nearest to zero.
            (-20.0, -19, false),
        ];
        let mut now = 0.0;
        for (ahead, expected, in_doubt) in steps {
            now += 10.0;
            skew.observe(answered(ahead, now, 0.0));
            assert_eq!((whole(skew), skew.is_in_doubt()), (expected, in_doubt), "at {now}");
        }
        // The operator's clock was set back by an hour between request and response.
        assert_eq!(Sample::new(at(0.0), at(0.0), at(-3_600.0)), None);
    }

    /// `before` after two responses of a server whose clock is `ahead` seconds ahead.
    fn after_two(mut before: Skew, ahead: f64) -> Skew {
        for sent in [0.0, 10.0] {
            before.observe(answered(ahead, sent, 0.0));
        }
        before
    }

    #[test]
    fn skew_beyond_the_bound_is_reported_but_not_used() {
        let mut skew = Skew::default();
        let rows = [
            (40.0, Some(40.0)),
            (3.0e8, None),
            (-3.0e8, None),
            (302.0, None),
            (-20.0, Some(-19.0)),
            (-302.0, None),
            (0.0, Some(0.0)),
        ];
        let mut used = 0.0;
        for (ahead, certain) in rows {
            skew = after_two(skew, ahead);
            used = certain.unwrap_or(used);
            assert_eq!(
                (skew.theirs(at(0.0)), skew.certain(at(0.0))),
                (at(used), certain.map(at)),
                "{ahead}"
            );
            assert!((skew.measured().as_secs_f64() - ahead).abs() <= 1.0, "{ahead}");
        }
    }

    #[test]
    fn no_time_is_certain_before_the_first_response() {
        let mut skew = Skew::default();
        assert_eq!(skew.certain(at(0.0)), None);
        skew.observe(answered(0.0, 0.0, 0.0));
        assert_eq!(skew.certain(at(0.0)), Some(at(0.0)));
    }

    #[test]
    fn skew_must_be_confirmed_after_the_own_clock_was_set() {
        for before in [40.0, 3.0e8] {
            let known = after_two(after_two(Skew::default(), 40.0), before).unproven();
            assert_eq!((known.theirs(at(0.0)), known.certain(at(0.0))), (at(40.0), None));
            assert_eq!(known.check(), Ok(()));
            assert_eq!(after_two(known, 40.0).certain(at(0.0)), Some(at(40.0)));
            assert_eq!(after_two(known, -3.0e8).check(), Err(Reason::ClockSkew));
        }
    }

    #[test]
    fn skew_of_more_than_five_minutes_is_refused() {
        let skew = |ahead| after_two(Skew::default(), ahead);
        let table = [
            (0.0, Ok(()), None),
            (2.0, Ok(()), None),
            (-44.0, Ok(()), Some(-45)),
            (299.0, Ok(()), Some(300)),
            (-299.0, Ok(()), Some(-300)),
            (302.0, Err(Reason::ClockSkew), Some(300)),
            (-302.0, Err(Reason::ClockSkew), Some(-300)),
            (3.0e9, Err(Reason::ClockSkew), Some(3_000_000_000)),
        ];
        for (ahead, allowed, shown) in table {
            let skew = skew(ahead);
            assert_eq!((skew.check(), skew.rounded_seconds()), (allowed, shown), "{ahead}");
        }
        assert_eq!(skew(1e11).theirs(Timestamp::MAX), Timestamp::MAX);
    }
}
