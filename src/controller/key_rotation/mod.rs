//! Carries out a key rotation, step by step. Each step is stored in the ledger before the next one begins, so that another
//! process can continue (`docs/adr/0020-keys-rotate-by-a-ledger.md`). `domain/key_rotation.rs` chooses the steps, and
//! `session.rs` talks to ZITADEL.

mod memory;
mod other_keys;
mod remove_keys;
mod steps;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

pub use memory::KeyMemory;

use crate::api::ZitadelInstance;
use crate::api::metadata::LABEL_KEY_LEDGER;
use crate::controller::Context;
use crate::controller::ledger::{self, Place};
use crate::controller::session::{Session, Signer, Stop};
use crate::controller::write::WriteError;
use crate::domain::clock_skew::Skew;
use crate::domain::key::ServiceKey;
use crate::domain::key_ledger::{KeyLedger, StoredKeys};
use crate::domain::key_rotation::{self, KeyState, Schedule, Step};
use crate::domain::object_ref::ObjectRef;
use crate::domain::progress::Progress;
use crate::domain::reason::Reason;
use crate::domain::report::EventDraft;
use crate::domain::time::later;

/// Most steps of one reconcile: a rotation has four and a final wait, and at most three more precede it.
const MOST_STEPS: usize = 8;

/// What a reconcile did for the rotation.
#[derive(Default)]
pub struct Rotated {
    /// How the rotation stands. `None` if the object does not rotate its key.
    pub outcome: Option<Progress>,
    /// Resource versions of the object that this wrote.
    pub written: Vec<String>,
    /// Number of requests to ZITADEL.
    pub requests: usize,
    /// Whether the key generator has a key to make for the object, or made one.
    pub wants_key: bool,
}

/// The object whose keys are rotated.
pub trait Holder: Send + Sync {
    /// What the name of the Secret with the ledger begins with.
    const LEDGER_PREFIX: &str;

    /// What tells the ledger from those of other objects: the rest of its name, and the value of its label.
    fn ledger_key(&self) -> &str;

    /// Adds the finalizer that keeps the object until its keys are removed, or removes it. Returns the resource version of a
    /// write.
    fn set_finalizer(
        &mut self,
        ctx: &Context,
        present: bool,
    ) -> impl Future<Output = Result<Option<String>, WriteError>> + Send;

    /// The key in the Secret of the object, if there is a usable one.
    fn bootstrap_key(&self, ctx: &Context) -> impl Future<Output = Result<Option<ServiceKey>, Stop>> + Send;

    /// Whether the object asks the operator to leave its keys at ZITADEL.
    fn is_abandoned(&self) -> bool;

    /// Says what became of a key or a user.
    fn tell(&self, ctx: &Context, event: EventDraft) -> impl Future<Output = ()> + Send;
}

/// What a rotation follows, besides the keys.
pub struct Terms<'a> {
    /// The instance that the keys belong to.
    pub instance: Arc<ZitadelInstance>,
    /// When to rotate. `None` if the object no longer rotates its key.
    pub schedule: Option<Schedule>,
    /// The object's rotate request.
    pub request: Option<String>,
    /// Whether the administrator adds a key if none works.
    pub has_administrator: bool,
    /// Whether everything that allows the rotation is still as it was read.
    pub is_current: &'a (dyn Fn() -> bool + Send + Sync),
}

/// The rotation of one object.
pub struct Rotation<'a, H> {
    pub(in crate::controller) ctx: &'a Context,
    pub(in crate::controller) id: &'a ObjectRef,
    /// The object, with the resource version of the last write.
    pub(in crate::controller) holder: H,
    /// The keys, with the ledger as it is stored.
    pub(in crate::controller) keys: KeyState,
    pub(in crate::controller) session: Session<'a>,
    /// Whether this reconcile replaced the key.
    pub(in crate::controller) rotated: bool,
    /// Whether the key generator has a key to make for the object, or made one.
    pub(in crate::controller) wants_key: bool,
    /// Resource versions of the object that this wrote.
    pub(in crate::controller) written: Vec<String>,
}

impl<'a, H: Holder> Rotation<'a, H> {
    /// The rotation of an object with these keys.
    pub fn new(ctx: &'a Context, id: &'a ObjectRef, holder: H, keys: KeyState) -> Self {
        Self {
            ctx,
            id,
            holder,
            keys,
            session: Session::new(ctx, id, &ctx.requests),
            rotated: false,
            wants_key: false,
            written: Vec::new(),
        }
    }

    /// Takes one step after the other until there is none to take now. Returns nothing if the object no longer rotates its
    /// key.
    pub async fn advance(&mut self, terms: &Terms<'_>) -> Result<Option<Progress>, Stop> {
        let instance = &terms.instance;
        let issuer = &*instance.spec.issuer;
        // Whether this reconcile generated the pending key, so that ZITADEL cannot have it yet.
        let mut generated = false;
        for _ in 0..MOST_STEPS {
            let skew = self.ctx.connections.skew(&instance.name_any());
            let key = match signer(self.ctx, self.id, &self.keys, issuer, skew, terms.has_administrator) {
                Ok(key) => Signer::Key(key),
                Err(Reason::UserNotReady) => Signer::Admin,
                Err(reason) => return Err(reason.into()),
            };
            let what_for = (terms.request.as_deref(), self.holder.ledger_key());
            let (schedule, now) = (terms.schedule.as_ref(), self.now(instance));
            let step = key_rotation::next(schedule, &self.keys, issuer, key.key_id(), what_for, now);
            if !matches!(step, Step::Wait(_) | Step::Blocked(_)) && !(terms.is_current)() {
                // The next reconcile, within seconds, decides anew.
                return Err(Reason::APIServerUnavailable.into());
            }
            match (step, schedule) {
                (Step::Blocked(reason), _) => return Err(reason.into()),
                (Step::RemoveFormer, _) => self.remove_former(instance).await?,
                (Step::HandBack, _) => {
                    let bootstrap = self.keys.bootstrap.clone()?;
                    self.hand_back(instance, &bootstrap).await?;
                }
                (Step::Begin, Some(schedule)) => {
                    self.begin(instance, &key, schedule, terms.request.clone()).await?;
                    generated = true;
                }
                (Step::Register, Some(schedule)) => {
                    let generated = std::mem::take(&mut generated);
                    self.register(instance, &key, schedule, generated).await?;
                }
                (Step::Prove, Some(schedule)) => self.prove(instance, schedule).await?,
                (Step::Settle, Some(schedule)) => {
                    let in_secret = self.keys.bootstrap.as_ref().ok();
                    let in_secret = in_secret.map(|key| key.key_id.clone());
                    self.settle(instance, &key, in_secret.as_deref(), schedule).await?;
                }
                (Step::Wait(next), Some(_)) => {
                    let on_schedule = Progress::new(Reason::KeyRotationOnSchedule);
                    return Ok(Some(Progress { next, ..on_schedule }));
                }
                (_, None) => {
                    // The object no longer rotates its key, and the operator holds none for it.
                    self.set_finalizer(false).await?;
                    return Ok(None);
                }
            }
        }
        // The next reconcile continues.
        Err(self.deferred(instance, Duration::from_secs(1)))
    }

    /// What the reconcile did, with this outcome.
    pub fn ended(self, outcome: Option<Progress>, now: Timestamp) -> Rotated {
        let rotated = self.rotated;
        let outcome = outcome.map(|outcome| Progress { rotated, ..outcome });
        let holds_keys = self.stored().is_some();
        Rotated {
            outcome: outcome.map(|outcome| {
                if holds_keys {
                    outcome.retried_in_time(now)
                } else {
                    outcome
                }
            }),
            written: self.written,
            requests: self.session.requests(),
            wants_key: self.wants_key,
        }
    }

    pub(in crate::controller) fn stored(&self) -> Option<&StoredKeys> {
        self.keys.stored()
    }

    pub(in crate::controller) fn ledger(&self) -> Result<KeyLedger, Stop> {
        let stored = self.stored().ok_or(Reason::Internal)?;
        Ok(stored.ledger.clone())
    }

    /// Writes the ledger.
    pub(in crate::controller) async fn store(&mut self, new: KeyLedger) -> Result<(), Stop> {
        let data = new.data();
        let stored = ledger::store(self.ctx, &self.place(), self.stored(), new, data).await?;
        self.keys.ledger = Ok(Some(stored));
        self.ctx.keys.uses(self.id, &self.keys);
        Ok(())
    }

    /// Deletes the ledger.
    pub(in crate::controller) async fn drop_ledger(&mut self) -> Result<(), Stop> {
        if let Some(stored) = self.stored() {
            ledger::delete(self.ctx, &self.place(), stored).await?;
        }
        self.keys.ledger = Ok(None);
        self.ctx.keys.uses(self.id, &self.keys);
        Ok(())
    }

    fn place(&self) -> Place<'_> {
        Place {
            id: self.id,
            name: format!("{}{}", H::LEDGER_PREFIX, self.holder.ledger_key()),
            label: LABEL_KEY_LEDGER,
            key: self.holder.ledger_key(),
        }
    }

    pub(in crate::controller) async fn set_finalizer(&mut self, present: bool) -> Result<(), Stop> {
        let written = self.holder.set_finalizer(self.ctx, present).await;
        let written = written.map_err(|error| ledger::failed(self.id, &error))?;
        // The event of a removal wakes the object: another key signs now, so its tokens are planned again.
        self.written.extend(written.filter(|_| present));
        Ok(())
    }

    /// Says in the log, and in an Event where possible, what became of a key or a user.
    pub(in crate::controller) async fn tell(&self, warning: bool, reason: Reason, text: String) {
        let event = EventDraft { warning, reason, text };
        self.holder.tell(self.ctx, event).await;
    }

    /// The present time by the clock of the instance.
    pub(in crate::controller) fn now(&self, instance: &ZitadelInstance) -> Timestamp {
        self.ctx.server_time(instance)
    }

    /// The rotation continues later.
    fn deferred(&self, instance: &ZitadelInstance, wait: Duration) -> Stop {
        Stop::deferred(Reason::KeyRotationInProgress, later(self.now(instance), wait))
    }
}

/// The key that signs for the object. `UserNotReady` if none works and the administrator adds another one.
pub fn signer(
    ctx: &Context,
    id: &ObjectRef,
    keys: &KeyState,
    issuer: &str,
    skew: Skew,
    has_administrator: bool,
) -> Result<ServiceKey, Reason> {
    // By a clock that is not trusted, nothing has expired.
    let now = skew.certain(ctx.clock.now());
    let is_unusable = |key: &ServiceKey| {
        let expired = key.expires.zip(now).is_some_and(|(expires, now)| expires <= now);
        expired || ctx.keys.is_rejected_for_long(id, &key.key_id)
    };
    let key = key_rotation::signer(keys, issuer, is_unusable)?;
    if has_administrator && is_unusable(&key) {
        return Err(Reason::UserNotReady);
    }
    Ok(key)
}

/// A random number. `None` without a source of randomness.
#[must_use]
pub fn random() -> Option<u64> {
    let mut bytes = [0; 8];
    aws_lc_rs::rand::fill(&mut bytes).ok()?;
    Some(u64::from_be_bytes(bytes))
}
