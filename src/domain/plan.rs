//! The decision: what to do for each token. It depends only on the facts and the time.

use std::collections::BTreeSet;

use k8s_openapi::jiff::Timestamp;

use crate::api::ZitadelInstance;
use crate::api::service_user::Token;
use crate::domain::answer::{self, Expected, Format};
use crate::domain::facts::{CurrentToken, Facts, TokenOutcome, UnwrittenToken};
use crate::domain::key::ServiceKey;
use crate::domain::observed_secret::{ObservedSecret, SecretRef};
use crate::domain::reason::Reason;
use crate::domain::record::Record;
use crate::domain::secret_draft::{self, SecretDraft};
use crate::domain::{access, hash, scope, validate};

/// What to do for one service user: one step per token, in the order of the spec, and the Secrets to delete.
#[derive(Debug, Default)]
pub struct Plan {
    /// One step per token.
    pub steps: Vec<Step>,
    /// Secrets that the object controls and that its spec no longer names.
    pub deletes: Vec<SecretRef>,
}

/// What to do for one token.
#[derive(Debug)]
pub enum Step {
    /// No action: the Secret holds a fresh token and matches the spec.
    Keep {
        /// The token in the Secret.
        current: CurrentToken,
    },
    /// No action, because a prerequisite is missing or the token is not allowed. The Secret stays unchanged, and so
    /// does a valid token in it.
    Refuse {
        /// Why the operator does nothing.
        reason: Reason,
        /// A valid token that is still in the Secret.
        current: Option<CurrentToken>,
    },
    /// No action yet: the backoff of an earlier failure is running.
    Wait {
        /// Why the last attempt failed.
        reason: Reason,
        /// A valid token that is still in the Secret.
        current: Option<CurrentToken>,
    },
    /// Request a token from ZITADEL and write it to the Secret.
    Mint(Box<MintRequest>),
    /// Write a token that was issued earlier: the rest of its Secret differs from the spec, or an earlier write failed.
    Write {
        /// The Secret to write.
        draft: Box<SecretDraft>,
        /// The token in the draft.
        current: CurrentToken,
        /// A valid token that stays in the Secret if the write fails.
        fallback: Option<CurrentToken>,
    },
}

impl Step {
    fn refuse(reason: Reason, current: Option<CurrentToken>) -> Self {
        Self::Refuse { reason, current }
    }
}

/// A token to request from ZITADEL.
#[derive(Debug)]
pub struct MintRequest {
    /// The value of the `scope` parameter of the token request.
    pub scope: String,
    /// Stored in the record.
    pub request_hash: String,
    /// Stored in the record.
    pub template_hash: String,
    /// A valid token with the same request hash that stays in the Secret if the token request fails.
    pub fallback: Option<CurrentToken>,
    /// Whether neither the schedule nor a changed spec is the cause: the Secret is missing, was edited or was restored,
    /// or the object has a new renew request.
    pub unscheduled: bool,
    /// Whether this is the regular refresh of a due or expired token: its request hash is unchanged, and it is the only
    /// such request in the token's lifetime.
    pub scheduled: bool,
    /// Whether an earlier token could not be written. The operator then checks by a dry run that the API server would
    /// accept the Secret before it requests another token (docs/adr/0009-unwritten-tokens-are-kept.md).
    pub try_write_first: bool,
}

/// More unscheduled refreshes and repairs of one token than this within `facts::CONTEST_WINDOW` mean that there is a
/// conflicting writer: the operator refuses the next one. The first token counts as one of them.
const UNSCHEDULED: usize = 3;

/// Computes the plan. It is level-based: the same facts and time give the same plan, whatever happened before.
#[must_use]
pub fn plan(facts: &Facts, now: Timestamp) -> Plan {
    let suspended = facts.is_suspended();
    let step = |(index, token)| match admit(facts, index, token) {
        _ if suspended => Step::refuse(Reason::Suspended, facts.recorded(token)),
        Ok(admitted) => await_backoff(facts, token, now, decide(facts, token, &admitted, now)),
        Err(reason) => Step::refuse(reason, None),
    };
    Plan {
        steps: facts.user.spec.tokens.iter().enumerate().map(step).collect(),
        deletes: if suspended { Vec::new() } else { facts.leftovers.clone() },
    }
}

/// The Secrets among `deletes` that may be deleted after these outcomes. If an entry of the spec names another Secret,
/// its old Secret stays until the new one exists or the old token has expired. Without a trusted time (`now`), no token
/// counts as expired.
#[must_use]
pub fn deletable<'a>(
    facts: &Facts,
    deletes: &'a [SecretRef],
    outcomes: &[TokenOutcome],
    now: Option<Timestamp>,
) -> Vec<&'a SecretRef> {
    // Usually there is nothing to delete, and the checks below are done for every token.
    if deletes.is_empty() {
        return Vec::new();
    }
    let is_ours = |token: &Token| {
        let secret = facts.secrets.get(&token.secret.name);
        secret.is_some_and(|s| s.may_be_written_by(facts.name(), facts.uid()).is_ok())
    };
    let mut tokens = facts.user.spec.tokens.iter().zip(outcomes);
    let all_there = tokens.all(|(token, outcome)| outcome.current.is_some() || is_ours(token));
    let has_expired = |record: &Record| now.is_some_and(|now| record.expires_at <= now);
    // An old Secret may hold the only valid token of an entry whose new Secret exists but holds another token.
    let without = outcomes.iter().filter(|outcome| outcome.current.is_none());
    let missed: BTreeSet<String> = without
        .filter_map(|outcome| {
            let token = facts.user.spec.tokens.get(outcome.token)?;
            Some(request_hash(facts, &admit(facts, outcome.token, token).ok()?))
        })
        .collect();
    let deletable = |leftover: &&SecretRef| match facts.secrets.get(&leftover.name).and_then(ObservedSecret::record) {
        Some(record) => has_expired(&record) || all_there && !missed.contains(&record.request_hash),
        None => all_there,
    };
    deletes.iter().filter(deletable).collect()
}

/// The prerequisites of every step but `Refuse`.
struct Admitted<'a> {
    instance: &'a ZitadelInstance,
    key: &'a ServiceKey,
    observed: Option<&'a ObservedSecret>,
    scope: String,
}

/// Whether the operator may read the Secrets of a token: its spec is valid, and the access policies allow it. Secrets
/// of a token that is refused anyway are not worth the memory. Validation also checks the names before they become part
/// of a URL.
pub fn may_read(facts: &Facts, index: usize) -> Result<(), Reason> {
    let token = facts.user.spec.tokens.get(index).ok_or(Reason::InvalidSpec)?;
    allow(facts, index, token).map(drop)
}

/// The instance and the scope, if the spec is valid and the access policies allow the token.
fn allow<'a>(facts: &'a Facts, index: usize, token: &Token) -> Result<(&'a ZitadelInstance, String), Reason> {
    if facts.in_operator_namespace {
        return Err(Reason::OperatorNamespace);
    }
    validate::token(&facts.user.spec, index, &facts.allowed_metadata).map_err(|_| Reason::InvalidSpec)?;
    let instance = facts.instance.as_deref().map_err(|reason| *reason)?;
    let allowed = facts.allowed.as_ref().map_err(|reason| *reason)?;
    allowed.check(token, facts.zitadel_project_id())?;
    // Validation above rejects spaces. `scope::field` checks again, because a value with a space would be two scopes.
    let scope = scope::field(&scope::scopes(token)).ok_or(Reason::InvalidSpec)?;
    Ok((instance, scope))
}

fn admit<'a>(facts: &'a Facts, index: usize, token: &Token) -> Result<Admitted<'a>, Reason> {
    let (instance, scope) = allow(facts, index, token)?;
    if !secret_draft::fits(facts, token) {
        return Err(Reason::SecretTooLarge);
    }
    let observed = facts.secrets.get(&token.secret.name);
    if let Some(observed) = observed {
        observed.may_be_written_by(facts.name(), facts.uid())?;
    }
    let key = facts.key.as_ref().map_err(|reason| *reason)?;
    Ok(Admitted {
        instance,
        key,
        observed,
        scope,
    })
}

fn decide(facts: &Facts, token: &Token, admitted: &Admitted<'_>, now: Timestamp) -> Step {
    let request_hash = request_hash(facts, admitted);
    let template_hash = secret_draft::template_hash(facts, token);
    let fallback = match admitted
        .observed
        .and_then(|e| current_token(facts, token, e, admitted, &request_hash))
    {
        Some((record, value, current)) if current.schedule.is_valid(now) => {
            if current.schedule.is_fresh(now) && !has_new_renew_request(facts, &record) {
                return keep_or_write(facts, token, value, &record, &template_hash, current);
            }
            Some(current)
        }
        _ => None,
    };
    if admitted.observed.is_none()
        && let Some((record, value, current)) = moved_token(facts, token, admitted, &request_hash)
        && current.schedule.is_fresh(now)
        && !has_new_renew_request(facts, &record)
    {
        return keep_or_write(facts, token, value, &record, &template_hash, current);
    }
    if let Some(unwritten) = facts.unwritten.get(&token.name)
        && let Some((draft, current)) = write_again(facts, token, unwritten, (&request_hash, &template_hash), now)
    {
        return Step::Write {
            draft,
            current,
            fallback,
        };
    }
    if let Err(reason) = facts.clock.check() {
        return Step::refuse(reason, fallback);
    }
    if admitted.key.expires.is_some_and(|expires| expires <= now) {
        return Step::refuse(Reason::KeyExpired, fallback);
    }
    let last = facts.last_mints.get(&token.name);
    let early = last.is_some_and(|(of, renew)| *of == request_hash && *renew > now);
    let unscheduled = early || is_unscheduled(admitted.observed, fallback, &request_hash, now);
    if unscheduled && is_contested(facts, token) {
        return Step::refuse(Reason::SecretContested, fallback);
    }
    let recorded = admitted.observed.and_then(ObservedSecret::record);
    let requested_lately = last.is_some_and(|(_, renew)| *renew > now);
    let scheduled = !unscheduled
        && !requested_lately
        && recorded.is_some_and(|record| record.request_hash == request_hash && record.owner == facts.uid());
    Step::Mint(Box::new(MintRequest {
        scope: admitted.scope.clone(),
        request_hash,
        template_hash,
        fallback,
        unscheduled,
        scheduled,
        try_write_first: facts.write_failed.contains(&token.name) || facts.unwritten.contains_key(&token.name),
    }))
}

/// Whether the token's Secret has a conflicting writer.
fn is_contested(facts: &Facts, token: &Token) -> bool {
    facts.unscheduled.get(&token.name).copied().unwrap_or(0) > UNSCHEDULED
}

/// Whether a token request is unscheduled. It is if the Secret holds a valid token that is not due, if an unexpired
/// record has the same request hash (the Secret was edited), or if there is no record.
fn is_unscheduled(
    observed: Option<&ObservedSecret>,
    fallback: Option<CurrentToken>,
    request_hash: &str,
    now: Timestamp,
) -> bool {
    match (fallback, observed.and_then(ObservedSecret::record)) {
        (Some(current), _) => current.schedule.renew > now,
        (None, Some(record)) => record.request_hash == request_hash && record.expires_at > now,
        (None, None) => true,
    }
}

/// Defers a token request or a write while the token's backoff runs, whatever triggered this reconcile.
fn await_backoff(facts: &Facts, token: &Token, now: Timestamp, step: Step) -> Step {
    let hold = facts.pending_retries.get(&token.name).filter(|hold| hold.until > now);
    match (hold, step) {
        (Some(hold), Step::Mint(request)) => Step::Wait {
            reason: hold.reason,
            current: request.fallback,
        },
        (Some(hold), Step::Write { fallback, .. }) => Step::Wait {
            reason: hold.reason,
            current: fallback,
        },
        (_, step) => step,
    }
}

/// Whether the object has a renew request that this token does not serve. A withdrawn request has no effect.
fn has_new_renew_request(facts: &Facts, record: &Record) -> bool {
    facts
        .renew_request()
        .is_some_and(|request| record.request.as_ref() != Some(&request))
}

/// The token in the Secret, if the operator wrote it for this request hash.
fn current_token<'a>(
    facts: &Facts,
    token: &Token,
    observed: &'a ObservedSecret,
    admitted: &Admitted<'_>,
    request_hash: &str,
) -> Option<(Record, &'a str, CurrentToken)> {
    let record = observed.record()?;
    let value = observed.token()?;
    if !record.vouches_for(value) || record.request_hash != request_hash {
        return None;
    }
    let mut expires = record.expires_at;
    let format = Format::of(value);
    if let Some(claims) = answer::claims(value) {
        // A record can be forged together with its token, so the claims of a JWT must match as well.
        if let Some(id) = known_project_id(facts, token) {
            let expected = expected(token, admitted.instance, admitted.key, id);
            answer::check_claims(&claims, &expected).ok()?;
        }
        expires = claims.exp.map_or(expires, |exp| exp.min(expires));
    }
    let schedule = facts.schedule(token, record.issued_at, expires);
    Some((record, value, CurrentToken { schedule, format }))
}

/// A token with this request hash in a Secret that the spec no longer names, because its entry now names another
/// Secret.
fn moved_token<'a>(
    facts: &'a Facts,
    token: &Token,
    admitted: &Admitted<'_>,
    request_hash: &str,
) -> Option<(Record, &'a str, CurrentToken)> {
    let those = facts.leftovers.iter().filter_map(|l| facts.secrets.get(&l.name));
    let mut ours = those.filter(|observed| observed.may_be_written_by(facts.name(), facts.uid()).is_ok());
    ours.find_map(|observed| current_token(facts, token, observed, admitted, request_hash))
}

/// The ID of the ZITADEL API's project if `token` needs it, an empty string if it does not, or `None` if `token` needs
/// the ID and it is not known yet.
fn known_project_id<'a>(facts: &'a Facts, token: &Token) -> Option<&'a str> {
    if token.zitadel_api == Some(true) {
        facts.zitadel_project_id.as_deref()
    } else {
        Some("")
    }
}

fn keep_or_write(
    facts: &Facts,
    token: &Token,
    value: &str,
    record: &Record,
    template_hash: &str,
    current: CurrentToken,
) -> Step {
    let mut draft = secret_draft::draft(
        facts,
        token,
        &value.into(),
        &record.rehashed(facts.uid(), template_hash, value),
    );
    let observed = facts.secrets.get(&token.secret.name);
    draft.repair = record.template_hash == template_hash && observed.is_some();
    match observed {
        Some(observed) if !draft.differs_from(observed) => Step::Keep { current },
        _ if draft.repair && is_contested(facts, token) => Step::refuse(Reason::SecretContested, Some(current)),
        _ => Step::Write {
            draft: Box::new(draft),
            current,
            fallback: observed.map(|_| current),
        },
    }
}

fn write_again(
    facts: &Facts,
    token: &Token,
    unwritten: &UnwrittenToken,
    (request_hash, template_hash): (&str, &str),
    now: Timestamp,
) -> Option<(Box<SecretDraft>, CurrentToken)> {
    use secrecy::ExposeSecret;
    let schedule = facts.schedule(token, unwritten.minted.issued, unwritten.minted.expires);
    if unwritten.record.request_hash != request_hash
        || !schedule.is_fresh(now)
        || has_new_renew_request(facts, &unwritten.record)
    {
        return None;
    }
    let value = &unwritten.minted.token;
    let record = unwritten
        .record
        .rehashed(facts.uid(), template_hash, value.expose_secret());
    let draft = secret_draft::draft(facts, token, value, &record);
    let format = Format::of(value.expose_secret());
    Some((Box::new(draft), CurrentToken { schedule, format }))
}

/// Hash of everything that determines a token. If any of it changes, the operator requests another token.
fn request_hash(facts: &Facts, admitted: &Admitted<'_>) -> String {
    hash::of([
        facts.user.spec.instance_ref.name.as_bytes(),
        admitted.instance.spec.issuer.as_bytes(),
        admitted.scope.as_bytes(),
        admitted.key.user_id.as_bytes(),
        admitted.key.lineage().as_bytes(),
    ])
}

fn expected(token: &Token, instance: &ZitadelInstance, key: &ServiceKey, zitadel_project_id: &str) -> Expected {
    Expected {
        issuer: instance.spec.issuer.clone(),
        user_id: key.user_id.clone(),
        audience: access::audience(token, zitadel_project_id),
        organization_id: token.organization_id.clone(),
    }
}

/// What the token must contain, now that the ID of the ZITADEL API's project is known. This is the last check before a
/// token request: while the ID is unknown, a tenant can request it like that of any other project
/// (docs/adr/0007-audience-must-be-equal.md).
pub fn expect(facts: &Facts, token: &Token, zitadel_project_id: &str) -> Result<Expected, Reason> {
    let instance = facts.instance.as_deref().map_err(|reason| *reason)?;
    let allowed = facts.allowed.as_ref().map_err(|reason| *reason)?;
    let key = facts.key.as_ref().map_err(|reason| *reason)?;
    let pinned = instance.spec.zitadel_project_id.as_deref();
    if pinned.is_some_and(|pinned| pinned != zitadel_project_id) {
        return Err(Reason::ProjectIDMismatch);
    }
    allowed.check(token, Some(zitadel_project_id))?;
    Ok(expected(token, instance, key, zitadel_project_id))
}

#[cfg(test)]
mod tests;
