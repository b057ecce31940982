//! Rotates the key of the administrator of an instance.

use std::sync::Arc;

use kube::ResourceExt;

use crate::api::ZitadelInstance;
use crate::api::instance::AdminCredentialStatus;
use crate::api::metadata::ADMIN_LEDGER_PREFIX;
use crate::controller::Context;
use crate::controller::instance::credential::Credential;
use crate::controller::key_rotation::{Holder, Rotation, Terms};
use crate::controller::session::{Stop, in_time};
use crate::controller::write::WriteError;
use crate::domain::admin_credential;
use crate::domain::facts::rotate_request;
use crate::domain::key::ServiceKey;
use crate::domain::key_ledger::KeyLedger;
use crate::domain::key_rotation::Schedule;
use crate::domain::object_ref::ObjectRef;
use crate::domain::progress::Progress;
use crate::domain::reason::Reason;
use crate::domain::report::EventDraft;

impl Holder for Arc<ZitadelInstance> {
    const LEDGER_PREFIX: &str = ADMIN_LEDGER_PREFIX;

    /// The name: an instance that is deleted and created again still has a key that works.
    fn ledger_key(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    /// The ledger outlives the instance.
    async fn set_finalizer(&mut self, _: &Context, _: bool) -> Result<Option<String>, WriteError> {
        Ok(None)
    }

    async fn bootstrap_key(&self, _: &Context) -> Result<Option<ServiceKey>, Stop> {
        Ok(None)
    }

    fn is_abandoned(&self) -> bool {
        false
    }

    async fn tell(&self, _: &Context, event: EventDraft) {
        // Nobody looks for Events of a cluster-scoped object, which are in the namespace `default`.
        let (object, reason) = (self.name_any(), event.reason);
        if event.warning {
            tracing::warn!(object, %reason, "the key of the administrator: {}", event.text);
        } else {
            tracing::info!(object, %reason, "the key of the administrator: {}", event.text);
        }
    }
}

impl Rotation<'_, Arc<ZitadelInstance>> {
    /// Stores where the operator may send what its own keys sign. Reading the credential has shown that the Secret may say so.
    async fn bind(&mut self) -> Result<(), Stop> {
        let Some(stored) = self.stored() else { return Ok(()) };
        let spec = &self.holder.spec;
        let send_to = Some(admin_credential::destination(spec));
        if stored.ledger.issuer != spec.issuer || stored.ledger.send_to == send_to {
            return Ok(());
        }
        let mut ledger = stored.ledger.clone();
        ledger.send_to = send_to;
        self.store(ledger).await
    }
}

/// The schedule of the admin credential, or why there is none. `None` if its key is not rotated.
pub fn schedule(instance: &ZitadelInstance) -> Option<Result<Schedule, Reason>> {
    let rotation = instance.spec.admin_credential.as_ref()?.key_rotation.as_ref()?;
    Some(Schedule::of(rotation).ok_or(Reason::KeyRotationInvalid))
}

/// How the rotation stands while ZITADEL does not accept the credential for this reason. Nothing if the key is not rotated.
pub fn waits(instance: &ZitadelInstance, credential: Option<&Credential>, reason: Reason) -> Option<Progress> {
    // Without a usable ledger, that is the more important reason.
    let damaged = match credential {
        Some(Credential::Keys(keys)) => keys.ledger.as_ref().err().copied(),
        _ => None,
    };
    let rotates = schedule(instance).is_some() || credential.is_some_and(Credential::holds_keys);
    rotates.then(|| Progress::waiting(damaged.unwrap_or(reason)))
}

/// Does what is due of the rotation, and updates the keys. Returns nothing if the key is not rotated.
pub async fn rotate(
    ctx: &Context,
    id: &ObjectRef,
    instance: &Arc<ZitadelInstance>,
    credential: &mut Credential,
    admin: &AdminCredentialStatus,
) -> Option<Progress> {
    let schedule = schedule(instance);
    let is_former = |ledger: &KeyLedger| !ledger.is_of(&instance.spec.issuer, &admin.user_id);
    if credential.ledger().is_some_and(is_former) && admin.roles.is_empty() {
        // A wrong file must not cost the former administrator its keys.
        return Some(Progress::new(Reason::AdminForbidden));
    }
    let keys = match credential {
        Credential::Keys(keys) => keys,
        Credential::Token(_, holds_keys) => {
            return (schedule.is_some() || *holds_keys).then(|| Progress::new(Reason::KeyFileNeeded));
        }
    };
    let schedule = match schedule {
        None if matches!(keys.ledger, Ok(None)) => return None,
        None => None,
        Some(Ok(schedule)) => Some(schedule),
        Some(Err(reason)) => return Some(Progress::new(reason)),
    };
    let mut rotation = Rotation::new(ctx, id, instance.clone(), (**keys).clone());
    let is_current = || ctx.cache.instance(&id.name).is_ok_and(|now| now.spec == instance.spec);
    let terms = Terms {
        instance: instance.clone(),
        schedule,
        request: rotate_request(&instance.metadata),
        has_administrator: false,
        is_current: &is_current,
    };
    let steps = async {
        let advanced = rotation.advance(&terms).await;
        let bound = rotation.bind().await;
        advanced.and_then(|outcome| bound.map(|()| outcome))
    };
    let outcome = in_time(steps).await.unwrap_or_else(|Stop(outcome)| Some(outcome));
    **keys = rotation.keys.clone();
    let rotated = rotation.ended(outcome, ctx.server_time(instance));
    if !rotated.wants_key {
        ctx.key_generator.forget(id);
    }
    rotated.outcome
}
