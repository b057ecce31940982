//! Removes what the operator has made at ZITADEL for a service user that is being deleted: first the manager roles, then the
//! keys or the user, and each time the ledger and at last the finalizer. Policies and suspension do not matter here: a
//! deletion must leave neither roles nor keys behind. Keys and the user can be left at ZITADEL on request. Roles cannot: the
//! platform team allowed them to an object that is going away.

use std::sync::Arc;

use crate::api::ZitadelServiceUser;
use crate::api::metadata::{KEYS_FINALIZER, ROLES_FINALIZER};
use crate::api::service_user::UserDeletionPolicy;
use crate::controller::Context;
use crate::controller::key_rotation::Rotation;
use crate::controller::queue::Done;
use crate::controller::service_user::{finalizer, gather, revoke};
use crate::controller::session::{Stop, in_time};
use crate::domain::key_rotation::{self, KeyState};
use crate::domain::key_rotation_report;
use crate::domain::managed_user::Managed;
use crate::domain::manager_role::RoleScope;
use crate::domain::object_ref::ObjectRef;
use crate::domain::progress::Progress;
use crate::domain::reason::Reason;
use crate::domain::report::EventDraft;
use crate::domain::retry::{Failed, PendingRetries, Wake};
use crate::domain::role_report::{self, RoleOutcome};

/// Reconciles a service user that is being deleted and has a finalizer of the operator.
pub async fn clean_up(ctx: &Context, id: &ObjectRef, user: Arc<ZitadelServiceUser>, pending: &PendingRetries) -> Done {
    let abandoned = gather::is_abandoned(&user);
    let left = abandoned || user.spec.deletion_policy == Some(UserDeletionPolicy::Orphan);
    let waits = |what: &str| {
        let retry = pending.get(what)?;
        let goes_on = abandoned && what == key_rotation::BACKOFF;
        (retry.until > ctx.clock.now() && !goes_on).then(|| Progress::deferred(retry.reason))
    };
    let mut done = Done::forget();
    let mut user = user;
    let uid = user.metadata.uid.clone().unwrap_or_default();
    let may_have = finalizer::is_set(&user, ROLES_FINALIZER) || ctx.memory.role_ledgers(id).contains(&uid);
    if may_have || !user.spec.manager_roles.is_empty() {
        let failed = if let Some(outcome) = waits(role_report::BACKOFF) {
            let scope = ctx.memory.failed_role(id);
            Some(RoleOutcome { outcome, scope })
        } else {
            let (revoked, revoked_from) = revoke::revoke(ctx, id, user).await;
            user = revoked_from;
            done.written = revoked.written;
            done.mints = revoked.requests;
            let scope = revoked.outcome.as_ref().and_then(|outcome| outcome.scope.clone());
            ctx.memory.note_failed_role(id, scope);
            revoked.outcome
        };
        if let Some(RoleOutcome { outcome, scope }) = failed {
            return waiting(ctx, id, &user, (outcome, role_report::BACKOFF, scope), done).await;
        }
    }
    if finalizer::is_set(&user, KEYS_FINALIZER) {
        let mut rotation = Rotation::new(ctx, id, user, KeyState::none(Reason::KeySecretMissing));
        let ended = if let Some(outcome) = waits(key_rotation::BACKOFF) {
            Err(Stop(outcome))
        } else {
            in_time(remove(&mut rotation, left)).await
        };
        done.written.append(&mut rotation.written);
        done.mints += rotation.session.requests();
        if let Err(Stop(outcome)) = ended {
            return waiting(ctx, id, &rotation.holder, (outcome, key_rotation::BACKOFF, None), done).await;
        }
    }
    ctx.memory.forget(id);
    tracing::info!(object = %id, "the service user was deleted, and what the operator had made for it was removed");
    done
}

/// Reports why the deletion waits, and when it continues.
async fn waiting(
    ctx: &Context,
    id: &ObjectRef,
    user: &ZitadelServiceUser,
    (outcome, what, scope): (Progress, &str, Option<Box<RoleScope>>),
    done: Done,
) -> Done {
    let outcome = outcome.retried_in_time(ctx.clock.now());
    let mut failed: Vec<Failed> = outcome.failed(what).into_iter().collect();
    let mut written = done.written;
    if outcome.reason != Reason::NotLeading {
        let place = || {
            scope.map_or("Roles to revoke".to_owned(), |scope| {
                format!("Roles to revoke, {scope}")
            })
        };
        let roles = (what == role_report::BACKOFF).then(place);
        match tell(ctx, id, user, outcome.reason, roles.as_deref()).await {
            Ok(version) => written.extend(version),
            Err(reason) => failed.push(Failed::now("", reason)),
        }
    }
    // By the queue's clock.
    let skew = ctx.connections.skew(&user.spec.instance_ref.name).usable();
    let wake = Wake { at: None, failed };
    Done {
        wake: wake.shifted(-skew),
        written,
        mints: done.mints,
        ..Done::default()
    }
}

async fn remove(rotation: &mut Rotation<'_, Arc<ZitadelServiceUser>>, left: bool) -> Result<(), Stop> {
    let ctx = rotation.ctx;
    let stored = gather::key_ledger(ctx, &rotation.holder).await;
    match stored.map_err(|_| Reason::APIServerUnavailable)? {
        Ok(stored) => rotation.keys.ledger = Ok(stored),
        // What an unreadable ledger names is unknown, and its Secret stays for a person to look at.
        Err(_) if left => {}
        Err(reason) => return Err(reason.into()),
    }
    if let Some(ledger) = rotation.stored().map(|stored| stored.ledger.clone()) {
        if left {
            rotation.report_left_keys(&ledger).await;
            // A user that was not taken over is none of the operator's.
            let is_left = |managed: &Managed| managed.confirmed || !managed.adopted;
            if ledger.managed.as_ref().is_some_and(is_left) {
                rotation.report_left_user(&ledger).await;
            }
        } else {
            let present = ctx.cache.instance(&rotation.holder.spec.instance_ref.name).ok();
            let instance = rotation.instance_of(&ledger, present.as_ref());
            let instance = instance.ok_or(Reason::InstanceMissing)?;
            match &ledger.managed {
                Some(managed) => rotation.delete_user(&instance, &ledger, managed).await?,
                None => rotation.remove_all(&instance, &ledger, true).await?,
            }
        }
    }
    rotation.drop_ledger().await?;
    rotation.set_finalizer(false).await
}

/// Says in the status and in an Event why the deletion waits, unless the status says it already. Returns the resource
/// version of the status.
async fn tell(
    ctx: &Context,
    id: &ObjectRef,
    user: &ZitadelServiceUser,
    reason: Reason,
    roles: Option<&str>,
) -> Result<Option<String>, Reason> {
    let (patch, text) = key_rotation_report::deletion_waits(user, reason, roles, ctx.clock.now());
    let conditions = user.status.iter().flat_map(|status| &status.conditions);
    if conditions.into_iter().any(|condition| condition.message == text) {
        return Ok(None);
    }
    let version = ctx.writer.patch_user_status(id, &patch).await.map_err(|error| {
        error.log(id, "the status");
        error.reason_for_status()
    })?;
    let event = EventDraft {
        warning: true,
        reason,
        text,
    };
    ctx.writer.event(user, "Delete", event).await;
    Ok(Some(version))
}
