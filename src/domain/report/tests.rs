//! The truth table of the report (docs/adr/0005-status-is-output-only.md). Each new status is fed back into the next
//! reconcile, as the API server would return it.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::domain::answer::Format;
use crate::domain::fixtures::{
    DUE, FRESH, LIFETIME, TEN_YEARS, at, clock, edit, filled, observed, service_key, token, user,
};
use crate::domain::plan::{Step, plan};

use Reason::{
    AccessDenied, Issued, KeyExpired, KeyRejected, KeySecretMissing, RateLimited, SecretBeingReplaced, ServerError,
    Suspended, TokenMismatch, UserInactive,
};

/// No token.
const NONE: i64 = 0;

/// An outcome. `expires` is in seconds after the issue, or [`NONE`].
fn outcome(facts: &Facts, token: usize, reason: Reason, expires: i64) -> TokenOutcome {
    let schedule = |expires| facts.schedule(&facts.user.spec.tokens[token], at(0), at(expires));
    TokenOutcome {
        token,
        reason,
        current: (expires != NONE).then(|| CurrentToken {
            schedule: schedule(expires),
            format: Format::Opaque,
        }),
        not_before: None,
        deferred: false,
        refused_by: None,
    }
}

/// Computes the report and feeds its status back through JSON. The time is never a whole second.
fn reconcile(facts: &mut Facts, seconds: i64, outcomes: &[TokenOutcome]) -> Report {
    let now = at(seconds) + SignedDuration::from_millis(700);
    let first = report(facts, outcomes, None, None, now);
    let json = serde_json::to_value(&first.status).expect("JSON");
    assert!(!json.to_string().contains(".7"), "times are whole seconds: {json}");
    user(facts).status = serde_json::from_value(json).expect("a status");
    let again = report(facts, outcomes, None, None, now);
    assert_eq!(
        Some(&again.status),
        facts.user.status.as_ref(),
        "the same facts give the same status"
    );
    assert_eq!((again.events.len(), &again.wake), (0, &first.wake));
    first
}

fn condition<'a>(status: &'a ZitadelServiceUserStatus, kind: &str) -> Option<&'a Condition> {
    status.conditions.iter().find(|c| c.type_ == kind)
}

/// The conditions in short, such as `Ready=False/KeyNotJSON Reconciling`: the status of `Ready`, the reason of
/// `UpToDate`, and the other true conditions except `KeyValid`. Checks that each reason explains the status of its
/// condition.
fn shown(status: &ZitadelServiceUserStatus) -> String {
    let ready = condition(status, "Ready").expect("Ready");
    let up_to_date = condition(status, "UpToDate").expect("UpToDate");
    match &*ready.status {
        "True" => assert_eq!(ready.reason, "Issued"),
        _ => assert_eq!(ready.reason, up_to_date.reason),
    }
    let explained = match &*up_to_date.reason {
        "Issued" => "True",
        "Suspended" => "Unknown",
        _ => "False",
    };
    assert_eq!(up_to_date.status, explained, "{up_to_date:?}");
    let mut shown = format!("Ready={}/{}", ready.status, up_to_date.reason);
    for c in status
        .conditions
        .iter()
        .filter(|c| !["Ready", "UpToDate", "KeyValid"].contains(&c.type_.as_str()))
    {
        assert_eq!(
            (&*c.status, &c.reason, &c.message),
            ("True", &ready.reason, &ready.message)
        );
        shown = format!("{shown} {}", c.type_);
    }
    for c in &status.conditions {
        assert_eq!(c.observed_generation, status.observed_generation);
    }
    shown
}

/// The time, the reason, the expiry of the current token, and the expected conditions.
type Look = (i64, Reason, i64, &'static str);

#[test]
fn truth_table_of_one_token() {
    #[rustfmt::skip]
    let rows: &[(&str, &[Look])] = &[
        ("valid", &[(0, Issued, LIFETIME, "Ready=True/Issued")]),
        ("valid, and its refresh fails", &[
            (DUE, ServerError, LIFETIME, "Ready=True/ServerError"),
            (DUE + 600, KeyRejected, LIFETIME, "Ready=True/KeyRejected"),
            (LIFETIME - 1, TokenMismatch, LIFETIME, "Ready=True/TokenMismatch"),
            (DUE + 700, Issued, LIFETIME * 2, "Ready=True/Issued"),
        ]),
        ("expires while its refresh fails transiently", &[
            (DUE, ServerError, LIFETIME, "Ready=True/ServerError"),
            (LIFETIME, ServerError, NONE, "Ready=False/ServerError Reconciling"),
            (LIFETIME * 9, ServerError, NONE, "Ready=False/ServerError Reconciling"),
        ]),
        ("expires while its refresh fails permanently", &[
            (DUE, KeyRejected, LIFETIME, "Ready=True/KeyRejected"),
            (LIFETIME, KeyRejected, LIFETIME, "Ready=False/KeyRejected Stalled"),
        ]),
        ("a dependency is created late", &[
            (0, KeySecretMissing, NONE, "Ready=False/KeySecretMissing Reconciling"),
            (299, KeySecretMissing, NONE, "Ready=False/KeySecretMissing Reconciling"),
            (299, Issued, LIFETIME, "Ready=True/Issued"),
        ]),
        ("a dependency is never created", &[
            (0, KeySecretMissing, NONE, "Ready=False/KeySecretMissing Reconciling"),
            (300, KeySecretMissing, NONE, "Ready=False/KeySecretMissing Stalled"),
            (9_999, AccessDenied, NONE, "Ready=False/AccessDenied Stalled"),
            (9_999, ServerError, NONE, "Ready=False/ServerError Reconciling"),
            (9_999, Issued, 99_999, "Ready=True/Issued"),
            (10_000, KeySecretMissing, NONE, "Ready=False/KeySecretMissing Reconciling"),
        ]),
        ("access withdrawn from a valid token", &[
            (0, Issued, LIFETIME, "Ready=True/Issued"),
            (1, AccessDenied, NONE, "Ready=False/AccessDenied Reconciling"),
            (301, AccessDenied, NONE, "Ready=False/AccessDenied Stalled"),
        ]),
        ("an earlier object's Secret", &[
            (0, SecretBeingReplaced, NONE, "Ready=False/SecretBeingReplaced Reconciling"),
            (9_999, SecretBeingReplaced, NONE, "Ready=False/SecretBeingReplaced Reconciling"),
        ]),
        ("suspended, valid and then expired", &[
            (0, Suspended, LIFETIME, "Ready=True/Suspended"),
            (LIFETIME, Suspended, LIFETIME, "Ready=False/Suspended"),
        ]),
        ("suspended without a token", &[(0, Suspended, NONE, "Ready=False/Suspended")]),
        ("suspended while stalled", &[
            (0, AccessDenied, NONE, "Ready=False/AccessDenied Reconciling"),
            (300, AccessDenied, NONE, "Ready=False/AccessDenied Stalled"),
            (301, Suspended, NONE, "Ready=False/Suspended"),
            (400, AccessDenied, NONE, "Ready=False/AccessDenied Reconciling"),
        ]),
    ];
    for (name, reconciles) in rows {
        let mut facts = filled(&["invoices"]);
        for (seconds, reason, expires, expected) in *reconciles {
            let outcome = outcome(&facts, 0, *reason, *expires);
            let report = reconcile(&mut facts, *seconds, &[outcome]);
            assert_eq!(shown(&report.status), *expected, "{name} at {seconds}");
        }
    }
}

#[test]
fn worst_token_decides_and_the_first_in_the_spec_breaks_ties() {
    type Row = (
        &'static str,
        [(Reason, i64); 3],
        &'static str,
        &'static str,
        &'static str,
    );
    #[rustfmt::skip]
    let rows: &[Row] = &[
        ("all valid", [(Issued, 9), (Issued, 9), (Issued, 9)], "Ready=True/Issued", "3/3", "Every token Secret"),
        ("one missing", [(Issued, 9), (Issued, 9), (ServerError, 0)], "Ready=False/ServerError Reconciling", "2/3", "`c`"),
        ("missing before failing", [(KeyRejected, 9), (Issued, 9), (ServerError, 0)], "Ready=False/ServerError Reconciling", "2/3", "`c`"),
        ("failing before valid", [(Issued, 9), (RateLimited, 9), (Issued, 9)], "Ready=True/RateLimited", "3/3", "`b`"),
        ("two fail", [(Issued, 9), (RateLimited, 9), (KeyRejected, 9)], "Ready=True/RateLimited", "3/3", "`b`"),
        ("two missing", [(Issued, 9), (AccessDenied, 0), (ServerError, 0)], "Ready=False/AccessDenied Reconciling", "1/3", "`b`"),
        ("all missing", [(ServerError, 0), (AccessDenied, 0), (ServerError, 0)], "Ready=False/ServerError Reconciling", "0/3", "`a`"),
        ("expired and failing", [(Issued, 9), (ServerError, 1), (Issued, 9)], "Ready=False/ServerError Reconciling", "2/3", "`b`"),
        ("suspended, one expired", [(Suspended, 9), (Suspended, 1), (Suspended, 9)], "Ready=False/Suspended", "2/3", "`b`"),
    ];
    for (name, outcomes, expected, ready, message) in rows {
        let mut facts = filled(&["a", "b", "c"]);
        let each = outcomes.iter().enumerate();
        let outcomes: Vec<_> = each.map(|(i, (r, expires))| outcome(&facts, i, *r, *expires)).collect();
        let status = reconcile(&mut facts, 1, &outcomes).status;
        assert_eq!(shown(&status), *expected, "{name}");
        assert_eq!(status.tokens_ready.as_deref(), Some(*ready), "{name}");
        let messages: String = ["Ready", "UpToDate"]
            .map(|kind| condition(&status, kind).expect("a condition").message.clone())
            .concat();
        assert!(messages.contains(message), "{name}: {messages}");
    }
}

#[test]
fn each_token_has_its_status_entry() {
    let mut facts = filled(&["a", "b"]);
    service_key(&mut facts).expires = Some(at(9_999) + SignedDuration::from_millis(700));
    let outcomes = [outcome(&facts, 0, Issued, 9_000), outcome(&facts, 1, ServerError, NONE)];
    let status = reconcile(&mut facts, 1, &outcomes).status;
    assert_eq!(status.observed_generation, Some(3));
    assert_eq!(
        (status.user_id.as_deref(), status.key_id.as_deref()),
        (Some("7"), Some("k1"))
    );
    assert_eq!(status.key_expires_at, Some(Time(at(9_999))));
    assert_eq!(status.expires_at, Some(Time(at(LIFETIME))), "the earliest");
    let [a, b] = &status.tokens[..] else {
        panic!("{:?}", status.tokens)
    };
    assert_eq!(
        (&*a.name, &*a.secret_name, a.reason.as_deref()),
        ("a", "a-token", Some("Issued"))
    );
    assert_eq!((a.lifetime_seconds, a.format.as_deref()), (Some(9_000), Some("Opaque")));
    assert_eq!(
        (&a.issued_at, &a.expires_at),
        (&Some(Time(at(0))), &Some(Time(at(9_000))))
    );
    assert!(a.renew_at > Some(Time(at(5_000))) && a.failing_since.is_none());
    // The outcome has no current token, so the status describes the recorded token in the Secret.
    assert_eq!(
        (b.expires_at.clone(), b.format.as_deref()),
        (Some(Time(at(LIFETIME))), Some("JWT"))
    );
    assert_eq!(b.failing_since, Some(Time(at(1))));
    // The status does not describe a token that was edited.
    edit(observed(&mut facts, 1), |data| {
        data.insert("token".into(), b"x".into());
    });
    let status = reconcile(&mut facts, 2, &outcomes).status;
    assert_eq!((&status.tokens[1].expires_at, &status.tokens[1].format), (&None, &None));
    assert_eq!(status.expires_at, Some(Time(at(9_000))));
    facts.key = Err(KeySecretMissing);
    let status = reconcile(&mut facts, 3, &outcomes).status;
    assert_eq!(
        (status.user_id, status.key_id, status.key_expires_at),
        (None, None, None)
    );
}

#[test]
fn failing_since_is_set_at_the_first_failure_and_removed_on_success() {
    let mut facts = filled(&["a", "b"]);
    let mut since = |seconds, a: Reason, b: Reason| {
        let outcomes = [outcome(&facts, 0, a, 99_999), outcome(&facts, 1, b, 99_999)];
        let status = reconcile(&mut facts, seconds, &outcomes).status;
        status
            .tokens
            .iter()
            .map(|t| t.failing_since.as_ref().map(|t| t.0))
            .collect::<Vec<_>>()
    };
    assert_eq!(since(1, Issued, Issued), [None, None]);
    assert_eq!(since(2, ServerError, Issued), [Some(at(2)), None]);
    assert_eq!(since(3, KeyRejected, RateLimited), [Some(at(2)), Some(at(3))]);
    assert_eq!(since(4, Issued, RateLimited), [None, Some(at(3))]);
    assert_eq!(since(5, ServerError, Suspended), [Some(at(5)), None]);
    // A time in the future, from another clock or a manual edit of the status, must not delay `Stalled` forever.
    for odd in [at(7), Timestamp::MAX] {
        let mut facts = filled(&["a"]);
        let outcomes = [outcome(&facts, 0, KeyRejected, NONE)];
        reconcile(&mut facts, 5, &outcomes);
        user(&mut facts).status.as_mut().expect("a status").tokens[0].failing_since = Some(Time(odd));
        let status = reconcile(&mut facts, 6, &outcomes).status;
        assert_eq!(status.tokens[0].failing_since, Some(Time(at(6))));
    }
}

#[test]
fn five_minutes_until_stalled_restart_with_a_new_generation() {
    let mut facts = filled(&["a"]);
    let outcomes = [outcome(&facts, 0, KeySecretMissing, NONE)];
    reconcile(&mut facts, 0, &outcomes);
    assert_eq!(
        shown(&reconcile(&mut facts, 300, &outcomes).status),
        "Ready=False/KeySecretMissing Stalled"
    );
    // A rollout names another key whose Secret does not exist yet (docs/adr/0005-status-is-output-only.md).
    user(&mut facts).metadata.generation = Some(4);
    let report = reconcile(&mut facts, 400, &outcomes);
    assert_eq!(shown(&report.status), "Ready=False/KeySecretMissing Reconciling");
    assert_eq!(report.status.observed_generation, Some(4));
    assert_eq!(report.wake.at, Some(at(700)));
    assert_eq!(
        shown(&reconcile(&mut facts, 699, &outcomes).status),
        "Ready=False/KeySecretMissing Reconciling"
    );
    assert_eq!(
        shown(&reconcile(&mut facts, 700, &outcomes).status),
        "Ready=False/KeySecretMissing Stalled"
    );
}

#[test]
fn transition_time_changes_only_with_the_status_value() {
    let mut facts = filled(&["a"]);
    let mut times = |seconds, reason, expires| {
        let outcomes = [outcome(&facts, 0, reason, expires)];
        let status = reconcile(&mut facts, seconds, &outcomes).status;
        let time = |kind| condition(&status, kind).map(|c| c.last_transition_time.0.as_second() - at(0).as_second());
        (time("Ready"), time("Reconciling"), time("Stalled"), time("KeyValid"))
    };
    assert_eq!(times(1, Issued, LIFETIME), (Some(1), None, None, Some(1)));
    assert_eq!(
        times(2, ServerError, LIFETIME),
        (Some(1), None, None, Some(1)),
        "another reason"
    );
    assert_eq!(times(3, AccessDenied, NONE), (Some(3), Some(3), None, Some(1)));
    assert_eq!(times(4, KeyRejected, NONE), (Some(3), Some(3), None, Some(4)));
    assert_eq!(times(302, KeyRejected, NONE), (Some(3), None, Some(302), Some(4)));
    assert_eq!(times(303, Issued, LIFETIME), (Some(303), None, None, Some(303)));
    assert_eq!(times(304, AccessDenied, NONE), (Some(304), Some(304), None, Some(303)));
    // Foreign entries in the status are removed.
    let status = user(&mut facts).status.as_mut().expect("a status");
    let mut foreign = status.conditions[0].clone();
    foreign.type_ = "Foreign".into();
    status.conditions.push(foreign);
    status.tokens.push(TokenStatus::default());
    let status = reconcile(&mut facts, 305, &[outcome(&filled(&["a"]), 0, Issued, LIFETIME)]).status;
    assert_eq!((status.conditions.len(), status.tokens.len()), (3, 1));
}

#[test]
fn renew_request_is_handled_when_every_token_was_refreshed_for_it() {
    let mut facts = filled(&["a", "b"]);
    let mut handled = |request: Option<&str>, second: Reason| {
        let annotation = crate::api::metadata::ANNOTATION_RENEW_REQUEST.to_owned();
        let annotations = request.map(|request| BTreeMap::from([(annotation, request.to_owned())]));
        user(&mut facts).metadata.annotations = annotations;
        let outcomes = [
            outcome(&facts, 0, Issued, LIFETIME),
            outcome(&facts, 1, second, LIFETIME),
        ];
        reconcile(&mut facts, 1, &outcomes).status.last_handled_renew_request
    };
    assert_eq!(handled(None, Issued), None);
    assert_eq!(handled(Some("1"), ServerError), None);
    assert_eq!(handled(Some("1"), Issued).as_deref(), Some("1"));
    assert_eq!(handled(Some("2"), ServerError).as_deref(), Some("1"));
    assert_eq!(
        handled(None, Issued).as_deref(),
        Some("1"),
        "a request that was withdrawn"
    );
    assert_eq!(handled(Some("2"), Suspended).as_deref(), Some("1"));
    assert_eq!(handled(Some("2"), Issued).as_deref(), Some("2"));
}

#[test]
fn key_valid_condition() {
    type Row = (Result<Option<i64>, Reason>, [Reason; 2], &'static str);
    #[rustfmt::skip]
    let rows: &[Row] = &[
        (Ok(None), [Issued, Issued], "True/KeyUsable"),
        (Ok(None), [Issued, ServerError], "True/KeyUsable"),
        (Ok(None), [Issued, KeyRejected], "False/KeyRejected"),
        (Ok(None), [UserInactive, KeyRejected], "False/UserInactive"),
        (Ok(Some(2)), [Issued, Issued], "True/KeyExpiresWithin7Days"),
        (Ok(Some(1)), [Issued, Issued], "False/KeyExpired"),
        (Ok(Some(1)), [Issued, KeyExpired], "False/KeyExpired"),
        (Ok(None), [Suspended, Suspended], "True/KeyUsable"),
        (Err(KeySecretMissing), [KeySecretMissing, SecretBeingReplaced], "False/KeySecretMissing"),
        (Err(Reason::KeyIsApplicationKey), [Suspended, Suspended], "False/KeyIsApplicationKey"),
    ];
    for (key, [a, b], expected) in rows {
        let mut facts = filled(&["a", "b"]);
        match key {
            Ok(expires) => service_key(&mut facts).expires = expires.map(at),
            Err(reason) => facts.key = Err(*reason),
        }
        let outcomes = [outcome(&facts, 0, *a, 9), outcome(&facts, 1, *b, 9)];
        let status = reconcile(&mut facts, 1, &outcomes).status;
        let key = condition(&status, "KeyValid").expect("KeyValid");
        assert_eq!(format!("{}/{}", key.status, key.reason), *expected);
    }
}

#[test]
fn owner_is_warned_before_the_key_expires() {
    const DAY: i64 = 24 * 3_600;
    let mut facts = filled(&["a"]);
    service_key(&mut facts).expires = Some(at(31 * DAY));
    let issued = [outcome(&facts, 0, Issued, 9)];
    let warnings = |report: &Report| {
        let warnings = report.events.iter().filter(|event| event.warning);
        warnings.map(|event| event.reason).collect::<Vec<_>>()
    };
    for (day, expected, warning) in [
        (0, "True/KeyUsable", None),
        (1, "True/KeyExpiresWithin30Days", Some(Reason::KeyExpiresWithin30Days)),
        (2, "True/KeyExpiresWithin30Days", None),
        (24, "True/KeyExpiresWithin7Days", Some(Reason::KeyExpiresWithin7Days)),
        (30, "True/KeyExpiresWithin7Days", None),
        (31, "False/KeyExpired", None),
    ] {
        let report = reconcile(&mut facts, day * DAY, &issued);
        let key = condition(&report.status, "KeyValid").expect("KeyValid");
        assert_eq!(format!("{}/{}", key.status, key.reason), expected, "{day}");
        assert_eq!(warnings(&report), Vec::from_iter(warning), "{day}");
    }
    // The operator replaces a key that it rotates on schedule.
    let rotation = Progress::new(Reason::KeyRotationOnSchedule);
    let report = report(&facts, &issued, Some(&rotation), None, at(30 * DAY));
    assert_eq!(
        condition(&report.status, "KeyValid").map(|key| &*key.reason),
        Some("KeyUsable")
    );
}

#[test]
fn rotation_has_conditions_events_and_a_retry_of_its_own() {
    let mut facts = filled(&["a"]);
    let issued = [outcome(&facts, 0, Issued, 9)];
    let mut shown = |reason, next| {
        let rotation = Progress {
            next,
            ..Progress::new(reason)
        };
        let report = report(&facts, &issued, Some(&rotation), None, at(9));
        let user = user(&mut facts);
        user.status = Some(report.status.clone());
        let rotated = condition(&report.status, "KeyRotated").expect("KeyRotated");
        let ready = condition(&report.status, "Ready").expect("Ready");
        let events: Vec<Reason> = report.events.iter().map(|event| event.reason).collect();
        let failed: Vec<String> = report.wake.failed.iter().map(|failed| failed.what.clone()).collect();
        assert_eq!(ready.status, "True", "a rotation does not concern the tokens");
        (
            format!("{}/{}", rotated.status, rotated.reason),
            events,
            report.wake.at,
            failed,
        )
    };
    let (condition, _, at_next, failed) = shown(Reason::KeyRotationOnSchedule, Some(at(1)));
    assert_eq!(
        (&*condition, at_next, failed.len()),
        ("True/KeyRotationOnSchedule", Some(at(1)), 0)
    );
    let (condition, events, _, failed) = shown(Reason::KeyManagementForbidden, None);
    assert_eq!(condition, "False/KeyManagementForbidden");
    assert_eq!(
        (events, failed),
        (vec![Reason::KeyManagementForbidden], vec!["keyRotation".to_owned()])
    );
    // Once for each reason, and not for what ends by itself.
    assert_eq!(shown(Reason::KeyManagementForbidden, None).1, []);
    assert_eq!(shown(Reason::KeyRotationInProgress, None).1, []);
    assert_eq!(shown(Reason::Suspended, None).0, "Unknown/Suspended");
}

#[test]
fn unusable_clock_expires_no_key_and_sets_no_stalled() {
    let mut facts = filled(&["a"]);
    service_key(&mut facts).expires = Some(at(1));
    let denied = [outcome(&facts, 0, AccessDenied, NONE)];
    reconcile(&mut facts, 1, &denied);
    facts.clock = clock(TEN_YEARS);
    let report = reconcile(&mut facts, LIFETIME, &denied);
    assert_eq!(shown(&report.status), "Ready=False/AccessDenied Reconciling");
    let key = condition(&report.status, "KeyValid").expect("KeyValid");
    assert_eq!((&*key.status, &*key.reason), ("False", "ClockSkew"));
    assert_eq!(report.wake.at, None, "no time to wait for");
    facts.clock = clock(0);
    let report = reconcile(&mut facts, LIFETIME, &denied);
    assert_eq!(shown(&report.status), "Ready=False/AccessDenied Stalled");
}

#[test]
fn token_issued_in_the_future_is_not_ready() {
    let mut facts = filled(&["a"]);
    let good = [outcome(&facts, 0, Reason::ClockSkew, LIFETIME)];
    for (seconds, expected) in [
        (-599, "Ready=True/ClockSkew"),
        (-602, "Ready=False/ClockSkew Reconciling"),
    ] {
        assert_eq!(shown(&reconcile(&mut facts, seconds, &good).status), expected);
    }
}

#[test]
fn invalid_spec_message_names_the_field() {
    let mut facts = filled(&["a", "b"]);
    token(&mut facts, 1).organization_id = Some("1:x".into());
    let refused = [
        outcome(&facts, 0, Issued, LIFETIME),
        outcome(&facts, 1, Reason::InvalidSpec, NONE),
    ];
    let report = reconcile(&mut facts, 1, &refused);
    let ready = condition(&report.status, "Ready").expect("Ready");
    let event = report.events.iter().find(|e| e.warning).expect("a warning");
    for text in [&ready.message, &event.text] {
        assert!(
            text.contains("spec.tokens[1].organizationID: an id must have 1 to 64"),
            "{text}"
        );
        assert!(
            text.contains(Reason::InvalidSpec.remedy()) && !text.contains("1:x"),
            "{text}"
        );
    }
}

/// The API server rejects an Event whose note is longer than 1024 bytes.
#[test]
fn disallowed_metadata_key_is_named_in_condition_and_event() {
    let mut facts = filled(&["a"]);
    let key = format!("{}/{}", "p".repeat(253), "n".repeat(63));
    let first = token(&mut facts, 0);
    first.name = "t".repeat(63);
    first.secret.annotations.insert(key.clone(), String::new());
    let refused = [outcome(&facts, 0, Reason::InvalidSpec, NONE)];
    let report = reconcile(&mut facts, 1, &refused);
    let ready = condition(&report.status, "Ready").expect("Ready");
    for text in [&ready.message, &report.events[0].text] {
        let expected = format!("spec.tokens[0].secret.annotations: `{key}` is not among the keys");
        assert!(text.contains(&expected) && text.len() <= 1024, "{text}");
    }
}

#[test]
fn events_report_changes_only() {
    let mut facts = filled(&["a", "b"]);
    let mut events = |a: Reason, b: Reason| -> Vec<(bool, Reason)> {
        let outcomes = [outcome(&facts, 0, a, LIFETIME), outcome(&facts, 1, b, LIFETIME)];
        let events = reconcile(&mut facts, 1, &outcomes).events;
        assert!(events.iter().all(|e| e.text.contains("`a`") || e.text.contains("`b`")));
        events.iter().map(|e| (e.warning, e.reason)).collect()
    };
    assert_eq!(
        events(Issued, KeySecretMissing),
        [(false, Issued), (true, KeySecretMissing)]
    );
    assert_eq!(events(Issued, KeySecretMissing), []);
    assert_eq!(events(Issued, AccessDenied), [(true, AccessDenied)]);
    assert_eq!(events(ServerError, Issued), [(true, ServerError), (false, Issued)]);
    assert_eq!(events(Suspended, Suspended), [(false, Suspended), (false, Suspended)]);
    assert_eq!(events(Issued, Suspended), [(false, Issued)]);
}

/// The retry class with the shortest backoff among the failures.
fn class(wake: &Wake) -> Option<Retry> {
    wake.failed.iter().map(|f| f.reason.retry()).max()
}

#[test]
fn next_reconcile_after_failures() {
    /// The outcomes of two tokens (reason, expiry of the current token, earliest retry), then the expected time, retry
    /// class and earliest retry.
    type Row = (
        &'static str,
        [(Reason, i64, i64); 2],
        Option<i64>,
        Option<Retry>,
        Option<i64>,
    );
    #[rustfmt::skip]
    let rows: &[Row] = &[
        ("a key missing", [(KeySecretMissing, 0, 0), (KeySecretMissing, 0, 0)], Some(301), Some(Retry::Permanent), None),
        ("an outage from the start", [(ServerError, 0, 0), (ServerError, 0, 0)], None, Some(Retry::Transient), None),
        ("an outage, both valid", [(ServerError, 50, 0), (ServerError, 40, 0)], Some(40), Some(Retry::Transient), None),
        ("an outage, one expired", [(ServerError, 50, 0), (ServerError, 1, 0)], Some(50), Some(Retry::Transient), None),
        ("key rejected, both valid", [(KeyRejected, 5_000, 0), (KeyRejected, 4_000, 0)], Some(4_000), Some(Retry::Eventual), None),
        ("the shorter backoff", [(AccessDenied, 0, 0), (ServerError, 50, 0)], Some(50), Some(Retry::Transient), None),
        ("retry-after", [(RateLimited, 50, 30), (RateLimited, 50, 20)], Some(50), Some(Retry::Transient), Some(30)),
        ("retry-after without a failure", [(Suspended, 50, 30), (Suspended, 0, 0)], Some(50), None, None),
        ("suspended", [(Suspended, 50, 0), (Suspended, 40, 0)], Some(40), None, None),
        ("suspended, no valid token", [(Suspended, 0, 0), (Suspended, 1, 0)], None, None, None),
    ];
    for (name, outcomes, at_, retry, not_before) in rows {
        let mut facts = filled(&["a", "b"]);
        let each = outcomes
            .iter()
            .enumerate()
            .map(|(i, (reason, expires, not_before))| TokenOutcome {
                not_before: (*not_before > 0).then(|| at(*not_before)),
                ..outcome(&facts, i, *reason, *expires)
            });
        let outcomes: Vec<_> = each.collect();
        let wake = reconcile(&mut facts, 1, &outcomes).wake;
        let not_befores = wake.failed.iter().filter_map(|f| f.not_before);
        assert_eq!(
            (wake.at, not_befores.max()),
            (at_.map(at), not_before.map(at)),
            "{name}"
        );
        assert_eq!(class(&wake), *retry, "{name}");
    }
}

#[test]
fn next_reconcile_is_at_the_refresh_time() {
    let mut facts = filled(&["a", "b"]);
    let due = |facts: &Facts, i: usize| facts.schedule(&facts.user.spec.tokens[i], at(0), at(LIFETIME)).renew;
    let (a, b) = (due(&facts, 0), due(&facts, 1));
    let both = |facts: &Facts, b| [outcome(facts, 0, Issued, LIFETIME), outcome(facts, 1, b, LIFETIME)];
    let outcomes = both(&facts, Issued);
    let wake = reconcile(&mut facts, 1, &outcomes).wake;
    assert_eq!(
        wake,
        Wake {
            at: Some(a.min(b)),
            ..Wake::default()
        }
    );
    assert!(a.min(b) > at(FRESH));
    // The backoff schedules the failing token. The valid token is still reconciled at its refresh time.
    let outcomes = both(&facts, ServerError);
    let wake = reconcile(&mut facts, 1, &outcomes).wake;
    assert_eq!(wake.at, Some(a));
    let at_the_latest = |not_after| Failed {
        not_after,
        ..Failed::now("b", ServerError)
    };
    assert_eq!(wake.failed, [at_the_latest(Some(b))]);
    // A backoff does not outlast a valid token: retries become more frequent near its expiry. Without one there is no
    // limit.
    let outcomes = both(&facts, ServerError);
    let late = reconcile(&mut facts, LIFETIME - 30, &outcomes).wake.failed;
    assert_eq!(
        late[0].not_after.map(Timestamp::as_second),
        Some(at(LIFETIME - 20).as_second())
    );
    let outcomes = [
        outcome(&facts, 0, Issued, LIFETIME),
        outcome(&facts, 1, ServerError, NONE),
    ];
    assert_eq!(reconcile(&mut facts, 1, &outcomes).wake.failed, [at_the_latest(None)]);
    // `KeyValid` changes when a key expires before the next refresh. A key that has already expired changes nothing.
    for (expires, expected) in [(9, at(9)), (1, a.min(b)), (LIFETIME, a.min(b))] {
        service_key(&mut facts).expires = Some(at(expires));
        let outcomes = both(&facts, Issued);
        assert_eq!(reconcile(&mut facts, 1, &outcomes).wake.at, Some(expected));
    }
}

/// A server with a wrong clock can send any time, and any time can be written into the status.
#[test]
fn extreme_times_in_clock_and_status_do_not_panic() {
    for now in [Timestamp::MIN, at(1), Timestamp::MAX] {
        for written in [Timestamp::MIN, at(0), Timestamp::MAX] {
            for reason in Reason::ALL {
                let mut facts = filled(&["a"]);
                let outcomes = [outcome(&facts, 0, *reason, LIFETIME)];
                let mut status = report(&facts, &outcomes, None, None, written).status;
                status.tokens[0].failing_since = Some(time(written));
                user(&mut facts).status = Some(status);
                let status = report(&facts, &outcomes, None, None, now).status;
                let since = status.tokens[0].failing_since.iter();
                let transitions = status.conditions.iter().map(|c| &c.last_transition_time);
                assert!(transitions.chain(since).all(|at| at.0 <= now), "{reason}: {status:?}");
            }
        }
    }
}

#[test]
fn kept_token_is_reported_as_recorded_in_the_secret() {
    let mut facts = filled(&["a", "b"]);
    let outcomes: Vec<_> = plan(&facts, at(1))
        .steps
        .into_iter()
        .enumerate()
        .map(|(token, step)| {
            let Step::Keep { current } = step else {
                panic!("{step:?}")
            };
            TokenOutcome {
                token,
                reason: Issued,
                current: Some(current),
                not_before: None,
                deferred: false,
                refused_by: None,
            }
        })
        .collect();
    let status = reconcile(&mut facts, 1, &outcomes).status;
    for (token, outcome) in facts.user.spec.tokens.iter().zip(&outcomes) {
        assert_eq!(facts.recorded(token), outcome.current);
    }
    assert!(
        status
            .tokens
            .iter()
            .all(|t| t.format.as_deref() == Some("JWT") && t.lifetime_seconds == Some(LIFETIME))
    );
}

prop_compose! {
    fn any_outcome()(reason in 0..Reason::ALL.len(), expires in proptest::option::of(1_i64..2_000), not_before in proptest::option::of(1_i64..2_000))
        -> (Reason, Option<i64>, Option<i64>) {
        // Of the reasons that are no failure, only these are outcomes of a token.
        let of_token = |reason: &Reason| reason.retry() != Retry::No || [Issued, Suspended].contains(reason);
        let outcome = Some(Reason::ALL[reason]).filter(of_token);
        (outcome.unwrap_or(Issued), expires, not_before)
    }
}

proptest! {
    /// Any sequence of outcomes at any times.
    #[test]
    fn conditions_never_contradict_each_other(
        reconciles in proptest::collection::vec((0_i64..900, proptest::collection::vec(any_outcome(), 3)), 1..5),
    ) {
        let mut facts = filled(&["a", "b", "c"]);
        let mut seconds = 0;
        for (later, outcomes) in reconciles {
            seconds += later;
            let now = at(seconds) + SignedDuration::from_millis(700);
            // Suspension applies to all tokens of an object.
            let suspended = outcomes.iter().any(|(reason, ..)| *reason == Suspended);
            let outcomes: Vec<_> = outcomes.into_iter().enumerate().map(|(i, (reason, expires, not_before))| TokenOutcome {
                reason: if suspended { Suspended } else { reason },
                not_before: not_before.map(at),
                ..outcome(&facts, i, reason, expires.unwrap_or(NONE))
            }).collect();
            let Report { status, wake, .. } = reconcile(&mut facts, seconds, &outcomes);
            shown(&status);
            let on = |kind| condition(&status, kind).is_some_and(|c| c.status == "True");
            let ready = |o: &TokenOutcome| o.reason == Issued || o.current.is_some_and(|h| h.schedule.expires > now);
            prop_assert_eq!(on("Ready"), outcomes.iter().all(ready));
            prop_assert!(u8::from(on("Ready")) + u8::from(on("Reconciling")) + u8::from(on("Stalled")) <= 1);
            let failing = |o: &TokenOutcome| o.reason.retry() != Retry::No;
            if !on("Ready") && outcomes.iter().any(|o| !ready(o) && failing(o)) {
                prop_assert!(on("Reconciling") || on("Stalled"));
            }
            if on("Stalled") {
                let reason = condition(&status, "Stalled").map(|c| c.reason.clone());
                let stalled = Reason::ALL.iter().find(|r| Some(r.name()) == reason.as_deref());
                prop_assert!(stalled.is_some_and(|reason| reason.is_permanent()));
            }
            for (entry, outcome) in status.tokens.iter().zip(&outcomes) {
                prop_assert_eq!(entry.failing_since.is_some(), failing(outcome));
            }
            prop_assert_eq!(wake.failed.len(), outcomes.iter().filter(|o| failing(o)).count());
            // Only a valid token that is due may be reconciled again immediately.
            let due = outcomes.iter().any(|o| o.reason == Issued && o.current.is_some_and(|h| h.schedule.renew <= now));
            prop_assert!(due || wake.at.is_none_or(|at| at > now), "{:?}", wake);
        }
    }
}
