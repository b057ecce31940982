//! The refresh time of a token: a pure function of its lifetime, the spec and a jitter that is the same after a restart
//! (`docs/adr/0010-refresh-schedule-with-stable-jitter.md`).

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::domain::clock_skew::is_past;
use crate::domain::hash;
use crate::domain::time::shifted;

/// Minimum lifetime. A shorter token cannot be kept fresh, because request, write and mount take seconds.
pub const SHORTEST_LIFETIME: SignedDuration = SignedDuration::from_secs(5);

/// Maximum lifetime. The operator does not rely on a longer one. ZITADEL's default is 12 hours.
pub const LONGEST_LIFETIME: SignedDuration = SignedDuration::from_hours(31 * 24);

/// Minimum time between issue and refresh, whatever the spec says.
const SHORTEST_WAIT: SignedDuration = SignedDuration::from_secs(2);

/// Minimum time between refresh and expiry, whatever the spec says.
const SHORTEST_MARGIN: SignedDuration = SignedDuration::from_secs(2);

/// When the spec asks for the refresh of a token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum RefreshAt {
    /// At two thirds of the lifetime, as cert-manager does.
    #[default]
    Default,
    /// This long before expiry.
    Before(SignedDuration),
    /// This percentage of the lifetime before expiry.
    Percentage(i32),
}

/// The times of a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Start of the lifetime.
    pub issued: Timestamp,
    /// When the token is due for a refresh.
    pub renew: Timestamp,
    /// When the token expires.
    pub expires: Timestamp,
    /// The time in the spec does not fit the lifetime, so the nearest permitted time was used.
    pub clamped: bool,
}

impl Schedule {
    /// Computes the refresh time. `seed` (object UID and token name) selects a jitter of up to 10 % of the lifetime,
    /// only toward an earlier time, so that tokens issued together do not come due together. The result is clamped: not
    /// before 20 % of the lifetime and 2 s after issue, and not in the last 5 % or the last 2 s, which request and
    /// write may take (`docs/adr/0010-refresh-schedule-with-stable-jitter.md`).
    #[must_use]
    pub fn new(issued: Timestamp, expires: Timestamp, refresh_at: RefreshAt, seed: &str) -> Self {
        let expires = expires.min(shifted(issued, LONGEST_LIFETIME));
        let lifetime = expires.duration_since(issued).max(SignedDuration::ZERO);
        let wanted = match refresh_at {
            RefreshAt::Default => lifetime / 3,
            RefreshAt::Before(before) => before,
            RefreshAt::Percentage(percent) => scale(lifetime, f64::from(percent.clamp(1, 99)) / 100.0),
        };
        // A margin that is not shorter than the lifetime is ignored: each reconcile would request a token
        // (docs/adr/0010-refresh-schedule-with-stable-jitter.md).
        let fitting = if wanted < lifetime { wanted } else { lifetime / 3 };
        let margin = fitting.max(scale(lifetime, 0.05)).max(SHORTEST_MARGIN);
        let jitter = scale(lifetime, 0.10 * hash::fraction(seed));
        let earliest = shifted(issued, scale(lifetime, 0.20).max(SHORTEST_WAIT));
        let on_time = shifted(expires, -margin);
        Self {
            issued,
            renew: shifted(on_time, -jitter).max(earliest).min(expires),
            expires,
            clamped: refresh_at != RefreshAt::Default && (margin != wanted || on_time < earliest),
        }
    }

    /// Whether the token is valid at `now`. A token with an issue time in the future is not, whatever the record says.
    #[must_use]
    pub fn is_valid(self, now: Timestamp) -> bool {
        is_past(self.issued, now) && self.expires > now
    }

    /// Whether the token is valid and not yet due.
    #[must_use]
    pub fn is_fresh(self, now: Timestamp) -> bool {
        self.is_valid(now) && self.renew > now
    }
}

fn scale(duration: SignedDuration, factor: f64) -> SignedDuration {
    SignedDuration::try_from_secs_f64(duration.as_secs_f64() * factor).unwrap_or(SignedDuration::ZERO)
}

/// Parses a duration of the spec, such as `1h30m`. It accepts what the pattern in the schema accepts, and agrees with
/// CEL's `duration()`. jiff's own parser requires the units in descending order.
#[must_use]
pub fn duration(text: &str) -> Option<SignedDuration> {
    const UNITS: [(&str, i64); 4] = [
        ("ms", 1_000_000),
        ("s", 1_000_000_000),
        ("m", 60_000_000_000),
        ("h", 3_600_000_000_000),
    ];
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let mut rest = text;
    let mut nanoseconds = 0_i64;
    while !rest.is_empty() {
        let (whole, after) = rest.split_at(digits(rest));
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => after.split_at(digits(after)),
            None => ("0", after),
        };
        let (unit, nanoseconds_each) = UNITS.iter().find(|(unit, _)| after.starts_with(unit))?;
        let whole = whole.parse::<i64>().ok()?.checked_mul(*nanoseconds_each)?;
        // Nine digits give nanoseconds for the unit `s`. The error in larger units is negligible.
        let fraction = fraction.get(..9).unwrap_or(fraction);
        let scale = 10_i128.pow(u32::try_from(fraction.len()).ok()?);
        let part = i128::from(fraction.parse::<i64>().ok()?) * i128::from(*nanoseconds_each) / scale;
        nanoseconds = nanoseconds.checked_add(whole)?.checked_add(i64::try_from(part).ok()?)?;
        rest = &after[unit.len()..];
    }
    (!text.is_empty()).then(|| SignedDuration::from_nanos(nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lifetime_third(seconds: i64) -> f64 {
        (SignedDuration::from_secs(seconds) / 3).as_secs_f64()
    }

    proptest! {
        #[test]
        fn refresh_is_after_a_fifth_of_the_lifetime_and_before_expiry(
            issued in 1_700_000_000_i64..1_900_000_000,
            lifetime in 5_i64..2_678_400,
            before in 0_i64..3_000_000,
            kind in 0..3,
            percent in -5..200,
            seed in "[a-z]{0,8}",
        ) {
            let issued = Timestamp::from_second(issued).expect("in range");
            let expires = issued + SignedDuration::from_secs(lifetime);
            let refresh_at = match kind {
                0 => RefreshAt::Default,
                1 => RefreshAt::Before(SignedDuration::from_secs(before)),
                _ => RefreshAt::Percentage(percent),
            };
            let s = Schedule::new(issued, expires, refresh_at, &seed);
            prop_assert!(s.renew <= expires);
            prop_assert!(s.renew >= issued + SignedDuration::from_secs(2).min(SignedDuration::from_secs(lifetime)));
            prop_assert!(s.renew.duration_since(issued).as_secs_f64() >= 0.2 * SignedDuration::from_secs(lifetime).as_secs_f64() - 1e-6);
            let lifetime = SignedDuration::from_secs(lifetime);
            let margin = expires.duration_since(s.renew).as_secs_f64();
            prop_assert!(s.renew == s.issued + SHORTEST_WAIT || margin >= 0.05 * lifetime.as_secs_f64() - 1e-6, "{margin}");
            prop_assert_eq!(s, Schedule::new(issued, expires, refresh_at, &seed));
        }

        /// A token with a longer lifetime is not refreshed earlier, and a token with a larger margin is not refreshed
        /// later.
        #[test]
        fn longer_lifetime_or_smaller_margin_never_refreshes_earlier(
            lifetime in 5_i64..2_678_400,
            longer in 0_i64..2_678_400,
            percent in 1..99,
            margin in 0..98,
            seed in "[a-z]{0,8}",
        ) {
            let renew = |lifetime, refresh_at| {
                let expires = Timestamp::UNIX_EPOCH + SignedDuration::from_secs(lifetime);
                Schedule::new(Timestamp::UNIX_EPOCH, expires, refresh_at, &seed).renew
            };
            for refresh_at in [RefreshAt::Default, RefreshAt::Percentage(percent)] {
                prop_assert!(renew(lifetime, refresh_at) <= renew(lifetime + longer, refresh_at));
            }
            // A fixed margin is compared only among lifetimes that it fits, because it is ignored otherwise.
            let before = RefreshAt::Before(SignedDuration::from_secs(lifetime * i64::from(margin) / 100));
            prop_assert!(renew(lifetime, before) <= renew(lifetime + longer, before));
            let smaller = RefreshAt::Percentage(percent.min(margin).max(1));
            prop_assert!(renew(lifetime, RefreshAt::Percentage(percent)) <= renew(lifetime, smaller));
        }

        /// Tokens that were issued together come due over a tenth of their lifetime. Each tenth of that span has some.
        #[test]
        fn jitter_spreads_over_a_tenth_of_the_lifetime(lifetime in 3_600_i64..2_678_400, prefix in "[a-f0-9]{8}") {
            let issued = Timestamp::UNIX_EPOCH;
            let expires = issued + SignedDuration::from_secs(lifetime);
            let mut parts = [0; 10];
            for n in 0..200 {
                let s = Schedule::new(issued, expires, RefreshAt::Default, &format!("{prefix}/{n}"));
                let early = expires.duration_since(s.renew).as_secs_f64() - lifetime_third(lifetime);
                let tenths = early / SignedDuration::from_secs(lifetime).as_secs_f64() * 10.0;
                prop_assert!((-1e-6..1.0 + 1e-6).contains(&tenths), "{tenths}");
                let part = (0..9).find(|part| tenths * 10.0 < f64::from(*part) + 1.0).unwrap_or(9);
                parts[usize::try_from(part).expect("small")] += 1;
            }
            prop_assert!(parts.iter().all(|count| (1..60).contains(count)), "{parts:?}");
        }
    }

    #[test]
    fn default_is_two_thirds_minus_at_most_a_tenth() {
        let issued = Timestamp::UNIX_EPOCH;
        let expires = issued + SignedDuration::from_secs(1_000);
        let all: Vec<i64> = (0..1_000)
            .map(|i| {
                Schedule::new(issued, expires, RefreshAt::Default, &i.to_string())
                    .renew
                    .as_second()
            })
            .collect();
        let (min, max) = (all.iter().min().copied(), all.iter().max().copied());
        assert!(min >= Some(566) && min < Some(575), "{min:?}");
        assert!(max <= Some(667) && max > Some(660), "{max:?}");
    }

    #[test]
    fn margin_that_does_not_fit_the_lifetime_is_clamped() {
        let issued = Timestamp::UNIX_EPOCH;
        let renew = |lifetime, refresh_at| {
            // This seed's jitter is small.
            let s = Schedule::new(issued, issued + SignedDuration::from_secs(lifetime), refresh_at, "26");
            (s.renew.as_second(), s.clamped)
        };
        let before = |seconds| RefreshAt::Before(SignedDuration::from_secs(seconds));
        let jitter = 1_000 - 333 - renew(1_000, RefreshAt::Default).0;
        assert!(jitter <= 100, "{jitter}");
        for (lifetime, refresh_at, latest, clamped) in [
            (1_000, RefreshAt::Default, 667, false),
            (1_000, before(100), 900, false),
            (1_000, before(0), 950, true),
            (1_000, before(1_000), 667, true),
            (1_000, before(900), 200, true),
            (1_000, RefreshAt::Percentage(1), 950, true),
            (1_000, RefreshAt::Percentage(99), 200, true),
            (6, before(1), 4, true),
        ] {
            let got = renew(lifetime, refresh_at);
            assert!(
                got.0 <= latest && got.0 >= latest - 101 && got.1 == clamped,
                "{refresh_at:?} of {lifetime}: {got:?}"
            );
        }
    }

    #[test]
    fn durations_of_the_spec_are_parsed() {
        assert_eq!(duration("1h30m"), Some(SignedDuration::from_secs(5_400)));
        assert_eq!(duration("10s"), Some(SignedDuration::from_secs(10)));
        assert_eq!(duration("250ms"), Some(SignedDuration::from_millis(250)));
        assert_eq!(duration("1m1h"), Some(SignedDuration::from_secs(3_660)));
        assert_eq!(duration("1.5h0.25s"), Some(SignedDuration::from_millis(5_400_250)));
        for bad in [
            "",
            "10",
            "-5s",
            "ten seconds",
            "99999999999999999999h",
            "9999999h",
            "1.h",
            ".5h",
            "1h ",
            "1d",
            "ü",
        ] {
            assert_eq!(duration(bad), None, "{bad}");
        }
    }
}
