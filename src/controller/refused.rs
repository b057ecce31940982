//! What an error of ZITADEL's API means depends on what was asked: about the keys of a user, about a user, or about manager
//! roles.

use k8s_openapi::jiff::Timestamp;

use crate::domain::failure::{Failure, classify};
use crate::domain::reason::Reason;
use crate::zitadel::APIError;

/// Why the administrator cannot do something.
#[derive(Clone, Copy, Debug)]
pub struct Refused {
    /// The reason.
    pub reason: Reason,
    /// The earliest time of the next attempt.
    pub not_before: Option<Timestamp>,
}

impl Refused {
    /// A token request of the administrator failed for this reason.
    #[must_use]
    pub fn token(reason: Reason, failure: Failure) -> Self {
        let reason = match reason {
            Reason::KeyRejected | Reason::UserInactive => Reason::CredentialRejected,
            reason => reason,
        };
        Self {
            reason,
            not_before: failure.retry_after(),
        }
    }
}

impl From<Reason> for Refused {
    fn from(reason: Reason) -> Self {
        Self {
            reason,
            not_before: None,
        }
    }
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        Self::token(classify(failure, false), failure)
    }
}

/// The administrator asked about a user.
impl From<APIError> for Refused {
    fn from(error: APIError) -> Self {
        match error {
            APIError::Unavailable => Reason::NotSupportedByServer.into(),
            APIError::Unauthenticated => Reason::CredentialRejected.into(),
            APIError::Rejected | APIError::UnknownOrganization => Reason::UserRejected.into(),
            APIError::UserIDTaken | APIError::UsernameTaken => Reason::UserConflict.into(),
            APIError::TooMany => Reason::KeyListIncomplete.into(),
            APIError::Failed(failure) => failure.into(),
            // A 404 about an object that the operator knows means that the caller may not see it.
            _ => Reason::AdminForbidden.into(),
        }
    }
}

/// The administrator asked about manager roles.
#[must_use]
pub fn about_roles(error: APIError) -> Refused {
    match error {
        APIError::Rejected
        | APIError::UnknownOrganization
        | APIError::UnknownProject
        | APIError::UnknownProjectGrant
        | APIError::UnknownRole => Reason::ManagerRolesRejected.into(),
        APIError::UnknownUser => Reason::UserMissing.into(),
        // The list was outdated or is cut short, or the administrator does not see the roles.
        APIError::IsManager | APIError::IsNoManager | APIError::TooMany => Reason::ManagerRolesNotShown.into(),
        error => error.into(),
    }
}

/// A user, or the administrator for it, asked about its keys.
#[must_use]
pub fn about_keys(error: APIError) -> Reason {
    match error {
        APIError::Unavailable => Reason::KeyManagementUnavailable,
        APIError::TooMany => Reason::KeyListIncomplete,
        // The token is fresh, so the answer is not ZITADEL's.
        APIError::Unauthenticated => Reason::MalformedResponse,
        APIError::Failed(failure) => classify(failure, false),
        _ => Reason::KeyManagementForbidden,
    }
}
