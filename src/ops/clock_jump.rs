//! Detects that the wall clock was set or that the machine was suspended. Timers for wall-clock times run on the
//! monotonic clock and are wrong after such a jump (docs/adr/0011-times-follow-the-servers-clock.md).

use std::time::{Duration, Instant, SystemTime};

/// How often the two clocks are compared. Times computed with a wrong clock in between are recomputed. Two changes that
/// cancel each other out within one interval are not detected.
const EVERY: Duration = Duration::from_secs(1);

/// Largest difference without a jump. Slewing of the wall clock (at most 500 ppm) stays below it.
const TOLERANCE: Duration = Duration::from_secs(1);

/// Calls `jumped` each time the wall clock has jumped relative to the monotonic clock. Never returns.
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
    fn clock_jump_differs_from_elapsed_time() {
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
