//! Reconciles service users in four steps: gather, plan, act, report.

mod act;
mod clean_up;
mod finalizer;
mod gather;
mod grant;
mod lost_roles;
mod memory;
mod mint;
mod privileged;
mod provision;
mod revoke;
mod role_changes;
mod roles;
mod rotate;

use std::sync::Arc;
use std::time::Duration;

pub use act::TIME_TO_WRITE;
pub use gather::{instance_of, key_ledger_name};
pub use lost_roles::find as find_lost_roles;
pub use memory::Memory;
pub use provision::confirm;

use crate::api::service_user::{READY, UP_TO_DATE, ZitadelServiceUserStatus};
use crate::controller::Context;
use crate::controller::key_rotation::Rotated;
use crate::controller::queue::Done;
use crate::controller::read::ReadError;
use crate::controller::write::WriteError;
use crate::domain::facts::Facts;
use crate::domain::key_rotation;
use crate::domain::key_rotation_report::is_about_user;
use crate::domain::object_ref::ObjectRef;
use crate::domain::plan::plan;
use crate::domain::progress::Progress;
use crate::domain::reason::Reason;
use crate::domain::report::{Report, refusal, report};
use crate::domain::retry::{Failed, PendingRetries};
use crate::domain::role_report::{self, RoleOutcome};
use gather::Gathered;
use revoke::Present;
use roles::Granted;

/// Longest time for the Events of one reconcile.
const TIME_FOR_EVENTS: Duration = Duration::from_secs(2);

/// Reconciles one service user.
pub async fn reconcile(ctx: Arc<Context>, id: ObjectRef, pending_retries: PendingRetries) -> Done {
    let mut wants_key = false;
    let done = reconcile_once(&ctx, &id, pending_retries, &mut wants_key).await;
    if !wants_key {
        ctx.key_generator.forget(&id);
    }
    done
}

/// Sets `wants_key` if the key generator has a key to make for the object, or made one.
async fn reconcile_once(ctx: &Context, id: &ObjectRef, pending_retries: PendingRetries, wants_key: &mut bool) -> Done {
    let _timer = ctx.metrics.reconcile("ZitadelServiceUser");
    if gather::awaits_instance(ctx, id) {
        // The first reconcile of the instance wakes this service user.
        return Done::aborted(None);
    }
    let mut facts = match facts_or_done(ctx, id, &pending_retries).await {
        Ok(facts) => *facts,
        Err(done) => return done,
    };
    let mut rotated = Rotated::default();
    // A user that has no key gets one before its tokens are planned.
    let needs_key = facts.key.as_ref().is_err_and(|reason| *reason == Reason::UserNotReady);
    if needs_key {
        rotated = Box::pin(rotate::rotate(ctx, id, &mut facts, &[])).await;
        let reason = rotated.outcome.as_ref().map(|outcome| outcome.reason);
        if let Some(reason) = reason.filter(|reason| facts.key.is_err() && is_about_user(*reason)) {
            // The tokens fail for this reason.
            facts.key = Err(reason);
        }
    }
    if facts.key.is_ok() {
        // Tokens and roles that waited for the user do not wait any longer.
        facts.pending_retries.retain(|what, retry| match what.as_str() {
            key_rotation::BACKOFF => true,
            role_report::BACKOFF => retry.reason != Reason::UserNotReady,
            _token => !is_about_user(retry.reason),
        });
    }
    let plan = plan(&facts, facts.clock.theirs(ctx.clock.now()));
    let acted = act::act(ctx, id, &facts, plan).await;
    for outcome in &acted.outcomes {
        tracing::debug!(object = %id, token = outcome.token, reason = %outcome.reason, "token reconciled");
    }
    let mut written = acted.written;
    let leads = acted.outcomes.iter().all(|o| o.reason != Reason::NotLeading);
    if leads && !acted.outdated && !needs_key {
        // Boxed, because most objects do not rotate a key and need no room for this.
        rotated = Box::pin(rotate::rotate(ctx, id, &mut facts, &acted.outcomes)).await;
    }
    let leads = leads && rotated.outcome.as_ref().is_none_or(|o| o.reason != Reason::NotLeading);
    let mut granted = Granted::default();
    // Also for an outdated object: a tenant who changes it all the time must not keep a role.
    if leads {
        granted = Box::pin(grant::grant(ctx, id, &mut facts)).await;
    }
    written.append(&mut rotated.written);
    written.append(&mut granted.written);
    *wants_key = rotated.wants_key;
    // The responses of the server may have changed the clock skew.
    let skew = ctx.connections.skew(&facts.user.spec.instance_ref.name);
    let now = skew.theirs(ctx.clock.now());
    let mut report = report(
        &facts,
        &acted.outcomes,
        rotated.outcome.as_ref(),
        granted.outcome.as_ref(),
        now,
    );
    report.wake.failed.extend(acted.failed);
    // If leadership was lost or the reconcile is outdated, the present leader, the next process or the next reconcile
    // writes the status.
    let reasons = acted.outcomes.iter().map(|o| o.reason);
    let reasons = reasons.chain(rotated.outcome.iter().map(|o| o.reason));
    let mut reasons = reasons.chain(granted.outcome.iter().map(|o| o.outcome.reason));
    let may_publish = !acted.outdated && reasons.all(|reason| reason != Reason::NotLeading);
    let published = if may_publish {
        publish(ctx, &facts, &mut report).await
    } else {
        Ok(None)
    };
    match published {
        Ok(version) => written.extend(version),
        Err(error) => {
            error.log(id, "the status");
            report.wake.failed.push(Failed::now("", error.reason_for_status()));
        }
    }
    Done {
        // The queue uses the local clock.
        wake: report.wake.shifted(-skew.usable()),
        written,
        mints: acted.mints + rotated.requests + granted.requests,
        aborted: acted.outdated,
        ..Done::default()
    }
}

/// The facts about an object that the operator serves, or what it did with another one.
async fn facts_or_done(ctx: &Context, id: &ObjectRef, pending_retries: &PendingRetries) -> Result<Box<Facts>, Done> {
    let done = match gather::gather(ctx, id, pending_retries.clone()).await {
        Ok(Gathered::Facts(facts)) => return Ok(facts),
        Ok(Gathered::Refused {
            reason,
            generation,
            reported,
        }) => {
            let done = if reported {
                // The status already says so. Nothing to do until the object changes.
                Done::forget()
            } else {
                refuse(ctx, id, reason, generation).await
            };
            revoke_lost(ctx, id, pending_retries, (done, Present::Refused)).await
        }
        Ok(Gathered::Deleted(user)) => {
            ctx.memory.forget_tokens(id);
            Box::pin(clean_up::clean_up(ctx, id, user, pending_retries)).await
        }
        Ok(Gathered::Gone) => {
            ctx.memory.forget(id);
            ctx.keys.forget(id);
            if ctx.cache.is_terminating(&id.namespace) {
                ctx.writer.forget_namespace(&id.namespace);
            }
            revoke_lost(ctx, id, pending_retries, (Done::forget(), Present::Unknown)).await
        }
        Err(error) => {
            tracing::warn!(object = %id, %error, "could not read the state of the service user");
            let done = Done::aborted(Some(Reason::APIServerUnavailable));
            match error {
                // A tenant who takes the operator's rights in a namespace must not keep the roles there.
                ReadError::Forbidden => revoke_lost(ctx, id, pending_retries, (done, Present::Unknown)).await,
                ReadError::Unavailable => done,
            }
        }
    };
    Err(done)
}

/// Revokes the manager roles of an object that the operator does not serve.
async fn revoke_lost(
    ctx: &Context,
    id: &ObjectRef,
    pending: &PendingRetries,
    (done, present): (Done, Present<'_>),
) -> Done {
    let waits = pending.get(role_report::BACKOFF);
    let waits = waits.filter(|retry| retry.until > ctx.clock.now());
    if ctx.memory.role_ledgers(id).is_empty() {
        return done;
    }
    let failed = if let Some(retry) = waits {
        let outcome = Progress::deferred(retry.reason);
        Some(RoleOutcome::from(outcome))
    } else {
        Box::pin(revoke::revoke_lost(ctx, id, present)).await.outcome
    };
    // What is to be revoked must not wait for hours.
    let now = ctx.clock.now();
    let failed =
        failed.and_then(|RoleOutcome { outcome, .. }| outcome.retried_in_time(now).failed(role_report::BACKOFF));
    let Some(failed) = failed else {
        ctx.memory.forget(id);
        return done;
    };
    let mut wake = done.wake;
    wake.failed.push(failed);
    Done {
        wake,
        written: done.written,
        aborted: done.aborted,
        ..Done::default()
    }
}

/// Writes to the status why the operator does not serve the object.
async fn refuse(ctx: &Context, id: &ObjectRef, reason: Reason, generation: Option<i64>) -> Done {
    let patch = refusal(reason, &[READY, UP_TO_DATE], generation, ctx.clock.now());
    match ctx.writer.patch_user_status(id, &patch).await {
        Ok(version) => {
            tracing::info!(object = %id, %reason, "the service user is not served");
            Done {
                written: vec![version],
                ..Done::default()
            }
        }
        Err(error) => {
            error.log(id, "the status");
            Done::aborted(Some(error.reason_for_status()))
        }
    }
}

/// Logs one line for each token whose reason changed.
fn log_changes(facts: &Facts, status: &ZitadelServiceUserStatus) {
    let (namespace, name) = (facts.namespace(), facts.name());
    let before = facts.user.status.iter().flat_map(|status| &status.tokens);
    for token in &status.tokens {
        let last = before.clone().find(|last| last.name == token.name);
        if last.and_then(|last| last.reason.as_ref()) != token.reason.as_ref() {
            // Log the name with `Debug` formatting, because an invalid name may contain line breaks.
            let (reason, token) = (token.reason.as_deref().unwrap_or_default(), &token.name);
            tracing::info!(object = %format_args!("{namespace}/{name}"), ?token, reason, "token outcome changed");
        }
    }
}

/// Writes the status if it changed, then the Events. In this order, a conflict cannot cause duplicate Events.
async fn publish(ctx: &Context, facts: &Facts, report: &mut Report) -> Result<Option<String>, WriteError> {
    if facts.user.status.as_ref() == Some(&report.status) {
        return Ok(None);
    }
    let mut user = (*facts.user).clone();
    user.status = Some(report.status.clone());
    // A status write changes no metadata, and the operator does not know the names of other finalizers.
    user.metadata.finalizers = None;
    let version = ctx.writer.replace_user_status(&user).await?;
    log_changes(facts, &report.status);
    let tell = async {
        for draft in std::mem::take(&mut report.events) {
            ctx.writer.event(&*facts.user, "Reconcile", draft).await;
        }
    };
    // Events are informational, so slow ones must not delay refreshes.
    let _ = tokio::time::timeout(TIME_FOR_EVENTS, tell).await;
    Ok(Some(version))
}
