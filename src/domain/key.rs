//! ZITADEL's machine key file (zitadel.md §1): what a key Secret's entry must hold.

use jsonwebtoken::EncodingKey;
use k8s_openapi::jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use crate::domain::reason::Reason;

/// A service user's key, ready to sign with. Redacted in `Debug`, zeroized on drop (by `EncodingKey`).
#[derive(Clone, Debug)]
pub struct ServiceKey {
    /// The ZITADEL user, both `iss` and `sub` of the assertion.
    pub user_id: String,
    /// The key, `kid` of the assertion.
    pub key_id: String,
    /// When the key stops working; absent in files of servers before v2.48.
    pub expires: Option<Timestamp>,
    /// The RSA private key.
    pub signing: EncodingKey,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct KeyFile {
    #[serde(rename = "type")]
    kind: Option<String>,
    key_id: Option<String>,
    key: Option<SecretString>,
    user_id: Option<String>,
    expiration_date: Option<String>,
}

/// A key file is about 2 kB; an RSA-4096 key in PKCS#8 about 3.5 kB.
const MAX_BYTES: usize = 64 * 1024;

/// Reads a key file as ZITADEL writes it, and older ones: `type` and `expirationDate` may be missing, the PEM may be
/// PKCS#1 or PKCS#8 (zitadel.md §1.4). Whether it has expired is the planner's question.
pub fn parse(file: &[u8]) -> Result<ServiceKey, Reason> {
    if file.len() > MAX_BYTES {
        return Err(Reason::KeyInvalid);
    }
    // The parser's error could quote the file, so it is dropped.
    let file: KeyFile = serde_json::from_slice(file).map_err(|_| Reason::KeyInvalid)?;
    match file.kind.as_deref() {
        Some("application") => return Err(Reason::KeyIsApplicationKey),
        Some("serviceaccount") | None => {}
        Some(_) => return Err(Reason::KeyInvalid),
    }
    let (Some(key_id), Some(user_id), Some(key)) = (file.key_id, file.user_id, file.key) else {
        return Err(Reason::KeyInvalid);
    };
    if !is_id(&key_id) || !is_id(&user_id) {
        return Err(Reason::KeyInvalid);
    }
    let signing = EncodingKey::from_rsa_pem(key.expose_secret().as_bytes()).map_err(|_| Reason::KeyInvalid)?;
    Ok(ServiceKey {
        user_id,
        key_id,
        expires: file.expiration_date.as_deref().map(expiry).transpose()?.flatten(),
        signing,
    })
}

/// The date of a key's end. Without one ZITADEL writes `9999-12-31T23:59:59Z` (zitadel.md §1.1), which lies past the
/// last moment that jiff can count: that year is "never".
fn expiry(date: &str) -> Result<Option<Timestamp>, Reason> {
    if date.starts_with("9999-") {
        return Ok(None);
    }
    date.parse().map(Some).map_err(|_| Reason::KeyInvalid)
}

/// Ids go into JWT claims, hashes and status; a bound keeps nonsense out of all three.
fn is_id(id: &str) -> bool {
    (1..=200).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_without_an_end() {
        assert_eq!(expiry("9999-12-31T23:59:59Z"), Ok(None));
        assert_eq!(
            expiry("2026-11-25T00:00:00.5Z").map(|t| t.map(Timestamp::as_second)),
            Ok(Some(1_795_564_800))
        );
        assert_eq!(expiry("tomorrow"), Err(Reason::KeyInvalid));
    }

    #[test]
    fn files_that_are_no_machine_key_have_their_own_reason() {
        let table: &[(&str, &[u8], Reason)] = &[
            (
                "truncated",
                br#"{"type":"serviceaccount","keyId":"1""#,
                Reason::KeyInvalid,
            ),
            ("empty", b"", Reason::KeyInvalid),
            (
                "an application's",
                br#"{"type":"application","keyId":"1","key":"x","appId":"2","clientId":"3"}"#,
                Reason::KeyIsApplicationKey,
            ),
            (
                "unknown type",
                br#"{"type":"robot","keyId":"1","userId":"2","key":"x"}"#,
                Reason::KeyInvalid,
            ),
            (
                "no user",
                br#"{"type":"serviceaccount","keyId":"1","key":"x"}"#,
                Reason::KeyInvalid,
            ),
            (
                "no PEM",
                br#"{"type":"serviceaccount","keyId":"1","userId":"2","key":"x"}"#,
                Reason::KeyInvalid,
            ),
            (
                "id with a line break",
                b"{\"keyId\":\"1\\n\",\"userId\":\"2\",\"key\":\"x\"}",
                Reason::KeyInvalid,
            ),
            ("not UTF-8", b"\xff\xfe", Reason::KeyInvalid),
        ];
        for (name, file, reason) in table {
            assert_eq!(parse(file).err(), Some(*reason), "{name}");
        }
        assert_eq!(parse(&vec![b'x'; 1 << 20]).err(), Some(Reason::KeyInvalid));
    }
}
