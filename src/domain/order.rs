//! Who is served next: urgency of an object, and the fair order among all that wait (design §3.6).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use k8s_openapi::jiff::Timestamp;

use crate::api::ZitadelServiceUser;
use crate::domain::facts::ObjectRef;

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

/// The urgency of an object that has not failed, from its status alone.
#[must_use]
pub fn urgency(user: &ZitadelServiceUser) -> Urgency {
    let status = user.status.as_ref();
    let tokens = status.map(|s| s.tokens.as_slice()).unwrap_or_default();
    let critical = |t: &crate::api::service_user::TokenStatus| {
        let (renew, expires) = (t.renew_at.as_ref()?.0, t.expires_at.as_ref()?.0);
        Some(expires - expires.duration_since(renew) / 3)
    };
    let all: Option<Vec<Timestamp>> = tokens.iter().map(critical).collect();
    match all.and_then(|times| times.into_iter().min()) {
        Some(first) if tokens.len() >= user.spec.tokens.len() => Urgency::Refresh(first),
        _ => Urgency::Newcomer,
    }
}

/// All objects that wait for a pass. Namespaces take turns in every class; within one, the earliest goes first.
#[derive(Debug, Default)]
pub struct Waiting {
    lanes: HashMap<std::sync::Arc<str>, Lane>,
    urgencies: HashMap<ObjectRef, (Urgency, u64)>,
    arrivals: u64,
    turns: u64,
}

#[derive(Debug, Default)]
struct Lane {
    waiting: BTreeSet<(Urgency, u64, ObjectRef)>,
    running: usize,
    last_turn: u64,
}

impl Waiting {
    /// Adds an object, or changes its urgency; its place among equals stays.
    pub fn push(&mut self, id: &ObjectRef, urgency: Urgency) {
        let arrival = match self.urgencies.get(id) {
            Some((same, _)) if *same == urgency => return,
            Some((old, arrival)) => {
                let (old, arrival) = (*old, *arrival);
                if let Some(lane) = self.lanes.get_mut(&id.namespace) {
                    lane.waiting.remove(&(old, arrival, id.clone()));
                }
                arrival
            }
            None => {
                self.arrivals += 1;
                self.arrivals
            }
        };
        self.urgencies.insert(id.clone(), (urgency, arrival));
        let lane = self.lanes.entry(id.namespace.clone()).or_default();
        lane.waiting.insert((urgency, arrival, id.clone()));
    }

    /// Takes the next object: an urgent refresh, then a newcomer, then a refresh, then a retry; in each class the
    /// namespace whose last turn is longest ago. While others wait, a namespace has at most half of `slots`.
    pub fn pop(&mut self, now: Timestamp, slots: usize) -> Option<ObjectRef> {
        let others_wait = self.lanes.values().filter(|l| !l.waiting.is_empty()).count() > 1;
        let best = self
            .lanes
            .values()
            .filter(|lane| !others_wait || lane.running * 2 < slots.max(2))
            .filter_map(|lane| Some((lane.best(now)?, lane.last_turn)))
            .min_by(|((rank_a, a), turn_a), ((rank_b, b), turn_b)| (rank_a, turn_a, a).cmp(&(rank_b, turn_b, b)))
            .map(|((_, entry), _)| entry.clone())?;
        self.turns += 1;
        let id = best.2.clone();
        self.urgencies.remove(&id);
        if let Some(lane) = self.lanes.get_mut(&id.namespace) {
            lane.waiting.remove(&best);
            lane.running += 1;
            lane.last_turn = self.turns;
        }
        Some(id)
    }

    /// The object's pass has ended.
    pub fn finished(&mut self, id: &ObjectRef) {
        if let Some(lane) = self.lanes.get_mut(&id.namespace) {
            lane.running = lane.running.saturating_sub(1);
            if lane.running == 0 && lane.waiting.is_empty() {
                self.lanes.remove(&id.namespace);
            }
        }
    }

    /// Forgets an object that is gone.
    pub fn remove(&mut self, id: &ObjectRef) {
        if let Some((urgency, arrival)) = self.urgencies.remove(id)
            && let Some(lane) = self.lanes.get_mut(&id.namespace)
        {
            lane.waiting.remove(&(urgency, arrival, id.clone()));
        }
    }

    /// How many wait, by class.
    #[must_use]
    pub fn depth(&self) -> BTreeMap<&'static str, usize> {
        let mut depth = BTreeMap::from([("newcomer", 0), ("refresh", 0), ("retry", 0)]);
        for (urgency, _) in self.urgencies.values() {
            let class = match urgency {
                Urgency::Newcomer => "newcomer",
                Urgency::Refresh(_) => "refresh",
                Urgency::Retry => "retry",
            };
            *depth.entry(class).or_default() += 1;
        }
        depth
    }
}

impl Lane {
    /// The lane's best and its rank. The set is ordered newcomers, refreshes by time, retries; an urgent refresh is
    /// looked for at the head of the refreshes.
    fn best(&self, now: Timestamp) -> Option<(u8, &(Urgency, u64, ObjectRef))> {
        let first = self.waiting.first()?;
        let refresh = self
            .waiting
            .range((Urgency::Refresh(Timestamp::MIN), 0, ObjectRef::new("", ""))..)
            .next();
        match refresh {
            Some(entry @ (Urgency::Refresh(critical), _, _)) if *critical <= now => Some((0, entry)),
            _ => Some(match first.0 {
                Urgency::Newcomer => (1, first),
                Urgency::Refresh(_) => (2, first),
                Urgency::Retry => (3, first),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("in range")
    }

    fn drain(waiting: &mut Waiting, now: Timestamp) -> Vec<String> {
        let mut order = Vec::new();
        while let Some(id) = waiting.pop(now, 100) {
            waiting.finished(&id);
            order.push(id.to_string());
        }
        order
    }

    #[test]
    fn classes_then_namespaces_in_turn_then_time() {
        let mut waiting = Waiting::default();
        for (ns, name, urgency) in [
            ("a", "retry", Urgency::Retry),
            ("a", "due-late", Urgency::Refresh(at(300))),
            ("a", "due-soon", Urgency::Refresh(at(200))),
            ("a", "urgent", Urgency::Refresh(at(50))),
            ("a", "new-1", Urgency::Newcomer),
            ("a", "new-2", Urgency::Newcomer),
            ("b", "new", Urgency::Newcomer),
            ("b", "due", Urgency::Refresh(at(400))),
        ] {
            waiting.push(&ObjectRef::new(ns, name), urgency);
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
    fn one_namespace_has_half_of_the_slots_while_others_wait() {
        let mut waiting = Waiting::default();
        for i in 0..10 {
            waiting.push(&ObjectRef::new("noisy", &i.to_string()), Urgency::Newcomer);
        }
        for i in 0..3 {
            waiting.push(&ObjectRef::new("quiet", &i.to_string()), Urgency::Retry);
        }
        let taken: Vec<String> = std::iter::from_fn(|| waiting.pop(at(0), 4))
            .take(4)
            .map(|id| id.namespace.to_string())
            .collect();
        assert_eq!(taken, ["noisy", "noisy", "quiet", "quiet"]);
    }

    #[test]
    fn a_pushed_object_waits_once() {
        let mut waiting = Waiting::default();
        let id = ObjectRef::new("a", "x");
        waiting.push(&id, Urgency::Retry);
        waiting.push(&id, Urgency::Newcomer);
        waiting.push(&id, Urgency::Newcomer);
        assert_eq!(waiting.depth()["newcomer"], 1);
        assert_eq!(drain(&mut waiting, at(0)), ["a/x"]);
        waiting.push(&id, Urgency::Retry);
        waiting.remove(&id);
        assert!(drain(&mut waiting, at(0)).is_empty());
    }
}
