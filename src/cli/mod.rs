//! The command line.

mod cluster;
pub mod crds;
mod probe;
pub(crate) mod run;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Keeps fresh, audience-scoped ZITADEL access tokens in Kubernetes Secrets.
#[derive(Parser, Debug)]
#[command(name = "zitadel-tokens", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the operator against the cluster of the current kubeconfig context, or of its own pod.
    Run(run::Arguments),
    /// Print the custom resource definitions as YAML, for `kubectl apply --server-side -f -`.
    Crds,
    /// Request /readyz or /livez of an operator, and fail if it is not ready or not live.
    Probe(probe::Arguments),
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Run(arguments) => run::run(arguments),
        Command::Crds => crds::print(),
        Command::Probe(arguments) => probe::probe(arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("zitadel-tokens: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Installs the TLS backend of kube and reqwest (docs/adr/0017-crypto-backend-and-kube-defaults.md).
fn choose_tls() -> Result<(), String> {
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .map_err(|_| "a TLS backend is already installed".to_owned())
}
