//! Generates keys: one at a time, because a key takes up to a second of CPU time, outside the threads that reconcile, and
//! for one namespace after another, so that the objects of one namespace do not delay those of another.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::domain::key::PrivateKey;
use crate::domain::object_ref::ObjectRef;

/// Keys that wait for their object. With more, the generator waits.
const MOST_READY: usize = 16;

/// A key that its object has not taken after this time is dropped, so that it does not stop the generator. The object
/// asks again.
const TAKEN_WITHIN: Duration = Duration::from_mins(1);

/// Generates keys for objects that ask for one.
pub struct KeyGenerator {
    state: Mutex<State>,
    /// A key was taken or dropped.
    room: Condvar,
    /// Generates a key. Fails only without a source of randomness; the object then asks again.
    make: fn() -> Option<PrivateKey>,
    wake: Box<dyn Fn(&ObjectRef) + Send + Sync>,
}

#[derive(Default)]
struct State {
    waiting: BTreeMap<Arc<str>, VecDeque<ObjectRef>>,
    /// The namespace of the last key.
    last: Arc<str>,
    ready: BTreeMap<ObjectRef, Ready>,
    /// The object whose key is being generated.
    working: Option<ObjectRef>,
    running: bool,
}

struct Ready {
    key: PrivateKey,
    since: Instant,
}

impl State {
    /// The next object, in the namespace after the last one.
    fn next(&mut self) -> Option<ObjectRef> {
        let after = (Excluded(self.last.clone()), Unbounded);
        let namespace = self.waiting.range(after).next().or_else(|| self.waiting.iter().next());
        let namespace = namespace?.0.clone();
        let line = self.waiting.get_mut(&namespace)?;
        let id = line.pop_front();
        if line.is_empty() {
            self.waiting.remove(&namespace);
        }
        self.last = namespace;
        id
    }

    fn is_waiting(&self, id: &ObjectRef) -> bool {
        let waits = || self.waiting.get(&id.namespace).is_some_and(|line| line.contains(id));
        self.working.as_ref() == Some(id) || waits()
    }

    /// Drops keys that wait for too long. Returns how long to wait for the next one if there is no room.
    fn make_room(&mut self) -> Option<Duration> {
        self.ready.retain(|_, ready| ready.since.elapsed() < TAKEN_WITHIN);
        let oldest = self.ready.values().map(|ready| ready.since.elapsed()).max();
        let is_full = self.ready.len() >= MOST_READY;
        oldest.filter(|_| is_full).map(|age| TAKEN_WITHIN.saturating_sub(age))
    }
}

impl KeyGenerator {
    /// A generator that calls `wake` when `make` has generated the key of an object.
    #[must_use]
    pub fn new(make: fn() -> Option<PrivateKey>, wake: Box<dyn Fn(&ObjectRef) + Send + Sync>) -> Self {
        Self {
            state: Mutex::default(),
            room: Condvar::new(),
            make,
            wake,
        }
    }

    /// The key of `id`, if it is ready. Otherwise `id` is woken when it is.
    pub fn take(self: &Arc<Self>, id: &ObjectRef) -> Option<PrivateKey> {
        let mut state = self.lock();
        if let Some(ready) = state.ready.remove(id) {
            self.room.notify_one();
            return Some(ready.key);
        }
        if !state.is_waiting(id) {
            let line = state.waiting.entry(id.namespace.clone()).or_default();
            line.push_back(id.clone());
        }
        if !state.running {
            state.running = true;
            let this = self.clone();
            tokio::task::spawn_blocking(move || this.generate());
        }
        None
    }

    /// Whether `id` waits for a key, or its key is ready.
    #[must_use]
    pub fn serves(&self, id: &ObjectRef) -> bool {
        let state = self.lock();
        state.ready.contains_key(id) || state.is_waiting(id)
    }

    /// Returns a key that could not be stored, for the next attempt.
    pub fn put_back(&self, id: &ObjectRef, key: PrivateKey) {
        let since = Instant::now();
        self.lock().ready.insert(id.clone(), Ready { key, since });
    }

    /// Drops the key of an object that needs none. Otherwise, its key would take the place of another object's.
    pub fn forget(&self, id: &ObjectRef) {
        let mut state = self.lock();
        if state.working.as_ref() == Some(id) {
            state.working = None;
        }
        state.ready.remove(id);
        if let Some(line) = state.waiting.get_mut(&id.namespace) {
            line.retain(|other| other != id);
            if line.is_empty() {
                state.waiting.remove(&id.namespace);
            }
        }
        self.room.notify_one();
    }

    /// Drops everything: this process has just become the leader, and every object asks again.
    pub fn clear(&self) {
        let mut state = self.lock();
        state.waiting.clear();
        state.ready.clear();
        state.working = None;
        self.room.notify_one();
    }

    fn generate(&self) {
        let _guard = Ended(self);
        loop {
            let mut state = self.lock();
            while let Some(wait) = state.make_room() {
                let waited = self.room.wait_timeout(state, wait);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            let Some(id) = state.next() else {
                state.running = false;
                return;
            };
            state.working = Some(id.clone());
            drop(state);
            let key = (self.make)();
            let mut state = self.lock();
            let is_wanted = state.working.take().is_some();
            if let Some(key) = key.filter(|_| is_wanted) {
                let since = Instant::now();
                state.ready.insert(id.clone(), Ready { key, since });
            }
            drop(state);
            (self.wake)(&id);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets the next object start the thread again if it ended by a panic.
struct Ended<'a>(&'a KeyGenerator);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut state = self.0.lock();
            (state.running, state.working) = (false, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;
    use crate::domain::key;

    fn generator(make: fn() -> Option<PrivateKey>) -> (Arc<KeyGenerator>, UnboundedReceiver<ObjectRef>) {
        let (woken, order) = unbounded_channel();
        let wake = Box::new(move |id: &ObjectRef| drop(woken.send(id.clone())));
        (Arc::new(KeyGenerator::new(make, wake)), order)
    }

    async fn next(order: &mut UnboundedReceiver<ObjectRef>) -> ObjectRef {
        let next = tokio::time::timeout(Duration::from_mins(1), order.recv()).await;
        next.expect("in time").expect("an object")
    }

    #[tokio::test]
    async fn namespaces_take_turns() {
        let (generator, mut order) = generator(key::generate);
        let id = |namespace: &str, n: usize| ObjectRef::new(namespace, &n.to_string());
        for n in 0..5 {
            assert!(generator.take(&id("noisy", n)).is_none());
            // It asks again before its key is ready.
            generator.take(&id("noisy", n));
        }
        assert!(generator.take(&id("quiet", 0)).is_none());
        let mut place = 0;
        while next(&mut order).await != id("quiet", 0) {
            place += 1;
        }
        assert!(place <= 2, "after {place} keys of the other namespace");
        assert!(generator.take(&id("quiet", 0)).is_some());
        assert!(generator.take(&id("noisy", 0)).is_some());
    }

    #[tokio::test]
    async fn objects_that_do_not_take_their_keys_do_not_stop_the_others() {
        let (generator, mut order) = generator(|| Some(vec![0].into()));
        let id = |n: usize| ObjectRef::new("shop", &format!("{n:02}"));
        for n in 0..=MOST_READY {
            generator.take(&id(n));
        }
        for n in 0..MOST_READY {
            assert_eq!(next(&mut order).await, id(n));
        }
        // The last one waits until another object takes its key, or no longer needs it.
        assert!(order.try_recv().is_err());
        generator.forget(&id(3));
        assert_eq!(next(&mut order).await, id(MOST_READY));
        assert!(generator.take(&id(3)).is_none(), "its key was dropped");
        // The runtime waits for the thread of the generator.
        generator.clear();
    }
}
