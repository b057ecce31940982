//! What must hold for any bytes from outside. Each target is a plain function, so that the same one runs on stable in
//! `make fuzz` (tests/fuzz) and, by hand, under libFuzzer (fuzz/README.md).

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

/// A target: its name, which is also the folder of its seeds, and what is called with each input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
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

/// When all requests are sent.
fn sent() -> Timestamp {
    Timestamp::from_second(1_800_000_000).expect("in range")
}

/// A key file as it lies in a Secret.
pub fn key(file: &[u8]) {
    let parsed = key::parse(file);
    let data = BTreeMap::from([("a".to_owned(), SecretSlice::from(file.to_vec()))]);
    for entry in [None, Some("a")] {
        let read = key::from_secret(None, &data, entry);
        assert_eq!(
            read.as_ref().map(|k| (&k.user_id, &k.key_id, k.expires)),
            parsed.as_ref().map(|k| (&k.user_id, &k.key_id, k.expires)),
            "an entry is the file in it"
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

/// A key file, apart from its field `key`.
pub fn pem(text: &[u8]) {
    let text = String::from_utf8_lossy(text);
    key(
        json!({"type": "serviceaccount", "keyId": "k1", "key": text, "userId": "7"})
            .to_string()
            .as_bytes(),
    );
}

/// What a PEM encodes, in both forms that are read.
pub fn der(bytes: &[u8]) {
    for kind in ["RSA PRIVATE KEY", "PRIVATE KEY"] {
        pem(format!(
            "-----BEGIN {kind}-----\n{}\n-----END {kind}-----\n",
            STANDARD.encode(bytes)
        )
        .as_bytes());
    }
}

/// What is taken as a key signs, names its user and key in a form that fits a claim, and shows nothing of itself.
fn is_usable(key: &ServiceKey) {
    for id in [&key.user_id, &key.key_id] {
        assert!(
            (1..=200).contains(&id.len()) && id.bytes().all(|b| (b'!'..=b'~').contains(&b)),
            "{id:?}"
        );
    }
    let shown = format!("{key:?}");
    for part in key.signing.as_bytes().chunks(24).map(|part| STANDARD.encode(part)) {
        assert!(!shown.contains(&part), "the key is in its Debug");
    }
    assert!(!shown.contains("[48, 130"), "the key is in its Debug");
    let signed = assertion::sign(key, ISSUER, sent()).expect("what is no key was refused before");
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
            let known = [Reason::MalformedAnswer, Reason::TokenMismatch, Reason::LifetimeTooShort];
            return assert!(known.contains(&reason), "{reason}");
        }
    };
    // RFC 6750 §2.1: it goes into a header as it is.
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

/// The claims of a JWT in an answer that is good otherwise.
pub fn claims(claims: &[u8]) {
    let token = format!("eyJhbGciOiJSUzI1NiJ9.{}.c2ln", URL_SAFE_NO_PAD.encode(claims));
    answer(
        json!({"access_token": token, "token_type": "Bearer", "expires_in": 43_199})
            .to_string()
            .as_bytes(),
    );
}

/// What was asked for in every exchange here.
fn expected() -> Expected {
    Expected {
        issuer: ISSUER.into(),
        user_id: "7".into(),
        audience: BTreeSet::from(["1".to_owned(), "2".to_owned()]),
        organization_id: Some("5".into()),
    }
}

/// The payload of a JWT as a reader sees it that is less strict than ours.
fn payload(token: &str) -> Option<Value> {
    let parts: Vec<&str> = token.split('.').collect();
    let [_, payload, _] = parts[..] else { return None };
    let json = URL_SAFE_NO_PAD.decode(payload).ok()?;
    serde_json::from_slice(&json).ok().filter(Value::is_object)
}

/// A JWT that is taken says to every reader what was asked for, and not more (design §3.10).
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

/// A discovery document: it cannot move us to another host (design §2.1), nor put anything into the request.
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
            assert!(found.token_path.len() <= 256, "it is shown in a status");
            // What we do not take may be text that is none; a whole reader refuses it.
            let whole = serde_json::from_slice::<Value>(body);
            assert!(whole.is_err() || whole.is_ok_and(|document| document["issuer"] == ISSUER));
        }
        Err(reason) => assert!(
            [Reason::MalformedAnswer, Reason::IssuerMismatch].contains(&reason),
            "{reason}"
        ),
    }
}

/// Stand-ins for values, which no text of ours holds: characters that Unicode leaves to private use.
const MARKS: [char; 2] = ['\u{e000}', '\u{e001}'];

/// Input: the value of `token`, a zero byte, a template. What was put in is never read again.
pub fn template(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let (value, text) = text.split_once('\0').unwrap_or(("{{ issuer }}", &text));
    // More placeholders than this no spec may have (domain::validate); each is searched for to the end of the text.
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
    assert_eq!(rendered, replaced, "values are put in as they are, and nowhere else");
    // Placeholders as a reader finds them who looks at each `{{` for itself.
    let named = text.match_indices("{{").any(|(start, _)| {
        let name = text[start + 2..].split_once("}}").map(|(name, _)| name.trim());
        matches!(name, Some("token" | "issuer"))
    });
    assert_eq!(
        marked.contains(MARKS),
        named,
        "a placeholder is replaced, another text is not"
    );
    if !named {
        assert_eq!(rendered, text);
    }
    assert_eq!(secret_draft::render(text, &[]), text, "no names, no change");
}

/// A duration as a spec may have it.
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
    // It is the sum of its parts, in any order. A spec's has 32 characters at most.
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

/// The annotation with the record. Anybody may write one who may write the Secret.
pub fn record(annotation: &[u8]) {
    let annotation = String::from_utf8_lossy(annotation);
    let Some(record) = Record::parse(&annotation) else {
        return;
    };
    assert_eq!(
        Record::parse(&record.render()).as_ref(),
        Some(&record),
        "what is written is read"
    );
    let sealed = Record {
        v: zitadel_tokens::domain::record::VERSION,
        ..record
    }
    .sealed("a.b.c");
    assert!(sealed.vouches_for("a.b.c") && !sealed.vouches_for("a.b.d") && !sealed.vouches_for(""));
    let read = Record::parse(&sealed.render()).expect("a record");
    assert!(read.vouches_for("a.b.c"), "the seal holds through the annotation");
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
