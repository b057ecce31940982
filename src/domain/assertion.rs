//! The RFC 7523 assertion: a JWT with which a service user asks for a token.

use jsonwebtoken::{Algorithm, Header};
use k8s_openapi::jiff::Timestamp;
use secrecy::SecretString;
use serde::Serialize;

use crate::domain::key::ServiceKey;
use crate::domain::reason::Reason;

/// `iat` lies this far back: ZITADEL refuses an `iat` more than a second ahead of its clock and takes one up to an
/// hour old (zitadel.md §2, check 4), so that a small lead of our clock must not matter.
const BACKDATE_SECONDS: i64 = 15;

/// How long an assertion can be used from now. It can be replayed until then (zitadel.md §2), hence short; with the
/// back-dating an assertion lives under two minutes.
const VALID_SECONDS: i64 = 60;

#[derive(Serialize)]
struct Claims<'a> {
    iss: &'a str,
    sub: &'a str,
    aud: &'a str,
    iat: i64,
    exp: i64,
}

/// Signs an assertion for the key's user, RS256: the one algorithm valid for RSA keys on every version
/// (zitadel.md §1.3). `now` is by the server's clock, as far as it is known.
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
    // A PEM that decodes may still hold numbers that are no RSA key.
    jsonwebtoken::encode(&header, &claims, &key.signing)
        .map(SecretString::from)
        .map_err(|_| Reason::KeyPEMInvalid)
}
