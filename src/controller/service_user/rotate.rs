//! Rotates the key of a service user.

use std::sync::Arc;

use crate::api::ZitadelServiceUser;
use crate::api::metadata::{KEY_LEDGER_PREFIX, KEYS_FINALIZER};
use crate::controller::Context;
use crate::controller::key_rotation::{Holder, Rotated, Rotation, Terms};
use crate::controller::read::ReadError;
use crate::controller::service_user::act::is_current;
use crate::controller::service_user::{finalizer, gather};
use crate::controller::session::{Stop, in_time};
use crate::controller::triggers::reference;
use crate::controller::write::WriteError;
use crate::domain::facts::{Facts, TokenOutcome, rotate_request};
use crate::domain::key::ServiceKey;
use crate::domain::key_rotation::{self, Schedule};
use crate::domain::object_ref::ObjectRef;
use crate::domain::progress::Progress;
use crate::domain::reason::{Reason, Subject};
use crate::domain::report::EventDraft;
use crate::domain::validate;

impl Holder for Arc<ZitadelServiceUser> {
    const LEDGER_PREFIX: &str = KEY_LEDGER_PREFIX;

    fn ledger_key(&self) -> &str {
        self.metadata.uid.as_deref().unwrap_or_default()
    }

    async fn set_finalizer(&mut self, ctx: &Context, present: bool) -> Result<Option<String>, WriteError> {
        finalizer::set(ctx, self, KEYS_FINALIZER, present).await
    }

    async fn bootstrap_key(&self, ctx: &Context) -> Result<Option<ServiceKey>, Stop> {
        let named = self.spec.key_secret_ref.as_ref();
        let Some(key) = named.filter(|_| validate::key_source(&self.spec).is_ok()) else {
            return Ok(None);
        };
        match ctx.reader.key(&reference(self.as_ref()).namespace, key).await {
            Ok(key) => Ok(key.ok()),
            Err(ReadError::Forbidden) => Err(Reason::SecretsForbidden.into()),
            Err(ReadError::Unavailable) => Err(Reason::APIServerUnavailable.into()),
        }
    }

    fn is_abandoned(&self) -> bool {
        gather::is_abandoned(self)
    }

    async fn tell(&self, ctx: &Context, event: EventDraft) {
        ctx.tell(self, "Rotate", event).await;
    }
}

/// Does what is due of the object's key rotation, after its tokens ended with `tokens`. Updates the keys in `facts`.
pub async fn rotate(ctx: &Context, id: &ObjectRef, facts: &mut Facts, tokens: &[TokenOutcome]) -> Rotated {
    let schedule = Schedule::of_spec(&facts.user.spec);
    if schedule.is_none() && matches!(facts.keys.ledger, Ok(None)) && !finalizer::is_set(&facts.user, KEYS_FINALIZER) {
        return Rotated::default();
    }
    let now = facts.clock.theirs(ctx.clock.now());
    let waits = facts.pending_retries.get(key_rotation::BACKOFF);
    let waits = waits.filter(|retry| retry.until > now).map(|retry| retry.reason);
    let mut rotation = Rotation::new(ctx, id, facts.user.clone(), facts.keys.clone());
    let outcome = match (obstacle(facts, tokens), schedule, waits) {
        (Some(reason), ..) => Some(Progress::waiting(reason)),
        (None, Some(None), _) => Some(Progress::new(Reason::KeyRotationInvalid)),
        (None, _, Some(reason)) => {
            rotation.wants_key = ctx.key_generator.serves(id);
            Some(Progress::deferred(reason))
        }
        (None, schedule, None) => {
            let advanced = in_time(advance(&mut rotation, facts, schedule.flatten())).await;
            advanced.unwrap_or_else(|Stop(outcome)| Some(outcome))
        }
    };
    facts.user = rotation.holder.clone();
    facts.keys.clone_from(&rotation.keys);
    facts.key = gather::signer(ctx, id, facts);
    rotation.ended(outcome, now)
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

/// Provides for the user in `spec.user`, then advances the rotation.
async fn advance(
    rotation: &mut Rotation<'_, Arc<ZitadelServiceUser>>,
    facts: &Facts,
    schedule: Option<Schedule>,
) -> Result<Option<Progress>, Stop> {
    let instance = facts.instance.clone()?;
    if rotation.stored().is_some() {
        // Someone may have removed it.
        rotation.set_finalizer(true).await?;
    }
    rotation.provision(facts, &instance).await?;
    let (ctx, id) = (rotation.ctx, rotation.id);
    let terms = Terms {
        instance,
        schedule,
        request: rotate_request(&facts.user.metadata),
        has_administrator: facts.user.spec.user.is_some(),
        is_current: &|| is_current(ctx, id, facts),
    };
    rotation.advance(&terms).await
}
