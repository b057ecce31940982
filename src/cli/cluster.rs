//! The Kubernetes client: from a kubeconfig if there is one, otherwise from the pod's service account.

use std::time::Duration;

use kube::config::{KubeConfigOptions, KubeconfigError};
use kube::{Client, Config};
use secrecy::ExposeSecret;

/// Longest silence of a connection to the API server. Every watch gets a bookmark about once a minute, so a silent
/// connection is broken. With its defaults, kube would notice a broken watch after five minutes, and a broken list
/// never (docs/adr/0017-crypto-backend-and-kube-defaults.md).
const LONGEST_SILENCE: Duration = Duration::from_secs(90);

/// Creates the client. It has no retries of kube's own, which would block a reconcile for minutes
/// (docs/adr/0017-crypto-backend-and-kube-defaults.md). Error texts are the operator's own: those of kube may quote
/// lines of the kubeconfig with tokens, the password of a proxy, or the output of a credential plugin.
pub async fn client() -> Result<Client, String> {
    let mut config = match Config::from_kubeconfig(&KubeConfigOptions::default()).await {
        Ok(config) => config,
        // A pod usually has no kubeconfig.
        Err(error) => Config::incluster().map_err(|_| {
            let why = unusable(&error);
            format!("cannot connect to a cluster: there is no usable service account, and {why}")
        })?,
    };
    // kube panics if the token contains a line break.
    let token = config.auth_info.token.as_ref().map(ExposeSecret::expose_secret);
    if token.is_some_and(|token| !token.chars().all(|c| c.is_ascii_graphic())) {
        return Err("the token in the kubeconfig contains an invalid character".into());
    }
    config.default_retry = false;
    config.read_timeout = Some(LONGEST_SILENCE);
    config.write_timeout = Some(LONGEST_SILENCE);
    // Without this, an idle connection counts as a silent one.
    config.reset_reader_on_write = true;
    Client::try_from(config).map_err(|error| format!("cannot create a client for the cluster: {}", wrong(&error)))
}

fn unusable(error: &KubeconfigError) -> String {
    match error {
        KubeconfigError::FindPath => "no kubeconfig exists".into(),
        KubeconfigError::ReadConfig(error, path) => format!("cannot read {}: {}", path.display(), error.kind()),
        KubeconfigError::Parse(error) => {
            let line = error.location().map(|at| format!(", line {}", at.line()));
            format!("the kubeconfig is invalid{}", line.unwrap_or_default())
        }
        KubeconfigError::CurrentContextNotSet => "the kubeconfig has no current context".into(),
        KubeconfigError::LoadContext(name) => format!("the kubeconfig has no context {name:?}"),
        KubeconfigError::LoadClusterOfContext(name) => format!("the kubeconfig has no cluster {name:?}"),
        KubeconfigError::MissingClusterUrl | KubeconfigError::ParseClusterUrl(_) => {
            "the cluster in the kubeconfig has no valid server URL".into()
        }
        KubeconfigError::ParseProxyUrl(_) => "the proxy URL for the cluster is invalid".into(),
        KubeconfigError::LoadCertificateAuthority(_) | KubeconfigError::ParseCertificates(_) => {
            "the certificate authority in the kubeconfig cannot be loaded".into()
        }
        KubeconfigError::LoadClientCertificate(_) | KubeconfigError::LoadClientKey(_) => {
            "the client certificate or key in the kubeconfig cannot be loaded".into()
        }
        _ => "the kubeconfig cannot be used".into(),
    }
}

fn wrong(error: &kube::Error) -> &'static str {
    match error {
        kube::Error::ProxyProtocolDisabled { .. } | kube::Error::ProxyProtocolUnsupported { .. } => {
            "the kubeconfig or HTTPS_PROXY sets a proxy, but connections to the API server cannot use one"
        }
        kube::Error::Auth(_) => "the credentials in the kubeconfig cannot be used, or the credential plugin failed",
        kube::Error::RustlsTls(_) => "the certificate authority, or the client certificate or key, cannot be used",
        _ => "the kubeconfig cannot be used",
    }
}
