//! How an instance is reached.

use std::time::Duration;

/// How an instance is reached.
#[derive(Clone, PartialEq, Eq)]
pub struct Settings {
    /// Name of the instance.
    pub name: String,
    /// The issuer, as tokens and discovery state it.
    pub issuer: String,
    /// Where to dial, if not at the issuer.
    pub endpoint: Option<String>,
    /// Trusted certificates in PEM, instead of the system's.
    pub ca: Option<String>,
    /// Name that the certificate must carry, if not the dialled host's.
    pub tls_server_name: Option<String>,
    /// Proxy to go through.
    pub proxy: Option<String>,
    /// Time for one request.
    pub timeout: Duration,
    /// Whether plain http is allowed, to loopback and `*.svc`.
    pub allow_insecure_http: bool,
    /// Budget and concurrency of the dialled host.
    pub budget: RequestBudget,
}

impl std::fmt::Debug for Settings {
    /// Without the proxy: a password in its URL is refused (`domain::validate`), and yet it could be there.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Settings");
        shown.field("name", &self.name).field("issuer", &self.issuer);
        shown.field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

/// What an instance asks for its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestBudget {
    /// Sustained requests per second.
    pub per_second: u32,
    /// Requests at once after a quiet time.
    pub burst: u32,
    /// Requests under way at once.
    pub concurrent: usize,
}
