//! A 200 response of the token endpoint: what it must be, and whether its token is what was requested. `failure.rs` classifies
//! all other responses, and `backoff.rs` decides how long the operator waits after them.

use std::collections::BTreeSet;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use crate::domain::reason::Reason;
use crate::domain::schedule::{LONGEST_LIFETIME, SHORTEST_LIFETIME};
use crate::domain::time::shifted;

/// Maximum accepted size of a token. Tokens of ZITADEL have about 1 kB.
pub const MAX_TOKEN_BYTES: usize = 32 * 1024;

/// The fields of a token response (RFC 6749 §5.1) that the operator needs.
#[derive(Deserialize, Debug)]
pub struct TokenAnswer {
    /// The token.
    pub access_token: SecretString,
    /// Must be Bearer.
    pub token_type: String,
    /// Lifetime in seconds, from the moment of the response.
    pub expires_in: Option<i64>,
}

/// Reads the body of a response with status 200.
pub fn parse(body: &[u8]) -> Result<TokenAnswer, Reason> {
    // The parser's error could quote the token, so it is dropped.
    serde_json::from_slice(body).map_err(|_| Reason::MalformedResponse)
}

/// Whether consumers can read claims from the token themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A signed JWT.
    Jwt,
    /// A reference that only ZITADEL understands.
    Opaque,
}

impl Format {
    /// The format of `token`. ZITADEL's opaque tokens look like a JWE of five parts
    /// (`docs/reference/zitadel-protocol.md#token-formats`).
    #[must_use]
    pub fn of(token: &str) -> Self {
        if claims(token).is_some() {
            Self::Jwt
        } else {
            Self::Opaque
        }
    }

    /// The value in `status`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Jwt => "JWT",
            Self::Opaque => "Opaque",
        }
    }
}

/// The claims that an issued token must have.
#[derive(Clone, Debug, PartialEq)]
pub struct Expected {
    /// `iss`.
    pub issuer: String,
    /// `sub`.
    pub user_id: String,
    /// The complete `aud`.
    pub audience: BTreeSet<String>,
    /// The claim `urn:zitadel:iam:org:id`, if the token requests an organization. ZITADEL silently drops the scope of
    /// an organization other than the user's own (`docs/reference/zitadel-protocol.md#scopes`).
    pub organization_id: Option<String>,
}

/// A token that ZITADEL issued and the operator checked.
#[derive(Clone, Debug)]
pub struct Minted {
    /// The token.
    pub token: SecretString,
    /// Start of its lifetime: when the operator sent the request, by the server's clock.
    pub issued: Timestamp,
    /// End of its lifetime, by the server's clock.
    pub expires: Timestamp,
}

/// Checks the response to a request that was sent at `sent`. The expiry is the earlier of `sent + expires_in` and
/// `exp`, so that an error makes it too early and never too late
/// (`docs/adr/0010-refresh-schedule-with-stable-jitter.md`).
pub fn accept(answer: TokenAnswer, expected: &Expected, sent: Timestamp) -> Result<Minted, Reason> {
    let token = answer.access_token.expose_secret();
    if !is_b64token(token) || !answer.token_type.eq_ignore_ascii_case("Bearer") {
        return Err(Reason::MalformedResponse);
    }
    let by_answer = match answer.expires_in {
        Some(seconds) if seconds >= 0 => Some(shifted(sent, SignedDuration::from_secs(seconds))),
        Some(_) => return Err(Reason::MalformedResponse),
        None => None,
    };
    let by_claim = match claims(token) {
        Some(claims) => {
            check_claims(&claims, expected)?;
            claims.exp
        }
        None => None,
    };
    let expires = match (by_answer, by_claim) {
        (Some(a), Some(b)) => a.min(b),
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) => return Err(Reason::MalformedResponse),
    };
    let expires = expires.min(shifted(sent, LONGEST_LIFETIME));
    if expires.duration_since(sent) < SHORTEST_LIFETIME {
        return Err(Reason::LifetimeTooShort);
    }
    Ok(Minted {
        token: answer.access_token,
        issued: sent,
        expires,
    })
}

/// The claims of a JWT that the operator checks. The signature is not verified: the token was received over TLS from
/// the issuer itself.
#[derive(Debug)]
pub struct Claims {
    iss: Option<String>,
    sub: Option<String>,
    aud: BTreeSet<String>,
    /// Expiry, by the server's clock.
    pub exp: Option<Timestamp>,
    organization_id: Option<String>,
}

impl Claims {
    /// The audience, if it has exactly one entry.
    #[must_use]
    pub fn only_audience(&self) -> Option<&str> {
        let mut audience = self.aud.iter();
        audience
            .next()
            .filter(|_| audience.next().is_none())
            .map(String::as_str)
    }
}

#[derive(Deserialize, Default)]
struct RawClaims {
    iss: Option<String>,
    sub: Option<String>,
    aud: Option<Audience>,
    exp: Option<f64>,
    #[serde(rename = "urn:zitadel:iam:org:id")]
    organization_id: Option<String>,
}

/// `aud` is one string or a list of strings (RFC 7519 §4.1.3).
#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(BTreeSet<String>),
}

/// The claims, if `token` is a JWT: three parts, of which the first or the second is a JSON object. Unreadable claims
/// count as missing, so the token is rejected: another parser could read them differently.
#[must_use]
pub fn claims(token: &str) -> Option<Claims> {
    let mut parts = token.split('.');
    let (Some(header), Some(payload), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return None;
    };
    let json = |part: &str| {
        let bytes = URL_SAFE_NO_PAD.decode(part).ok();
        bytes.filter(|b| b.trim_ascii_start().starts_with(b"{"))
    };
    let (header, payload) = (json(header), json(payload));
    if header.is_none() && payload.is_none() {
        return None;
    }
    let raw: RawClaims = payload
        .and_then(|payload| serde_json::from_slice(&payload).ok())
        .unwrap_or_default();
    Some(Claims {
        iss: raw.iss,
        sub: raw.sub,
        aud: match raw.aud {
            Some(Audience::One(one)) => BTreeSet::from([one]),
            Some(Audience::Many(many)) => many,
            None => BTreeSet::new(),
        },
        // Rounded down to whole seconds. A number outside the range of `Timestamp` counts as no expiry.
        exp: raw
            .exp
            .and_then(|s| SignedDuration::try_from_secs_f64(s.floor()).ok())
            .and_then(|d| Timestamp::from_duration(d).ok()),
        organization_id: raw.organization_id,
    })
}

/// Checks that a JWT matches the request: issuer and subject are as expected, the audience is equal
/// (`docs/adr/0007-audience-must-be-equal.md`), and the organization is present if it was requested.
pub fn check_claims(claims: &Claims, expected: &Expected) -> Result<(), Reason> {
    let right = claims.iss.as_ref() == Some(&expected.issuer)
        && claims.sub.as_ref() == Some(&expected.user_id)
        && claims.aud == expected.audience
        && (expected.organization_id.is_none() || claims.organization_id == expected.organization_id);
    if right { Ok(()) } else { Err(Reason::TokenMismatch) }
}

/// The syntax of a bearer token (RFC 6750 §2.1), with a maximum length.
fn is_b64token(token: &str) -> bool {
    let body = token.trim_end_matches('=');
    !body.is_empty()
        && token.len() <= MAX_TOKEN_BYTES
        && body
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._~+/".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jwt(claims: &serde_json::Value) -> String {
        let part = |json: &serde_json::Value| URL_SAFE_NO_PAD.encode(json.to_string());
        format!("{}.{}.c2ln", part(&serde_json::json!({"alg": "RS256"})), part(claims))
    }

    fn expected() -> Expected {
        Expected {
            issuer: "https://auth.example.com".into(),
            user_id: "7".into(),
            audience: BTreeSet::from(["1".to_owned(), "2".to_owned()]),
            organization_id: None,
        }
    }

    fn answer(token: &str, expires_in: &str) -> Result<TokenAnswer, Reason> {
        parse(format!(r#"{{"access_token":{token:?},"token_type":"Bearer"{expires_in}}}"#).as_bytes())
    }

    #[test]
    fn jwt_is_accepted_only_if_it_matches_the_request() {
        let sent = Timestamp::from_second(1_800_000_000).expect("in range");
        let good =
            serde_json::json!({"iss": "https://auth.example.com", "sub": "7", "aud": ["2", "1"], "exp": 1_800_000_100});
        let with = |key: &str, value: serde_json::Value| {
            let mut claims = good.clone();
            claims[key] = value;
            jwt(&claims)
        };
        let raw = |payload: &str| {
            format!(
                "{}.{}.c2ln",
                URL_SAFE_NO_PAD.encode("{}"),
                URL_SAFE_NO_PAD.encode(payload)
            )
        };
        let cases = [
            (jwt(&good), Ok(100)),
            (
                with("iss", "https://auth.example.com/".into()),
                Err(Reason::TokenMismatch),
            ),
            (with("sub", "8".into()), Err(Reason::TokenMismatch)),
            (with("aud", "1".into()), Err(Reason::TokenMismatch)),
            (
                with("aud", serde_json::json!(["1", "2", "3"])),
                Err(Reason::TokenMismatch),
            ),
            (with("exp", 1_800_000_003.into()), Err(Reason::LifetimeTooShort)),
            (with("exp", serde_json::json!(1_800_000_050.9)), Ok(50)),
            (with("exp", serde_json::json!(-1e300)), Ok(3600)),
            (with("exp", serde_json::json!(-1)), Err(Reason::LifetimeTooShort)),
            // Another parser might accept these claims, or treat them as missing.
            (with("aud", serde_json::Value::Null), Err(Reason::TokenMismatch)),
            (with("aud", serde_json::json!({"1": "2"})), Err(Reason::TokenMismatch)),
            (with("aud", serde_json::json!([["1", "2"]])), Err(Reason::TokenMismatch)),
            (with("sub", serde_json::Value::Null), Err(Reason::TokenMismatch)),
            (with("sub", 7.into()), Err(Reason::TokenMismatch)),
            (
                with("iss", serde_json::json!(["https://auth.example.com"])),
                Err(Reason::TokenMismatch),
            ),
            (with("exp", "1800000100".into()), Err(Reason::TokenMismatch)),
            (
                raw(&format!(r#"{{"sub":"8",{}"#, &good.to_string()[1..])),
                Err(Reason::TokenMismatch),
            ),
            (raw(&format!(" {good}")), Ok(100)),
            (raw(&format!("[{good}]")), Err(Reason::TokenMismatch)),
            (
                raw(&good.to_string().replace("1800000100", "1e999")),
                Err(Reason::TokenMismatch),
            ),
            (raw(&"{\"aud\":".repeat(3_000)), Err(Reason::TokenMismatch)),
            (
                format!("{}.+.c2ln", URL_SAFE_NO_PAD.encode("{}")),
                Err(Reason::TokenMismatch),
            ),
            (
                format!("{}..c2ln", URL_SAFE_NO_PAD.encode("{}")),
                Err(Reason::TokenMismatch),
            ),
            (
                format!("x.{}.", URL_SAFE_NO_PAD.encode("{}")),
                Err(Reason::TokenMismatch),
            ),
        ];
        for (token, outcome) in cases {
            let got = answer(&token, r#","expires_in":3600"#).and_then(|a| accept(a, &expected(), sent));
            assert_eq!(
                got.map(|m| m.expires.as_second() - sent.as_second()),
                outcome,
                "{token}"
            );
        }
    }

    #[test]
    fn odd_responses_have_a_reason_and_never_panic() {
        let sent = Timestamp::from_second(1_800_000_000).expect("in range");
        let opaque = "eyJh.bGci.OiJB.MjU2.R0NN";
        let cases = [
            (opaque, r#","expires_in":60"#, Ok(60)),
            (opaque, "", Err(Reason::MalformedResponse)),
            (opaque, r#","expires_in":-1"#, Err(Reason::MalformedResponse)),
            (opaque, r#","expires_in":0"#, Err(Reason::LifetimeTooShort)),
            (opaque, r#","expires_in":1.5"#, Err(Reason::MalformedResponse)),
            (opaque, r#","expires_in":9223372036854775807"#, Ok(31 * 86_400)),
            (
                opaque,
                r#","expires_in":99999999999999999999"#,
                Err(Reason::MalformedResponse),
            ),
            ("with space", r#","expires_in":60"#, Err(Reason::MalformedResponse)),
            ("with\nbreak", r#","expires_in":60"#, Err(Reason::MalformedResponse)),
            ("", r#","expires_in":60"#, Err(Reason::MalformedResponse)),
        ];
        for (token, expires_in, outcome) in cases {
            let got = answer(token, expires_in).and_then(|a| accept(a, &expected(), sent));
            assert_eq!(
                got.map(|m| m.expires.as_second() - sent.as_second()),
                outcome,
                "{token} {expires_in}"
            );
        }
        // A wrong clock can return any time.
        for sent in [Timestamp::MIN, Timestamp::MAX] {
            let got = answer(opaque, r#","expires_in":9223372036854775807"#).and_then(|a| accept(a, &expected(), sent));
            assert_eq!(got.is_ok(), sent == Timestamp::MIN);
        }
        assert!(parse(b"<html>").is_err());
        assert!(parse("[".repeat(100_000).as_bytes()).is_err());
    }
}
