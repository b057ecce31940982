//! The server's clock beside ours, measured from the `Date` of its answers (design §3.8).
//!
//! Whether an assertion is valid, a token expired or a key at its end is decided by the server's clock. So every time
//! that the domain handles, and every time in a record or a status, is by that clock as far as it is known; where a
//! pass begins and ends, the controller translates.

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::domain::reason::Reason;

/// A clock farther away than this is not followed, and nothing is signed: with a `Date` that lies, an assertion would
/// become valid some time in the future (design §3.8).
const FARTHEST: SignedDuration = SignedDuration::from_mins(5);

/// `status.clockSkew` is rounded to this, so that it does not change with every answer.
const ROUNDED_TO: i64 = 5;

/// A change of the estimate by less comes of measuring.
const NEWS: SignedDuration = SignedDuration::from_secs(1);

/// By how much the server's clock may be ahead of ours, from one answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    least: SignedDuration,
    most: SignedDuration,
}

impl Sample {
    /// From an answer dated `date` by the server, in whole seconds (RFC 9110 §6.6.1), to a request that was `sent` and
    /// whose answer was `received` by our clock. None if our clock was set back meanwhile.
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

    /// What both allow, if they agree.
    fn and(self, other: Self) -> Option<Self> {
        let both = Self {
            least: self.least.max(other.least),
            most: self.most.min(other.most),
        };
        (both.least <= both.most).then_some(both)
    }
}

/// How far the server's clock is ahead of ours, negative if it is behind. Taken to be nothing until two answers agree
/// that it is something, and kept until two agree that it is something else: a single `Date` proves nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Skew {
    estimate: SignedDuration,
    /// The last answer, if it contradicts the estimate.
    contradiction: Option<Sample>,
}

impl Skew {
    /// Takes an answer into account.
    pub fn observe(&mut self, sample: Sample) {
        if sample.allows(self.estimate) {
            self.contradiction = None;
        } else if let Some(both) = self.contradiction.and_then(|last| last.and(sample)) {
            // The smallest that both allow: a second's fraction that `Date` does not tell is no skew.
            self.estimate = SignedDuration::ZERO.clamp(both.least, both.most);
            self.contradiction = None;
        } else {
            self.contradiction = Some(sample);
        }
    }

    /// The last answer contradicts the estimate: another one will tell.
    #[must_use]
    pub fn is_in_doubt(self) -> bool {
        self.contradiction.is_some()
    }

    /// How far the server's clock is ahead.
    #[must_use]
    pub fn estimate(self) -> SignedDuration {
        self.estimate
    }

    /// The moment `ours` by the server's clock.
    #[must_use]
    pub fn theirs(self, ours: Timestamp) -> Timestamp {
        shifted(ours, self.estimate)
    }

    /// Whether anything may be signed.
    pub fn check(self) -> Result<(), Reason> {
        if self.estimate.abs() <= FARTHEST {
            Ok(())
        } else {
            Err(Reason::ClockSkew)
        }
    }

    /// As shown in `status`, such as `-45s`; none below half of the rounding.
    #[must_use]
    pub fn rounded(self) -> Option<String> {
        let seconds = self.estimate.as_secs();
        let steps = seconds.saturating_add(seconds.signum() * (ROUNDED_TO / 2)) / ROUNDED_TO;
        (steps != 0).then(|| format!("{}s", steps * ROUNDED_TO))
    }
}

/// Whether an estimate changed so much that what was reckoned by it has to be reckoned again.
#[must_use]
pub fn is_news(before: SignedDuration, after: SignedDuration) -> bool {
    after.saturating_sub(before).abs() >= NEWS
}

/// `time`, this much later. Stays in range: a record or a `Date` may claim any time.
#[must_use]
pub fn shifted(time: Timestamp, by: SignedDuration) -> Timestamp {
    // Only a span with days or more, which a duration is not, is an error.
    time.saturating_add(by).unwrap_or(time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(second: f64) -> Timestamp {
        let since = SignedDuration::from_secs_f64(1_800_000_000.0 + second);
        Timestamp::from_duration(since).expect("in range")
    }

    /// An answer of a server that is `ahead` seconds ahead, to a request that was sent at `sent` and took `took`.
    fn answered(ahead: f64, sent: f64, took: f64) -> Sample {
        let date = at((sent + took / 2.0 + ahead).floor());
        Sample::new(date, at(sent), at(sent + took)).expect("time goes on")
    }

    proptest! {
        /// However slow the answers are and wherever in a second they come: once two have come, the truth is within
        /// what they allow, and a server whose clock is right is never corrected.
        #[test]
        fn two_answers_tell_the_skew(
            ahead in -100_000_000.0_f64..100_000_000.0, right in any::<bool>(),
            first in 0.0_f64..1.0, second in 1.0_f64..5.0, took in 0.001_f64..2.0,
        ) {
            let ahead = if right { 0.0 } else { ahead };
            let mut skew = Skew::default();
            skew.observe(answered(ahead, first, took));
            prop_assert_eq!(skew.estimate(), SignedDuration::ZERO);
            skew.observe(answered(ahead, second, took));
            let error = skew.estimate().as_secs_f64() - ahead;
            prop_assert!(error.abs() <= 1.0 + took, "{error}");
            if right {
                prop_assert_eq!(skew, Skew::default());
            }
        }
    }

    #[test]
    fn one_answer_proves_nothing_and_what_two_said_stays() {
        let mut skew = Skew::default();
        let whole = |skew: Skew| skew.estimate().as_secs();
        let steps = [
            // A lie between two truths.
            (40.0, 0, true),
            (0.0, 0, false),
            (40.0, 0, true),
            // Two lies that do not agree.
            (80.0, 0, true),
            (80.0, 80, false),
            (80.5, 80, false),
            (-20.0, 80, true),
            (80.0, 80, false),
            (-20.0, 80, true),
            // Of what both allow, the nearest to none.
            (-20.0, -19, false),
        ];
        let mut now = 0.0;
        for (ahead, expected, in_doubt) in steps {
            now += 10.0;
            skew.observe(answered(ahead, now, 0.0));
            assert_eq!((whole(skew), skew.is_in_doubt()), (expected, in_doubt), "at {now}");
        }
        // Our clock was set back by an hour between question and answer.
        assert_eq!(Sample::new(at(0.0), at(0.0), at(-3_600.0)), None);
    }

    #[test]
    fn a_clock_more_than_five_minutes_away_is_not_followed() {
        let skew = |ahead| {
            let mut skew = Skew::default();
            skew.observe(answered(ahead, 0.0, 0.0));
            skew.observe(answered(ahead, 10.0, 0.0));
            skew
        };
        let table = [
            (0.0, Ok(()), None),
            (2.0, Ok(()), None),
            (-44.0, Ok(()), Some("-45s")),
            (299.0, Ok(()), Some("300s")),
            (-299.0, Ok(()), Some("-300s")),
            (302.0, Err(Reason::ClockSkew), Some("300s")),
            (-302.0, Err(Reason::ClockSkew), Some("-300s")),
            (3.0e9, Err(Reason::ClockSkew), Some("3000000000s")),
        ];
        for (ahead, allowed, shown) in table {
            let skew = skew(ahead);
            assert_eq!((skew.check(), skew.rounded().as_deref()), (allowed, shown), "{ahead}");
        }
        assert_eq!(skew(1e11).theirs(Timestamp::MAX), Timestamp::MAX);
    }
}
