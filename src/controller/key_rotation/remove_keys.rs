//! Removes the operator's keys at ZITADEL: those of a deleted object, of a former user or issuer, and of an object that no
//! longer rotates its key.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::api::ZitadelInstance;
use crate::controller::key_rotation::{Holder, Rotation};
use crate::controller::service_user::instance_of;
use crate::controller::session::Stop;
use crate::domain::key::ServiceKey;
use crate::domain::key_ledger::KeyLedger;
use crate::domain::key_rotation;
use crate::domain::reason::Reason;

impl<H: Holder> Rotation<'_, H> {
    /// Removes the keys of the former user or issuer with one of them.
    pub(super) async fn remove_former(&mut self, present: &Arc<ZitadelInstance>) -> Result<(), Stop> {
        let ledger = self.ledger()?;
        if self.holder.is_abandoned() {
            self.report_left_keys(&ledger).await;
            return self.drop_ledger().await;
        }
        // Looked up before the first request: an instance that changes meanwhile may lead to another host.
        let instance = self.instance_of(&ledger, Some(present));
        // A key that was put in by mistake must not cost the keys that work.
        let bootstrap = self.keys.bootstrap.clone()?;
        self.session.open(present, &bootstrap).await?;
        let instance = instance.ok_or(Reason::OldKeysRemain)?;
        let removed = self.remove_all(&instance, &ledger, false).await;
        removed.map_err(|Stop(outcome)| match outcome.reason {
            Reason::KeyRejected | Reason::UserInactive => Stop::from(Reason::OldKeysRemain),
            _ => Stop(outcome),
        })?;
        self.drop_ledger().await
    }

    /// Has the bootstrap key take over, and removes the operator's keys with it.
    pub(super) async fn hand_back(
        &mut self,
        instance: &Arc<ZitadelInstance>,
        bootstrap: &ServiceKey,
    ) -> Result<(), Stop> {
        let ledger = self.ledger()?;
        let opened = self.session.open(instance, bootstrap).await;
        opened.map_err(|Stop(outcome)| match outcome.reason {
            Reason::KeyRejected => Stop::from(Reason::BootstrapKeyNeeded),
            _ => Stop(outcome),
        })?;
        // After a crash, the operator must not sign with a key that it has removed.
        let mut ledger = ledger;
        ledger.give_way_to(bootstrap);
        self.store(ledger.clone()).await?;
        self.remove_own(instance, &ledger).await?;
        self.drop_ledger().await
    }

    /// The instance that the keys of the ledger belong to.
    pub(in crate::controller) fn instance_of(
        &self,
        ledger: &KeyLedger,
        present: Option<&Arc<ZitadelInstance>>,
    ) -> Option<Arc<ZitadelInstance>> {
        instance_of(self.ctx, &ledger.instance, &ledger.issuer, present)
    }

    /// Removes all keys of the ledger at ZITADEL, with the first of them that still works, or else with the bootstrap key if
    /// it may be used.
    pub(in crate::controller) async fn remove_all(
        &mut self,
        instance: &Arc<ZitadelInstance>,
        ledger: &KeyLedger,
        with_bootstrap: bool,
    ) -> Result<(), Stop> {
        // It may be open for another user.
        self.session.close();
        let mut keys: Vec<ServiceKey> = ledger.own().filter_map(|own| ledger.service_key(own)).collect();
        let mut rejected = self.open_first(instance, &keys).await?;
        if self.session.key_id().is_none() && with_bootstrap {
            let bootstrap = self.holder.bootstrap_key(self.ctx).await?;
            let bootstrap: Vec<_> = bootstrap
                .into_iter()
                .filter(|key| key.user_id == ledger.user_id)
                .collect();
            rejected = self.open_first(instance, &bootstrap).await?.or(rejected);
            keys.extend(bootstrap);
        }
        if self.session.key_id().is_some() {
            return self.remove_own(instance, ledger).await;
        }
        // ZITADEL has rejected the keys for long: for all that the operator knows, they or their user no longer exist.
        let mut keys = keys.iter();
        let for_long = keys.all(|key| self.ctx.keys.is_rejected_for_long(self.id, &key.key_id));
        match rejected {
            Some(stop) if !for_long => Err(stop),
            _ => {
                self.report_left_keys(ledger).await;
                Ok(())
            }
        }
    }

    /// Opens the session with the first of these keys that ZITADEL accepts. Returns the rejection of the last one if it
    /// rejects all.
    async fn open_first(&mut self, instance: &Arc<ZitadelInstance>, keys: &[ServiceKey]) -> Result<Option<Stop>, Stop> {
        let mut rejected = None;
        for key in keys {
            match self.session.open(instance, key).await {
                Ok(()) => return Ok(None),
                Err(Stop(outcome)) if outcome.reason == Reason::KeyRejected => rejected = Some(Stop(outcome)),
                Err(stop) => return Err(stop),
            }
        }
        Ok(rejected)
    }

    /// Removes all keys of the ledger with the present token: that of the token last.
    pub(in crate::controller) async fn remove_own(
        &mut self,
        instance: &Arc<ZitadelInstance>,
        ledger: &KeyLedger,
    ) -> Result<(), Stop> {
        let listed = match self.session.list().await {
            Ok(listed) => listed,
            // Those whose ids are known can be removed nevertheless.
            Err(Stop(outcome)) if outcome.reason == Reason::KeyListIncomplete => Vec::new(),
            Err(stop) => return Err(stop),
        };
        let now = self.now(instance);
        let pending = ledger.pending.as_ref().filter(|pending| pending.key_id.is_none());
        if let Some(at) = pending.and_then(|pending| key_rotation::lags_until(pending.since, now))
            && ledger.find_pending(&listed).is_none()
        {
            return Err(Stop::deferred(Reason::KeyRotationInProgress, at));
        }
        let mut own: BTreeSet<&str> = ledger.unremoved_key_ids().collect();
        own.extend(listed.iter().filter(|key| ledger.is_own(key)).map(|key| &*key.key_id));
        let signer = self.session.key_id().map(str::to_owned);
        let (signers, others): (Vec<_>, Vec<_>) = own.into_iter().partition(|id| Some(*id) == signer.as_deref());
        for key_id in others.into_iter().chain(signers) {
            self.session.remove(key_id).await?;
        }
        Ok(())
    }

    /// Names the keys that stay at ZITADEL.
    pub(in crate::controller) async fn report_left_keys(&self, ledger: &KeyLedger) {
        let (keys, user_id) = (ledger.left_keys().join(", "), &ledger.user_id);
        if keys.is_empty() {
            return;
        }
        let reason = Reason::KeysLeftBehind;
        let text = format!("{} User {user_id}, keys: {keys}.", reason.advice());
        self.tell(true, reason, text).await;
    }
}
