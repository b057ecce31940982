//! The connection settings of an instance.

use std::time::Duration;

/// The connection settings of an instance.
#[derive(Clone, PartialEq, Eq)]
pub struct Settings {
    /// Name of the instance.
    pub name: String,
    /// The issuer, exactly as in tokens and in the discovery document.
    pub issuer: String,
    /// The origin to dial, if it is not the issuer.
    pub endpoint: Option<String>,
    /// Trusted CA certificates in PEM, which replace those of the system.
    pub ca: Option<String>,
    /// The name that the server's certificate must have, if it is not the dialled host.
    pub tls_server_name: Option<String>,
    /// URL of the proxy.
    pub proxy: Option<String>,
    /// Timeout of one request.
    pub timeout: Duration,
    /// Whether plain HTTP is allowed. It is then limited to loopback and `*.svc`.
    pub allow_insecure_http: bool,
    /// Request budget and concurrency limit for the dialled host.
    pub budget: RequestBudget,
}

impl Settings {
    /// Where to dial: scheme and authority.
    #[must_use]
    pub fn origin(&self) -> &str {
        self.endpoint.as_deref().unwrap_or(&self.issuer)
    }
}

impl std::fmt::Debug for Settings {
    /// Omits the proxy, whose URL may contain a password even though `ZitadelClient::new` rejects one.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Settings");
        shown.field("name", &self.name).field("issuer", &self.issuer);
        shown.field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

/// The request budget that an instance sets for its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestBudget {
    /// Sustained requests per second.
    pub per_second: u32,
    /// Requests that may be sent at once after an idle period.
    pub burst: u32,
    /// Concurrent requests.
    pub concurrent: usize,
}

/// Whether plain http to this `host[:port]` stays on the machine or in the cluster.
#[must_use]
pub fn is_local(authority: &str) -> bool {
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    host == "localhost"
        || host.parse::<std::net::Ipv4Addr>().is_ok_and(|ip| ip.is_loopback())
        || [".svc", ".svc.cluster.local"]
            .iter()
            .any(|suffix| host.ends_with(suffix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_goes_nowhere_far() {
        for (authority, near) in [
            ("127.0.0.1:8080", true),
            ("localhost", true),
            ("zitadel.zitadel.svc:8080", true),
            ("zitadel.zitadel.svc.cluster.local", true),
            ("auth.example.com", false),
            ("127.0.0.1.example.com", false),
            ("evil.svc.example.com", false),
            ("localhost.example.com:80", false),
            ("10.0.0.1", false),
        ] {
            assert_eq!(is_local(authority), near, "{authority}");
        }
    }
}
