//! How far a token is on its way to its end, for those who watch over many of them.

use k8s_openapi::jiff::Timestamp;

use crate::domain::summary::TokenTimes;

/// Where a token is in its life, by its status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TokenState {
    /// It is not to be renewed yet.
    Fresh,
    /// It is to be renewed: now, or a moment ago.
    Due,
    /// Half of the time from its renewal to its expiry is gone, so that something must be wrong.
    Stale,
    /// It is no longer accepted.
    Expired,
    /// There is none.
    Missing,
    /// Nobody renews it: its object is suspended.
    Suspended,
}

impl TokenState {
    /// By a token's status, if it has one.
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

    /// As a label shows it.
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
    fn a_token_grows_old() {
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
