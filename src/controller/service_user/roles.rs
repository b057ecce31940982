//! The manager roles of one object, at ZITADEL and in the ledger. `grant.rs` and `revoke.rs` decide what to do with them.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::api::metadata::{LABEL_ROLE_LEDGER, ROLES_FINALIZER};
use crate::api::{ZitadelInstance, ZitadelServiceUser};
use crate::controller::Context;
use crate::controller::instance::admin::Admin;
use crate::controller::ledger::{self, Place};
use crate::controller::refused::{Refused, about_roles};
use crate::controller::service_user::{finalizer, gather};
use crate::controller::session::{Session, Stop};
use crate::domain::manager_role::{RoleScope, WantedRoles, shown};
use crate::domain::object_ref::ObjectRef;
use crate::domain::progress::Progress;
use crate::domain::reason::Reason;
use crate::domain::report::EventDraft;
use crate::domain::role_ledger::{RoleChange, RoleLedger, StoredRoles};
use crate::domain::role_report::RoleOutcome;
use crate::domain::time::shifted;

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
pub(super) struct Roles<'a> {
    pub(super) ctx: &'a Context,
    pub(super) id: &'a ObjectRef,
    /// The object, with the resource version of the last write.
    pub(super) user: Arc<ZitadelServiceUser>,
    /// The ledger as it is stored.
    pub(super) stored: Option<StoredRoles>,
    pub(super) session: Session<'a>,
    pub(super) written: Vec<String>,
}

impl From<Stop> for RoleOutcome {
    fn from(Stop(outcome): Stop) -> Self {
        outcome.into()
    }
}

impl From<Reason> for RoleOutcome {
    fn from(reason: Reason) -> Self {
        Progress::new(reason).into()
    }
}

impl<'a> Roles<'a> {
    pub(super) fn new(
        ctx: &'a Context,
        id: &'a ObjectRef,
        user: Arc<ZitadelServiceUser>,
        stored: Option<StoredRoles>,
    ) -> Self {
        Self {
            ctx,
            id,
            user,
            stored,
            session: Session::new(ctx, id, &ctx.role_requests),
            written: Vec::new(),
        }
    }

    /// What is to change in the scopes of the ledger and in those of `wanted`. A scope that ZITADEL does not show is left out,
    /// and is the failure that this returns.
    pub(super) async fn changes(
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
    pub(super) fn instance_of(
        &self,
        ledger: &RoleLedger,
        present: Option<&Arc<ZitadelInstance>>,
    ) -> Option<Arc<ZitadelInstance>> {
        gather::instance_of(self.ctx, &ledger.instance, &ledger.issuer, present)
    }

    pub(super) async fn tell_change(&self, instance: &str, change: &RoleChange) {
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

    /// Writes the ledger, unless it is stored already.
    pub(super) async fn store(&mut self, new: &RoleLedger) -> Result<(), RoleOutcome> {
        if self.stored.as_ref().is_some_and(|stored| stored.ledger == *new) {
            return Ok(());
        }
        let stored = ledger::store(self.ctx, &self.place(), self.stored.as_ref(), new.clone(), new.data()).await?;
        self.ctx.memory.note_roles(self.id, self.uid(), true);
        self.stored = Some(stored);
        Ok(())
    }

    /// Removes the ledger, then the finalizer.
    pub(super) async fn forget(&mut self) -> Result<(), RoleOutcome> {
        self.drop_ledger().await?;
        self.set_finalizer(false).await
    }

    pub(super) async fn drop_ledger(&mut self) -> Result<(), RoleOutcome> {
        if let Some(stored) = self.stored.take() {
            ledger::delete(self.ctx, &self.place(), &stored).await?;
            self.ctx.memory.note_roles(self.id, self.uid(), false);
        }
        Ok(())
    }

    fn place(&self) -> Place<'_> {
        Place {
            id: self.id,
            name: gather::role_ledger_name(self.uid()),
            label: LABEL_ROLE_LEDGER,
            key: self.uid(),
        }
    }

    pub(super) async fn set_finalizer(&mut self, present: bool) -> Result<(), RoleOutcome> {
        let written = finalizer::set(self.ctx, &mut self.user, ROLES_FINALIZER, present).await;
        self.written
            .extend(written.map_err(|error| ledger::failed(self.id, &error))?);
        Ok(())
    }

    pub(super) fn uid(&self) -> &str {
        self.user.metadata.uid.as_deref().unwrap_or_default()
    }
}

/// ZITADEL may show a change soon, and certainly does at `until`. The operator asks again after as long as it has waited.
pub(super) fn not_shown(since: Timestamp, until: Timestamp, now: Timestamp, scope: &RoleScope) -> RoleOutcome {
    let waited = now.duration_since(since).max(SHOWN_SOON);
    let at = until.min(shifted(now, waited));
    at_scope(Stop::deferred(Reason::ManagerRolesNotShown, at), scope)
}

pub(super) fn at_scope(Stop(outcome): Stop, scope: &RoleScope) -> RoleOutcome {
    RoleOutcome {
        outcome,
        scope: Some(Box::new(scope.clone())),
    }
}

pub(super) async fn roles_in(admin: &Admin, user_id: &str, scope: &RoleScope) -> Result<BTreeSet<String>, Refused> {
    let listed = admin.client.list_roles(&admin.token, user_id, scope).await;
    listed.map_err(about_roles)
}

pub(super) async fn request(admin: &Admin, user_id: &str, change: &RoleChange) -> Result<(), Refused> {
    let (client, token, scope) = (&admin.client, &admin.token, &change.scope);
    let done = match (change.held.is_empty(), change.target.is_empty()) {
        (_, true) => client.remove_roles(token, user_id, scope).await,
        (true, false) => client.create_roles(token, user_id, scope, &change.target).await,
        (false, false) => client.update_roles(token, user_id, scope, &change.target).await,
    };
    done.map_err(about_roles)
}
