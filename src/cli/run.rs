//! `zitadel-tokens run`: the composition root.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;

use crate::cli::cluster;
use crate::controller::cache::Cache;
use crate::controller::instance::Connections;
use crate::controller::metrics::objects::Objects;
use crate::controller::metrics::{Metrics, Queues};
use crate::controller::queue::Queue;
use crate::controller::read::Reader;
use crate::controller::service_user::{Memory, TIME_TO_WRITE};
use crate::controller::triggers::Triggers;
use crate::controller::write::Writer;
use crate::controller::{Context, Requests, instance, service_user};
use crate::domain::allow_list::AllowList;
use crate::domain::object_ref::ObjectRef;
use crate::domain::order::{Slots, Urgency, urgency};
use crate::ops::election::Election;
use crate::ops::http::Probe;
use crate::ops::lease::LeadershipGuard;
use crate::ops::shutdown::Shutdown;
use crate::ops::{clock_jump, descriptors, http, memory, telemetry};

/// A pass may ask for 16 tokens one after another, each of which may take the default timeout; longer than this it
/// hangs.
const LONGEST_PASS: Duration = Duration::from_mins(5);

/// How to run.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Serve only the ZitadelInstances with these labels, such as `team=a`; several operators can then share a cluster.
    #[arg(long, env, default_value = "")]
    instance_selector: String,

    /// Watch service users and Secrets in these namespaces only, such as `shop,billing`; everywhere if there is none.
    #[arg(long, env, value_delimiter = ',')]
    watch_namespaces: Vec<String>,

    /// Whether to write the status of instances. Of several operators that serve the same ones, one should.
    #[arg(long, env, default_value_t = true, action = clap::ArgAction::Set)]
    write_instance_status: bool,

    /// Labels and annotations that users may set on token Secrets, besides the defaults in docs/tokens.md: keys and
    /// whole prefixes, such as `team,example.com/*`.
    #[arg(long, env, value_delimiter = ',')]
    allow_secret_metadata: Vec<String>,

    /// Where /livez, /readyz and /metrics are served.
    #[arg(long, env, default_value = "0.0.0.0:8080")]
    listen: SocketAddr,

    /// Whether /metrics has series for each service user and token, or only those of instances and of the operator.
    #[arg(long, env, default_value_t = true, action = clap::ArgAction::Set)]
    metrics_per_object: bool,

    /// Objects that are worked on at once; those of one instance have a quarter of it.
    #[arg(long, env, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    concurrent: u16,

    /// Memory in KiB that the operator keeps for the objects of one namespace; service users beyond it are refused. One
    /// with a single token is counted with about 4 KiB.
    #[arg(long, env, default_value_t = 8 * 1024, value_parser = clap::value_parser!(u32).range(64..=1024 * 1024))]
    namespace_memory: u32,

    /// The operator's own namespace; service users in it are refused.
    #[arg(long, env = "POD_NAMESPACE")]
    namespace: Option<String>,

    /// Work only while this process holds a Lease in --namespace, so that several can stand by for each other.
    #[arg(long, env)]
    leader_elect: bool,

    /// Name of the Lease. Operators that stand by for each other share it; those that serve other instances do not.
    #[arg(long, env, default_value = "zitadel-tokens")]
    lease_name: String,

    /// Who holds the Lease, for people who look; by default the name of the machine.
    #[arg(long, env)]
    pod_name: Option<String>,

    /// What is logged: `error`, `warn`, `info`, `debug`, `trace`. Libraries are held at --log-libraries.
    #[arg(long, env = "RUST_LOG", default_value = "info")]
    log_level: String,

    /// What libraries may log at most, whatever the log level. Their lines may quote servers; for a search for a fault.
    // Without `env`: nothing in the environment shall lift it.
    #[arg(long, default_value = "warn")]
    log_libraries: telemetry::Most,

    /// How log lines look.
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
        // A sandbox may forbid it; tokens are needed all the same.
        tracing::warn!(error = %error.kind(), "core dumps could not be turned off");
    }
    if let Err(error) = descriptors::raise_limit() {
        tracing::warn!(error = %error.kind(), "the limit of open files could not be raised");
    }
    super::choose_tls()?;
    jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER
        .install_default()
        .map_err(|_| "a signing backend was chosen twice")?;
    let runtime = tokio::runtime::Runtime::new().map_err(|e| format!("no runtime: {e}"))?;
    runtime.block_on(serve(arguments, allowed, panics))
}

async fn serve(arguments: Arguments, allowed: AllowList, panics: Counter) -> Result<(), String> {
    let shutdown = Shutdown::on_signal().map_err(|e| format!("signals: {e}"))?;
    let client = cluster::client().await?;
    let mut registry = Registry::default();
    let listener = http::listen(arguments.listen).map_err(|e| format!("--listen {}: {e}", arguments.listen))?;
    let address = listener.local_addr().map_err(|e| e.to_string())?;

    let (election, leadership) = candidate(&arguments, &client, &shutdown)?;
    let leads: Probe = {
        let leadership = leadership.clone();
        Arc::new(move || leadership.is_leading())
    };
    let metrics = Metrics::register(&mut registry, panics, leads.clone());
    let cache = Arc::new(Cache::new(arguments.namespace_memory as usize * 1024));
    let connections = Arc::new(Connections::default());
    let users = Arc::new(queue_of_users(arguments.concurrent, cache.clone(), connections.clone()));
    let instances = Arc::new(queue_of_instances());
    registry.register_collector(Box::new(Queues(vec![
        ("ZitadelServiceUser", users.clone()),
        ("ZitadelInstance", instances.clone()),
    ])));
    let serves_some_instances_only = !arguments.instance_selector.is_empty();
    registry.register_collector(Box::new(Objects {
        cache: cache.clone(),
        connections: connections.clone(),
        leads,
        per_object: arguments.metrics_per_object,
        serves_some_instances_only,
    }));
    let within = within(arguments.watch_namespaces);
    let triggers = Arc::new(Triggers::new(cache.clone(), users.clone(), instances.clone(), within));
    let context = Arc::new(Context {
        writer: Writer::new(client.clone(), leadership.clone()),
        reader: Reader::new(client.clone()),
        client: client.clone(),
        cache,
        connections,
        instances: instances.clone(),
        users: users.clone(),
        memory: Memory::default(),
        requests: Requests::default(),
        metrics,
        allowed_metadata: Arc::new(allowed),
        operator_namespace: arguments.namespace,
        serves_some_instances_only,
        writes_instance_status: arguments.write_instance_status,
    });

    let ready = Arc::new(AtomicBool::new(false));
    let probe: Probe = {
        let ready = ready.clone();
        Arc::new(move || ready.load(Ordering::Relaxed))
    };
    tracing::info!(version = env!("CARGO_PKG_VERSION"), %address, "started");
    let watches = {
        let triggers = triggers.clone();
        tokio::spawn(async move { Box::pin(triggers.run(client, &arguments.instance_selector)).await })
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
            tracing::info!("watching");
        }
    }
    let jumps = tokio::spawn({
        let context = context.clone();
        async move { clock_jump::watch(|| after_a_jump(&context)).await }
    });
    let work = work(context.clone(), leadership, shutdown);
    match election {
        // Given back last, when nothing of ours is under way any more.
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

/// The keys that users may set on token Secrets. An empty variable of the environment is one empty entry.
fn allow_list(added: &[String]) -> Result<AllowList, String> {
    let added: Vec<_> = added.iter().filter(|entry| !entry.is_empty()).collect();
    AllowList::with(&added).map_err(|error| format!("--allow-secret-metadata: {error}"))
}

/// Where to watch, each place once; None is everywhere. An empty variable of the environment is one empty name.
fn within(mut namespaces: Vec<String>) -> Vec<Option<String>> {
    namespaces.retain(|name| !name.is_empty());
    if namespaces.is_empty() {
        return vec![None];
    }
    namespaces.sort();
    namespaces.dedup();
    namespaces.into_iter().map(Some).collect()
}

/// Who stands for election, if anybody is to, and the fence of this process.
fn candidate(
    arguments: &Arguments,
    client: &Client,
    shutdown: &Shutdown,
) -> Result<(Option<Election>, LeadershipGuard), String> {
    if !arguments.leader_elect {
        return Ok((None, LeadershipGuard::always(shutdown.clone())));
    }
    let namespace = arguments.namespace.as_deref().filter(|name| !name.is_empty());
    let namespace = namespace.ok_or("--leader-elect needs --namespace, where its Lease is")?;
    let (lease, pod) = (&arguments.lease_name, arguments.pod_name.clone());
    let (election, leadership) = Election::new(client.clone(), namespace, lease, pod, shutdown.clone())?;
    Ok((Some(election), leadership))
}

/// Runs the passes of both kinds until shutdown.
async fn work(ctx: Arc<Context>, leadership: LeadershipGuard, shutdown: Shutdown) {
    // The request that is under way, and the write of what it brings.
    let drain = || ctx.connections.longest_timeout() + TIME_TO_WRITE;
    let (users, instances) = (ctx.users.clone(), ctx.instances.clone());
    tokio::join!(
        users.work(
            LONGEST_PASS,
            leadership.clone(),
            shutdown.clone(),
            drain,
            |id, pending_retries| { service_user::reconcile(ctx.clone(), id, pending_retries) }
        ),
        instances.work(LONGEST_PASS, leadership, shutdown, drain, |id, _| {
            instance::reconcile(ctx.clone(), id)
        }),
    );
}

/// This process leads from now on. Whoever led before may have died in the middle of anything. Tokens of ours that are
/// not written yet are still there.
fn take_over(ctx: &Context) {
    ctx.memory.retain(|id| ctx.cache.user(id).is_some());
    ctx.connections.forget_reconciles();
    look_at_all(ctx);
}

/// The clock was set, or the machine slept: timers mean another moment than they did, and how far the servers' clocks are
/// away is no longer known.
fn after_a_jump(ctx: &Context) {
    tracing::warn!("the clock of this machine was set, or the machine slept; everything is looked at again");
    ctx.connections.forget_reconciles();
    look_at_all(ctx);
}

fn look_at_all(ctx: &Context) {
    ctx.instances.wake_all(ctx.cache.instances());
    ctx.users.wake_all(ctx.cache.users(|_, _| true));
}

fn queue_of_users(concurrent: u16, cache: Arc<Cache>, connections: Arc<Connections>) -> Queue {
    let all = usize::from(concurrent);
    let slots = Slots {
        all,
        per_instance: (all / 4).max(1),
    };
    let rank = move |id: &ObjectRef| match cache.user(id) {
        Some(user) => {
            let instance = &*user.instance;
            let urgency = urgency(&user, connections.skew(instance).usable(), Timestamp::now());
            // A tenant must not get a share for each instance that it invents.
            let known = cache.instance(instance).map_or("", |_| instance);
            (urgency, known.into())
        }
        None => (Urgency::Retry, "".into()),
    };
    Queue::new(slots, Box::new(rank))
}

/// All at once: a dead one must not hold up the first look at another, for which its service users wait.
fn queue_of_instances() -> Queue {
    let slots = Slots {
        all: 256,
        per_instance: 1,
    };
    Queue::new(slots, Box::new(|id| (Urgency::Newcomer, id.name.clone())))
}
