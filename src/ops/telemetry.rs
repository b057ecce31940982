//! Logs.

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Our own log targets. Those of dependencies are held at WARN whatever `RUST_LOG` says: kube logs whole bodies of
/// Secrets that it cannot read, HTTP libraries log headers (reference/kube.md §0, fact 5).
const OURS: &str = "zitadel_tokens";

/// Starts logging to stderr. `filter` is in `RUST_LOG`'s form.
pub fn start(format: Format, filter: &str) -> Result<(), String> {
    let wanted: EnvFilter = filter
        .parse()
        .map_err(|_| format!("--log-level: {filter:?} is not a filter such as `info` or `zitadel_tokens=debug`"))?;
    let cap = tracing_subscriber::filter::Targets::new()
        .with_target(OURS, LevelFilter::TRACE)
        .with_target("kube_client::client", LevelFilter::OFF)
        .with_default(LevelFilter::WARN);
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        Format::Text => lines.with_ansi(false).boxed(),
        Format::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(lines.with_filter(cap).with_filter(wanted))
        .try_init()
        .map_err(|_| "logging was started twice".to_owned())?;
    // The message of a panic may hold a value; where it happened is enough to find it.
    std::panic::set_hook(Box::new(|panic| {
        let at = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(at, "panic");
    }));
    Ok(())
}
