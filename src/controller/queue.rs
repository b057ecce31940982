//! The work queue: when an object is due, by events, timers and backoffs. `FairQueue` picks the due object that goes first.
//! The queue runs one reconcile per object at a time, and drops the watch events of the operator's own writes
//! (docs/adr/0006-own-priority-queue.md).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::domain::allowance::Allowances;
use crate::domain::backoff::{Backoff, Recovery};
use crate::domain::fair_queue::FairQueue;
use crate::domain::limits::Rate;
use crate::domain::object_ref::ObjectRef;
use crate::domain::priority::Priority;
use crate::domain::reason::Reason;
use crate::domain::retry::{Failed, PendingRetries, Wake};
use crate::ops::lease::LeadershipGuard;
use crate::ops::shutdown::Shutdown;
use crate::zitadel::Clock;

/// Longest sleep of a timer. The monotonic clock stops while a machine is suspended, and the wall clock can be set
/// (docs/adr/0006-own-priority-queue.md).
const MAX_SLEEP: Duration = Duration::from_secs(30);

/// Rate limit of the reconciles that changes of one object cause. People and controllers stay below it; a loop does not.
const CHANGES_OF_OBJECT: Rate = Rate {
    burst: 30.0,
    per_second: 1.0,
};

/// The same for all objects of a namespace together.
const CHANGES_OF_NAMESPACE: Rate = Rate {
    burst: 2_000.0,
    per_second: 50.0,
};

/// Most changes that are remembered during a reconcile. With more, the object is reconciled again.
const MAX_CHANGES: usize = 64;

/// Returns the priority of an object that has not failed, and the name of its instance.
pub type RankOf = Box<dyn Fn(&ObjectRef) -> (Priority, Arc<str>) + Send + Sync>;

/// Objects that wait for a reconcile, now or later.
pub struct Queue {
    state: Mutex<State>,
    ready: Notify,
    rank: RankOf,
    clock: Clock,
    started: Instant,
}

struct State {
    waiting: FairQueue,
    entries: HashMap<ObjectRef, Entry>,
    timers: BTreeSet<(Timestamp, ObjectRef)>,
    /// This replica is a standby: due objects do not count as late.
    is_standby: bool,
    /// When this replica became the leader.
    leader_since: Option<Instant>,
    /// Rate limits of changes.
    changes: Allowances,
}

#[derive(Default)]
#[allow(clippy::struct_excessive_bools, reason = "independent flags")]
struct Entry {
    running: bool,
    /// When it began to wait for its reconcile, or for the end of it.
    since: Option<Instant>,
    /// Whether it was woken during its reconcile. Wake-ups are not rate-limited.
    woken: bool,
    /// Resource versions of the changes during a reconcile; `None` for a change that has none.
    changes: Vec<Option<String>>,
    /// Resource versions that the last reconcile wrote and whose watch event has not arrived yet.
    written: Vec<String>,
    timer: Option<Timestamp>,
    /// Whether the timer is that of a backoff.
    retrying: bool,
    /// Whether it exceeded the rate limit of changes: its next reconcile waits for the timer.
    throttled: bool,
    /// Backoffs by the name of what failed.
    backoffs: BTreeMap<String, Backoff>,
    /// What recovered during the reconcile.
    recovery: Option<Recovery>,
}

/// A reconcile that runs. It ends with [`RunningReconcile::finish`]. If it is dropped before (a panic, a timeout), it counts
/// as a transient failure.
pub struct RunningReconcile {
    /// The object.
    pub id: ObjectRef,
    /// Failures whose backoff still runs.
    pub pending_retries: PendingRetries,
    queue: Arc<Queue>,
    ended: bool,
}

impl Entry {
    fn pending_retries(&self) -> PendingRetries {
        self.backoffs.iter().map(|(what, b)| (what.clone(), b.hold)).collect()
    }

    /// Records a change during a reconcile.
    fn changed_while_running(&mut self, version: Option<&str>) {
        if self.changes.len() < MAX_CHANGES {
            self.changes.push(version.map(str::to_owned));
        } else {
            // One change without a version stands for all: it never equals an own write.
            self.changes.truncate(1);
            self.changes[0] = None;
        }
    }

    /// Resets the backoffs after a change of an input.
    fn reset_backoffs(&mut self, now: Timestamp) {
        let before = std::mem::take(&mut self.backoffs);
        self.backoffs = before
            .into_iter()
            .filter_map(|(what, b)| Some((what, b.anew(now)?)))
            .collect();
        self.retrying = false;
        self.throttled = false;
    }

    /// Ends the backoffs whose cause is gone. Returns whether there were any.
    fn recover(&mut self, recovery: Recovery, now: Timestamp) -> bool {
        let before = std::mem::take(&mut self.backoffs);
        let left = before.iter().filter_map(|(what, backoff)| {
            let left = backoff.after_recovery(recovery, now)?;
            Some((what.clone(), left))
        });
        self.backoffs = left.collect();
        let recovered = self.backoffs != before;
        if recovered {
            self.retrying = false;
            self.throttled = false;
        }
        recovered
    }
}

impl State {
    fn new(slots: usize) -> Self {
        Self {
            waiting: FairQueue::new(slots),
            entries: HashMap::new(),
            timers: BTreeSet::new(),
            is_standby: false,
            leader_since: None,
            changes: Allowances::new(CHANGES_OF_OBJECT, CHANGES_OF_NAMESPACE),
        }
    }

    /// Queues an object that changed: now, or when the rate limit of changes allows it.
    fn push_changed(
        &mut self,
        id: &ObjectRef,
        (priority, instance): &(Priority, Arc<str>),
        started: Instant,
        now: Timestamp,
    ) {
        let entry = self.entries.entry(id.clone()).or_default();
        if entry.throttled {
            return;
        }
        let wait = if self.waiting.contains(id) {
            Duration::ZERO
        } else {
            self.changes.reserve(started.elapsed(), id)
        };
        if wait.is_zero() {
            entry.reset_backoffs(now);
            entry.since.get_or_insert_with(Instant::now);
            self.waiting.push(id, *priority, instance);
            return;
        }
        entry.throttled = true;
        let at = now + SignedDuration::try_from(wait).unwrap_or(SignedDuration::MAX);
        let at = entry.timer.map_or(at, |timer| timer.min(at));
        if let Some(before) = entry.timer.take() {
            self.timers.remove(&(before, id.clone()));
        }
        entry.timer = Some(at);
        self.timers.insert((at, id.clone()));
    }
}

impl Queue {
    /// A queue for at most so many reconciles at once.
    #[must_use]
    pub fn new(slots: usize, rank: RankOf, clock: Clock) -> Self {
        Self {
            state: Mutex::new(State::new(slots)),
            ready: Notify::new(),
            rank,
            clock,
            started: Instant::now(),
        }
    }

    /// Handles a change of something that `id` depends on. `version` is its resource version, if it has one: a version that
    /// the operator wrote itself starts no reconcile. Changes are rate-limited, because a tenant can cause them in a loop.
    pub fn changed(&self, id: &ObjectRef, version: Option<&str>) {
        let rank = (self.rank)(id);
        let mut state = self.lock();
        let entry = state.entries.entry(id.clone()).or_default();
        if let Some(place) = version.and_then(|v| entry.written.iter().position(|w| w == v)) {
            entry.written.swap_remove(place);
            return;
        }
        if entry.running {
            entry.changed_while_running(version);
            return;
        }
        state.push_changed(id, &rank, self.started, self.clock.now());
        self.ready.notify_one();
    }

    /// Queues a reconcile of `id` without a rate limit: its instance changed, it was deleted, or this process became the
    /// leader.
    pub fn wake(&self, id: &ObjectRef) {
        let (priority, instance) = (self.rank)(id);
        let mut state = self.lock();
        let state = &mut *state;
        let entry = state.entries.entry(id.clone()).or_default();
        if entry.running {
            entry.woken = true;
            return;
        }
        entry.reset_backoffs(self.clock.now());
        entry.since.get_or_insert_with(Instant::now);
        state.waiting.push(id, priority, &instance);
        self.ready.notify_one();
    }

    /// Handles a deleted object. A standby drops its entry at once, because no reconcile runs there to drop it.
    pub fn gone(&self, id: &ObjectRef) {
        {
            let mut state = self.lock();
            let state = &mut *state;
            if state.is_standby && state.entries.get(id).is_none_or(|entry| !entry.running) {
                state.waiting.remove(id);
                if let Some(at) = state.entries.remove(id).and_then(|entry| entry.timer) {
                    state.timers.remove(&(at, id.clone()));
                }
                return;
            }
        }
        self.wake(id);
    }

    /// Queues a reconcile of each of these.
    pub fn wake_all(&self, ids: Vec<ObjectRef>) {
        for id in ids {
            self.wake(&id);
        }
    }

    /// Wakes those whose backoff this recovery ends, now or at the end of their reconcile.
    pub fn wake_failing(&self, ids: Vec<ObjectRef>, recovery: Recovery) {
        let now = self.clock.now();
        for id in ids {
            let (priority, instance) = (self.rank)(&id);
            let mut state = self.lock();
            let state = &mut *state;
            let Some(entry) = state.entries.get_mut(&id) else {
                continue;
            };
            if entry.running {
                entry.recovery = entry.recovery.max(Some(recovery));
            } else if entry.recover(recovery, now) {
                entry.since.get_or_insert_with(Instant::now);
                state.waiting.push(&id, priority, &instance);
                self.ready.notify_one();
            }
        }
    }

    /// Waits for the next object.
    pub async fn next(self: &Arc<Self>) -> RunningReconcile {
        loop {
            let sleep = match self.take(self.clock.now()) {
                Ok((id, pending_retries)) => {
                    return RunningReconcile {
                        id,
                        pending_retries,
                        queue: self.clone(),
                        ended: false,
                    };
                }
                Err(sleep) => sleep,
            };
            // After the sleep or a notification, check again.
            let _ = tokio::time::timeout(sleep, self.ready.notified()).await;
        }
    }

    /// The load, counted when it is read.
    #[must_use]
    pub fn load(&self) -> Load {
        let (now, clock) = (Instant::now(), self.clock.now());
        let state = self.lock();
        let entries = state.entries.values();
        let since = entries.filter_map(|e| Some(now.duration_since(e.since?))).max();
        // A due timer that has not been processed yet.
        let due = state.timers.first().map(|(at, _)| clock.duration_since(*at));
        let due = due.and_then(|due| Duration::try_from(due).ok());
        let leading_for = state.leader_since.map_or(Duration::MAX, |at| now.duration_since(at));
        let leading_for = if state.is_standby { Duration::ZERO } else { leading_for };
        Load {
            waiting: state.waiting.len(),
            running: state.waiting.running(),
            oldest: since.max(due).unwrap_or_default().min(leading_for),
        }
    }

    /// Waits for the next object, and until this process leads.
    async fn next_as_leader(self: &Arc<Self>, leadership: &LeadershipGuard) -> RunningReconcile {
        loop {
            if !leadership.is_leading() {
                self.lock().is_standby = true;
                leadership.leading().await;
                let mut state = self.lock();
                state.is_standby = false;
                state.leader_since = Some(Instant::now());
            }
            if let Ok(reconcile) = leadership.while_leading(self.next()).await {
                return reconcile;
            }
        }
    }

    /// Runs reconciles while this process leads and until shutdown, then waits for those in flight for at most `drain`. A
    /// reconcile that panics or takes longer than `limit` ends alone
    /// (docs/adr/0017-crypto-backend-and-kube-defaults.md).
    pub async fn work<F, R>(
        self: Arc<Self>,
        limit: Duration,
        leadership: LeadershipGuard,
        mut shutdown: Shutdown,
        drain: impl Fn() -> Duration,
        run: R,
    ) where
        R: Fn(ObjectRef, PendingRetries) -> F,
        F: Future<Output = Done> + Send + 'static,
    {
        let mut running = JoinSet::new();
        loop {
            while running.try_join_next().is_some() {}
            let reconcile = tokio::select! {
                biased;
                () = shutdown.requested() => break,
                reconcile = self.next_as_leader(&leadership) => reconcile,
            };
            let ended = AssertUnwindSafe(tokio::time::timeout(
                limit,
                run(reconcile.id.clone(), reconcile.pending_retries.clone()),
            ))
            .catch_unwind();
            running.spawn(async move {
                match ended.await {
                    Ok(Ok(done)) => reconcile.finish(done),
                    Ok(Err(_)) => {
                        tracing::warn!(object = %reconcile.id, "reconcile exceeded its time limit and was cancelled");
                    }
                    // The panic hook logged the location.
                    Err(_) => tracing::error!(object = %reconcile.id, "reconcile panicked"),
                }
            });
        }
        let _ = tokio::time::timeout(drain(), async { while running.join_next().await.is_some() {} }).await;
    }

    /// The pending retries and the timer of an object.
    #[cfg(test)]
    pub fn waits(&self, id: &ObjectRef) -> (PendingRetries, Option<Timestamp>) {
        let state = self.lock();
        let entry = state.entries.get(id);
        entry.map_or_else(Default::default, |entry| (entry.pending_retries(), entry.timer))
    }

    fn take(&self, now: Timestamp) -> Result<(ObjectRef, PendingRetries), Duration> {
        let mut state = self.lock();
        let state = &mut *state;
        while let Some((at, _)) = state.timers.first()
            && *at <= now
            && let Some((_, id)) = state.timers.pop_first()
        {
            if let Some(entry) = state.entries.get_mut(&id) {
                entry.timer = None;
                let (priority, instance) = (self.rank)(&id);
                // An object with a valid token keeps its priority. Otherwise it would wait behind all objects without one.
                if entry.throttled {
                    entry.reset_backoffs(now);
                }
                let last = entry.retrying && !matches!(priority, Priority::Refresh(_));
                let priority = if last { Priority::Retry } else { priority };
                if !entry.running {
                    entry.since.get_or_insert_with(Instant::now);
                    state.waiting.push(&id, priority, &instance);
                }
            }
        }
        if let Some(id) = state.waiting.pop(now) {
            let entry = state.entries.entry(id.clone()).or_default();
            entry.running = true;
            entry.woken = false;
            entry.changes.clear();
            if let Some(at) = entry.timer.take() {
                state.timers.remove(&(at, id.clone()));
            }
            return Ok((id, entry.pending_retries()));
        }
        let next = state.timers.first().map(|(at, _)| at.duration_since(now));
        // One millisecond more, so that rounding never ends the sleep too early.
        let sleep = next
            .and_then(|d| Duration::try_from(d).ok())
            .map(|d| d + Duration::from_millis(1));
        Err(sleep.unwrap_or(MAX_SLEEP).min(MAX_SLEEP))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The load of a queue.
#[derive(Clone, Copy, Debug, Default)]
pub struct Load {
    /// Due objects that wait for a reconcile.
    pub waiting: usize,
    /// Reconciles that run.
    pub running: usize,
    /// How long the object that is due longest has waited for its reconcile, or for the end of it.
    pub oldest: Duration,
}

/// How a reconcile ended.
#[derive(Debug, Default)]
pub struct Done {
    /// When to reconcile again, and what failed.
    pub wake: Wake,
    /// Resource versions that the reconcile wrote.
    pub written: Vec<String>,
    /// Number of token requests.
    pub mints: usize,
    /// Whether to forget the object: it was deleted, or this operator does not serve it.
    pub forget: bool,
    /// Whether the reconcile was aborted before it handled all tokens; their backoffs remain.
    pub aborted: bool,
}

impl Done {
    /// The reconcile was aborted; the backoffs of earlier failures remain.
    #[must_use]
    pub fn aborted(reason: Option<Reason>) -> Self {
        Self {
            wake: Wake {
                at: None,
                failed: reason.into_iter().map(|reason| Failed::now("", reason)).collect(),
            },
            aborted: true,
            ..Self::default()
        }
    }

    /// The object needs no reconcile until it changes.
    #[must_use]
    pub fn forget() -> Self {
        Self {
            forget: true,
            ..Self::default()
        }
    }
}

impl RunningReconcile {
    /// Ends the reconcile.
    pub fn finish(mut self, done: Done) {
        self.end(done);
    }

    fn end(&mut self, mut done: Done) {
        self.ended = true;
        let now = self.queue.clock.now();
        let (priority, instance) = (self.queue.rank)(&self.id);
        let mut state = self.queue.lock();
        let state = &mut *state;
        state.waiting.finished(&self.id, done.mints);
        let Some(entry) = state.entries.get_mut(&self.id) else {
            return;
        };
        entry.running = false;
        entry.since = None;
        // Events of the operator's own writes are dropped; those that have not arrived yet are expected.
        let changes = std::mem::take(&mut entry.changes);
        let (echoes, foreign): (Vec<_>, Vec<_>) = changes
            .into_iter()
            .partition(|v| v.as_ref().is_some_and(|v| done.written.contains(v)));
        done.written.retain(|w| !echoes.contains(&Some(w.clone())));
        entry.written = done.written;
        if foreign.is_empty() && !entry.woken && done.forget {
            state.entries.remove(&self.id);
            self.queue.ready.notify_one();
            return;
        }
        let before = std::mem::take(&mut entry.backoffs);
        entry.backoffs = done
            .wake
            .failed
            .into_iter()
            .map(|failed| {
                let seed = format!("{}/{}", self.id, failed.what);
                let backoff = Backoff::after(&failed, before.get(&failed.what), &seed, now);
                (failed.what, backoff)
            })
            .collect();
        if done.aborted {
            for (what, backoff) in before {
                entry.backoffs.entry(what).or_insert(backoff);
            }
        }
        let recovered = entry.recovery.take();
        let recovered = recovered.is_some_and(|recovery| entry.recover(recovery, now));
        // After an abort, expired backoffs are skipped: their tokens were not reached, and the abort's own backoff counts.
        let holds = entry.backoffs.values().map(|b| b.hold.until);
        let retry = holds.filter(|at| !done.aborted || *at > now).min();
        entry.retrying = retry.is_some_and(|retry| done.wake.at.is_none_or(|at| retry < at));
        if let Some(at) = retry.into_iter().chain(done.wake.at).min() {
            entry.timer = Some(at);
            state.timers.insert((at, self.id.clone()));
        }
        if recovered {
            entry.since = Some(Instant::now());
            state.waiting.push(&self.id, priority, &instance);
        }
        if std::mem::take(&mut entry.woken) {
            entry.reset_backoffs(now);
            entry.since = Some(Instant::now());
            state.waiting.push(&self.id, priority, &instance);
        } else if !foreign.is_empty() {
            state.push_changed(&self.id, &(priority, instance), self.queue.started, now);
        }
        self.queue.ready.notify_one();
    }
}

impl Drop for RunningReconcile {
    fn drop(&mut self) {
        if !self.ended {
            self.end(Done::aborted(Some(Reason::Internal)));
        }
    }
}

#[cfg(test)]
mod tests;
