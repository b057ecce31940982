//! Limits toward one ZITADEL host, as pure state machines.

use std::time::Duration;

/// A token bucket. Time is the caller's monotonic clock, as a duration since any fixed moment.
#[derive(Debug)]
pub struct Bucket {
    per_second: f64,
    burst: f64,
    level: f64,
    at: Duration,
}

impl Bucket {
    /// A bucket with a second's worth in it: who led before, or this process before it died, may have spent the burst a
    /// moment ago (decision K15).
    #[must_use]
    pub fn new(per_second: u32, burst: u32) -> Self {
        Self {
            per_second: f64::from(per_second.max(1)),
            burst: f64::from(burst.max(1)),
            level: f64::from(burst.min(per_second).max(1)),
            at: Duration::ZERO,
        }
    }

    /// Changes rate and size; what is in it stays, as far as it fits.
    pub fn resize(&mut self, per_second: u32, burst: u32) {
        self.per_second = f64::from(per_second.max(1));
        self.burst = f64::from(burst.max(1));
        self.level = self.level.min(self.burst);
    }

    /// Takes one request out of the budget and says how long it must wait. Takers are served in the order of their
    /// calls: the level may go below zero, which is the queue.
    pub fn take(&mut self, now: Duration) -> Duration {
        let elapsed = now.saturating_sub(self.at);
        self.at = self.at.max(now);
        self.level = (self.level + elapsed.as_secs_f64() * self.per_second).min(self.burst);
        self.level -= 1.0;
        if self.level >= 0.0 {
            Duration::ZERO
        } else {
            Duration::from_secs_f64(-self.level / self.per_second)
        }
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
