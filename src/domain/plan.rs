//! The decision: what to do for each token, from facts and the time alone.

use std::collections::BTreeSet;

use k8s_openapi::jiff::Timestamp;

use crate::api::ZitadelInstance;
use crate::api::service_user::Token;
use crate::domain::answer::{self, Expected, Format};
use crate::domain::facts::{CurrentToken, Facts, Outcome, UnwrittenToken};
use crate::domain::key::ServiceKey;
use crate::domain::observed_secret::{ObservedSecret, SecretRef};
use crate::domain::reason::Reason;
use crate::domain::record::Record;
use crate::domain::secret_draft::{self, SecretDraft};
use crate::domain::{access, hash, scope, validate};

/// What is to be done: one step per token of the spec, in its order, and the Secrets to delete.
#[derive(Debug, Default)]
pub struct Plan {
    /// One per token.
    pub steps: Vec<Step>,
    /// Ours, and no longer asked for.
    pub deletes: Vec<SecretRef>,
}

/// What is to be done for one token.
#[derive(Debug)]
pub enum Step {
    /// Nothing: the token in the Secret is good.
    Keep {
        /// The token in the Secret.
        current: CurrentToken,
    },
    /// Nothing, because something is missing or forbidden. The Secret stays as it is, and with it what it may hold of a
    /// good token.
    Refuse {
        /// What is missing or forbidden.
        reason: Reason,
        /// A valid token that is still in the Secret.
        current: Option<CurrentToken>,
    },
    /// Nothing yet: it failed a moment ago for this reason.
    Wait {
        /// Why the last attempt failed.
        reason: Reason,
        /// A valid token that is still in the Secret.
        current: Option<CurrentToken>,
    },
    /// Ask ZITADEL for a token and write it.
    Mint(Box<MintRequest>),
    /// Write a token that is there already: what is around it has changed, or its first write failed. Should it fail
    /// again, the last is what is still in the Secret.
    Write {
        /// The Secret as it is to be.
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

/// A token to be minted.
#[derive(Debug)]
pub struct MintRequest {
    /// The value of the `scope` field.
    pub scope: String,
    /// Goes into the record.
    pub request_hash: String,
    /// Goes into the record.
    pub template_hash: String,
    /// A token of the same inputs that is still in the Secret, in case the mint fails.
    pub fallback: Option<CurrentToken>,
    /// Neither the schedule nor the spec asks for it: the Secret is missing or was edited, or a renewal was asked for.
    pub unscheduled: bool,
    /// The token of the same inputs is due or has expired: it is the one request of its lifetime.
    pub scheduled: bool,
    /// The last token could not be written: whether this one could is asked before it is minted (decision K3).
    pub try_write_first: bool,
}

/// More forced mints and repairs of a token within the window than this, the first mint not counted, and somebody
/// fights us.
const UNSCHEDULED: usize = 3;

/// Decides. Level-based: the same facts give the same plan, whatever happened before.
#[must_use]
pub fn plan(facts: &Facts, now: Timestamp) -> Plan {
    let suspended = facts.user.spec.suspend == Some(true);
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

/// Which of the Secrets that the spec no longer names may go after these outcomes. What a renamed entry leaves stays
/// until its successor is there, or its token has expired. Without a time that is certain, nothing has expired.
#[must_use]
pub fn may_go<'a>(
    facts: &Facts,
    deletes: &'a [SecretRef],
    outcomes: &[Outcome],
    now: Option<Timestamp>,
) -> Vec<&'a SecretRef> {
    // As a rule there is none, and what follows looks at every token.
    if deletes.is_empty() {
        return Vec::new();
    }
    let is_ours = |token: &Token| {
        let secret = facts.secrets.get(&token.secret.name);
        secret.is_some_and(|s| s.owned_by(facts.name(), facts.uid()).is_ok())
    };
    let mut tokens = facts.user.spec.tokens.iter().zip(outcomes);
    let all_there = tokens.all(|(token, outcome)| outcome.current.is_some() || is_ours(token));
    let has_expired = |record: &Record| now.is_some_and(|now| record.expires_at <= now);
    // It may be the only good one of an entry that was given a Secret which is there and holds another token.
    let without = outcomes.iter().filter(|outcome| outcome.current.is_none());
    let missed: BTreeSet<String> = without
        .filter_map(|outcome| {
            let token = facts.user.spec.tokens.get(outcome.token)?;
            Some(request_hash(facts, &admit(facts, outcome.token, token).ok()?))
        })
        .collect();
    let may_go = |leftover: &&SecretRef| match facts.secrets.get(&leftover.name).and_then(ObservedSecret::record) {
        Some(record) => has_expired(&record) || all_there && !missed.contains(&record.request_hash),
        None => all_there,
    };
    deletes.iter().filter(may_go).collect()
}

/// What is needed before anything can be done.
struct Admitted<'a> {
    instance: &'a ZitadelInstance,
    key: &'a ServiceKey,
    observed: Option<&'a ObservedSecret>,
    scope: String,
}

/// Whether the Secrets of a token are to be read: its spec keeps the rules, and it is allowed. What a tenant may not have
/// anyway is not worth the memory. On the way it is checked that the names are names, before they become a part of a URL.
pub fn may_read(facts: &Facts, index: usize) -> Result<(), Reason> {
    let token = facts.user.spec.tokens.get(index).ok_or(Reason::InvalidSpec)?;
    allow(facts, index, token).map(drop)
}

/// The instance and the scope, if spec and rights allow the token.
fn allow<'a>(facts: &'a Facts, index: usize, token: &Token) -> Result<(&'a ZitadelInstance, String), Reason> {
    if facts.in_operator_namespace {
        return Err(Reason::OperatorNamespace);
    }
    validate::token(facts.name(), &facts.user.spec, index, &facts.allowed_metadata).map_err(|_| Reason::InvalidSpec)?;
    let instance = facts.instance.as_deref().map_err(|reason| *reason)?;
    let name = facts.user.spec.instance_ref.name.as_str();
    validate::instance(name, &instance.spec).map_err(|_| Reason::InstanceInvalid)?;
    let allowed = facts.allowed_audiences.as_ref().map_err(|reason| *reason)?;
    allowed.check(token, facts.zitadel_project_id())?;
    // Refused above; but what holds a space would be two scopes, so that it is looked at where it is put together.
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
        observed.owned_by(facts.name(), facts.uid())?;
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
        .and_then(|e| good(facts, token, e, admitted, &request_hash))
    {
        Some((record, value, current)) if current.schedule.is_valid(now) => {
            if current.schedule.is_fresh(now) && !asked(facts, &record) {
                return keep_or_write(facts, token, value, &record, &template_hash, current);
            }
            Some(current)
        }
        _ => None,
    };
    if admitted.observed.is_none()
        && let Some((record, value, current)) = left_over(facts, token, admitted, &request_hash)
        && current.schedule.is_fresh(now)
        && !asked(facts, &record)
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

/// Whether somebody fights us over the token's Secret.
fn is_contested(facts: &Facts, token: &Token) -> bool {
    facts.unscheduled.get(&token.name).copied().unwrap_or(0) > UNSCHEDULED
}

/// Whether a mint is forced from outside, and not due and not of other inputs.
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

/// What failed is tried again when its back-off has run, whatever else woke the object.
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

/// Whether there is a renew request that this token does not serve. One that was taken back asks for nothing.
fn asked(facts: &Facts, record: &Record) -> bool {
    facts
        .renew_request()
        .is_some_and(|request| record.request.as_ref() != Some(&request))
}

/// The token in the Secret, if it is the one that we wrote for these inputs.
fn good<'a>(
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
        // A JWT speaks for itself: a record could be forged along with its token.
        if let Some(id) = known_project_id(facts, token) {
            let expected = expected(token, admitted.instance, admitted.key, id);
            answer::check_claims(&claims, &expected).ok()?;
        }
        expires = claims.exp.map_or(expires, |exp| exp.min(expires));
    }
    let schedule = facts.schedule(token, record.issued_at, expires);
    Some((record, value, CurrentToken { schedule, format }))
}

/// A token for these inputs in a Secret that the spec no longer names: its entry was given another Secret.
fn left_over<'a>(
    facts: &'a Facts,
    token: &Token,
    admitted: &Admitted<'_>,
    request_hash: &str,
) -> Option<(Record, &'a str, CurrentToken)> {
    let those = facts.leftovers.iter().filter_map(|l| facts.secrets.get(&l.name));
    let mut ours = those.filter(|observed| observed.owned_by(facts.name(), facts.uid()).is_ok());
    ours.find_map(|observed| good(facts, token, observed, admitted, request_hash))
}

/// The real project id if it matters for `token`; any text if it does not; none if it matters and is not known.
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
    if unwritten.record.request_hash != request_hash || !schedule.is_fresh(now) || asked(facts, &unwritten.record) {
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

/// Hash of what decides a token: another one of these needs another token.
fn request_hash(facts: &Facts, admitted: &Admitted<'_>) -> String {
    hash::of([
        facts.user.spec.instance_ref.name.as_bytes(),
        admitted.instance.spec.issuer.as_bytes(),
        admitted.scope.as_bytes(),
        admitted.key.user_id.as_bytes(),
        admitted.key.key_id.as_bytes(),
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

/// What the token must be, once the real id of the ZITADEL project is known: the last check before a mint, since
/// until then a tenant might ask for that id by number (design §3.11).
pub fn expect(facts: &Facts, token: &Token, zitadel_project_id: &str) -> Result<Expected, Reason> {
    let instance = facts.instance.as_deref().map_err(|reason| *reason)?;
    let allowed = facts.allowed_audiences.as_ref().map_err(|reason| *reason)?;
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
