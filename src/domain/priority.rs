//! How urgent the reconcile of an object is.

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::domain::summary::{TokenTimes, UserSummary};
use crate::domain::time::shifted;

/// The priority of an object that waits for a reconcile. Classes in the order of service: refreshes close to their expiry,
/// first tokens, other refreshes, retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// No token of the object is valid, or a token has no status yet.
    FirstToken,
    /// At least one token is valid, and every token has a status. From this time on the next refresh is critical.
    Refresh(Timestamp),
    /// An attempt failed before.
    Retry,
}

/// A priority class. A lower one is served first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// A refresh in the last third of the time between its due time and the expiry.
    CriticalRefresh,
    /// A first token.
    FirstToken,
    /// Another refresh.
    Refresh,
    /// A retry of an object without a valid token.
    Retry,
}

impl Priority {
    /// The class at the time `now`.
    #[must_use]
    pub fn class(self, now: Timestamp) -> Class {
        match self {
            Self::Refresh(critical) if critical <= now => Class::CriticalRefresh,
            Self::FirstToken => Class::FirstToken,
            Self::Refresh(_) => Class::Refresh,
            Self::Retry => Class::Retry,
        }
    }
}

/// The priority of an object that has not failed, from its status. `now` and the result are by the operator's clock; the
/// times in the status are by the server's, which is ahead by `skew`.
#[must_use]
pub fn priority(user: &UserSummary, skew: SignedDuration, now: Timestamp) -> Priority {
    let critical = |times: &TokenTimes| {
        let ours = |time: Option<Timestamp>| Some(shifted(time?, -skew));
        let (renew, expires) = (ours(times.renew_at)?, ours(times.expires_at)?);
        (expires > now).then(|| expires - expires.duration_since(renew) / 3)
    };
    let statuses = user.tokens.iter().map(|token| token.status.as_ref());
    match statuses.clone().flatten().filter_map(critical).min() {
        Some(first) if statuses.clone().all(|status| status.is_some()) => Priority::Refresh(first),
        _ => Priority::FirstToken,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("in range")
    }

    #[test]
    fn priority_is_that_of_the_first_valid_token_to_become_critical() {
        let user = |tokens: serde_json::Value| -> UserSummary {
            let wanted = |name: &str| serde_json::json!({"name": name, "projectIDs": ["1"], "secret": {"name": name}});
            serde_json::from_value(serde_json::json!({
                "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelServiceUser", "metadata": {"name": "x"},
                "spec": {"instanceRef": {"name": "i"}, "keySecretRef": {"name": "k"}, "tokens": [wanted("a"), wanted("b")]},
                "status": {"tokens": tokens},
            }))
            .expect("a service user")
        };
        let line = |name: &str, renew: i64, expires: i64| serde_json::json!({"name": name, "secretName": name, "renewAt": at(renew).to_string(), "expiresAt": at(expires).to_string()});
        let denied = serde_json::json!({"name": "b", "secretName": "b", "reason": "AccessDenied"});
        let table = [
            ("never reconciled", serde_json::json!([]), Priority::FirstToken),
            (
                "two valid tokens",
                serde_json::json!([line("a", 100, 130), line("b", 70, 100)]),
                Priority::Refresh(at(90)),
            ),
            (
                "one valid, one denied",
                serde_json::json!([line("a", 100, 130), denied]),
                Priority::Refresh(at(120)),
            ),
            (
                "one valid, one expired",
                serde_json::json!([line("a", 100, 130), line("b", 20, 40)]),
                Priority::Refresh(at(120)),
            ),
            (
                "one valid, one new in the spec",
                serde_json::json!([line("a", 100, 130)]),
                Priority::FirstToken,
            ),
            (
                "one valid, one renamed in the spec",
                serde_json::json!([line("a", 100, 130), line("c", 100, 130)]),
                Priority::FirstToken,
            ),
            (
                "both expired",
                serde_json::json!([line("a", 20, 40), line("b", 20, 40)]),
                Priority::FirstToken,
            ),
        ];
        for (name, tokens, expected) in table {
            let user = user(tokens);
            assert_eq!(priority(&user, SignedDuration::ZERO, at(50)), expected, "{name}");
            // The same a minute away, where the server's clock is a minute behind.
            let behind = SignedDuration::from_secs(-60);
            let later = match expected {
                Priority::Refresh(critical) => Priority::Refresh(shifted(critical, -behind)),
                other => other,
            };
            assert_eq!(priority(&user, behind, at(110)), later, "{name}");
        }
    }
}
