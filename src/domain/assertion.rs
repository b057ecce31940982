//! The RFC 7523 assertion: a JWT with which a service user requests a token.

use jsonwebtoken::{Algorithm, Header};
use k8s_openapi::jiff::Timestamp;
use secrecy::SecretString;
use serde::Serialize;

use crate::domain::key::ServiceKey;
use crate::domain::reason::Reason;

/// `iat` is this far in the past, so that a small lead of the operator's clock does not matter. ZITADEL refuses an
/// `iat` more than a second ahead of its clock and accepts one up to an hour old
/// (`docs/reference/zitadel-protocol.md#the-assertion`).
const BACKDATE_SECONDS: i64 = 15;

/// `exp` is this far in the future. The time is short because an assertion can be replayed until it expires
/// (`docs/reference/zitadel-protocol.md#the-assertion`). The time from `iat` to `exp` is below two minutes.
const VALID_SECONDS: i64 = 60;

#[derive(Serialize)]
struct Claims<'a> {
    iss: &'a str,
    sub: &'a str,
    aud: &'a str,
    iat: i64,
    exp: i64,
}

/// Signs an assertion for the key's user with RS256, the only algorithm for RSA keys that every version of ZITADEL
/// accepts (`docs/reference/zitadel-protocol.md#key-sizes-and-algorithms`). `now` is by the server's clock, as far as
/// it is known.
pub fn sign(key: &ServiceKey, issuer: &str, now: Timestamp) -> Result<SecretString, Reason> {
    let now = now.as_second();
    let claims = Claims {
        iss: &key.user_id,
        sub: &key.user_id,
        aud: issuer,
        iat: now - BACKDATE_SECONDS,
        exp: now + VALID_SECONDS,
    };
    let mut header = Header::new(Algorithm::RS256);
    header.kid = Some(key.key_id.clone());
    // The numbers in a well-formed PEM may still not be a valid RSA key.
    jsonwebtoken::encode(&header, &claims, &key.signing)
        .map(SecretString::from)
        .map_err(|_| Reason::KeyPEMInvalid)
}
