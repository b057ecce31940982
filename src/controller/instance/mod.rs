//! Reconciles instances: connects to ZITADEL and writes to the status whether the instance is ready.

pub mod admin;
mod check_admin;
mod connect;
pub mod credential;
mod rotate;

use std::sync::Arc;

pub use connect::{Connections, Wakeup, connect};

use crate::api::service_user::READY;
use crate::controller::Context;
use crate::controller::instance::check_admin::check_admin;
use crate::controller::queue::Done;
use crate::domain::backoff::Recovery;
use crate::domain::clock_skew::Skew;
use crate::domain::failure::{Failure, classify};
use crate::domain::instance_status::status;
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::Reason;
use crate::domain::report::refusal;
use crate::domain::retry::Failed;

/// Reconciles one instance: runs discovery, checks the issuer and the clock, and updates the status.
pub async fn reconcile(ctx: Arc<Context>, id: ObjectRef) -> Done {
    let instance = match ctx.cache.instance(&id.name) {
        Ok(instance) => instance,
        Err(Reason::InstanceMissing) => {
            ctx.connections.close(&id.name);
            ctx.metrics.forget(&id.name);
            ctx.keys.forget(&id);
            ctx.key_generator.forget(&id);
            return Done::forget();
        }
        Err(_) => return unreadable(&ctx, &id).await,
    };
    let _timer = ctx.metrics.reconcile("ZitadelInstance");
    let connection = connect(&ctx, &instance).await;
    let mut skew = Skew::default();
    let discovered = match connection {
        Ok(connection) => {
            let discovered = connection.discover().await;
            ctx.record_discovery(&connection, discovered.as_ref().map(drop).map_err(|failure| *failure));
            skew = connection.skew();
            discovered.and_then(|d| skew.check().map(|()| d).map_err(Failure::from))
        }
        Err(failure) => Err(failure),
    };
    let retry_after = discovered.as_ref().err().and_then(|failure| failure.retry_after());
    let discovered = discovered
        .map(|d| d.token_path)
        .map_err(|failure| classify(failure, false));
    if discovered == Err(Reason::TLSFailure) {
        ctx.connections.reload_certificates(&id.name);
    }
    let project_id = ctx.connections.known_project_id(&instance);
    let mut wanted = (*instance).clone();
    let now = ctx.clock.now();
    wanted.status = Some(status(&instance, &discovered, project_id.as_deref(), None, skew, now));
    match ctx.connections.record_reconcile(&id.name, wanted.is_ready()) {
        Some(Wakeup::AllUsers) => ctx.users.wake_all(ctx.cache.users_of(&id.name)),
        // Wake them now: their backoff may last longer than their tokens.
        Some(Wakeup::FailingUsers) => ctx.wake_failing_users_of(&id.name, Recovery::Instance),
        None => {}
    }
    // The service users do not wait for this.
    let checked = match &discovered {
        Ok(_) if instance.spec.admin_credential.is_some() && instance.spec.suspend != Some(true) => {
            Some(check_admin(&ctx, &id, &instance).await)
        }
        _ => None,
    };
    let state = checked.as_ref().map(|checked| &checked.state);
    wanted.status = Some(status(&instance, &discovered, project_id.as_deref(), state, skew, now));
    let leads = checked.as_ref().is_none_or(|checked| checked.leads);
    let mut wake = checked.map(|checked| checked.wake).unwrap_or_default();
    wake.failed.extend(discovered.err().map(|reason| Failed {
        not_before: retry_after,
        ..Failed::now("", reason)
    }));
    let mut done = Done {
        // The queue uses the local clock.
        wake: wake.shifted(-skew.usable()),
        ..Done::default()
    };
    // If another replica leads, it writes the status.
    if leads && ctx.writes_instance_status && instance.status != wanted.status {
        match ctx.writer.replace_instance_status(&wanted).await {
            Ok(version) => done.written.push(version),
            Err(error) => {
                error.log(&id, "the status");
                done.wake.failed.push(Failed::now("", error.reason_for_status()));
            }
        }
    }
    done
}

/// Handles an instance that does not match its schema. No tokens are requested from it. The status reports this by a
/// merge patch, because the present status may be the unreadable part.
async fn unreadable(ctx: &Context, id: &ObjectRef) -> Done {
    tracing::warn!(object = %id, "an instance does not match its schema; the operator requests no tokens from it");
    ctx.connections.close(&id.name);
    if !ctx.writes_instance_status {
        return Done::default();
    }
    let generation = ctx.cache.unreadable_generation(id);
    let patch = refusal(Reason::ObjectUnreadable, &[READY], generation, ctx.clock.now());
    match ctx.writer.patch_instance_status(&id.name, &patch).await {
        Ok(version) => Done {
            written: vec![version],
            ..Done::default()
        },
        Err(error) => {
            error.log(id, "the status");
            Done::aborted(Some(error.reason_for_status()))
        }
    }
}
