//! The decision for each fact. Each row changes one thing in a Secret that the operator itself wrote.

use std::collections::BTreeMap;

use k8s_openapi::jiff::SignedDuration;
use proptest::prelude::*;
use secrecy::ExposeSecret;
use serde_json::json;

use super::*;
use crate::api::metadata::{ANNOTATION_ADOPT, ANNOTATION_RECORD, LABEL_SERVICE_USER};
use crate::api::service_user::DeletionPolicy;
use crate::domain::fixtures::{
    DUE, FRESH, LIFETIME, TEN_YEARS, allowed, apply, at, claims, clock, edit, facts, fill, filled, instance, jwt,
    keep_unwritten, observed, service_key, set_renew_request, token, user,
};
use crate::domain::observed_secret::{Controller, OWNER_KIND, WritePrecondition};
use crate::domain::retry::PendingRetry;

/// The name, the change, the seconds since the token was issued, and the expected step.
type Case = (&'static str, fn(&mut Facts), i64, &'static str);

fn describe(step: &Step) -> String {
    match step {
        Step::Keep { .. } => "keep".into(),
        Step::Refuse { reason, current: None } => reason.name().into(),
        Step::Refuse {
            reason,
            current: Some(_),
        } => format!("{reason}, fallback"),
        Step::Wait { reason, current } => format!(
            "wait, {reason}, {}",
            if current.is_some() { "fallback" } else { "nothing" }
        ),
        Step::Mint(request) if request.fallback.is_some() => "mint, fallback".into(),
        Step::Mint(_) => "mint".into(),
        Step::Write { .. } => "write".into(),
    }
}

/// Checks the step for the first token. Carrying it out must leave nothing to do, and a write must reuse an existing
/// token.
fn check(start: fn() -> Facts, cases: &[Case]) {
    for (name, change, seconds, expected) in cases {
        let mut facts = start();
        change(&mut facts);
        let step = plan(&facts, at(*seconds)).steps.swap_remove(0);
        assert_eq!(describe(&step), *expected, "{name}");
        if let Step::Write { draft, .. } = &step {
            let kept = facts.unwritten.get("invoices").map(|u| u.minted.token.expose_secret());
            let written = facts.secrets.get("invoices-token").and_then(ObservedSecret::token);
            assert_eq!(Some(draft.data["token"].expose_secret()), kept.or(written), "{name}");
            let precondition = facts
                .secrets
                .get("invoices-token")
                .map_or(WritePrecondition::Absent, ObservedSecret::precondition);
            assert_eq!(draft.precondition, precondition, "{name}: precondition");
        }
        carry_out(&mut facts, step, *seconds);
        let settled = if ["mint", "mint, fallback", "write"].contains(expected) {
            "keep"
        } else {
            expected
        };
        assert_eq!(
            describe(&plan(&facts, at(*seconds)).steps[0]),
            settled,
            "{name}: after the step"
        );
    }
}

/// Carries out the step for the first token, like `act`.
fn carry_out(facts: &mut Facts, step: Step, seconds: i64) {
    match step {
        Step::Write { draft, .. } => apply(facts, &draft),
        Step::Mint(_) => {
            let expires = at(seconds + LIFETIME);
            let value = jwt(&claims(facts, 0, expires));
            fill(facts, 0, &value, at(seconds), expires);
        }
        Step::Keep { .. } | Step::Refuse { .. } | Step::Wait { .. } => {}
    }
    facts.unwritten.clear();
}

fn one() -> Facts {
    filled(&["invoices"])
}

fn empty() -> Facts {
    facts(&["invoices"])
}

fn record(facts: &mut Facts, change: impl FnOnce(&str) -> String) {
    let annotations = &mut observed(facts, 0).annotations;
    let record = change(annotations[ANNOTATION_RECORD].expose_secret());
    annotations.insert(ANNOTATION_RECORD.into(), record.into());
}

/// Puts a JWT with one other claim into the Secret, under a record that vouches for it.
fn put_claim(facts: &mut Facts, key: &str, value: serde_json::Value) {
    let mut claims = claims(facts, 0, at(LIFETIME));
    claims[key] = value;
    fill(facts, 0, &jwt(&claims), at(0), at(LIFETIME));
}

fn put_opaque(facts: &mut Facts) {
    fill(facts, 0, "eyJh.bGci.OiJB.MjU2.R0NN", at(0), at(LIFETIME));
}

#[rustfmt::skip]
const SCOPES: [&str; 10] = [
    "openid", "profile", "email", "phone", "address", "urn:zitadel:iam:user:metadata", "urn:zitadel:iam:user:resourceowner",
    "urn:zitadel:iam:org:project:role:a_B-1.c:d", "urn:zitadel:iam:org:roles:id:a_B-1", "urn:zitadel:iam:org:domain:primary:a-B1.c",
];

#[test]
fn token_is_requested_if_missing_due_or_of_another_request_hash() {
    #[rustfmt::skip]
    let cases: &[Case] = &[
        ("fresh", |_| {}, 0, "keep"),
        ("still fresh", |_| {}, FRESH, "keep"),
        ("due", |_| {}, DUE, "mint, fallback"),
        ("in its last second", |_| {}, LIFETIME - 1, "mint, fallback"),
        ("expired", |_| {}, LIFETIME, "mint"),
        ("no Secret", |f| f.secrets.clear(), 1, "mint"),
        ("due by the spec", |f| token(f, 0).renew_before = Some("30m".into()), 1_800, "mint, fallback"),
        ("not yet by the spec", |f| token(f, 0).renew_before = Some("30m".into()), 1_400, "keep"),
        ("renewBefore beyond the lifetime", |f| token(f, 0).renew_before = Some("12h".into()), FRESH, "keep"),
        ("due by percentage", |f| token(f, 0).renew_before_percentage = Some(75), 900, "mint, fallback"),
        ("no scopes", |f| token(f, 0).scopes = Some(vec![]), 1, "mint"),
        ("another project", |f| token(f, 0).project_ids = vec!["2".into()], 1, "mint"),
        ("additional project", |f| token(f, 0).project_ids.push("2".into()), 1, "mint"),
        ("roles", |f| token(f, 0).project_roles = Some(true), 1, "mint"),
        ("every further scope of the schema", |f| token(f, 0).scopes = Some(SCOPES.map(String::from).to_vec()), 1, "mint"),
        ("another key", |f| service_key(f).key_id = "k2".into(), 1, "mint"),
        ("another user", |f| service_key(f).user_id = "8".into(), 1, "mint"),
        ("another issuer", |f| instance(f).spec.issuer = "https://b.example.com".into(), 1, "mint"),
        ("another instance", |f| user(f).spec.instance_ref.name = "b".into(), 1, "mint"),
        ("the default scope, written out", |f| token(f, 0).scopes = Some(vec!["openid".into()]), 1, "keep"),
        ("false, written out", |f| token(f, 0).project_roles = Some(false), 1, "keep"),
        ("token renamed", |f| token(f, 0).name = "bills".into(), 1, "keep"),
        ("Secret renamed", |f| token(f, 0).secret.name = "x".into(), 1, "mint"),
        ("opaque, fresh", put_opaque, FRESH, "keep"),
        ("opaque, due", put_opaque, DUE, "mint, fallback"),
        ("opaque, expired", put_opaque, LIFETIME, "mint"),
        ("opaque, another user", |f| { put_opaque(f); service_key(f).user_id = "8".into(); }, 1, "mint"),
        ("opaque, another issuer", |f| { put_opaque(f); instance(f).spec.issuer = "https://b.example.com".into(); }, 1, "mint"),
        ("opaque, another key", |f| { put_opaque(f); service_key(f).key_id = "k2".into(); }, 1, "mint"),
    ];
    check(one, cases);
    let reordered = |mut f: Facts| {
        token(&mut f, 0).project_ids.reverse();
        f
    };
    let mut both = empty();
    token(&mut both, 0).project_ids = vec!["1".into(), "2".into()];
    let value = jwt(&claims(&both, 0, at(LIFETIME)));
    fill(&mut both, 0, &value, at(0), at(LIFETIME));
    assert_eq!(
        describe(&plan(&reordered(both), at(1)).steps[0]),
        "keep",
        "the order does not matter"
    );
}

#[test]
fn edited_secret_is_repaired_and_token_is_requested_only_if_token_or_record_is_invalid() {
    #[rustfmt::skip]
    let cases: &[Case] = &[
        ("token replaced", |f| edit(observed(f, 0), |d| drop(d.insert("token".into(), b"x".into()))), 1, "mint"),
        ("token emptied", |f| edit(observed(f, 0), |d| drop(d.insert("token".into(), vec![]))), 1, "mint"),
        ("token not text", |f| edit(observed(f, 0), |d| drop(d.insert("token".into(), vec![255]))), 1, "mint"),
        ("token removed", |f| edit(observed(f, 0), |d| drop(d.remove("token"))), 1, "mint"),
        ("record removed", |f| observed(f, 0).annotations.clear(), 1, "mint"),
        ("record emptied", |f| record(f, |_| String::new()), 1, "mint"),
        ("record that is invalid", |f| record(f, |_| "{}".into()), 1, "mint"),
        ("record without a seal", |f| record(f, |r| r.replace("\"content\":\"", "\"content\":\"0")), 1, "mint"),
        ("record of an unknown version", |f| record(f, |r| r.replace("\"v\":1", "\"v\":9")), 1, "mint"),
        ("expiry edited", |f| record(f, |r| r.replace("09:00:00Z", "23:00:00Z")), 1, "mint"),
        ("expiry edited, past that time", |f| record(f, |r| r.replace("09:00:00Z", "23:00:00Z")), LIFETIME, "mint"),
        ("label changed", |f| drop(observed(f, 0).labels.insert("team".into(), "b".into())), 1, "write"),
        ("label removed", |f| drop(observed(f, 0).labels.remove(LABEL_SERVICE_USER)), 1, "write"),
        ("annotation changed", |f| drop(observed(f, 0).annotations.insert("note".into(), "c".into())), 1, "write"),
        ("templated key changed", |f| edit(observed(f, 0), |d| drop(d.insert("header".into(), vec![]))), 1, "write"),
        ("expires_at changed", |f| edit(observed(f, 0), |d| drop(d.insert("expires_at".into(), vec![]))), 1, "write"),
        ("issuer removed", |f| edit(observed(f, 0), |d| drop(d.remove("issuer"))), 1, "write"),
        ("changed and due", |f| drop(observed(f, 0).labels.remove("team")), DUE, "mint, fallback"),
        ("label added to the spec", |f| drop(token(f, 0).secret.labels.insert("x".into(), "y".into())), 1, "write"),
        ("label removed from the spec", |f| token(f, 0).secret.labels.clear(), 1, "write"),
        ("annotation removed from the spec", |f| token(f, 0).secret.annotations.clear(), 1, "write"),
        ("template key removed from the spec", |f| token(f, 0).secret.template.clear(), 1, "write"),
        ("template changed in the spec", |f| drop(token(f, 0).secret.template.insert("header".into(), "x".into())), 1, "write"),
        ("foreign label", |f| drop(observed(f, 0).labels.insert("x".into(), "y".into())), 1, "keep"),
        ("foreign annotation", |f| drop(observed(f, 0).annotations.insert("x".into(), "y".into())), 1, "keep"),
        ("foreign data", |f| edit(observed(f, 0), |d| drop(d.insert("x".into(), vec![1]))), 1, "keep"),
        ("owner removed, adopt annotation", |f| { observed(f, 0).controller = None; observed(f, 0).annotations.insert(ANNOTATION_ADOPT.into(), "billing".into()); }, 1, "write"),
    ];
    check(one, cases);
}

#[test]
fn a_rewrite_keeps_token_and_times() {
    let mut facts = one();
    let before: Record = facts.secrets["invoices-token"].record().expect("a record");
    token(&mut facts, 0)
        .secret
        .template
        .insert("all".into(), "{{ token }} {{ audience }}".into());
    let Step::Write { draft, current, .. } = plan(&facts, at(1)).steps.swap_remove(0) else {
        panic!("no write");
    };
    let after = Record::parse(&draft.annotations[ANNOTATION_RECORD]).expect("a record");
    assert_eq!(
        (before.issued_at, before.expires_at),
        (after.issued_at, after.expires_at)
    );
    assert_eq!(before.request_hash, after.request_hash);
    assert_eq!(
        (current.schedule.issued, current.schedule.expires),
        (at(0), at(LIFETIME))
    );
    let value = facts.secrets["invoices-token"].token().expect("a token");
    assert_eq!(draft.data["all"].expose_secret(), format!("{value} 1"));
}

#[test]
fn mint_request_has_scope_and_fallback() {
    let mut facts = one();
    token(&mut facts, 0).name = "bills".into();
    let Step::Mint(request) = plan(&facts, at(DUE)).steps.swap_remove(0) else {
        panic!("no mint");
    };
    assert_eq!(request.scope, "openid urn:zitadel:iam:org:project:id:1:aud");
    let fallback = request.fallback.expect("a fallback");
    assert_eq!(Some(fallback), facts.recorded(&facts.user.spec.tokens[0]));
    assert_eq!(
        (fallback.schedule.expires, fallback.format),
        (at(LIFETIME), Format::Jwt)
    );
}

#[test]
fn a_renew_request_is_served_once() {
    #[rustfmt::skip]
    let cases: &[Case] = &[
        ("new", |f| set_renew_request(f, Some("a")), 1, "mint, fallback"),
        ("new and empty", |f| set_renew_request(f, Some("")), 1, "mint, fallback"),
        ("new, token expired", |f| set_renew_request(f, Some("a")), LIFETIME, "mint"),
        ("served", |f| { set_renew_request(f, Some("a")); put_opaque(f); }, FRESH, "keep"),
        ("another", |f| { set_renew_request(f, Some("a")); put_opaque(f); set_renew_request(f, Some("b")); }, 1, "mint, fallback"),
        ("withdrawn", |f| { set_renew_request(f, Some("a")); put_opaque(f); set_renew_request(f, None); }, 1, "keep"),
        ("long and new", |f| set_renew_request(f, Some(&"\0".repeat(200 << 10))), 1, "mint, fallback"),
        ("long and served", |f| { set_renew_request(f, Some(&"\0".repeat(200 << 10))); put_opaque(f); }, FRESH, "keep"),
        ("served, label removed", |f| { set_renew_request(f, Some("a")); put_opaque(f); observed(f, 0).labels.clear(); }, 1, "write"),
    ];
    check(one, cases);
    // Kubernetes accepts 256 KiB of annotations on a Secret. The record stays small however long the renew request is.
    let mut facts = one();
    set_renew_request(&mut facts, Some(&"\0".repeat(200 << 10)));
    put_opaque(&mut facts);
    assert!(
        observed(&mut facts, 0).annotations[ANNOTATION_RECORD]
            .expose_secret()
            .len()
            < 1024
    );
}

#[test]
fn claims_of_a_jwt_must_match_whatever_its_record_says() {
    #[rustfmt::skip]
    let cases: &[Case] = &[
        ("as requested", |f| put_claim(f, "x", json!(1)), FRESH, "keep"),
        ("another issuer", |f| put_claim(f, "iss", json!("https://b.example.com")), 1, "mint"),
        ("another user", |f| put_claim(f, "sub", json!("8")), 1, "mint"),
        ("another audience", |f| put_claim(f, "aud", json!("2")), 1, "mint"),
        ("additional audience", |f| put_claim(f, "aud", json!(["1", "2"])), 1, "mint"),
        ("no audience", |f| put_claim(f, "aud", json!([])), 1, "mint"),
        ("earlier expiry, fresh", |f| put_claim(f, "exp", json!(at(600).as_second())), 300, "keep"),
        ("earlier expiry, due", |f| put_claim(f, "exp", json!(at(600).as_second())), 400, "mint, fallback"),
        ("earlier expiry, expired", |f| put_claim(f, "exp", json!(at(600).as_second())), 600, "mint"),
        ("later expiry", |f| put_claim(f, "exp", json!(at(99_999).as_second())), LIFETIME, "mint"),
        ("organization that was not requested", |f| put_claim(f, "urn:zitadel:iam:org:id", json!("5")), 1, "keep"),
        ("requested organization", |f| { token(f, 0).organization_id = Some("5".into()); put_claim(f, "urn:zitadel:iam:org:id", json!("5")); }, 1, "keep"),
        ("another organization", |f| { token(f, 0).organization_id = Some("5".into()); put_claim(f, "urn:zitadel:iam:org:id", json!("6")); }, 1, "mint"),
        ("the API's audience by its real id", |f| { with_api(f); put_claim(f, "x", json!(1)); }, 1, "keep"),
        ("the API's audience by alias", |f| { with_api(f); put_claim(f, "aud", json!(["1", "zitadel"])); }, 1, "mint"),
        ("the API's audience missing", |f| { with_api(f); put_claim(f, "aud", json!(["1"])); }, 1, "mint"),
        ("the API's audience, id not learned yet", |f| { with_api(f); put_claim(f, "x", json!(1)); f.zitadel_project_id = None; }, 1, "keep"),
    ];
    for (name, change, seconds, expected) in cases {
        let mut facts = one();
        change(&mut facts);
        assert_eq!(describe(&plan(&facts, at(*seconds)).steps[0]), *expected, "{name}");
    }
}

/// The token has the audience of the ZITADEL API, which is allowed and whose project ID is known.
fn with_api(facts: &mut Facts) {
    facts.allowed = Ok(allowed(&["1", "2"], true));
    token(facts, 0).zitadel_api = Some(true);
    facts.zitadel_project_id = Some("99".into());
}

/// Every project is allowed, except that of the ZITADEL API.
fn any_project(facts: &mut Facts) {
    facts.allowed = Ok(allowed(&["*"], false));
}

fn foreign(facts: &mut Facts, kind: &str, name: &str, uid: &str) {
    observed(facts, 0).controller = Some(Controller {
        kind: kind.into(),
        name: name.into(),
        uid: uid.into(),
    });
}

#[test]
fn missing_or_forbidden_prerequisite_refuses_the_token() {
    type Refusal = (&'static str, fn(&mut Facts), &'static str);
    // The states of the Secret that are combined with each refusal below.
    #[rustfmt::skip]
    let secrets: [fn(&mut Facts); 4] = [
        |_| {},
        |f| f.secrets.clear(),
        |f| edit(observed(f, 0), BTreeMap::clear),
        |f| keep_unwritten(f, 0, "x", at(0)),
    ];
    #[rustfmt::skip]
    let refusals: &[Refusal] = &[
        ("access withdrawn", |f| f.allowed = Ok(allowed(&[], false)), "AccessDenied"),
        ("a project not allowed", |f| token(f, 0).project_ids.push("3".into()), "AccessDenied"),
        ("the API not allowed", |f| token(f, 0).zitadel_api = Some(true), "AccessDenied"),
        ("the API's own project", |f| f.zitadel_project_id = Some("1".into()), "AccessDenied"),
        ("denied, and no key", |f| { f.allowed = Ok(allowed(&[], false)); f.key = Err(Reason::KeyNotJSON); }, "AccessDenied"),
        ("no instance", |f| f.instance = Err(Reason::InstanceMissing), "InstanceMissing"),
        ("namespace not known", |f| f.allowed = Err(Reason::NamespaceMissing), "NamespaceMissing"),
        ("operator's namespace", |f| f.in_operator_namespace = true, "OperatorNamespace"),
        ("no key", |f| f.key = Err(Reason::KeySecretMissing), "KeySecretMissing"),
        ("invalid key", |f| f.key = Err(Reason::KeyNotJSON), "KeyNotJSON"),
        ("an application's key", |f| f.key = Err(Reason::KeyIsApplicationKey), "KeyIsApplicationKey"),
        ("two scopes in one", |f| token(f, 0).scopes = Some(vec!["openid email".into()]), "InvalidSpec"),
        ("an audience among the scopes", |f| token(f, 0).scopes = Some(vec!["urn:zitadel:iam:org:project:id:3:aud".into()]), "InvalidSpec"),
        ("an audience behind a role", |f| token(f, 0).scopes = Some(vec!["urn:zitadel:iam:org:project:role:a b".into()]), "InvalidSpec"),
        ("the API's alias among the projects", |f| { token(f, 0).project_ids = vec!["zitadel".into()]; any_project(f); }, "InvalidSpec"),
        ("invalid organization", |f| token(f, 0).organization_id = Some("1:x".into()), "InvalidSpec"),
        ("two projects in one", |f| { token(f, 0).project_ids = vec!["1:aud urn:x".into()]; any_project(f); }, "InvalidSpec"),
        ("suspended", |f| user(f).spec.suspend = Some(true), "Suspended"),
        ("suspended, and denied", |f| { user(f).spec.suspend = Some(true); f.allowed = Ok(allowed(&[], false)); }, "Suspended"),
    ];
    for (name, refuse, expected) in refusals {
        for (place, secret) in secrets.iter().enumerate() {
            for seconds in [1, DUE, LIFETIME] {
                let mut facts = one();
                secret(&mut facts);
                refuse(&mut facts);
                let step = describe(&plan(&facts, at(seconds)).steps[0]);
                // Only a suspended object keeps its valid token as fallback.
                let good = *expected == "Suspended" && place % 3 == 0;
                let wanted = if good {
                    format!("{expected}, fallback")
                } else {
                    (*expected).to_owned()
                };
                assert_eq!(step, wanted, "{name}, Secret {place}");
            }
        }
    }
}

#[test]
fn foreign_secret_is_never_written() {
    #[rustfmt::skip]
    let cases: &[Case] = &[
        ("no owner", |f| { observed(f, 0).controller = None; observed(f, 0).annotations.clear(); }, 1, "SecretConflict"),
        ("owner reference removed, valid record", |f| observed(f, 0).controller = None, 1, "write"),
        ("another object's", |f| foreign(f, OWNER_KIND, "orders", "other"), 1, "SecretConflict"),
        ("another kind's", |f| foreign(f, "Certificate", "billing", "other"), 1, "SecretConflict"),
        ("an earlier object's", |f| foreign(f, OWNER_KIND, "billing", "earlier"), 1, "SecretBeingReplaced"),
        ("an earlier object's, expired", |f| foreign(f, OWNER_KIND, "billing", "earlier"), LIFETIME, "SecretBeingReplaced"),
        ("immutable", |f| observed(f, 0).immutable = true, 1, "SecretConflict"),
        ("of another type", |f| observed(f, 0).opaque = false, 1, "SecretConflict"),
        ("no owner, token unwritten", |f| { observed(f, 0).controller = None; observed(f, 0).annotations.clear(); keep_unwritten(f, 0, "x", at(0)); }, 1, "SecretConflict"),
    ];
    check(one, cases);
}

#[test]
fn expired_key_is_reported_only_when_a_token_is_due() {
    fn expire(facts: &mut Facts) {
        service_key(facts).expires = Some(at(-1));
    }
    #[rustfmt::skip]
    let cases: &[Case] = &[
        ("fresh", expire, FRESH, "keep"),
        ("fresh, changed", |f| { expire(f); observed(f, 0).labels.clear(); }, 1, "write"),
        ("fresh, renew request", |f| { expire(f); set_renew_request(f, Some("a")); }, 1, "KeyExpired, fallback"),
        ("due", expire, DUE, "KeyExpired, fallback"),
        ("expired", expire, LIFETIME, "KeyExpired"),
        ("missing", |f| { expire(f); f.secrets.clear(); }, 1, "KeyExpired"),
        ("missing, unwritten", |f| { f.secrets.clear(); keep_unwritten(f, 0, "x", at(0)); expire(f); }, 1, "write"),
        ("expires now", |f| service_key(f).expires = Some(at(DUE)), DUE, "KeyExpired, fallback"),
        ("expires in one second", |f| service_key(f).expires = Some(at(DUE + 1)), DUE, "mint, fallback"),
    ];
    check(one, cases);
}

#[test]
fn unusable_clock_is_reported_before_expiry_of_the_key() {
    fn expired_key(facts: &mut Facts) {
        service_key(facts).expires = Some(at(-1));
    }
    #[rustfmt::skip]
    let cases: &[Case] = &[
        ("fresh", |_| {}, FRESH, "keep"),
        ("fresh, changed", |f| observed(f, 0).labels.clear(), 1, "write"),
        ("due", |_| {}, DUE, "ClockSkew, fallback"),
        ("due, key expired", expired_key, DUE, "ClockSkew, fallback"),
        ("expired", |_| {}, LIFETIME, "ClockSkew"),
        ("expired, key expired", expired_key, LIFETIME, "ClockSkew"),
        ("issued in the future", |_| {}, -601, "ClockSkew"),
        ("missing", |f| f.secrets.clear(), 1, "ClockSkew"),
        ("missing, unwritten", |f| { f.secrets.clear(); keep_unwritten(f, 0, "x", at(0)); }, 1, "write"),
        ("missing, unwritten, issued in the future", |f| { f.secrets.clear(); keep_unwritten(f, 0, "x", at(602)); }, 1, "ClockSkew"),
        ("renew request", |f| set_renew_request(f, Some("a")), 1, "ClockSkew, fallback"),
        ("contested", |f| { f.secrets.clear(); f.unscheduled.insert("invoices".into(), 9); }, 1, "ClockSkew"),
        ("no key", |f| f.key = Err(Reason::KeySecretMissing), DUE, "KeySecretMissing"),
    ];
    for (name, change, seconds, expected) in cases {
        for ahead in [TEN_YEARS, -TEN_YEARS, 302, -302] {
            let mut facts = one();
            change(&mut facts);
            facts.clock = clock(ahead);
            let step = plan(&facts, facts.clock.theirs(at(*seconds))).steps.swap_remove(0);
            assert_eq!(describe(&step), *expected, "{name}, {ahead} s ahead");
        }
    }
}

#[test]
fn record_with_impossible_times_is_not_trusted() {
    #[rustfmt::skip]
    let cases: &[Case] = &[
        ("issued in ten years", |f| fill(f, 0, "x", at(TEN_YEARS), at(TEN_YEARS + LIFETIME)), 0, "mint"),
        ("issued while both clocks were ahead", |f| fill(f, 0, "x", at(599), at(LIFETIME)), 0, "keep"),
        ("for ten years", |f| fill(f, 0, "x", at(0), at(TEN_YEARS)), 0, "keep"),
        ("for ten years, after a month", |f| fill(f, 0, "x", at(0), at(TEN_YEARS)), 31 * 24 * 3_600, "mint"),
    ];
    check(one, cases);
}

#[test]
fn unwritten_token_is_written_without_a_new_request() {
    fn keep(facts: &mut Facts) {
        keep_unwritten(facts, 0, "eyJh.bGci.OiJB.MjU2.R0NN", at(0));
    }
    #[rustfmt::skip]
    let cases: &[Case] = &[
        ("fresh", keep, FRESH, "write"),
        ("under another template", |f| { keep(f); token(f, 0).secret.template.clear(); }, 1, "write"),
        ("due", keep, DUE, "mint"),
        ("another key", |f| { keep(f); service_key(f).key_id = "k2".into(); }, 1, "mint"),
        ("other scopes", |f| { keep(f); token(f, 0).scopes = Some(vec![]); }, 1, "mint"),
        ("issued for a renew request", |f| { set_renew_request(f, Some("a")); keep(f); }, 1, "write"),
        ("later renew request", |f| { keep(f); set_renew_request(f, Some("a")); }, 1, "mint"),
        ("another later renew request", |f| { set_renew_request(f, Some("a")); keep(f); set_renew_request(f, Some("b")); }, 1, "mint"),
        ("renew request withdrawn", |f| { set_renew_request(f, Some("a")); keep(f); set_renew_request(f, None); }, 1, "write"),
        ("another token's", |f| { keep(f); token(f, 0).name = "bills".into(); }, 1, "mint"),
    ];
    check(empty, cases);
    #[rustfmt::skip]
    let beside: &[Case] = &[
        ("instead of a due token", |f| keep_unwritten(f, 0, "x", at(DUE)), DUE, "write"),
        ("instead of a token with a renew request", |f| { set_renew_request(f, Some("a")); keep_unwritten(f, 0, "x", at(1)); }, 1, "write"),
        ("beside a fresh token", keep, 1, "keep"),
    ];
    check(one, beside);
}

#[test]
fn secrets_that_left_the_spec_are_deleted_unless_suspended() {
    let mut facts = one();
    facts.leftovers = vec![SecretRef {
        name: "old".into(),
        uid: "u".into(),
        resource_version: "4".into(),
    }];
    assert_eq!(plan(&facts, at(1)).deletes, facts.leftovers);
    facts.key = Err(Reason::KeySecretMissing);
    assert_eq!(
        plan(&facts, at(1)).deletes,
        facts.leftovers,
        "even if the key is missing"
    );
    user(&mut facts).spec.suspend = Some(true);
    assert_eq!(plan(&facts, at(1)).deletes, []);
    user(&mut facts).spec.suspend = Some(false);
    assert_eq!(plan(&facts, at(1)).deletes, facts.leftovers);
}

#[test]
fn renamed_secret_gets_the_existing_token() {
    fn rename(facts: &mut Facts) {
        let left = observed(facts, 0);
        facts.leftovers = vec![SecretRef {
            name: "invoices-token".into(),
            uid: left.uid.clone(),
            resource_version: left.resource_version.clone(),
        }];
        token(facts, 0).secret.name = "other-token".into();
    }
    #[rustfmt::skip]
    let rows: &[Case] = &[
        ("fresh", |_| {}, FRESH, "write"),
        ("after many unscheduled refreshes", |f| { f.unscheduled.insert("invoices".into(), 9); }, 1, "write"),
        ("due", |_| {}, DUE, "mint"),
        ("another key", |f| service_key(f).key_id = "k2".into(), 1, "mint"),
        ("other scopes", |f| token(f, 0).scopes = Some(vec![]), 1, "mint"),
        ("renew request", |f| set_renew_request(f, Some("a")), 1, "mint"),
        ("edited", |f| edit(observed(f, 0), |d| drop(d.insert("token".into(), b"x".into()))), 1, "mint"),
        ("foreign", |f| foreign(f, OWNER_KIND, "other", "u9"), 1, "mint"),
    ];
    for (name, change, seconds, expected) in rows {
        let mut facts = one();
        change(&mut facts);
        rename(&mut facts);
        let mut plan = plan(&facts, at(*seconds));
        let step = plan.steps.swap_remove(0);
        assert_eq!(describe(&step), *expected, "{name}");
        if let Step::Write { draft, .. } = step {
            assert_eq!(
                (&*draft.name, &draft.precondition, draft.repair),
                ("other-token", &WritePrecondition::Absent, false)
            );
            let old = facts.secrets["invoices-token"].token();
            assert_eq!(Some(draft.data["token"].expose_secret()), old);
        }
        assert_eq!(plan.deletes, facts.leftovers);
    }
}

#[test]
fn old_secret_stays_until_all_tokens_exist_or_its_token_has_expired() {
    let mut facts = filled(&["invoices", "old"]);
    let old = &facts.secrets["old-token"];
    facts.leftovers = vec![SecretRef {
        name: "old-token".into(),
        uid: old.uid.clone(),
        resource_version: old.resource_version.clone(),
    }];
    user(&mut facts).spec.tokens.truncate(1);
    let left = |facts: &Facts, current: Option<CurrentToken>, seconds| {
        let outcomes = [TokenOutcome::new(0, Reason::AccessDenied, current)];
        deletable(facts, &facts.leftovers, &outcomes, Some(at(seconds))).len()
    };
    let current = facts.recorded(&facts.user.spec.tokens[0]);
    assert_eq!(left(&facts, current, 1), 1);
    assert_eq!(left(&facts, None, 1), 0, "both have the same request hash");
    token(&mut facts, 0).scopes = Some(vec![]);
    assert_eq!(left(&facts, None, 1), 1, "the new Secret exists");
    foreign(&mut facts, OWNER_KIND, "other", "u9");
    assert_eq!(
        (left(&facts, None, 1), left(&facts, None, LIFETIME)),
        (0, 1),
        "the new Secret is foreign"
    );
    facts.secrets.remove("invoices-token");
    assert_eq!(
        (left(&facts, None, 1), left(&facts, None, LIFETIME)),
        (0, 1),
        "the new Secret is missing"
    );
    let outcomes = [TokenOutcome::new(0, Reason::ClockSkew, None)];
    assert_eq!(
        deletable(&facts, &facts.leftovers, &outcomes, None).len(),
        0,
        "no trusted time"
    );
    let outcomes = [TokenOutcome::new(0, Reason::Issued, current)];
    assert_eq!(
        deletable(&facts, &facts.leftovers, &outcomes, None).len(),
        1,
        "the new Secret has a token"
    );
}

#[test]
fn adopted_secret_stays_owned_after_the_annotation_is_removed() {
    let mut facts = one();
    token(&mut facts, 0).secret.deletion_policy = Some(DeletionPolicy::Retain);
    let step = plan(&facts, at(1)).steps.swap_remove(0);
    carry_out(&mut facts, step, 1);
    observed(&mut facts, 0).controller = None;
    // The object is deleted and created again.
    user(&mut facts).metadata.uid = Some("another".into());
    assert_eq!(describe(&plan(&facts, at(2)).steps[0]), "SecretConflict");
    let name = facts.name().to_owned();
    observed(&mut facts, 0)
        .annotations
        .insert(ANNOTATION_ADOPT.into(), name.into());
    let step = plan(&facts, at(2)).steps.swap_remove(0);
    assert_eq!(describe(&step), "write");
    carry_out(&mut facts, step, 2);
    observed(&mut facts, 0).controller = None;
    observed(&mut facts, 0).annotations.remove(ANNOTATION_ADOPT);
    assert_eq!(describe(&plan(&facts, at(3)).steps[0]), "keep");
}

#[test]
fn each_token_is_decided_independently() {
    type Change = (&'static str, fn(&mut Facts), &'static str);
    #[rustfmt::skip]
    let changes: &[Change] = &[
        ("missing", |f| drop(f.secrets.remove("invoices-token")), "mint"),
        ("foreign", |f| { observed(f, 0).controller = None; observed(f, 0).annotations.clear(); }, "SecretConflict"),
        ("denied", |f| token(f, 0).project_ids.push("3".into()), "AccessDenied"),
        ("malformed", |f| token(f, 0).scopes = Some(vec!["a b".into()]), "InvalidSpec"),
        ("changed", |f| observed(f, 0).labels.clear(), "write"),
        ("unwritten", |f| { f.secrets.remove("invoices-token"); keep_unwritten(f, 0, "x", at(0)); }, "write"),
    ];
    for (name, change, first) in changes {
        for (seconds, second) in [(1, "keep"), (LIFETIME, "mint")] {
            let mut facts = filled(&["invoices", "reports"]);
            change(&mut facts);
            let plan = plan(&facts, at(seconds));
            assert_eq!(plan.steps.len(), 2);
            assert_eq!(describe(&plan.steps[1]), second, "{name}");
            if seconds == 1 {
                assert_eq!(describe(&plan.steps[0]), *first, "{name}");
            }
        }
    }
}

#[test]
fn last_check_before_a_mint_uses_the_real_project_id() {
    type Row = (&'static str, fn(&mut Facts), Result<&'static [&'static str], Reason>);
    #[rustfmt::skip]
    let rows: &[Row] = &[
        ("a project", |_| {}, Ok(&["1"])),
        ("the API by number, any project allowed", |f| { any_project(f); token(f, 0).project_ids.push("99".into()); }, Err(Reason::AccessDenied)),
        ("the API by number, listed as a project", |f| { f.allowed = Ok(allowed(&["1", "2", "99"], false)); token(f, 0).project_ids.push("99".into()); }, Err(Reason::AccessDenied)),
        ("the API by number, allowed", |f| { f.allowed = Ok(allowed(&["1", "2"], true)); token(f, 0).project_ids.push("99".into()); }, Ok(&["1", "99"])),
        ("the API by alias", with_api, Ok(&["1", "99"])),
        ("pinned to the real ID", |f| instance(f).spec.zitadel_project_id = Some("99".into()), Ok(&["1"])),
        ("pinned to another ID", |f| instance(f).spec.zitadel_project_id = Some("98".into()), Err(Reason::ProjectIDMismatch)),
        ("no key", |f| f.key = Err(Reason::KeyNotJSON), Err(Reason::KeyNotJSON)),
        ("no instance", |f| f.instance = Err(Reason::InstanceMissing), Err(Reason::InstanceMissing)),
        ("no namespace", |f| f.allowed = Err(Reason::NamespaceMissing), Err(Reason::NamespaceMissing)),
    ];
    for (name, change, wanted) in rows {
        let mut facts = empty();
        change(&mut facts);
        let got = expect(&facts, &facts.user.spec.tokens[0], "99");
        let audience = got.map(|e| e.audience.into_iter().collect::<Vec<_>>());
        assert_eq!(
            audience,
            wanted.map(|ids| ids.iter().map(ToString::to_string).collect()),
            "{name}"
        );
    }
    let mut facts = empty();
    token(&mut facts, 0).organization_id = Some("5".into());
    let expected = expect(&facts, &facts.user.spec.tokens[0], "99").expect("allowed");
    assert_eq!(
        (&*expected.issuer, &*expected.user_id),
        ("https://auth.example.com", "7")
    );
    assert_eq!(expected.organization_id.as_deref(), Some("5"));
}

proptest! {
    #[test]
    fn valid_record_of_the_same_request_hash_is_refreshed_only_when_due(
        lifetime in 5_i64..2_678_400,
        now in 0.0..1.2,
        opaque: bool,
        api: bool,
        before in proptest::option::of(1_u32..=2_678_400),
        labels in proptest::collection::btree_map("example[.]com/[a-z]{1,3}", "[a-z]{0,3}", 0..3),
        drifted: bool,
    ) {
        let mut facts = empty();
        if api {
            with_api(&mut facts);
        }
        token(&mut facts, 0).renew_before = before.map(|s| format!("{s}s"));
        token(&mut facts, 0).secret.labels = labels;
        let value = if opaque { "a.b.c.d.e".to_owned() } else { jwt(&claims(&facts, 0, at(lifetime))) };
        fill(&mut facts, 0, &value, at(0), at(lifetime));
        if drifted {
            observed(&mut facts, 0).labels.clear();
        }
        let schedule = facts.schedule(&facts.user.spec.tokens[0], at(0), at(lifetime));
        let now = at(0) + SignedDuration::from_millis(lifetime * 1_000).mul_f64(now);
        let made = plan(&facts, now);
        prop_assert_eq!(format!("{made:?}"), format!("{:?}", plan(&facts, now)));
        let expected = match (now < schedule.renew, now < schedule.expires) {
            (true, _) if drifted => "write",
            (true, _) => "keep",
            (false, true) => "mint, fallback",
            (false, false) => "mint",
        };
        prop_assert_eq!(describe(&made.steps[0]), expected);
    }

    /// Anyone with access to a Secret can edit its record. No time in a record may cause a panic.
    #[test]
    fn extreme_times_in_a_record_do_not_panic(issued: i64, expires: i64, nanos in 0..1_000_000_000, now: i64, percent in 1..100) {
        let time = |s: i64| Timestamp::new(s % 377_705_023_202, nanos * i32::try_from(s.signum()).unwrap_or(0));
        let (Ok(issued), Ok(expires), Ok(now)) = (time(issued), time(expires), time(now)) else {
            return Ok(());
        };
        let far = [Timestamp::MIN, Timestamp::MAX];
        for (issued, expires) in [(issued, expires), (far[0], expires), (issued, far[1]), (far[1], far[1]), (far[0], far[0])] {
            let mut facts = empty();
            token(&mut facts, 0).renew_before_percentage = Some(percent);
            fill(&mut facts, 0, "a.b.c.d.e", issued, expires);
            let first = describe(&plan(&facts, now).steps[0]);
            prop_assert!(expires > now || first == "mint", "{}", first);
            prop_assert!(facts.recorded(&facts.user.spec.tokens[0]).is_some());
        }
    }
}

#[test]
fn failed_step_waits_for_its_backoff_and_reports_a_valid_token() {
    let pending = |reason, until| PendingRetry {
        reason,
        until: at(until),
        is_retry: true,
    };
    let mut facts = one();
    // A repair failed: the token in the Secret is still valid.
    observed(&mut facts, 0).labels.remove(LABEL_SERVICE_USER);
    let Step::Write {
        current: written,
        fallback,
        ..
    } = plan(&facts, at(1)).steps.swap_remove(0)
    else {
        panic!("no write")
    };
    assert_eq!(fallback, Some(written));
    facts
        .pending_retries
        .insert("invoices".into(), pending(Reason::SecretWriteFailed, 3));
    assert_eq!(
        describe(&plan(&facts, at(1)).steps[0]),
        "wait, SecretWriteFailed, fallback"
    );
    assert_eq!(describe(&plan(&facts, at(3)).steps[0]), "write");

    // A refresh failed, and later the request for a missing token.
    let mut facts = one();
    facts
        .pending_retries
        .insert("invoices".into(), pending(Reason::ServerError, LIFETIME));
    assert_eq!(
        describe(&plan(&facts, at(1)).steps[0]),
        "keep",
        "a fresh token needs no retry"
    );
    assert_eq!(
        describe(&plan(&facts, at(LIFETIME - 1)).steps[0]),
        "wait, ServerError, fallback"
    );
    facts.secrets.clear();
    assert_eq!(describe(&plan(&facts, at(1)).steps[0]), "wait, ServerError, nothing");
    // The backoff of one token does not defer another.
    let retry = facts.pending_retries.remove("invoices").expect("a pending retry");
    facts.pending_retries.insert("other".into(), retry);
    assert_eq!(describe(&plan(&facts, at(1)).steps[0]), "mint");
}

#[test]
fn secret_named_twice_is_refused_even_if_the_schema_allowed_it() {
    let mut facts = filled(&["a", "b"]);
    token(&mut facts, 1).secret.name = facts.user.spec.tokens[0].secret.name.clone();
    assert_eq!(
        plan(&facts, at(1)).steps.iter().map(describe).collect::<Vec<_>>(),
        ["InvalidSpec", "InvalidSpec"]
    );
    let mut facts = one();
    let key_secret = facts.user.spec.key_secret_ref.clone().expect("a reference").name;
    token(&mut facts, 0).secret.name = key_secret;
    assert_eq!(describe(&plan(&facts, at(1)).steps[0]), "InvalidSpec");
}

/// This process issued the last token, with the same request hash and with this refresh time.
fn issued_by_this_process(facts: &mut Facts, renew: i64) {
    let request_hash = observed(facts, 0).record().expect("a record").request_hash;
    facts.last_mints.insert("invoices".into(), (request_hash, at(renew)));
}

#[test]
fn unscheduled_refreshes_are_limited_and_scheduled_ones_are_not() {
    /// The change, the time of the next reconcile, and whether the refresh is unscheduled.
    type Row = (&'static str, fn(&mut Facts), i64, bool);
    let unscheduled = |facts: &Facts, seconds| match plan(facts, at(seconds)).steps.swap_remove(0) {
        Step::Mint(request) => Some(request.unscheduled),
        Step::Refuse {
            reason: Reason::SecretContested,
            ..
        } => None,
        step => panic!("{step:?}"),
    };
    #[rustfmt::skip]
    let rows: &[Row] = &[
        ("missing", |f| f.secrets.clear(), 1, true),
        ("token edited", |f| edit(observed(f, 0), BTreeMap::clear), 1, true),
        ("renew request", |f| set_renew_request(f, Some("a")), 1, true),
        ("due", |_| {}, DUE, false),
        ("due, renew request", |f| set_renew_request(f, Some("a")), DUE, false),
        ("expired", |_| {}, LIFETIME, false),
        ("another request hash", |f| token(f, 0).project_roles = Some(true), 1, false),
        ("older Secret restored", |f| issued_by_this_process(f, LIFETIME + 9), LIFETIME, true),
        ("due after a request of this process", |f| issued_by_this_process(f, DUE), DUE, false),
        ("another request hash after a request of this process", |f| { token(f, 0).project_roles = Some(true); f.last_mints.insert("invoices".into(), ("others".into(), at(DUE))); }, 1, false),
    ];
    for (name, change, seconds, is_unscheduled) in rows {
        let mut facts = one();
        change(&mut facts);
        assert_eq!(unscheduled(&facts, *seconds), Some(*is_unscheduled), "{name}");
        facts.unscheduled.insert("invoices".into(), 3);
        assert_eq!(
            unscheduled(&facts, *seconds),
            Some(*is_unscheduled),
            "{name}: at the limit"
        );
        facts.unscheduled.insert("invoices".into(), 4);
        assert_eq!(
            unscheduled(&facts, *seconds),
            (!is_unscheduled).then_some(false),
            "{name}: above the limit"
        );
    }
}

#[test]
fn retained_secret_has_no_owner_and_is_recognized_by_its_record() {
    let mut facts = one();
    token(&mut facts, 0).secret.deletion_policy = Some(DeletionPolicy::Retain);
    let Step::Write { draft, .. } = plan(&facts, at(1)).steps.swap_remove(0) else {
        panic!("no write");
    };
    assert!(draft.retained && !draft.repair);
    observed(&mut facts, 0).annotations = draft.annotations.into_iter().map(|(k, v)| (k, v.into())).collect();
    observed(&mut facts, 0).controller = None;
    assert_eq!(describe(&plan(&facts, at(1)).steps[0]), "keep");
    // An object created again under the same name has another UID and does not own the Secret.
    user(&mut facts).metadata.uid = Some("another".into());
    assert_eq!(describe(&plan(&facts, at(1)).steps[0]), "SecretConflict");
}
