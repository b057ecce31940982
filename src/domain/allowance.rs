//! Burst and sustained rate of the work that one tenant can cause: token buckets for each object and each namespace.
//!
//! A tenant's changes to its own objects (edits, deletion and recreation, renew requests) cause requests to ZITADEL and
//! to the API server. Buckets are kept by name and outlive the object. Deleting an object therefore does not refill its
//! bucket (`docs/adr/0009-unwritten-tokens-are-kept.md`).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::domain::limits::{Level, Rate};
use crate::domain::object_ref::ObjectRef;

/// Pruning starts at this number of buckets.
const PRUNE_FROM: usize = 1024;

/// Upper bound of the debt of a bucket, as a waiting time. Without it, objects that are created and deleted in a loop
/// would delay the other objects of their namespace for long.
const LONGEST_WAIT: Duration = Duration::from_mins(1);

/// An unused claim is dropped after this time.
const CLAIM_LASTS: Duration = Duration::from_mins(10);

/// The buckets of all objects and namespaces, for one kind of work. Times are durations since a fixed moment, by the
/// caller's monotonic clock.
#[derive(Debug)]
pub struct Allowances {
    object: Rate,
    namespace: Rate,
    objects: HashMap<ObjectRef, Level>,
    namespaces: HashMap<Arc<str>, Level>,
    /// Objects that wait, and when each may continue.
    claims: HashMap<ObjectRef, Duration>,
    prune_at: usize,
}

impl Allowances {
    /// Starts with full buckets.
    #[must_use]
    pub fn new(object: Rate, namespace: Rate) -> Self {
        Self {
            object,
            namespace,
            objects: HashMap::new(),
            namespaces: HashMap::new(),
            claims: HashMap::new(),
            prune_at: PRUNE_FROM,
        }
    }

    /// Takes one unit for `id`. If none is available, takes nothing and returns the waiting time.
    pub fn try_take(&mut self, now: Duration, id: &ObjectRef) -> Result<(), Duration> {
        let wait = self.wait(now, id);
        if wait.is_zero() {
            self.take(now, id);
            return Ok(());
        }
        Err(wait)
    }

    /// Takes one unit for `id`, or reserves one for later and returns the waiting time. Waiting objects get different
    /// times, so that a unit is available to each of them when it calls again. If the waiting time reaches
    /// `LONGEST_WAIT`, nothing is reserved, and `id` has to call again after the returned time.
    pub fn claim(&mut self, now: Duration, id: &ObjectRef) -> Result<(), Duration> {
        if let Some(at) = self.claims.get(id).copied() {
            if at > now {
                return Err(at.saturating_sub(now));
            }
            self.claims.remove(id);
            return Ok(());
        }
        let wait = self.wait(now, id);
        if wait >= LONGEST_WAIT {
            return Err(wait);
        }
        self.take(now, id);
        if wait.is_zero() {
            return Ok(());
        }
        self.claims.insert(id.clone(), now + wait);
        Err(wait)
    }

    /// Returns an unused unit: the next claim of `id` takes nothing.
    pub fn give_back(&mut self, now: Duration, id: &ObjectRef) {
        self.claims.insert(id.clone(), now);
    }

    /// Takes one unit for `id` even if none is available, and returns the waiting time.
    pub fn reserve(&mut self, now: Duration, id: &ObjectRef) -> Duration {
        let wait = self.wait(now, id);
        self.take(now, id);
        wait
    }

    fn wait(&self, now: Duration, id: &ObjectRef) -> Duration {
        let wait = |level: Option<&Level>, rate: Rate| {
            let missing = 1.0 - level.map_or(rate.burst, |level| level.left_at(rate, now));
            Duration::try_from_secs_f64(missing.max(0.0) / rate.per_second).unwrap_or(Duration::MAX)
        };
        let object = wait(self.objects.get(id), self.object);
        object.max(wait(self.namespaces.get(&id.namespace), self.namespace))
    }

    fn take(&mut self, now: Duration, id: &ObjectRef) {
        if self.objects.len().max(self.claims.len()) >= self.prune_at {
            let (object, namespace) = (self.object, self.namespace);
            // A full bucket is equal to a new one.
            self.objects
                .retain(|_, level| level.left_at(object, now) < object.burst);
            self.namespaces
                .retain(|_, level| level.left_at(namespace, now) < namespace.burst);
            self.claims.retain(|_, at| now < *at + CLAIM_LASTS);
            self.prune_at = PRUNE_FROM.max(2 * self.objects.len().max(self.claims.len()));
        }
        let less = |level: Option<Level>, rate: Rate| {
            let debt = rate.per_second * LONGEST_WAIT.as_secs_f64();
            let left = level.map_or(rate.burst, |level| level.left_at(rate, now)) - 1.0;
            Level {
                left: left.max(-debt),
                at: now,
            }
        };
        let object = less(self.objects.get(id).copied(), self.object);
        self.objects.insert(id.clone(), object);
        let namespace = less(self.namespaces.get(&id.namespace).copied(), self.namespace);
        self.namespaces.insert(id.namespace.clone(), namespace);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OBJECT: Rate = Rate {
        burst: 5.0,
        per_second: 0.5,
    };
    const NAMESPACE: Rate = Rate {
        burst: 20.0,
        per_second: 4.0,
    };

    proptest! {
        /// However often callers ask, no object and no namespace exceeds its burst and its rate. A caller that waits
        /// for the returned time succeeds.
        #[test]
        fn burst_and_rate_are_never_exceeded(
            asks in prop::collection::vec((0_u64..400, 0_u8..2, 0_u8..8), 1..400), reserves in any::<bool>(),
        ) {
            let mut allowances = Allowances::new(OBJECT, NAMESPACE);
            let mut now = Duration::ZERO;
            let mut granted: Vec<(Duration, ObjectRef)> = Vec::new();
            for (gap, namespace, name) in asks {
                now += Duration::from_millis(gap);
                let id = ObjectRef::new(&format!("n{namespace}"), &format!("o{name}"));
                if reserves {
                    granted.push((now + allowances.reserve(now, &id), id));
                } else {
                    match allowances.try_take(now, &id) {
                        Ok(()) => granted.push((now, id)),
                        Err(wait) => {
                            now += wait + Duration::from_micros(1);
                            prop_assert_eq!(allowances.try_take(now, &id), Ok(()), "after the wait");
                            granted.push((now, id));
                        }
                    }
                }
            }
            let check = |of: &dyn Fn(&ObjectRef) -> bool, rate: Rate| {
                let times: Vec<Duration> = granted.iter().filter(|(_, id)| of(id)).map(|(at, _)| *at).collect();
                times.iter().all(|start| {
                    let within = |end: Duration| times.iter().filter(|at| (*start..=end).contains(*at)).count();
                    times.iter().filter(|end| *end >= start).all(|end| {
                        let allowed = rate.burst + rate.per_second * end.saturating_sub(*start).as_secs_f64();
                        #[allow(clippy::cast_precision_loss, reason = "small numbers")]
                        let count = within(*end) as f64;
                        count <= allowed + 1.0
                    })
                })
            };
            for namespace in 0..2 {
                let namespace: Arc<str> = format!("n{namespace}").into();
                prop_assert!(check(&|id| id.namespace == namespace, NAMESPACE));
                for name in 0..8 {
                    let id = ObjectRef::new(&namespace, &format!("o{name}"));
                    prop_assert!(check(&|other| *other == id, OBJECT));
                }
            }
        }
    }

    /// Many objects of a namespace wait. Each calls fewer than three times on average, and the rate is fully used.
    #[test]
    fn waiting_objects_get_staggered_times() {
        let mut allowances = Allowances::new(OBJECT, NAMESPACE);
        let id = |i: usize| ObjectRef::new("n", &format!("o{i}"));
        let mut due: Vec<(Duration, usize)> = (0..500).map(|i| (Duration::ZERO, i)).collect();
        let (mut asks, mut granted) = (0, Vec::new());
        while let Some(next) = due.iter().min().copied().filter(|(at, _)| *at < Duration::from_mins(5)) {
            due.retain(|other| *other != next);
            asks += 1;
            match allowances.claim(next.0, &id(next.1)) {
                Ok(()) => granted.push(next.0),
                Err(wait) => due.push((next.0 + wait.max(Duration::from_millis(1)), next.1)),
            }
        }
        assert_eq!(granted.len(), 500);
        // A burst of 20, then 480 at four per second.
        let last = granted.last().expect("one").as_secs_f64();
        assert!((118.0..=200.0).contains(&last), "{last}");
        assert!(asks < 3 * 500, "{asks}");
        // A unit that was given back can be claimed again.
        let spent = ObjectRef::new("other", "spent");
        for _ in 0..5 {
            assert_eq!(allowances.claim(Duration::ZERO, &spent), Ok(()));
        }
        allowances.give_back(Duration::ZERO, &spent);
        assert_eq!(allowances.claim(Duration::ZERO, &spent), Ok(()));
        assert!(allowances.claim(Duration::ZERO, &spent).is_err());
    }

    #[test]
    fn debt_of_a_namespace_is_bounded() {
        let mut allowances = Allowances::new(OBJECT, NAMESPACE);
        let one = ObjectRef::new("n", "one");
        for _ in 0..10_000 {
            allowances.reserve(Duration::ZERO, &one);
        }
        assert!(allowances.reserve(Duration::ZERO, &one) <= LONGEST_WAIT + Duration::from_secs(3));
        assert!(
            allowances.reserve(Duration::ZERO, &ObjectRef::new("n", "two")) <= LONGEST_WAIT + Duration::from_secs(3)
        );
    }

    #[test]
    fn only_full_buckets_are_pruned() {
        let rate = |burst| Rate { burst, per_second: 1.0 };
        let mut allowances = Allowances::new(rate(2.0), rate(1e9));
        for i in 0..10 * PRUNE_FROM {
            let id = ObjectRef::new("tenant", &format!("new-{i}"));
            assert_eq!(allowances.try_take(Duration::from_millis(i as u64), &id), Ok(()));
        }
        // A bucket is full again after one second, in which 1,000 other objects were added.
        assert!(
            allowances.objects.len() <= 3 * PRUNE_FROM,
            "{}",
            allowances.objects.len()
        );
        let spent = ObjectRef::new("tenant", "spent");
        let now = Duration::from_mins(1);
        assert_eq!(allowances.try_take(now, &spent), Ok(()));
        assert_eq!(allowances.try_take(now, &spent), Ok(()));
        allowances.prune_at = 0;
        assert_eq!(allowances.try_take(now, &ObjectRef::new("tenant", "other")), Ok(()));
        assert!(allowances.try_take(now, &spent).is_err(), "bucket was pruned");
    }
}
