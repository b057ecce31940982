//! Gathers the facts about one service user. The only place that reads Secrets; a key is read per use and never kept.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::{try_join, try_join_all};
use k8s_openapi::jiff::Timestamp;
use kube::Api;

use crate::api::ZitadelServiceUser;
use crate::api::service_user::KeySecretRef;
use crate::controller::Context;
use crate::controller::secrets::WholeSecret;
use crate::domain::clock::shifted;
use crate::domain::facts::{CONTEST_WINDOW, Facts, HeldBack, Hold, ObjectRef, Unwritten};
use crate::domain::key::{self, ServiceKey};
use crate::domain::plan::MintRequest;
use crate::domain::reason::Reason;

/// Longest time of one read.
const DEADLINE: Duration = Duration::from_secs(15);

/// Tokens that were minted and not written yet, by object and token name. They die with the process: a crash costs
/// the mints in flight.
#[derive(Default)]
pub struct UnwrittenTokens(Mutex<HashMap<ObjectRef, BTreeMap<String, Arc<Unwritten>>>>);

impl UnwrittenTokens {
    /// Keeps a token until its write succeeds.
    pub fn keep(&self, id: &ObjectRef, token: &str, unwritten: Unwritten) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(id.clone())
            .or_default()
            .insert(token.to_owned(), Arc::new(unwritten));
    }

    /// Drops what was kept for a token.
    pub fn drop_token(&self, id: &ObjectRef, token: &str) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tokens) = all.get_mut(id) {
            tokens.remove(token);
            if tokens.is_empty() {
                all.remove(id);
            }
        }
    }

    /// Drops what was kept for an object.
    pub fn drop_object(&self, id: &ObjectRef) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    /// What is kept for an object; what left its spec is dropped. One that expired is of no use, but still tells that the
    /// write has to be tried before the next mint.
    fn of(&self, id: &ObjectRef, user: &ZitadelServiceUser) -> BTreeMap<String, Arc<Unwritten>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(tokens) = all.get_mut(id) else {
            return BTreeMap::new();
        };
        tokens.retain(|name, _| user.spec.tokens.iter().any(|t| t.name == *name));
        tokens.clone()
    }
}

/// What somebody forced: mints before they were due, and repairs; by object and token name.
#[derive(Default)]
pub struct Forced(Mutex<ForcedState>);

#[derive(Default)]
struct ForcedState {
    times: HashMap<ObjectRef, Vec<(String, Timestamp)>>,
    /// Inputs and renew time of the last mint of each token.
    last: HashMap<ObjectRef, BTreeMap<String, (String, Timestamp)>>,
}

impl Forced {
    /// Notes a repair.
    pub fn repaired(&self, id: &ObjectRef, token: &str, now: Timestamp) {
        self.lock().note(id, token, now);
    }

    /// Notes a mint.
    pub fn minted(&self, id: &ObjectRef, token: &str, request: &MintRequest, renew: Timestamp, now: Timestamp) {
        let mut state = self.lock();
        let this = (request.inputs.clone(), renew);
        state.last.entry(id.clone()).or_default().insert(token.to_owned(), this);
        if request.forced {
            state.note(id, token, now);
        }
    }

    /// Forgets an object.
    pub fn drop_object(&self, id: &ObjectRef) {
        let mut state = self.lock();
        state.last.remove(id);
        state.times.remove(id);
    }

    fn counts(&self, id: &ObjectRef, now: Timestamp) -> BTreeMap<String, usize> {
        let state = self.lock();
        let times = state.times.get(id).into_iter().flatten();
        let recent = times.filter(|(_, at)| *at + CONTEST_WINDOW > now);
        recent.fold(BTreeMap::new(), |mut counts, (token, _)| {
            *counts.entry(token.clone()).or_default() += 1;
            counts
        })
    }

    fn last_mints(&self, id: &ObjectRef) -> BTreeMap<String, (String, Timestamp)> {
        self.lock().last.get(id).cloned().unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, ForcedState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ForcedState {
    /// Notes one, and forgets all that are past.
    fn note(&mut self, id: &ObjectRef, token: &str, now: Timestamp) {
        self.times.retain(|_, times| {
            times.retain(|(_, at)| *at + CONTEST_WINDOW > now);
            !times.is_empty()
        });
        self.times.entry(id.clone()).or_default().push((token.to_owned(), now));
    }
}

/// As many Secrets that are no longer asked for are read as there may be tokens.
const MOST_LEFTOVERS: usize = 16;

/// Whether the instance of `id` is there and was not looked at yet.
pub fn awaits_a_look(ctx: &Context, id: &ObjectRef) -> bool {
    let user = ctx.cache.user(id);
    let instance = user.as_deref().map(|user| user.spec.instance_ref.name.as_str());
    instance.is_some_and(|name| ctx.cache.instance(name).is_some() && !ctx.connections.was_looked_at(name))
}

/// Reads what decides about `id`. None: the object or its namespace is gone or going, or it is not ours to serve.
pub async fn gather(ctx: &Context, id: &ObjectRef, held_back: HeldBack) -> Result<Option<Facts>, ReadError> {
    let user = ctx.cache.user(id).filter(|u| u.metadata.deletion_timestamp.is_none());
    // Where nothing can be created a mint would be lost.
    let user = user.filter(|_| !ctx.cache.is_ending(&id.namespace));
    let Some(user) = user else {
        ctx.unwritten.drop_object(id);
        ctx.forced.drop_object(id);
        return Ok(None);
    };
    let instance = ctx.cache.instance(&user.spec.instance_ref.name);
    if instance.is_none() && ctx.serves_some_instances_only {
        ctx.unwritten.drop_object(id);
        return Ok(None);
    }
    let api: Api<WholeSecret> = Api::namespaced(ctx.client.clone(), &id.namespace);
    let leftovers = ctx.cache.leftovers(&user);
    let named = user.spec.tokens.iter().map(|t| t.secret.name.as_str());
    let left = leftovers.iter().take(MOST_LEFTOVERS).map(|l| l.name.as_str());
    let read_tokens = read_all(&api, named.chain(left));
    let (key, secrets) = match try_join(read_key(&api, &user.spec.key_secret_ref), read_tokens).await {
        Ok((key, tokens)) => (key, tokens),
        // Told in the status: only somebody else can mend it.
        Err(ReadError::Forbidden) => (Err(Reason::SecretsForbidden), Vec::new()),
        Err(error) => return Err(error),
    };
    let skew = ctx.connections.skew(&user.spec.instance_ref.name);
    let held_back = held_back.into_iter().map(|(what, hold)| {
        let until = shifted(hold.until, skew);
        (what, Hold { until, ..hold })
    });
    let secrets = secrets
        .into_iter()
        .filter_map(|(name, secret)| Some((name, secret?.into_existing())));
    Ok(Some(Facts {
        allowed_metadata: ctx.allowed_metadata.clone(),
        in_operator_namespace: ctx.operator_namespace.as_deref() == Some(&*id.namespace),
        namespace_labels: ctx.cache.namespace_labels(&id.namespace),
        zitadel_project_id: instance.as_deref().and_then(|i| ctx.connections.known_project_id(i)),
        instance,
        skew,
        key,
        secrets: secrets.collect(),
        unwritten: ctx.unwritten.of(id, &user),
        leftovers,
        held_back: held_back.collect(),
        forced: ctx.forced.counts(id, Timestamp::now()),
        last_mints: ctx.forced.last_mints(id),
        user,
    }))
}

/// A read that failed; the text of kube's error may quote an object and is dropped.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub enum ReadError {
    /// The operator has no right to read Secrets in the namespace.
    #[error("Secrets may not be read in this namespace")]
    Forbidden,
    /// Any other failure, which will pass.
    #[error("a Secret could not be read")]
    Unavailable,
}

async fn read(api: &Api<WholeSecret>, name: &str) -> Result<Option<WholeSecret>, ReadError> {
    let read = tokio::time::timeout(DEADLINE, api.get_opt(name)).await;
    read.map_err(|_| ReadError::Unavailable)?.map_err(|error| match error {
        kube::Error::Api(status) if status.is_forbidden() => ReadError::Forbidden,
        _ => ReadError::Unavailable,
    })
}

async fn read_all<'a>(
    api: &Api<WholeSecret>,
    names: impl Iterator<Item = &'a str>,
) -> Result<Vec<(String, Option<WholeSecret>)>, ReadError> {
    try_join_all(names.map(|name| async { Ok((name.to_owned(), read(api, name).await?)) })).await
}

async fn read_key(api: &Api<WholeSecret>, reference: &KeySecretRef) -> Result<Result<ServiceKey, Reason>, ReadError> {
    let Some(secret) = read(api, &reference.name).await? else {
        return Ok(Err(Reason::KeySecretMissing));
    };
    Ok(key::from_secret(
        secret.labels(),
        secret.data(),
        reference.key.as_deref(),
    ))
}
