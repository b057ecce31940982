//! Watches: what exists, and who is woken when something changes. Of foreign Secrets nothing is kept; of ours, and of
//! those that a service user names, the version and the owner (decision K6).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt::Debug;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use futures::future::join_all;
use futures::{Stream, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Namespace;
use kube::core::{NamespaceResourceScope, PartialObjectMeta};
use kube::runtime::watcher::{self, DefaultBackoff, Event, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::api::metadata::is_ours;
use crate::api::{ZitadelInstance, ZitadelServiceUser};
use crate::controller::guarded::Guarded;
use crate::controller::queue::Queue;
use crate::controller::secrets::SecretMeta;
use crate::domain::facts::ObjectRef;
use crate::domain::secret::SecretRef;

/// Between two tries of a watch; kube's own limit.
const LONGEST_DELAY: Duration = Duration::from_secs(30);

/// What exists, as the watches last said.
#[derive(Default)]
pub struct Cache {
    known: RwLock<Known>,
}

#[derive(Default)]
struct Known {
    users: HashMap<ObjectRef, Arc<ZitadelServiceUser>>,
    instances: HashMap<ObjectRef, Arc<ZitadelInstance>>,
    namespaces: HashMap<ObjectRef, KnownNamespace>,
    /// In order, so that those of one namespace are found without the others.
    secrets: BTreeMap<ObjectRef, Tracked>,
}

#[derive(Clone, PartialEq)]
struct KnownNamespace {
    labels: Arc<BTreeMap<String, String>>,
    /// It is being deleted: nothing can be created in it any more.
    ending: bool,
}

/// A Secret that somebody of ours cares for.
#[derive(Debug, Default)]
struct Tracked {
    /// Service users that name it, as key or token Secret.
    named_by: BTreeSet<ObjectRef>,
    /// It exists, and this is what it is.
    seen: Option<SeenSecret>,
}

#[derive(Debug)]
struct SeenSecret {
    uid: String,
    resource_version: String,
    /// Name of the service user in our label.
    service_user: Option<String>,
    /// UID of the object that controls it.
    controller: Option<String>,
}

impl Cache {
    /// A service user.
    #[must_use]
    pub fn user(&self, id: &ObjectRef) -> Option<Arc<ZitadelServiceUser>> {
        self.read().users.get(id).cloned()
    }

    /// An instance.
    #[must_use]
    pub fn instance(&self, name: &str) -> Option<Arc<ZitadelInstance>> {
        self.read().instances.get(&ObjectRef::new("", name)).cloned()
    }

    /// The labels of a namespace.
    #[must_use]
    pub fn namespace_labels(&self, name: &str) -> Option<Arc<BTreeMap<String, String>>> {
        let known = self.read();
        let namespace = known.namespaces.get(&ObjectRef::new("", name))?;
        Some(namespace.labels.clone())
    }

    /// Whether a namespace is being deleted.
    #[must_use]
    pub fn is_ending(&self, namespace: &str) -> bool {
        let known = self.read();
        let namespace = known.namespaces.get(&ObjectRef::new("", namespace));
        namespace.is_some_and(|n| n.ending)
    }

    /// A write found that a service user is gone, and the watch has not told it, maybe because it is broken: its Secrets
    /// must not be made again. If it is there after all, the watch's next list has it.
    pub fn forget_user(&self, user: &ZitadelServiceUser) {
        let id = reference(user);
        self.change(|known| {
            if known.users.get(&id).is_some_and(|u| u.uid() == user.uid()) {
                known.remove_user(&id);
            }
        });
    }

    /// Secrets that `user` controls and no longer names.
    #[must_use]
    pub fn leftovers(&self, user: &ZitadelServiceUser) -> Vec<SecretRef> {
        let id = reference(user);
        let names: HashSet<&str> = user.spec.tokens.iter().map(|t| t.secret.name.as_str()).collect();
        let uid = user.uid();
        let known = self.read();
        // Ours by label and by owner: the label alone could be anybody's.
        let ours = known
            .secrets
            .range(ObjectRef::new(&id.namespace, "")..)
            .take_while(|(secret, _)| secret.namespace == id.namespace);
        ours.filter_map(|(secret, tracked)| {
            let seen = tracked.seen.as_ref()?;
            let mine = seen.service_user.as_deref() == Some(&*id.name) && seen.controller == uid;
            (mine && !names.contains(&*secret.name)).then(|| SecretRef {
                name: secret.name.to_string(),
                uid: seen.uid.clone(),
                resource_version: seen.resource_version.clone(),
            })
        })
        .collect()
    }

    /// The service users that are as `wanted`.
    #[must_use]
    pub fn users(&self, wanted: impl Fn(&ZitadelServiceUser) -> bool) -> Vec<ObjectRef> {
        let known = self.read();
        let found = known.users.iter().filter(|(_, user)| wanted(user));
        found.map(|(id, _)| id.clone()).collect()
    }

    /// All instances.
    #[must_use]
    pub fn instances(&self) -> Vec<ObjectRef> {
        self.read().instances.keys().cloned().collect()
    }

    /// All service users, as they are.
    #[must_use]
    pub fn all_users(&self) -> Vec<Arc<ZitadelServiceUser>> {
        self.read().users.values().cloned().collect()
    }

    /// All instances, as they are.
    #[must_use]
    pub fn all_instances(&self) -> Vec<Arc<ZitadelInstance>> {
        self.read().instances.values().cloned().collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Known) -> T) -> T {
        change(&mut self.known.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The watches at work.
pub struct Triggers {
    cache: Arc<Cache>,
    users: Arc<Queue>,
    instances: Arc<Queue>,
    within: Vec<Option<String>>,
    /// How many watches know what exists.
    current: watch::Sender<usize>,
}

impl Triggers {
    /// Watches that fill `cache` and wake the two queues. Service users and Secrets are watched `within` these
    /// namespaces, one by one, since a Role gives rights in one; None is everywhere.
    #[must_use]
    pub fn new(cache: Arc<Cache>, users: Arc<Queue>, instances: Arc<Queue>, within: Vec<Option<String>>) -> Self {
        Self {
            cache,
            users,
            instances,
            within,
            current: watch::Sender::new(0),
        }
    }

    /// Completes when every watch has had its first list: nothing is decided before (decision K14).
    pub fn first_lists(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut current = self.current.subscribe();
        let watches = self.watches();
        async move {
            // The sender lives as long as the watches.
            let _ = current.wait_for(|count| *count >= watches).await;
        }
    }

    /// Whether all watches know what exists: none has failed since its last list. Who does not know is not to take over,
    /// since what another did meanwhile would look as if somebody else had done it.
    #[must_use]
    pub fn are_current(&self) -> bool {
        *self.current.borrow() >= self.watches()
    }

    /// Runs the watches; never ends while they live. `instance_selector` limits the instances that are served.
    pub async fn run(&self, client: Client, instance_selector: &str) {
        let everything = watcher::Config::default;
        let instances = everything().labels(instance_selector);
        tokio::join!(
            self.follow(
                None,
                guarded(Api::all(client.clone()), instances),
                Self::instance_applied,
                Self::instance_gone,
                |k| k.instances.keys().cloned().collect()
            ),
            self.follow(
                None,
                guarded::<PartialObjectMeta<Namespace>>(Api::all(client.clone()), everything()),
                Self::namespace_applied,
                Self::namespace_gone,
                |k| k.namespaces.keys().cloned().collect()
            ),
            join_all(self.within.iter().map(Option::as_deref).map(|within| {
                let (client, seen) = (&client, move |id: &&ObjectRef| {
                    within.is_none_or(|n| n == &*id.namespace)
                });
                async move {
                    tokio::join!(
                        self.follow(
                            within,
                            guarded(api(client, within), everything()),
                            Self::user_applied,
                            Self::user_gone,
                            |k| k.users.keys().filter(seen).cloned().collect()
                        ),
                        self.follow(
                            within,
                            secrets(api(client, within)),
                            |triggers, secret| triggers.secret_applied(&secret),
                            Self::secret_gone,
                            |k| k.secrets.keys().filter(seen).cloned().collect()
                        ),
                    )
                }
            })),
        );
    }

    /// Follows one watch. After a relist, what is known and was not listed is gone: kube's own stores would not tell
    /// (decision K6).
    ///
    /// A named namespace that may not be listed counts as listed: it was deleted, and its Role with it. The others must
    /// not wait for it, and nothing of it is known, so that nothing is decided about it.
    async fn follow<K>(
        &self,
        within: Option<&str>,
        events: impl Stream<Item = Result<Event<Readable<K>>, Lost>>,
        applied: impl Fn(&Self, K),
        gone: impl Fn(&Self, &ObjectRef),
        known: impl Fn(&Known) -> HashSet<ObjectRef>,
    ) where
        K: Resource<DynamicType = ()>,
    {
        let mut events = std::pin::pin!(events);
        let mut unseen = HashSet::new();
        let mut current = false;
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => unseen = known(&self.cache.read()),
                Ok(Event::InitApply(Ok(object))) => {
                    unseen.remove(&reference(&object));
                    applied(self, object);
                }
                // It is there, if not as it should be: what is known of it stays.
                Ok(Event::InitApply(Err(id))) => drop(unseen.remove(&id)),
                Ok(Event::InitDone) => {
                    for id in std::mem::take(&mut unseen) {
                        gone(self, &id);
                    }
                    self.count(&mut current, true);
                }
                Ok(Event::Apply(Ok(object))) => applied(self, object),
                Ok(Event::Apply(Err(_))) => {}
                Ok(Event::Delete(Ok(object))) => gone(self, &reference(&object)),
                Ok(Event::Delete(Err(id))) => gone(self, &id),
                Err(lost) => {
                    let deleted = lost.forbidden && within.is_some();
                    if deleted {
                        for id in known(&self.cache.read()) {
                            gone(self, &id);
                        }
                    }
                    self.count(&mut current, deleted);
                }
            }
        }
    }

    /// Those of instances and namespaces, and two for each place.
    fn watches(&self) -> usize {
        2 + 2 * self.within.len()
    }

    /// Counts a watch among those that know what exists, or no more.
    fn count(&self, before: &mut bool, now: bool) {
        match (std::mem::replace(before, now), now) {
            (false, true) => self.current.send_modify(|count| *count += 1),
            (true, false) => self.current.send_modify(|count| *count -= 1),
            _ => {}
        }
    }

    fn user_applied(&self, user: ZitadelServiceUser) {
        let id = reference(&user);
        let version = user.resource_version();
        let user = Arc::new(user);
        let news = self.cache.change(|known| {
            let before = known.users.insert(id.clone(), user.clone());
            if before.as_ref().is_some_and(|b| b.resource_version() == version) {
                return false;
            }
            let (old, new) = (
                before.map(|b| named_secrets(&b)).unwrap_or_default(),
                named_secrets(&user),
            );
            known.unname(&id, old.difference(&new));
            for secret in new.difference(&old) {
                known
                    .secrets
                    .entry(secret.clone())
                    .or_default()
                    .named_by
                    .insert(id.clone());
            }
            true
        });
        if news {
            self.users.wake(&id, version.as_deref());
        }
    }

    fn user_gone(&self, id: &ObjectRef) {
        self.cache.change(|known| known.remove_user(id));
        // Its pass finds nothing and clears what is remembered of it.
        self.users.gone(id);
    }

    fn instance_applied(&self, instance: ZitadelInstance) {
        let id = reference(&instance);
        let version = instance.resource_version();
        let spec = instance.spec.clone();
        let before = self
            .cache
            .change(|known| known.instances.insert(id.clone(), Arc::new(instance)));
        if before.as_ref().is_some_and(|b| b.resource_version() == version) {
            return;
        }
        self.instances.wake(&id, version.as_deref());
        // The status of an instance is output: it decides nothing (decision K14).
        if before.is_none_or(|b| b.spec != spec) {
            self.wake_users(|user| user.is_of(&id.name));
        }
    }

    fn instance_gone(&self, id: &ObjectRef) {
        self.cache.change(|known| known.instances.remove(id));
        self.instances.gone(id);
        self.wake_users(|user| user.is_of(&id.name));
    }

    fn namespace_applied(&self, namespace: PartialObjectMeta<Namespace>) {
        let id = reference(&namespace);
        let now = KnownNamespace {
            labels: Arc::new(namespace.metadata.labels.unwrap_or_default()),
            ending: namespace.metadata.deletion_timestamp.is_some(),
        };
        let before = self
            .cache
            .change(|known| known.namespaces.insert(id.clone(), now.clone()));
        if before.is_none_or(|b| b != now) {
            self.wake_users(|user| user.metadata.namespace.as_deref() == Some(&*id.name));
        }
    }

    fn namespace_gone(&self, id: &ObjectRef) {
        self.cache.change(|known| known.namespaces.remove(id));
    }

    fn secret_applied(&self, secret: &SecretMeta) {
        let id = reference(secret);
        let version = secret.resource_version().unwrap_or_default();
        let owner = secret.service_user().map(|name| ObjectRef::new(&id.namespace, name));
        let wake = self.cache.change(|known| {
            if owner.is_none() && !known.secrets.contains_key(&id) {
                return BTreeSet::new();
            }
            let tracked = known.secrets.entry(id.clone()).or_default();
            if tracked.seen.as_ref().is_some_and(|s| s.resource_version == version) {
                return BTreeSet::new();
            }
            let mut wake = tracked.named_by.clone();
            tracked.seen = Some(SeenSecret {
                uid: secret.uid().unwrap_or_default(),
                resource_version: version.clone(),
                service_user: secret.service_user().map(str::to_owned),
                controller: secret.controller_uid().map(str::to_owned),
            });
            wake.extend(owner.filter(|o| known.users.contains_key(o)));
            wake
        });
        for user in wake {
            self.users.wake(&user, Some(&version));
        }
    }

    fn secret_gone(&self, id: &ObjectRef) {
        let wake = self.cache.change(|known| {
            let Some(tracked) = known.secrets.get_mut(id) else {
                return BTreeSet::new();
            };
            tracked.seen = None;
            let wake = tracked.named_by.clone();
            if wake.is_empty() {
                known.secrets.remove(id);
            }
            wake
        });
        for user in wake {
            self.users.wake(&user, None);
        }
    }

    fn wake_users(&self, concerned: impl Fn(&ZitadelServiceUser) -> bool) {
        self.users.wake_all(self.cache.users(concerned));
    }
}

impl Known {
    fn remove_user(&mut self, id: &ObjectRef) {
        if let Some(user) = self.users.remove(id) {
            self.unname(id, named_secrets(&user).iter());
        }
    }

    /// `user` names these Secrets no more.
    fn unname<'a>(&mut self, user: &ObjectRef, secrets: impl Iterator<Item = &'a ObjectRef>) {
        for secret in secrets {
            if let Some(tracked) = self.secrets.get_mut(secret) {
                tracked.named_by.remove(user);
                let ours = tracked.seen.as_ref().is_some_and(|s| s.service_user.is_some());
                if tracked.named_by.is_empty() && !ours {
                    self.secrets.remove(secret);
                }
            }
        }
    }
}

/// The Secrets that a service user names.
fn named_secrets(user: &ZitadelServiceUser) -> BTreeSet<ObjectRef> {
    let namespace = user.metadata.namespace.as_deref().unwrap_or_default();
    let tokens = user.spec.tokens.iter().map(|t| t.secret.name.as_str());
    tokens
        .chain([user.spec.key_secret_ref.name.as_str()])
        .map(|name| ObjectRef::new(namespace, name))
        .collect()
}

fn reference<K: Resource<DynamicType = ()>>(object: &K) -> ObjectRef {
    let meta = object.meta();
    ObjectRef::new(
        meta.namespace.as_deref().unwrap_or_default(),
        meta.name.as_deref().unwrap_or_default(),
    )
}

/// An object, or the name of one that does not fit its type.
type Readable<K> = Result<K, ObjectRef>;

/// A watch broke off. What happens until its next list is not seen.
struct Lost {
    /// It may not list.
    forbidden: bool,
}

fn api<K>(client: &Client, within: Option<&str>) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    match within {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// Secrets have a type of their own, which always decodes.
fn secrets(api: Api<SecretMeta>) -> impl Stream<Item = Result<Event<Readable<SecretMeta>>, Lost>> {
    let events = endless(move || watcher(api.clone(), watcher::Config::default()));
    events.map(|event| event.map(|event| each(event, Ok)))
}

/// A watch of objects that people write: one that does not decode is logged and passed over, so that it never stops
/// the others.
fn guarded<K>(api: Api<Guarded<K>>, config: watcher::Config) -> impl Stream<Item = Result<Event<Readable<K>>, Lost>>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let events = endless(move || watcher(api.clone(), config.clone()));
    events.map(|event| event.map(|event| each(event, decoded)))
}

fn decoded<K: Resource<DynamicType = ()>>(guarded: Guarded<K>) -> Readable<K> {
    let id = reference(&guarded);
    guarded.0.map(trimmed).map_err(|_| {
        tracing::warn!(kind = %K::kind(&()), object = %id, "an object that does not fit its schema is passed over");
        id
    })
}

/// Without what nobody here reads: other tools' annotations (`kubectl apply` keeps a copy of the whole object in one) are
/// most of an object's memory, beside the managed fields that [`Guarded`] leaves out. A status is written without
/// touching them.
fn trimmed<K: Resource>(mut object: K) -> K {
    if let Some(annotations) = &mut object.meta_mut().annotations {
        annotations.retain(|key, _| is_ours(key));
    }
    object
}

fn each<A, B>(event: Event<A>, map: impl FnOnce(A) -> B) -> Event<B> {
    match event {
        Event::Apply(object) => Event::Apply(map(object)),
        Event::InitApply(object) => Event::InitApply(map(object)),
        Event::Delete(object) => Event::Delete(map(object)),
        Event::Init => Event::Init,
        Event::InitDone => Event::InitDone,
    }
}

/// A watch that goes on for ever. Its errors are logged by kind; after one it begins with a list again, after a growing
/// delay: kube's goes on from where it was and does not tell when it has caught up. The one that failed is not asked
/// again, since it would wait for an event.
fn endless<K, S>(watch: impl Fn() -> S) -> impl Stream<Item = Result<Event<K>, Lost>>
where
    K: Resource<DynamicType = ()>,
    S: Stream<Item = Result<Event<K>, watcher::Error>>,
{
    // A delay of our own: kube's counts the first event of a new watch as a success, and would never grow.
    let first: (Option<Pin<Box<S>>>, _, _) = (None, DefaultBackoff::default(), Duration::ZERO);
    futures::stream::unfold(first, move |(running, mut backoff, delay)| {
        let running = running.unwrap_or_else(|| Box::pin(watch()));
        async move {
            tokio::time::sleep(delay).await;
            let mut events = running;
            let event = events.next().await?;
            let then = if event.is_ok() {
                (Some(events), backoff, Duration::ZERO)
            } else {
                let delay = backoff.next().unwrap_or(LONGEST_DELAY);
                (None, backoff, delay)
            };
            Some((event, then))
        }
    })
    .inspect_err(|error| tracing::warn!(kind = %K::kind(&()), error = kind(error), "a watch failed and is tried again"))
    .map(|event| {
        event.map_err(|error| Lost {
            forbidden: is_forbidden(&error),
        })
    })
}

fn is_forbidden(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.is_forbidden())
}

/// What failed, without the server's words.
fn kind(error: &watcher::Error) -> &'static str {
    let code = match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => status.code,
        _ => 0,
    };
    match error {
        _ if code == 404 => "the API server does not know this kind: is its CustomResourceDefinition installed?",
        _ if matches!(code, 401 | 403) => "the operator may not list and watch this kind: does its role allow it?",
        _ if code == 410 => "the history is gone: 410",
        watcher::Error::InitialListFailed(_) => "list failed",
        watcher::Error::WatchStartFailed(_) => "watch could not start",
        watcher::Error::WatchError(_) => "the server ended the watch",
        watcher::Error::WatchFailed(_) => "the watch broke off",
        watcher::Error::NoResourceVersion => "the list had no version",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// kube's own back-off counts the first event of each new watch as a success, and would stay at its first step.
    #[tokio::test(start_paused = true)]
    async fn a_watch_that_fails_each_time_is_tried_ever_more_seldom() {
        let begun = tokio::time::Instant::now();
        let fails = || {
            let error = watcher::Error::NoResourceVersion;
            futures::stream::iter([Ok(Event::<ZitadelInstance>::Init), Err(error)])
        };
        let mut tries = std::pin::pin!(endless(fails).filter(|event| std::future::ready(event.is_err())));
        let mut times = Vec::new();
        for _ in 0..8 {
            assert!(tries.next().await.is_some_and(|tried| tried.is_err()));
            times.push(begun.elapsed().as_secs());
        }
        assert!(times[0] == 0 && times[7] > 60 && times[7] < 300, "{times:?}");
    }

    #[test]
    fn of_what_is_watched_only_our_annotations_are_kept() {
        let mut metadata = serde_json::json!({"name": "billing", "managedFields": [{"manager": "kubectl"}]});
        metadata["annotations"] = serde_json::json!({
            "kubectl.kubernetes.io/last-applied-configuration": "{}", "zitadel-tokens.dev/renew-request": "now"});
        let spec = serde_json::json!({"issuer": "https://auth.example.com", "access": []});
        let object = serde_json::json!({
            "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelInstance", "metadata": metadata, "spec": spec});
        let guard: Guarded<ZitadelInstance> = serde_json::from_value(object).expect("decodes");
        let meta = decoded(guard).expect("an instance").metadata;
        assert_eq!(meta.managed_fields, None);
        let kept: Vec<_> = meta.annotations.unwrap_or_default().into_keys().collect();
        assert_eq!(kept, ["zitadel-tokens.dev/renew-request"]);
    }
}
