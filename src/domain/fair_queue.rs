//! The fair queue: which of the waiting objects is reconciled next.
//!
//! 1. Objects wait in four priority classes ([`Class`]). Within a class the namespace with the smallest usage goes first,
//!    and within a namespace the object with the earliest critical time, then the one that waits longest.
//! 2. A reconcile adds one to the usage of its namespace, and one more for each token request after the first. A namespace
//!    that begins to wait starts at the smallest usage among those that wait, so that an idle namespace gathers no credit (start-time
//!    fair queueing, Goyal et al. 1996).
//! 3. A group that runs nothing may take any free slot of its pool. A group that runs something may run at most three times
//!    as many reconciles as it leaves slots free. So it takes at most three quarters of a pool, and the next group finds a
//!    slot.
//! 4. In the pool of all slots, the groups are the instances and the namespaces.
//! 5. Each instance has a pool of its own, a quarter of the slots in size (at least two). Its groups are the namespaces, and
//!    all retries of that instance together.
//!
//! With the default of 32 slots, the pool of an instance is as large as the default of `maxConcurrentRequests`. With more
//! reconciles, requests would queue in the client behind hanging ones, outside this order.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;

use crate::domain::object_ref::ObjectRef;
use crate::domain::priority::{Class, Priority};

/// Objects that wait, and the reconciles that run.
#[derive(Debug)]
pub struct FairQueue {
    slots: usize,
    waiting: HashMap<Origin, BTreeSet<Waiting>>,
    /// Origin, priority and arrival of each object: its key in `waiting`.
    places: HashMap<ObjectRef, (Origin, Priority, u64)>,
    /// Origin of each reconcile, and whether it is a retry.
    running: HashMap<ObjectRef, (Origin, bool)>,
    usage: Usage,
    arrivals: u64,
}

/// Where an object belongs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Origin {
    namespace: Arc<str>,
    instance: Arc<str>,
}

/// A waiting object, in the order of service within its origin and class.
type Waiting = (Priority, u64, ObjectRef);

/// What each namespace used since it began to wait. Namespaces at or below the level count as new.
#[derive(Debug, Default)]
struct Usage {
    level: u64,
    of: HashMap<Arc<str>, u64>,
}

impl Usage {
    fn of(&self, namespace: &Arc<str>) -> u64 {
        self.of.get(namespace).copied().unwrap_or(0).max(self.level)
    }

    fn add(&mut self, namespace: &Arc<str>, more: u64) {
        let used = self.of(namespace) + more;
        self.of.insert(namespace.clone(), used);
        self.of.retain(|_, used| *used > self.level);
    }
}

impl FairQueue {
    /// An empty queue for at most so many reconciles at once.
    #[must_use]
    pub fn new(slots: usize) -> Self {
        Self {
            slots,
            waiting: HashMap::new(),
            places: HashMap::new(),
            running: HashMap::new(),
            usage: Usage::default(),
            arrivals: 0,
        }
    }

    /// Adds an object of `instance`, or changes its priority. Its place among equals stays.
    pub fn push(&mut self, id: &ObjectRef, priority: Priority, instance: &Arc<str>) {
        let origin = Origin {
            namespace: id.namespace.clone(),
            instance: instance.clone(),
        };
        let arrival = self
            .places
            .get(id)
            .map_or(self.arrivals + 1, |(_, _, arrival)| *arrival);
        self.arrivals = self.arrivals.max(arrival);
        self.remove(id);
        self.places.insert(id.clone(), (origin.clone(), priority, arrival));
        let waiting = self.waiting.entry(origin).or_default();
        waiting.insert((priority, arrival, id.clone()));
    }

    /// Whether this object waits.
    #[must_use]
    pub fn contains(&self, id: &ObjectRef) -> bool {
        self.places.contains_key(id)
    }

    /// Number of objects that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether no object waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Number of reconciles that run.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Starts the reconcile of the next object, if one may start.
    pub fn pop(&mut self, now: Timestamp) -> Option<ObjectRef> {
        if self.running.len() >= self.slots {
            return None;
        }
        let pools = Pools::new(self.slots, self.running.values());
        let admitted = self.waiting.iter().filter(|(origin, _)| pools.admit(origin));
        let candidates = admitted.filter_map(|(origin, waiting)| {
            let next = next(waiting, now)?;
            let class = next.0.class(now);
            let may_start = class != Class::Retry || pools.admit_retry(origin);
            may_start.then(|| ((class, self.usage.of(&origin.namespace), next), origin))
        });
        let ((class, _, (_, _, id)), origin) = candidates.min_by(|(a, _), (b, _)| a.cmp(b))?;
        let (id, origin) = (id.clone(), origin.clone());
        let smallest = self.waiting.keys().map(|origin| self.usage.of(&origin.namespace)).min();
        self.usage.level = self.usage.level.max(smallest.unwrap_or_default());
        self.usage.add(&origin.namespace, 1);
        self.remove(&id);
        self.running.insert(id.clone(), (origin, class == Class::Retry));
        Some(id)
    }

    /// The reconcile of an object has ended, after so many token requests.
    pub fn finished(&mut self, id: &ObjectRef, requests: usize) {
        let Some((origin, _)) = self.running.remove(id) else {
            return;
        };
        let further = u64::try_from(requests).unwrap_or(u64::MAX).saturating_sub(1);
        self.usage.add(&origin.namespace, further);
        if self.running.is_empty() && self.waiting.is_empty() {
            self.usage = Usage::default();
        }
    }

    /// Forgets an object that waits.
    pub fn remove(&mut self, id: &ObjectRef) {
        let Some((origin, priority, arrival)) = self.places.remove(id) else {
            return;
        };
        if let Some(waiting) = self.waiting.get_mut(&origin) {
            waiting.remove(&(priority, arrival, id.clone()));
            if waiting.is_empty() {
                self.waiting.remove(&origin);
            }
        }
    }
}

/// What runs in each pool, by group.
#[derive(Default)]
struct Pools<'a> {
    free: usize,
    /// Size of the pool of an instance.
    of_instance: usize,
    instances: HashMap<&'a str, usize>,
    namespaces: HashMap<&'a str, usize>,
    origins: HashMap<&'a Origin, usize>,
    retries: HashMap<&'a str, usize>,
}

impl<'a> Pools<'a> {
    fn new(slots: usize, running: impl ExactSizeIterator<Item = &'a (Origin, bool)>) -> Self {
        let mut pools = Self {
            free: slots.saturating_sub(running.len()),
            of_instance: (slots / 4).max(2).min(slots),
            ..Self::default()
        };
        for (origin, is_retry) in running {
            *pools.instances.entry(&origin.instance).or_default() += 1;
            *pools.namespaces.entry(&origin.namespace).or_default() += 1;
            *pools.origins.entry(origin).or_default() += 1;
            *pools.retries.entry(&origin.instance).or_default() += usize::from(*is_retry);
        }
        pools
    }

    /// Whether the instance and the namespace of an object may start one more reconcile.
    fn admit(&self, origin: &Origin) -> bool {
        let of_origin = self.origins.get(origin).copied().unwrap_or(0);
        may_start(count(&self.instances, &origin.instance), self.free)
            && may_start(count(&self.namespaces, &origin.namespace), self.free)
            && may_start(of_origin, self.free_of(origin))
    }

    /// Whether the retries of an instance may start one more reconcile.
    fn admit_retry(&self, origin: &Origin) -> bool {
        may_start(count(&self.retries, &origin.instance), self.free_of(origin))
    }

    fn free_of(&self, origin: &Origin) -> usize {
        self.of_instance
            .saturating_sub(count(&self.instances, &origin.instance))
    }
}

fn count(counts: &HashMap<&str, usize>, group: &str) -> usize {
    counts.get(group).copied().unwrap_or(0)
}

/// Whether a group that runs so many reconciles may start one more in a pool with so many free slots.
fn may_start(running: usize, free: usize) -> bool {
    let left_free = free.saturating_sub(1);
    free > 0 && running < (3 * left_free).max(1)
}

/// The next of those that wait: the first refresh if it is critical, else the first of all.
fn next(waiting: &BTreeSet<Waiting>, now: Timestamp) -> Option<&Waiting> {
    let refreshes = (Priority::Refresh(Timestamp::MIN), 0, ObjectRef::new("", ""));
    let refresh = waiting.range(refreshes..).next();
    let critical = refresh.filter(|(priority, _, _)| priority.class(now) == Class::CriticalRefresh);
    critical.or_else(|| waiting.first())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("in range")
    }

    fn push(queue: &mut FairQueue, namespace: &str, name: &str, priority: Priority, instance: &str) {
        queue.push(&ObjectRef::new(namespace, name), priority, &instance.into());
    }

    fn drain(queue: &mut FairQueue, now: Timestamp) -> Vec<String> {
        let mut order = Vec::new();
        while let Some(id) = queue.pop(now) {
            queue.finished(&id, 1);
            order.push(id.to_string());
        }
        order
    }

    /// Starts what may start, and counts it by namespace.
    fn start(queue: &mut FairQueue) -> Vec<(String, usize)> {
        let mut started: Vec<(String, usize)> = Vec::new();
        while let Some(id) = queue.pop(at(0)) {
            match started.iter_mut().find(|(namespace, _)| **namespace == *id.namespace) {
                Some((_, count)) => *count += 1,
                None => started.push((id.namespace.to_string(), 1)),
            }
        }
        started
    }

    /// More objects of a namespace wait than there are slots.
    fn many(queue: &mut FairQueue, namespace: &str, priority: Priority, instance: &str) {
        for i in 0..40 {
            push(queue, namespace, &format!("{instance}-{i}"), priority, instance);
        }
    }

    #[test]
    fn classes_first_then_namespaces_in_turn_then_time() {
        let mut queue = FairQueue::new(100);
        for (namespace, name, priority) in [
            ("a", "retry", Priority::Retry),
            ("a", "due-late", Priority::Refresh(at(300))),
            ("a", "due-soon", Priority::Refresh(at(200))),
            ("a", "critical", Priority::Refresh(at(50))),
            ("a", "new-1", Priority::FirstToken),
            ("a", "new-2", Priority::FirstToken),
            ("b", "new", Priority::FirstToken),
            ("b", "due", Priority::Refresh(at(400))),
        ] {
            push(&mut queue, namespace, name, priority, "main");
        }
        assert_eq!(
            drain(&mut queue, at(100)),
            [
                "a/critical",
                "b/new",
                "a/new-1",
                "a/new-2",
                "b/due",
                "a/due-soon",
                "a/due-late",
                "a/retry"
            ]
        );
    }

    /// Slots; namespaces, priorities and instances of what comes, one after another; how much of each starts.
    type Row<'a> = (&'a str, usize, &'a [(&'a str, Priority, &'a str)], &'a [usize]);

    #[test]
    fn group_leaves_a_slot_for_the_next_group() {
        let first = Priority::FirstToken;
        #[rustfmt::skip]
        let rows: &[Row] = &[
            ("one namespace of one instance", 32, &[("a", first, "x")], &[6]),
            ("one namespace of many instances", 32, &[("a", first, "w"), ("a", first, "x"), ("a", first, "y"), ("a", first, "z"), ("a", first, "0"), ("b", first, "w")], &[6, 6, 6, 6, 0, 1]),
            ("namespaces of one instance", 32, &[("a", first, "x"), ("b", first, "x"), ("c", first, "x"), ("d", first, "x")], &[6, 1, 1, 0]),
            ("a slow instance, and others", 32, &[("a", first, "x"), ("b", first, "x"), ("c", first, "y"), ("d", first, "z")], &[6, 1, 6, 6]),
            ("retries, and a first token", 32, &[("a", Priority::Retry, "x"), ("b", Priority::Retry, "x"), ("c", first, "x")], &[6, 0, 1]),
            ("one slot", 1, &[("a", first, "x"), ("b", first, "x")], &[1, 0]),
            ("two slots", 2, &[("a", first, "x"), ("b", first, "x"), ("b", first, "y")], &[1, 0, 1]),
        ];
        for (name, slots, groups, expected) in rows {
            let mut queue = FairQueue::new(*slots);
            for ((namespace, priority, instance), expected) in groups.iter().zip(*expected) {
                many(&mut queue, namespace, *priority, instance);
                let started = start(&mut queue);
                let here = started
                    .iter()
                    .find(|(of, _)| of == namespace)
                    .map_or(0, |(_, count)| *count);
                assert_eq!(here, *expected, "{name}: {namespace} of {instance}: {started:?}");
            }
        }
    }

    #[test]
    fn namespace_that_runs_nothing_finds_a_slot_while_others_wait() {
        let mut queue = FairQueue::new(16);
        many(&mut queue, "noisy", Priority::FirstToken, "main");
        assert_eq!(start(&mut queue), [("noisy".to_owned(), 3)]);
        push(&mut queue, "quiet", "0", Priority::Refresh(at(400)), "main");
        assert_eq!(start(&mut queue), [("quiet".to_owned(), 1)]);
        // The slot stays free for namespaces that run nothing.
        queue.finished(&ObjectRef::new("quiet", "0"), 1);
        assert_eq!(start(&mut queue), []);
        push(&mut queue, "quiet", "1", Priority::FirstToken, "main");
        assert_eq!(start(&mut queue), [("quiet".to_owned(), 1)]);
    }

    #[test]
    fn usage_counts_token_requests_and_not_reconciles() {
        let mut queue = FairQueue::new(100);
        let (mut heavy, mut light) = (0, 0);
        for i in 0..1_000 {
            push(&mut queue, "heavy", &i.to_string(), Priority::FirstToken, "main");
            push(&mut queue, "light", &i.to_string(), Priority::FirstToken, "main");
        }
        for _ in 0..170 {
            let id = queue.pop(at(0)).expect("one waits");
            let requests = if &*id.namespace == "heavy" { 16 } else { 1 };
            *(if requests == 16 { &mut heavy } else { &mut light }) += requests;
            queue.finished(&id, requests);
        }
        assert!(heavy <= light + 16 && light <= heavy + 16, "{heavy} and {light}");
        // A critical refresh goes first and still counts.
        push(&mut queue, "heavy", "critical", Priority::Refresh(at(0)), "main");
        for namespace in ["heavy", "light", "light"] {
            let id = queue.pop(at(1)).expect("one waits");
            assert_eq!(&*id.namespace, namespace);
            queue.finished(&id, if namespace == "heavy" { 16 } else { 1 });
        }
        // A namespace that was idle has saved up nothing, and does not wait for those that used much.
        push(&mut queue, "late", "x", Priority::FirstToken, "main");
        let next = [(); 2].map(|()| queue.pop(at(0)).expect("one waits").namespace);
        assert!(next.contains(&"late".into()), "{next:?}");
    }

    #[test]
    fn object_waits_once_and_leaves_nothing_behind() {
        let mut queue = FairQueue::new(100);
        for (priority, instance) in [
            (Priority::Retry, "x"),
            (Priority::FirstToken, "x"),
            (Priority::FirstToken, "y"),
        ] {
            push(&mut queue, "a", "x", priority, instance);
        }
        assert_eq!(queue.len(), 1);
        assert_eq!(drain(&mut queue, at(0)), ["a/x"]);
        push(&mut queue, "a", "x", Priority::Retry, "x");
        queue.remove(&ObjectRef::new("a", "x"));
        assert!(drain(&mut queue, at(0)).is_empty());
        assert!(queue.waiting.is_empty() && queue.usage.of.is_empty());
    }
}
