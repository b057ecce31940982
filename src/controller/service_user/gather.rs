//! Gathers the facts about one service user. The key is read for each reconcile and not kept afterwards.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use kube::ResourceExt;

use crate::api::metadata::{
    ANNOTATION_ABANDON, KEY_LEDGER_PREFIX, KEYS_FINALIZER, ROLE_LEDGER_PREFIX, ROLES_FINALIZER,
};
use crate::api::service_user::Token;
use crate::api::{ZitadelInstance, ZitadelServiceUser};
use crate::controller::Context;
use crate::controller::key_rotation;
use crate::controller::read::{ReadError, ReadUser};
use crate::controller::service_user::finalizer;
use crate::controller::triggers::reference;
use crate::domain::facts::Facts;
use crate::domain::key::ServiceKey;
use crate::domain::key_ledger::StoredKeys;
use crate::domain::key_rotation::KeyState;
use crate::domain::object_ref::ObjectRef;
use crate::domain::observed_secret::Wanted;
use crate::domain::plan;
use crate::domain::reason::Reason;
use crate::domain::retry::{PendingRetries, PendingRetry};
use crate::domain::role_ledger::StoredRoles;

/// Most leftover Secrets (no longer named in the spec) that one reconcile reads: as many as an object may have tokens.
const MOST_LEFTOVERS: usize = 16;

/// The result of [`gather`].
pub enum Gathered {
    /// Everything that [`plan`](mod@plan) needs.
    Facts(Box<Facts>),
    /// The object exists and cannot be served, regardless of its Secrets.
    Refused {
        /// The reason.
        reason: Reason,
        /// Generation of its spec.
        generation: Option<i64>,
        /// Whether the status already reports the reason for this generation.
        reported: bool,
    },
    /// The object is being deleted, and the operator has made keys for it.
    Deleted(Arc<ZitadelServiceUser>),
    /// The object or its namespace is deleted or being deleted, or this operator does not serve it.
    Gone,
}

/// Whether the instance of `id` exists and was not reconciled yet.
pub fn awaits_instance(ctx: &Context, id: &ObjectRef) -> bool {
    ctx.cache.user(id).is_some_and(|user| {
        ctx.cache.instance(&user.instance).is_ok() && !ctx.connections.was_reconciled(&user.instance)
    })
}

/// Reads everything that the plan for `id` depends on.
pub async fn gather(ctx: &Context, id: &ObjectRef, pending_retries: PendingRetries) -> Result<Gathered, ReadError> {
    let known = ctx.cache.user(id);
    if let Some(known) = &known {
        // Also if the object cannot be read, or is not served: after a restart, nothing else remembers its roles.
        if known.holds.roles {
            ctx.memory.note_roles(id, &known.uid, true);
        }
        if known.deleting && (known.holds.keys || known.holds.roles) {
            return deleted(ctx, id).await;
        }
    }
    // In a terminating namespace no Secret can be created, so a token would be lost.
    let known = known.filter(|user| !user.deleting);
    let refused = known.is_none() && ctx.cache.is_over_limit(&id.namespace);
    let terminating = ctx.cache.is_terminating(&id.namespace);
    if !refused && (known.is_none() || terminating) {
        return Ok(Gathered::Gone);
    }
    if let Some(known) = &known
        && !ctx.serves(&known.instance)
    {
        return Ok(Gathered::Gone);
    }
    let user = match ctx.reader.user(id).await? {
        Some(ReadUser::Readable(user)) if user.metadata.deletion_timestamp.is_none() => user,
        Some(ReadUser::Unreadable { generation, .. }) => {
            tracing::warn!(object = %id, "a service user does not match its schema and is not served");
            let reason = Reason::ObjectUnreadable;
            let reported = known.is_some_and(|user| {
                user.ready == Some((false, Some(reason))) && user.observed_generation == generation
            });
            return Ok(Gathered::Refused {
                reason,
                generation,
                reported,
            });
        }
        Some(ReadUser::Readable(user)) if is_finalized(&user) => return deleted_or_gone(ctx, user).await,
        Some(ReadUser::Readable(_)) => return Ok(Gathered::Gone),
        None => {
            tracing::info!(object = %id, "the service user no longer exists");
            if let Some(known) = known {
                ctx.cache.forget_user(id, &known.uid);
            }
            return Ok(Gathered::Gone);
        }
    };
    let instance_name = user.spec.instance_ref.name.clone();
    if terminating || !ctx.serves(&instance_name) {
        return Ok(Gathered::Gone);
    }
    if refused {
        return Ok(over_limit(ctx, id, &user));
    }
    let clock = ctx.connections.skew(&instance_name);
    let instance = ctx.cache.instance(&instance_name);
    let names: HashSet<&str> = user.spec.tokens.iter().map(|token| token.name.as_str()).collect();
    let memory = ctx.memory.of(id, &names);
    let of_memory = memory.iter();
    let hold = |(what, hold): (String, PendingRetry)| {
        let until = clock.theirs(hold.until);
        (what, PendingRetry { until, ..hold })
    };
    let mut facts = Facts {
        allowed_metadata: ctx.allowed_metadata.clone(),
        in_operator_namespace: ctx.operator_namespace.as_deref() == Some(&*id.namespace),
        allowed: ctx.cache.allowed(&instance_name, &id.namespace),
        zitadel_project_id: instance
            .as_deref()
            .ok()
            .and_then(|i| ctx.connections.known_project_id(i)),
        instance,
        clock,
        key: Err(Reason::KeySecretMissing),
        keys: KeyState::none(Reason::KeySecretMissing),
        roles: Ok(None),
        secrets: BTreeMap::new(),
        unwritten: of_memory
            .clone()
            .filter_map(|(name, m)| Some((name.clone(), m.unwritten.clone()?)))
            .collect(),
        write_failed: of_memory
            .clone()
            .filter(|(_, m)| m.write_failed)
            .map(|(name, _)| name.clone())
            .collect(),
        leftovers: Vec::new(),
        pending_retries: pending_retries.into_iter().map(hold).collect(),
        unscheduled: of_memory
            .clone()
            .map(|(name, m)| (name.clone(), m.unscheduled.len()))
            .collect(),
        last_mints: of_memory
            .filter_map(|(name, m)| Some((name.clone(), m.last.clone()?)))
            .collect(),
        user,
    };
    read_secrets(ctx, id, &mut facts).await?;
    Ok(Gathered::Facts(Box::new(facts)))
}

/// Refuses an object whose namespace has reached its memory limit.
fn over_limit(ctx: &Context, id: &ObjectRef, user: &ZitadelServiceUser) -> Gathered {
    if finalizer::is_set(user, ROLES_FINALIZER) {
        let uid = user.metadata.uid.as_deref().unwrap_or_default();
        ctx.memory.note_roles(id, uid, true);
    }
    let (reason, generation) = (Reason::NamespaceLimit, user.metadata.generation);
    let status = user.status.as_ref();
    let status = status.filter(|status| status.observed_generation == generation);
    let mut conditions = status.into_iter().flat_map(|status| &status.conditions);
    Gathered::Refused {
        reason,
        generation,
        reported: conditions.any(|condition| condition.reason == reason.name()),
    }
}

/// Reads an object that is being deleted and for which the operator has made keys.
async fn deleted(ctx: &Context, id: &ObjectRef) -> Result<Gathered, ReadError> {
    match ctx.reader.user(id).await? {
        Some(ReadUser::Readable(user)) if user.metadata.deletion_timestamp.is_some() && is_finalized(&user) => {
            deleted_or_gone(ctx, user).await
        }
        Some(ReadUser::Unreadable { generation, .. }) => Ok(Gathered::Refused {
            reason: Reason::ObjectUnreadable,
            generation,
            reported: false,
        }),
        _ => Ok(Gathered::Gone),
    }
}

/// What was made for a deleted object belongs to the operator that has a ledger of it, also if the instance no longer
/// exists. An operator that cannot read a ledger may be another one.
async fn deleted_or_gone(ctx: &Context, user: Arc<ZitadelServiceUser>) -> Result<Gathered, ReadError> {
    let served = ctx.serves(&user.spec.instance_ref.name);
    let ours = served
        || matches!(key_ledger(ctx, &user).await?, Ok(Some(_)))
        || matches!(role_ledger(ctx, &user).await?, Ok(Some(_)));
    Ok(if ours { Gathered::Deleted(user) } else { Gathered::Gone })
}

/// Reads the Secrets of allowed tokens, and those that the operator wrote before, which the status reports.
async fn read_secrets(ctx: &Context, id: &ObjectRef, facts: &mut Facts) -> Result<(), ReadError> {
    let tokens = &facts.user.spec.tokens;
    let refused = (0..tokens.len()).map(|index| plan::may_read(facts, index).err());
    let refused: Vec<Option<Reason>> = refused.collect();
    let named: HashSet<&str> = tokens.iter().map(|token| token.secret.name.as_str()).collect();
    let mut leftovers = ctx.cache.leftovers(id, facts.uid(), &named);
    // Only leftovers that were read are handled. Later reconciles handle the rest.
    leftovers.truncate(MOST_LEFTOVERS);
    let written = ctx.cache.written_for(id, facts.uid());
    let wanted = tokens.iter().zip(&refused);
    let wanted = wanted.filter(|(token, refused)| refused.is_none() || written.contains(&token.secret.name));
    let mut secrets: HashMap<&str, Option<&Token>> = wanted
        .map(|(token, _)| (token.secret.name.as_str(), Some(token)))
        .collect();
    for leftover in &leftovers {
        secrets.insert(&leftover.name, None);
    }
    // It is in the operator's namespace. A tenant who takes the operator's rights in this one must not stop a revocation.
    facts.roles = role_ledger(ctx, &facts.user).await?;
    // Read sequentially, so that each object uses at most one slot for reads.
    let read = async {
        let keys = match refused.iter().min_by_key(|reason| reason.is_some()) {
            // No token is allowed, so the key is not needed.
            Some(Some(reason)) => KeyState::none(*reason),
            _ => KeyState {
                bootstrap: match &facts.user.spec.key_secret_ref {
                    Some(reference) => ctx.reader.key(&id.namespace, reference).await?,
                    None => Err(Reason::UserNotReady),
                },
                ledger: key_ledger(ctx, &facts.user).await?,
            },
        };
        let mut found = BTreeMap::new();
        for (name, token) in secrets {
            let secret = ctx.reader.token_secret(&id.namespace, name, &Wanted::of(token)).await?;
            found.extend(secret.map(|secret| (name.to_owned(), secret)));
        }
        Ok((keys, found))
    };
    let (keys, secrets) = match read.await {
        Ok(read) => read,
        // The status reports this, because only an administrator can grant the permission.
        Err(ReadError::Forbidden) => (KeyState::none(Reason::SecretsForbidden), BTreeMap::new()),
        Err(error) => return Err(error),
    };
    if keys.are_read() {
        ctx.keys.uses(id, &keys);
    }
    facts.keys = keys;
    facts.key = signer(ctx, id, facts);
    facts.secrets = secrets;
    facts.leftovers = leftovers;
    Ok(())
}

/// The key ledger of an object. An object without key rotation has one only as long as it has the operator's finalizer.
pub async fn key_ledger(
    ctx: &Context,
    user: &ZitadelServiceUser,
) -> Result<Result<Option<StoredKeys>, Reason>, ReadError> {
    // A replacement of the object by a manifest drops the finalizer, but not the keys.
    let has_made = || ctx.keys.has_made(&reference(user));
    let makes_keys = user.spec.key_rotation.is_some() || user.spec.user.is_some();
    if !makes_keys && !finalizer::is_set(user, KEYS_FINALIZER) && !has_made() {
        return Ok(Ok(None));
    }
    let (Some(namespace), Some(uid)) = (&ctx.operator_namespace, &user.metadata.uid) else {
        return Ok(Err(Reason::LedgerUnavailable));
    };
    available(ctx.reader.key_ledger(namespace, &key_ledger_name(uid)).await)
}

/// The role ledger of an object. An object without manager roles has one only as long as it has the operator's finalizer, or
/// as this process knows.
pub async fn role_ledger(
    ctx: &Context,
    user: &ZitadelServiceUser,
) -> Result<Result<Option<StoredRoles>, Reason>, ReadError> {
    let (id, uid) = (reference(user), user.metadata.uid.clone().unwrap_or_default());
    let may_have = !user.spec.manager_roles.is_empty() || finalizer::is_set(user, ROLES_FINALIZER);
    if !may_have && !ctx.memory.role_ledgers(&id).contains(&uid) {
        return Ok(Ok(None));
    }
    read_roles(ctx, &id, &uid).await
}

/// The role ledger of the object with this UID.
pub async fn read_roles(
    ctx: &Context,
    id: &ObjectRef,
    uid: &str,
) -> Result<Result<Option<StoredRoles>, Reason>, ReadError> {
    let Some(namespace) = &ctx.operator_namespace else {
        // Without a namespace there are no ledgers.
        ctx.memory.note_roles(id, uid, false);
        return Ok(Err(Reason::LedgerUnavailable));
    };
    let read = available(ctx.reader.role_ledger(namespace, &role_ledger_name(uid)).await)?;
    ctx.memory.note_roles(id, uid, !matches!(read, Ok(None)));
    Ok(read)
}

fn available<L>(read: Result<Result<Option<L>, Reason>, ReadError>) -> Result<Result<Option<L>, Reason>, ReadError> {
    match read {
        Err(ReadError::Forbidden) => Ok(Err(Reason::LedgerUnavailable)),
        read => read,
    }
}

/// Name of the Secret that holds the key ledger of the object with this UID.
#[must_use]
pub fn key_ledger_name(uid: &str) -> String {
    format!("{KEY_LEDGER_PREFIX}{uid}")
}

/// Name of the Secret that holds the role ledger of the object with this UID.
pub fn role_ledger_name(uid: &str) -> String {
    format!("{ROLE_LEDGER_PREFIX}{uid}")
}

/// The key that signs for the object.
pub fn signer(ctx: &Context, id: &ObjectRef, facts: &Facts) -> Result<ServiceKey, Reason> {
    let has_administrator = facts.user.spec.user.is_some();
    key_rotation::signer(ctx, id, &facts.keys, facts.issuer(), facts.clock, has_administrator)
}

/// Whether the deletion of the object waits until the operator has removed what it made for it.
fn is_finalized(user: &ZitadelServiceUser) -> bool {
    [KEYS_FINALIZER, ROLES_FINALIZER]
        .iter()
        .any(|ours| finalizer::is_set(user, ours))
}

/// Whether the object asks the operator to leave at ZITADEL what it made for it.
pub fn is_abandoned(user: &ZitadelServiceUser) -> bool {
    let request = user.annotations().get(ANNOTATION_ABANDON);
    request.is_some() && request == user.metadata.uid.as_ref()
}

/// The instance that a ledger belongs to: the one with the name of the ledger, or else the present one, if the issuer is
/// the same.
pub fn instance_of(
    ctx: &Context,
    name: &str,
    issuer: &str,
    present: Option<&Arc<ZitadelInstance>>,
) -> Option<Arc<ZitadelInstance>> {
    let named = ctx.cache.instance(name).ok();
    let mut candidates = named.iter().chain(present);
    candidates.find(|instance| instance.spec.issuer == issuer).cloned()
}
