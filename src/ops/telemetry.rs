//! Logs.

use clap::ValueEnum;
use prometheus_client::metrics::counter::Counter;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::{LevelFilter, Targets};
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

/// The most that libraries log.
pub type Most = LevelFilter;

/// Our own log targets.
const WRITE_TERM: &str = "zitadel_tokens";

/// Logs whole bodies of Secrets that it cannot read, at WARN and TRACE (reference/kube.md §0, fact 5).
const LOGS_BODIES: &str = "kube_client::client";

/// Starts logging to stderr. `filter` is in `RUST_LOG`'s form. Libraries log at `libraries` at most, whatever the filter
/// says: they know nothing of what is secret here. Each panic is counted.
pub fn start(format: Format, filter: &str, libraries: Most, panics: Counter) -> Result<(), String> {
    let wanted: EnvFilter = filter
        .parse()
        .map_err(|_| format!("--log-level: {filter:?} is not a filter such as `info` or `zitadel_tokens=debug`"))?;
    let cap = Targets::new()
        .with_target(WRITE_TERM, LevelFilter::TRACE)
        .with_target(LOGS_BODIES, LevelFilter::OFF)
        .with_default(libraries);
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
    std::panic::set_hook(Box::new(move |panic| {
        panics.inc();
        let at = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(at, "panic");
    }));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Set in the process that panics.
    const CHILD: &str = "ZITADEL_TOKENS_TEST_PANIC";

    /// The hook is the whole process's, so that it is tried in another one: this test once more.
    #[test]
    fn a_panic_tells_its_place_and_not_its_message() {
        if let Ok(message) = std::env::var(CHILD) {
            let panics = Counter::default();
            start(Format::Text, "trace", LevelFilter::TRACE, panics.clone()).expect("started");
            let panicked = std::thread::spawn(move || panic!("{message}")).join();
            assert!(panicked.is_err());
            assert_eq!(panics.get(), 1);
            return;
        }
        let output = Command::new(std::env::current_exe().expect("this test"))
            .args([
                "--exact",
                "--nocapture",
                "ops::telemetry::tests::a_panic_tells_its_place_and_not_its_message",
            ])
            .env(CHILD, "canary-in-a-message")
            .output()
            .expect("it runs");
        let shown = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "{shown}");
        assert!(shown.contains("panic at=\"src/ops/telemetry.rs:"), "{shown}");
        assert!(!shown.contains("canary"), "{shown}");
    }
}
