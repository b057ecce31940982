//! The token request (RFC 7523 §2.1) and its errors (docs/reference/zitadel-protocol.md#errors-of-the-token-endpoint).

use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use crate::domain::answer::{self, TokenAnswer};
use crate::domain::failure::{Failure, OAuthError};
use crate::zitadel::http::{Answer, Http};

const GRANT_TYPE: &str = "urn:ietf:params:oauth:grant-type:jwt-bearer";

/// Requests a token.
pub async fn exchange(
    http: &Http,
    path: &str,
    assertion: &SecretString,
    scope: &str,
) -> Result<(TokenAnswer, Answer), Failure> {
    let form = [
        ("grant_type", GRANT_TYPE),
        ("assertion", assertion.expose_secret()),
        ("scope", scope),
    ];
    let reply = http.post(path, &form).await?;
    if reply.status != 200 {
        return Err(Failure::Status {
            code: reply.status,
            error: error(reply.body.expose_secret()),
            retry_after: reply.retry_after,
        });
    }
    let answer = answer::parse(reply.body.expose_secret())?;
    Ok((answer, reply))
}

/// Maps the two fields of an OAuth error (RFC 6749 §5.2) to a closed set. Their text is dropped, because it may quote
/// the assertion.
fn error(body: &[u8]) -> Option<OAuthError> {
    #[derive(Deserialize)]
    struct Body {
        error: SecretString,
        #[serde(default)]
        error_description: SecretString,
    }
    let body: Body = serde_json::from_slice(body).ok()?;
    Some(
        match (body.error.expose_secret(), body.error_description.expose_secret()) {
            ("invalid_grant", _) => OAuthError::InvalidGrant,
            ("server_error", "Errors.Internal") => OAuthError::InternalError,
            ("invalid_request", "Errors.User.NotActive") => OAuthError::UserNotActive,
            _ => OAuthError::Other,
        },
    )
}
