//! Notices that the wall clock was set or that the machine slept: what was to happen at a time of the wall clock is then
//! waited for by a monotonic clock that knows nothing of it (decision K18).

use std::time::{Duration, Instant, SystemTime};

/// How often the two clocks are compared. What is computed by a wrong time until then is computed again; two changes that
/// cancel each other out in between are not noticed.
const EVERY: Duration = Duration::from_secs(1);

/// They part by less than this while the wall clock is only slewed (500 ppm at most).
const TOLERANCE: Duration = Duration::from_secs(1);

/// Calls `jumped` each time that the wall clock has moved against the monotonic one. Never ends.
pub async fn watch(jumped: impl Fn()) {
    let mut last = (SystemTime::now(), Instant::now());
    loop {
        tokio::time::sleep(EVERY).await;
        let now = (SystemTime::now(), Instant::now());
        if parted(last, now) {
            jumped();
        }
        last = now;
    }
}

fn parted(before: (SystemTime, Instant), after: (SystemTime, Instant)) -> bool {
    let expected = before.0 + after.1.duration_since(before.1);
    let gap = match after.0.duration_since(expected) {
        Ok(ahead) => ahead,
        Err(behind) => behind.duration(),
    };
    gap > TOLERANCE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_set_is_told_from_time_that_passed() {
        let (wall, monotonic) = (SystemTime::now(), Instant::now());
        let seconds = Duration::from_secs;
        let table = [
            ("time passed", wall + seconds(10), seconds(10), false),
            (
                "busy or stopped for an hour",
                wall + seconds(3_600),
                seconds(3_600),
                false,
            ),
            ("slewed", wall + Duration::from_millis(10_005), seconds(10), false),
            ("slept for an hour", wall + seconds(3_610), seconds(10), true),
            ("set back", wall - seconds(60), seconds(10), true),
            ("set ahead", wall + seconds(70), seconds(10), true),
        ];
        for (name, then, elapsed, expected) in table {
            assert_eq!(
                parted((wall, monotonic), (then, monotonic + elapsed)),
                expected,
                "{name}"
            );
        }
    }
}
