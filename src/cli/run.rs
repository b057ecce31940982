//! `zitadel-tokens run`: creates all parts of the operator, connects them and runs them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use kube::Client;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;

use crate::cli::cluster;
use crate::controller::cache::Cache;
use crate::controller::crd_version;
use crate::controller::instance::Connections;
use crate::controller::key_generator::KeyGenerator;
use crate::controller::key_rotation::KeyMemory;
use crate::controller::metrics::objects::Objects;
use crate::controller::metrics::{Metrics, Queues};
use crate::controller::queue::Queue;
use crate::controller::read::Reader;
use crate::controller::service_user::{Memory, TIME_TO_WRITE};
use crate::controller::triggers::Triggers;
use crate::controller::write::Writer;
use crate::controller::{Context, Requests, instance, service_user};
use crate::domain::allow_list::AllowList;
use crate::domain::backoff::Recovery;
use crate::domain::key;
use crate::domain::object_ref::ObjectRef;
use crate::domain::priority::{Priority, priority};
use crate::ops::election::Election;
use crate::ops::http::Probe;
use crate::ops::lease::LeadershipGuard;
use crate::ops::shutdown::Shutdown;
use crate::ops::{clock_jump, descriptors, http, memory, telemetry};
use crate::zitadel::{Clock, Hosts, dial};

/// Longest time of one reconcile; one that takes longer hangs. A reconcile may request 16 tokens one after another, and
/// each request may take the default timeout.
pub(crate) const RECONCILE_TIMEOUT: Duration = Duration::from_mins(5);

/// Run the operator.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Serve only the ZitadelInstances with these labels, such as `team=a`. Several operators can then share a cluster.
    #[arg(long, env, default_value = "")]
    instance_selector: String,

    /// Watch service users and Secrets only in these namespaces, such as `shop,billing`. By default, watch all
    /// namespaces.
    #[arg(long, env, value_delimiter = ',')]
    watch_namespaces: Vec<String>,

    /// Write the status of instances. If several operators serve the same instances, enable this in only one of them.
    #[arg(long, env, default_value_t = true, action = clap::ArgAction::Set)]
    write_instance_status: bool,

    /// Allow these labels and annotations on token Secrets, in addition to the defaults in docs/tokens.md. Set keys or
    /// whole prefixes, such as `team,example.com/*`.
    #[arg(long, env, value_delimiter = ',')]
    allow_secret_metadata: Vec<String>,

    /// Serve /livez, /readyz and /metrics on this address.
    #[arg(long, env, default_value = "0.0.0.0:8080")]
    listen: SocketAddr,

    /// Expose series for each service user and token in /metrics, in addition to those of instances and of the
    /// operator.
    #[arg(long, env, default_value_t = true, action = clap::ArgAction::Set)]
    metrics_per_object: bool,

    /// Number of objects to reconcile at once. The objects of one instance use at most a quarter of it.
    #[arg(long, env, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    concurrent: u16,

    /// Limit in KiB of the operator's memory for the objects of one namespace. Service users beyond it are refused. A
    /// service user with one token counts as about 4 KiB.
    #[arg(long, env, default_value_t = 8 * 1024, value_parser = clap::value_parser!(u32).range(64..=1024 * 1024))]
    namespace_memory: u32,

    /// The operator's own namespace. Service users in it are refused.
    #[arg(long, env = "POD_NAMESPACE")]
    namespace: Option<String>,

    /// Name of the cluster, such as `prod-eu`. It is part of each service user that the operator creates in ZITADEL
    /// (`spec.user`), so it must differ from that of other clusters and must not change.
    #[arg(long, env, default_value = "", value_parser = cluster_name)]
    cluster_name: String,

    /// Enable leader election, to run several replicas. Only the replica that holds the Lease in --namespace works.
    #[arg(long, env)]
    leader_elect: bool,

    /// Name of the Lease. Replicas of one operator share it. Operators that serve other instances need another name.
    #[arg(long, env, default_value = "zitadel-tokens")]
    lease_name: String,

    /// Name of this process in the Lease, for information. By default, the host name.
    #[arg(long, env)]
    pod_name: Option<String>,

    /// Log level: `error`, `warn`, `info`, `debug` or `trace`. Libraries log at most at --log-libraries.
    #[arg(long, env = "RUST_LOG", default_value = "info")]
    log_level: String,

    /// Most verbose log level of libraries, whatever the value of --log-level. Raise it only to debug: log lines of
    /// libraries may quote responses of servers.
    // There is no `env`, so that the environment cannot raise it.
    #[arg(long, default_value = "warn")]
    log_libraries: telemetry::LibraryLevel,

    /// Format of log lines.
    #[arg(long, env, value_enum, default_value = "text")]
    log_format: telemetry::Format,
}

/// Runs until SIGTERM or SIGINT.
pub fn run(arguments: Arguments) -> Result<(), String> {
    let allowed = allow_list(&arguments.allow_secret_metadata)?;
    let panics = Counter::default();
    telemetry::start(
        arguments.log_format,
        &arguments.log_level,
        arguments.log_libraries,
        panics.clone(),
    )?;
    if let Err(error) = memory::protect() {
        // Some sandboxes forbid this. The operator runs anyway.
        tracing::warn!(error = %error.kind(), "could not disable core dumps");
    }
    if let Err(error) = descriptors::raise_limit() {
        tracing::warn!(error = %error.kind(), "could not raise the limit of open files");
    }
    super::choose_tls()?;
    jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER
        .install_default()
        .map_err(|_| "a signing backend is already installed")?;
    let runtime = tokio::runtime::Runtime::new().map_err(|e| format!("cannot start the async runtime: {e}"))?;
    let served = runtime.block_on(serve(arguments, allowed, panics));
    // The thread that generates keys would delay the end of the process.
    runtime.shutdown_background();
    served
}

async fn serve(arguments: Arguments, allowed: AllowList, panics: Counter) -> Result<(), String> {
    let shutdown = Shutdown::on_signal().map_err(|e| format!("cannot listen for signals: {e}"))?;
    let client = cluster::client().await?;
    let mut registry = Registry::default();
    let listener = http::listen(arguments.listen).map_err(|e| format!("--listen {}: {e}", arguments.listen))?;
    let address = listener.local_addr().map_err(|e| e.to_string())?;

    let (election, leadership) = candidate(&arguments, &client, &shutdown)?;
    let leads = leads(&leadership);
    let metrics = Metrics::register(&mut registry, panics, leads.clone());
    let cache = Arc::new(Cache::new(arguments.namespace_memory as usize * 1024));
    let clock = Clock::default();
    let connections = Arc::new(Connections::new(Hosts::new(Box::new(dial), clock.clone())));
    let users = queue_of_users(arguments.concurrent, cache.clone(), connections.clone(), clock.clone());
    let users = Arc::new(users);
    let instances = Arc::new(queue_of_instances(clock.clone()));
    registry.register_collector(Box::new(Queues(vec![
        ("ZitadelServiceUser", users.clone()),
        ("ZitadelInstance", instances.clone()),
    ])));
    let serves_some_instances_only = !arguments.instance_selector.is_empty();
    registry.register_collector(Box::new(Objects {
        clock: clock.clone(),
        cache: cache.clone(),
        connections: connections.clone(),
        leads,
        per_object: arguments.metrics_per_object,
        serves_some_instances_only,
    }));
    let within = within(arguments.watch_namespaces);
    let keys = Arc::new(KeyMemory::default());
    let triggers = Arc::new(Triggers::new(
        cache.clone(),
        users.clone(),
        instances.clone(),
        keys.clone(),
        arguments.namespace.clone(),
        within.clone(),
    ));
    let context = Arc::new(Context {
        clock,
        writer: Writer::new(client.clone(), leadership.clone()),
        reader: Reader::new(client.clone()),
        client: client.clone(),
        cache,
        connections,
        instances: instances.clone(),
        users: users.clone(),
        memory: Memory::default(),
        keys,
        key_generator: key_generator(&users, &instances),
        requests: Requests::default(),
        role_requests: Requests::default(),
        metrics,
        allowed_metadata: Arc::new(allowed),
        watched_namespaces: within,
        cluster_name: Some(arguments.cluster_name).filter(|name| !name.is_empty()),
        operator_namespace: arguments.namespace,
        serves_some_instances_only,
        writes_instance_status: arguments.write_instance_status,
    });

    let (ready, probe) = flag();
    tracing::info!(version = env!("CARGO_PKG_VERSION"), %address, "started");
    let watches = {
        let triggers = triggers.clone();
        tokio::spawn(async move {
            crd_version::up_to_date(client.clone()).await;
            Box::pin(triggers.run(client, &arguments.instance_selector)).await;
        })
    };
    let alive: Probe = {
        let watches = watches.abort_handle();
        Arc::new(move || !watches.is_finished())
    };
    let port = tokio::spawn(http::serve(listener, alive, probe, Arc::new(registry)));

    let mut early = shutdown.clone();
    tokio::select! {
        () = early.requested() => {}
        () = triggers.first_lists() => {
            ready.store(true, Ordering::Relaxed);
            tracing::info!("initial lists are complete; watching for changes");
        }
    }
    let jumps = tokio::spawn({
        let context = context.clone();
        async move { clock_jump::watch(|| after_clock_jump(&context)).await }
    });
    let work = work(context.clone(), leadership, shutdown);
    match election {
        // The lease is released last, after all work of this process has ended.
        Some(election) => {
            let (can, begin) = (|| triggers.are_current(), || take_over(&context));
            election.during(work, can, begin).await;
        }
        None => work.await,
    }
    watches.abort();
    jumps.abort();
    port.abort();
    tracing::info!("stopped");
    Ok(())
}

/// The keys that users may set on token Secrets. Empty entries are ignored: clap parses an empty environment variable
/// as one empty entry.
fn allow_list(added: &[String]) -> Result<AllowList, String> {
    let added: Vec<_> = added.iter().filter(|entry| !entry.is_empty()).collect();
    AllowList::with(&added).map_err(|error| format!("--allow-secret-metadata: {error}"))
}

/// The namespaces to watch, without duplicates. `None` means all namespaces. Empty names are ignored: clap parses an
/// empty environment variable as one empty name.
fn within(mut namespaces: Vec<String>) -> Vec<Option<String>> {
    namespaces.retain(|name| !name.is_empty());
    if namespaces.is_empty() {
        return vec![None];
    }
    namespaces.sort();
    namespaces.dedup();
    namespaces.into_iter().map(Some).collect()
}

/// The candidate for leader election, if enabled, and the leadership guard of this process.
fn candidate(
    arguments: &Arguments,
    client: &Client,
    shutdown: &Shutdown,
) -> Result<(Option<Election>, LeadershipGuard), String> {
    if !arguments.leader_elect {
        return Ok((None, LeadershipGuard::always(shutdown.clone())));
    }
    let namespace = arguments.namespace.as_deref().filter(|name| !name.is_empty());
    let namespace = namespace.ok_or("--leader-elect requires --namespace, the namespace of the Lease")?;
    let (lease, pod) = (&arguments.lease_name, arguments.pod_name.clone());
    let (election, leadership) = Election::new(client.clone(), namespace, lease, pod, shutdown.clone())?;
    Ok((Some(election), leadership))
}

/// Reconciles service users and instances until shutdown.
async fn work(ctx: Arc<Context>, leadership: LeadershipGuard, shutdown: Shutdown) {
    // Time for a request in flight, and for the write of its token.
    let drain = || ctx.connections.longest_timeout() + TIME_TO_WRITE;
    if leadership.is_leading() {
        find_lost_roles(ctx.clone());
    }
    let (users, instances) = (ctx.users.clone(), ctx.instances.clone());
    tokio::join!(
        users.work(
            RECONCILE_TIMEOUT,
            leadership.clone(),
            shutdown.clone(),
            drain,
            |id, pending_retries| { service_user::reconcile(ctx.clone(), id, pending_retries) }
        ),
        instances.work(RECONCILE_TIMEOUT, leadership, shutdown, drain, |id, _| {
            instance::reconcile(ctx.clone(), id)
        }),
    );
}

fn cluster_name(text: &str) -> Result<String, String> {
    let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if text.len() <= 63 && text.bytes().all(is_plain) {
        Ok(text.to_owned())
    } else {
        Err("must have at most 63 characters of a-z 0-9 and -".to_owned())
    }
}

/// The probe for leadership.
fn leads(leadership: &LeadershipGuard) -> Probe {
    let leadership = leadership.clone();
    Arc::new(move || leadership.is_leading())
}

/// A flag, and the probe that reads it.
fn flag() -> (Arc<AtomicBool>, Probe) {
    let flag = Arc::new(AtomicBool::new(false));
    let read = flag.clone();
    (flag, Arc::new(move || read.load(Ordering::Relaxed)))
}

/// Generates keys and wakes the object that waits for one.
fn key_generator(users: &Arc<Queue>, instances: &Arc<Queue>) -> Arc<KeyGenerator> {
    let (users, instances) = (users.clone(), instances.clone());
    let wake = move |id: &ObjectRef| {
        if id.namespace.is_empty() {
            instances.wake(id);
        } else {
            users.wake_failing(vec![id.clone()], Recovery::Key);
        }
    };
    Arc::new(KeyGenerator::new(key::generate, Box::new(wake)))
}

/// Runs when this process becomes the leader. The previous leader may have stopped at any point, so everything is
/// reconciled. Unwritten tokens of this process are kept (docs/adr/0009-unwritten-tokens-are-kept.md).
fn take_over(ctx: &Arc<Context>) {
    ctx.memory.retain(|id| ctx.cache.user(id).is_some());
    // The former leader may have changed every key.
    ctx.keys.clear();
    ctx.key_generator.clear();
    ctx.connections.forget_reconciles();
    reconcile_all(ctx);
    find_lost_roles(ctx.clone());
}

fn find_lost_roles(ctx: Arc<Context>) {
    tokio::spawn(async move { service_user::find_lost_roles(&ctx).await });
}

/// Runs after the clock was set or the machine was suspended. Timers now stand for wrong times, and the skews of the
/// servers' clocks are unknown.
pub(crate) fn after_clock_jump(ctx: &Context) {
    tracing::warn!("the clock of this machine was set, or the machine was suspended; reconciling all objects");
    ctx.connections.forget_reconciles();
    reconcile_all(ctx);
}

fn reconcile_all(ctx: &Context) {
    ctx.instances.wake_all(ctx.cache.instances());
    ctx.users.wake_all(ctx.cache.users(|_, _| true));
}

pub(crate) fn queue_of_users(concurrent: u16, cache: Arc<Cache>, connections: Arc<Connections>, clock: Clock) -> Queue {
    let operators = clock.clone();
    let rank = move |id: &ObjectRef| match cache.user(id) {
        Some(user) => {
            let instance = &*user.instance;
            let priority = priority(&user, connections.skew(instance).usable(), operators.now());
            // All unknown instances count as one, so that a tenant gets no further share by inventing instances.
            let known = cache.instance(instance).map_or("", |_| instance);
            (priority, known.into())
        }
        None => (Priority::Retry, "".into()),
    };
    Queue::new(usize::from(concurrent), Box::new(rank), clock)
}

/// Slots for 384 instances at once (see `domain/fair_queue.rs`). Service users wait for the first reconcile of their
/// instance, and an unreachable instance must not delay that of another.
pub(crate) fn queue_of_instances(clock: Clock) -> Queue {
    Queue::new(512, Box::new(|id| (Priority::FirstToken, id.name.clone())), clock)
}
