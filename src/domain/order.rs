//! Who is served next: urgency of an object, and the fair order among all that wait (docs/adr/0006-own-priority-queue.md).

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::sync::Arc;

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::domain::object_ref::ObjectRef;
use crate::domain::summary::{TokenTimes, UserSummary};
use crate::domain::time::shifted;

/// How urgent an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// Has no token yet, and has not failed.
    Newcomer,
    /// Has tokens; from this moment on the next renewal is urgent.
    Refresh(Timestamp),
    /// Failed before.
    Retry,
}

/// The urgency of an object, from its status alone: that of its first good token to become urgent. Without one it is a
/// newcomer, and so it is while a token of its spec was never looked at. `now` and the answer are by our own clock,
/// `skew` is how far the instance's is ahead, by which the status goes.
#[must_use]
pub fn urgency(user: &UserSummary, skew: SignedDuration, now: Timestamp) -> Urgency {
    let critical = |times: &TokenTimes| {
        let ours = |time: Option<Timestamp>| Some(shifted(time?, -skew));
        let (renew, expires) = (ours(times.renew_at)?, ours(times.expires_at)?);
        (expires > now).then(|| expires - expires.duration_since(renew) / 3)
    };
    let told = user.tokens.iter().map(|token| token.status.as_ref());
    match told.clone().flatten().filter_map(critical).min() {
        Some(first) if told.clone().all(|status| status.is_some()) => Urgency::Refresh(first),
        _ => Urgency::Newcomer,
    }
}

/// How many passes run at once.
#[derive(Clone, Copy, Debug)]
pub struct Slots {
    /// All together.
    pub all: usize,
    /// For the objects of one instance. Passes wait for the instance's budget in the order in which they began, so
    /// that few may begin: whoever waits here still has its rank. And a slow instance cannot take every slot.
    pub per_instance: usize,
}

/// All objects that wait for a pass. Namespaces take turns in every class; within one, the earliest goes first.
#[derive(Debug, Default)]
pub struct Waiting {
    lanes: HashMap<Lane, BTreeSet<Entry>>,
    entries: HashMap<ObjectRef, (Lane, Urgency, u64)>,
    /// What runs, and whether it is a retry.
    running: HashMap<ObjectRef, (Lane, bool)>,
    by_namespace: HashMap<Arc<str>, usize>,
    by_instance: HashMap<Arc<str>, usize>,
    retries: HashMap<Arc<str>, usize>,
    by_lane: HashMap<Lane, usize>,
    turns: Turns,
    arrivals: u64,
}

/// Whose turn it is among the namespaces: the one that had least since it began to wait. A pass costs one, and one more
/// for each further mint, so that objects with many tokens get no more than those with one. Who comes begins with the
/// least of those who wait (start-time fair queueing), so that nobody saves up turns.
#[derive(Debug, Default)]
struct Turns {
    /// The least that any who waited had.
    level: u64,
    had: HashMap<Arc<str>, u64>,
}

impl Turns {
    fn had(&self, namespace: &Arc<str>) -> u64 {
        self.had.get(namespace).copied().unwrap_or(0).max(self.level)
    }

    /// `least` is what the one has that had least of those who wait.
    fn take(&mut self, namespace: &Arc<str>, least: u64) {
        let had = self.had(namespace);
        self.level = self.level.max(least);
        self.had.insert(namespace.clone(), had + 1);
    }

    fn charge(&mut self, namespace: &Arc<str>, more: u64) {
        let had = self.had(namespace);
        self.had.insert(namespace.clone(), had + more);
        // Who is not ahead is as one who comes.
        self.had.retain(|_, had| *had > self.level);
    }
}

/// Whether more than one namespace waits.
#[derive(Default)]
struct Crowd<'a> {
    one: Option<&'a Arc<str>>,
    several: bool,
}

impl<'a> Crowd<'a> {
    fn add(&mut self, namespace: &'a Arc<str>) {
        self.several |= *self.one.get_or_insert(namespace) != namespace;
    }
}

/// Objects of one namespace and one instance.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Lane {
    namespace: Arc<str>,
    instance: Arc<str>,
}

type Entry = (Urgency, u64, ObjectRef);

impl Waiting {
    /// Adds an object of `instance`, or changes its urgency; its place among equals stays.
    pub fn push(&mut self, id: &ObjectRef, urgency: Urgency, instance: &Arc<str>) {
        let lane = Lane {
            namespace: id.namespace.clone(),
            instance: instance.clone(),
        };
        let arrival = match self.entries.get(id) {
            Some((same, equal, _)) if *same == lane && *equal == urgency => return,
            Some((_, _, arrival)) => *arrival,
            None => self.arrivals + 1,
        };
        self.arrivals = self.arrivals.max(arrival);
        self.remove(id);
        self.entries.insert(id.clone(), (lane.clone(), urgency, arrival));
        self.lanes
            .entry(lane)
            .or_default()
            .insert((urgency, arrival, id.clone()));
    }

    /// Whether this object waits.
    #[must_use]
    pub fn contains(&self, id: &ObjectRef) -> bool {
        self.entries.contains_key(id)
    }

    /// How many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nobody waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many passes run.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Takes the next object: an urgent refresh, then a newcomer, then a refresh, then a retry; in each class the
    /// namespace that had least.
    pub fn pop(&mut self, now: Timestamp, slots: Slots) -> Option<ObjectRef> {
        if self.running.len() >= slots.all {
            return None;
        }
        // For each instance, and for all, whether more than one namespace waits. Counted once: a tenant can name as many
        // instances as it likes.
        let mut all = Crowd::default();
        let mut crowds: HashMap<&Arc<str>, Crowd<'_>> = HashMap::new();
        for lane in self.lanes.keys() {
            all.add(&lane.namespace);
            crowds.entry(&lane.instance).or_default().add(&lane.namespace);
        }
        let open = |lane: &Lane| {
            let others = crowds.get(&lane.instance).is_some_and(|crowd| crowd.several);
            let (mine, all_of_it) = (count(&self.by_lane, lane), count(&self.by_instance, &lane.instance));
            // The last slot is for a namespace that has none: two whose requests hang must not keep out a third.
            let kept_free = usize::from(mine > 0 && (others || all_of_it > mine));
            count(&self.by_namespace, &lane.namespace) < share(slots.all, all.several)
                && mine < share(slots.per_instance, others)
                && all_of_it + kept_free < slots.per_instance
        };
        let ranked = self
            .lanes
            .iter()
            .filter(|(lane, _)| open(lane))
            .filter_map(|(lane, waiting)| {
                let (rank, entry) = best(waiting, now)?;
                // Many that fail must not stand before one that would not.
                if rank == RETRY && count(&self.retries, &lane.instance) >= (slots.per_instance / 4).max(1) {
                    return None;
                }
                Some((rank, self.turns.had(&lane.namespace), entry, lane))
            });
        let (rank, _, (_, _, id), lane) = ranked.min_by(|a, b| (a.0, a.1, a.2).cmp(&(b.0, b.1, b.2)))?;
        let (id, lane) = (id.clone(), lane.clone());
        let least = self.lanes.keys().map(|lane| self.turns.had(&lane.namespace)).min();
        let least = least.unwrap_or_default();
        self.remove(&id);
        self.turns.take(&lane.namespace, least);
        *self.by_namespace.entry(lane.namespace.clone()).or_default() += 1;
        *self.by_instance.entry(lane.instance.clone()).or_default() += 1;
        *self.by_lane.entry(lane.clone()).or_default() += 1;
        if rank == RETRY {
            *self.retries.entry(lane.instance.clone()).or_default() += 1;
        }
        self.running.insert(id.clone(), (lane, rank == RETRY));
        Some(id)
    }

    /// The object's pass has ended, and asked for so many tokens.
    pub fn finished(&mut self, id: &ObjectRef, mints: usize) {
        let Some((lane, retry)) = self.running.remove(id) else {
            return;
        };
        if retry {
            leave(&mut self.retries, &lane.instance);
        }
        leave(&mut self.by_namespace, &lane.namespace);
        leave(&mut self.by_instance, &lane.instance);
        leave(&mut self.by_lane, &lane);
        let further = u64::try_from(mints).unwrap_or(u64::MAX).saturating_sub(1);
        self.turns.charge(&lane.namespace, further);
        if self.running.is_empty() && self.lanes.is_empty() {
            self.turns = Turns::default();
        }
    }

    /// Forgets an object that waits.
    pub fn remove(&mut self, id: &ObjectRef) {
        let Some((lane, urgency, arrival)) = self.entries.remove(id) else {
            return;
        };
        if let Some(waiting) = self.lanes.get_mut(&lane) {
            waiting.remove(&(urgency, arrival, id.clone()));
            if waiting.is_empty() {
                self.lanes.remove(&lane);
            }
        }
    }
}

/// The rank of a retry, after all else.
const RETRY: u8 = 3;

/// The best of a lane and its rank. The set is ordered newcomers, refreshes by time, retries; an urgent refresh is
/// looked for at the head of the refreshes.
fn best(waiting: &BTreeSet<Entry>, now: Timestamp) -> Option<(u8, &Entry)> {
    let head = (Urgency::Refresh(Timestamp::MIN), 0, ObjectRef::new("", ""));
    if let Some(entry @ (Urgency::Refresh(critical), _, _)) = waiting.range(head..).next()
        && *critical <= now
    {
        return Some((0, entry));
    }
    let first = waiting.first()?;
    let rank = match first.0 {
        Urgency::Newcomer => 1,
        Urgency::Refresh(_) => 2,
        Urgency::Retry => RETRY,
    };
    Some((rank, first))
}

/// How many of `slots` one namespace may have: half while others wait, and three quarters while nobody does, since a
/// pass that hangs cannot be taken back when somebody comes.
fn share(slots: usize, others_wait: bool) -> usize {
    if others_wait { slots / 2 } else { slots * 3 / 4 }.max(1)
}

fn count<K: Eq + Hash>(counts: &HashMap<K, usize>, key: &K) -> usize {
    counts.get(key).copied().unwrap_or(0)
}

fn leave<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANY: Slots = Slots {
        all: 100,
        per_instance: 100,
    };

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("in range")
    }

    fn push(waiting: &mut Waiting, namespace: &str, name: &str, urgency: Urgency, instance: &str) {
        waiting.push(&ObjectRef::new(namespace, name), urgency, &instance.into());
    }

    fn drain(waiting: &mut Waiting, now: Timestamp) -> Vec<String> {
        let mut order = Vec::new();
        while let Some(id) = waiting.pop(now, MANY) {
            waiting.finished(&id, 1);
            order.push(id.to_string());
        }
        order
    }

    fn take(waiting: &mut Waiting, slots: Slots) -> Vec<String> {
        std::iter::from_fn(|| waiting.pop(at(0), slots))
            .map(|id| id.to_string())
            .collect()
    }

    #[test]
    fn classes_then_namespaces_in_turn_then_time() {
        let mut waiting = Waiting::default();
        for (namespace, name, urgency) in [
            ("a", "retry", Urgency::Retry),
            ("a", "due-late", Urgency::Refresh(at(300))),
            ("a", "due-soon", Urgency::Refresh(at(200))),
            ("a", "urgent", Urgency::Refresh(at(50))),
            ("a", "new-1", Urgency::Newcomer),
            ("a", "new-2", Urgency::Newcomer),
            ("b", "new", Urgency::Newcomer),
            ("b", "due", Urgency::Refresh(at(400))),
        ] {
            push(&mut waiting, namespace, name, urgency, "main");
        }
        assert_eq!(
            drain(&mut waiting, at(100)),
            [
                "a/urgent",
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

    #[test]
    fn one_namespace_never_has_all_slots_and_half_while_others_wait() {
        let mut waiting = Waiting::default();
        for i in 0..10 {
            push(&mut waiting, "noisy", &i.to_string(), Urgency::Newcomer, "main");
        }
        let slots = Slots {
            all: 32,
            per_instance: 8,
        };
        let taken = take(&mut waiting, slots);
        assert_eq!(taken.len(), 6);
        for id in &taken {
            let name = id.split('/').nth(1).expect("a name");
            waiting.finished(&ObjectRef::new("noisy", name), 1);
            push(&mut waiting, "noisy", name, Urgency::Newcomer, "main");
        }
        for i in 0..3 {
            push(&mut waiting, "quiet", &i.to_string(), Urgency::Refresh(at(400)), "main");
        }
        let slots = Slots {
            all: 16,
            per_instance: 4,
        };
        // Nor have two, so that a third finds a slot.
        assert_eq!(take(&mut waiting, slots), ["noisy/6", "noisy/7", "quiet/0"]);
        push(&mut waiting, "third", "0", Urgency::Newcomer, "main");
        assert_eq!(take(&mut waiting, slots), ["third/0"]);

        // Also when of one of them nobody waits any more.
        let mut waiting = Waiting::default();
        push(&mut waiting, "quiet", "0", Urgency::Newcomer, "main");
        assert_eq!(take(&mut waiting, slots), ["quiet/0"]);
        for i in 0..10 {
            push(&mut waiting, "noisy", &i.to_string(), Urgency::Newcomer, "main");
        }
        assert_eq!(take(&mut waiting, slots), ["noisy/0", "noisy/1"]);
    }

    #[test]
    fn mints_count_and_not_passes() {
        let mut waiting = Waiting::default();
        let (mut heavy, mut light) = (0, 0);
        for i in 0..1_000 {
            push(&mut waiting, "heavy", &i.to_string(), Urgency::Newcomer, "main");
            push(&mut waiting, "light", &i.to_string(), Urgency::Newcomer, "main");
        }
        for _ in 0..170 {
            let id = waiting.pop(at(0), MANY).expect("one waits");
            let mints = if &*id.namespace == "heavy" { 16 } else { 1 };
            *(if mints == 16 { &mut heavy } else { &mut light }) += mints;
            waiting.finished(&id, mints);
        }
        assert!(heavy <= light + 16 && light <= heavy + 16, "{heavy} and {light}");
        // One that was urgent and went first has still had what it had.
        push(&mut waiting, "heavy", "urgent", Urgency::Refresh(at(0)), "main");
        for namespace in ["heavy", "light", "light"] {
            let id = waiting.pop(at(1), MANY).expect("one waits");
            assert_eq!(&*id.namespace, namespace);
            waiting.finished(&id, if namespace == "heavy" { 16 } else { 1 });
        }
        // Who was away has saved up nothing, and has to wait for nobody who had much.
        push(&mut waiting, "late", "x", Urgency::Newcomer, "main");
        let next = [(); 2].map(|()| waiting.pop(at(0), MANY).expect("one waits").namespace);
        assert!(next.contains(&"late".into()), "{next:?}");
    }

    #[test]
    fn one_instance_has_its_share_and_the_others_go_on() {
        let mut waiting = Waiting::default();
        for i in 0..5 {
            push(&mut waiting, "a", &format!("slow-{i}"), Urgency::Newcomer, "slow");
        }
        push(&mut waiting, "a", "fast", Urgency::Retry, "fast");
        let slots = Slots {
            all: 10,
            per_instance: 3,
        };
        assert_eq!(take(&mut waiting, slots), ["a/slow-0", "a/slow-1", "a/fast"]);
        waiting.finished(&ObjectRef::new("a", "slow-0"), 1);
        assert_eq!(take(&mut waiting, slots), ["a/slow-2"]);
    }

    #[test]
    fn retries_have_a_quarter_of_an_instances_slots_at_most() {
        let mut waiting = Waiting::default();
        for namespace in ["a", "b", "c", "d", "e"] {
            push(&mut waiting, namespace, "failing", Urgency::Retry, "main");
        }
        push(&mut waiting, "a", "failing", Urgency::Retry, "other");
        let slots = Slots {
            all: 32,
            per_instance: 8,
        };
        assert_eq!(take(&mut waiting, slots).len(), 3);
        push(&mut waiting, "e", "new", Urgency::Newcomer, "main");
        assert_eq!(take(&mut waiting, slots), ["e/new"]);
        waiting.finished(&ObjectRef::new("b", "failing"), 1);
        assert_eq!(take(&mut waiting, slots).len(), 1);
    }

    #[test]
    fn a_pushed_object_waits_once() {
        let mut waiting = Waiting::default();
        for (urgency, instance) in [
            (Urgency::Retry, "x"),
            (Urgency::Newcomer, "x"),
            (Urgency::Newcomer, "y"),
        ] {
            push(&mut waiting, "a", "x", urgency, instance);
        }
        assert_eq!(waiting.entries.len(), 1);
        assert_eq!(drain(&mut waiting, at(0)), ["a/x"]);
        push(&mut waiting, "a", "x", Urgency::Retry, "x");
        waiting.remove(&ObjectRef::new("a", "x"));
        assert!(drain(&mut waiting, at(0)).is_empty());
        assert!(
            waiting.lanes.is_empty() && waiting.turns.had.is_empty(),
            "nothing is kept for who is gone"
        );
    }

    #[test]
    fn the_urgency_of_an_object_is_that_of_its_first_good_token() {
        let user = |tokens: serde_json::Value| -> UserSummary {
            let wanted = |name: &str| serde_json::json!({"name": name, "projectIDs": ["1"], "secret": {"name": name}});
            serde_json::from_value(serde_json::json!({
                "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelServiceUser", "metadata": {"name": "x"},
                "spec": {"instanceRef": {"name": "i"}, "keySecretRef": {"name": "k"}, "tokens": [wanted("a"), wanted("b")]},
                "status": {"tokens": tokens},
            }))
            .expect("a service user")
        };
        let line = |name: &str, renew: i64, expires: i64| serde_json::json!({"name": name, "secretName": name, "renewAt": at(renew).to_string(), "expiresAt": at(expires).to_string()});
        let denied = serde_json::json!({"name": "b", "secretName": "b", "reason": "AccessDenied"});
        let table = [
            ("never looked at", serde_json::json!([]), Urgency::Newcomer),
            (
                "two good ones",
                serde_json::json!([line("a", 100, 130), line("b", 70, 100)]),
                Urgency::Refresh(at(90)),
            ),
            (
                "one good, one without",
                serde_json::json!([line("a", 100, 130), denied]),
                Urgency::Refresh(at(120)),
            ),
            (
                "one good, one expired",
                serde_json::json!([line("a", 100, 130), line("b", 20, 40)]),
                Urgency::Refresh(at(120)),
            ),
            (
                "one good, one new in the spec",
                serde_json::json!([line("a", 100, 130)]),
                Urgency::Newcomer,
            ),
            (
                "one good, and an entry that took the place of another",
                serde_json::json!([line("a", 100, 130), line("c", 100, 130)]),
                Urgency::Newcomer,
            ),
            (
                "both expired",
                serde_json::json!([line("a", 20, 40), line("b", 20, 40)]),
                Urgency::Newcomer,
            ),
        ];
        for (name, tokens, expected) in table {
            let user = user(tokens);
            assert_eq!(urgency(&user, SignedDuration::ZERO, at(50)), expected, "{name}");
            // The same a minute away, where the server's clock is a minute behind.
            let behind = SignedDuration::from_secs(-60);
            let later = match expected {
                Urgency::Refresh(critical) => Urgency::Refresh(shifted(critical, -behind)),
                other => other,
            };
            assert_eq!(urgency(&user, behind, at(110)), later, "{name}");
        }
    }
}
