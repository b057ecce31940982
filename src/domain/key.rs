//! ZITADEL's machine key file, which an entry of the key Secret contains
//! (`docs/reference/zitadel-protocol.md#key-file`): what makes it unusable before a request. `plan.rs` refuses a key that has
//! expired, and `failure.rs` recognises that ZITADEL rejected one.

use std::collections::BTreeMap;

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::KeyPair as _;
use jsonwebtoken::EncodingKey;
use k8s_openapi::jiff::Timestamp;
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use serde::Deserialize;
use serde_json::error::Category;

use crate::api::metadata::{LABEL_MANAGED_BY, MANAGER, is_ours};
use crate::domain::hash;
use crate::domain::reason::Reason;

/// A service user's key, ready to sign with. `Debug` redacts the private key, and `EncodingKey` zeroizes it on drop.
#[derive(Clone, Debug)]
pub struct ServiceKey {
    /// The ZITADEL user id: `iss` and `sub` of the assertion.
    pub user_id: String,
    /// The key id: `kid` of the assertion.
    pub key_id: String,
    /// When the key expires. Absent in files of servers before v2.48.
    pub expires: Option<Timestamp>,
    /// The RSA private key.
    pub signing: EncodingKey,
    /// A hash of the public half. Anyone can write an id into a key file, but only who has the private key has this.
    pub public_hash: String,
    /// For a key that the operator made: the id of the bootstrap key that it descends from. Tokens belong to this id, so
    /// that a rotation requests no tokens.
    pub bootstrap_id: Option<String>,
}

impl ServiceKey {
    /// The key id that a change of which requests new tokens: that of the key which a person put in.
    #[must_use]
    pub fn lineage(&self) -> &str {
        self.bootstrap_id.as_deref().unwrap_or(&self.key_id)
    }
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

/// Maximum size of a key file. A key file has about 2 kB; an RSA-4096 key in PKCS#8 has about 3.5 kB.
pub const MAX_BYTES: usize = 64 * 1024;

/// Reads the key from a Secret: from the named entry, or from the only entry if `entry` is `None`.
pub fn from_secret(
    labels: Option<&BTreeMap<String, String>>,
    data: &BTreeMap<String, SecretSlice<u8>>,
    entry: Option<&str>,
) -> Result<ServiceKey, Reason> {
    // The operator writes only token Secrets. A key in such a Secret was planted, or the next write would remove it.
    let labelled_by_us = |(key, value): (&String, &String)| is_label_of_ours(key) && (is_ours(key) || value == MANAGER);
    if labels.into_iter().flatten().any(labelled_by_us) {
        return Err(Reason::KeyIsTokenSecret);
    }
    let file = match entry {
        Some(name) => data.get(name),
        None if data.len() > 1 => return Err(Reason::KeyEntryAmbiguous),
        None => data.values().next(),
    };
    parse(file.ok_or(Reason::KeyEntryMissing)?.expose_secret())
}

/// Whether a label with this key can mark a Secret as written by the operator.
#[must_use]
pub fn is_label_of_ours(key: &str) -> bool {
    is_ours(key) || key == LABEL_MANAGED_BY
}

/// Reads a key file of any ZITADEL version: `type` and `expirationDate` may be missing, and the PEM may be PKCS#1 or
/// PKCS#8 (`docs/reference/zitadel-protocol.md#key-file`). `plan` checks whether the key has expired.
pub fn parse(file: &[u8]) -> Result<ServiceKey, Reason> {
    if file.len() > MAX_BYTES {
        return Err(Reason::KeyTooLarge);
    }
    if !file.trim_ascii_start().starts_with(b"{") {
        return Err(Reason::KeyNotJSON);
    }
    // The parser's error could quote the file, so only its category is used.
    let file: KeyFile = serde_json::from_slice(file).map_err(|error| match error.classify() {
        Category::Data => Reason::KeyFieldInvalid,
        Category::Syntax | Category::Eof | Category::Io => Reason::KeyNotJSON,
    })?;
    match file.kind.as_deref() {
        Some("application") => return Err(Reason::KeyIsApplicationKey),
        Some("serviceaccount") | None => {}
        Some(_) => return Err(Reason::KeyTypeUnknown),
    }
    let (Some(key_id), Some(user_id), Some(key)) = (file.key_id, file.user_id, file.key) else {
        return Err(Reason::KeyFieldInvalid);
    };
    if !is_id(&key_id) || !is_id(&user_id) {
        return Err(Reason::KeyFieldInvalid);
    }
    let (signing, public_hash) = signing_key(&key)?;
    Ok(ServiceKey {
        user_id,
        key_id,
        expires: file.expiration_date.as_deref().map(expiry).transpose()?.flatten(),
        signing,
        public_hash,
        bootstrap_id: None,
    })
}

/// Length of the prefix before the PKCS#1 key in the PKCS#8 form that aws-lc writes (RFC 5208 §5): the headers and the
/// algorithm `rsaEncryption`. The length is the same for all keys of 2048 to 8192 bits.
const PKCS8_HEADER: usize = 26;

/// The RSA key in a PEM block. Only aws-lc parses the DER, here and for each signature. A parser that recurses for each
/// level of nesting would overflow its stack on a crafted key, which ends the process for all tenants.
fn signing_key(text: &SecretString) -> Result<(EncodingKey, String), Reason> {
    let pem = pem::parse(text.expose_secret()).map_err(|_| Reason::KeyPEMInvalid)?;
    let tag = pem.tag().to_owned();
    let der = SecretSlice::from(pem.into_contents());
    let parsed = match tag.as_str() {
        "RSA PRIVATE KEY" => KeyPair::from_der(der.expose_secret()),
        "PRIVATE KEY" => KeyPair::from_pkcs8(der.expose_secret()),
        _ => return Err(Reason::KeyPEMInvalid),
    };
    let pair = parsed.map_err(|rejected| match rejected.description_() {
        // aws-lc requires at least 2048 bits.
        "TooSmall" => Reason::KeyTooShort,
        _ => Reason::KeyPEMInvalid,
    })?;
    encoding_key(&pair)
}

/// What signs with the key, and the hash of its public half.
fn encoding_key(pair: &KeyPair) -> Result<(EncodingKey, String), Reason> {
    let pkcs8: Pkcs8V1Der<'_> = pair.as_der().map_err(|_| Reason::KeyPEMInvalid)?;
    // `jsonwebtoken` signs with the PKCS#1 key, which follows the header.
    let pkcs1 = pkcs8.as_ref().get(PKCS8_HEADER..).unwrap_or_default();
    KeyPair::from_der(pkcs1).map_err(|_| Reason::KeyPEMInvalid)?;
    let public: PublicKeyX509Der<'_> = pair.public_key().as_der().map_err(|_| Reason::KeyPEMInvalid)?;
    Ok((EncodingKey::from_rsa_der(pkcs1), hash::of([public.as_ref()])))
}

/// Parses a key's expiration date. For a key without expiry ZITADEL writes `9999-12-31T23:59:59Z`
/// (`docs/reference/zitadel-protocol.md#key-file`), which is later than the maximum of jiff's `Timestamp`. Every date
/// in that year therefore means "never".
fn expiry(date: &str) -> Result<Option<Timestamp>, Reason> {
    if date.starts_with("9999-") {
        return Ok(None);
    }
    date.parse().map(Some).map_err(|_| Reason::KeyFieldInvalid)
}

/// A private key that the operator made, in PKCS#8 DER.
pub type PrivateKey = SecretSlice<u8>;

/// Generates an RSA key of 2048 bits, the only kind that every ZITADEL version accepts
/// (`docs/reference/zitadel-protocol.md#key-sizes-and-algorithms`). Takes up to a second of CPU time.
#[must_use]
pub fn generate() -> Option<PrivateKey> {
    let pair = KeyPair::generate(KeySize::Rsa2048).ok()?;
    let der: Pkcs8V1Der<'_> = pair.as_der().ok()?;
    Some(der.as_ref().to_vec().into())
}

/// The public half of a private key, in the form that ZITADEL accepts: PEM of the `SubjectPublicKeyInfo`
/// (`docs/reference/zitadel-protocol.md#public-keys-supplied-by-the-caller`). `None` if the private key is unreadable.
#[must_use]
pub fn public_pem(private: &PrivateKey) -> Option<String> {
    let pair = KeyPair::from_pkcs8(private.expose_secret()).ok()?;
    let der: PublicKeyX509Der<'_> = pair.public_key().as_der().ok()?;
    Some(pem::encode(&pem::Pem::new("PUBLIC KEY", der.as_ref())))
}

/// What signs with a private key that the operator made, and the hash of its public half. `None` if it is unreadable.
#[must_use]
pub fn signing(private: &PrivateKey) -> Option<(EncodingKey, String)> {
    encoding_key(&KeyPair::from_pkcs8(private.expose_secret()).ok()?).ok()
}

/// Whether an id can be part of a URL as it is. Every id that ZITADEL makes can.
#[must_use]
pub fn is_plain_id(id: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
    (1..=64).contains(&id.len()) && id.bytes().all(plain)
}

/// Ids become part of JWT claims, hashes and status, so length and characters are restricted.
fn is_id(id: &str) -> bool {
    (1..=200).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::api::metadata::LABEL_SERVICE_USER;
    use crate::domain::assertion;
    use crate::domain::fixtures::{at, key_file, pem};

    /// Names of the entries, the requested entry, the labels, and the expected reason.
    type Row<'a> = (&'a [&'a str], Option<&'a str>, BTreeMap<String, String>, Option<Reason>);

    /// A throw-away key. aws-lc does not generate keys this short.
    const SHORT: &str = include_str!("../../tests/support/rsa-1024.pem");

    /// A valid key file, modified by `change`.
    fn file(change: impl FnOnce(&mut Value)) -> Vec<u8> {
        let mut file = key_file();
        change(&mut file);
        file.to_string().into_bytes()
    }

    fn without(field: &str) -> Vec<u8> {
        file(|f| drop(f.as_object_mut().and_then(|f| f.remove(field))))
    }

    #[test]
    fn expiration_in_year_9999_means_never() {
        assert_eq!(expiry("9999-12-31T23:59:59Z"), Ok(None));
        assert_eq!(
            expiry("2026-11-25T00:00:00.5Z").map(|t| t.map(Timestamp::as_second)),
            Ok(Some(1_795_564_800))
        );
        assert_eq!(expiry("tomorrow"), Err(Reason::KeyFieldInvalid));
    }

    #[test]
    fn key_files_of_every_version_are_read() {
        let pkcs1 = pem(
            "RSA PRIVATE KEY",
            parse(&file(|_| {})).expect("a key").signing.as_bytes(),
        );
        let table: &[(&str, Vec<u8>)] = &[
            ("PKCS#8", file(|_| {})),
            ("PKCS#1, as ZITADEL writes it", file(|f| f["key"] = json!(pkcs1))),
            ("without type", without("type")),
            ("null expirationDate", file(|f| f["expirationDate"] = Value::Null)),
            (
                "expires in year 9999",
                file(|f| f["expirationDate"] = json!("9999-12-31T23:59:59Z")),
            ),
            (
                "with an additional field",
                file(|f| f["issuer"] = json!("https://auth.example.com")),
            ),
            ("indented", format!("\r\n  {:#}\n", key_file()).into_bytes()),
        ];
        for (name, file) in table {
            let key = parse(file).unwrap_or_else(|reason| panic!("{name}: {reason}"));
            assert_eq!((&*key.user_id, &*key.key_id, key.expires), ("7", "k1", None), "{name}");
            assert!(
                assertion::sign(&key, "https://auth.example.com", at(0)).is_ok(),
                "{name}"
            );
        }
    }

    #[test]
    fn invalid_key_files_have_specific_reasons() {
        let whole = file(|_| {});
        let ec = "-----BEGIN EC PRIVATE KEY-----\nMAAA\n-----END EC PRIVATE KEY-----\n";
        let public = pem("RSA PUBLIC KEY", &[0x30, 0]);
        #[rustfmt::skip]
        let table: &[(&str, Vec<u8>, Reason)] = &[
            ("a megabyte of garbage", vec![b'x'; 1 << 20], Reason::KeyTooLarge),
            ("a byte too many", file(|f| f["pad"] = json!("x".repeat(MAX_BYTES))), Reason::KeyTooLarge),
            ("empty", Vec::new(), Reason::KeyNotJSON),
            ("truncated", whole[..whole.len() / 2].to_vec(), Reason::KeyNotJSON),
            ("twice", [&whole[..], &whole[..]].concat(), Reason::KeyNotJSON),
            ("encoded twice", json!(key_file().to_string()).to_string().into_bytes(), Reason::KeyNotJSON),
            ("a list", format!("[{}]", key_file()).into_bytes(), Reason::KeyNotJSON),
            ("a bare PEM", SHORT.as_bytes().to_vec(), Reason::KeyNotJSON),
            ("not UTF-8", b"{\xff\xfe".to_vec(), Reason::KeyNotJSON),
            ("deeply nested", [b"{\"a\":".repeat(4_000), b"1".to_vec()].concat(), Reason::KeyNotJSON),
            ("no field", b"{}".to_vec(), Reason::KeyFieldInvalid),
            ("no keyId", without("keyId"), Reason::KeyFieldInvalid),
            ("no userId", without("userId"), Reason::KeyFieldInvalid),
            ("no key", without("key"), Reason::KeyFieldInvalid),
            ("a number as userId", file(|f| f["userId"] = json!(7)), Reason::KeyFieldInvalid),
            ("an object as key", file(|f| f["key"] = json!({})), Reason::KeyFieldInvalid),
            ("a list as type", file(|f| f["type"] = json!([])), Reason::KeyFieldInvalid),
            ("an empty keyId", file(|f| f["keyId"] = json!("")), Reason::KeyFieldInvalid),
            ("an id with a line break", file(|f| f["keyId"] = json!("1\n")), Reason::KeyFieldInvalid),
            ("an overlong id", file(|f| f["userId"] = json!("7".repeat(201))), Reason::KeyFieldInvalid),
            ("an invalid date", file(|f| f["expirationDate"] = json!("soon")), Reason::KeyFieldInvalid),
            ("an unknown type", file(|f| f["type"] = json!("robot")), Reason::KeyTypeUnknown),
            ("a type in capitals", file(|f| f["type"] = json!("ServiceAccount")), Reason::KeyTypeUnknown),
            ("an application key", br#"{"type":"application","keyId":"1","key":"x","appId":"2","clientId":"3"}"#.to_vec(), Reason::KeyIsApplicationKey),
            ("no PEM", file(|f| f["key"] = json!("x")), Reason::KeyPEMInvalid),
            ("a PEM with escapes", file(|f| f["key"] = json!(SHORT.replace('\n', "\\n"))), Reason::KeyPEMInvalid),
            ("an EC key", file(|f| f["key"] = json!(ec)), Reason::KeyPEMInvalid),
            ("a public key", file(|f| f["key"] = json!(public)), Reason::KeyPEMInvalid),
            ("an empty sequence", file(|f| f["key"] = json!(pem("RSA PRIVATE KEY", &[0x30, 0]))), Reason::KeyPEMInvalid),
            ("1024 bits", file(|f| f["key"] = json!(SHORT)), Reason::KeyTooShort),
        ];
        for (name, file, reason) in table {
            assert_eq!(parse(file).err(), Some(*reason), "{name}");
            assert!(reason.subject() == crate::domain::reason::Subject::Key, "{name}");
        }
    }

    /// Nested DER sequences, as deep as the size limit of a key file allows.
    fn nested() -> Vec<u8> {
        let mut der = Vec::new();
        while der.len() < 40_000 {
            let length = u16::try_from(der.len()).expect("short").to_be_bytes();
            // Written backwards: each sequence header precedes its content.
            der.extend([length[1], length[0], 0x82, 0x30]);
        }
        der.reverse();
        der
    }

    /// The PEM parser of `jsonwebtoken` recurses for each level. A stack overflow ends the process, so the key of one
    /// tenant would stop the operator for all tenants.
    #[test]
    fn deeply_nested_key_is_refused() {
        for kind in ["RSA PRIVATE KEY", "PRIVATE KEY"] {
            let file = file(|f| f["key"] = json!(pem(kind, &nested())));
            assert!(file.len() <= MAX_BYTES, "{}", file.len());
            assert_eq!(parse(&file).err(), Some(Reason::KeyPEMInvalid), "{kind}");
        }
    }

    #[test]
    fn key_entry_is_selected_by_name_or_if_it_is_the_only_one() {
        let secret = |names: &[&str]| -> BTreeMap<String, SecretSlice<u8>> {
            names
                .iter()
                .map(|n| ((*n).to_owned(), SecretSlice::from(file(|_| {}))))
                .collect()
        };
        let labels = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
        let theirs = labels(LABEL_MANAGED_BY, "Helm");
        let table: &[Row<'_>] = &[
            (&["billing.json"], None, theirs.clone(), None),
            (&["billing.json"], Some("billing.json"), theirs.clone(), None),
            (&["a", "b"], Some("b"), theirs.clone(), None),
            (&["a"], Some("b"), theirs.clone(), Some(Reason::KeyEntryMissing)),
            (&[], Some("b"), theirs.clone(), Some(Reason::KeyEntryMissing)),
            (&[], None, theirs.clone(), Some(Reason::KeyEntryMissing)),
            (&["a", "b"], None, theirs, Some(Reason::KeyEntryAmbiguous)),
            (
                &["a"],
                None,
                labels(LABEL_SERVICE_USER, "x"),
                Some(Reason::KeyIsTokenSecret),
            ),
            (
                &["a"],
                None,
                labels(LABEL_MANAGED_BY, MANAGER),
                Some(Reason::KeyIsTokenSecret),
            ),
        ];
        for (names, entry, labels, reason) in table {
            let got = from_secret(Some(labels), &secret(names), *entry);
            assert_eq!(got.err(), *reason, "{names:?} {entry:?} {labels:?}");
        }
    }
}
