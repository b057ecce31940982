//! The state of a token between issue and expiry, for metrics.

use k8s_openapi::jiff::Timestamp;

use crate::domain::summary::TokenTimes;

/// The state of a token, computed from its status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TokenState {
    /// The token is valid and not yet due.
    Fresh,
    /// The token is due for a refresh.
    Due,
    /// At least half of the time between refresh time and expiry has passed, which indicates a failure.
    Stale,
    /// The token has expired.
    Expired,
    /// There is no token.
    Missing,
    /// The object is suspended, so the token is not refreshed.
    Suspended,
}

impl TokenState {
    /// The state of the token with this status, if it has one.
    #[must_use]
    pub fn of(token: Option<&TokenTimes>, suspended: bool, now: Timestamp) -> Self {
        if suspended {
            return Self::Suspended;
        }
        let times = token.and_then(|times| Some((times.renew_at?, times.expires_at?)));
        let Some((renew, expires)) = times else {
            return Self::Missing;
        };
        if now >= expires {
            Self::Expired
        } else if now < renew {
            Self::Fresh
        } else if now.duration_since(renew) < expires.duration_since(now) {
            Self::Due
        } else {
            Self::Stale
        }
    }

    /// The value of the metric label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fresh => "fresh",
            Self::Due => "due",
            Self::Stale => "stale",
            Self::Expired => "expired",
            Self::Missing => "missing",
            Self::Suspended => "suspended",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::fixtures::at;

    #[test]
    fn state_changes_with_time() {
        let token = TokenTimes {
            renew_at: Some(at(800)),
            expires_at: Some(at(1_000)),
            ..TokenTimes::default()
        };
        let table = [
            (0, TokenState::Fresh),
            (799, TokenState::Fresh),
            (800, TokenState::Due),
            (899, TokenState::Due),
            (900, TokenState::Stale),
            (999, TokenState::Stale),
            (1_000, TokenState::Expired),
        ];
        for (second, expected) in table {
            assert_eq!(TokenState::of(Some(&token), false, at(second)), expected, "{second}");
        }
        assert_eq!(TokenState::of(Some(&token), true, at(2_000)), TokenState::Suspended);
        assert_eq!(TokenState::of(None, false, at(0)), TokenState::Missing);
        assert_eq!(
            TokenState::of(Some(&TokenTimes::default()), false, at(0)),
            TokenState::Missing
        );
    }
}
