//! A service user's life: random edits, faults, steps of the clocks and restarts against the production code, from the
//! queue and its timers to the requests that it sends, in virtual time. ZITADEL and the API server are in memory. What
//! the product promises is judged by what these two see (`promises`): no expired token while nothing fails, one token
//! request for each lifetime, `Ready` that is true, nothing done twice, and recovery.

mod events;
mod kubernetes;
mod promises;
mod zitadel;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::cli::run::{RECONCILE_TIMEOUT, after_clock_jump, queue_of_instances, queue_of_users};
use crate::controller::cache::Cache;
use crate::controller::instance::{self, Connections};
use crate::controller::metrics::Metrics;
use crate::controller::queue::Load;
use crate::controller::read::Reader;
use crate::controller::service_user::{self, Memory};
use crate::controller::triggers::Triggers;
use crate::controller::write::Writer;
use crate::controller::{Context, Requests};
use crate::domain::fixtures::{self, NAME, at, key_file};
use crate::domain::object_ref::ObjectRef;
use crate::ops::lease::LeadershipGuard;
use crate::ops::shutdown::Shutdown;
use crate::zitadel::{Clock, Hosts, Transport};
use events::{Event, events};
use kubernetes::{Change, Outage, Store};
use promises::Entry;
use zitadel::{Fault, Way, Zitadel};

const NAMESPACE: &str = "shop";
const INSTANCE: &str = "main";
const ISSUER: &str = "https://auth.example.com";
const USER_ID: &str = "7";
const KEY_SECRET: &str = "billing-key";

/// The entries that the spec may have.
const NAMES: [&str; 2] = ["invoices", "reports"];

/// A server whose clock or `Date` was wrong is asked again after the longest back-off of its instance.
const CLOCK_PATIENCE: Duration = Duration::from_mins(6);

/// Everything is good again after this: the longest back-off of a token that is contested.
const RECOVERY: Duration = Duration::from_mins(30);

/// No pass takes longer unless requests hang.
const QUIET: Duration = Duration::from_mins(1);

type Shared = Arc<Mutex<State>>;

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The world without the operator, and what is known of what happened in it.
struct State {
    started: Instant,
    server_ahead: SignedDuration,
    /// By how much the server's `Date` lies.
    date_ahead: SignedDuration,
    /// By how many seconds our own clock is wrong.
    ours_ahead: Arc<AtomicI64>,
    store: Store,
    zitadel: Zitadel,
    key_id: String,
    key_is_there: bool,
    /// Whether the policy allows the projects 1 and 2.
    allowed: bool,
    entries: BTreeMap<String, Entry>,
    events: usize,
    last_event: Duration,
    /// Events of late.
    lately: Vec<Duration>,
    /// Since when nothing fails, and no clock was set.
    healthy_since: Duration,
    /// How long a clock that was wrong may keep tokens from being refreshed.
    clock_patience: Duration,
    /// Steps of the server's clock that the operator had no chance to notice.
    unseen: Duration,
    dates_told: usize,
    passes: usize,
    /// The pass under way: when it began, and how many events there were.
    pass_began: Duration,
    pass_saw: usize,
    requests_since_event: usize,
    violations: Vec<String>,
}

impl State {
    fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// By the server's clock.
    fn now(&self) -> Timestamp {
        time(self.started) + self.server_ahead
    }

    fn ours_ahead(&self) -> i64 {
        self.ours_ahead.load(Ordering::Relaxed)
    }

    fn set_ours(&mut self, seconds: i64) -> bool {
        self.ours_ahead.swap(seconds, Ordering::Relaxed) != seconds
    }

    fn violated(&mut self, text: impl std::fmt::Display) {
        let text = format!("at {:?}: {text}", self.elapsed());
        self.violations.push(text);
    }

    fn something_happens(&mut self) {
        self.events += 1;
        self.last_event = self.elapsed();
        let now = self.last_event;
        self.lately.retain(|at| *at + Duration::from_mins(1) > now);
        self.lately.push(now);
        self.requests_since_event = 0;
    }

    fn health_changes(&mut self) {
        self.clock_patience = if self.is_faulty() && (!self.date_ahead.is_zero() || self.ours_ahead() != 0) {
            CLOCK_PATIENCE
        } else {
            self.clock_patience
        };
        self.healthy_since = self.elapsed();
    }

    fn set_server_clock(&mut self, seconds: i64) {
        let ahead = SignedDuration::from_secs(seconds);
        self.unseen += (ahead - self.server_ahead).unsigned_abs();
        self.server_ahead = ahead;
        self.dates_told = 0;
        self.health_changes();
        self.clocks_change();
    }

    /// Two answers show where the server's clock is.
    fn date_was_told(&mut self) {
        self.dates_told += 1;
        if self.dates_told > 2 {
            self.unseen = Duration::ZERO;
        }
    }

    fn pass_begins(&mut self) {
        self.pass_began = self.elapsed();
        self.pass_saw = self.events;
    }
}

/// The time by a clock that is right.
fn time(started: Instant) -> Timestamp {
    at(0) + SignedDuration::from_millis(300) + SignedDuration::try_from(started.elapsed()).expect("short")
}

/// The content of the key Secret.
fn key_data(key_id: &str) -> Value {
    let mut file = key_file();
    file["keyId"] = key_id.into();
    // Longer than a model runs, and not as long as a clock is wrong.
    file["expirationDate"] = (at(0) + SignedDuration::from_hours(365 * 24)).to_string().into();
    json!({"key.json": STANDARD.encode(file.to_string())})
}

fn id() -> ObjectRef {
    ObjectRef::new(NAMESPACE, NAME)
}

/// One process of the operator.
struct Process {
    ctx: Arc<Context>,
    /// A pass ended.
    passed: Arc<Notify>,
    tasks: JoinSet<()>,
}

/// Tells of a pass that panics, which the queue would hide.
struct Running(Shared);

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            lock(&self.0).violated("a pass panics");
        }
    }
}

impl Process {
    fn start(shared: &Shared, shutdown: &Shutdown) -> Self {
        let clock = {
            let state = lock(shared);
            let (started, ahead) = (state.started, state.ours_ahead.clone());
            Clock::new(move || time(started) + SignedDuration::from_secs(ahead.load(Ordering::Relaxed)))
        };
        let dial = {
            let shared = shared.clone();
            Box::new(move |settings: &_| Ok(Box::new(Way::new(&shared, settings)) as Box<dyn Transport>))
        };
        let client = kubernetes::client(shared);
        let leadership = LeadershipGuard::always(shutdown.clone());
        let cache = Arc::new(Cache::new(1 << 20));
        let connections = Arc::new(Connections::new(Hosts::new(dial, clock.clone())));
        let users = Arc::new(queue_of_users(32, cache.clone(), connections.clone(), clock.clone()));
        let instances = Arc::new(queue_of_instances(clock.clone()));
        let triggers = Triggers::new(cache.clone(), users.clone(), instances.clone(), vec![None]);
        let triggers = Arc::new(triggers);
        let ctx = Arc::new(Context {
            clock,
            writer: Writer::new(client.clone(), leadership.clone()),
            reader: Reader::new(client.clone()),
            client,
            cache,
            connections,
            instances: instances.clone(),
            users: users.clone(),
            memory: Memory::default(),
            requests: Requests::default(),
            metrics: Metrics::register(&mut Registry::default(), Counter::default(), Arc::new(|| true)),
            allowed_metadata: fixtures::facts(&NAMES).allowed_metadata,
            operator_namespace: None,
            serves_some_instances_only: false,
            writes_instance_status: true,
        });
        let mut tasks = JoinSet::new();
        let (others, from_others) = unbounded_channel();
        let (secrets, from_secrets) = unbounded_channel();
        let all = {
            let mut state = lock(shared);
            state.store.watches = Some([others, secrets]);
            state.store.undelivered = 0;
            state.store.all()
        };
        for change in all {
            tell(&triggers, change);
        }
        for changes in [from_others, from_secrets] {
            tasks.spawn(deliver(shared.clone(), changes, triggers.clone()));
        }
        let passed = Arc::new(Notify::new());
        let pass = {
            let (ctx, shared, passed) = (ctx.clone(), shared.clone(), passed.clone());
            move |id, pending_retries| {
                let (ctx, shared, passed) = (ctx.clone(), shared.clone(), passed.clone());
                async move {
                    let running = Running(shared);
                    lock(&running.0).pass_begins();
                    let done = service_user::reconcile(ctx, id, pending_retries).await;
                    lock(&running.0).passes += 1;
                    passed.notify_one();
                    done
                }
            }
        };
        let (guard, end) = (leadership.clone(), shutdown.clone());
        tasks.spawn(users.work(RECONCILE_TIMEOUT, guard, end, Duration::default, pass));
        let of_instance = {
            let ctx = ctx.clone();
            move |id, _| instance::reconcile(ctx.clone(), id)
        };
        tasks.spawn(instances.work(
            RECONCILE_TIMEOUT,
            leadership,
            shutdown.clone(),
            Duration::default,
            of_instance,
        ));
        Self { ctx, passed, tasks }
    }

    fn clock_jumped(&mut self, noticed_after: Duration) {
        let ctx = self.ctx.clone();
        self.tasks.spawn(async move {
            sleep(noticed_after).await;
            after_clock_jump(&ctx);
        });
    }

    fn is_idle(&self) -> bool {
        let idle = |load: Load| load.waiting + load.running == 0;
        idle(self.ctx.users.load()) && idle(self.ctx.instances.load())
    }
}

/// A watch.
async fn deliver(shared: Shared, mut changes: UnboundedReceiver<(Instant, Change)>, triggers: Arc<Triggers>) {
    while let Some((at, change)) = changes.recv().await {
        sleep_until(at).await;
        tell(&triggers, change);
        lock(&shared).store.undelivered -= 1;
    }
}

fn tell(triggers: &Triggers, change: Change) {
    match change {
        Change::User(user) => triggers.user_applied(serde_json::from_value(user).expect("a user")),
        Change::Instance(instance) => triggers.instance_applied(serde_json::from_value(instance).expect("an instance")),
        Change::Policy(policy) => triggers.policy_applied(serde_json::from_value(policy).expect("a policy")),
        Change::Namespace(namespace) => {
            triggers.namespace_applied(serde_json::from_value(namespace).expect("a namespace"));
        }
        Change::Secret(secret) => triggers.secret_applied(serde_json::from_value(secret).expect("a Secret")),
        Change::SecretGone(name) => triggers.secret_gone(&ObjectRef::new(NAMESPACE, &name)),
    }
}

/// How a case differs from others besides its events.
#[derive(Clone, Copy, Debug)]
struct Nature {
    /// Seconds.
    lifetime: i64,
    opaque: bool,
    /// Milliseconds that a watch is late: the one of Secrets, and the others.
    delays: [u64; 2],
    /// Milliseconds that half a request takes: to the API server, and to ZITADEL.
    latency: [u64; 2],
}

fn natures() -> impl Strategy<Value = Nature> {
    let lifetime = prop_oneof![20..60_i64, 60..900_i64, 900..9_000_i64];
    let delay = || prop_oneof![Just(0_u64), 1..100_u64, 100..3_000_u64];
    let latency = [0..10_u64, 0..100_u64];
    (lifetime, any::<bool>(), [delay(), delay()], latency).prop_map(|(lifetime, opaque, delays, latency)| Nature {
        lifetime,
        opaque,
        delays,
        latency,
    })
}

/// Everything.
struct World {
    shared: Shared,
    process: Process,
    shutdown: Shutdown,
    /// The tokens of a whole spec.
    whole: Vec<Value>,
}

impl World {
    fn new(nature: Nature) -> Self {
        let facts = fixtures::facts(&NAMES);
        let mut user = serde_json::to_value(&*facts.user).expect("JSON");
        user["metadata"]["resourceVersion"] = "1".into();
        let whole = user["spec"]["tokens"].as_array().expect("tokens").clone();
        let metadata = json!({"name": INSTANCE, "uid": "i", "resourceVersion": "1", "generation": 1});
        let kind =
            |kind: &str| json!({"apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": kind, "metadata": metadata});
        let (mut instance, mut policy) = (kind("ZitadelInstance"), kind("ZitadelAccessPolicy"));
        instance["spec"] = json!({"issuer": ISSUER});
        policy["spec"] = json!({"instanceRef": {"name": INSTANCE}, "namespaceSelector": {},
            "audiences": {"projectIDs": ["1", "2"]}});
        let mut store = Store::new(user, instance, policy);
        store.put_new(KEY_SECRET, &key_data("k1"));
        store.delays = nature.delays.map(Duration::from_millis);
        store.latency = Duration::from_millis(nature.latency[0]);
        let state = State {
            started: Instant::now(),
            server_ahead: SignedDuration::ZERO,
            date_ahead: SignedDuration::ZERO,
            ours_ahead: Arc::default(),
            store,
            zitadel: Zitadel {
                lifetime: SignedDuration::from_secs(nature.lifetime),
                opaque: nature.opaque,
                latency: Duration::from_millis(nature.latency[1]),
                fault: None,
                given: Vec::new(),
                requests: 0,
                learned: 0,
            },
            key_id: "k1".to_owned(),
            key_is_there: true,
            allowed: true,
            entries: BTreeMap::new(),
            events: 0,
            last_event: Duration::ZERO,
            lately: Vec::new(),
            healthy_since: Duration::ZERO,
            clock_patience: Duration::ZERO,
            unseen: Duration::ZERO,
            dates_told: 0,
            passes: 0,
            pass_began: Duration::ZERO,
            pass_saw: 0,
            requests_since_event: 0,
            violations: Vec::new(),
        };
        let shared = Arc::new(Mutex::new(state));
        let shutdown = Shutdown::on_signal().expect("signals");
        Self {
            process: Process::start(&shared, &shutdown),
            shared,
            shutdown,
            whole,
        }
    }

    fn restart(&mut self) {
        // The old one ends before the new one reads.
        self.process.tasks.abort_all();
        lock(&self.shared).process_ends();
        self.process = Process::start(&self.shared, &self.shutdown);
    }

    /// Waits until no pass runs or waits, and every event has come. False if requests hang, one after another.
    async fn settle(&self) -> bool {
        let begun = Instant::now();
        while !self.process.is_idle() || lock(&self.shared).store.undelivered > 0 {
            sleep(Duration::from_millis(10)).await;
            if begun.elapsed() > QUIET {
                let state = lock(&self.shared);
                let hangs =
                    state.store.outage == Some(Outage::SecretsHang) || state.zitadel.fault == Some(Fault::Hangs);
                assert!(hangs, "it never rests");
                return false;
            }
        }
        true
    }

    /// Time goes by, and it is checked after each pass and now and then what must hold.
    async fn passes(&mut self, by: Duration) {
        let end = Instant::now() + by;
        let before = lock(&self.shared).passes;
        loop {
            let passed = tokio::time::timeout_at(end, self.process.passed.notified()).await;
            if self.settle().await && lock(&self.shared).is_calm() {
                lock(&self.shared).check();
                if passed.is_ok() {
                    self.check_nothing_is_left().await;
                }
            }
            let state = lock(&self.shared);
            assert!(state.violations.is_empty(), "{:#?}", state.violations);
            let most = 200 + 2 * by.as_secs();
            assert!(
                state.passes - before < usize::try_from(most).expect("small"),
                "too many passes"
            );
            if Instant::now() >= end {
                return;
            }
        }
    }

    /// A second pass at once does nothing and tells nothing.
    async fn check_nothing_is_left(&self) {
        let ctx = &self.process.ctx;
        let (pending_retries, timer) = ctx.users.waits(&id());
        let soon = ctx.clock.now() + SignedDuration::from_millis(20);
        if timer.is_some_and(|timer| timer < soon) {
            return;
        }
        let done = |state: &State| (state.store.mutations, state.zitadel.requests);
        let (before, latency) = {
            let mut state = lock(&self.shared);
            state.pass_begins();
            (done(&state), std::mem::take(&mut state.store.latency))
        };
        service_user::reconcile(ctx.clone(), id(), pending_retries).await;
        let mut state = lock(&self.shared);
        state.store.latency = latency;
        if done(&state) != before {
            state.violated("there was more to do");
        }
    }

    async fn live(&mut self, events: &[(Event, usize, Option<u64>)]) {
        let each = events
            .iter()
            .flat_map(|(event, times, pause)| std::iter::repeat_n((*event, *pause), *times));
        for (event, pause) in each {
            self.happens(event);
            match (event, pause) {
                (Event::Time(percent), _) => {
                    let lifetime = lock(&self.shared).zitadel.lifetime.unsigned_abs();
                    self.passes(lifetime * percent / 100).await;
                }
                (_, Some(pause)) => sleep(Duration::from_millis(pause)).await,
                (_, None) => {
                    let grace = lock(&self.shared).grace();
                    self.passes(grace).await;
                }
            }
        }
    }

    /// Nothing fails any more; after the longest back-off every token is fresh, and stays so at one request and one write
    /// for each lifetime.
    async fn recovers(&mut self) {
        let remedies = [
            Event::Suspend(false),
            Event::Allowed(true),
            Event::KeyThere(true),
            Event::Server(None),
            Event::Date(0),
            Event::Cluster(None),
            Event::Audience(0, 0),
            Event::Audience(1, 1),
        ];
        self.live(&remedies.map(|event| (event, 1, Some(0)))).await;
        let lifetime = lock(&self.shared).zitadel.lifetime.unsigned_abs();
        let end = Instant::now() + RECOVERY;
        while !lock(&self.shared).is_all_good() && Instant::now() < end {
            self.passes(lifetime.max(Duration::from_mins(1))).await;
        }
        // The last back-off that still ran.
        self.passes(lifetime).await;
        let counts = |state: &State| {
            [
                state.zitadel.given.len(),
                state.store.writes,
                state.passes,
                state.zitadel.learned,
            ]
        };
        let before = {
            let state = lock(&self.shared);
            assert!(state.is_all_good(), "{}", state.store.user["status"]);
            counts(&state)
        };
        self.passes(lifetime * 4).await;
        let state = lock(&self.shared);
        assert!(state.is_all_good(), "{}", state.store.user["status"]);
        let after = counts(&state);
        let [given, written, passes, learned] = std::array::from_fn(|i| after[i] - before[i]);
        let tokens = state.tokens().len();
        // Each lives at least as long as `renewBefore` of a half with the jitter lets it.
        assert!(
            given <= tokens * 11 && given >= tokens * 4,
            "{given} tokens in four lifetimes"
        );
        assert_eq!(given, written, "one write for each");
        // The echo of a write is news if it comes after the next pass.
        let news = if state.store.is_late() { given } else { 1 };
        assert!(passes <= given + news, "{passes} passes for {given} tokens");
        assert_eq!(learned, 0, "the project is known");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 16))]
    #[test]
    fn whatever_happens_what_is_promised_holds(nature in natures(), events in events()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.expect("a runtime").block_on(async {
            let mut world = World::new(nature);
            world.live(&events).await;
            world.recovers().await;
        });
    }
}
