//! The server's clock beside ours, measured from the `Date` of its answers (design §3.8).
//!
//! Whether an assertion is valid, a token expired or a key at its end is decided by the server's clock. So every time
//! that the domain handles, and every time in a record or a status, is by that clock as far as it is known; where a
//! pass begins and ends, the controller translates.

use std::time::Instant;

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::domain::reason::Reason;
use crate::domain::time::shifted;

/// A skew beyond this is told and never used: neither to sign nor to judge a token. With a `Date` that lies, an
/// assertion would become valid some time in the future, and a valid token would seem expired.
const FARTHEST: SignedDuration = SignedDuration::from_mins(5);

/// Two clocks that were used one after the other are at most this far apart.
const FARTHEST_APART: SignedDuration = SignedDuration::from_mins(10);

/// `status.clockSkewSeconds` is rounded to this, so that it does not change with every answer.
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
///
/// What was measured is told to users. What is used is the last that was measured within [`FARTHEST`], or nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Skew {
    measured: SignedDuration,
    usable: SignedDuration,
    /// Whether answers confirmed `measured` since our own clock was last set.
    proven: bool,
    /// The last answer, if it contradicts what was measured.
    contradiction: Option<Sample>,
}

impl Skew {
    /// Takes an answer into account.
    pub fn observe(&mut self, sample: Sample) {
        if sample.allows(self.measured) {
            self.proven = true;
            self.contradiction = None;
        } else if let Some(both) = self.contradiction.and_then(|last| last.and(sample)) {
            // The smallest that both allow: a second's fraction that `Date` does not tell is no skew.
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

    /// What is left of it after our own clock was set: the usable skew until the server confirms or corrects it.
    #[must_use]
    pub fn unproven(self) -> Self {
        Self {
            measured: self.usable,
            proven: false,
            contradiction: None,
            ..self
        }
    }

    /// The last answer contradicts what was measured: another one will tell.
    #[must_use]
    pub fn is_in_doubt(self) -> bool {
        self.contradiction.is_some()
    }

    /// How far the server's clock is ahead by its answers, however far that is. For people, not for decisions.
    #[must_use]
    pub fn measured(self) -> SignedDuration {
        self.measured
    }

    /// How far the server's clock is taken to be ahead.
    #[must_use]
    pub fn usable(self) -> SignedDuration {
        self.usable
    }

    /// The moment `ours` by the server's clock, as far as it is usable.
    #[must_use]
    pub fn theirs(self, ours: Timestamp) -> Timestamp {
        shifted(ours, self.usable)
    }

    /// The moment `ours` by the server's clock, once answers have confirmed it: for what cannot be taken back.
    #[must_use]
    pub fn certain(self, ours: Timestamp) -> Option<Timestamp> {
        let certain = self.proven && self.check().is_ok();
        certain.then(|| self.theirs(ours))
    }

    /// Whether anything may be signed, or said to have expired.
    pub fn check(self) -> Result<(), Reason> {
        if self.measured.abs() <= FARTHEST {
            Ok(())
        } else {
            Err(Reason::ClockSkew)
        }
    }

    /// The skew in seconds as shown in `status`; none below half of the rounding.
    #[must_use]
    pub fn rounded_seconds(self) -> Option<i64> {
        let seconds = self.measured.as_secs();
        let steps = seconds.saturating_add(seconds.signum() * (ROUNDED_TO / 2)) / ROUNDED_TO;
        (steps != 0).then(|| steps.saturating_mul(ROUNDED_TO))
    }
}

/// Our own clocks at one moment: the wall clock and a monotonic one.
pub type Reading = (Timestamp, Instant);

/// Whether the wall clock was set between two readings, or the machine slept.
#[must_use]
pub fn was_set(before: Reading, after: Reading) -> bool {
    let passed = SignedDuration::try_from(after.1.duration_since(before.1)).unwrap_or(SignedDuration::MAX);
    is_news(passed, after.0.duration_since(before.0))
}

/// Whether `time`, at which something happened, is not in the future of `now`, as far as clocks that were used can say.
#[must_use]
pub fn is_past(time: Timestamp, now: Timestamp) -> bool {
    time <= shifted(now, FARTHEST_APART)
}

/// Whether a usable skew changed so much that what was reckoned by it has to be reckoned again.
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
    fn one_answer_proves_nothing_and_what_two_said_stays() {
        let mut skew = Skew::default();
        let whole = |skew: Skew| skew.measured().as_secs();
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

    /// What two answers say after whatever was known before.
    fn told(mut before: Skew, ahead: f64) -> Skew {
        for sent in [0.0, 10.0] {
            before.observe(answered(ahead, sent, 0.0));
        }
        before
    }

    #[test]
    fn a_skew_beyond_the_bound_is_told_and_the_last_one_within_it_is_used() {
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
            skew = told(skew, ahead);
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
    fn no_time_is_certain_before_an_answer() {
        let mut skew = Skew::default();
        assert_eq!(skew.certain(at(0.0)), None);
        skew.observe(answered(0.0, 0.0, 0.0));
        assert_eq!(skew.certain(at(0.0)), Some(at(0.0)));
    }

    #[test]
    fn what_was_known_when_our_own_clock_was_set_has_to_be_confirmed() {
        for before in [40.0, 3.0e8] {
            let known = told(told(Skew::default(), 40.0), before).unproven();
            assert_eq!((known.theirs(at(0.0)), known.certain(at(0.0))), (at(40.0), None));
            assert_eq!(known.check(), Ok(()));
            assert_eq!(told(known, 40.0).certain(at(0.0)), Some(at(40.0)));
            assert_eq!(told(known, -3.0e8).check(), Err(Reason::ClockSkew));
        }
    }

    #[test]
    fn a_clock_more_than_five_minutes_away_is_not_followed() {
        let skew = |ahead| told(Skew::default(), ahead);
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
