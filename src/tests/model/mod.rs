//! A model test of one service user. It applies random edits, faults, clock steps and restarts to the production code,
//! in virtual time. The tested code reaches from the queue and its timers to the requests that the operator sends.
//! ZITADEL and the API server are fakes in memory. The test checks invariants (`promises`) against what these fakes
//! observe: no token expires while nothing fails, one token request per lifetime, a correct `Ready` condition, no
//! repeated work, and recovery after failures.

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
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::cli::run::{RECONCILE_TIMEOUT, after_clock_jump, queue_of_instances, queue_of_users};
use crate::controller::cache::Cache;
use crate::controller::instance::{self, Connections};
use crate::controller::key_generator::KeyGenerator;
use crate::controller::key_rotation::KeyMemory;
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
use zitadel::{FakeTransport, Fault, Zitadel};

const NAMESPACE: &str = "shop";
const INSTANCE: &str = "main";
const ISSUER: &str = "https://auth.example.com";
const USER_ID: &str = "7";
const KEY_SECRET: &str = "billing-key";

/// Names of the tokens that the spec may have.
const NAMES: [&str; 2] = ["invoices", "reports"];

/// After ZITADEL's `Date` header or the operator's clock was wrong, the operator retries within this time: the longest
/// backoff of an instance.
const CLOCK_RECOVERY: Duration = Duration::from_mins(6);

/// All tokens have recovered after this time: the longest backoff of a contested Secret.
const RECOVERY: Duration = Duration::from_mins(30);

/// A reconcile takes longer than this only if requests or writes hang.
const LONG_RECONCILE: Duration = Duration::from_secs(4);

/// The operator settles within this time unless requests hang.
const SETTLE_TIMEOUT: Duration = Duration::from_mins(1);

type Shared = Arc<Mutex<State>>;

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The environment of the operator, and the history that the checks need.
struct State {
    started: Instant,
    /// How far ZITADEL's clock is ahead of the true time.
    server_ahead: SignedDuration,
    /// How far ZITADEL's `Date` header is ahead of its clock.
    date_ahead: SignedDuration,
    /// How many seconds the operator's clock is ahead of the true time.
    local_ahead: Arc<AtomicI64>,
    store: Store,
    zitadel: Zitadel,
    key_id: String,
    key_exists: bool,
    /// Whether the policy allows projects 1 and 2.
    allowed: bool,
    /// History of each token, by its name in the spec.
    entries: BTreeMap<String, Entry>,
    events: usize,
    last_event: Duration,
    /// Times of the events of the last minute.
    recent_events: Vec<Duration>,
    /// Time of the last change of a fault, an outage or a clock.
    healthy_since: Duration,
    /// End of the last `Retry-After` that ZITADEL sent.
    throttled_until: Duration,
    /// How long a wrong clock may delay refreshes after it is correct again.
    clock_recovery: Duration,
    /// Sum of the steps of ZITADEL's clock that the operator cannot have detected yet.
    undetected_clock_step: Duration,
    /// Number of `Date` headers sent since the last clock step.
    dates_sent: usize,
    reconciles: usize,
    /// Number of reconciles that the queues have begun, also of instances.
    begun: usize,
    /// Start of the current reconcile.
    reconcile_began: Duration,
    /// Value of `events` at the start of the current reconcile.
    events_at_reconcile: usize,
    /// Value of `undetected_clock_step` at the start of the current reconcile, which plans by one estimate of the clock.
    clock_step_at_reconcile: Duration,
    requests_since_event: usize,
    violations: Vec<String>,
}

impl State {
    fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Returns the time of ZITADEL's clock.
    fn now(&self) -> Timestamp {
        true_time(self.started) + self.server_ahead
    }

    fn local_ahead(&self) -> i64 {
        self.local_ahead.load(Ordering::Relaxed)
    }

    /// Sets the operator's clock. Returns whether this changed it.
    fn set_local_clock(&mut self, seconds: i64) -> bool {
        self.local_ahead.swap(seconds, Ordering::Relaxed) != seconds
    }

    fn violation(&mut self, text: impl std::fmt::Display) {
        let text = format!("at {:?}: {text}", self.elapsed());
        self.violations.push(text);
    }

    fn record_event(&mut self) {
        self.events += 1;
        let now = self.elapsed();
        self.last_event = now;
        self.recent_events.retain(|at| *at + Duration::from_mins(1) > now);
        self.recent_events.push(now);
        self.requests_since_event = 0;
    }

    fn health_changed(&mut self) {
        if self.is_clock_off() {
            self.clock_recovery = CLOCK_RECOVERY;
        }
        self.healthy_since = self.elapsed();
    }

    fn set_server_clock(&mut self, seconds: i64) {
        let ahead = SignedDuration::from_secs(seconds);
        self.undetected_clock_step += (ahead - self.server_ahead).unsigned_abs();
        self.server_ahead = ahead;
        self.dates_sent = 0;
        self.health_changed();
        self.clear_retry_after();
    }

    /// After more than two `Date` headers the operator knows ZITADEL's clock.
    fn on_date_sent(&mut self) {
        self.dates_sent += 1;
        if self.dates_sent > 2 {
            self.undetected_clock_step = Duration::ZERO;
        }
    }

    fn reconcile_begins(&mut self) {
        self.reconcile_began = self.elapsed();
        self.events_at_reconcile = self.events;
        self.clock_step_at_reconcile = self.undetected_clock_step;
    }
}

/// Returns the true time.
fn true_time(started: Instant) -> Timestamp {
    at(0) + SignedDuration::from_millis(300) + SignedDuration::try_from(started.elapsed()).expect("the test is short")
}

/// Returns the data of the key Secret.
fn key_data(key_id: &str) -> Value {
    let mut file = key_file();
    file["keyId"] = key_id.into();
    // After the end of each test case, but before the time of a wrong clock.
    file["expirationDate"] = (at(0) + SignedDuration::from_hours(365 * 24)).to_string().into();
    json!({"key.json": STANDARD.encode(file.to_string())})
}

fn id() -> ObjectRef {
    ObjectRef::new(NAMESPACE, NAME)
}

/// One process of the operator.
struct Process {
    ctx: Arc<Context>,
    /// Notified after each reconcile of the service user.
    reconciled: Arc<Notify>,
    tasks: JoinSet<()>,
}

/// Reports a panic in a reconcile as a violation, because the queue catches it.
struct PanicReporter(Shared);

impl Drop for PanicReporter {
    fn drop(&mut self) {
        if std::thread::panicking() {
            lock(&self.0).violation("a reconcile panicked");
        }
    }
}

impl Process {
    fn start(shared: &Shared, shutdown: &Shutdown) -> Self {
        let clock = {
            let state = lock(shared);
            let (started, ahead) = (state.started, state.local_ahead.clone());
            Clock::new(move || true_time(started) + SignedDuration::from_secs(ahead.load(Ordering::Relaxed)))
        };
        let dial = {
            let shared = shared.clone();
            Box::new(move |settings: &_| Ok(Box::new(FakeTransport::new(&shared, settings)) as Box<dyn Transport>))
        };
        let client = kubernetes::client(shared);
        let leadership = LeadershipGuard::always(shutdown.clone());
        let cache = Arc::new(Cache::new(1 << 20));
        let connections = Arc::new(Connections::new(Hosts::new(dial, clock.clone())));
        let users = Arc::new(queue_of_users(32, cache.clone(), connections.clone(), clock.clone()));
        let instances = Arc::new(queue_of_instances(clock.clone()));
        let keys = Arc::new(KeyMemory::default());
        let triggers = Triggers::new(
            cache.clone(),
            users.clone(),
            instances.clone(),
            keys.clone(),
            None,
            vec![None],
        );
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
            keys,
            key_generator: Arc::new(KeyGenerator::new(|| None, Box::new(|_| {}))),
            requests: Requests::default(),
            role_requests: Requests::default(),
            metrics: Metrics::register(&mut Registry::default(), Counter::default(), Arc::new(|| true)),
            allowed_metadata: fixtures::facts(&NAMES).allowed_metadata,
            operator_namespace: None,
            watched_namespaces: vec![None],
            cluster_name: None,
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
            notify(&triggers, change);
        }
        for changes in [from_others, from_secrets] {
            tasks.spawn(deliver(shared.clone(), changes, triggers.clone()));
        }
        let reconciled = Arc::new(Notify::new());
        let reconcile_user = {
            let (ctx, shared, reconciled) = (ctx.clone(), shared.clone(), reconciled.clone());
            move |id, pending_retries| {
                let (ctx, shared, reconciled) = (ctx.clone(), shared.clone(), reconciled.clone());
                async move {
                    let reporter = PanicReporter(shared);
                    {
                        let mut state = lock(&reporter.0);
                        state.begun += 1;
                        state.reconcile_begins();
                    }
                    let done = service_user::reconcile(ctx, id, pending_retries).await;
                    lock(&reporter.0).reconciles += 1;
                    reconciled.notify_one();
                    done
                }
            }
        };
        let (guard, end) = (leadership.clone(), shutdown.clone());
        tasks.spawn(users.work(RECONCILE_TIMEOUT, guard, end, Duration::default, reconcile_user));
        let reconcile_instance = {
            let (ctx, shared) = (ctx.clone(), shared.clone());
            move |id, _| {
                lock(&shared).begun += 1;
                instance::reconcile(ctx.clone(), id)
            }
        };
        tasks.spawn(instances.work(
            RECONCILE_TIMEOUT,
            leadership,
            shutdown.clone(),
            Duration::default,
            reconcile_instance,
        ));
        Self { ctx, reconciled, tasks }
    }

    fn clock_jumped(&mut self, detected_after: Duration) {
        let ctx = self.ctx.clone();
        self.tasks.spawn(async move {
            sleep(detected_after).await;
            after_clock_jump(&ctx);
        });
    }

    fn is_idle(&self) -> bool {
        let idle = |load: Load| load.waiting + load.running == 0;
        idle(self.ctx.users.load()) && idle(self.ctx.instances.load())
    }
}

/// Delivers the events of a watch.
async fn deliver(shared: Shared, mut changes: UnboundedReceiver<(Instant, Change)>, triggers: Arc<Triggers>) {
    while let Some((at, change)) = changes.recv().await {
        sleep_until(at).await;
        notify(&triggers, change);
        lock(&shared).store.undelivered -= 1;
    }
}

fn parse<T: DeserializeOwned>(object: Value) -> T {
    serde_json::from_value(object).expect("a valid object")
}

fn notify(triggers: &Triggers, change: Change) {
    match change {
        Change::User(user) => triggers.user_applied(parse(user)),
        Change::Instance(instance) => triggers.instance_applied(parse(instance)),
        Change::Policy(policy) => triggers.policy_applied(parse(policy)),
        Change::Namespace(namespace) => triggers.namespace_applied(parse(namespace)),
        Change::Secret(secret) => triggers.secret_applied(parse(secret)),
        Change::SecretDeleted(name) => triggers.secret_gone(&ObjectRef::new(NAMESPACE, &name)),
    }
}

/// Parameters of a test case besides its events.
#[derive(Clone, Copy, Debug)]
struct Parameters {
    /// Token lifetime in seconds.
    lifetime: i64,
    /// Whether ZITADEL issues opaque tokens instead of JWTs.
    opaque: bool,
    /// Delay in milliseconds of the watch of all other kinds, and of the watch of Secrets.
    delays: [u64; 2],
    /// One-way latency in milliseconds to the API server, and to ZITADEL.
    latency: [u64; 2],
}

fn parameters() -> impl Strategy<Value = Parameters> {
    let lifetime = prop_oneof![20..60_i64, 60..900_i64, 900..9_000_i64];
    let delay = || prop_oneof![Just(0_u64), 1..100_u64, 100..3_000_u64];
    let latency = [0..10_u64, 0..100_u64];
    (lifetime, any::<bool>(), [delay(), delay()], latency).prop_map(|(lifetime, opaque, delays, latency)| Parameters {
        lifetime,
        opaque,
        delays,
        latency,
    })
}

/// The operator and its environment.
struct World {
    shared: Shared,
    process: Process,
    shutdown: Shutdown,
    /// The tokens of a spec with all `NAMES`.
    all_tokens: Vec<Value>,
}

impl World {
    fn new(parameters: Parameters) -> Self {
        let facts = fixtures::facts(&NAMES);
        let mut user = serde_json::to_value(&*facts.user).expect("the user is valid JSON");
        user["metadata"]["resourceVersion"] = "1".into();
        let all_tokens = user["spec"]["tokens"].as_array().expect("tokens is an array").clone();
        let metadata = json!({"name": INSTANCE, "uid": "i", "resourceVersion": "1", "generation": 1});
        let kind =
            |kind: &str| json!({"apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": kind, "metadata": metadata});
        let (mut instance, mut policy) = (kind("ZitadelInstance"), kind("ZitadelAccessPolicy"));
        instance["spec"] = json!({"issuer": ISSUER});
        policy["spec"] = json!({"instanceRef": {"name": INSTANCE}, "namespaceSelector": {},
            "audiences": {"projectIDs": ["1", "2"]}});
        let mut store = Store::new(user, instance, policy);
        store.put_new(KEY_SECRET, &key_data("k1"));
        store.delays = parameters.delays.map(Duration::from_millis);
        store.latency = Duration::from_millis(parameters.latency[0]);
        let state = State {
            started: Instant::now(),
            server_ahead: SignedDuration::ZERO,
            date_ahead: SignedDuration::ZERO,
            local_ahead: Arc::default(),
            store,
            zitadel: Zitadel {
                lifetime: SignedDuration::from_secs(parameters.lifetime),
                opaque: parameters.opaque,
                latency: Duration::from_millis(parameters.latency[1]),
                fault: None,
                issued: Vec::new(),
                requests: 0,
                lookup_tokens: 0,
            },
            key_id: "k1".to_owned(),
            key_exists: true,
            allowed: true,
            entries: BTreeMap::new(),
            events: 0,
            last_event: Duration::ZERO,
            recent_events: Vec::new(),
            healthy_since: Duration::ZERO,
            throttled_until: Duration::ZERO,
            clock_recovery: Duration::ZERO,
            undetected_clock_step: Duration::ZERO,
            dates_sent: 0,
            reconciles: 0,
            begun: 0,
            reconcile_began: Duration::ZERO,
            events_at_reconcile: 0,
            clock_step_at_reconcile: Duration::ZERO,
            requests_since_event: 0,
            violations: Vec::new(),
        };
        let shared = Arc::new(Mutex::new(state));
        let shutdown = Shutdown::on_signal().expect("signal handlers");
        Self {
            process: Process::start(&shared, &shutdown),
            shared,
            shutdown,
            all_tokens,
        }
    }

    fn restart(&mut self) {
        // The old process stops before the new one lists the objects.
        self.process.tasks.abort_all();
        lock(&self.shared).on_process_stopped();
        self.process = Process::start(&self.shared, &self.shutdown);
    }

    /// Waits until the queues are empty and all watch events are delivered. Returns false if hanging requests prevent
    /// that.
    async fn settle(&self) -> bool {
        let started = Instant::now();
        while !self.process.is_idle() || lock(&self.shared).store.undelivered > 0 {
            sleep(Duration::from_millis(10)).await;
            if started.elapsed() > SETTLE_TIMEOUT {
                let state = lock(&self.shared);
                let hangs =
                    state.store.outage == Some(Outage::SecretWritesHang) || state.zitadel.fault == Some(Fault::Hangs);
                assert!(hangs, "the operator does not settle");
                return false;
            }
        }
        true
    }

    /// Advances the time, and checks the invariants after each reconcile and at the end.
    async fn advance(&mut self, by: Duration) {
        let end = Instant::now() + by;
        let before = lock(&self.shared).reconciles;
        loop {
            let reconciled = tokio::time::timeout_at(end, self.process.reconciled.notified()).await;
            if self.settle().await && lock(&self.shared).is_settled() {
                lock(&self.shared).check();
                if reconciled.is_ok() {
                    self.check_second_reconcile().await;
                }
            }
            let state = lock(&self.shared);
            assert!(state.violations.is_empty(), "{:#?}", state.violations);
            let limit = 200 + 2 * by.as_secs();
            assert!(
                state.reconciles - before < usize::try_from(limit).expect("the limit is small"),
                "too many reconciles"
            );
            if Instant::now() >= end {
                return;
            }
        }
    }

    /// Checks that an immediate second reconcile writes nothing and sends no request.
    async fn check_second_reconcile(&self) {
        let ctx = &self.process.ctx;
        let (pending_retries, timer) = ctx.users.waits(&id());
        let soon = ctx.clock.now() + SignedDuration::from_millis(20);
        if timer.is_some_and(|timer| timer < soon) {
            return;
        }
        // A reconcile that took long was planned by an earlier time.
        let took = {
            let state = lock(&self.shared);
            state.elapsed().saturating_sub(state.reconcile_began)
        };
        if took > LONG_RECONCILE {
            return;
        }
        let counts = |state: &State| (state.store.mutations, state.zitadel.requests);
        let (before, begun, latency) = {
            let mut state = lock(&self.shared);
            state.reconcile_begins();
            (counts(&state), state.begun, std::mem::take(&mut state.store.latency))
        };
        service_user::reconcile(ctx.clone(), id(), pending_retries).await;
        let mut state = lock(&self.shared);
        state.store.latency = latency;
        // The queues may have begun other reconciles meanwhile.
        let is_alone = state.begun == begun;
        if is_alone && counts(&state) != before {
            state.violation("a second reconcile still had work to do");
        }
    }

    async fn apply_all(&mut self, events: &[(Event, usize, Option<u64>)]) {
        let each = events
            .iter()
            .flat_map(|(event, times, pause)| std::iter::repeat_n((*event, *pause), *times));
        for (event, pause) in each {
            self.apply(event);
            match (event, pause) {
                (Event::TimePasses(percent), _) => {
                    let lifetime = lock(&self.shared).zitadel.lifetime.unsigned_abs();
                    self.advance(lifetime * percent / 100).await;
                }
                (_, Some(pause)) => sleep(Duration::from_millis(pause)).await,
                (_, None) => {
                    let grace = lock(&self.shared).grace();
                    self.advance(grace).await;
                }
            }
        }
    }

    /// Ends all failures. Checks that every token is fresh after the longest backoff, and stays fresh with one token
    /// request and one write per refresh.
    async fn check_recovery(&mut self) {
        let remedies = [
            Event::Suspend(false),
            Event::PolicyAllows(true),
            Event::KeyExists(true),
            Event::ZitadelFault(None),
            Event::ServerDate(0),
            Event::ApiServerOutage(None),
            Event::Audience(0, 0),
            Event::Audience(1, 1),
        ];
        self.apply_all(&remedies.map(|event| (event, 1, Some(0)))).await;
        let lifetime = lock(&self.shared).zitadel.lifetime.unsigned_abs();
        let end = Instant::now() + RECOVERY;
        while !lock(&self.shared).all_recovered() && Instant::now() < end {
            self.advance(lifetime.max(Duration::from_mins(1))).await;
        }
        // Lets the remaining backoffs end.
        self.advance(lifetime).await;
        let counts = |state: &State| {
            [
                state.zitadel.issued.len(),
                state.store.writes,
                state.reconciles,
                state.zitadel.lookup_tokens,
            ]
        };
        let before = {
            let state = lock(&self.shared);
            assert!(state.all_recovered(), "{}", state.store.user["status"]);
            counts(&state)
        };
        self.advance(lifetime * 4).await;
        let state = lock(&self.shared);
        assert!(state.all_recovered(), "{}", state.store.user["status"]);
        let after = counts(&state);
        let [issued, written, reconciles, lookup_tokens] = std::array::from_fn(|i| after[i] - before[i]);
        let tokens = state.tokens().len();
        // `renewBefore` is at most half of the lifetime, and the jitter refreshes a token somewhat earlier still.
        assert!(
            issued <= tokens * 11 && issued >= tokens * 4,
            "{issued} tokens in four lifetimes"
        );
        assert_eq!(issued, written, "one write per issued token");
        // A delayed watch event of the operator's own write may trigger one more reconcile.
        let extra = if state.store.longest_delay().is_zero() {
            1
        } else {
            issued
        };
        assert!(
            reconciles <= issued + extra,
            "{reconciles} reconciles for {issued} tokens"
        );
        assert_eq!(
            lookup_tokens, 0,
            "the operator requests the id of ZITADEL's own project only once"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 16))]
    #[test]
    fn invariants_hold_for_random_events(parameters in parameters(), events in events()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.expect("the runtime starts").block_on(async {
            let mut world = World::new(parameters);
            world.apply_all(&events).await;
            Box::pin(world.check_recovery()).await;
        });
    }
}
