//! Discovery of the token endpoint. The document cannot redirect the operator to another host
//! (docs/adr/0019-assertions-go-only-to-the-configured-host.md).

use serde::Deserialize;

use crate::domain::reason::Reason;

/// Path of the document, below the issuer.
pub const PATH: &str = "/.well-known/openid-configuration";

/// Longest token path. ZITADEL's paths have about twenty characters. The limit exists because the status shows the
/// path.
const MAX_PATH: usize = 256;

/// The part of the document that the operator uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discovery {
    /// The path of the token endpoint.
    pub token_path: String,
    /// The path of the user info endpoint, if it is usable.
    pub userinfo_path: Option<String>,
}

#[derive(Deserialize)]
struct Document {
    issuer: String,
    token_endpoint: String,
    userinfo_endpoint: Option<String>,
}

/// Parses the document. Its issuer must be exactly `issuer`.
pub fn parse(body: &[u8], issuer: &str) -> Result<Discovery, Reason> {
    let document: Document = serde_json::from_slice(body).map_err(|_| Reason::MalformedResponse)?;
    if document.issuer != issuer {
        return Err(Reason::IssuerMismatch);
    }
    Ok(Discovery {
        token_path: path_below(issuer, &document.token_endpoint).ok_or(Reason::IssuerMismatch)?,
        userinfo_path: document
            .userinfo_endpoint
            .and_then(|endpoint| path_below(issuer, &endpoint)),
    })
}

/// The path of an endpoint, which must be below the issuer, without a fragment and without a query: a `scope` in the
/// query would override the `scope` of the form.
fn path_below(issuer: &str, endpoint: &str) -> Option<String> {
    let path = endpoint.strip_prefix(issuer)?;
    let is_path = path.starts_with('/')
        && path.len() <= MAX_PATH
        && path.bytes().all(|b| b.is_ascii_graphic() && !b"?#\\".contains(&b));
    is_path.then(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn discovery_cannot_change_the_host() {
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
            if named == issuer {
                let body =
                    json!({"issuer": issuer, "token_endpoint": format!("{issuer}/t"), "userinfo_endpoint": endpoint});
                let got = parse(body.to_string().as_bytes(), issuer).map(|d| d.userinfo_path);
                assert_eq!(got, Ok(expected.ok().map(str::to_owned)), "{endpoint}");
            }
        }
    }

    #[test]
    fn invalid_documents_are_rejected_with_a_reason() {
        let issuer = "https://auth.example.com";
        let endpoint = |endpoint: &str| format!(r#"{{"issuer":"{issuer}","token_endpoint":"{endpoint}"}}"#);
        let below = |path: &str| endpoint(&format!("{issuer}{path}"));
        let malformed = Err(Reason::MalformedResponse);
        let mismatch = Err(Reason::IssuerMismatch);
        let table = [
            (below(&format!("/{}", "t".repeat(255))), Ok(256)),
            (below(&format!("/{}", "t".repeat(256))), mismatch),
            // This stays a path, because it is appended to the origin and not resolved as a relative URL.
            (below("//evil.example/t"), Ok(16)),
            (below(""), mismatch),
            (below(":443/t"), mismatch),
            (below(":x@evil.example/t"), mismatch),
            (below("/t t"), mismatch),
            (below("/t\\u0000"), mismatch),
            (below("/t\\r\\nHost: evil.example"), mismatch),
            (below("/tö"), mismatch),
            (endpoint("HTTPS://auth.example.com/t"), mismatch),
            (endpoint(" https://auth.example.com/t"), mismatch),
            (endpoint("https://a:b@auth.example.com/t"), mismatch),
            (endpoint("//auth.example.com/t"), mismatch),
            (endpoint("/t"), mismatch),
            (endpoint("javascript:alert(1)"), mismatch),
            (endpoint(""), mismatch),
            (
                r#"{"issuer":null,"token_endpoint":"https://auth.example.com/t"}"#.to_owned(),
                malformed,
            ),
            (r#"{"issuer":"https://auth.example.com"}"#.to_owned(), malformed),
            (
                below("/a").replace('}', r#","issuer":"https://evil.example"}"#),
                malformed,
            ),
            (
                below("/a").replace('}', r#","token_endpoint":"https://evil.example/t"}"#),
                malformed,
            ),
            (below("/a") + &below("/b"), malformed),
            ("[".repeat(100_000), malformed),
            ("<html>".to_owned(), malformed),
            (String::new(), malformed),
        ];
        for (body, expected) in table {
            let got = parse(body.as_bytes(), issuer).map(|d| d.token_path.len());
            assert_eq!(got, expected, "{body:.200}");
        }
        let bytes = [below("/t").as_bytes(), b"\xff"].concat();
        assert_eq!(parse(&bytes, issuer), Err(Reason::MalformedResponse));
    }
}
