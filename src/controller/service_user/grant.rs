//! Grants manager roles to the user of an object with the administrator of its instance. The ledger names each role before
//! ZITADEL hears of it, so that a crash leaves no role behind
//! (`docs/adr/0022-manager-roles-are-granted-by-a-ledger.md`). `domain/role_ledger.rs` decides what changes.

use std::sync::Arc;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;

use crate::api::ZitadelInstance;
use crate::api::metadata::ROLES_FINALIZER;
use crate::controller::Context;
use crate::controller::instance::admin::Admin;
use crate::controller::service_user::act::is_current;
use crate::controller::service_user::finalizer;
use crate::controller::service_user::provision::confirm;
use crate::controller::service_user::revoke::{Present, revoke_lost};
use crate::controller::service_user::roles::{Granted, Roles, at_scope, not_shown, request, roles_in};
use crate::controller::session::{Stop, in_time};
use crate::domain::facts::Facts;
use crate::domain::manager_role::{self, WantedRoles};
use crate::domain::object_ref::ObjectRef;
use crate::domain::progress::Progress;
use crate::domain::reason::Reason;
use crate::domain::role_ledger::{RoleChange, RoleLedger};
use crate::domain::role_report::{BACKOFF, RoleOutcome};
use crate::domain::time::shifted;
use crate::domain::validate;

/// How long a new object waits after the roles of a former one were revoked.
const AFTER_FORMER: SignedDuration = SignedDuration::from_secs(5);

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
        let outcome = Progress::deferred(reason);
        return Granted {
            outcome: Some(outcome.into()),
            ..Granted::default()
        };
    }
    let former = revoke_lost(ctx, id, Present::Served(facts.uid())).await;
    if former.outcome.is_none() {
        let stored = facts.roles.as_ref().ok().cloned().flatten();
        let mut roles = Roles::new(ctx, id, facts.user.clone(), stored);
        let compared_again = roles.forget_comparison().await;
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
    let mut roles = Roles::new(ctx, id, facts.user.clone(), stored);
    let outcome = if let Some(reason) = waits {
        Some(RoleOutcome {
            outcome: Progress::deferred(reason),
            scope: ctx.memory.failed_role(id),
        })
    } else {
        let outcome = match obstacle(facts) {
            Some(obstacle) => Some(in_time(roles.enforce(facts)).await.err().unwrap_or(obstacle.into())),
            None => in_time(roles.advance(facts)).await.unwrap_or_else(Some),
        };
        let scope = outcome.as_ref().and_then(|outcome| outcome.scope.clone());
        ctx.memory.note_failed_role(id, scope);
        facts.user = roles.user.clone();
        outcome
    };
    // What is to be revoked must not wait for hours.
    let holds_roles = roles.stored.is_some();
    let outcome = outcome.map(|RoleOutcome { outcome, scope }| RoleOutcome {
        outcome: if holds_roles {
            outcome.retried_in_time(now)
        } else {
            outcome
        },
        scope,
    });
    Granted {
        outcome,
        written: roles.written,
        requests: roles.session.requests(),
    }
}

/// Why the roles have to wait, if they have.
fn obstacle(facts: &Facts) -> Option<Progress> {
    if facts.is_suspended() {
        return Some(Progress::waiting(Reason::Suspended));
    }
    // Nothing tells that the Secret was repaired.
    let ledger = facts.roles.as_ref().err().map(|reason| Progress::new(*reason));
    let instance = facts.instance.as_ref().err();
    let others = instance.or(facts.allowed.as_ref().err());
    let invalid = || {
        let checked = validate::manager_roles(&facts.user.spec).err();
        checked.map(|_| Progress::new(Reason::InvalidSpec))
    };
    let ledger = ledger.or(others.map(|reason| Progress::waiting(*reason)));
    ledger.or_else(invalid)
}

impl Roles<'_> {
    /// Brings the roles in line with the spec, and keeps the finalizer as long as there is a ledger. Returns nothing if the
    /// object no longer has roles.
    async fn advance(&mut self, facts: &Facts) -> Result<Option<RoleOutcome>, RoleOutcome> {
        let advanced = self.bring_in_line(facts).await;
        // Someone may have removed it. This comes last: a tenant who changes the object all the time can prevent it, and
        // must not prevent a revocation with it.
        let kept = match self.stored {
            Some(_) => self.set_finalizer(true).await,
            None => Ok(()),
        };
        advanced.and_then(|outcome| kept.map(|()| outcome))
    }

    /// Whether the ledger names no roles, or there is none.
    fn has_granted_none(&self) -> bool {
        let stored = self.stored.as_ref();
        stored.is_none_or(|stored| stored.ledger.scopes.is_empty())
    }

    /// Gives the user the roles of the spec that the policies allow, and takes those that the operator granted and that are
    /// no longer among them.
    async fn bring_in_line(&mut self, facts: &Facts) -> Result<Option<RoleOutcome>, RoleOutcome> {
        let instance = facts.instance.clone()?;
        let allowed = facts.allowed.as_ref().map_err(|reason| *reason)?;
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
                if self.has_granted_none() {
                    self.is_current(facts)?;
                }
                let applied = self.apply(facts, &instance, wanted.clone(), user_id).await?;
                self.confirm(applied, &hash, request, now).await?;
            }
        } else if grants_some {
            return Err(user_id.err().unwrap_or(Reason::Internal).into());
        }
        if self.has_granted_none() && !grants_some {
            self.forget().await?;
            if facts.user.spec.manager_roles.is_empty() {
                return Ok(None);
            }
        }
        if let Some(denied) = wanted.into_iter().find(|wanted| !wanted.denied.is_empty()) {
            return Err(RoleOutcome {
                outcome: Progress::new(Reason::ManagerRolesDenied),
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
        let mut only_revokes = throttled.is_some();
        let (wanted, mut failed) = if only_revokes {
            (wanted, throttled)
        } else {
            self.unprivileged(&admin, wanted, &ledger).await
        };
        let grants_some = wanted.iter().any(|wanted| !wanted.roles.is_empty());
        if ledger.scopes.is_empty() && !grants_some {
            let accepted = Vec::new();
            return Ok(Applied {
                ledger,
                failed,
                accepted,
            });
        }
        // A key file with the id of another user must not delay changes of that user.
        let is_new = self.stored.is_none();
        if is_new {
            self.prove(facts, instance, &admin, user_id).await?;
        }
        let mut recent = self.ctx.memory.role_changes.lock(&ledger.issuer, user_id).await;
        let (mut changes, unlisted) = self.changes(&admin, &ledger, &wanted).await;
        failed = failed.or(unlisted);
        // What is to be revoked does not wait for what a grant needs.
        if !only_revokes && let Err(reason) = self.may_grant(facts, instance, &admin, user_id, &changes, is_new).await {
            failed.get_or_insert(reason);
            only_revokes = true;
        }
        if only_revokes {
            changes = changes.into_iter().map(RoleChange::unproven).collect();
        }
        let now = self.ctx.server_time(instance);
        let before = ledger.clone();
        let mut needed = Vec::new();
        for change in changes {
            let granted = before.granted(&change.scope);
            let by_others = || recent.lags(&change.scope, &change.held, now);
            if let Some((since, at)) = change.lags(granted, now).or_else(by_others) {
                failed.get_or_insert(not_shown(since, at, now, &change.scope));
            } else if !change.is_needed() {
                ledger.set(change.confirmed());
            } else {
                let (change, is_full) = ledger.intend(change, now);
                if is_full {
                    failed.get_or_insert(at_scope(Reason::ManagerRolesNotShown.into(), &change.scope));
                }
                if change.is_needed() {
                    needed.push(change);
                }
            }
        }
        if !needed.is_empty() {
            self.store(&ledger).await?;
        }
        let mut accepted = Vec::new();
        for change in needed {
            recent.requested(&change.scope, &change.target);
            match self.session.ask(request(&admin, user_id, &change)).await {
                Ok(()) => accepted.push(change),
                Err(stop) => {
                    // ZITADEL may have carried out a request whose answer is lost.
                    if stop.0.reason.is_permanent() {
                        ledger.restore(&change.scope, &before);
                        recent.shown(&change.scope);
                    }
                    failed.get_or_insert(at_scope(stop, &change.scope));
                }
            }
        }
        for change in &accepted {
            let shown = self.session.ask(roles_in(&admin, user_id, &change.scope)).await;
            if shown.is_ok_and(|shown| shown == change.target) {
                ledger.set(change.confirmed());
                recent.shown(&change.scope);
            } else {
                failed.get_or_insert(not_shown(now, Timestamp::MAX, now, &change.scope));
            }
        }
        Ok(Applied {
            ledger,
            failed,
            accepted,
        })
    }

    /// Whether `changes` may be made whole, and not only what they revoke: the user is proven to be the object's, the object has
    /// the finalizer, and the facts still hold.
    async fn may_grant(
        &mut self,
        facts: &Facts,
        instance: &Arc<ZitadelInstance>,
        admin: &Admin,
        user_id: &str,
        changes: &[RoleChange],
        is_proven: bool,
    ) -> Result<(), RoleOutcome> {
        if !is_proven && changes.iter().any(RoleChange::needs_proof) {
            self.prove(facts, instance, admin, user_id).await?;
        }
        if changes.iter().any(|change| change.added().next().is_some()) {
            self.set_finalizer(true).await?;
        }
        self.is_current(facts)
    }

    /// Fails if the object, its policies or its instance changed meanwhile. The next reconcile, within seconds, decides anew.
    fn is_current(&self, facts: &Facts) -> Result<(), RoleOutcome> {
        if is_current(self.ctx, self.id, facts) {
            Ok(())
        } else {
            Err(Reason::APIServerUnavailable.into())
        }
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
        // After a failure, a new ledger without roles would say nothing.
        if self.stored.is_some() || failed.is_none() || !ledger.scopes.is_empty() {
            self.store(&ledger).await?;
        }
        for change in &accepted {
            self.tell_change(&ledger.instance, change).await;
        }
        failed.map_or(Ok(()), Err)
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
            let managed = facts.keys.stored().and_then(|stored| stored.ledger.managed.as_ref());
            let managed = managed
                .filter(|managed| managed.confirmed)
                .ok_or(Reason::UserNotReady)?;
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

    fn new_ledger(&self, instance: &ZitadelInstance, user_id: &str) -> RoleLedger {
        let cluster = self.ctx.cluster_name.as_deref();
        let object = cluster.map_or_else(|| self.id.to_string(), |cluster| format!("{cluster}/{}", self.id));
        RoleLedger::new(object, &instance.name_any(), &instance.spec.issuer, user_id)
    }

    /// The next reconcile compares the roles with ZITADEL again.
    async fn forget_comparison(&mut self) -> Result<(), RoleOutcome> {
        let Some(mut ledger) = self.stored.as_ref().map(|stored| stored.ledger.clone()) else {
            return Ok(());
        };
        ledger.applied = None;
        self.store(&ledger).await
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
