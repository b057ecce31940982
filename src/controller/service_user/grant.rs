//! Grants manager roles to the user of an object with the administrator of its instance, and revokes them. The ledger names
//! each role before ZITADEL hears of it, so that a crash leaves no role behind
//! (`docs/adr/0022-manager-roles-are-granted-by-a-ledger.md`). `domain/role_ledger.rs` decides what changes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;

use crate::api::metadata::{LABEL_ROLE_LEDGER, ROLES_FINALIZER};
use crate::api::service_user::{InstanceRef, ZitadelServiceUserSpec};
use crate::api::{ZitadelInstance, ZitadelServiceUser};
use crate::controller::Context;
use crate::controller::instance::admin::{Admin, Refused};
use crate::controller::read::{ReadError, ReadUser};
use crate::controller::service_user::act::is_current;
use crate::controller::service_user::key_session::{Session, Stop};
use crate::controller::service_user::provision::confirm;
use crate::controller::service_user::{finalizer, gather};
use crate::controller::write::{LedgerRef, WriteError};
use crate::domain::access::Allowed;
use crate::domain::admin_credential::sees_all_managers;
use crate::domain::facts::Facts;
use crate::domain::key_rotation::Outcome;
use crate::domain::manager_role::{self, RoleScope, WantedRoles, shown, takes_over_users};
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::Reason;
use crate::domain::report::EventDraft;
use crate::domain::role_ledger::{MOST_SCOPES, RoleChange, RoleLedger, StoredRoles};
use crate::domain::role_report::{BACKOFF, RoleOutcome};
use crate::domain::time::shifted;
use crate::domain::validate;
use crate::zitadel::APIError;

/// Longest time for the roles in one reconcile. The status of the tokens waits for it.
const ROLES_TIMEOUT: Duration = Duration::from_mins(2);

/// With more organizations, all count as privileged.
const MOST_PRIVILEGED: usize = 32;

/// How long a new object waits after the roles of a former one were revoked.
const AFTER_FORMER: SignedDuration = SignedDuration::from_secs(5);

/// When to look again for a change that ZITADEL does not show yet.
const SHOWN_SOON: SignedDuration = SignedDuration::from_secs(1);

/// What a reconcile did for the manager roles.
#[derive(Default)]
pub struct Granted {
    /// How the roles stand. `None` if the object has none.
    pub outcome: Option<RoleOutcome>,
    /// Resource versions of the object that this wrote.
    pub written: Vec<String>,
    /// Number of requests to ZITADEL.
    pub requests: usize,
}

/// The manager roles of one object.
pub(super) struct Grants<'a> {
    ctx: &'a Context,
    id: &'a ObjectRef,
    /// The object, with the resource version of the last write.
    user: Arc<ZitadelServiceUser>,
    /// The ledger as it is stored.
    stored: Option<StoredRoles>,
    session: Session<'a>,
    written: Vec<String>,
}

impl From<Stop> for RoleOutcome {
    fn from(Stop(outcome): Stop) -> Self {
        outcome.into()
    }
}

impl From<Reason> for RoleOutcome {
    fn from(reason: Reason) -> Self {
        Outcome::new(reason).into()
    }
}

/// Grants and revokes what is due. Updates the object in `facts`.
pub async fn grant(ctx: &Context, id: &ObjectRef, facts: &mut Facts) -> Granted {
    let now = facts.clock.theirs(ctx.clock.now());
    let waits = facts.pending_retries.get(BACKOFF);
    let waits = waits.filter(|retry| retry.until > now).map(|retry| retry.reason);
    // A former object of this name may have had roles.
    let has_former = ctx.memory.role_ledgers(id).iter().any(|uid| uid != facts.uid());
    if !has_former {
        return grant_served(ctx, id, facts, waits).await;
    }
    if let Some(reason) = waits {
        let outcome = Outcome::deferred(reason);
        return Granted {
            outcome: Some(outcome.into()),
            ..Granted::default()
        };
    }
    let former = revoke_lost(ctx, id, Found::Served(facts.uid())).await;
    if former.outcome.is_none() {
        let stored = facts.roles.as_ref().ok().cloned().flatten();
        let mut grants = Grants::new(ctx, id, facts.user.clone(), stored);
        let compared_again = grants.forget_comparison().await;
        // ZITADEL may still show these roles, which would then count as granted by others.
        let outcome = Stop::deferred(Reason::ManagerRolesNotShown, shifted(now, AFTER_FORMER));
        return Granted {
            outcome: Some(compared_again.err().unwrap_or(outcome.into())),
            ..former
        };
    }
    let granted = grant_served(ctx, id, facts, waits).await;
    Granted {
        outcome: former.outcome,
        requests: former.requests + granted.requests,
        ..granted
    }
}

async fn grant_served(ctx: &Context, id: &ObjectRef, facts: &mut Facts, waits: Option<Reason>) -> Granted {
    let spec_has_roles = !facts.user.spec.manager_roles.is_empty();
    if !spec_has_roles && matches!(facts.roles, Ok(None)) && !finalizer::is_set(&facts.user, ROLES_FINALIZER) {
        return Granted::default();
    }
    let now = facts.clock.theirs(ctx.clock.now());
    let stored = facts.roles.as_ref().ok().cloned().flatten();
    let mut grants = Grants::new(ctx, id, facts.user.clone(), stored);
    let outcome = match (obstacle(facts), waits) {
        (Some(outcome), None) => {
            let enforced = tokio::time::timeout(ROLES_TIMEOUT, grants.enforce(facts)).await;
            let enforced = enforced.unwrap_or_else(|_| Err(Reason::InstanceUnreachable.into()));
            let outcome = enforced.err().unwrap_or(outcome.into());
            ctx.memory.note_failed_role(id, outcome.scope.clone());
            facts.user = grants.user.clone();
            Some(outcome)
        }
        (_, Some(reason)) => Some(RoleOutcome {
            outcome: Outcome::deferred(reason),
            scope: ctx.memory.failed_role(id),
        }),
        (None, None) => {
            let advanced = tokio::time::timeout(ROLES_TIMEOUT, grants.advance(facts)).await;
            // Every step can be repeated.
            let advanced = advanced.unwrap_or_else(|_| Err(Reason::InstanceUnreachable.into()));
            let outcome = advanced.unwrap_or_else(Some);
            ctx.memory
                .note_failed_role(id, outcome.as_ref().and_then(|outcome| outcome.scope.clone()));
            facts.user = grants.user.clone();
            outcome
        }
    };
    // What is to be revoked must not wait for hours.
    let holds_roles = grants.stored.is_some();
    let outcome = outcome.map(|RoleOutcome { outcome, scope }| RoleOutcome {
        outcome: if holds_roles { outcome.with_keys(now) } else { outcome },
        scope,
    });
    Granted {
        outcome,
        written: grants.written,
        requests: grants.session.requests(),
    }
}

/// Why the roles have to wait, if they have.
fn obstacle(facts: &Facts) -> Option<Outcome> {
    if facts.is_suspended() {
        return Some(Outcome::waiting(Reason::Suspended));
    }
    // Nothing tells that the Secret was repaired.
    let ledger = facts.roles.as_ref().err().map(|reason| Outcome::new(*reason));
    let instance = facts.instance.as_ref().err();
    let others = instance.or(facts.allowed.as_ref().err());
    ledger.or(others.map(|reason| Outcome::waiting(*reason)))
}

impl<'a> Grants<'a> {
    fn new(ctx: &'a Context, id: &'a ObjectRef, user: Arc<ZitadelServiceUser>, stored: Option<StoredRoles>) -> Self {
        Self {
            ctx,
            id,
            user,
            stored,
            session: Session::new(ctx, id),
            written: Vec::new(),
        }
    }

    /// Gives the user the roles of the spec that the policies allow, and takes those that the operator granted and that are
    /// no longer among them. Returns nothing if the object no longer has roles.
    async fn advance(&mut self, facts: &Facts) -> Result<Option<RoleOutcome>, RoleOutcome> {
        let instance = facts.instance.clone()?;
        let allowed = facts.allowed.as_ref().map_err(|reason| *reason)?;
        validate::manager_roles(&facts.user.spec).map_err(|_| Reason::InvalidSpec)?;
        if self.stored.is_some() {
            // Someone may have removed it.
            self.set_finalizer(true).await?;
        }
        self.revoke_former(facts, &instance).await?;
        let wanted = manager_role::wanted(&facts.user.spec, allowed);
        let in_ledger = self.stored.as_ref().map(|stored| stored.ledger.user_id.clone());
        let in_key = facts.key.as_ref().map(|key| key.user_id.clone());
        let user_id = in_key.or_else(|reason| in_ledger.ok_or(*reason));
        let grants_some = wanted.iter().any(|wanted| !wanted.roles.is_empty());
        if let Ok(user_id) = &user_id {
            let hash = manager_role::hash(&wanted, &instance.name_any(), user_id);
            let (request, now) = (facts.renew_request(), self.ctx.server_time(&instance));
            let is_due = match &self.stored {
                Some(stored) => stored.ledger.is_due(&hash, request.as_deref(), now),
                None => grants_some,
            };
            if is_due {
                if !is_current(self.ctx, self.id, facts) {
                    // The next reconcile, within seconds, decides anew.
                    return Err(Reason::APIServerUnavailable.into());
                }
                let applied = self.apply(facts, &instance, wanted.clone(), user_id).await?;
                self.confirm(applied, &hash, request, now).await?;
            }
        } else if grants_some {
            return Err(user_id.err().unwrap_or(Reason::Internal).into());
        }
        let is_empty = self.stored.as_ref().is_none_or(|s| s.ledger.scopes.is_empty());
        if is_empty && !grants_some {
            self.forget().await?;
            if facts.user.spec.manager_roles.is_empty() {
                return Ok(None);
            }
        }
        if let Some(denied) = wanted.into_iter().find(|wanted| !wanted.denied.is_empty()) {
            return Err(RoleOutcome {
                outcome: Outcome::new(Reason::ManagerRolesDenied),
                scope: Some(Box::new(denied.scope)),
            });
        }
        Ok(Some(Reason::ManagerRolesGranted.into()))
    }

    /// Brings ZITADEL in line with `wanted`. Returns the ledger after it, and the first failure.
    async fn apply(
        &mut self,
        facts: &Facts,
        instance: &Arc<ZitadelInstance>,
        wanted: Vec<WantedRoles>,
        user_id: &str,
    ) -> Result<Applied, RoleOutcome> {
        let mut ledger = match &self.stored {
            Some(stored) => stored.ledger.clone(),
            None => self.new_ledger(instance, user_id),
        };
        // The object may name another ZitadelInstance of the same issuer now.
        ledger.instance = instance.name_any();
        let (admin, throttled) = self.administrator(instance, &ledger, &wanted).await?;
        if admin.user_id == user_id {
            return Err(Reason::UserIsAdministrator.into());
        }
        let only_revokes = throttled.is_some();
        let (wanted, mut failed) = if only_revokes {
            (wanted, throttled)
        } else {
            self.unprivileged(&admin, wanted, &ledger).await
        };
        let (mut changes, unlisted) = self.changes(&admin, &ledger, &wanted).await;
        failed = failed.or(unlisted);
        if only_revokes {
            changes = changes.into_iter().map(RoleChange::unproven).collect();
        } else if changes.iter().any(RoleChange::needs_proof)
            && let Err(reason) = self.prove(facts, instance, &admin, user_id).await
        {
            failed.get_or_insert(reason);
            changes = changes.into_iter().map(RoleChange::unproven).collect();
        }
        let now = self.ctx.server_time(instance);
        let before = ledger.clone();
        let mut needed = Vec::new();
        for change in changes {
            let granted = before.granted(&change.scope);
            if let Some((since, at)) = change.lags(granted, now) {
                failed.get_or_insert(not_shown(since, at, now, &change.scope));
            } else if !change.is_needed() {
                ledger.set(change.confirmed());
            } else if granted.is_some() || ledger.scopes.len() < MOST_SCOPES {
                ledger.set(change.intent(now));
                needed.push(change);
            } else {
                // The ledger is full until other roles are revoked.
                failed.get_or_insert(at_scope(Reason::ManagerRolesNotShown.into(), &change.scope));
            }
        }
        if !needed.is_empty() {
            self.set_finalizer(true).await?;
            self.store(&ledger).await?;
        }
        let mut accepted = Vec::new();
        for change in needed {
            match self.session.ask(request(&admin, user_id, &change)).await {
                Ok(()) => accepted.push(change),
                Err(stop) => {
                    // ZITADEL may have carried out a request whose answer is lost.
                    if stop.0.reason.is_permanent() {
                        ledger.restore(&change.scope, &before);
                    }
                    failed.get_or_insert(at_scope(stop, &change.scope));
                }
            }
        }
        if !accepted.is_empty() {
            for change in &accepted {
                let shown = self.session.ask(roles_in(&admin, user_id, &change.scope)).await;
                if shown.is_ok_and(|shown| shown == change.target) {
                    ledger.set(change.confirmed());
                } else {
                    failed.get_or_insert(not_shown(now, Timestamp::MAX, now, &change.scope));
                }
            }
        }
        Ok(Applied {
            ledger,
            failed,
            accepted,
        })
    }

    /// Begins a session of the administrator. If the object has made too many requests, and there is something to revoke, the
    /// session is for that only. Also returns why.
    async fn administrator(
        &self,
        instance: &Arc<ZitadelInstance>,
        ledger: &RoleLedger,
        wanted: &[WantedRoles],
    ) -> Result<(Admin, Option<RoleOutcome>), RoleOutcome> {
        match self.session.administrator(instance, true).await {
            Ok(admin) => Ok((admin, None)),
            Err(stop) if stop.0.reason == Reason::RequestsThrottled && ledger.exceeds(wanted) => {
                let admin = self.session.administrator(instance, false).await?;
                Ok((admin, Some(stop.into())))
            }
            Err(stop) => Err(stop.into()),
        }
    }

    /// Stores what was applied, and tells of it.
    async fn confirm(
        &mut self,
        applied: Applied,
        hash: &str,
        request: Option<String>,
        now: Timestamp,
    ) -> Result<(), RoleOutcome> {
        let Applied {
            mut ledger,
            failed,
            accepted,
        } = applied;
        if failed.is_none() {
            ledger.applied = Some(hash.to_owned());
            ledger.request = request;
            ledger.checked = Some(now);
        }
        let is_stored = |stored: &StoredRoles| stored.ledger == ledger;
        // After a failure, a ledger without roles would say nothing.
        let is_needed = failed.is_none() || !ledger.scopes.is_empty();
        if !self.stored.as_ref().map_or(!is_needed, is_stored) {
            self.set_finalizer(true).await?;
            self.store(&ledger).await?;
        }
        for change in &accepted {
            self.tell_change(&ledger.instance, change).await;
        }
        failed.map_or(Ok(()), Err)
    }

    /// Leaves out the roles with which the user could take over the instance, unless a policy allows them in any case. Also
    /// returns why the first of them is left out. If that cannot be found out, only new roles are left out.
    async fn unprivileged(
        &self,
        admin: &Admin,
        mut wanted: Vec<WantedRoles>,
        ledger: &RoleLedger,
    ) -> (Vec<WantedRoles>, Option<RoleOutcome>) {
        if wanted.iter().all(|wanted| wanted.if_unprivileged.is_empty()) {
            return (wanted, None);
        }
        let privileged = self.session.ask(Privileged::of(admin, &ledger.user_id)).await;
        let mut failed = None;
        let (privileged, keeps) = match privileged {
            Ok(privileged) => (Some(privileged), false),
            Err(stop) => {
                failed = Some(stop.into());
                (None, true)
            }
        };
        for wanted in &mut wanted {
            let is_privileged = privileged.as_ref().is_none_or(|places| places.contains(&wanted.scope));
            if wanted.if_unprivileged.is_empty() || !is_privileged {
                continue;
            }
            let granted = ledger.granted(&wanted.scope);
            let stays = |role: &String| keeps && granted.is_some_and(|granted| granted.roles.contains(role));
            wanted
                .roles
                .retain(|role| !wanted.if_unprivileged.contains(role) || stays(role));
            wanted.exclusive = false;
            failed.get_or_insert(at_scope(Reason::PrivilegedRolesDenied.into(), &wanted.scope));
        }
        (wanted, failed)
    }

    /// Makes sure that the roles go to a user that the operator created, or whose key the object has: ZITADEL accepts it,
    /// and for this user. Otherwise a key file with the id of another user would give roles to that user.
    async fn prove(
        &mut self,
        facts: &Facts,
        instance: &Arc<ZitadelInstance>,
        admin: &Admin,
        user_id: &str,
    ) -> Result<(), RoleOutcome> {
        let key = facts.key.clone()?;
        if facts.user.spec.user.is_some() {
            let ledger = facts.keys.ledger.as_ref().ok().and_then(Option::as_ref);
            let managed = ledger.and_then(|stored| stored.ledger.managed.as_ref());
            let managed = managed.filter(|managed| managed.created).ok_or(Reason::UserNotReady)?;
            let now = self.ctx.server_time(instance);
            self.session.ask(confirm(admin, user_id, managed, now)).await?;
            return Ok(());
        }
        self.session.open_too(instance, &key).await?;
        if self.session.who_am_i().await? == user_id {
            Ok(())
        } else {
            Err(Reason::TokenMismatch.into())
        }
    }

    /// Revokes the roles of the ledger if they were granted to another user or by another issuer.
    async fn revoke_former(&mut self, facts: &Facts, present: &Arc<ZitadelInstance>) -> Result<(), RoleOutcome> {
        let Some(ledger) = self.stored.as_ref().map(|stored| stored.ledger.clone()) else {
            return Ok(());
        };
        let user_id = facts.key.as_ref().map_or(&ledger.user_id, |key| &key.user_id);
        if ledger.is_of(&present.spec.issuer, user_id) {
            return Ok(());
        }
        let instance = self.instance_of(&ledger, Some(present)).ok_or(Reason::OldRolesRemain)?;
        self.revoke_all(&instance).await?;
        self.drop_ledger().await?;
        Ok(())
    }

    /// The next reconcile compares the roles with ZITADEL again.
    async fn forget_comparison(&mut self) -> Result<(), RoleOutcome> {
        let Some(mut ledger) = self.stored.as_ref().map(|stored| stored.ledger.clone()) else {
            return Ok(());
        };
        ledger.applied = None;
        self.store(&ledger).await
    }

    /// Revokes what the policies no longer allow, although something stops all other changes: a tenant must not be able to
    /// keep a role by suspending its object, or by naming an instance that does not exist.
    async fn enforce(&mut self, facts: &Facts) -> Result<(), RoleOutcome> {
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
        let (changes, mut failed) = self.changes(&admin, &ledger, kept).await;
        let now = self.ctx.server_time(instance);
        for change in changes.into_iter().map(RoleChange::unproven) {
            // What the list does not show yet must not be taken for a role of someone else.
            if let Some((since, at)) = change.lags(ledger.granted(&change.scope), now) {
                failed.get_or_insert(not_shown(since, at, now, &change.scope));
                continue;
            }
            if change.is_needed() {
                if let Err(stop) = self.session.ask(request(&admin, &ledger.user_id, &change)).await {
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

    /// What is to change in the scopes of the ledger and in those of `wanted`. A scope that ZITADEL does not show is left out,
    /// and is the failure that this returns.
    async fn changes(
        &self,
        admin: &Admin,
        ledger: &RoleLedger,
        wanted: &[WantedRoles],
    ) -> (Vec<RoleChange>, Option<RoleOutcome>) {
        let former = ledger.scopes.iter().map(|granted| &granted.scope);
        let scopes: BTreeSet<&RoleScope> = wanted.iter().map(|wanted| &wanted.scope).chain(former).collect();
        let (mut changes, mut failed) = (Vec::new(), None);
        for scope in scopes {
            match self.session.ask(roles_in(admin, &ledger.user_id, scope)).await {
                Ok(held) => changes.push(ledger.change(scope, wanted, held)),
                Err(stop) => drop(failed.get_or_insert(at_scope(stop, scope))),
            }
        }
        (changes, failed)
    }

    /// The instance that the roles of the ledger belong to.
    fn instance_of(&self, ledger: &RoleLedger, present: Option<&Arc<ZitadelInstance>>) -> Option<Arc<ZitadelInstance>> {
        gather::instance_of(self.ctx, &ledger.instance, &ledger.issuer, present)
    }

    async fn tell_change(&self, instance: &str, change: &RoleChange) {
        let part = |verb: &str, roles: Vec<&str>| {
            if roles.is_empty() {
                String::new()
            } else {
                format!(" {verb} {}.", roles.join(", "))
            }
        };
        let added: Vec<&str> = change.added().map(|role| shown(role)).collect();
        let removed: Vec<&str> = change.removed().map(|role| shown(role)).collect();
        if added.is_empty() && removed.is_empty() {
            return;
        }
        self.ctx.metrics.roles_changed(instance, added.len(), removed.len());
        let (granted, revoked) = (part("granted", added), part("revoked", removed));
        let mut text = format!("Manager roles, {}:{granted}{revoked}", change.scope);
        // The API server rejects a longer note.
        text.truncate(text.floor_char_boundary(1_000));
        let event = EventDraft {
            warning: false,
            reason: Reason::ManagerRolesGranted,
            text,
        };
        self.ctx.tell(&self.user, "Grant", event).await;
    }

    fn new_ledger(&self, instance: &ZitadelInstance, user_id: &str) -> RoleLedger {
        let cluster = self.ctx.cluster_name.as_deref();
        let object = cluster.map_or_else(|| self.id.to_string(), |cluster| format!("{cluster}/{}", self.id));
        RoleLedger::new(object, &instance.name_any(), &instance.spec.issuer, user_id)
    }

    /// Writes the ledger. If another process wrote it meanwhile, this one stops.
    async fn store(&mut self, ledger: &RoleLedger) -> Result<(), RoleOutcome> {
        let name = self.ledger_name();
        let at = LedgerRef {
            namespace: self.home()?,
            name: &name,
            label: LABEL_ROLE_LEDGER,
            owner: self.uid(),
            stored: self.stored.as_ref().map(|stored| stored.secret(&name)),
        };
        let written = self.ctx.writer.write_ledger(&at, ledger.data()).await;
        let (uid, resource_version) = written.map_err(|error| self.write_failed(&error))?;
        self.ctx.memory.note_roles(self.id, self.uid(), true);
        self.stored = Some(StoredRoles {
            ledger: ledger.clone(),
            uid,
            resource_version,
        });
        Ok(())
    }

    /// Removes the ledger, then the finalizer.
    async fn forget(&mut self) -> Result<(), RoleOutcome> {
        self.drop_ledger().await?;
        self.set_finalizer(false).await
    }

    async fn drop_ledger(&mut self) -> Result<(), RoleOutcome> {
        if let Some(stored) = self.stored.take() {
            let secret = stored.secret(&self.ledger_name());
            let deleted = self.ctx.writer.delete_secret(self.home()?, &secret).await;
            deleted.map_err(|error| self.write_failed(&error))?;
            self.ctx.memory.note_roles(self.id, self.uid(), false);
        }
        Ok(())
    }

    async fn set_finalizer(&mut self, present: bool) -> Result<(), RoleOutcome> {
        let written = finalizer::set(self.ctx, &mut self.user, ROLES_FINALIZER, present).await;
        let written = written.map_err(|error| self.write_failed(&error))?;
        self.written.extend(written);
        Ok(())
    }

    fn write_failed(&self, error: &WriteError) -> RoleOutcome {
        error.log(self.id, "the role ledger or the finalizer");
        error.reason_for_ledger().into()
    }

    fn home(&self) -> Result<&'a str, RoleOutcome> {
        let namespace = self.ctx.operator_namespace.as_deref();
        namespace.ok_or_else(|| Reason::LedgerUnavailable.into())
    }

    fn ledger_name(&self) -> String {
        gather::role_ledger_name(self.uid())
    }

    fn uid(&self) -> &str {
        self.user.metadata.uid.as_deref().unwrap_or_default()
    }
}

/// What a reconcile changed at ZITADEL.
struct Applied {
    /// The ledger to store.
    ledger: RoleLedger,
    /// The first failure.
    failed: Option<RoleOutcome>,
    /// The changes that ZITADEL accepted.
    accepted: Vec<RoleChange>,
}

/// ZITADEL may show a change soon, and certainly does at `until`. The operator asks again after as long as it has waited.
fn not_shown(since: Timestamp, until: Timestamp, now: Timestamp, scope: &RoleScope) -> RoleOutcome {
    let waited = now.duration_since(since).max(SHOWN_SOON);
    let at = until.min(shifted(now, waited));
    at_scope(Stop::deferred(Reason::ManagerRolesNotShown, at), scope)
}

fn at_scope(Stop(outcome): Stop, scope: &RoleScope) -> RoleOutcome {
    RoleOutcome {
        outcome,
        scope: Some(Box::new(scope.clone())),
    }
}

/// The reason of an error about manager roles.
fn refused(error: APIError) -> Refused {
    match error {
        APIError::Rejected
        | APIError::UnknownOrganization
        | APIError::UnknownProject
        | APIError::UnknownProjectGrant
        | APIError::UnknownRole => Reason::ManagerRolesRejected.into(),
        APIError::UnknownUser => Reason::UserMissing.into(),
        // The list was outdated or is cut short, or the administrator does not see the roles.
        APIError::IsManager | APIError::IsNoManager | APIError::TooMany => Reason::ManagerRolesNotShown.into(),
        error => error.into(),
    }
}

async fn roles_in(admin: &Admin, user_id: &str, scope: &RoleScope) -> Result<BTreeSet<String>, Refused> {
    let listed = admin.client.list_roles(&admin.token, user_id, scope).await;
    listed.map_err(refused)
}

async fn request(admin: &Admin, user_id: &str, change: &RoleChange) -> Result<(), Refused> {
    let (client, token, scope) = (&admin.client, &admin.token, &change.scope);
    let done = match (change.held.is_empty(), change.target.is_empty()) {
        (_, true) => client.remove_roles(token, user_id, scope).await,
        (true, false) => client.create_roles(token, user_id, scope, &change.target).await,
        (false, false) => client.update_roles(token, user_id, scope, &change.target).await,
    };
    done.map_err(refused)
}

/// Where the holder of some roles could take over the instance.
struct Privileged {
    /// The organizations with users through whom this is possible: users with roles of the instance, the administrator, those
    /// who can change ZITADEL's own project, and those who can take over one of these. `None` if they cannot be found out.
    organizations: Option<BTreeSet<String>>,
    /// The project of ZITADEL's own applications.
    project_id: String,
}

impl Privileged {
    /// Leaves out `user_id`, which cannot gain anything by taking over itself.
    async fn of(admin: &Admin, user_id: &str) -> Result<Self, Refused> {
        let project_id = admin.client.project_id_as(&admin.token).await.map_err(refused)?;
        let organizations = match Self::organizations(admin, user_id, &project_id).await {
            Err(APIError::TooMany) => None,
            found => found.map_err(refused)?,
        };
        Ok(Self {
            organizations,
            project_id,
        })
    }

    async fn organizations(
        admin: &Admin,
        user_id: &str,
        project_id: &str,
    ) -> Result<Option<BTreeSet<String>>, APIError> {
        let (client, token) = (&admin.client, &admin.token);
        let own_roles = client.list_roles(token, &admin.user_id, &RoleScope::Instance).await?;
        if !sees_all_managers(&own_roles) {
            return Ok(None);
        }
        let own = client.user(token, &admin.user_id).await?;
        let owner = client.organization_of_project(token, project_id).await?;
        let first = [own.map(|user| user.organization_id), owner];
        let mut found: BTreeSet<String> = first.map(Option::unwrap_or_default).into();
        let mut scopes = vec![RoleScope::Instance, RoleScope::Project(project_id.to_owned())];
        scopes.extend(found.iter().cloned().map(RoleScope::Organization));
        while let Some(scope) = scopes.pop() {
            for manager in client.list_managers(token, &scope).await? {
                let takes_over = |role: &String| scope == RoleScope::Instance || takes_over_users(&scope, role);
                let counts = manager.user_id != user_id && manager.roles.iter().any(takes_over);
                if counts && found.insert(manager.organization_id.clone()) {
                    scopes.push(RoleScope::Organization(manager.organization_id));
                }
            }
            // An organization that ZITADEL does not name could be any.
            if found.contains("") || found.len() > MOST_PRIVILEGED {
                return Ok(None);
            }
        }
        Ok(Some(found))
    }

    fn contains(&self, scope: &RoleScope) -> bool {
        match scope {
            RoleScope::Organization(id) => self.organizations.as_ref().is_none_or(|all| all.contains(id)),
            RoleScope::Project(id) => *id == self.project_id,
            RoleScope::Instance | RoleScope::ProjectGrant { .. } => false,
        }
    }
}

/// Revokes the roles of a deleted object, whatever its finalizers say: a tenant can remove them. Returns the object with the
/// resource version of the last write.
pub(super) async fn revoke(
    ctx: &Context,
    id: &ObjectRef,
    user: Arc<ZitadelServiceUser>,
) -> (Granted, Arc<ZitadelServiceUser>) {
    let mut grants = Grants::new(ctx, id, user, None);
    let revoked = tokio::time::timeout(ROLES_TIMEOUT, grants.revoke_deleted()).await;
    // Every step can be repeated.
    let revoked = revoked.unwrap_or_else(|_| Err(Reason::InstanceUnreachable.into()));
    let granted = Granted {
        outcome: revoked.err(),
        written: grants.written,
        requests: grants.session.requests(),
    };
    (granted, grants.user)
}

/// What a reconcile found out about the present object of a name.
#[derive(Clone, Copy)]
pub enum Found<'a> {
    /// The operator serves the object with this UID.
    Served(&'a str),
    /// The API server returned the object, and the operator does not serve it.
    Refused,
    /// The operator does not know the object, or it belongs to another operator. The cache may be behind.
    Unknown,
}

/// Revokes the roles of objects of this name that the operator does not serve: they vanished, are unreadable, or belong to
/// another instance now.
pub async fn revoke_lost(ctx: &Context, id: &ObjectRef, found: Found<'_>) -> Granted {
    let mut lost = Granted::default();
    for uid in ctx.memory.role_ledgers(id) {
        if matches!(found, Found::Served(served) if served == uid) {
            continue;
        }
        let mut grants = Grants::new(ctx, id, Arc::new(vanished(id, uid)), None);
        let revoked = tokio::time::timeout(ROLES_TIMEOUT, grants.revoke_vanished(found)).await;
        let revoked = revoked.unwrap_or_else(|_| Err(Reason::InstanceUnreachable.into()));
        lost.requests += grants.session.requests();
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

impl Grants<'_> {
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

    async fn revoke_vanished(&mut self, found: Found<'_>) -> Result<(), RoleOutcome> {
        let stored = gather::read_roles(self.ctx, self.id, self.uid()).await;
        self.stored = stored.map_err(|_| Reason::APIServerUnavailable)??;
        let Some(ledger) = self.stored.as_ref().map(|stored| stored.ledger.clone()) else {
            return Ok(());
        };
        if matches!(found, Found::Unknown) && self.is_alive(&ledger).await? {
            return Ok(());
        }
        let instance = self.instance_of(&ledger, None).ok_or(Reason::InstanceMissing)?;
        // Of an unreadable object it is known which instance it names, so that changes of policies wake it.
        let known = self.ctx.cache.user(self.id);
        if matches!(found, Found::Refused) && known.is_some_and(|known| *known.instance == *ledger.instance) {
            let allowed = self.ctx.cache.allowed(&ledger.instance, &self.id.namespace);
            return self.revoke_denied(&instance, &ledger, &allowed).await;
        }
        self.revoke_all(&instance).await?;
        self.drop_ledger().await
    }

    /// Whether the object exists after all, and still belongs to the instance of its ledger. Its event then wakes it.
    async fn is_alive(&self, ledger: &RoleLedger) -> Result<bool, RoleOutcome> {
        let read = match self.ctx.reader.user(self.id).await {
            Ok(read) => read,
            // The Role of the operator can be gone together with the namespace.
            Err(ReadError::Forbidden) => {
                let namespace = &self.id.namespace;
                let exists = self.ctx.cache.allowed(&ledger.instance, namespace) != Err(Reason::NamespaceMissing);
                if !exists || self.ctx.cache.is_terminating(namespace) {
                    return Ok(false);
                }
                return Err(Reason::SecretsForbidden.into());
            }
            Err(ReadError::Unavailable) => return Err(Reason::APIServerUnavailable.into()),
        };
        let Some(ReadUser::Readable(user)) = read else {
            return Ok(false);
        };
        let is_same = user.metadata.uid.as_deref() == Some(self.uid()) && user.metadata.deletion_timestamp.is_none();
        Ok(is_same && user.spec.instance_ref.name == ledger.instance)
    }
}
