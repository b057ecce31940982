//! The queue: which object gets a pass, when, and after how long again. It owns delays and back-off, runs one pass per
//! object at a time, and knows the echoes of our own writes (docs/adr/0006-own-priority-queue.md).

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

/// Timers are looked at again after this at the latest: the monotonic clock stops while a machine sleeps and the wall
/// clock jumps, so that no sleep is trusted for long (docs/adr/0006-own-priority-queue.md).
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// Reconciles for changes of one object. A person or a controller at work makes fewer; a loop makes hundreds.
const CHANGES_OF_OBJECT: Rate = Rate {
    burst: 30.0,
    per_second: 1.0,
};

/// Reconciles for changes of all objects of a namespace.
const CHANGES_OF_NAMESPACE: Rate = Rate {
    burst: 2_000.0,
    per_second: 50.0,
};

/// So many changes during a reconcile are told from echoes of our own writes. With more, there was another.
const MAX_DIRTY: usize = 64;

/// Where an object belongs that has not failed: its priority, and the name of its instance.
pub type RankOf = Box<dyn Fn(&ObjectRef) -> (Priority, Arc<str>) + Send + Sync>;

/// Objects, and when they are due.
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
    /// Another replica does the work that is due: it is not late.
    standing_by: bool,
    /// When it ceased to.
    took_over: Option<Instant>,
    /// How often changes may lead to a reconcile.
    changes: Allowances,
}

#[derive(Default)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "each says something else, and most go together with others"
)]
struct Entry {
    running: bool,
    /// Since when it waits for its pass, or for the end of it.
    since: Option<Instant>,
    /// It was woken during its reconcile for a reason that is not limited.
    woken: bool,
    /// Versions of what changed while a pass ran; without a version: something that has none.
    dirty: Vec<Option<String>>,
    /// Versions that our own last pass wrote and whose echo has not come yet.
    written: Vec<String>,
    timer: Option<Timestamp>,
    /// Whether the timer is that of a back-off.
    retrying: bool,
    /// It changed too often: its next reconcile waits for the timer.
    throttled: bool,
    /// What failed, by name.
    backoffs: BTreeMap<String, Backoff>,
    /// What recovered while a pass ran.
    recovery: Option<Recovery>,
}

/// One pass over one object, to be ended by [`RunningReconcile::done`]. Dropped without it (a panic, a timeout), it counts as a
/// transient failure.
pub struct RunningReconcile {
    /// Whose turn it is.
    pub id: ObjectRef,
    /// What failed before and is not to be tried yet.
    pub pending_retries: PendingRetries,
    queue: Arc<Queue>,
    ended: bool,
}

impl Entry {
    fn pending_retries(&self) -> PendingRetries {
        self.backoffs.iter().map(|(what, b)| (what.clone(), b.hold)).collect()
    }

    /// Something changed while a reconcile runs.
    fn dirtied(&mut self, version: Option<&str>) {
        if self.dirty.len() < MAX_DIRTY {
            self.dirty.push(version.map(str::to_owned));
        } else {
            self.dirty.truncate(1);
            self.dirty[0] = None;
        }
    }

    /// A change of input begins the back-offs anew.
    fn begin_anew(&mut self, now: Timestamp) {
        let before = std::mem::take(&mut self.backoffs);
        self.backoffs = before
            .into_iter()
            .filter_map(|(what, b)| Some((what, b.anew(now)?)))
            .collect();
        self.retrying = false;
        self.throttled = false;
    }

    /// Ends the back-offs whose cause is over. Returns whether there were any.
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
            standing_by: false,
            took_over: None,
            changes: Allowances::new(CHANGES_OF_OBJECT, CHANGES_OF_NAMESPACE),
        }
    }

    /// An object that changed waits for a reconcile: from now on, or from when its changes allow one.
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
            entry.begin_anew(now);
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

    /// Something that decides about `id` changed. `version` is the resource version of what changed, if it has one: a
    /// version that we wrote ourselves wakes nobody. A tenant can make changes in a loop, so that they are limited.
    pub fn changed(&self, id: &ObjectRef, version: Option<&str>) {
        let rank = (self.rank)(id);
        let mut state = self.lock();
        let entry = state.entries.entry(id.clone()).or_default();
        if let Some(place) = version.and_then(|v| entry.written.iter().position(|w| w == v)) {
            entry.written.swap_remove(place);
            return;
        }
        if entry.running {
            entry.dirtied(version);
            return;
        }
        state.push_changed(id, &rank, self.started, self.clock.now());
        self.ready.notify_one();
    }

    /// `id` is to be reconciled, however often it was: its instance changed, it is gone, this process leads now.
    pub fn wake(&self, id: &ObjectRef) {
        let (priority, instance) = (self.rank)(id);
        let mut state = self.lock();
        let state = &mut *state;
        let entry = state.entries.entry(id.clone()).or_default();
        if entry.running {
            entry.woken = true;
            return;
        }
        entry.begin_anew(self.clock.now());
        entry.since.get_or_insert_with(Instant::now);
        state.waiting.push(id, priority, &instance);
        self.ready.notify_one();
    }

    /// An object is gone. Its pass forgets it; while another replica leads there are no passes, and nothing is to grow.
    pub fn gone(&self, id: &ObjectRef) {
        {
            let mut state = self.lock();
            let state = &mut *state;
            if state.standing_by && state.entries.get(id).is_none_or(|entry| !entry.running) {
                state.waiting.remove(id);
                if let Some(at) = state.entries.remove(id).and_then(|entry| entry.timer) {
                    state.timers.remove(&(at, id.clone()));
                }
                return;
            }
        }
        self.wake(id);
    }

    /// Each of these is to be reconciled.
    pub fn wake_all(&self, ids: Vec<ObjectRef>) {
        for id in ids {
            self.wake(&id);
        }
    }

    /// What made them fail is over: wakes those of them whose back-offs that ends, now or at the end of their pass.
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

    /// The next object; waits until there is one.
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
            // Either way the state is looked at again.
            let _ = tokio::time::timeout(sleep, self.ready.notified()).await;
        }
    }

    /// How much there is to do. It is counted when it is asked for.
    #[must_use]
    pub fn load(&self) -> Load {
        let (now, clock) = (Instant::now(), self.clock.now());
        let state = self.lock();
        let entries = state.entries.values();
        let since = entries.filter_map(|e| Some(now.duration_since(e.since?))).max();
        // One that is due and was not even noticed: nobody takes.
        let due = state.timers.first().map(|(at, _)| clock.duration_since(*at));
        let due = due.and_then(|due| Duration::try_from(due).ok());
        let ours = state.took_over.map_or(Duration::MAX, |at| now.duration_since(at));
        let ours = if state.standing_by { Duration::ZERO } else { ours };
        Load {
            waiting: state.waiting.len(),
            running: state.waiting.running(),
            oldest: since.max(due).unwrap_or_default().min(ours),
        }
    }

    /// The next object; waits until there is one, and until this process leads.
    async fn next_as_leader(self: &Arc<Self>, leadership: &LeadershipGuard) -> RunningReconcile {
        loop {
            if !leadership.is_leading() {
                self.lock().standing_by = true;
                leadership.leading().await;
                let mut state = self.lock();
                state.standing_by = false;
                state.took_over = Some(Instant::now());
            }
            if let Ok(reconcile) = leadership.while_leading(self.next()).await {
                return reconcile;
            }
        }
    }

    /// Runs passes while this process leads and until shutdown, then waits for those under way as long as `drain` says
    /// then. A pass that panics or takes longer than `limit` ends alone (docs/adr/0017-crypto-backend-and-kube-defaults.md).
    pub async fn work<F, P>(
        self: Arc<Self>,
        limit: Duration,
        leadership: LeadershipGuard,
        mut shutdown: Shutdown,
        drain: impl Fn() -> Duration,
        pass: P,
    ) where
        P: Fn(ObjectRef, PendingRetries) -> F,
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
            let pass = AssertUnwindSafe(tokio::time::timeout(
                limit,
                pass(reconcile.id.clone(), reconcile.pending_retries.clone()),
            ))
            .catch_unwind();
            running.spawn(async move {
                match pass.await {
                    Ok(Ok(done)) => reconcile.done(done),
                    Ok(Err(_)) => tracing::warn!(object = %reconcile.id, "a pass took too long and was ended"),
                    // The panic hook has told where.
                    Err(_) => tracing::error!(object = %reconcile.id, "a pass panicked"),
                }
            });
        }
        let _ = tokio::time::timeout(drain(), async { while running.join_next().await.is_some() {} }).await;
    }

    /// What an object waits for: its retries, and the next of its timers.
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
                // A token that is still good keeps its rank, else it would wait behind all that have none.
                if entry.throttled {
                    entry.begin_anew(now);
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
            entry.dirty.clear();
            if let Some(at) = entry.timer.take() {
                state.timers.remove(&(at, id.clone()));
            }
            return Ok((id, entry.pending_retries()));
        }
        let next = state.timers.first().map(|(at, _)| at.duration_since(now));
        // A millisecond more, so that rounding never wakes us just before the time.
        let sleep = next
            .and_then(|d| Duration::try_from(d).ok())
            .map(|d| d + Duration::from_millis(1));
        Err(sleep.unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a queue has to do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Load {
    /// Objects that are due and wait for a pass.
    pub waiting: usize,
    /// Passes under way.
    pub running: usize,
    /// For how long the one that is due longest waits for its pass, or for the end of it.
    pub oldest: Duration,
}

/// How a pass ended.
#[derive(Debug, Default)]
pub struct Done {
    /// When to look again, and what failed.
    pub wake: Wake,
    /// Versions that the pass wrote.
    pub written: Vec<String>,
    /// How many tokens it asked for.
    pub mints: usize,
    /// The object is gone or not ours: nothing is to be remembered of it.
    pub forget: bool,
    /// The pass did not get far enough to say what became of what failed before.
    pub broken_off: bool,
}

impl Done {
    /// The pass broke off; what failed before is still held back.
    #[must_use]
    pub fn broken_off(reason: Option<Reason>) -> Self {
        Self {
            wake: Wake {
                at: None,
                failed: reason.into_iter().map(|reason| Failed::now("", reason)).collect(),
            },
            broken_off: true,
            ..Self::default()
        }
    }

    /// There is nothing to do for this object, now or later.
    #[must_use]
    pub fn forget() -> Self {
        Self {
            forget: true,
            ..Self::default()
        }
    }
}

impl RunningReconcile {
    /// Ends the turn.
    pub fn done(mut self, done: Done) {
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
        // Echoes that came while the pass ran are no news; those that have not come yet are waited for.
        let dirty = std::mem::take(&mut entry.dirty);
        let (echoes, news): (Vec<_>, Vec<_>) = dirty
            .into_iter()
            .partition(|v| v.as_ref().is_some_and(|v| done.written.contains(v)));
        done.written.retain(|w| !echoes.contains(&Some(w.clone())));
        entry.written = done.written;
        if news.is_empty() && !entry.woken && done.forget {
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
        if done.broken_off {
            for (what, backoff) in before {
                entry.backoffs.entry(what).or_insert(backoff);
            }
        }
        let recovered = entry.recovery.take();
        let recovered = recovered.is_some_and(|recovery| entry.recover(recovery, now));
        // One that has run, and that a pass which broke off did not come to, waits for what broke it off.
        let holds = entry.backoffs.values().map(|b| b.hold.until);
        let retry = holds.filter(|at| !done.broken_off || *at > now).min();
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
            entry.begin_anew(now);
            entry.since = Some(Instant::now());
            state.waiting.push(&self.id, priority, &instance);
        } else if !news.is_empty() {
            state.push_changed(&self.id, &(priority, instance), self.queue.started, now);
        }
        self.queue.ready.notify_one();
    }
}

impl Drop for RunningReconcile {
    fn drop(&mut self) {
        if !self.ended {
            self.end(Done::broken_off(Some(Reason::Internal)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue() -> Arc<Queue> {
        let rank = Box::new(|_: &ObjectRef| (Priority::FirstToken, "main".into()));
        Arc::new(Queue::new(16, rank, Clock::default()))
    }

    fn id(name: &str) -> ObjectRef {
        ObjectRef::new("ns", name)
    }

    fn nothing(queue: &Arc<Queue>) -> bool {
        queue.next().now_or_never().is_none()
    }

    fn failed(failed: Failed) -> Done {
        Done {
            wake: Wake {
                at: None,
                failed: vec![failed],
            },
            ..Done::default()
        }
    }

    fn wrote(versions: &[&str]) -> Done {
        Done {
            written: versions.iter().map(ToString::to_string).collect(),
            ..Done::default()
        }
    }

    #[tokio::test]
    async fn echoes_of_our_own_writes_wake_nobody() {
        let queue = queue();
        queue.changed(&id("a"), Some("1"));
        let reconcile = queue.next().await;
        // One echo overtakes the answer to the write, the other comes later.
        queue.changed(&id("a"), Some("7"));
        reconcile.done(wrote(&["7", "8"]));
        assert!(nothing(&queue));
        queue.changed(&id("a"), Some("8"));
        assert!(nothing(&queue));
        // The same version again is news: nobody else can have it, but a relist may show it.
        queue.changed(&id("a"), Some("9"));
        assert_eq!(queue.next().await.id, id("a"));
    }

    #[tokio::test]
    async fn one_pass_at_a_time_and_news_meanwhile_is_not_lost() {
        let queue = queue();
        queue.changed(&id("a"), Some("1"));
        let reconcile = queue.next().await;
        queue.changed(&id("a"), Some("2"));
        assert!(nothing(&queue));
        reconcile.done(Done::default());
        let reconcile = queue.next().await;
        reconcile.done(Done::default());
        assert!(nothing(&queue));
    }

    #[tokio::test]
    async fn a_pass_that_panics_or_hangs_ends_alone() {
        let queue = queue();
        let (sender, mut ended) = tokio::sync::mpsc::unbounded_channel();
        let shutdown = Shutdown::on_signal().expect("signals");
        let limit = Duration::from_millis(50);
        for name in ["panics", "hangs", "works"] {
            queue.wake(&id(name));
        }
        let pass = move |id: ObjectRef, _| {
            let sender = sender.clone();
            async move {
                match &*id.name {
                    "panics" => panic!("as it should"),
                    "hangs" => std::future::pending().await,
                    _ => sender.send(()).expect("received"),
                }
                Done::default()
            }
        };
        let leadership = LeadershipGuard::always(shutdown.clone());
        let work = tokio::spawn(queue.clone().work(limit, leadership, shutdown, Duration::default, pass));
        ended.recv().await.expect("the one that works");
        while queue.load().running > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        queue.wake(&id("works"));
        ended.recv().await.expect("once more");
        let failed = |name: &str| queue.lock().entries[&id(name)].backoffs[""].failures;
        assert_eq!((failed("panics"), failed("hangs")), (1, 1));
        work.abort();
    }

    #[tokio::test]
    async fn what_is_due_and_not_done_is_told() {
        let queue = queue();
        assert_eq!(queue.load().oldest, Duration::ZERO);
        for name in ["a", "b", "c", "d"] {
            queue.wake(&id(name));
        }
        // One namespace has three of the four slots.
        let reconcile = queue.next().await;
        let busy = [queue.next().await, queue.next().await];
        tokio::time::sleep(Duration::from_millis(30)).await;
        let load = queue.load();
        assert_eq!((load.waiting, load.running), (1, 3));
        assert!(load.oldest >= Duration::from_millis(30));
        // News during a pass is due from its end on.
        queue.wake(&reconcile.id.clone());
        reconcile.done(Done::default());
        for reconcile in busy {
            reconcile.done(Done::default());
        }
        let load = queue.load();
        assert_eq!((load.waiting, load.running), (2, 0));
        for _ in 0..2 {
            queue.next().await.done(Done::default());
        }
        assert_eq!(queue.load().oldest, Duration::ZERO);
        // A timer that nobody looks at.
        queue.wake(&id("a"));
        let mut done = Done::default();
        done.wake.at = Some(Timestamp::now() - SignedDuration::from_secs(7));
        queue.next().await.done(done);
        assert!(queue.load().oldest >= Duration::from_secs(7));
    }

    #[tokio::test]
    async fn changes_in_a_loop_are_limited_and_the_last_one_counts() {
        let queue = queue();
        let mut reconciles = 0;
        for _ in 0..100 {
            queue.changed(&id("a"), Some("7"));
            if let Ok((id, pending_retries)) = queue.take(Timestamp::now()) {
                let reconcile = RunningReconcile {
                    id,
                    pending_retries,
                    queue: queue.clone(),
                    ended: false,
                };
                // Another one comes meanwhile.
                queue.changed(&reconcile.id.clone(), Some("8"));
                reconcile.done(failed(Failed::now("t", Reason::KeyRejected)));
                reconciles += 1;
            }
        }
        assert!((30..35).contains(&reconciles), "{reconciles}");
        {
            let state = queue.lock();
            assert!(state.entries[&id("a")].throttled);
            // What it waits for is near, though what failed waits for ten minutes.
            let (at, _) = state.timers.first().expect("a timer");
            assert!(*at < Timestamp::now() + SignedDuration::from_secs(3));
        }
        // Others are not concerned, and neither is what no tenant can repeat.
        queue.changed(&id("b"), None);
        assert_eq!(queue.next().await.id, id("b"));
        queue.wake(&id("a"));
        assert_eq!(queue.next().await.id, id("a"));
    }

    #[tokio::test]
    async fn of_what_goes_while_another_leads_nothing_is_kept() {
        let queue = queue();
        for name in ["a", "b"] {
            queue.wake(&id(name));
        }
        queue.lock().standing_by = true;
        queue.gone(&id("a"));
        queue.gone(&id("never seen"));
        assert_eq!(queue.lock().entries.len(), 1);
        queue.lock().standing_by = false;
        assert_eq!(queue.next().await.id, id("b"));
        assert!(nothing(&queue));
    }

    #[tokio::test]
    async fn a_dropped_turn_is_retried_and_a_forgotten_object_is_not() {
        let queue = queue();
        queue.wake(&id("a"));
        queue.wake(&id("b"));
        queue.wake(&id("c"));
        let (a, b, c) = (queue.next().await, queue.next().await, queue.next().await);
        drop(a);
        b.done(Done::forget());
        // It came back while its end was looked at.
        queue.wake(&id("c"));
        c.done(Done::forget());
        let c = queue.next().await;
        assert_eq!(c.id, id("c"));
        c.done(Done::default());
        let state = queue.lock();
        assert_eq!(state.timers.len(), 1);
        assert!(!state.entries.contains_key(&id("b")));
        assert_eq!(state.entries[&id("a")].backoffs[""].failures, 1);
    }

    #[tokio::test]
    async fn a_pass_that_breaks_off_is_not_made_again_at_once_for_what_it_did_not_come_to() {
        let queue = queue();
        queue.wake(&id("a"));
        let past = Failed {
            not_after: Some(Timestamp::now()),
            ..Failed::now("t", Reason::ServerError)
        };
        queue.next().await.done(failed(past));
        let again = queue.next().await;
        assert!(again.pending_retries.contains_key("t"));
        again.done(Done::broken_off(Some(Reason::APIServerUnavailable)));
        assert!(nothing(&queue), "in a second or so");
        // What wakes it is sure to come.
        queue.wake(&id("a"));
        queue.next().await.done(Done::broken_off(None));
        assert!(nothing(&queue));
    }

    #[tokio::test]
    async fn those_that_failed_are_woken_and_those_whose_passes_are_not_over() {
        let queue = queue();
        for name in ["well", "failed", "running"] {
            queue.wake(&id(name));
        }
        let turns = [queue.next().await, queue.next().await, queue.next().await];
        let [well, fails, running] = turns;
        well.done(Done::default());
        fails.done(failed(Failed::now("t", Reason::InstanceUnreachable)));
        queue.wake_failing(
            ["well", "failed", "running", "unknown"].map(id).into(),
            Recovery::Instance,
        );
        let again = queue.next().await;
        assert_eq!(again.id, id("failed"));
        assert!(again.pending_retries.is_empty() && nothing(&queue));
        // It was refused while the way was closed, and tells so only now.
        running.done(failed(Failed::now("t", Reason::InstanceUnreachable)));
        assert_eq!(queue.next().await.id, id("running"));
        assert!(nothing(&queue));
    }

    #[tokio::test]
    async fn a_breaker_that_closes_brings_back_what_it_refused_and_nothing_that_failed_by_itself() {
        let queue = queue();
        let names = ["failed", "refused", "running"];
        for name in names {
            queue.wake(&id(name));
        }
        let failing = Failed::now("failing", Reason::ServerError);
        let refused = Failed {
            what: "refused".to_owned(),
            not_before: Some(Timestamp::now() + SignedDuration::from_mins(5)),
            deferred: true,
            ..failing.clone()
        };
        let mut both = failed(failing.clone());
        both.wake.failed.push(refused.clone());
        let (one, two, running) = (queue.next().await, queue.next().await, queue.next().await);
        one.done(failed(failing.clone()));
        two.done(both);
        queue.wake_failing(names.map(id).into(), Recovery::Breaker);
        let again = queue.next().await;
        assert_eq!(again.id, id("refused"));
        assert!(again.pending_retries["refused"].until <= Timestamp::now());
        assert!(again.pending_retries["failing"].until > Timestamp::now());
        assert!(nothing(&queue));
        // It was refused before the breaker closed, and tells so only now.
        running.done(failed(refused));
        assert_eq!(queue.next().await.id, id("running"));
        again.done(failed(failing));
        assert!(nothing(&queue));
    }

    #[tokio::test]
    async fn a_back_off_ends_when_it_must_and_not_before_it_may() {
        let queue = queue();
        let failing = |not_after: Option<i64>, not_before: Option<i64>| {
            let later = |seconds| Timestamp::now() + SignedDuration::from_secs(seconds);
            Failed {
                not_after: not_after.map(later),
                not_before: not_before.map(later),
                ..Failed::now("t", Reason::RequestRejected)
            }
        };
        // The reason alone would have it wait for about ten minutes.
        for (not_after, not_before, seconds) in [(Some(3), None, 3), (Some(3), Some(60), 60), (Some(7_200), None, 600)]
        {
            queue.wake(&id("a"));
            let reconcile = queue.next().await;
            reconcile.done(failed(failing(not_after, not_before)));
            let until = queue.lock().entries[&id("a")].backoffs["t"].hold.until;
            let wait = until.duration_since(Timestamp::now()).as_secs();
            assert!(
                (seconds * 4 / 5 - 1..=seconds * 6 / 5).contains(&wait),
                "{wait} for {seconds}"
            );
        }
        // What the server asked for outlasts an edit; what we chose does not.
        for (not_before, kept) in [(Some(60), true), (None, false)] {
            queue.wake(&id("d"));
            let reconcile = queue.next().await;
            reconcile.done(failed(failing(None, not_before)));
            queue.wake(&id("d"));
            let reconcile = queue.next().await;
            assert_eq!(reconcile.pending_retries.contains_key("t"), kept, "{not_before:?}");
            reconcile.done(Done::default());
        }
        // The tries before an expiry do not lengthen what comes after it: the second wait is one of two seconds.
        queue.wake(&id("c"));
        let mut reconcile = queue.next().await;
        for not_after in [Some(0), Some(0), Some(0), Some(0), None] {
            reconcile.done(failed(Failed {
                reason: Reason::ServerError,
                ..failing(not_after, None)
            }));
            let wait = queue.lock().entries[&id("c")].backoffs["t"].hold.until;
            assert!(wait.duration_since(Timestamp::now()) < SignedDuration::from_secs(3));
            reconcile = queue.next().await;
        }
        reconcile.done(Done::default());
        // A pass that broke off does not forget what failed before.
        let reconcile = {
            queue.wake(&id("b"));
            queue.next().await
        };
        reconcile.done(failed(failing(None, Some(1))));
        {
            let mut state = queue.lock();
            let state = &mut *state;
            state.waiting.push(&id("b"), Priority::Retry, &"main".into());
        }
        drop(queue.next().await);
        let state = queue.lock();
        let names: Vec<&String> = state.entries[&id("b")].backoffs.keys().collect();
        assert_eq!(names, ["", "t"]);
    }
}
