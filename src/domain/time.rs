//! Saturating arithmetic with times, and their precision in the API.

use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};

/// `time` plus `by`, limited to the range of `Timestamp`: a record or a `Date` can contain any time.
#[must_use]
pub fn shifted(time: Timestamp, by: SignedDuration) -> Timestamp {
    // Only a span with units of days or more is an error, and `SignedDuration` has none.
    time.saturating_add(by).unwrap_or(time)
}

/// [`shifted`] by a `Duration` of the standard library.
#[must_use]
pub fn later(time: Timestamp, by: Duration) -> Timestamp {
    shifted(time, SignedDuration::try_from(by).unwrap_or(SignedDuration::MAX))
}

/// Rounds down to whole seconds, like times in the Kubernetes API.
#[must_use]
pub fn whole_seconds(time: Timestamp) -> Timestamp {
    time - SignedDuration::from_nanos(time.subsec_nanosecond().rem_euclid(1_000_000_000).into())
}
