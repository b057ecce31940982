//! The way to the cluster: a kubeconfig, else the pod's service account.

use std::time::Duration;

use kube::config::{KubeConfigOptions, KubeconfigError};
use kube::{Client, Config};
use secrecy::ExposeSecret;

/// The API server says something on every watch once in about a minute (bookmarks); who is silent for longer is gone. kube
/// alone would notice after five minutes, and a list never (reference/kube.md §0, fact 7).
const LONGEST_SILENCE: Duration = Duration::from_secs(90);

/// A client without kube's own retries, which would hold a pass for minutes (reference/kube.md §0, fact 7). Errors are
/// in our own words: kube's quote the kubeconfig's lines with tokens in them, a proxy's password, what a credential
/// plugin printed.
pub async fn client() -> Result<Client, String> {
    let mut config = match Config::from_kubeconfig(&KubeConfigOptions::default()).await {
        Ok(config) => config,
        // A pod has no kubeconfig.
        Err(error) => Config::incluster().map_err(|_| {
            let why = unusable(&error);
            format!("no cluster: there is no usable service account, and {why}")
        })?,
    };
    // kube panics on a token with a line break.
    let token = config.auth_info.token.as_ref().map(ExposeSecret::expose_secret);
    if token.is_some_and(|token| !token.chars().all(|c| c.is_ascii_graphic())) {
        return Err("the kubeconfig's token has a character that no token has".into());
    }
    config.default_retry = false;
    config.read_timeout = Some(LONGEST_SILENCE);
    config.write_timeout = Some(LONGEST_SILENCE);
    // The silence of a connection that nobody used is no silence.
    config.reset_reader_on_write = true;
    Client::try_from(config).map_err(|error| format!("no client for the cluster: {}", wrong(&error)))
}

fn unusable(error: &KubeconfigError) -> String {
    match error {
        KubeconfigError::FindPath => "no kubeconfig was found".into(),
        KubeconfigError::ReadConfig(error, path) => format!("{} cannot be read: {}", path.display(), error.kind()),
        KubeconfigError::Parse(error) => {
            let line = error.location().map(|at| format!(", line {}", at.line()));
            format!("the kubeconfig is not valid{}", line.unwrap_or_default())
        }
        KubeconfigError::CurrentContextNotSet => "the kubeconfig has no current context".into(),
        KubeconfigError::LoadContext(name) => format!("the kubeconfig has no context {name:?}"),
        KubeconfigError::LoadClusterOfContext(name) => format!("the kubeconfig has no cluster {name:?}"),
        KubeconfigError::MissingClusterUrl | KubeconfigError::ParseClusterUrl(_) => {
            "the kubeconfig's cluster has no valid server".into()
        }
        KubeconfigError::ParseProxyUrl(_) => "the proxy for the cluster is no URL".into(),
        KubeconfigError::LoadCertificateAuthority(_) | KubeconfigError::ParseCertificates(_) => {
            "the kubeconfig's certificate authority cannot be loaded".into()
        }
        KubeconfigError::LoadClientCertificate(_) | KubeconfigError::LoadClientKey(_) => {
            "the kubeconfig's client certificate or key cannot be loaded".into()
        }
        _ => "the kubeconfig cannot be used".into(),
    }
}

fn wrong(error: &kube::Error) -> &'static str {
    match error {
        kube::Error::ProxyProtocolDisabled { .. } | kube::Error::ProxyProtocolUnsupported { .. } => {
            "the kubeconfig or HTTPS_PROXY asks for a proxy, and none can be used toward the API server"
        }
        kube::Error::Auth(_) => "the kubeconfig's credentials cannot be used, or its credential plugin failed",
        kube::Error::RustlsTls(_) => "its certificate authority, or the client's certificate or key, cannot be used",
        _ => "the kubeconfig cannot be used",
    }
}
