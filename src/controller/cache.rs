//! The objects that exist, as the watches last reported them. The cache keeps only what the operator needs to wake
//! objects, to order the queue and to export metrics. Each namespace has a memory limit, so that a tenant cannot
//! exhaust the operator's memory.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use crate::api::ZitadelInstance;
use crate::api::access_policy::ZitadelAccessPolicySpec;
use crate::domain::access::{Allowed, selects};
use crate::domain::object_ref::ObjectRef;
use crate::domain::observed_secret::SecretRef;
use crate::domain::reason::Reason;
use crate::domain::summary::UserSummary;

/// Bytes charged for a Secret that a service user names, or that has the operator's label.
const CHARGE_SECRET: usize = 1024;

/// Refusals for lack of memory that are reported for one namespace between two relists. Objects that wait for their
/// report take memory too.
const MAX_REFUSALS: usize = 256;

/// The objects that exist.
pub struct Cache {
    known: RwLock<Known>,
    /// Memory limit of one namespace, in bytes.
    limit: usize,
}

#[derive(Default)]
struct Known {
    users: HashMap<ObjectRef, Arc<UserSummary>>,
    instances: HashMap<ObjectRef, Readable>,
    policies: HashMap<ObjectRef, Arc<ZitadelAccessPolicySpec>>,
    namespaces: HashMap<ObjectRef, KnownNamespace>,
    /// Ordered, so that the Secrets of one namespace are a range.
    secrets: BTreeMap<ObjectRef, Tracked>,
    charges: HashMap<Arc<str>, Charge>,
}

/// The memory that a namespace takes.
#[derive(Default)]
struct Charge {
    bytes: usize,
    /// Objects refused for lack of memory since the last relist, without those whose status already says so.
    refusals: usize,
    /// Whether an object was refused since the last relist.
    is_over: bool,
    /// Whether an object was refused in the period before the last relist.
    was_over: bool,
}

impl Charge {
    fn is_of_use(&self) -> bool {
        self.bytes > 0 || self.is_over || self.was_over
    }
}

/// An instance, or the generation of an instance that cannot be decoded.
pub type Readable = Result<Arc<ZitadelInstance>, Option<i64>>;

/// The labels and the state of a namespace.
#[derive(Clone, Debug, PartialEq)]
pub struct KnownNamespace {
    /// Its labels. None if they are too large to keep.
    pub labels: Option<Arc<BTreeMap<String, String>>>,
    /// Whether it is being deleted. Nothing can be created in it then.
    pub terminating: bool,
}

/// A Secret that a service user names or that has the operator's label.
#[derive(Debug, Default)]
struct Tracked {
    /// Service users that name it as key Secret or token Secret.
    named_by: BTreeSet<ObjectRef>,
    /// None if it does not exist.
    observed: Option<SecretSummary>,
}

/// A Secret as the watch last reported it.
#[derive(Debug)]
pub struct SecretSummary {
    /// Its UID.
    pub uid: String,
    /// Its resource version.
    pub resource_version: String,
    /// Name of the service user in the operator's label.
    pub service_user: Option<String>,
    /// UID of the object that controls it.
    pub controller: Option<String>,
    /// Whether it is being deleted.
    pub terminating: bool,
}

/// The result of applying a service user to the cache.
#[derive(Debug, PartialEq, Eq)]
pub enum Applied {
    /// This version is already known.
    Known,
    /// The object is new or has changed.
    Changed,
    /// The memory limit of the namespace leaves no room for it.
    Refused {
        /// Whether its status must still report this.
        report: bool,
    },
}

impl Cache {
    /// An empty cache with a memory limit in bytes for each namespace.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            known: RwLock::default(),
            limit,
        }
    }

    /// The summary of a service user, if it exists.
    #[must_use]
    pub fn user(&self, id: &ObjectRef) -> Option<Arc<UserSummary>> {
        self.read().users.get(id).cloned()
    }

    /// The instance of this name. The error is `InstanceMissing` if it does not exist, and `InstanceInvalid` if it
    /// cannot be decoded: an invalid instance must not keep granting the access that it granted before.
    pub fn instance(&self, name: &str) -> Result<Arc<ZitadelInstance>, Reason> {
        match self.read().instances.get(&ObjectRef::new("", name)) {
            Some(Ok(instance)) => Ok(instance.clone()),
            Some(Err(_)) => Err(Reason::InstanceInvalid),
            None => Err(Reason::InstanceMissing),
        }
    }

    /// The generation of an instance that cannot be decoded.
    #[must_use]
    pub fn unreadable_generation(&self, id: &ObjectRef) -> Option<i64> {
        self.read().instances.get(id)?.as_ref().err().copied()?
    }

    /// What the access policies of `instance` allow `namespace`. An error if the labels of the namespace
    /// are not known.
    pub fn allowed(&self, instance: &str, namespace: &str) -> Result<Allowed, Reason> {
        let known = self.read();
        let namespace = known.namespaces.get(&ObjectRef::new("", namespace));
        let labels = namespace.ok_or(Reason::NamespaceMissing)?.labels.as_deref();
        let labels = labels.ok_or(Reason::NamespaceLabelsTooLarge)?;
        let policies = known.policies.values().map(Arc::as_ref);
        let policies = policies.filter(|policy| policy.instance_ref.name == instance);
        Ok(Allowed::of(policies, labels))
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

    /// Names of the existing Secrets that have the operator's label and are controlled by this object.
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
                // Checks label and owner, because the label alone can be set by any writer.
                let ours =
                    observed.service_user.as_deref() == Some(&*id.name) && observed.controller.as_deref() == Some(uid);
                if ours { each(&secret.name, observed) } else { None }
            })
            .collect()
    }

    /// The service users for which `wanted` returns true.
    #[must_use]
    pub fn users(&self, wanted: impl Fn(&ObjectRef, &UserSummary) -> bool) -> Vec<ObjectRef> {
        let known = self.read();
        let found = known.users.iter().filter(|(id, user)| wanted(id, user));
        found.map(|(id, _)| id.clone()).collect()
    }

    /// UIDs of the service users that show by their finalizer that they have manager roles.
    #[must_use]
    pub fn holders_of_roles(&self) -> HashMap<Box<str>, ObjectRef> {
        let known = self.read();
        let holders = known.users.iter().filter(|(_, user)| user.holds.roles);
        holders.map(|(id, user)| (user.uid.clone(), id.clone())).collect()
    }

    /// The service users of an instance.
    #[must_use]
    pub fn users_of(&self, instance: &str) -> Vec<ObjectRef> {
        self.users(|_, user| user.is_of(instance))
    }

    /// The instances whose admin credential is in the Secret with this name.
    #[must_use]
    pub fn instances_with_credential(&self, secret: &str) -> Vec<ObjectRef> {
        let known = self.read();
        let those = known.instances.iter().filter(|(_, instance)| {
            let credential = instance.as_ref().ok().and_then(|i| i.spec.admin_credential.as_ref());
            credential.is_some_and(|credential| credential.secret_ref.name == secret)
        });
        those.map(|(id, _)| id.clone()).collect()
    }

    /// All instances.
    #[must_use]
    pub fn instances(&self) -> Vec<ObjectRef> {
        self.read().instances.keys().cloned().collect()
    }

    /// All service users with their summaries.
    #[must_use]
    pub fn all_users(&self) -> Vec<(ObjectRef, Arc<UserSummary>)> {
        let known = self.read();
        known
            .users
            .iter()
            .map(|(id, user)| (id.clone(), user.clone()))
            .collect()
    }

    /// All instances that can be decoded.
    #[must_use]
    pub fn all_instances(&self) -> Vec<Arc<ZitadelInstance>> {
        self.read().instances.values().flatten().cloned().collect()
    }

    /// Returns whether an object was refused for lack of memory since the last call, in the namespace `within` or in
    /// any, and starts a new period.
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

    /// The namespaces in which an object was refused for lack of memory in this period or the one before.
    #[must_use]
    pub fn over_limit(&self) -> Vec<Arc<str>> {
        let known = self.read();
        let over = known
            .charges
            .iter()
            .filter(|(_, charge)| charge.is_over || charge.was_over);
        over.map(|(namespace, _)| namespace.clone()).collect()
    }

    /// Whether an object of this namespace was refused for lack of memory in this period or the one before.
    #[must_use]
    pub fn is_over_limit(&self, namespace: &str) -> bool {
        let known = self.read();
        known
            .charges
            .get(namespace)
            .is_some_and(|charge| charge.is_over || charge.was_over)
    }

    /// Records that a service user was added or changed.
    pub fn user_applied(&self, id: &ObjectRef, user: UserSummary) -> Applied {
        self.change(|known| {
            let before = known.users.get(id);
            if before.is_some_and(|before| before.resource_version == user.resource_version && before.uid == user.uid) {
                return Applied::Known;
            }
            let before = known.remove_user(id);
            let secrets = named_secrets(id, &user);
            let taken = known.charges.get(&id.namespace).map_or(0, |charge| charge.bytes);
            // Secrets that the cache already tracks are already charged.
            let new = secrets.iter().filter(|secret| !known.secrets.contains_key(secret));
            if taken + user.charge() + new.count() * CHARGE_SECRET > self.limit {
                if let Some(before) = before {
                    known.drop_unused_secrets(id, &before);
                }
                let charge = known.charge(&id.namespace, 0);
                charge.is_over = true;
                let reported = user.ready == Some((false, Some(Reason::NamespaceLimit)))
                    && user.observed_generation == user.generation;
                charge.refusals += usize::from(!reported);
                let report = !reported && charge.refusals <= MAX_REFUSALS;
                return Applied::Refused { report };
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

    /// Records that a service user was deleted.
    pub fn user_gone(&self, id: &ObjectRef) {
        self.change(|known| known.forget_user(id));
    }

    /// Forgets a service user after a read found that the object with this UID no longer exists, before the watch
    /// reports it. If the object exists after all, the next list of the watch restores it.
    pub fn forget_user(&self, id: &ObjectRef, uid: &str) {
        self.change(|known| {
            if known.users.get(id).is_some_and(|user| &*user.uid == uid) {
                known.forget_user(id);
            }
        });
    }

    /// Records that an instance was added or changed. Returns its previous state.
    pub fn instance_applied(&self, id: &ObjectRef, instance: Readable) -> Option<Readable> {
        self.change(|known| known.instances.insert(id.clone(), instance))
    }

    /// Records that an instance was deleted.
    pub fn instance_gone(&self, id: &ObjectRef) {
        self.change(|known| known.instances.remove(id));
    }

    /// Records that an access policy was added or changed. `None` is a policy that cannot be decoded and allows
    /// nothing. Returns the service users whose access may change: those that the policy selected before or selects
    /// now.
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
            let selected = |policy: &ZitadelAccessPolicySpec| -> HashSet<Arc<str>> {
                let labels = |namespace: &KnownNamespace| namespace.labels.clone();
                let all = known.namespaces.iter();
                let selected = all.filter(|(_, namespace)| {
                    labels(namespace).is_some_and(|labels| selects(&policy.namespace_selector, &labels))
                });
                selected.map(|(id, _)| id.name.clone()).collect()
            };
            let policies: Vec<_> = before.into_iter().chain(policy).map(|p| (selected(&p), p)).collect();
            let concerned = known.users.iter().filter(|(user, summary)| {
                let is_selected = |(namespaces, policy): &(HashSet<Arc<str>>, Arc<ZitadelAccessPolicySpec>)| {
                    summary.is_of(&policy.instance_ref.name) && namespaces.contains(&user.namespace)
                };
                policies.iter().any(is_selected)
            });
            concerned.map(|(user, _)| user.clone()).collect()
        })
    }

    /// Records that an access policy was deleted. Returns the service users that it selected.
    #[must_use]
    pub fn policy_gone(&self, id: &ObjectRef) -> Vec<ObjectRef> {
        self.policy_applied(id, None)
    }

    /// Records that a namespace was added or changed. Returns whether it differs from what was known.
    pub fn namespace_applied(&self, id: &ObjectRef, namespace: &KnownNamespace) -> bool {
        self.change(|known| known.namespaces.insert(id.clone(), namespace.clone()).as_ref() != Some(namespace))
    }

    /// Records that a namespace was deleted.
    pub fn namespace_gone(&self, id: &ObjectRef) {
        self.change(|known| known.namespaces.remove(id));
    }

    /// Records that a Secret was added or changed. Returns the service users that it concerns, or none if this version
    /// is already known.
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

    /// Records that a Secret was deleted. Returns the service users that name it.
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

    /// Names of all known objects of one kind.
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

/// The kinds that the operator watches.
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
    /// Removes a service user. Secrets that only it named stay until [`Known::drop_unused_secrets`].
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

    /// Drops a Secret that no service user names, unless it exists and has the operator's label.
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
    fn memory_limit_of_one_namespace_does_not_affect_others() {
        let one = user(1, 1).charge() + 2 * CHARGE_SECRET;
        let cache = Cache::new(3 * one);
        let mut reports = 0;
        for i in 0..10 * MAX_REFUSALS {
            match cache.user_applied(&id("hostile", &format!("o{i}")), user(1, 1)) {
                Applied::Refused { report } => reports += usize::from(report),
                applied => assert!(i < 5 && applied == Applied::Changed, "{i}"),
            }
        }
        assert_eq!(reports, MAX_REFUSALS);
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
        assert!(!cache.is_over_limit("hostile"), "nothing was refused meanwhile");
        // An object whose status already reports the limit is not counted again.
        let reported = UserSummary {
            ready: Some((false, Some(Reason::NamespaceLimit))),
            ..user(2, 1)
        };
        assert_eq!(
            cache.user_applied(&id("hostile", "o9"), reported),
            Applied::Refused { report: false }
        );
        assert_eq!(cache.read().charges["hostile"].refusals, 0);
        assert!(cache.is_over_limit("hostile"));
        // A served object that changes keeps its place.
        for version in 2..20 {
            assert_eq!(
                cache.user_applied(&id("hostile", "o0"), user(version, 1)),
                Applied::Changed
            );
        }
        // An object that grows beyond the limit loses its place.
        assert!(matches!(
            cache.user_applied(&id("quiet", "o"), user(2, 16)),
            Applied::Refused { report: true }
        ));
        assert_eq!(cache.user(&id("quiet", "o")), None);
    }

    #[test]
    fn deleted_objects_are_no_longer_charged() {
        let cache = Cache::new(1 << 20);
        let (a, b) = (id("shop", "a"), id("shop", "b"));
        assert_eq!(cache.user_applied(&a, user(1, 3)), Applied::Changed);
        assert_eq!(cache.user_applied(&a, user(1, 3)), Applied::Known);
        assert_eq!(cache.user_applied(&b, user(1, 2)), Applied::Changed);
        assert!(cache.secret_applied(&id("shop", "s0"), labelled("1")).contains(&a));
        assert!(
            cache.secret_applied(&id("shop", "s0"), labelled("1")).is_empty(),
            "known version"
        );
        cache.secret_applied(&id("shop", "other"), labelled("1"));
        assert_eq!(cache.user_applied(&a, user(2, 1)), Applied::Changed);
        cache.user_gone(&a);
        cache.user_gone(&b);
        assert_eq!(
            bytes(&cache, "shop"),
            2 * CHARGE_SECRET,
            "s0 and other exist and have the label"
        );
        for name in ["s0", "other"] {
            cache.secret_gone(&id("shop", name));
        }
        assert!(cache.read().charges.is_empty() && cache.read().secrets.is_empty());
    }

    #[test]
    fn policy_change_wakes_only_users_that_it_selects() {
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
            let allowed = cache.allowed("main", namespace).expect("labels");
            allowed != Allowed::default()
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
        assert_eq!(apply(None), [id("bank", "main")], "a policy that cannot be decoded");
        assert!(!allows("bank"));
        assert_eq!(apply(None), []);
        assert_eq!(cache.allowed("main", "gone"), Err(Reason::NamespaceMissing));
    }
}
