//! The report on a service user: its status, its Events and the next reconcile, computed from facts and outcomes.
//! `instance_status.rs` has the status of an instance.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::api::service_user::{
    KEY_ROTATED, KEY_VALID, MANAGER_ROLES_GRANTED, READY, Token, TokenStatus, UP_TO_DATE, ZitadelServiceUserStatus,
};
use crate::domain::facts::{CurrentToken, Facts, TokenOutcome};
use crate::domain::key_rotation;
use crate::domain::key_rotation_report;
use crate::domain::progress::Progress;
use crate::domain::reason::{Reason, Subject};
use crate::domain::retry::{Failed, Retry, Wake};
use crate::domain::role_report::{self, RoleOutcome};
use crate::domain::time::{shifted, whole_seconds};
use crate::domain::validate;

/// How long a permanent failure lasts before it sets `Stalled`. Flux and Helm treat `Stalled` as final, and a key
/// Secret may be created shortly after the object (docs/adr/0005-status-is-output-only.md).
const PATIENCE: SignedDuration = SignedDuration::from_mins(5);

/// Denied audiences that a message lists. The API server rejects an Event whose note is longer than 1024 bytes.
const MOST_DENIED: usize = 4;

/// The new status, the Events to publish and the next reconcile.
#[derive(Debug)]
pub struct Report {
    /// The complete new status.
    pub status: ZitadelServiceUserStatus,
    /// Events for changed outcomes only.
    pub events: Vec<EventDraft>,
    /// When to reconcile next.
    pub wake: Wake,
}

/// An Event that is not yet published.
#[derive(Debug, PartialEq, Eq)]
pub struct EventDraft {
    /// Whether the Event has the type `Warning`.
    pub warning: bool,
    /// The `reason` of the Event.
    pub reason: Reason,
    /// The `note` of the Event.
    pub text: String,
}

/// Computes the report for these outcomes of tokens, of the key rotation and of manager roles.
#[must_use]
pub fn report(
    facts: &Facts,
    outcomes: &[TokenOutcome],
    rotation: Option<&Progress>,
    roles: Option<&RoleOutcome>,
    now: Timestamp,
) -> Report {
    let before = facts.user.status.clone().unwrap_or_default();
    let tokens: Vec<TokenStatus> = outcomes
        .iter()
        .filter_map(|o| Some(line(facts, facts.user.spec.tokens.get(o.token)?, o, &before, now)))
        .collect();
    let ready = outcomes.iter().filter(|o| is_ready(o, now)).count();
    let key = facts.key.as_ref().ok();
    let served = outcomes.iter().all(|o| o.reason == Reason::Issued);
    let renew_request = facts.renew_request().filter(|_| served);
    let mut status = ZitadelServiceUserStatus {
        observed_generation: facts.user.metadata.generation,
        user_id: key.map(|k| k.user_id.clone()),
        key_id: key.map(|k| k.key_id.clone()),
        key_expires_at: key.and_then(|k| k.expires).map(time),
        key_rotation: rotation.and_then(|_| key_rotation_report::user_status(facts)),
        expires_at: tokens.iter().filter_map(|t| t.expires_at.clone()).min(),
        renew_at: tokens.iter().filter_map(|t| t.renew_at.clone()).min(),
        tokens_ready: Some(format!("{ready}/{}", outcomes.len())),
        last_handled_renew_request: renew_request.or(before.last_handled_renew_request.clone()),
        conditions: Vec::new(),
        tokens,
    };
    let stalls_at = conditions(facts, outcomes, (rotation, roles), &mut status, &before, now);
    let mut events = events(facts, outcomes, &status, &before);
    events.extend(key_warning(&status, &before));
    if let Some(rotation) = rotation {
        events.extend(key_rotation_report::events(rotation, &status, &before));
    }
    events.extend(roles.and_then(|roles| role_report::event(facts, roles, &before)));
    let mut wake = wake(facts, outcomes, rotation, stalls_at, now);
    wake.failed.extend(roles.and_then(RoleOutcome::failed));
    Report { status, events, wake }
}

/// The part of a status that says why an object is not served at all, as a JSON merge patch: its conditions `failed`
/// are false, and `Stalled` is true at once.
#[must_use]
pub fn refusal(reason: Reason, failed: &[&str], generation: Option<i64>, now: Timestamp) -> serde_json::Value {
    let condition = |(kind, value): (&str, &str)| Condition {
        type_: kind.to_owned(),
        status: value.to_owned(),
        reason: reason.name().to_owned(),
        message: reason.advice(),
        observed_generation: generation,
        last_transition_time: time(now),
    };
    let failed = failed.iter().map(|kind| (*kind, "False"));
    let conditions: Vec<_> = failed.chain([("Stalled", "True")]).map(condition).collect();
    serde_json::json!({"status": {"observedGeneration": generation, "conditions": conditions}})
}

/// Whether the Secret holds a valid token for the spec. A token that this reconcile kept or wrote counts even if it
/// expired meanwhile: the next reconcile follows at once.
fn is_ready(outcome: &TokenOutcome, now: Timestamp) -> bool {
    outcome.reason == Reason::Issued || outcome.current.is_some_and(|h| h.schedule.is_valid(now))
}

fn line(
    facts: &Facts,
    token: &Token,
    outcome: &TokenOutcome,
    before: &ZitadelServiceUserStatus,
    now: Timestamp,
) -> TokenStatus {
    let current: Option<CurrentToken> = outcome.current.or_else(|| facts.recorded(token));
    let failing = outcome.reason.retry() != Retry::No;
    // The time until `Stalled` restarts with each generation. Otherwise a rollout whose key Secret is created shortly
    // after the object would stall at once (docs/adr/0005-status-is-output-only.md). A time in the future was written
    // by another clock or by hand, and is ignored.
    let since = before
        .tokens
        .iter()
        .filter(|_| before.observed_generation == facts.user.metadata.generation)
        .find(|t| t.name == token.name)
        .and_then(|t| t.failing_since.clone())
        .filter(|t| t.0 <= now);
    TokenStatus {
        name: token.name.clone(),
        secret_name: token.secret.name.clone(),
        issued_at: current.map(|h| time(h.schedule.issued)),
        expires_at: current.map(|h| time(h.schedule.expires)),
        renew_at: current.map(|h| time(h.schedule.renew)),
        lifetime_seconds: current.map(|h| h.schedule.expires.duration_since(h.schedule.issued).as_secs()),
        format: current.map(|h| h.format.name().to_owned()),
        reason: Some(outcome.reason.name().to_owned()),
        failing_since: failing.then(|| since.unwrap_or_else(|| time(now))),
    }
}

/// A sentence for each token whose refresh time in the spec does not fit its lifetime.
fn clamped(facts: &Facts, outcomes: &[TokenOutcome]) -> String {
    let those = outcomes
        .iter()
        .filter(|o| o.current.is_some_and(|h| h.schedule.clamped));
    let names = those.filter_map(|o| Some(&facts.user.spec.tokens.get(o.token)?.name));
    names.fold(String::new(), |text, name| {
        text + &format!(
            " Token `{name}`: renewBefore or renewBeforePercentage does not fit the token lifetime, so the token is refreshed at status.tokens[].renewAt instead. Set a value that fits, or remove the field."
        )
    })
}

/// Sets the conditions. Returns when a failure that is not `Stalled` yet becomes so.
///
/// | condition | status | reason |
/// |---|---|---|
/// | `Ready` | whether each Secret holds a valid token | `Issued`, or the reason of the first token that is not ready |
/// | `UpToDate` | whether the latest refresh of every token succeeded; `Unknown` while suspended | `Issued`, `Suspended`, or the reason of the first failure |
/// | `Reconciling` or `Stalled` | `True` while not ready and not suspended, never both | same as `Ready` |
/// | `KeyValid` | whether the key is usable; `Unknown` if it was not read | `KeyUsable`, or what is wrong with the key |
/// | `KeyRotated`, `ForeignCredentials` | with key rotation only: see `key_rotation_report.rs` | |
/// | `ManagerRolesGranted` | with manager roles only: whether the user has them; `Unknown` while suspended | `ManagerRolesGranted`, or why not |
fn conditions(
    facts: &Facts,
    outcomes: &[TokenOutcome],
    (rotation, roles): (Option<&Progress>, Option<&RoleOutcome>),
    status: &mut ZitadelServiceUserStatus,
    before: &ZitadelServiceUserStatus,
    now: Timestamp,
) -> Option<Timestamp> {
    let failed = |o: &&TokenOutcome| o.reason.retry() != Retry::No;
    // Tokens that are not ready decide before others, failures before the rest, then the order of the spec.
    let not_ready = || outcomes.iter().filter(|o| !is_ready(o, now));
    let missing = not_ready().find(failed).or_else(|| not_ready().next());
    let failed = missing.filter(failed).or_else(|| outcomes.iter().find(failed));
    let suspended = outcomes.iter().any(|o| o.reason == Reason::Suspended);
    let since = missing
        .and_then(|o| status.tokens.get(o.token))
        .and_then(|t| t.failing_since.as_ref())
        .map_or(now, |t| t.0);
    let stalls_at = shifted(since, PATIENCE);
    let waits = missing.is_some_and(|o| o.reason.is_permanent());
    // An untrusted clock must not make a failure final: Flux and Helm would stop waiting.
    let stalled = waits && stalls_at <= now && facts.clock.check().is_ok();
    let mut set = |kind: &str, value: &str, reason: Reason, message: &str| {
        let same = |c: &&Condition| c.type_ == kind && c.status == value && c.last_transition_time.0 <= now;
        let last = before.conditions.iter().find(same);
        status.conditions.push(Condition {
            type_: kind.to_owned(),
            status: value.to_owned(),
            reason: reason.name().to_owned(),
            message: message.to_owned(),
            observed_generation: facts.user.metadata.generation,
            last_transition_time: last.map_or_else(|| time(now), |c| c.last_transition_time.clone()),
        });
    };
    match missing {
        None => {
            let message = format!("Every token Secret holds a valid token.{}", clamped(facts, outcomes));
            set(READY, "True", Reason::Issued, &message);
        }
        Some(missing) => {
            let message = sentence(facts, missing);
            set(READY, "False", missing.reason, &message);
            if missing.reason != Reason::Suspended {
                // kstatus treats `Stalled` as final and `Reconciling` as in progress.
                let kind = if stalled { "Stalled" } else { "Reconciling" };
                set(kind, "True", missing.reason, &message);
            }
        }
    }
    match failed {
        None if suspended => set(UP_TO_DATE, "Unknown", Reason::Suspended, &Reason::Suspended.advice()),
        None => set(
            UP_TO_DATE,
            "True",
            Reason::Issued,
            "The latest refresh of every token succeeded.",
        ),
        Some(failed) => set(UP_TO_DATE, "False", failed.reason, &sentence(facts, failed)),
    }
    let key = key_state(facts, outcomes, rotation, now);
    let usable = key.retry() == Retry::No;
    let message = if key == Reason::KeyUsable {
        key.meaning().to_owned()
    } else {
        key.advice()
    };
    // The operator does not read the key if no token is allowed.
    let unread = facts.key.is_err() && key.subject() != Subject::Key && key != Reason::SecretsForbidden;
    let value = match (unread, usable) {
        (true, _) => "Unknown",
        (false, true) => "True",
        (false, false) => "False",
    };
    set(KEY_VALID, value, key, &message);
    let rotation_stalls = rotation_stalls(before, rotation, now);
    if missing.is_none() && rotation_stalls.is_some_and(|at| at <= now) {
        set(
            "Stalled",
            "True",
            Reason::OldKeysRemain,
            &Reason::OldKeysRemain.advice(),
        );
    }
    let is_inactive = outcomes.iter().any(|o| o.reason == Reason::UserInactive);
    for (kind, value, reason) in rotation
        .into_iter()
        .flat_map(|r| key_rotation_report::user_conditions(facts, r, is_inactive))
    {
        let message = if reason.retry() == Retry::No {
            reason.meaning().to_owned()
        } else {
            reason.advice()
        };
        set(kind, value, reason, &message);
    }
    if let Some(roles) = roles {
        let message = role_report::sentence(facts, roles);
        set(MANAGER_ROLES_GRANTED, roles.value(), roles.outcome.reason, &message);
    }
    let tokens_stall = waits.then_some(stalls_at);
    tokens_stall
        .into_iter()
        .chain(rotation_stalls)
        .filter(|at| *at > now)
        .min()
}

/// When keys of a former user that cannot be removed become `Stalled`: only a person can help.
fn rotation_stalls(
    before: &ZitadelServiceUserStatus,
    rotation: Option<&Progress>,
    now: Timestamp,
) -> Option<Timestamp> {
    rotation.filter(|rotation| rotation.reason == Reason::OldKeysRemain)?;
    let since = before
        .conditions
        .iter()
        .find(|c| c.type_ == KEY_ROTATED && c.status == "False");
    let since = since.map_or(now, |c| c.last_transition_time.0.min(now));
    Some(shifted(since, PATIENCE))
}

/// What is wrong with a token of the spec, and the remedy.
fn sentence(facts: &Facts, outcome: &TokenOutcome) -> String {
    let (spec, reason) = (&facts.user.spec, outcome.reason);
    let name = spec.tokens.get(outcome.token).map_or("", |t| t.name.as_str());
    match (
        validate::token(spec, outcome.token, &facts.allowed_metadata),
        &outcome.refused_by,
    ) {
        (Err(violation), _) if reason == Reason::InvalidSpec => {
            format!("Token `{name}`: {} {violation} {}", reason.meaning(), reason.remedy())
        }
        _ if reason == Reason::AccessDenied => {
            format!(
                "Token `{name}`: {}{} {}",
                reason.meaning(),
                denied(facts, outcome),
                reason.remedy()
            )
        }
        (_, Some(refuser)) => format!(
            "Token `{name}`: {} The write was refused by {refuser}. {}",
            reason.meaning(),
            reason.remedy()
        ),
        _ => format!("Token `{name}`: {}", reason.advice()),
    }
}

/// The audiences that no access policy allows. Their IDs match the schema's pattern: otherwise the reason is
/// `InvalidSpec`.
fn denied(facts: &Facts, outcome: &TokenOutcome) -> String {
    let token = facts.user.spec.tokens.get(outcome.token);
    let denied = token.zip(facts.allowed.as_ref().ok());
    let denied = denied.map(|(token, allowed)| allowed.denied(token, facts.zitadel_project_id()));
    let denied = denied.unwrap_or_default();
    match denied.split_at_checked(MOST_DENIED) {
        Some((first, [_, ..])) => format!(" Denied: {} and {} more.", first.join(", "), denied.len() - MOST_DENIED),
        _ if denied.is_empty() => String::new(),
        _ => format!(" Denied: {}.", denied.join(", ")),
    }
}

/// The state of the key: from its own expiration date, and from ZITADEL's responses to token requests.
fn key_state(facts: &Facts, outcomes: &[TokenOutcome], rotation: Option<&Progress>, now: Timestamp) -> Reason {
    match &facts.key {
        Err(reason) => *reason,
        Ok(key) if key.expires.is_some_and(|expires| expires <= now) => {
            facts.clock.check().err().unwrap_or(Reason::KeyExpired)
        }
        Ok(_) => outcomes
            .iter()
            .map(|o| o.reason)
            .find(|r| r.subject() == Subject::Key)
            .unwrap_or_else(|| ends_soon(facts, rotation, now).unwrap_or(Reason::KeyUsable)),
    }
}

/// How long before the expiry of the key its owner is warned, and by which reason: the last one that applies counts.
const WARNINGS: [(SignedDuration, Reason); 2] = [
    (SignedDuration::from_hours(30 * 24), Reason::KeyExpiresWithin30Days),
    (SignedDuration::from_hours(7 * 24), Reason::KeyExpiresWithin7Days),
];

/// When the key expires, if the operator does not replace it before.
fn key_ends(facts: &Facts, rotation: Option<&Progress>) -> Option<Timestamp> {
    let replaced = rotation.is_some_and(|rotation| key_rotation::replaces_in_time(rotation.reason));
    let expires = facts.key.as_ref().ok().and_then(|key| key.expires);
    expires.filter(|_| !replaced)
}

fn ends_soon(facts: &Facts, rotation: Option<&Progress>, now: Timestamp) -> Option<Reason> {
    let expires = key_ends(facts, rotation)?;
    // A clock that is not trusted warns of nothing.
    facts.clock.check().ok()?;
    let warnings = WARNINGS.into_iter().rev();
    let mut due = warnings.filter(|(before, _)| shifted(expires, -*before) <= now);
    due.next().map(|(_, reason)| reason)
}

/// An Event for each token whose outcome changed. Failures that are retried within seconds (`Retry::Soon`) get none.
fn events(
    facts: &Facts,
    outcomes: &[TokenOutcome],
    status: &ZitadelServiceUserStatus,
    before: &ZitadelServiceUserStatus,
) -> Vec<EventDraft> {
    if facts.user.metadata.deletion_timestamp.is_some() {
        return Vec::new();
    }
    let told = outcomes.iter().zip(&status.tokens);
    let news = told.filter(|(outcome, token)| {
        let last = before.tokens.iter().find(|t| t.name == token.name);
        let last = last.and_then(|t| t.reason.as_deref());
        last != Some(outcome.reason.name()) && outcome.reason.retry() != Retry::Soon
    });
    news.map(|(outcome, token)| EventDraft {
        warning: outcome.reason.retry() != Retry::No,
        reason: outcome.reason,
        text: if outcome.reason == Reason::Issued {
            format!(
                "Token `{}` is valid and stored in Secret `{}`.",
                token.name, token.secret_name
            )
        } else {
            sentence(facts, outcome)
        },
    })
    .collect()
}

/// A Warning Event when the key begins to expire soon.
fn key_warning(status: &ZitadelServiceUserStatus, before: &ZitadelServiceUserStatus) -> Option<EventDraft> {
    let reason = |status: &ZitadelServiceUserStatus| {
        let condition = status
            .conditions
            .iter()
            .find(|condition| condition.type_ == KEY_VALID)?;
        Reason::named(&condition.reason)
    };
    let now = reason(status).filter(|now| WARNINGS.iter().any(|(_, reason)| reason == now))?;
    (reason(before) != Some(now)).then(|| EventDraft {
        warning: true,
        reason: now,
        text: now.advice(),
    })
}

/// The latest time of the next attempt after a failure: the token's refresh time, or, for a due token, after a third of
/// its remaining lifetime. The attempts become more frequent as the expiry approaches.
fn latest_try(current: CurrentToken, now: Timestamp) -> Timestamp {
    if current.schedule.renew > now {
        return current.schedule.renew;
    }
    let third = current.schedule.expires.duration_since(now) / 3;
    shifted(now, third.max(SignedDuration::from_secs(1)))
}

fn wake(
    facts: &Facts,
    outcomes: &[TokenOutcome],
    rotation: Option<&Progress>,
    stalls_at: Option<Timestamp>,
    now: Timestamp,
) -> Wake {
    let next = outcomes.iter().filter_map(|o| {
        let schedule = o.current?.schedule;
        if o.reason == Reason::Issued {
            return Some(schedule.renew);
        }
        // The backoff schedules the next attempt. The status must still change when the token expires.
        Some(schedule.expires).filter(|at| *at > now)
    });
    let failing = outcomes
        .iter()
        .filter(|o| o.reason.retry() != Retry::No)
        .filter_map(|o| {
            Some(Failed {
                what: facts.user.spec.tokens.get(o.token)?.name.clone(),
                reason: o.reason,
                not_before: o.not_before,
                not_after: o.current.map(|current| latest_try(current, now)),
                deferred: o.deferred,
            })
        });
    // `KeyValid` changes when the key expires and at the warnings before, whatever the state of the tokens.
    let key_ends = key_ends(facts, rotation).into_iter().flat_map(|expires| {
        let warnings = WARNINGS.map(|(before, _)| shifted(expires, -before));
        warnings.into_iter().chain([expires]).filter(|at| *at > now)
    });
    let rotates = rotation.and_then(|rotation| rotation.next);
    Wake {
        at: next.chain(stalls_at).chain(key_ends).chain(rotates).min(),
        failed: failing
            .chain(rotation.and_then(|rotation| rotation.failed(key_rotation::BACKOFF)))
            .collect(),
    }
}

/// A time as the API shows it: in whole seconds.
fn time(at: Timestamp) -> Time {
    Time(whole_seconds(at))
}

#[cfg(test)]
mod tests;
