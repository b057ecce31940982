//! `zitadel-tokens run`: the composition root.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use k8s_openapi::jiff::Timestamp;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::cli::cluster;
use crate::controller::instance::Connections;
use crate::controller::metrics::objects::Objects;
use crate::controller::metrics::{Metrics, Queues};
use crate::controller::queue::Queue;
use crate::controller::service_user::{Forced, TIME_TO_WRITE, UnwrittenTokens};
use crate::controller::triggers::{Cache, Triggers};
use crate::controller::write::Writer;
use crate::controller::{Context, instance, service_user};
use crate::domain::facts::ObjectRef;
use crate::domain::order::{Slots, Urgency, urgency};
use crate::ops::http::Probe;
use crate::ops::lease::Fence;
use crate::ops::shutdown::Shutdown;
use crate::ops::{clock, http, memory, telemetry};

/// A pass may ask for 16 tokens one after another, each of which may take the default timeout; longer than this it
/// hangs.
const LONGEST_PASS: Duration = Duration::from_mins(5);

/// How to run.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Serve only the ZitadelInstances with these labels, such as `team=a`; several operators can then share a cluster.
    #[arg(long, env, default_value = "")]
    instance_selector: String,

    /// Where /livez, /readyz and /metrics are served.
    #[arg(long, env, default_value = "0.0.0.0:8080")]
    listen: SocketAddr,

    /// Whether /metrics has series for each service user and token, or only those of instances and of the operator.
    #[arg(long, env, default_value_t = true, action = clap::ArgAction::Set)]
    metrics_per_object: bool,

    /// Objects that are worked on at once; those of one instance have a quarter of it.
    #[arg(long, env, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    concurrent: u16,

    /// The operator's own namespace; service users in it are refused.
    #[arg(long, env = "POD_NAMESPACE")]
    namespace: Option<String>,

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
    // One crypto backend for kube, reqwest and signing (reference/kube.md §0, facts 1 and 2).
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .map_err(|_| "a TLS backend was chosen twice")?;
    jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER
        .install_default()
        .map_err(|_| "a signing backend was chosen twice")?;
    let runtime = tokio::runtime::Runtime::new().map_err(|e| format!("no runtime: {e}"))?;
    runtime.block_on(serve(arguments, panics))
}

async fn serve(arguments: Arguments, panics: Counter) -> Result<(), String> {
    let shutdown = Shutdown::on_signal().map_err(|e| format!("signals: {e}"))?;
    let client = cluster::client().await?;
    let mut registry = Registry::default();
    let listener = TcpListener::bind(arguments.listen)
        .await
        .map_err(|e| format!("--listen {}: {e}", arguments.listen))?;
    let address = listener.local_addr().map_err(|e| e.to_string())?;

    let fence = Fence::always_ours(shutdown.clone());
    let leads: Probe = {
        let fence = fence.clone();
        Arc::new(move || fence.remaining().is_ok())
    };
    let metrics = Metrics::register(&mut registry, panics, leads);
    let cache = Arc::new(Cache::default());
    let all = usize::from(arguments.concurrent);
    let slots = Slots {
        all,
        per_instance: (all / 4).max(1),
    };
    let connections = Arc::new(Connections::default());
    let users = Arc::new(queue_of_users(slots, cache.clone(), connections.clone()));
    // All at once: a dead one must not hold up the first look at another, for which its service users wait.
    let few = Slots {
        all: 256,
        per_instance: 1,
    };
    let instances = Arc::new(Queue::new(few, Box::new(|id| (Urgency::Newcomer, id.name.clone()))));
    registry.register_collector(Box::new(Queues(vec![
        ("ZitadelServiceUser", users.clone()),
        ("ZitadelInstance", instances.clone()),
    ])));
    let serves_some_instances_only = !arguments.instance_selector.is_empty();
    registry.register_collector(Box::new(Objects {
        cache: cache.clone(),
        connections: connections.clone(),
        per_object: arguments.metrics_per_object,
        serves_some_instances_only,
    }));
    let triggers = Arc::new(Triggers::new(cache.clone(), users.clone(), instances.clone()));
    let context = Arc::new(Context {
        writer: Writer::new(client.clone(), fence),
        client: client.clone(),
        cache,
        connections,
        instances: instances.clone(),
        users: users.clone(),
        unwritten: UnwrittenTokens::default(),
        forced: Forced::default(),
        metrics,
        operator_namespace: arguments.namespace,
        serves_some_instances_only,
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
    let health = tokio::spawn(http::serve(
        listener,
        alive,
        probe,
        Arc::new(registry),
        shutdown.clone(),
    ));

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
        async move { clock::watch(|| look_at_all(&context)).await }
    });
    // The request that is under way, and the write of what it brings.
    let drain = || context.connections.longest_timeout() + TIME_TO_WRITE;
    tokio::join!(
        users.work(LONGEST_PASS, shutdown.clone(), drain, |id, held_back| {
            service_user::reconcile(context.clone(), id, held_back)
        }),
        instances.work(LONGEST_PASS, shutdown, drain, |id, _| {
            instance::reconcile(context.clone(), id)
        }),
    );
    watches.abort();
    jumps.abort();
    // A client that keeps its connection open must not keep the process.
    health.abort();
    tracing::info!("stopped");
    Ok(())
}

/// The clock was set, or the machine slept: timers mean another moment than they did, and how far the servers' clocks are
/// away is no longer known.
fn look_at_all(ctx: &Context) {
    tracing::warn!("the clock of this machine was set, or the machine slept; everything is looked at again");
    ctx.instances.wake_all(ctx.cache.instances());
    ctx.users.wake_all(ctx.cache.users(|_| true));
}

fn queue_of_users(slots: Slots, cache: Arc<Cache>, connections: Arc<Connections>) -> Queue {
    let rank = move |id: &ObjectRef| match cache.user(id) {
        Some(user) => {
            let instance = user.spec.instance_ref.name.as_str();
            let urgency = urgency(&user, connections.skew(instance), Timestamp::now());
            (urgency, instance.into())
        }
        None => (Urgency::Retry, "".into()),
    };
    Queue::new(slots, Box::new(rank))
}
