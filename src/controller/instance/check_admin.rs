//! Checks the admin credential of an instance, for its status.

use std::sync::Arc;

use crate::api::ZitadelInstance;
use crate::api::instance::AdminCredentialStatus;
use crate::controller::Context;
use crate::controller::instance::admin::Admin;
use crate::controller::instance::credential::{self, Credential};
use crate::controller::instance::rotate;
use crate::controller::refused::Refused;
use crate::domain::instance_status::AdminState;
use crate::domain::key_ledger::KeyLedger;
use crate::domain::key_rotation::BACKOFF;
use crate::domain::key_rotation_report;
use crate::domain::manager_role::ManagerRoles;
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::Reason;
use crate::domain::retry::{Failed, Wake};

/// Most roles of the administrator that the status shows.
const MOST_ROLES: usize = 16;

/// What a reconcile did with the admin credential.
pub struct Checked {
    /// What the status says.
    pub state: AdminState,
    /// When to check it again, by the clock of the server.
    pub wake: Wake,
    /// Whether this replica still leads.
    pub leads: bool,
}

/// Finds out who the administrator is and what it may do, and rotates its key.
pub async fn check_admin(ctx: &Context, id: &ObjectRef, instance: &Arc<ZitadelInstance>) -> Checked {
    let mut credential = credential::read(ctx, instance).await;
    let (admin, rotation) = match &mut credential {
        Ok(credential) => match who_is_admin(ctx, instance, credential).await {
            Ok(admin) => {
                let rotation = rotate::rotate(ctx, id, instance, credential, &admin).await;
                (Ok(admin), rotation)
            }
            Err(refused) => (Err(refused), rotate::waits(instance, Some(credential), refused.reason)),
        },
        Err(reason) => (Err((*reason).into()), rotate::waits(instance, None, *reason)),
    };
    let credential = credential.ok();
    let ledger = credential.as_ref().and_then(Credential::ledger);
    // Keys of a former administrator are not shown as keys of this one.
    let is_former = |ledger: &&KeyLedger| match &admin {
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
