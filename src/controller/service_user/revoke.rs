//! Revokes manager roles: those that no policy allows, and those of objects that are gone. Only the ledger says what to
//! revoke (`docs/adr/0022-manager-roles-are-granted-by-a-ledger.md`). A tenant must not be able to prevent it.

use std::sync::Arc;

use crate::api::service_user::{InstanceRef, ZitadelServiceUserSpec};
use crate::api::{ZitadelInstance, ZitadelServiceUser};
use crate::controller::Context;
use crate::controller::read::{ReadError, ReadUser};
use crate::controller::service_user::gather;
use crate::controller::service_user::roles::{Granted, Roles, at_scope, not_shown, request};
use crate::controller::session::in_time;
use crate::domain::access::Allowed;
use crate::domain::facts::Facts;
use crate::domain::manager_role::{self, WantedRoles};
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::Reason;
use crate::domain::role_ledger::{RoleChange, RoleLedger};
use crate::domain::role_report::RoleOutcome;

/// Revokes the roles of a deleted object, whatever its finalizers say: a tenant can remove them. Returns the object with the
/// resource version of the last write.
pub(super) async fn revoke(
    ctx: &Context,
    id: &ObjectRef,
    user: Arc<ZitadelServiceUser>,
) -> (Granted, Arc<ZitadelServiceUser>) {
    let mut roles = Roles::new(ctx, id, user, None);
    let revoked = in_time(roles.revoke_deleted()).await;
    let granted = Granted {
        outcome: revoked.err(),
        written: roles.written,
        requests: roles.session.requests(),
    };
    (granted, roles.user)
}

/// What a reconcile found out about the present object of a name.
#[derive(Clone, Copy)]
pub enum Present<'a> {
    /// The operator serves the object with this UID.
    Served(&'a str),
    /// The API server returned the object, and the operator does not serve it.
    Refused,
    /// The operator does not know the object, or it belongs to another operator. The cache may be behind.
    Unknown,
}

/// Revokes the roles of objects of this name that the operator does not serve: they vanished, are unreadable, or belong to
/// another instance now.
pub async fn revoke_lost(ctx: &Context, id: &ObjectRef, present: Present<'_>) -> Granted {
    let mut lost = Granted::default();
    for uid in ctx.memory.role_ledgers(id) {
        if matches!(present, Present::Served(served) if served == uid) {
            continue;
        }
        let mut roles = Roles::new(ctx, id, Arc::new(vanished(id, uid)), None);
        let revoked = in_time(roles.revoke_vanished(present)).await;
        lost.requests += roles.session.requests();
        if let Err(outcome) = revoked {
            tracing::warn!(object = %id, reason = %outcome.outcome.reason, "manager roles of an object that is not served could not be revoked");
            lost.outcome.get_or_insert(outcome);
        }
    }
    lost
}

/// What is known of an object that cannot be read.
fn vanished(id: &ObjectRef, uid: String) -> ZitadelServiceUser {
    let spec = ZitadelServiceUserSpec {
        instance_ref: InstanceRef { name: String::new() },
        key_secret_ref: None,
        user: None,
        key_rotation: None,
        manager_roles: Vec::new(),
        deletion_policy: None,
        suspend: None,
        tokens: Vec::new(),
    };
    let mut user = ZitadelServiceUser::new(&id.name, spec);
    user.metadata.namespace = Some(id.namespace.to_string());
    user.metadata.uid = Some(uid);
    user
}

impl Roles<'_> {
    /// Revokes the roles of the ledger if they were granted to another user or by another issuer.
    pub(super) async fn revoke_former(
        &mut self,
        facts: &Facts,
        present: &Arc<ZitadelInstance>,
    ) -> Result<(), RoleOutcome> {
        let Some(ledger) = self.stored.as_ref().map(|stored| stored.ledger.clone()) else {
            return Ok(());
        };
        let user_id = facts.key.as_ref().map_or(&ledger.user_id, |key| &key.user_id);
        if ledger.is_of(&present.spec.issuer, user_id) {
            return Ok(());
        }
        let instance = self.instance_of(&ledger, Some(present)).ok_or(Reason::OldRolesRemain)?;
        self.revoke_all(&instance).await?;
        self.drop_ledger().await
    }

    /// Revokes what the policies no longer allow, although something stops all other changes: a tenant must not be able to
    /// keep a role by suspending its object, or by naming an instance that does not exist.
    pub(super) async fn enforce(&mut self, facts: &Facts) -> Result<(), RoleOutcome> {
        let Some(ledger) = self.stored.as_ref().map(|stored| stored.ledger.clone()) else {
            return Ok(());
        };
        let is_moved = facts.user.spec.instance_ref.name != ledger.instance;
        let instance = match &facts.instance {
            Ok(instance) if instance.spec.issuer == ledger.issuer => {
                if instance.spec.suspend == Some(true) {
                    return Ok(());
                }
                instance.clone()
            }
            Err(_) if !is_moved => return Ok(()),
            // Nobody tells when the policies of the former instance change.
            _ => {
                let former = self.instance_of(&ledger, None).ok_or(Reason::OldRolesRemain)?;
                self.revoke_all(&former).await?;
                return self.drop_ledger().await;
            }
        };
        self.revoke_denied(&instance, &ledger, &facts.allowed).await
    }

    /// Revokes what the ledger names and no policy allows.
    async fn revoke_denied(
        &mut self,
        instance: &Arc<ZitadelInstance>,
        ledger: &RoleLedger,
        allowed: &Result<Allowed, Reason>,
    ) -> Result<(), RoleOutcome> {
        let none = Allowed::default();
        let allowed = match allowed {
            Ok(allowed) => allowed,
            // No selector matches these labels.
            Err(Reason::NamespaceLabelsTooLarge) => &none,
            Err(_) => return Ok(()),
        };
        let granted = ledger.scopes.iter().map(|granted| (&granted.scope, &granted.roles));
        let kept = manager_role::still_allowed(granted, allowed);
        if kept.iter().all(|kept| kept.denied.is_empty()) {
            return Ok(());
        }
        let left = self.revoke_except(instance, &kept).await?;
        self.store(&left).await
    }

    /// Revokes everything that the ledger names.
    async fn revoke_all(&mut self, instance: &Arc<ZitadelInstance>) -> Result<(), RoleOutcome> {
        self.revoke_except(instance, &[]).await.map(drop)
    }

    /// Revokes what the ledger names, except for some roles. Returns the ledger after that.
    async fn revoke_except(
        &mut self,
        instance: &Arc<ZitadelInstance>,
        kept: &[WantedRoles],
    ) -> Result<RoleLedger, RoleOutcome> {
        let stored = self.stored.as_ref().ok_or(Reason::Internal)?;
        let mut ledger = stored.ledger.clone();
        if ledger.scopes.is_empty() {
            return Ok(ledger);
        }
        // Other requests of the object must not delay this one.
        let admin = self.session.administrator(instance, false).await?;
        let mut recent = self.ctx.memory.role_changes.lock(&ledger.issuer, &ledger.user_id).await;
        let (changes, mut failed) = self.changes(&admin, &ledger, kept).await;
        let now = self.ctx.server_time(instance);
        for change in changes.into_iter().map(RoleChange::unproven) {
            // What the list does not show yet must not be taken for a role of someone else.
            let lag = change.lags(ledger.granted(&change.scope), now);
            if let Some((since, at)) = lag.or_else(|| recent.lags(&change.scope, &change.held, now)) {
                failed.get_or_insert(not_shown(since, at, now, &change.scope));
                continue;
            }
            if change.is_needed() {
                recent.requested(&change.scope, &change.target);
                if let Err(stop) = self.session.ask(request(&admin, &ledger.user_id, &change)).await {
                    if stop.0.reason.is_permanent() {
                        recent.shown(&change.scope);
                    }
                    failed.get_or_insert(at_scope(stop, &change.scope));
                    continue;
                }
                self.tell_change(&ledger.instance, &change).await;
            }
            ledger.set(change.confirmed());
        }
        match failed {
            None => Ok(ledger),
            Some(failed) => {
                self.store(&ledger).await?;
                Err(failed)
            }
        }
    }

    async fn revoke_deleted(&mut self) -> Result<(), RoleOutcome> {
        let stored = gather::role_ledger(self.ctx, &self.user).await;
        self.stored = stored.map_err(|_| Reason::APIServerUnavailable)??;
        if let Some(ledger) = self.stored.as_ref().map(|stored| stored.ledger.clone()) {
            let present = self.ctx.cache.instance(&self.user.spec.instance_ref.name).ok();
            let instance = self.instance_of(&ledger, present.as_ref());
            self.revoke_all(&instance.ok_or(Reason::InstanceMissing)?).await?;
        }
        self.forget().await
    }

    async fn revoke_vanished(&mut self, present: Present<'_>) -> Result<(), RoleOutcome> {
        let stored = gather::read_roles(self.ctx, self.id, self.uid()).await;
        self.stored = stored.map_err(|_| Reason::APIServerUnavailable)??;
        let Some(ledger) = self.stored.as_ref().map(|stored| stored.ledger.clone()) else {
            return Ok(());
        };
        let is_hidden = match present {
            Present::Unknown => match self.life(&ledger).await? {
                Life::GoesOn => return Ok(()),
                life => life == Life::Hidden,
            },
            Present::Served(_) | Present::Refused => false,
        };
        let instance = self.instance_of(&ledger, None).ok_or(Reason::InstanceMissing)?;
        // Of an unreadable object it is known which instance it names, so that changes of policies wake it.
        let known = self.ctx.cache.user(self.id);
        let is_unreadable =
            matches!(present, Present::Refused) && known.is_some_and(|known| *known.instance == *ledger.instance);
        if is_unreadable || is_hidden {
            let allowed = self.ctx.cache.allowed(&ledger.instance, &self.id.namespace);
            self.revoke_denied(&instance, &ledger, &allowed).await?;
            return if is_unreadable {
                Ok(())
            } else {
                Err(Reason::SecretsForbidden.into())
            };
        }
        self.revoke_all(&instance).await?;
        self.drop_ledger().await
    }

    /// Whether an object that the operator does not know exists after all, and still belongs to the instance of its ledger.
    async fn life(&self, ledger: &RoleLedger) -> Result<Life, RoleOutcome> {
        let read = match self.ctx.reader.user(self.id).await {
            Ok(read) => read,
            // The Role of the operator can be gone together with the namespace.
            Err(ReadError::Forbidden) => {
                let namespace = &self.id.namespace;
                let exists = self.ctx.cache.allowed(&ledger.instance, namespace) != Err(Reason::NamespaceMissing);
                let is_hidden = exists && !self.ctx.cache.is_terminating(namespace);
                return Ok(if is_hidden { Life::Hidden } else { Life::Over });
            }
            Err(ReadError::Unavailable) => return Err(Reason::APIServerUnavailable.into()),
        };
        let Some(ReadUser::Readable(user)) = read else {
            return Ok(Life::Over);
        };
        let is_same = user.metadata.uid.as_deref() == Some(self.uid()) && user.metadata.deletion_timestamp.is_none();
        let goes_on = is_same && user.spec.instance_ref.name == ledger.instance;
        Ok(if goes_on { Life::GoesOn } else { Life::Over })
    }
}

/// What became of an object that the operator does not know.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    /// It exists. Its event wakes it.
    GoesOn,
    /// It does not exist, or belongs to another instance now.
    Over,
    /// The operator lost its rights in the namespace.
    Hidden,
}
