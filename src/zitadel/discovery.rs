//! Discovery: where the token endpoint is. Not trusted to move us to another host (design §2.1).

use serde::Deserialize;

use crate::domain::reason::Reason;

/// Path of the document, below the issuer.
pub const PATH: &str = "/.well-known/openid-configuration";

/// ZITADEL's paths have about twenty characters; this one is shown in status.
const MAX_PATH: usize = 256;

/// What we take from the document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discovery {
    /// The token endpoint's path.
    pub token_path: String,
}

#[derive(Deserialize)]
struct Document {
    issuer: String,
    token_endpoint: String,
}

/// Reads the document. The issuer must be the same to the letter, the token endpoint below it, without a query (a
/// `scope` there would override the form's) or fragment.
pub fn parse(body: &[u8], issuer: &str) -> Result<Discovery, Reason> {
    let document: Document = serde_json::from_slice(body).map_err(|_| Reason::MalformedAnswer)?;
    if document.issuer != issuer {
        return Err(Reason::IssuerMismatch);
    }
    let path = document
        .token_endpoint
        .strip_prefix(issuer)
        .filter(|path| path.starts_with('/') && path.len() <= MAX_PATH)
        .filter(|path| path.bytes().all(|b| b.is_ascii_graphic() && !b"?#\\".contains(&b)))
        .ok_or(Reason::IssuerMismatch)?;
    Ok(Discovery {
        token_path: path.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discovery_cannot_move_us() {
        let issuer = "https://auth.example.com";
        let table = [
            (
                "https://auth.example.com",
                "https://auth.example.com/oauth/v2/token",
                Ok("/oauth/v2/token"),
            ),
            (
                "https://auth.example.com/",
                "https://auth.example.com/oauth/v2/token",
                Err(Reason::IssuerMismatch),
            ),
            (
                "https://AUTH.example.com",
                "https://auth.example.com/oauth/v2/token",
                Err(Reason::IssuerMismatch),
            ),
            (
                "https://auth.example.com",
                "https://evil.example/oauth/v2/token",
                Err(Reason::IssuerMismatch),
            ),
            (
                "https://auth.example.com",
                "http://auth.example.com/oauth/v2/token",
                Err(Reason::IssuerMismatch),
            ),
            (
                "https://auth.example.com",
                "https://auth.example.com:8443/t",
                Err(Reason::IssuerMismatch),
            ),
            (
                "https://auth.example.com",
                "https://auth.example.com.evil.example/t",
                Err(Reason::IssuerMismatch),
            ),
            (
                "https://auth.example.com",
                "https://auth.example.com@evil.example/t",
                Err(Reason::IssuerMismatch),
            ),
            (
                "https://auth.example.com",
                "https://auth.example.com/t?scope=x",
                Err(Reason::IssuerMismatch),
            ),
            (
                "https://auth.example.com",
                "https://auth.example.com/t#f",
                Err(Reason::IssuerMismatch),
            ),
            (
                "https://auth.example.com",
                "https://auth.example.com/t\\n",
                Err(Reason::IssuerMismatch),
            ),
        ];
        for (named, endpoint, expected) in table {
            let body = format!(r#"{{"issuer":"{named}","token_endpoint":"{endpoint}"}}"#);
            let got = parse(body.as_bytes(), issuer).map(|d| d.token_path);
            assert_eq!(got, expected.map(str::to_owned), "{named} {endpoint}");
        }
        assert_eq!(parse(b"<html>", issuer), Err(Reason::MalformedAnswer));
    }
}
