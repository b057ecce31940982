//! Types that hold a key or a token show none of it in `Debug` output. `ops/telemetry.rs` caps what libraries log, and
//! `tests/it/secrecy.rs` searches all output of a running operator.

use std::fmt::Debug;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use secrecy::SecretSlice;
use serde_json::json;

use crate::api::metadata::{ANNOTATION_INSTANCE, ANNOTATION_SEND_TO};
use crate::controller::read;
use crate::domain::admin_credential;
use crate::domain::answer::{self, Expected, accept, claims};
use crate::domain::fixtures::{LIFETIME, at, facts, filled, keep_unwritten, key_file, request};
use crate::domain::key_ledger::KeyLedger;
use crate::domain::observed_secret::Wanted;
use crate::domain::plan::{Step, plan};
use crate::domain::{assertion, key};
use crate::zitadel::{Exchanged, Hosts, RequestBudget, Settings, ZitadelClient};

/// Used as the token and as the proxy's password.
const MARK: &str = "canary-that-nobody-may-see";

/// The private key in a key file, as a ledger holds it.
fn file_der(file: &str) -> Vec<u8> {
    let file: serde_json::Value = serde_json::from_str(file).expect("JSON");
    let pem = file["key"].as_str().expect("a PEM");
    let text: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    STANDARD.decode(text).expect("base64")
}

/// The secret values as text, in base64, and as the list of numbers that `Debug` prints for bytes.
fn marks() -> Vec<String> {
    let file = key_file();
    let pem = file["key"].as_str().expect("a PEM");
    let lines = pem.lines().filter(|line| line.len() > 20 && !line.starts_with('-'));
    let numbers = |text: &str| format!("{:?}", text.as_bytes()).replace(['[', ']'], "");
    let each = lines
        .chain([MARK])
        .flat_map(|m| [m.to_owned(), STANDARD.encode(m), numbers(m)]);
    let der = file_der(&file.to_string());
    each.chain([format!("{:?}", &der[100..200]).replace(['[', ']'], "")])
        .collect()
}

#[test]
fn debug_output_contains_no_secret_value() {
    let mut shown: Vec<(&str, String)> = Vec::new();
    let mut show = |name, value: &dyn Debug| shown.push((name, format!("{value:?} {value:#?}")));

    let file = key_file().to_string();
    let parsed = key::parse(file.as_bytes()).expect("a key");
    show("ServiceKey", &parsed);
    show(
        "an assertion",
        &assertion::sign(&parsed, "https://auth.example.com", at(0)),
    );

    let annotations = [
        (ANNOTATION_INSTANCE, "main"),
        (ANNOTATION_SEND_TO, "https://auth.example.com"),
    ];
    let annotations = annotations.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let spec = serde_json::from_value(json!({"issuer": "https://auth.example.com"})).expect("a spec");
    for entry in [&*file, MARK] {
        let entry = SecretSlice::from(entry.as_bytes().to_vec());
        let credential = admin_credential::read(&annotations.clone().into(), Some(&entry), "main", &spec);
        show("AdminCredential", &credential.expect("a credential"));
    }
    let der = file_der(&file);
    let mut ledger = KeyLedger::new(String::new(), "main", "https://auth.example.com", &parsed);
    ledger.begin(der.into(), at(0), None, at(0));
    show("KeyLedger, OwnKey", &ledger);
    show("data of a ledger", &ledger.data());

    let body = json!({"access_token": MARK, "token_type": "Bearer", "expires_in": LIFETIME}).to_string();
    let answer = || answer::parse(body.as_bytes()).expect("an answer");
    show("TokenAnswer", &answer());
    show(
        "Exchanged",
        &Exchanged {
            answer: answer(),
            sent: at(0),
        },
    );
    let expected = Expected {
        issuer: String::new(),
        user_id: String::new(),
        audience: ["1".to_owned()].into(),
        organization_id: None,
    };
    show("Minted", &accept(answer(), &expected, at(0)));
    show("Claims", &claims(MARK));

    let copy = json!({"kubectl.kubernetes.io/last-applied-configuration": file, "kapp.k14s.io/original": MARK});
    let secret = json!({"type": "Opaque", "metadata": {"name": "s", "annotations": copy},
        "data": {"token": STANDARD.encode(MARK), "key.json": STANDARD.encode(&file)}});
    let existing = read::observed(&secret.to_string(), &Wanted::of(None));
    assert!(existing.as_ref().is_some_and(|existing| existing.token() == Some(MARK)));
    show("ObservedSecret", &existing);
    let found = read::service_key(&secret.to_string(), Some("key.json"));
    assert!(found.as_ref().is_some_and(Result::is_ok));
    show("a key in a Secret", &found);

    let mut waiting = filled(&["invoices"]);
    keep_unwritten(&mut waiting, 0, MARK, at(0));
    assert!(waiting.key.is_ok() && !waiting.secrets.is_empty());
    show("Facts, Unwritten", &waiting);
    waiting.secrets.clear();
    let writes = plan(&waiting, at(1));
    assert!(matches!(writes.steps[0], Step::Write { .. }), "{writes:?}");
    show("Plan, Step, SecretDraft", &writes);
    show("MintRequest", &request(&mut facts(&["invoices"]), 0));

    let settings = Settings {
        name: "main".into(),
        issuer: "https://auth.example.com".into(),
        endpoint: None,
        ca: None,
        tls_server_name: None,
        proxy: Some(format!("http://me:{MARK}@proxy.example.com:3128")),
        timeout: Duration::from_secs(10),
        allow_insecure_http: false,
        budget: RequestBudget {
            per_second: 1,
            burst: 1,
            concurrent: 1,
        },
    };
    show("Settings", &settings);
    let prepared = Settings {
        proxy: None,
        ..settings
    };
    // Another test may have installed the provider already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    show(
        "ZitadelClient",
        &ZitadelClient::new(prepared, &Hosts::default()).expect("prepared"),
    );

    let marks = marks();
    for (name, text) in shown {
        for mark in &marks {
            assert!(!text.contains(mark.as_str()), "{name} shows {mark}");
        }
    }
}
