//! Which objects are reconciled when something changes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use futures::{Stream, StreamExt};
use kube::core::NamespaceResourceScope;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource, ResourceExt};
use tokio::sync::watch;

use crate::api::metadata::{ADMIN_LEDGER_PREFIX, ANNOTATION_ROTATE_REQUEST, KEY_LEDGER_PREFIX, ROLE_LEDGER_PREFIX};
use crate::api::{ZitadelAccessPolicy, ZitadelInstance};
use crate::controller::cache::{Applied, Cache, Kind, KnownNamespace, SecretSummary};
use crate::controller::guarded::Guarded;
use crate::controller::key_rotation::KeyMemory;
use crate::controller::queue::Queue;
use crate::controller::watch::{List, WatchError, endless};
use crate::controller::watched::{WatchedNamespace, WatchedSecret, WatchedUser};
use crate::domain::object_ref::ObjectRef;

/// The time between relists, which give objects that exceeded the memory limit of their namespace another chance.
const RELIST: Duration = Duration::from_mins(10);

/// The watches and what they trigger.
pub struct Triggers {
    cache: Arc<Cache>,
    users: Arc<Queue>,
    instances: Arc<Queue>,
    keys: Arc<KeyMemory>,
    /// The operator's own namespace.
    home: Option<String>,
    /// The last versions of the Secrets with admin credentials, by name.
    credentials: Mutex<BTreeMap<String, String>>,
    within: Vec<Option<String>>,
    /// The number of watches that are current: none of them has failed since its last list.
    current: watch::Sender<usize>,
}

impl Triggers {
    /// Creates watches that fill `cache` and wake the two queues. Service users and Secrets have one watch for each
    /// entry of `within`: a namespace, because a Role grants rights in one namespace only, or `None` for the whole
    /// cluster.
    #[must_use]
    pub fn new(
        cache: Arc<Cache>,
        users: Arc<Queue>,
        instances: Arc<Queue>,
        keys: Arc<KeyMemory>,
        home: Option<String>,
        within: Vec<Option<String>>,
    ) -> Self {
        Self {
            cache,
            users,
            instances,
            keys,
            home,
            credentials: Mutex::default(),
            within,
            current: watch::Sender::new(0),
        }
    }

    /// Completes when every watch has completed its first list. The operator decides nothing before that
    /// (docs/adr/0004-own-index-and-first-lists.md).
    pub fn first_lists(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut current = self.current.subscribe();
        let watches = self.watches();
        async move {
            // An error means that the sender was dropped. It lives as long as the watches.
            let _ = current.wait_for(|count| *count >= watches).await;
        }
    }

    /// Whether all watches are current: none has failed since its last list. A replica whose watches are not current
    /// must not become leader, because it would take the writes of the previous leader for changes by a third party.
    #[must_use]
    pub fn are_current(&self) -> bool {
        *self.current.borrow() >= self.watches()
    }

    /// Runs the watches, which are endless. `instance_selector` selects the instances that this operator serves.
    pub async fn run(&self, client: Client, instance_selector: &str) {
        // Kinds that grant rights are listed at the latest version. The operator reads other objects again before it
        // decides.
        let instances = watcher::Config::default().labels(instance_selector);
        let instances = endless(Api::all(client.clone()), instances, List::Pages, RELIST, || false);
        let namespaces = endless(
            Api::all(client.clone()),
            watcher::Config::default(),
            List::Pages,
            RELIST,
            || false,
        );
        let policies = watcher::Config::default();
        let policies = endless(Api::all(client.clone()), policies, List::Pages, RELIST, || false);
        tokio::join!(
            self.follow(None, Kind::Policies, policies, Self::policy_applied, Self::policy_gone),
            self.follow(
                None,
                Kind::Instances,
                instances,
                Self::instance_applied,
                Self::instance_gone
            ),
            self.follow(
                None,
                Kind::Namespaces,
                namespaces,
                Self::namespace_applied,
                Self::namespace_gone
            ),
            join_all(self.within.iter().map(Option::as_deref).map(|within| {
                let (cache, place) = (self.cache.clone(), within.map(str::to_owned));
                let relist = move || cache.take_over_limit(place.as_deref());
                let config = watcher::Config::default;
                let users = endless(api(&client, within), config(), List::Streaming, RELIST, relist);
                let secrets = endless(api(&client, within), config(), List::Streaming, RELIST, || false);
                async move {
                    tokio::join!(
                        self.follow(within, Kind::Users, users, Self::user_applied, Self::user_gone),
                        self.follow(within, Kind::Secrets, secrets, Self::secret_applied, Self::secret_gone),
                    )
                }
            })),
        );
    }

    /// Handles the events of one watch. After a relist, known objects that were not listed are gone. kube's own stores
    /// do not report them (docs/adr/0004-own-index-and-first-lists.md).
    ///
    /// A namespace of `within` that the operator may not list counts as listed: it was deleted together with its Role.
    /// Other namespaces must not wait for it. The cache forgets its objects, so the operator decides nothing about
    /// them.
    async fn follow<K>(
        &self,
        within: Option<&str>,
        kind: Kind,
        events: impl Stream<Item = Result<Event<K>, WatchError>>,
        applied: impl Fn(&Self, K),
        gone: impl Fn(&Self, &ObjectRef),
    ) where
        K: Resource<DynamicType = ()>,
    {
        let known = || {
            let mut known = self.cache.known(kind);
            known.retain(|id| within.is_none_or(|namespace| namespace == &*id.namespace));
            known
        };
        let mut events = std::pin::pin!(events);
        let mut unseen = std::collections::HashSet::new();
        let mut current = false;
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => unseen = known(),
                Ok(Event::InitApply(object)) => {
                    unseen.remove(&reference(&object));
                    applied(self, object);
                }
                Ok(Event::InitDone) => {
                    for id in std::mem::take(&mut unseen) {
                        gone(self, &id);
                    }
                    self.count(&mut current, true);
                }
                Ok(Event::Apply(object)) => applied(self, object),
                Ok(Event::Delete(object)) => gone(self, &reference(&object)),
                Err(error) => {
                    let deleted = error.forbidden && within.is_some();
                    if deleted {
                        for id in known() {
                            gone(self, &id);
                        }
                    }
                    self.count(&mut current, deleted);
                }
            }
        }
    }

    /// The number of watches: instances, policies and namespaces, and two for each entry of `within`.
    fn watches(&self) -> usize {
        3 + 2 * self.within.len()
    }

    /// Updates the number of current watches after one of them changed from `before` to `now`.
    fn count(&self, before: &mut bool, now: bool) {
        match (std::mem::replace(before, now), now) {
            (false, true) => self.current.send_modify(|count| *count += 1),
            (true, false) => self.current.send_modify(|count| *count -= 1),
            _ => {}
        }
    }

    pub(crate) fn user_applied(&self, user: WatchedUser) {
        let id = reference(&user);
        let version = user.summary.resource_version.clone();
        let names_none = user.summary.instance.is_empty();
        let before = self.cache.user(&id).and_then(|before| before.generation);
        if before != user.summary.generation {
            self.keys.unread(&id);
        }
        match self.cache.user_applied(&id, user.summary) {
            Applied::Known | Applied::Refused { report: false } => {}
            Applied::Changed => {
                if names_none {
                    tracing::warn!(object = %id, "a service user has no valid spec.instanceRef and is not served");
                }
                self.users.changed(&id, Some(&version));
            }
            Applied::Refused { report: true } => {
                tracing::warn!(object = %id, "not served: its namespace is at the memory limit (--namespace-memory)");
                self.users.changed(&id, Some(&version));
            }
        }
    }

    fn user_gone(&self, id: &ObjectRef) {
        self.cache.user_gone(id);
        // A last reconcile finds no object and clears what is remembered about it.
        self.users.gone(id);
    }

    pub(crate) fn instance_applied(&self, instance: Guarded<ZitadelInstance>) {
        let id = reference(&instance);
        let (version, generation) = (instance.resource_version(), instance.meta().generation);
        let instance = instance
            .0
            .map(|instance| Arc::new(trimmed(instance)))
            .map_err(|_| generation);
        let before = self.cache.instance_applied(&id, instance.clone());
        let same = |is_same: &dyn Fn(&ZitadelInstance, &ZitadelInstance) -> bool| match (&before, &instance) {
            (Some(Ok(before)), Ok(now)) => is_same(before, now),
            (Some(Err(before)), Err(now)) => before == now,
            _ => false,
        };
        if same(&|before, now| before.resource_version() == now.resource_version()) {
            return;
        }
        self.instances.changed(&id, version.as_deref());
        // A change of the status alone wakes no service user: status is output only
        // (docs/adr/0005-status-is-output-only.md).
        if !same(&|before, now| before.spec == now.spec) {
            self.users.wake_all(self.cache.users_of(&id.name));
        }
    }

    fn instance_gone(&self, id: &ObjectRef) {
        self.cache.instance_gone(id);
        self.instances.gone(id);
        self.users.wake_all(self.cache.users_of(&id.name));
    }

    pub(crate) fn policy_applied(&self, policy: Guarded<ZitadelAccessPolicy>) {
        let id = reference(&policy);
        let spec = policy.0.map(|policy| policy.spec);
        if spec.is_err() {
            tracing::warn!(object = %id, "an access policy does not match its CRD and allows nothing");
        }
        self.users.wake_all(self.cache.policy_applied(&id, spec.ok()));
    }

    fn policy_gone(&self, id: &ObjectRef) {
        self.users.wake_all(self.cache.policy_gone(id));
    }

    pub(crate) fn namespace_applied(&self, namespace: WatchedNamespace) {
        let id = reference(&namespace);
        let known = KnownNamespace {
            labels: namespace.labels.map(Arc::new),
            terminating: namespace.terminating,
        };
        if self.cache.namespace_applied(&id, &known) {
            for user in self.cache.users(|user, _| user.namespace == id.name) {
                self.users.changed(&user, None);
            }
        }
    }

    fn namespace_gone(&self, id: &ObjectRef) {
        self.cache.namespace_gone(id);
    }

    pub(crate) fn secret_applied(&self, secret: WatchedSecret) {
        let id = reference(&secret);
        let version = secret.resource_version().unwrap_or_default();
        let observed = SecretSummary {
            uid: secret.uid().unwrap_or_default(),
            resource_version: version.clone(),
            service_user: secret.service_user,
            controller: secret.controller,
            terminating: secret.terminating,
        };
        self.credential_may_have_changed(&id, &version);
        for user in self.cache.secret_applied(&id, observed) {
            self.key_may_have_changed(&user, &id);
            self.users.changed(&user, Some(&version));
        }
    }

    fn credential_may_have_changed(&self, secret: &ObjectRef, version: &str) {
        // A ledger is no credential, whatever an instance names.
        let is_ledger = [KEY_LEDGER_PREFIX, ADMIN_LEDGER_PREFIX, ROLE_LEDGER_PREFIX]
            .iter()
            .any(|prefix| secret.name.starts_with(prefix));
        if self.home.as_deref() != Some(&*secret.namespace) || is_ledger {
            return;
        }
        let instances = self.cache.instances_with_credential(&secret.name);
        if instances.is_empty() || !self.is_new_version(&secret.name, version) {
            return;
        }
        for instance in instances {
            self.instances.changed(&instance, None);
            self.users.wake_all(self.cache.users_of(&instance.name));
        }
    }

    /// Whether this version of a credential was not seen before. A relist shows it again.
    fn is_new_version(&self, secret: &str, version: &str) -> bool {
        let mut seen = self.credentials.lock().unwrap_or_else(PoisonError::into_inner);
        seen.insert(secret.to_owned(), version.to_owned()).as_deref() != Some(version)
    }

    fn key_may_have_changed(&self, user: &ObjectRef, secret: &ObjectRef) {
        let known = self.cache.user(user);
        if known.is_some_and(|known| *known.key_secret == *secret.name) {
            self.keys.unread(user);
        }
    }

    pub(crate) fn secret_gone(&self, id: &ObjectRef) {
        self.credential_may_have_changed(id, "");
        let of_admin = id.name.strip_prefix(ADMIN_LEDGER_PREFIX);
        if let Some(instance) = of_admin.filter(|_| self.home.as_deref() == Some(&*id.namespace)) {
            self.instances.changed(&ObjectRef::new("", instance), None);
        }
        for user in self.cache.secret_gone(id) {
            self.key_may_have_changed(&user, id);
            self.users.changed(&user, None);
        }
    }
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

/// Drops annotations that the operator does not read. They take most of an object's memory.
fn trimmed(mut instance: ZitadelInstance) -> ZitadelInstance {
    if let Some(annotations) = &mut instance.metadata.annotations {
        annotations.retain(|key, _| key == ANNOTATION_ROTATE_REQUEST);
    }
    instance
}

/// Namespace and name of an object.
pub fn reference<K: Resource<DynamicType = ()>>(object: &K) -> ObjectRef {
    let meta = object.meta();
    ObjectRef::new(
        meta.namespace.as_deref().unwrap_or_default(),
        meta.name.as_deref().unwrap_or_default(),
    )
}
