//! Token buckets, as pure state machines. Times are durations since a fixed moment, by the caller's monotonic clock.

use std::time::Duration;

/// Size and rate of a bucket.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// The size of the bucket: how many units can be taken at once.
    pub burst: f64,
    /// The sustained rate: how many units are added per second.
    pub per_second: f64,
}

/// The level of a bucket at a point in time. Negative if units are reserved for later.
#[derive(Clone, Copy, Debug)]
pub struct Level {
    /// How many units can be taken without waiting.
    pub left: f64,
    /// The time of this level.
    pub at: Duration,
}

impl Level {
    /// The level at `now`.
    #[must_use]
    pub fn left_at(self, rate: Rate, now: Duration) -> f64 {
        let since = now.saturating_sub(self.at).as_secs_f64();
        (self.left + since * rate.per_second).min(rate.burst)
    }
}

/// The budget of requests to one ZITADEL host.
#[derive(Debug)]
pub struct Bucket {
    rate: Rate,
    level: Level,
}

impl Bucket {
    /// A bucket that starts with the budget of one second. The previous leader, or this process before a restart, may
    /// have just used the full burst (`docs/adr/0013-request-budget-per-host.md`).
    #[must_use]
    pub fn new(per_second: u32, burst: u32) -> Self {
        Self {
            rate: at_least_one(per_second, burst),
            level: Level {
                left: f64::from(burst.min(per_second).max(1)),
                at: Duration::ZERO,
            },
        }
    }

    /// Changes rate and size. The current level stays, limited by the new size.
    pub fn resize(&mut self, per_second: u32, burst: u32) {
        self.rate = at_least_one(per_second, burst);
        self.level.left = self.level.left.min(self.rate.burst);
    }

    /// Takes one request out of the budget and returns how long it must wait. Callers are served in the order of their
    /// calls: a level below zero is the queue of waiting requests.
    pub fn take(&mut self, now: Duration) -> Duration {
        self.level = Level {
            left: self.level.left_at(self.rate, now) - 1.0,
            at: self.level.at.max(now),
        };
        Duration::from_secs_f64((-self.level.left).max(0.0) / self.rate.per_second)
    }
}

fn at_least_one(per_second: u32, burst: u32) -> Rate {
    Rate {
        burst: f64::from(burst.max(1)),
        per_second: f64::from(per_second.max(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn burst_and_rate_are_never_exceeded(
            rate in 1_u32..100, burst in 1_u32..100, gaps in prop::collection::vec(0_u64..500, 1..200),
        ) {
            let mut bucket = Bucket::new(rate, burst);
            let mut now = Duration::ZERO;
            let mut sent: Vec<Duration> = Vec::new();
            let at_once = (0..burst).take_while(|_| bucket.take(now).is_zero()).count();
            prop_assert_eq!(at_once, usize::try_from(burst.min(rate)).expect("small"));
            for gap in gaps {
                now += Duration::from_millis(gap);
                sent.push(now + bucket.take(now));
            }
            for (i, start) in sent.iter().enumerate() {
                for (j, end) in sent.iter().enumerate().skip(i) {
                    #[allow(clippy::cast_precision_loss, reason = "small numbers")]
                    let count = (j - i + 1) as f64;
                    let allowed = f64::from(burst) + f64::from(rate) * (end.saturating_sub(*start)).as_secs_f64() + 1e-6;
                    prop_assert!(count <= allowed + 1.0, "{count} from {start:?} to {end:?}, allowed {allowed}");
                }
            }
        }
    }
}
