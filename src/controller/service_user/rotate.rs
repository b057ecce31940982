//! Carries out a key rotation, step by step. Each step is stored in the ledger before the next one begins, so that another
//! process can continue (`docs/adr/0020-keys-rotate-by-a-ledger.md`). `domain/key_rotation.rs` chooses the steps, and
//! `key_session.rs` talks to ZITADEL.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::api::metadata::{FINALIZER, LABEL_KEY_LEDGER};
use crate::api::{ZitadelInstance, ZitadelServiceUser};
use crate::controller::Context;
use crate::controller::service_user::act::is_current;
use crate::controller::service_user::finalizer;
use crate::controller::service_user::gather;
use crate::controller::service_user::key_session::{Session, Signer, Stop};
use crate::controller::service_user::mint::later;
use crate::controller::write::{LedgerRef, WriteError};
use crate::domain::facts::{Facts, Outcome as TokenOutcome};
use crate::domain::key;
use crate::domain::key_ledger::{BootstrapKey, Ledger, OwnKey, StoredLedger, marked_expiry};
use crate::domain::key_rotation::{self, Outcome, Schedule, Step};
use crate::domain::key_rotation_report::Fate;
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::{Reason, Subject};
use crate::domain::report::EventDraft;
use crate::zitadel::MOST_LISTED;

/// Longest time of a rotation in one reconcile. The status of the tokens waits for it.
pub(super) const ROTATION_TIMEOUT: Duration = Duration::from_mins(2);

/// Most steps of one reconcile: a rotation has four and a final wait, and at most three more precede it.
const MOST_STEPS: usize = 8;

/// When to go on reading the keys of other objects.
const READS_CONTINUE: Duration = Duration::from_secs(30);

/// What a reconcile did for the rotation.
#[derive(Default)]
pub struct Rotated {
    /// How the rotation stands. `None` if the object does not rotate its key.
    pub outcome: Option<Outcome>,
    /// Resource versions of the object that this wrote.
    pub written: Vec<String>,
    /// Number of requests to ZITADEL.
    pub requests: usize,
    /// Whether the key generator has a key to make for the object, or made one.
    pub wants_key: bool,
}

/// The rotation of one object.
pub(super) struct Rotation<'a> {
    pub(super) ctx: &'a Context,
    pub(super) id: &'a ObjectRef,
    /// The object, with the resource version of the last write.
    pub(super) user: Arc<ZitadelServiceUser>,
    /// The ledger as it is stored.
    pub(super) stored: Option<StoredLedger>,
    pub(super) session: Session<'a>,
    /// Whether this reconcile replaced the key.
    rotated: bool,
    /// Whether the key generator has a key to make for the object, or made one.
    wants_key: bool,
    pub(super) written: Vec<String>,
}

/// Does what is due of the object's key rotation, after its tokens ended with `tokens`. Updates the keys in `facts`.
pub async fn rotate(ctx: &Context, id: &ObjectRef, facts: &mut Facts, tokens: &[TokenOutcome]) -> Rotated {
    let schedule = Schedule::of_spec(&facts.user.spec);
    if schedule.is_none() && matches!(facts.keys.ledger, Ok(None)) && !finalizer::is_set(&facts.user, FINALIZER) {
        return Rotated::default();
    }
    let now = facts.clock.theirs(ctx.clock.now());
    let waits = facts.pending_retries.get(key_rotation::BACKOFF);
    let waits = waits.filter(|retry| retry.until > now).map(|retry| retry.reason);
    let stored = facts.keys.ledger.as_ref().ok().cloned().flatten();
    let mut rotation = Rotation::new(ctx, id, facts.user.clone(), stored);
    let outcome = match (obstacle(facts, tokens), schedule, waits) {
        (Some(reason), ..) => Some(Outcome::waiting(reason)),
        (None, Some(None), _) => Some(Outcome::new(Reason::KeyRotationInvalid)),
        (None, _, Some(reason)) => {
            rotation.wants_key = ctx.key_generator.serves(id);
            Some(Outcome::deferred(reason))
        }
        (None, schedule, None) => {
            let schedule = schedule.flatten();
            let advance = rotation.advance(facts, schedule.as_ref());
            let advanced = tokio::time::timeout(ROTATION_TIMEOUT, advance).await;
            // Every step can be repeated.
            let advanced = advanced.unwrap_or_else(|_| Err(Reason::InstanceUnreachable.into()));
            let outcome = advanced.unwrap_or_else(|Stop(outcome)| Some(outcome));
            rotation.update(facts);
            outcome
        }
    };
    let rotated = rotation.rotated;
    let outcome = outcome.map(|outcome| Outcome { rotated, ..outcome });
    let holds_keys = rotation.stored.is_some();
    Rotated {
        outcome: outcome.map(|outcome| if holds_keys { outcome.with_keys(now) } else { outcome }),
        written: rotation.written,
        requests: rotation.session.requests(),
        wants_key: rotation.wants_key,
    }
}

/// Why the rotation has to wait, if it has.
fn obstacle(facts: &Facts, tokens: &[TokenOutcome]) -> Option<Reason> {
    if facts.is_suspended() {
        return Some(Reason::Suspended);
    }
    // Without a usable ledger, that is the more important reason.
    let ledger = facts.keys.ledger.as_ref().err().copied();
    // A user without a key gets one from the administrator.
    let key = facts
        .key
        .as_ref()
        .err()
        .filter(|reason| **reason != Reason::UserNotReady);
    let key = key.map(|reason| ledger.unwrap_or(*reason)).or(ledger);
    let key = key.or(facts.instance.as_ref().err().copied());
    // An outage that concerns all tokens concerns the rotation too.
    let outage = tokens.iter().find(|token| token.reason.subject() == Subject::Instance);
    let served = tokens.iter().any(|token| token.reason == Reason::Issued);
    key.or(outage.filter(|_| !served).map(|token| token.reason))
}

impl<'a> Rotation<'a> {
    pub(super) fn new(
        ctx: &'a Context,
        id: &'a ObjectRef,
        user: Arc<ZitadelServiceUser>,
        stored: Option<StoredLedger>,
    ) -> Self {
        Self {
            ctx,
            id,
            user,
            stored,
            session: Session::new(ctx, id),
            rotated: false,
            wants_key: false,
            written: Vec::new(),
        }
    }

    /// Takes one step after the other until there is none to take now. Returns nothing if the object no longer rotates
    /// its key.
    async fn advance(&mut self, facts: &mut Facts, schedule: Option<&Schedule>) -> Result<Option<Outcome>, Stop> {
        let instance = facts.instance.clone()?;
        if self.stored.is_some() {
            // Someone may have removed it.
            self.set_finalizer(true).await?;
        }
        self.provision(facts, &instance).await?;
        // Whether this reconcile generated the pending key, so that ZITADEL cannot have it yet.
        let mut generated = false;
        for _ in 0..MOST_STEPS {
            self.update(facts);
            let key = match facts.key.clone() {
                Ok(key) => Signer::Key(key),
                Err(Reason::UserNotReady) => Signer::Admin,
                Err(reason) => return Err(reason.into()),
            };
            let request = facts.rotate_request();
            let what_for = (request.as_deref(), facts.uid());
            let now = self.now(&instance);
            let step = key_rotation::next(schedule, &facts.keys, facts.issuer(), key.key_id(), what_for, now);
            if !matches!(step, Step::Wait(_) | Step::Blocked(_)) && !is_current(self.ctx, self.id, facts) {
                // The next reconcile, within seconds, decides anew.
                return Err(Reason::APIServerUnavailable.into());
            }
            match (step, schedule) {
                (Step::Blocked(reason), _) => return Err(reason.into()),
                (Step::RemoveFormer, _) => self.remove_former(facts, &instance).await?,
                (Step::HandBack, _) => {
                    let bootstrap = facts.keys.bootstrap.clone()?;
                    self.hand_back(&instance, &bootstrap).await?;
                }
                (Step::Begin, Some(schedule)) => {
                    self.begin(&instance, &key, schedule, request).await?;
                    generated = true;
                }
                (Step::Register, Some(schedule)) => {
                    let generated = std::mem::take(&mut generated);
                    self.register(&instance, &key, schedule, generated).await?;
                }
                (Step::Prove, Some(schedule)) => self.prove(&instance, schedule).await?,
                (Step::Settle, Some(schedule)) => {
                    let in_secret = facts.keys.bootstrap.as_ref().ok();
                    let in_secret = in_secret.map(|key| key.key_id.clone());
                    self.settle(&instance, &key, in_secret.as_deref(), schedule).await?;
                }
                (Step::Wait(next), Some(_)) => {
                    let on_schedule = Outcome::new(Reason::KeyRotationOnSchedule);
                    return Ok(Some(Outcome { next, ..on_schedule }));
                }
                (_, None) => {
                    // The object no longer rotates its key, and the operator holds none for it.
                    self.set_finalizer(false).await?;
                    return Ok(None);
                }
            }
        }
        // The next reconcile continues.
        Err(self.deferred(&instance, Duration::from_secs(1)))
    }

    /// Updates the object and its keys in `facts` after a step.
    fn update(&self, facts: &mut Facts) {
        facts.user = self.user.clone();
        if facts.keys.ledger.is_ok() {
            facts.keys.ledger = Ok(self.stored.clone());
            self.ctx.keys.uses(self.id, &facts.keys);
            facts.key = gather::signer(self.ctx, self.id, facts);
        }
    }

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
    async fn begin(
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
        let current = self.stored.as_ref().and_then(|stored| stored.ledger.current.clone());
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
        let mut ledger = match (&self.stored, bootstrap) {
            (Some(stored), _) => stored.ledger.clone(),
            (None, Some(key)) => Ledger::new(id.to_string(), &instance.name_any(), &instance.spec.issuer, key),
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
    async fn register(
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
    async fn registered(&mut self, mut ledger: Ledger, key_id: &str, now: Timestamp) -> Result<(), Stop> {
        if self.session.key_id() == Some(key_id) || ledger.key_ids().any(|known| known == key_id) {
            return Err(Reason::MalformedResponse.into());
        }
        ledger.register(key_id, now);
        self.store(ledger).await
    }

    /// Requests a token with the pending key. If ZITADEL issues one, the key becomes the current one.
    async fn prove(&mut self, instance: &Arc<ZitadelInstance>, schedule: &Schedule) -> Result<(), Stop> {
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
    async fn settle(
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
        let Some(in_use) = in_use else {
            return Err(self.deferred(instance, READS_CONTINUE));
        };
        if in_use && ledger.settled {
            return Err(Reason::BootstrapKeyInUse.into());
        }
        if !self.knows_keys_of_others().await {
            return Err(self.deferred(instance, READS_CONTINUE));
        }
        self.open_as(instance, signer).await?;
        let listed = self.session.list().await?;
        for key_id in ledger.replaced(&listed, signer.key_id()) {
            self.session.remove(&key_id).await?;
        }
        let removed = removed.filter(|_| !in_use);
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

    /// Says in an Event and in the log what became of a key or a user.
    pub(super) async fn tell(&self, warning: bool, reason: Reason, text: String) {
        let event = EventDraft { warning, reason, text };
        self.ctx.tell(&self.user, "Rotate", event).await;
    }

    pub(super) fn ledger(&self) -> Result<Ledger, Stop> {
        let stored = self.stored.as_ref().ok_or(Reason::Internal)?;
        Ok(stored.ledger.clone())
    }

    /// Writes the ledger. If another process wrote it meanwhile, this one stops.
    pub(super) async fn store(&mut self, ledger: Ledger) -> Result<(), Stop> {
        let name = self.ledger_name();
        let at = LedgerRef {
            namespace: self.namespace()?,
            name: &name,
            label: LABEL_KEY_LEDGER,
            owner: self.user.metadata.uid.as_deref().unwrap_or_default(),
            stored: self.stored.as_ref().map(|stored| stored.secret(&name)),
        };
        let written = self.ctx.writer.write_ledger(&at, ledger.data()).await;
        let (uid, resource_version) = written.map_err(|error| self.write_failed(&error))?;
        self.stored = Some(StoredLedger {
            ledger,
            uid,
            resource_version,
        });
        Ok(())
    }

    /// Deletes the ledger.
    pub(super) async fn drop_ledger(&mut self) -> Result<(), Stop> {
        if let Some(stored) = &self.stored {
            let secret = stored.secret(&self.ledger_name());
            let deleted = self.ctx.writer.delete_secret(self.namespace()?, &secret).await;
            deleted.map_err(|error| self.write_failed(&error))?;
        }
        self.stored = None;
        Ok(())
    }

    pub(super) async fn set_finalizer(&mut self, present: bool) -> Result<(), Stop> {
        let written = finalizer::set(self.ctx, &mut self.user, FINALIZER, present).await;
        let written = written.map_err(|error| self.write_failed(&error))?;
        // The event of a removal wakes the object: another key signs now, so its tokens are planned again.
        self.written.extend(written.filter(|_| present));
        Ok(())
    }

    fn write_failed(&self, error: &WriteError) -> Stop {
        error.log(self.id, "the key ledger or the finalizer");
        error.reason_for_ledger().into()
    }

    pub(super) fn namespace(&self) -> Result<&'a str, Stop> {
        let namespace = self.ctx.operator_namespace.as_deref();
        Ok(namespace.ok_or(Reason::LedgerUnavailable)?)
    }

    fn ledger_name(&self) -> String {
        gather::key_ledger_name(self.user.metadata.uid.as_deref().unwrap_or_default())
    }

    /// The present time by the clock of the instance.
    pub(super) fn now(&self, instance: &ZitadelInstance) -> Timestamp {
        self.ctx.server_time(instance)
    }

    /// The rotation continues later.
    pub(super) fn deferred(&self, instance: &ZitadelInstance, wait: Duration) -> Stop {
        Stop::deferred(Reason::KeyRotationInProgress, later(self.now(instance), wait))
    }
}

/// A random number. `None` without a source of randomness.
pub(super) fn random() -> Option<u64> {
    let mut bytes = [0; 8];
    aws_lc_rs::rand::fill(&mut bytes).ok()?;
    Some(u64::from_be_bytes(bytes))
}
