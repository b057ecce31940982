//! Arithmetic with times that cannot overflow, and their form in the API.

use k8s_openapi::jiff::{SignedDuration, Timestamp};

/// `time`, this much later. Stays in range: a record or a `Date` may claim any time.
#[must_use]
pub fn shifted(time: Timestamp, by: SignedDuration) -> Timestamp {
    // Only a span with days or more, which a duration is not, is an error.
    time.saturating_add(by).unwrap_or(time)
}

/// Cut to whole seconds, towards earlier, as the Kubernetes API does with times.
#[must_use]
pub fn whole_seconds(time: Timestamp) -> Timestamp {
    time - SignedDuration::from_nanos(time.subsec_nanosecond().rem_euclid(1_000_000_000).into())
}
