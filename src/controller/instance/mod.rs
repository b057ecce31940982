//! Reconciles instances: connects to ZITADEL and writes to the status whether the instance is ready.

pub mod admin;
mod connect;
pub mod credential;
mod rotate;

use std::sync::Arc;

pub use connect::{Connections, Wakeup, connect};

use crate::api::ZitadelInstance;
use crate::api::instance::AdminCredentialStatus;
use crate::api::service_user::READY;
use crate::controller::Context;
use crate::controller::instance::admin::{Admin, Refused};
use crate::controller::instance::credential::Credential;
use crate::controller::queue::Done;
use crate::domain::backoff::Recovery;
use crate::domain::clock_skew::Skew;
use crate::domain::failure::{Failure, classify};
use crate::domain::instance_status::{AdminState, status};
use crate::domain::key_ledger::Ledger;
use crate::domain::key_rotation::BACKOFF;
use crate::domain::key_rotation_report;
use crate::domain::manager_role::ManagerRoles;
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::Reason;
use crate::domain::report::refusal;
use crate::domain::retry::{Failed, Wake};

/// Most roles of the administrator that the status shows.
const MOST_ROLES: usize = 16;

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

/// What a reconcile did with the admin credential.
struct Checked {
    state: AdminState,
    /// When to check it again, by the clock of the server.
    wake: Wake,
    /// Whether this replica still leads.
    leads: bool,
}

/// Finds out who the administrator is and what it may do, and rotates its key.
async fn check_admin(ctx: &Context, id: &ObjectRef, instance: &Arc<ZitadelInstance>) -> Checked {
    let mut credential = credential::read(ctx, instance).await;
    let admin = match &credential {
        Ok(credential) => who_is_admin(ctx, instance, credential).await,
        Err(reason) => Err((*reason).into()),
    };
    let rotation = match (&admin, &mut credential) {
        (Ok(admin), Ok(credential)) => rotate::rotate(ctx, id, instance, credential, admin).await,
        (Err(refused), credential) => rotate::waits(instance, credential.as_ref().ok(), refused.reason),
        (Ok(_), Err(_)) => None,
    };
    let credential = credential.ok();
    let ledger = credential.as_ref().and_then(Credential::ledger);
    // Keys of a former administrator are not shown as keys of this one.
    let is_former = |ledger: &&Ledger| match &admin {
        Ok(admin) => !ledger.is_of(&instance.spec.issuer, &admin.user_id),
        Err(_) => false,
    };
    let ledger = ledger.filter(|ledger| !is_former(ledger));
    let schedule = rotate::schedule(instance).and_then(Result::ok);
    let accepted = admin.as_ref().map_err(|refused| refused.reason);
    let accepted = accepted.map(|status| AdminCredentialStatus {
        key_id: credential
            .as_ref()
            .and_then(|credential| credential.key_id(ctx, instance)),
        key_rotation: ledger.map(|ledger| key_rotation_report::status(ledger, schedule.as_ref(), &id.name)),
        ..status.clone()
    });
    let about_keys = rotation
        .iter()
        .flat_map(|outcome| key_rotation_report::conditions(ledger, outcome));
    let state = AdminState {
        accepted,
        key_conditions: about_keys.collect(),
    };
    let failed = admin.err().map(|refused| Failed {
        not_before: refused.not_before,
        ..Failed::now("adminCredential", refused.reason)
    });
    let failed_rotation = rotation.as_ref().and_then(|outcome| outcome.failed(BACKOFF));
    Checked {
        state,
        wake: Wake {
            at: rotation.as_ref().and_then(|outcome| outcome.next),
            failed: failed.into_iter().chain(failed_rotation).collect(),
        },
        leads: rotation.is_none_or(|outcome| outcome.reason != Reason::NotLeading),
    }
}

/// The administrator and its roles.
async fn who_is_admin(
    ctx: &Context,
    instance: &ZitadelInstance,
    credential: &Credential,
) -> Result<AdminCredentialStatus, Refused> {
    let admin = Admin::with(ctx, instance, credential).await?;
    let roles = admin.roles().await?;
    let mut roles: Vec<String> = roles.iter().flat_map(ManagerRoles::lines).collect();
    roles.sort_unstable();
    roles.truncate(MOST_ROLES);
    Ok(AdminCredentialStatus {
        user_id: admin.user_id,
        roles,
        ..AdminCredentialStatus::default()
    })
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
