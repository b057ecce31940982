//! Logging. It caps library logs and drops panic messages, because neither knows which values are secret. The
//! operator's own types redact themselves (`src/tests/redaction.rs`).
//!
//! Texts of servers and libraries are dropped where they arrive, for example in `zitadel/token.rs`,
//! `zitadel/transport.rs` and `controller/write.rs`. Values of closed sets take their place (`domain/failure.rs`,
//! `domain/reason.rs`).

use clap::ValueEnum;
use prometheus_client::metrics::counter::Counter;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Plain text.
    Text,
    /// One JSON object per line.
    Json,
}

/// The most verbose level at which libraries may log.
pub type LibraryLevel = LevelFilter;

/// Prefix of the operator's own log targets.
const OWN_TARGETS: &str = "zitadel_tokens";

/// This target logs whole bodies of Secrets that kube cannot decode, at WARN and TRACE
/// (docs/adr/0017-crypto-backend-and-kube-defaults.md).
const LOGS_BODIES: &str = "kube_client::client";

/// Starts logging to stderr. `filter` has the syntax of `RUST_LOG`. Libraries log at most at `libraries`, whatever the
/// filter says, because they do not know which values are secret. Increments `panics` on each panic.
pub fn start(format: Format, filter: &str, libraries: LibraryLevel, panics: Counter) -> Result<(), String> {
    let wanted: EnvFilter = filter
        .parse()
        .map_err(|_| format!("--log-level: {filter:?} is invalid; use e.g. `info` or `zitadel_tokens=debug`"))?;
    let cap = Targets::new()
        .with_target(OWN_TARGETS, LevelFilter::TRACE)
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
        .map_err(|_| "logging is already initialized".to_owned())?;
    // The message of a panic may contain a secret value. The location is enough to find the fault.
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

    /// Set in the child process that panics.
    const CHILD: &str = "ZITADEL_TOKENS_TEST_PANIC";

    /// The panic hook affects the whole process, so the test runs itself again in a child process.
    #[test]
    fn panic_log_has_the_location_and_not_the_message() {
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
                "ops::telemetry::tests::panic_log_has_the_location_and_not_the_message",
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
