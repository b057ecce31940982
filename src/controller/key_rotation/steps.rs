//! The steps of a key rotation.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::api::ZitadelInstance;
use crate::controller::key_rotation::{Holder, Rotation, random};
use crate::controller::session::{Signer, Stop};
use crate::domain::key;
use crate::domain::key_ledger::{BootstrapKey, KeyLedger, OwnKey, marked_expiry};
use crate::domain::key_rotation::{self, Schedule};
use crate::domain::key_rotation_report::Fate;
use crate::domain::reason::Reason;
use crate::zitadel::MOST_LISTED;

/// When to go on reading the keys of other objects.
const READS_CONTINUE: Duration = Duration::from_secs(30);

impl<H: Holder> Rotation<'_, H> {
    /// Opens the session for the keys of the ledger's user.
    async fn open_as(&mut self, instance: &Arc<ZitadelInstance>, signer: &Signer) -> Result<(), Stop> {
        match signer {
            Signer::Key(key) => self.session.open(instance, key).await,
            Signer::Admin => {
                let (ledger, now) = (self.ledger()?, self.now(instance));
                self.session.open_admin(instance, &ledger, now).await
            }
        }
    }

    /// Generates a key and stores it as pending, before ZITADEL hears of it.
    pub(super) async fn begin(
        &mut self,
        instance: &Arc<ZitadelInstance>,
        signer: &Signer,
        schedule: &Schedule,
        request: Option<String>,
    ) -> Result<(), Stop> {
        let (ctx, id) = (self.ctx, self.id);
        // The time of a wrong clock would stay in the ledger.
        let skew = ctx.connections.skew(&instance.name_any());
        skew.certain(ctx.clock.now()).ok_or(Reason::ClockSkew)?;
        let bootstrap = match signer {
            Signer::Key(key) if !key::is_plain_id(&key.key_id) => return Err(Reason::KeyFieldInvalid.into()),
            Signer::Key(key) => Some(key).filter(|key| key.bootstrap_id.is_none()),
            Signer::Admin => None,
        };
        let current = self.stored().and_then(|stored| stored.ledger.current.clone());
        let signs = |current: &OwnKey| current.key_id.as_deref() == Some(signer.key_id());
        if !current.as_ref().is_some_and(signs) && !ctx.key_generator.serves(id) {
            // A server without the API, or a user without the right, costs no key.
            self.open_as(instance, signer).await?;
            let listed = self.session.list().await?;
            if let Some(lost) = current {
                let fate = Fate::of(&lost, &listed, self.now(instance));
                let key = self.ledger()?.service_key(&lost).ok_or(Reason::KeyLedgerInvalid)?;
                // ZITADEL rejected it for long. If it accepts the key again, there is nothing to replace.
                if fate == Fate::Listed {
                    match self.session.open(instance, &key).await {
                        Err(Stop(outcome)) if outcome.reason == Reason::KeyRejected => {}
                        ended => return ended,
                    }
                }
                self.tell(true, Reason::KeyLost, fate.text(&key.key_id)).await;
            }
        }
        self.set_finalizer(true).await?;
        let Some(private) = ctx.key_generator.take(id) else {
            // The generator wakes the object.
            self.wants_key = true;
            return Err(self.deferred(instance, Duration::from_mins(5)));
        };
        let now = self.now(instance);
        let mut ledger = match (self.stored(), bootstrap) {
            (Some(stored), _) => stored.ledger.clone(),
            (None, Some(key)) => KeyLedger::new(id.to_string(), &instance.name_any(), &instance.spec.issuer, key),
            (None, None) => return Err(Reason::Internal.into()),
        };
        if let Some(key) = bootstrap {
            // Another key of a person, or the same one again: what it began is replaced only from now on.
            ledger.adopt(key);
        }
        let microseconds = random().ok_or(Reason::Internal)?;
        let expires = marked_expiry(now, schedule.lifetime, microseconds);
        ledger.begin(private.clone(), expires, request, now);
        let stored = self.store(ledger).await;
        if stored.is_err() {
            ctx.key_generator.put_back(id, private);
            self.wants_key = true;
        }
        stored
    }

    /// Adds the pending key at ZITADEL, unless ZITADEL already has it.
    pub(super) async fn register(
        &mut self,
        instance: &Arc<ZitadelInstance>,
        signer: &Signer,
        schedule: &Schedule,
        generated: bool,
    ) -> Result<(), Stop> {
        let mut ledger = self.ledger()?;
        let pending = ledger.pending.clone().ok_or(Reason::Internal)?;
        self.open_as(instance, signer).await?;
        if !generated {
            let listed = self.session.list().await?;
            let now = self.now(instance);
            if let Some(found) = ledger.find_pending(&listed) {
                return self.registered(ledger, found, now).await;
            }
            if let Some(at) = key_rotation::lags_until(pending.since, now) {
                return Err(Stop::deferred(Reason::KeyRotationInProgress, at));
            }
            if key_rotation::is_hopeless(&pending, schedule, now) {
                ledger.drop_pending();
                return self.store(ledger).await;
            }
        }
        let public = key::public_pem(&pending.private).ok_or(Reason::KeyLedgerInvalid)?;
        let key_id = self.session.add(&public, pending.expires_at).await?;
        let now = self.now(instance);
        self.registered(ledger, &key_id, now).await
    }

    /// Stores the id that ZITADEL gave to the pending key.
    async fn registered(&mut self, mut ledger: KeyLedger, key_id: &str, now: Timestamp) -> Result<(), Stop> {
        if self.session.key_id() == Some(key_id) || ledger.key_ids().any(|known| known == key_id) {
            return Err(Reason::MalformedResponse.into());
        }
        ledger.register(key_id, now);
        self.store(ledger).await
    }

    /// Requests a token with the pending key. If ZITADEL issues one, the key becomes the current one.
    pub(super) async fn prove(&mut self, instance: &Arc<ZitadelInstance>, schedule: &Schedule) -> Result<(), Stop> {
        let mut ledger = self.ledger()?;
        let pending = ledger.pending.clone().ok_or(Reason::Internal)?;
        let key = ledger.service_key(&pending).ok_or(Reason::KeyLedgerInvalid)?;
        match self.session.open(instance, &key).await {
            Ok(()) => {
                ledger.promote(self.now(instance));
                self.store(ledger).await?;
                self.rotated = true;
                self.ctx.metrics.rotated(&instance.name_any());
                tracing::info!(object = %self.id, key = key.key_id, "the key was rotated");
                Ok(())
            }
            Err(Stop(outcome)) if outcome.reason == Reason::KeyRejected => {
                let now = self.now(instance);
                if key_rotation::lags_until(pending.since, now).is_some() {
                    return Err(Reason::KeyRotationInProgress.into());
                }
                if key_rotation::is_hopeless(&pending, schedule, now) {
                    ledger.drop_pending();
                    self.store(ledger).await?;
                }
                Err(Reason::NewKeyRejected.into())
            }
            Err(stop) => Err(stop),
        }
    }

    /// Removes at ZITADEL what the last rotation replaced, and counts what is not of the operator. Only then is it stored,
    /// so that a count that fails is made again.
    pub(super) async fn settle(
        &mut self,
        instance: &Arc<ZitadelInstance>,
        signer: &Signer,
        in_secret: Option<&str>,
        schedule: &Schedule,
    ) -> Result<(), Stop> {
        let mut ledger = self.ledger()?;
        let bootstrap = ledger.bootstrap.clone();
        let signs = |current: &OwnKey| current.key_id.as_deref() == Some(signer.key_id());
        // While an older key signs, nothing has replaced the bootstrap key.
        let removes_bootstrap =
            ledger.current.as_ref().is_some_and(signs) && schedule.removes_bootstrap(&ledger, self.now(instance));
        let removed = bootstrap.as_ref().filter(|_| removes_bootstrap);
        let in_use = match removed {
            Some(bootstrap) => self.is_used_by_others(bootstrap).await,
            None => Some(false),
        };
        // What an object of another tenant hides must not keep replaced keys at ZITADEL.
        match in_use {
            Some(true) if ledger.settled => return Err(Reason::BootstrapKeyInUse.into()),
            None if ledger.settled => return Err(self.deferred(instance, READS_CONTINUE)),
            _ => {}
        }
        if !self.knows_keys_of_others().await {
            return Err(self.deferred(instance, READS_CONTINUE));
        }
        self.open_as(instance, signer).await?;
        let listed = self.session.list().await?;
        for key_id in ledger.replaced(&listed, signer.key_id()) {
            self.session.remove(&key_id).await?;
        }
        let removed = removed.filter(|_| in_use == Some(false));
        if let Some(bootstrap) = removed {
            self.session.remove(&bootstrap.key_id).await?;
            let removed = true;
            ledger.bootstrap = Some(BootstrapKey {
                removed,
                ..bootstrap.clone()
            });
        }
        let is_bootstrap = |key_id: &str| bootstrap.as_ref().is_some_and(|key| key.key_id == key_id);
        let of_a_person = |key_id: &str| is_bootstrap(key_id) || Some(key_id) == in_secret;
        let foreign = listed
            .iter()
            .filter(|key| !ledger.is_own(key) && !of_a_person(&key.key_id));
        let foreign = foreign.filter(|key| !self.ctx.keys.is_made(&key.key_id)).count();
        let tokens = self.count_personal_tokens().await?;
        ledger.count_foreign(tokens.map(|tokens| foreign + tokens));
        ledger.settle(signer.key_id());
        self.store(ledger).await?;
        if let Some(bootstrap) = removed {
            let reason = Reason::BootstrapKeyRemoved;
            let text = format!("{} Key {}.", reason.advice(), bootstrap.key_id);
            self.tell(false, reason, text).await;
        }
        Ok(())
    }

    /// The number of the user's personal access tokens. `None` if ZITADEL does not tell it.
    async fn count_personal_tokens(&self) -> Result<Option<usize>, Stop> {
        match self.session.count_personal_tokens().await {
            Ok(tokens) => Ok(Some(tokens)),
            // More than a list may have is certainly more than before.
            Err(Stop(outcome)) if outcome.reason == Reason::KeyListIncomplete => Ok(Some(MOST_LISTED)),
            Err(Stop(outcome)) if outcome.reason.is_permanent() => Ok(None),
            Err(stop) => Err(stop),
        }
    }
}
