//! Invariants for arbitrary external input. Each target is a plain function, so that `make fuzz` (tests/fuzz) runs it
//! on stable Rust, and libFuzzer runs it by hand (fuzz/README.md).

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use secrecy::{ExposeSecret, SecretSlice};
use serde_json::{Value, json};
use zitadel_tokens::domain::answer::{self, Expected, Format};
use zitadel_tokens::domain::key::{self, ServiceKey};
use zitadel_tokens::domain::reason::{Reason, Subject};
use zitadel_tokens::domain::record::Record;
use zitadel_tokens::domain::{assertion, schedule, secret_draft};
use zitadel_tokens::zitadel::discovery;

/// A target: its name, which is also the name of its seed folder, and the function to call with each input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] = &[
    ("key", key),
    ("pem", pem),
    ("der", der),
    ("answer", answer),
    ("claims", claims),
    ("discovery", discovery),
    ("template", template),
    ("duration", duration),
    ("record", record),
];

const ISSUER: &str = "https://auth.example.com";

/// The time at which all requests are sent.
fn sent() -> Timestamp {
    Timestamp::from_second(1_800_000_000).expect("in range")
}

/// The content of a key file in a Secret.
pub fn key(file: &[u8]) {
    let parsed = key::parse(file);
    let data = BTreeMap::from([("a".to_owned(), SecretSlice::from(file.to_vec()))]);
    for entry in [None, Some("a")] {
        let read = key::from_secret(None, &data, entry);
        assert_eq!(
            read.as_ref().map(|k| (&k.user_id, &k.key_id, k.expires)),
            parsed.as_ref().map(|k| (&k.user_id, &k.key_id, k.expires)),
            "the entry of a Secret is parsed differently from the file"
        );
    }
    assert_eq!(
        key::from_secret(None, &data, Some("b")).err(),
        Some(Reason::KeyEntryMissing)
    );
    match parsed {
        Err(reason) => assert_eq!(reason.subject(), Subject::Key, "{reason}"),
        Ok(key) => is_usable(&key),
    }
}

/// The field `key` of a valid key file.
pub fn pem(text: &[u8]) {
    let text = String::from_utf8_lossy(text);
    key(
        json!({"type": "serviceaccount", "keyId": "k1", "key": text, "userId": "7"})
            .to_string()
            .as_bytes(),
    );
}

/// The DER content of a PEM block, in both accepted formats.
pub fn der(bytes: &[u8]) {
    for kind in ["RSA PRIVATE KEY", "PRIVATE KEY"] {
        pem(format!(
            "-----BEGIN {kind}-----\n{}\n-----END {kind}-----\n",
            STANDARD.encode(bytes)
        )
        .as_bytes());
    }
}

/// An accepted key can sign. Its ids fit into a claim, and its `Debug` output does not show the key.
fn is_usable(key: &ServiceKey) {
    for id in [&key.user_id, &key.key_id] {
        assert!(
            (1..=200).contains(&id.len()) && id.bytes().all(|b| (b'!'..=b'~').contains(&b)),
            "{id:?}"
        );
    }
    let shown = format!("{key:?}");
    for part in key.signing.as_bytes().chunks(24).map(|part| STANDARD.encode(part)) {
        assert!(!shown.contains(&part), "the Debug output shows the key");
    }
    assert!(!shown.contains("[48, 130"), "the Debug output shows the key");
    let signed = assertion::sign(key, ISSUER, sent()).expect("a parsed key can sign");
    let claims = answer::claims(signed.expose_secret()).expect("a JWT");
    assert_eq!(claims.only_audience(), Some(ISSUER));
    assert_eq!(claims.exp, Some(sent() + SignedDuration::from_secs(60)));
}

/// The body of a token answer.
pub fn answer(body: &[u8]) {
    let Ok(parsed) = answer::parse(body) else { return };
    let (token, kind, expires_in) = (
        parsed.access_token.expose_secret().to_owned(),
        parsed.token_type.clone(),
        parsed.expires_in,
    );
    let shown = format!("{parsed:?}");
    assert!(
        shown.starts_with("TokenAnswer { access_token: SecretBox<str>([REDACTED]), "),
        "{shown}"
    );
    let minted = match answer::accept(parsed, &expected(), sent()) {
        Ok(minted) => minted,
        Err(reason) => {
            let known = [
                Reason::MalformedResponse,
                Reason::TokenMismatch,
                Reason::LifetimeTooShort,
            ];
            return assert!(known.contains(&reason), "{reason}");
        }
    };
    // RFC 6750 §2.1: clients copy the token into a header.
    assert_eq!(minted.token.expose_secret(), token);
    assert!((1..=32 * 1024).contains(&token.len()));
    assert!(
        token
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._~+/=".contains(&b))
    );
    assert!(kind.eq_ignore_ascii_case("bearer"));
    assert_eq!(minted.issued, sent());
    let lifetime = minted.expires.duration_since(minted.issued).as_secs();
    assert!((5..=31 * 86_400).contains(&lifetime), "{lifetime}");
    assert!(expires_in.is_none_or(|seconds| lifetime <= seconds));
    if let Some(claims) = payload(&token) {
        assert_eq!(Format::of(&token), Format::Jwt);
        is_expected(&claims);
        assert!(
            claims["exp"]
                .as_f64()
                .is_none_or(|exp| minted.expires.as_duration().as_secs_f64() <= exp)
        );
    }
}

/// The claims of a JWT in an otherwise valid answer.
pub fn claims(claims: &[u8]) {
    let token = format!("eyJhbGciOiJSUzI1NiJ9.{}.c2ln", URL_SAFE_NO_PAD.encode(claims));
    answer(
        json!({"access_token": token, "token_type": "Bearer", "expires_in": 43_199})
            .to_string()
            .as_bytes(),
    );
}

/// What all token requests ask for.
fn expected() -> Expected {
    Expected {
        issuer: ISSUER.into(),
        user_id: "7".into(),
        audience: BTreeSet::from(["1".to_owned(), "2".to_owned()]),
        organization_id: Some("5".into()),
    }
}

/// The payload of a JWT as a more lenient parser reads it.
fn payload(token: &str) -> Option<Value> {
    let parts: Vec<&str> = token.split('.').collect();
    let [_, payload, _] = parts[..] else { return None };
    let json = URL_SAFE_NO_PAD.decode(payload).ok()?;
    serde_json::from_slice(&json).ok().filter(Value::is_object)
}

/// An accepted JWT contains exactly what was requested, for every parser (docs/adr/0007-audience-must-be-equal.md).
fn is_expected(claims: &Value) {
    let audience = match &claims["aud"] {
        Value::Array(all) => all.iter().map(|one| one.as_str().expect("text").to_owned()).collect(),
        one => BTreeSet::from([one.as_str().expect("text").to_owned()]),
    };
    assert_eq!(claims["iss"], ISSUER);
    assert_eq!(claims["sub"], "7");
    assert_eq!(audience, expected().audience);
    assert_eq!(claims["urn:zitadel:iam:org:id"], "5");
}

/// A discovery document. It cannot redirect the operator to another host or add anything to the request
/// (docs/adr/0019-assertions-go-only-to-the-configured-host.md).
pub fn discovery(body: &[u8]) {
    match discovery::parse(body, ISSUER) {
        Ok(found) => {
            let url = reqwest::Url::parse(&format!("{ISSUER}{}", found.token_path)).expect("a URL");
            assert_eq!(
                (url.scheme(), url.host_str(), url.port()),
                ("https", Some("auth.example.com"), None)
            );
            assert_eq!(
                (url.username(), url.password(), url.query(), url.fragment()),
                ("", None, None, None)
            );
            assert!(found.token_path.len() <= 256, "too long for a status");
            // Ignored fields may hold invalid text, which a full JSON parser refuses.
            let whole = serde_json::from_slice::<Value>(body);
            assert!(whole.is_err() || whole.is_ok_and(|document| document["issuer"] == ISSUER));
        }
        Err(reason) => assert!(
            [Reason::MalformedResponse, Reason::IssuerMismatch].contains(&reason),
            "{reason}"
        ),
    }
}

/// Placeholders for values: private-use characters, which no tested template contains.
const MARKS: [char; 2] = ['\u{e000}', '\u{e001}'];

/// Input: the value of `token`, a zero byte, a template. Inserted values are never interpreted as a template.
pub fn template(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let (value, text) = text.split_once('\0').unwrap_or(("{{ issuer }}", &text));
    // A spec cannot have more placeholders (domain::validate). The search for each runs to the end of the text.
    if text.contains(MARKS) || text.matches("{{").count() > 16 {
        return;
    }
    let marked = secret_draft::render(text, &[("token", "\u{e000}"), ("issuer", "\u{e001}")]);
    let rendered = secret_draft::render(text, &[("token", value), ("issuer", "{{ token }}")]);
    let replaced = marked
        .chars()
        .fold(String::new(), |out, c| match MARKS.iter().position(|mark| *mark == c) {
            Some(0) => out + value,
            Some(_) => out + "{{ token }}",
            None => out + c.encode_utf8(&mut [0; 4]),
        });
    assert_eq!(rendered, replaced, "a value was changed or inserted in a wrong place");
    // An independent search for placeholders: each `{{` on its own.
    let named = text.match_indices("{{").any(|(start, _)| {
        let name = text[start + 2..].split_once("}}").map(|(name, _)| name.trim());
        matches!(name, Some("token" | "issuer"))
    });
    assert_eq!(
        marked.contains(MARKS),
        named,
        "a placeholder was not replaced, or other text was"
    );
    if !named {
        assert_eq!(rendered, text);
    }
    assert_eq!(secret_draft::render(text, &[]), text, "changed without any name");
}

/// A duration in a spec.
pub fn duration(text: &[u8]) {
    let text = String::from_utf8_lossy(text);
    let Some(read) = schedule::duration(&text) else {
        return;
    };
    assert!(read >= SignedDuration::ZERO);
    assert!(
        text.bytes().all(|b| b.is_ascii_digit() || b".msh".contains(&b))
            && text.starts_with(|c: char| c.is_ascii_digit())
    );
    // A duration is the sum of its parts, in any order. In a spec it has at most 32 characters.
    if text.len() > 64 {
        return;
    }
    let cuts = text
        .char_indices()
        .filter(|(i, c)| *i > 0 && c.is_ascii_digit())
        .map(|(i, _)| i);
    for (head, tail) in cuts.map(|cut| text.split_at(cut)) {
        if let (Some(a), Some(b)) = (schedule::duration(head), schedule::duration(tail)) {
            assert_eq!(a + b, read, "{head} and {tail}");
            assert_eq!(
                schedule::duration(&format!("{tail}{head}")),
                Some(read),
                "{tail} and {head}"
            );
        }
    }
}

/// The annotation with the record. A user who can edit the Secret can write any value.
pub fn record(annotation: &[u8]) {
    let annotation = String::from_utf8_lossy(annotation);
    let Some(record) = Record::parse(&annotation) else {
        return;
    };
    assert_eq!(
        Record::parse(&record.render()).as_ref(),
        Some(&record),
        "a rendered record is parsed differently"
    );
    let sealed = Record {
        v: zitadel_tokens::domain::record::VERSION,
        ..record
    }
    .sealed("a.b.c");
    assert!(sealed.vouches_for("a.b.c") && !sealed.vouches_for("a.b.d") && !sealed.vouches_for(""));
    let read = Record::parse(&sealed.render()).expect("a record");
    assert!(read.vouches_for("a.b.c"), "the seal is lost in the annotation");
    let edits: [fn(&mut Record); 7] = [
        |r| r.v += 1,
        |r| r.owner.push('x'),
        |r| r.request_hash.insert(0, 'x'),
        |r| r.template_hash.push('x'),
        |r| {
            r.issued_at = if r.issued_at == sent() {
                Timestamp::UNIX_EPOCH
            } else {
                sent()
            }
        },
        |r| {
            r.expires_at = if r.expires_at == sent() {
                Timestamp::UNIX_EPOCH
            } else {
                sent()
            }
        },
        |r| r.request = Some(r.request.take().unwrap_or_default() + "x"),
    ];
    for (place, edit) in edits.iter().enumerate() {
        let mut edited = sealed.clone();
        edit(&mut edited);
        assert!(!edited.vouches_for("a.b.c"), "edit {place} of {sealed:?}");
    }
    let rehashed = sealed.rehashed("heir", "other", "a.b.c");
    assert!(rehashed.vouches_for("a.b.c"));
    assert_eq!(
        Record {
            owner: sealed.owner.clone(),
            template_hash: sealed.template_hash.clone(),
            content: sealed.content.clone(),
            ..rehashed
        },
        sealed
    );
}
