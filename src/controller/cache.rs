//! What exists, as the watches last said: of each object only what decides who is woken, in which order, and what metrics
//! show. What one namespace may take of it is limited, so that no tenant can use up the operator's memory.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use crate::api::ZitadelInstance;
use crate::api::access_policy::ZitadelAccessPolicySpec;
use crate::domain::access::{AllowedAudiences, selects};
use crate::domain::object_ref::ObjectRef;
use crate::domain::observed_secret::SecretRef;
use crate::domain::reason::Reason;
use crate::domain::summary::UserSummary;

/// Bytes charged for a Secret that a service user names, or that has our label.
const CHARGE_SECRET: usize = 1024;

/// Objects of one namespace that are told between two relists that they found no room: those that wait for it take memory
/// too.
const MAX_REFUSALS: usize = 256;

/// What exists.
pub struct Cache {
    known: RwLock<Known>,
    /// Bytes that the objects of one namespace may be charged with.
    limit: usize,
}

#[derive(Default)]
struct Known {
    users: HashMap<ObjectRef, Arc<UserSummary>>,
    instances: HashMap<ObjectRef, Readable>,
    policies: HashMap<ObjectRef, Arc<ZitadelAccessPolicySpec>>,
    namespaces: HashMap<ObjectRef, KnownNamespace>,
    /// In order, so that those of one namespace are found without the others.
    secrets: BTreeMap<ObjectRef, Tracked>,
    charges: HashMap<Arc<str>, Charge>,
}

/// What a namespace takes.
#[derive(Default)]
struct Charge {
    bytes: usize,
    /// Objects that found no room since the last relist and are to be told so.
    refusals: usize,
    /// Whether an object found no room since the last relist.
    is_over: bool,
    /// Whether one found no room before it.
    was_over: bool,
}

impl Charge {
    fn is_of_use(&self) -> bool {
        self.bytes > 0 || self.is_over || self.was_over
    }
}

/// An instance, or the generation of one that cannot be read.
pub type Readable = Result<Arc<ZitadelInstance>, Option<i64>>;

/// What is known of a namespace.
#[derive(Clone, Debug, PartialEq)]
pub struct KnownNamespace {
    /// Its labels; none if they are too large to be kept.
    pub labels: Option<Arc<BTreeMap<String, String>>>,
    /// It is being deleted: nothing can be created in it any more.
    pub terminating: bool,
}

/// A Secret that concerns a service user.
#[derive(Debug, Default)]
struct Tracked {
    /// Service users that name it, as key or token Secret.
    named_by: BTreeSet<ObjectRef>,
    /// None if it does not exist.
    observed: Option<SecretSummary>,
}

/// A Secret as the watch last saw it.
#[derive(Debug)]
pub struct SecretSummary {
    /// Its UID.
    pub uid: String,
    /// Its version.
    pub resource_version: String,
    /// Name of the service user in our label.
    pub service_user: Option<String>,
    /// UID of the object that controls it.
    pub controller: Option<String>,
    /// Whether it is being deleted.
    pub terminating: bool,
}

/// What a change of a service user means.
#[derive(Debug, PartialEq, Eq)]
pub enum Applied {
    /// This version was known.
    Known,
    /// It is new or another one.
    Changed,
    /// There is no room for it.
    Refused {
        /// It waits for being told so.
        tell: bool,
    },
}

impl Cache {
    /// An empty cache, in which the objects of one namespace may be charged with so many bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            known: RwLock::default(),
            limit,
        }
    }

    /// A service user.
    #[must_use]
    pub fn user(&self, id: &ObjectRef) -> Option<Arc<UserSummary>> {
        self.read().users.get(id).cloned()
    }

    /// An instance. None if there is none of that name, and an error if there is one that cannot be read: it must not
    /// keep the rights that it gave before.
    pub fn instance(&self, name: &str) -> Result<Arc<ZitadelInstance>, Reason> {
        match self.read().instances.get(&ObjectRef::new("", name)) {
            Some(Ok(instance)) => Ok(instance.clone()),
            Some(Err(_)) => Err(Reason::InstanceInvalid),
            None => Err(Reason::InstanceMissing),
        }
    }

    /// The generation of an instance that cannot be read.
    #[must_use]
    pub fn unreadable_generation(&self, id: &ObjectRef) -> Option<i64> {
        self.read().instances.get(id)?.as_ref().err().copied()?
    }

    /// The audiences that the policies of `instance` allow to `namespace`. An error if the labels of the namespace are
    /// not known.
    pub fn allowed_audiences(&self, instance: &str, namespace: &str) -> Result<AllowedAudiences, Reason> {
        let known = self.read();
        let namespace = known.namespaces.get(&ObjectRef::new("", namespace));
        let labels = namespace.ok_or(Reason::NamespaceMissing)?.labels.as_deref();
        let labels = labels.ok_or(Reason::NamespaceLabelsTooLarge)?;
        let policies = known.policies.values().map(Arc::as_ref);
        let policies = policies.filter(|policy| policy.instance_ref.name == instance);
        Ok(AllowedAudiences::of(policies, labels))
    }

    /// Whether a namespace is being deleted.
    #[must_use]
    pub fn is_terminating(&self, namespace: &str) -> bool {
        let known = self.read();
        let namespace = known.namespaces.get(&ObjectRef::new("", namespace));
        namespace.is_some_and(|namespace| namespace.terminating)
    }

    /// Secrets that `user` controls and its spec no longer names.
    #[must_use]
    pub fn leftovers(&self, id: &ObjectRef, uid: &str, names: &HashSet<&str>) -> Vec<SecretRef> {
        self.of_user(id, uid, |name, observed| {
            (!names.contains(name) && !observed.terminating).then(|| SecretRef {
                name: name.to_owned(),
                uid: observed.uid.clone(),
                resource_version: observed.resource_version.clone(),
            })
        })
    }

    /// Names of the Secrets that exist, carry our label and are controlled by this object.
    #[must_use]
    pub fn written_for(&self, id: &ObjectRef, uid: &str) -> HashSet<String> {
        let names = self.of_user(id, uid, |name, _| Some(name.to_owned()));
        names.into_iter().collect()
    }

    fn of_user<T>(&self, id: &ObjectRef, uid: &str, each: impl Fn(&str, &SecretSummary) -> Option<T>) -> Vec<T> {
        let known = self.read();
        let secrets = known.secrets.range(ObjectRef::new(&id.namespace, "")..);
        let secrets = secrets.take_while(|(secret, _)| secret.namespace == id.namespace);
        secrets
            .filter_map(|(secret, tracked)| {
                let observed = tracked.observed.as_ref()?;
                // Ours by label and by owner: anybody can set the label.
                let ours =
                    observed.service_user.as_deref() == Some(&*id.name) && observed.controller.as_deref() == Some(uid);
                if ours { each(&secret.name, observed) } else { None }
            })
            .collect()
    }

    /// The service users that are as `wanted`.
    #[must_use]
    pub fn users(&self, wanted: impl Fn(&ObjectRef, &UserSummary) -> bool) -> Vec<ObjectRef> {
        let known = self.read();
        let found = known.users.iter().filter(|(id, user)| wanted(id, user));
        found.map(|(id, _)| id.clone()).collect()
    }

    /// The service users of an instance.
    #[must_use]
    pub fn users_of(&self, instance: &str) -> Vec<ObjectRef> {
        self.users(|_, user| user.is_of(instance))
    }

    /// All instances.
    #[must_use]
    pub fn instances(&self) -> Vec<ObjectRef> {
        self.read().instances.keys().cloned().collect()
    }

    /// All service users with what is known of them.
    #[must_use]
    pub fn all_users(&self) -> Vec<(ObjectRef, Arc<UserSummary>)> {
        let known = self.read();
        known
            .users
            .iter()
            .map(|(id, user)| (id.clone(), user.clone()))
            .collect()
    }

    /// All instances that can be read.
    #[must_use]
    pub fn all_instances(&self) -> Vec<Arc<ZitadelInstance>> {
        self.read().instances.values().flatten().cloned().collect()
    }

    /// Whether an object found no room since this was asked last, in this namespace or in any.
    #[must_use]
    pub fn take_over_limit(&self, within: Option<&str>) -> bool {
        self.change(|known| {
            let mut any = false;
            for (namespace, charge) in &mut known.charges {
                if within.is_none_or(|within| within == &**namespace) {
                    charge.refusals = 0;
                    charge.was_over = std::mem::take(&mut charge.is_over);
                    any |= charge.was_over;
                }
            }
            known.charges.retain(|_, charge| charge.is_of_use());
            any
        })
    }

    /// The namespaces in which an object finds no room, as far as it was tried lately.
    #[must_use]
    pub fn over_limit(&self) -> Vec<Arc<str>> {
        let known = self.read();
        let over = known
            .charges
            .iter()
            .filter(|(_, charge)| charge.is_over || charge.was_over);
        over.map(|(namespace, _)| namespace.clone()).collect()
    }

    /// Whether an object of this namespace finds no room.
    #[must_use]
    pub fn is_over_limit(&self, namespace: &str) -> bool {
        let known = self.read();
        known
            .charges
            .get(namespace)
            .is_some_and(|charge| charge.is_over || charge.was_over)
    }

    /// A service user is there.
    pub fn user_applied(&self, id: &ObjectRef, user: UserSummary) -> Applied {
        self.change(|known| {
            let before = known.users.get(id);
            if before.is_some_and(|before| before.resource_version == user.resource_version && before.uid == user.uid) {
                return Applied::Known;
            }
            let before = known.remove_user(id);
            let secrets = named_secrets(id, &user);
            let taken = known.charges.get(&id.namespace).map_or(0, |charge| charge.bytes);
            // Those that it named before are charged already.
            let new = secrets.iter().filter(|secret| !known.secrets.contains_key(secret));
            if taken + user.charge() + new.count() * CHARGE_SECRET > self.limit {
                if let Some(before) = before {
                    known.drop_unused_secrets(id, &before);
                }
                let charge = known.charge(&id.namespace, 0);
                charge.is_over = true;
                let told = user.ready == Some((false, Some(Reason::NamespaceLimit)))
                    && user.observed_generation == user.generation;
                charge.refusals += usize::from(!told);
                let tell = !told && charge.refusals <= MAX_REFUSALS;
                return Applied::Refused { tell };
            }
            known.charge(&id.namespace, user.charge());
            for secret in secrets {
                known.track(&secret).named_by.insert(id.clone());
            }
            if let Some(before) = before {
                known.drop_unused_secrets(id, &before);
            }
            known.users.insert(id.clone(), Arc::new(user));
            Applied::Changed
        })
    }

    /// A service user is gone.
    pub fn user_gone(&self, id: &ObjectRef) {
        self.change(|known| known.forget_user(id));
    }

    /// A read found that this very object is gone, and the watch has not told so yet. If it is there after all, the
    /// watch's next list has it.
    pub fn forget_user(&self, id: &ObjectRef, uid: &str) {
        self.change(|known| {
            if known.users.get(id).is_some_and(|user| &*user.uid == uid) {
                known.forget_user(id);
            }
        });
    }

    /// An instance is there. Returns what was known of it before.
    pub fn instance_applied(&self, id: &ObjectRef, instance: Readable) -> Option<Readable> {
        self.change(|known| known.instances.insert(id.clone(), instance))
    }

    /// An instance is gone.
    pub fn instance_gone(&self, id: &ObjectRef) {
        self.change(|known| known.instances.remove(id));
    }

    /// A policy is there, or one that cannot be decoded, which allows nothing. Returns the service users for which that
    /// may change what is allowed: those that the policy selected before or selects now.
    #[must_use]
    pub fn policy_applied(&self, id: &ObjectRef, policy: Option<ZitadelAccessPolicySpec>) -> Vec<ObjectRef> {
        self.change(|known| {
            let policy = policy.map(Arc::new);
            let before = match policy.clone() {
                Some(policy) => known.policies.insert(id.clone(), policy),
                None => known.policies.remove(id),
            };
            if before == policy {
                return Vec::new();
            }
            let policies: Vec<_> = before.into_iter().chain(policy).collect();
            let concerned = known.users.iter().filter(|(user, summary)| {
                let namespace = known.namespaces.get(&ObjectRef::new("", &user.namespace));
                let labels = namespace.and_then(|namespace| namespace.labels.as_deref());
                policies.iter().any(|policy| {
                    summary.is_of(&policy.instance_ref.name)
                        && labels.is_some_and(|labels| selects(&policy.namespace_selector, labels))
                })
            });
            concerned.map(|(user, _)| user.clone()).collect()
        })
    }

    /// A policy is gone. Returns the service users that it selected.
    #[must_use]
    pub fn policy_gone(&self, id: &ObjectRef) -> Vec<ObjectRef> {
        self.policy_applied(id, None)
    }

    /// A namespace is there. Returns whether that is news.
    pub fn namespace_applied(&self, id: &ObjectRef, namespace: &KnownNamespace) -> bool {
        self.change(|known| known.namespaces.insert(id.clone(), namespace.clone()).as_ref() != Some(namespace))
    }

    /// A namespace is gone.
    pub fn namespace_gone(&self, id: &ObjectRef) {
        self.change(|known| known.namespaces.remove(id));
    }

    /// A Secret is there. Returns the service users that it concerns, if that is news.
    pub fn secret_applied(&self, id: &ObjectRef, observed: SecretSummary) -> BTreeSet<ObjectRef> {
        let owner = observed.service_user.as_deref();
        let owner = owner.map(|name| ObjectRef::new(&id.namespace, name));
        self.change(|known| {
            let taken = |known: &Known| known.charges.get(&id.namespace).map_or(0, |charge| charge.bytes);
            if !known.secrets.contains_key(id) && (owner.is_none() || taken(known) + CHARGE_SECRET > self.limit) {
                return BTreeSet::new();
            }
            let tracked = known.track(id);
            let version = |observed: &SecretSummary| observed.resource_version.clone();
            if tracked.observed.as_ref().map(version) == Some(version(&observed)) {
                return BTreeSet::new();
            }
            tracked.observed = Some(observed);
            let mut concerned = tracked.named_by.clone();
            concerned.extend(owner.filter(|owner| known.users.contains_key(owner)));
            concerned
        })
    }

    /// A Secret is gone. Returns the service users that name it.
    pub fn secret_gone(&self, id: &ObjectRef) -> BTreeSet<ObjectRef> {
        self.change(|known| {
            let Some(tracked) = known.secrets.get_mut(id) else {
                return BTreeSet::new();
            };
            tracked.observed = None;
            let concerned = tracked.named_by.clone();
            known.drop_secret_if_unused(id);
            concerned
        })
    }

    /// Names of what is known of one kind.
    pub fn known(&self, kind: Kind) -> HashSet<ObjectRef> {
        let known = self.read();
        match kind {
            Kind::Instances => known.instances.keys().cloned().collect(),
            Kind::Policies => known.policies.keys().cloned().collect(),
            Kind::Namespaces => known.namespaces.keys().cloned().collect(),
            Kind::Users => known.users.keys().cloned().collect(),
            Kind::Secrets => known.secrets.keys().cloned().collect(),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Known) -> T) -> T {
        change(&mut self.known.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What is watched.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// `ZitadelInstance`.
    Instances,
    /// `ZitadelAccessPolicy`.
    Policies,
    /// `Namespace`.
    Namespaces,
    /// `ZitadelServiceUser`.
    Users,
    /// `Secret`.
    Secrets,
}

impl Known {
    /// Removes an object; Secrets that only it named stay, until [`Known::drop_unused_secrets`].
    fn remove_user(&mut self, id: &ObjectRef) -> Option<Arc<UserSummary>> {
        let user = self.users.remove(id)?;
        for secret in named_secrets(id, &user) {
            if let Some(tracked) = self.secrets.get_mut(&secret) {
                tracked.named_by.remove(id);
            }
        }
        self.discharge(&id.namespace, user.charge());
        Some(user)
    }

    fn forget_user(&mut self, id: &ObjectRef) {
        if let Some(user) = self.remove_user(id) {
            self.drop_unused_secrets(id, &user);
        }
    }

    fn drop_unused_secrets(&mut self, id: &ObjectRef, user: &UserSummary) {
        for secret in named_secrets(id, user) {
            self.drop_secret_if_unused(&secret);
        }
    }

    /// A Secret that nobody names is kept only while it exists and has our label.
    fn drop_secret_if_unused(&mut self, id: &ObjectRef) {
        let unused = self.secrets.get(id).is_some_and(|tracked| {
            let ours = tracked
                .observed
                .as_ref()
                .is_some_and(|observed| observed.service_user.is_some());
            tracked.named_by.is_empty() && !ours
        });
        if unused {
            self.secrets.remove(id);
            self.discharge(&id.namespace, CHARGE_SECRET);
        }
    }

    fn track(&mut self, id: &ObjectRef) -> &mut Tracked {
        if !self.secrets.contains_key(id) {
            self.charge(&id.namespace, CHARGE_SECRET);
        }
        self.secrets.entry(id.clone()).or_default()
    }

    fn charge(&mut self, namespace: &Arc<str>, bytes: usize) -> &mut Charge {
        let charge = self.charges.entry(namespace.clone()).or_default();
        charge.bytes += bytes;
        charge
    }

    fn discharge(&mut self, namespace: &Arc<str>, bytes: usize) {
        let Some(charge) = self.charges.get_mut(namespace) else {
            return;
        };
        charge.bytes = charge.bytes.saturating_sub(bytes);
        if !charge.is_of_use() {
            self.charges.remove(namespace);
        }
    }
}

/// The Secrets that a service user names.
fn named_secrets(id: &ObjectRef, user: &UserSummary) -> BTreeSet<ObjectRef> {
    user.secrets().map(|name| ObjectRef::new(&id.namespace, name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::summary::TokenSummary;

    fn user(version: usize, tokens: usize) -> UserSummary {
        let token = |i| TokenSummary {
            name: format!("t{i}").into(),
            secret: format!("s{i}").into(),
            status: None,
        };
        UserSummary {
            resource_version: version.to_string().into(),
            key_secret: "key".into(),
            tokens: (0..tokens).map(token).collect(),
            ..UserSummary::default()
        }
    }

    fn labelled(version: &str) -> SecretSummary {
        SecretSummary {
            uid: "u".into(),
            resource_version: version.into(),
            service_user: Some("o0".into()),
            controller: None,
            terminating: false,
        }
    }

    fn id(namespace: &str, name: &str) -> ObjectRef {
        ObjectRef::new(namespace, name)
    }

    fn bytes(cache: &Cache, namespace: &str) -> usize {
        cache.read().charges.get(namespace).map_or(0, |charge| charge.bytes)
    }

    #[test]
    fn a_namespace_has_its_limit_and_others_have_theirs() {
        let one = user(1, 1).charge() + 2 * CHARGE_SECRET;
        let cache = Cache::new(3 * one);
        let mut told = 0;
        for i in 0..10 * MAX_REFUSALS {
            match cache.user_applied(&id("hostile", &format!("o{i}")), user(1, 1)) {
                Applied::Refused { tell } => told += usize::from(tell),
                applied => assert!(i < 5 && applied == Applied::Changed, "{i}"),
            }
        }
        assert_eq!(told, MAX_REFUSALS);
        assert!(bytes(&cache, "hostile") <= 3 * one);
        for i in 0..10_000 {
            cache.secret_applied(&id("hostile", &format!("labelled-{i}")), labelled("1"));
        }
        assert!(bytes(&cache, "hostile") <= 3 * one);
        assert_eq!(cache.user_applied(&id("quiet", "o"), user(1, 1)), Applied::Changed);
        assert!(cache.is_over_limit("hostile") && !cache.is_over_limit("quiet"));
        assert_eq!(cache.over_limit(), ["hostile".into()]);
        assert!(!cache.take_over_limit(Some("quiet")));
        assert!(cache.take_over_limit(Some("hostile")) && !cache.take_over_limit(None));
        assert!(!cache.is_over_limit("hostile"), "nothing was refused in between");
        // An object whose status already names the limit is not counted again.
        let told = UserSummary {
            ready: Some((false, Some(Reason::NamespaceLimit))),
            ..user(2, 1)
        };
        assert_eq!(
            cache.user_applied(&id("hostile", "o9"), told),
            Applied::Refused { tell: false }
        );
        assert_eq!(cache.read().charges["hostile"].refusals, 0);
        assert!(cache.is_over_limit("hostile"));
        // One that is served and changes keeps its place.
        for version in 2..20 {
            assert_eq!(
                cache.user_applied(&id("hostile", "o0"), user(version, 1)),
                Applied::Changed
            );
        }
        // One that grows too large loses its place.
        assert!(matches!(
            cache.user_applied(&id("quiet", "o"), user(2, 16)),
            Applied::Refused { tell: true }
        ));
        assert_eq!(cache.user(&id("quiet", "o")), None);
    }

    #[test]
    fn what_goes_is_no_longer_charged() {
        let cache = Cache::new(1 << 20);
        let (a, b) = (id("shop", "a"), id("shop", "b"));
        assert_eq!(cache.user_applied(&a, user(1, 3)), Applied::Changed);
        assert_eq!(cache.user_applied(&a, user(1, 3)), Applied::Known);
        assert_eq!(cache.user_applied(&b, user(1, 2)), Applied::Changed);
        assert!(cache.secret_applied(&id("shop", "s0"), labelled("1")).contains(&a));
        assert!(
            cache.secret_applied(&id("shop", "s0"), labelled("1")).is_empty(),
            "no news"
        );
        cache.secret_applied(&id("shop", "other"), labelled("1"));
        assert_eq!(cache.user_applied(&a, user(2, 1)), Applied::Changed);
        cache.user_gone(&a);
        cache.user_gone(&b);
        assert_eq!(
            bytes(&cache, "shop"),
            2 * CHARGE_SECRET,
            "s0 and other are there and ours"
        );
        for name in ["s0", "other"] {
            cache.secret_gone(&id("shop", name));
        }
        assert!(cache.read().charges.is_empty() && cache.read().secrets.is_empty());
    }

    #[test]
    fn policy_change_concerns_only_users_that_it_selects() {
        let cache = Cache::new(usize::MAX);
        let namespace = |name: &str| KnownNamespace {
            labels: Some(Arc::new(BTreeMap::from([("team".to_owned(), name.to_owned())]))),
            terminating: false,
        };
        for name in ["shop", "bank"] {
            cache.namespace_applied(&id("", name), &namespace(name));
            for instance in ["main", "other"] {
                let user = UserSummary {
                    instance: instance.into(),
                    ..user(1, 1)
                };
                cache.user_applied(&id(name, instance), user);
            }
        }
        let policy = |team: &str, project: &str| {
            serde_json::from_value(serde_json::json!({
                "instanceRef": {"name": "main"}, "namespaceSelector": {"matchLabels": {"team": team}},
                "audiences": {"projectIDs": [project]},
            }))
            .expect("a policy")
        };
        let apply = |policy| cache.policy_applied(&id("", "p"), policy);
        let allows = |namespace| {
            let allowed = cache.allowed_audiences("main", namespace).expect("labels");
            allowed != AllowedAudiences::default()
        };
        assert!(!allows("shop"));
        assert_eq!(apply(Some(policy("shop", "1"))), [id("shop", "main")]);
        assert!(allows("shop") && !allows("bank"));
        assert_eq!(apply(Some(policy("shop", "1"))), [], "no change");
        assert_eq!(apply(Some(policy("shop", "2"))), [id("shop", "main")]);
        let mut moved = apply(Some(policy("bank", "2")));
        moved.sort();
        assert_eq!(moved, [id("bank", "main"), id("shop", "main")]);
        assert!(!allows("shop") && allows("bank"));
        assert_eq!(apply(None), [id("bank", "main")], "one that cannot be decoded");
        assert!(!allows("bank"));
        assert_eq!(apply(None), []);
        assert_eq!(cache.allowed_audiences("main", "gone"), Err(Reason::NamespaceMissing));
    }
}
