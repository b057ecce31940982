//! Token buckets, as pure state machines. Time is the caller's monotonic clock, as a duration since any fixed moment.

use std::time::Duration;

/// Size and rate of a bucket.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// So many at once after a quiet time.
    pub burst: f64,
    /// So many a second for long.
    pub per_second: f64,
}

/// What was left in a bucket at a moment. Negative if work was promised for later.
#[derive(Clone, Copy, Debug)]
pub struct Level {
    /// So many may be taken without a wait.
    pub left: f64,
    /// When that was so.
    pub at: Duration,
}

impl Level {
    /// What is left now.
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
    /// A bucket with a second's worth in it: who led before, or this process before it died, may have spent the burst a
    /// moment ago (decision K15).
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

    /// Changes rate and size; what is in it stays, as far as it fits.
    pub fn resize(&mut self, per_second: u32, burst: u32) {
        self.rate = at_least_one(per_second, burst);
        self.level.left = self.level.left.min(self.rate.burst);
    }

    /// Takes one request out of the budget and says how long it must wait. Takers are served in the order of their
    /// calls: the level may go below zero, which is the queue.
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
        fn never_more_than_the_burst_and_the_rate(
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
