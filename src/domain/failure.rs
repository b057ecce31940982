//! Failures of requests to ZITADEL, as plain data without text from the server, and their mapping to a [`Reason`].

use k8s_openapi::jiff::Timestamp;

use crate::domain::reason::Reason;

/// Evidence of a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No connection: the name does not resolve, there is no route, or the host refuses the connection.
    Connect,
    /// The connection ended before the response.
    Broken,
    /// The server's certificate is not trusted.
    Tls,
    /// No response in time.
    Timeout,
    /// A response that violates the protocol, is too long or is truncated.
    Malformed,
    /// An HTTP status other than 200.
    Status {
        /// The status.
        code: u16,
        /// The error in the body, if it is an OAuth error.
        error: Option<OAuthError>,
        /// `Retry-After`, as a point in time.
        retry_after: Option<Timestamp>,
    },
    /// A failure whose reason is already known.
    Known(Reason),
}

impl Failure {
    /// Whether the failure is either a refused assertion or an outage
    /// (`docs/reference/zitadel-protocol.md#errors-of-the-token-endpoint`).
    #[must_use]
    pub fn is_ambiguous(self) -> bool {
        let Self::Status { error, .. } = self else { return false };
        error == Some(OAuthError::InternalError)
    }

    /// Whether the token endpoint processed the request and refused it, which shows that the endpoint works.
    #[must_use]
    pub fn is_refusal(self) -> bool {
        matches!(self, Self::Status { code, error: Some(_), .. } if code < 500 && code != 429)
    }

    /// The `Retry-After` deadline of the server.
    #[must_use]
    pub fn retry_after(self) -> Option<Timestamp> {
        let Self::Status { retry_after, .. } = self else {
            return None;
        };
        retry_after
    }

    /// Whether a wrong clock on either side may be the cause. ZITADEL refuses an assertion that is not yet valid, or no
    /// longer valid, with the same error as a bad key
    /// (`docs/reference/zitadel-protocol.md#errors-of-the-token-endpoint`).
    #[must_use]
    pub fn may_be_the_clock(self) -> bool {
        let Self::Status { error, .. } = self else { return false };
        matches!(error, Some(OAuthError::InvalidGrant | OAuthError::InternalError))
    }
}

/// The errors of the token endpoint that the operator distinguishes
/// (`docs/reference/zitadel-protocol.md#errors-of-the-token-endpoint`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OAuthError {
    /// `invalid_grant`: the assertion is refused (newer than v4.13).
    InvalidGrant,
    /// `server_error` with `Errors.Internal`: the assertion is refused (up to v4.13), or a real failure.
    InternalError,
    /// `Errors.User.NotActive`.
    UserNotActive,
    /// Any other.
    Other,
}

/// The reason for a failure at the token endpoint. `discovery_works` distinguishes a refused assertion from an outage:
/// up to v4.13, ZITADEL returns a 500 with the same body for both.
#[must_use]
pub fn classify(failure: Failure, discovery_works: bool) -> Reason {
    match failure {
        Failure::Known(reason) => reason,
        Failure::Connect | Failure::Broken | Failure::Timeout => Reason::InstanceUnreachable,
        Failure::Tls => Reason::TLSFailure,
        Failure::Malformed => Reason::MalformedResponse,
        Failure::Status { code: 429, .. } => Reason::RateLimited,
        Failure::Status { code, error, .. } => match error {
            Some(OAuthError::InvalidGrant) => Reason::KeyRejected,
            Some(OAuthError::UserNotActive) => Reason::UserInactive,
            Some(OAuthError::InternalError) if discovery_works => Reason::KeyRejected,
            _ if code >= 500 => Reason::ServerError,
            Some(_) => Reason::RequestRejected,
            // Not an OAuth error: the response is from a proxy in front of ZITADEL, or ZITADEL does not know the host.
            None => Reason::MalformedResponse,
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
    fn refused_assertions_of_all_versions_are_recognized() {
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
            (status(400, Some(OAuthError::Other)), true, Reason::RequestRejected),
            (status(503, None), true, Reason::ServerError),
            (status(429, None), true, Reason::RateLimited),
            (status(404, None), true, Reason::MalformedResponse),
        ];
        for (failure, discovery, reason) in table {
            assert_eq!(classify(failure, discovery), reason, "{failure:?}");
        }
    }
}
