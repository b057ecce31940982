//! Deletes what the operator has made for a service user that is being deleted: its keys at ZITADEL, the ledger, and at
//! last the finalizer. Policies and suspension do not matter here: a deletion must not leave keys behind.

use std::sync::Arc;

use crate::api::ZitadelServiceUser;
use crate::api::service_user::KeyDeletionPolicy;
use crate::controller::Context;
use crate::controller::queue::Done;
use crate::controller::service_user::gather;
use crate::controller::service_user::key_session::Stop;
use crate::controller::service_user::rotate::{ROTATION_TIMEOUT, Rotation};
use crate::domain::key_rotation::{self, Outcome};
use crate::domain::key_rotation_report;
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::Reason;
use crate::domain::report::EventDraft;
use crate::domain::retry::{Failed, PendingRetries, Wake};

/// Reconciles a service user that is being deleted and has the operator's finalizer.
pub async fn clean_up(ctx: &Context, id: &ObjectRef, user: Arc<ZitadelServiceUser>, pending: &PendingRetries) -> Done {
    let mut rotation = Rotation::new(ctx, id, user, None);
    let waits = pending.get(key_rotation::BACKOFF);
    let waits = waits.filter(|retry| retry.until > ctx.clock.now() && !rotation.is_abandoned());
    let ended = if let Some(retry) = waits {
        Err(Stop(Outcome::deferred(retry.reason)))
    } else {
        let removed = tokio::time::timeout(ROTATION_TIMEOUT, remove(&mut rotation)).await;
        // Every step can be repeated.
        removed.unwrap_or_else(|_| Err(Reason::InstanceUnreachable.into()))
    };
    let Err(Stop(outcome)) = ended else {
        tracing::info!(object = %id, "the service user was deleted, and its keys were cleaned up");
        return Done {
            written: rotation.written,
            mints: rotation.session.requests(),
            ..Done::forget()
        };
    };
    let outcome = outcome.with_keys(ctx.clock.now());
    let mut failed: Vec<Failed> = outcome.failed().into_iter().collect();
    if outcome.reason != Reason::NotLeading {
        match tell(ctx, id, &rotation.user, outcome.reason).await {
            Ok(version) => rotation.written.extend(version),
            Err(reason) => failed.push(Failed::now("", reason)),
        }
    }
    // By the queue's clock.
    let skew = ctx.connections.skew(&rotation.user.spec.instance_ref.name).usable();
    let wake = Wake { at: None, failed };
    Done {
        wake: wake.shifted(-skew),
        written: rotation.written,
        mints: rotation.session.requests(),
        ..Done::default()
    }
}

async fn remove(rotation: &mut Rotation<'_>) -> Result<(), Stop> {
    let ctx = rotation.ctx;
    let spec = rotation.user.spec.clone();
    let stored = gather::key_ledger(ctx, &rotation.user).await;
    let stored = stored.map_err(|_| Reason::APIServerUnavailable)?;
    let left = rotation.is_abandoned() || spec.deletion_policy == Some(KeyDeletionPolicy::Orphan);
    match stored {
        Ok(stored) => rotation.stored = stored,
        // What an unreadable ledger names is unknown, and its Secret stays for a person to look at.
        Err(_) if left => {}
        Err(reason) => return Err(reason.into()),
    }
    if let Some(ledger) = rotation.stored.as_ref().map(|stored| stored.ledger.clone()) {
        if left {
            rotation.report_left_keys(&ledger).await;
            if ledger.managed.is_some() {
                rotation.report_left_user(&ledger).await;
            }
        } else {
            let present = ctx.cache.instance(&spec.instance_ref.name).ok();
            let instance = rotation.instance_of(&ledger, present.as_ref());
            let instance = instance.ok_or(Reason::InstanceMissing)?;
            match &ledger.managed {
                Some(managed) => rotation.delete_user(&instance, &ledger, managed).await?,
                None => rotation.remove_all(&instance, &ledger, Some(&spec)).await?,
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
) -> Result<Option<String>, Reason> {
    let (patch, text) = key_rotation_report::deletion_waits(user, reason, ctx.clock.now());
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
