//! Creates the service user that `spec.user` describes, and deletes it. The ledger names the user before ZITADEL hears of it,
//! so that a crash can neither lose nor duplicate it.

use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::api::metadata::METADATA_OWNER;
use crate::api::{ZitadelInstance, ZitadelServiceUser};
use crate::controller::instance::admin::Admin;
use crate::controller::key_rotation::{Rotation, random};
use crate::controller::refused::Refused;
use crate::controller::service_user::act::is_current;
use crate::controller::session::Stop;
use crate::domain::access::Allowed;
use crate::domain::admin_credential::sees_all_managers;
use crate::domain::facts::Facts;
use crate::domain::key_ledger::KeyLedger;
use crate::domain::key_rotation;
use crate::domain::managed_user::{Desired, Managed, default_username};
use crate::domain::manager_role::RoleScope;
use crate::domain::reason::Reason;
use crate::domain::user::{User, UserState};
use crate::domain::validate;
use crate::zitadel::{APIError, NewUser};

impl Rotation<'_, Arc<ZitadelServiceUser>> {
    /// Makes sure that the user in `spec.user` exists in ZITADEL as the spec describes it.
    pub(super) async fn provision(&mut self, facts: &Facts, instance: &Arc<ZitadelInstance>) -> Result<(), Stop> {
        let Some(user) = &facts.user.spec.user else {
            return Ok(());
        };
        if self
            .stored()
            .is_some_and(|stored| stored.ledger.issuer != instance.spec.issuer)
        {
            return Err(Reason::OldKeysRemain.into());
        }
        let managed = self.stored().and_then(|stored| stored.ledger.managed.as_ref());
        let exists = managed.is_some_and(|managed| managed.confirmed);
        let Some(cluster) = self.ctx.cluster_name.as_deref() else {
            // The user still rotates its own keys.
            return if exists {
                Ok(())
            } else {
                Err(Reason::ClusterUnnamed.into())
            };
        };
        validate::key_source(&facts.user.spec).map_err(|_| Reason::InvalidSpec)?;
        let desired = Desired::of(user, cluster, self.id, managed, facts.renew_request());
        let now = self.now(instance);
        if managed.is_some_and(|managed| !desired.is_to_be_checked(managed, now)) {
            return Ok(());
        }
        let is_applied = managed.is_some_and(|managed| desired.is_applied(managed));
        let allowed = facts.allowed.as_ref().map_err(|reason| *reason)?;
        let is_default = user.username.is_none() && user.existing_user_id.is_none();
        let default = default_username(cluster, self.id);
        let default = if is_default { &desired.username } else { &default };
        if !allowed.allows_user(&desired.organization_id, &desired.username, default) {
            // What exists stays after a policy was withdrawn.
            return if is_applied {
                Ok(())
            } else {
                Err(Reason::UserDenied.into())
            };
        }
        if !is_current(self.ctx, self.id, facts) {
            // The next reconcile, within seconds, decides anew.
            return Err(Reason::APIServerUnavailable.into());
        }
        match self.apply(instance, &desired, allowed, now).await {
            // Without the administrator, the user still rotates its own keys.
            Err(Stop(outcome)) if is_applied && !stops_rotation(outcome.reason) => {
                let mut ledger = self.ledger()?;
                // A renew request is not served: the next reconcile compares again.
                ledger.managed = ledger.managed.map(|managed| Managed {
                    checked: Some(now),
                    ..managed
                });
                self.store(ledger).await
            }
            ended => ended,
        }
    }

    /// Creates the user, takes it over or corrects it, and stores that.
    async fn apply(
        &mut self,
        instance: &Arc<ZitadelInstance>,
        desired: &Desired,
        allowed: &Allowed,
        now: Timestamp,
    ) -> Result<(), Stop> {
        let admin = self.session.administrator(instance, true).await?;
        if self.stored().is_none() {
            self.set_finalizer(true).await?;
            let user_id = desired.existing_id.clone().or_else(random_id).ok_or(Reason::Internal)?;
            let instance_name = instance.metadata.name.as_deref().unwrap_or_default();
            let (object, issuer) = (self.id.to_string(), &instance.spec.issuer);
            let ledger = KeyLedger::of_user(object, instance_name, issuer, user_id, desired.planned(now));
            self.store(ledger).await?;
        }
        let mut ledger = self.ledger()?;
        let mut managed = ledger.managed.clone().ok_or(Reason::KeyLedgerInvalid)?;
        let user_id = ledger.user_id.clone();
        if managed.confirmed {
            let corrected = correct(&admin, &user_id, &managed, desired, now);
            self.session.leading(corrected).await?;
        } else if managed.adopted {
            let adopted = may_adopt(&admin, &user_id, &managed, allowed);
            managed.username = self.session.leading(adopted).await?;
            let corrected = correct(&admin, &user_id, &managed, desired, now);
            self.session.leading(corrected).await?;
        } else {
            let created = create(&admin, &user_id, &managed, desired);
            self.session.leading(created).await?;
        }
        let is_new = !managed.confirmed;
        let managed = Managed {
            confirmed: true,
            since: if is_new { now } else { managed.since },
            applied: Some(desired.hash()),
            ..managed
        };
        ledger.managed = Some(desired.compared(managed, now));
        self.store(ledger).await?;
        if is_new {
            let adopted = desired.existing_id.is_some();
            let verb = if adopted { "took over" } else { "created" };
            let text = format!("The operator {verb} the service user {user_id} in ZITADEL.");
            self.tell(false, Reason::UserReady, text).await;
            if !adopted {
                self.ctx.metrics.user_changed(&instance.name_any(), true);
            }
        }
        Ok(())
    }

    /// Deletes the user that the operator created, with its keys. Ledger and metadata of the user must agree that it is the
    /// operator's.
    pub(super) async fn delete_user(
        &mut self,
        instance: &Arc<ZitadelInstance>,
        ledger: &KeyLedger,
        managed: &Managed,
    ) -> Result<(), Stop> {
        let now = self.now(instance);
        if managed.adopted {
            return self.leave_user(instance, ledger, managed, now).await;
        }
        let admin = self.session.administrator(instance, true).await?;
        let is_gone = self
            .session
            .leading(delete(&admin, &ledger.user_id, managed, now))
            .await?;
        if is_gone {
            self.ctx.metrics.user_changed(&instance.name_any(), false);
        } else {
            // Another owner has the user. The operator's keys of it are removed nevertheless.
            self.remove_all(instance, ledger, false).await?;
            self.report_left_user(ledger).await;
        }
        Ok(())
    }

    /// Removes the operator's keys of a user that existed before.
    async fn leave_user(
        &mut self,
        instance: &Arc<ZitadelInstance>,
        ledger: &KeyLedger,
        managed: &Managed,
        now: Timestamp,
    ) -> Result<(), Stop> {
        if !managed.confirmed {
            return Ok(());
        }
        match self.session.open_admin(instance, ledger, now).await {
            Ok(()) => self.remove_own(instance, ledger).await,
            Err(Stop(outcome)) if outcome.reason == Reason::UserMissing => Ok(()),
            // Another owner has the user, or it removed its metadata.
            Err(Stop(outcome)) if [Reason::UserConflict, Reason::AdminForbidden].contains(&outcome.reason) => {
                self.remove_all(instance, ledger, false).await
            }
            Err(stop) => Err(stop),
        }
    }

    /// Names the user that stays in ZITADEL.
    pub(super) async fn report_left_user(&self, ledger: &KeyLedger) {
        let reason = Reason::UserLeftBehind;
        let text = format!("{} User {}.", reason.advice(), ledger.user_id);
        self.tell(true, reason, text).await;
    }
}

/// Whether the user's key cannot be rotated while the comparison fails for this reason.
fn stops_rotation(reason: Reason) -> bool {
    use Reason::{NotLeading, UserConflict, UserInactive, UserMissing, UserNotReady};
    [NotLeading, UserConflict, UserInactive, UserMissing, UserNotReady].contains(&reason)
}

/// A user in ZITADEL, compared with the ledger.
enum Found {
    /// The user that the operator created.
    Ours(User),
    /// ZITADEL has no such user.
    Absent,
    /// The user belongs to somebody else.
    Foreign,
    /// ZITADEL does not show to whom the user belongs.
    Unclear,
}

async fn find(admin: &Admin, user_id: &str, managed: &Managed) -> Result<Found, Refused> {
    let (client, token) = (&admin.client, &admin.token);
    let Some(user) = client.user(token, user_id).await? else {
        admin.may_manage_users(&managed.organization_id).await?;
        return Ok(Found::Absent);
    };
    let is_owner = match client.metadata(token, user_id, METADATA_OWNER).await? {
        Some(owner) => owner == managed.owner.as_bytes(),
        None if managed.confirmed || managed.adopted => return Ok(Found::Unclear),
        // Nobody else knows the id before the metadata is set.
        None => true,
    };
    let is_ours = is_owner && user.machine.is_some() && user.organization_id == managed.organization_id;
    Ok(if is_ours { Found::Ours(user) } else { Found::Foreign })
}

/// The user, if it is the one that the operator created.
pub async fn confirm(admin: &Admin, user_id: &str, managed: &Managed, now: Timestamp) -> Result<User, Refused> {
    let reason = match find(admin, user_id, managed).await? {
        Found::Ours(user) => return Ok(user),
        Found::Foreign => return Err(Reason::UserConflict.into()),
        Found::Absent => Reason::UserMissing,
        Found::Unclear => Reason::AdminForbidden,
    };
    Err(lagging(managed, now).unwrap_or(reason.into()))
}

/// While ZITADEL may not show a new user yet, the operator asks again within seconds.
fn lagging(managed: &Managed, now: Timestamp) -> Option<Refused> {
    key_rotation::lags_until(managed.since, now).map(|_| Reason::UserNotReady.into())
}

/// Creates the user that the ledger names.
async fn create(admin: &Admin, user_id: &str, managed: &Managed, desired: &Desired) -> Result<(), Refused> {
    let (client, token) = (&admin.client, &admin.token);
    let new = NewUser {
        id: user_id,
        organization_id: &managed.organization_id,
        username: &managed.username,
        machine: &desired.machine,
    };
    match client.create_machine_user(token, new).await {
        Ok(()) => {}
        // An earlier request may have created it.
        Err(error @ (APIError::UserIDTaken | APIError::UsernameTaken)) => {
            match (find(admin, user_id, managed).await?, error) {
                (Found::Ours(_), _) => {}
                // ZITADEL does not show it yet.
                (Found::Absent, APIError::UserIDTaken) => return Err(Reason::UserNotReady.into()),
                _ => return Err(Reason::UserConflict.into()),
            }
        }
        Err(error) => return Err(error.into()),
    }
    let owner = managed.owner.as_bytes();
    Ok(client.set_metadata(token, user_id, METADATA_OWNER, owner).await?)
}

/// Changes the user to what the spec asks for.
async fn correct(
    admin: &Admin,
    user_id: &str,
    managed: &Managed,
    desired: &Desired,
    now: Timestamp,
) -> Result<(), Refused> {
    let user = confirm(admin, user_id, managed, now).await?;
    if [UserState::Inactive, UserState::Locked].contains(&user.state) {
        // A person did that, on purpose.
        return Err(Reason::UserInactive.into());
    }
    let found = user.machine.ok_or(Reason::UserConflict)?;
    let wanted = desired.for_user(&found);
    if found == wanted {
        return Ok(());
    }
    let updated = admin.client.update_machine_user(&admin.token, user_id, &wanted);
    Ok(updated.await?)
}

/// Refuses to take over a user unless its metadata names the object and a policy allows its username. Metadata alone proves
/// little, because a user can write its own. Therefore users with roles of the instance are refused in any case. Returns
/// the username.
async fn may_adopt(admin: &Admin, user_id: &str, managed: &Managed, allowed: &Allowed) -> Result<String, Refused> {
    let (client, token) = (&admin.client, &admin.token);
    let Found::Ours(user) = find(admin, user_id, managed).await? else {
        return Err(Reason::UserNotAdoptable.into());
    };
    if !allowed.allows_user(&managed.organization_id, &user.username, &managed.username) {
        return Err(Reason::UserDenied.into());
    }
    let scope = RoleScope::Instance;
    if !sees_all_managers(&admin.roles_in(&scope).await?) {
        return Err(Reason::AdminForbidden.into());
    }
    let roles = client.list_roles(token, user_id, &scope).await?;
    if !roles.is_empty() || admin.user_id == user_id {
        return Err(Reason::UserNotAdoptable.into());
    }
    Ok(user.username)
}

/// Deletes the user. Returns whether it is gone: it stays if it belongs to somebody else.
async fn delete(admin: &Admin, user_id: &str, managed: &Managed, now: Timestamp) -> Result<bool, Refused> {
    let (client, token) = (&admin.client, &admin.token);
    let found = find(admin, user_id, managed).await?;
    match (found, lagging(managed, now)) {
        (Found::Foreign, _) => return Ok(false),
        (Found::Ours(_), _) => client.delete_user(token, user_id).await?,
        // A request that created it may have ended a moment ago. A deletion finds what a list does not show yet.
        (Found::Absent, _) if !managed.confirmed => client.delete_user(token, user_id).await?,
        (_, Some(lag)) => return Err(lag),
        (Found::Unclear, None) => return Err(Reason::AdminForbidden.into()),
        (Found::Absent, None) => {}
    }
    Ok(true)
}

/// An id for a user, in the form of ZITADEL's own ids.
fn random_id() -> Option<String> {
    Some(format!("{:018}", random()? % 1_000_000_000_000_000_000))
}
