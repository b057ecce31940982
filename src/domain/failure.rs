//! What went wrong on the way to ZITADEL, as plain data without a word of the server's, and the reason that it is.

use k8s_openapi::jiff::Timestamp;

use crate::domain::reason::Reason;

/// Evidence of a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No connection: name, route, refusal.
    Connect,
    /// The connection ended before the answer.
    Broken,
    /// The connection is there, but its certificate is not trusted.
    Tls,
    /// No answer in time.
    Timeout,
    /// An answer that no rule of the protocol allows, too long, or cut off.
    Malformed,
    /// An HTTP status other than 200.
    Status {
        /// The status.
        code: u16,
        /// What the body says, if it is an OAuth error.
        error: Option<OAuthError>,
        /// `Retry-After`, as a moment.
        retry_after: Option<Timestamp>,
    },
    /// A reason that is known already.
    Known(Reason),
}

impl Failure {
    /// Whether it may be a refused assertion or an outage (zitadel.md §2.1).
    #[must_use]
    pub fn is_ambiguous(self) -> bool {
        let Self::Status { error, .. } = self else { return false };
        error == Some(OAuthError::InternalError)
    }

    /// Whether the token endpoint judged the request and refused it, as it should: it works.
    #[must_use]
    pub fn is_refusal(self) -> bool {
        matches!(self, Self::Status { code, error: Some(_), .. } if code < 500 && code != 429)
    }

    /// The server asked not to come back before.
    #[must_use]
    pub fn retry_after(self) -> Option<Timestamp> {
        let Self::Status { retry_after, .. } = self else {
            return None;
        };
        retry_after
    }

    /// Whether a wrong clock on one side may be behind it: an assertion that is not valid yet, or no longer, is refused
    /// like a bad key (zitadel.md §2.1).
    #[must_use]
    pub fn may_be_the_clock(self) -> bool {
        let Self::Status { error, .. } = self else { return false };
        matches!(error, Some(OAuthError::InvalidGrant | OAuthError::InternalError))
    }
}

/// The errors of the token endpoint that we tell apart (zitadel.md §2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OAuthError {
    /// `invalid_grant`: the assertion is refused (v4.14 and newer).
    InvalidGrant,
    /// `server_error` with `Errors.Internal`: the assertion is refused (up to v4.13), or a real failure.
    InternalError,
    /// `Errors.User.NotActive`.
    UserNotActive,
    /// Any other.
    Other,
}

/// The reason of a failure at the token endpoint. `discovery_works` tells a refused assertion from an outage: up to
/// v4.13 both are a 500 with the same body.
#[must_use]
pub fn classify(failure: Failure, discovery_works: bool) -> Reason {
    match failure {
        Failure::Known(reason) => reason,
        Failure::Connect | Failure::Broken | Failure::Timeout => Reason::InstanceUnreachable,
        Failure::Tls => Reason::TLSFailure,
        Failure::Malformed => Reason::MalformedAnswer,
        Failure::Status { code: 429, .. } => Reason::RateLimited,
        Failure::Status { code, error, .. } => match error {
            Some(OAuthError::InvalidGrant) => Reason::KeyRejected,
            Some(OAuthError::UserNotActive) => Reason::UserInactive,
            Some(OAuthError::InternalError) if discovery_works => Reason::KeyRejected,
            _ if code >= 500 => Reason::ServerError,
            Some(_) => Reason::RequestRefused,
            // Not in OAuth's form: something before ZITADEL, or a host that ZITADEL does not know.
            None => Reason::MalformedAnswer,
        },
    }
}

impl From<Reason> for Failure {
    fn from(reason: Reason) -> Self {
        Self::Known(reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_dialects_of_a_refused_assertion() {
        let status = |code, error| Failure::Status {
            code,
            error,
            retry_after: None,
        };
        let table = [
            (status(400, Some(OAuthError::InvalidGrant)), true, Reason::KeyRejected),
            (status(500, Some(OAuthError::InternalError)), true, Reason::KeyRejected),
            (status(500, Some(OAuthError::InternalError)), false, Reason::ServerError),
            (status(400, Some(OAuthError::UserNotActive)), true, Reason::UserInactive),
            (status(400, Some(OAuthError::Other)), true, Reason::RequestRefused),
            (status(503, None), true, Reason::ServerError),
            (status(429, None), true, Reason::RateLimited),
            (status(404, None), true, Reason::MalformedAnswer),
        ];
        for (failure, discovery, reason) in table {
            assert_eq!(classify(failure, discovery), reason, "{failure:?}");
        }
    }
}
