//! The port through which requests reach a ZITADEL host. Production sends them with reqwest; the model test has a server of
//! its own (`src/tests/model`).

use std::error::Error;
use std::net::SocketAddr;

use futures::future::BoxFuture;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::HeaderName;
use reqwest::redirect::Policy;
use reqwest::{Certificate, Client, Proxy, Response};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use crate::domain::failure::Failure;
use crate::domain::reason::Reason;
use crate::zitadel::settings::Settings;

/// Selects the instance if the dialled host name is not the issuer's
/// (docs/reference/zitadel-protocol.md#instance-selection).
const INSTANCE_HOST: HeaderName = HeaderName::from_static("x-zitadel-instance-host");

/// A request.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Method and body.
    pub call: Call<'a>,
    /// Path of the URL.
    pub path: &'a str,
    /// Bearer token of the header `Authorization`.
    pub bearer: Option<&'a SecretString>,
}

/// Method and body of a request.
#[derive(Clone, Copy)]
pub enum Call<'a> {
    /// GET.
    Get,
    /// POST with a form.
    PostForm(&'a [(&'a str, &'a str)]),
    /// POST with JSON.
    PostJSON(&'a Value),
    /// PATCH with JSON.
    PatchJSON(&'a Value),
    /// DELETE.
    Delete,
}

/// Sends requests to one host. It follows no redirects. A response is returned when its headers have arrived.
pub trait Transport: Send + Sync {
    /// Sends one request.
    fn send<'a>(&'a self, request: Request<'a>) -> BoxFuture<'a, Result<Response, Failure>>;
}

/// Creates the transport of an instance. It sends nothing yet.
pub type Dial = Box<dyn Fn(&Settings) -> Result<Box<dyn Transport>, Failure> + Send + Sync>;

/// The transport over the network.
pub fn dial(settings: &Settings) -> Result<Box<dyn Transport>, Failure> {
    Ok(Box::new(Network::new(settings)?))
}

struct Network {
    client: Client,
    origin: String,
    instance_host: Option<String>,
}

impl Network {
    /// A client for the endpoint of the instance. If the issuer has another host, every request names the instance in a
    /// header.
    fn new(settings: &Settings) -> Result<Self, Failure> {
        let origin = settings.origin();
        let (scheme, authority) = origin.split_once("://").ok_or(Failure::Malformed)?;
        let mut builder = reqwest::Client::builder()
            // Only the ZitadelInstance configures a proxy, never the environment
            // (docs/adr/0019-assertions-go-only-to-the-configured-host.md).
            .no_proxy()
            .redirect(Policy::none())
            .timeout(settings.timeout)
            .connect_timeout(settings.timeout)
            .user_agent(concat!("zitadel-tokens/", env!("CARGO_PKG_VERSION")));
        if let Some(pem) = &settings.ca {
            let certificates = Certificate::from_pem_bundle(pem.as_bytes()).unwrap_or_default();
            if certificates.is_empty() {
                return Err(Reason::CABundleUnusable.into());
            }
            builder = builder.tls_certs_only(certificates);
        }
        if let Some(proxy) = &settings.proxy {
            builder = builder.proxy(Proxy::all(proxy).map_err(|_| Failure::Malformed)?);
        }
        let mut origin = origin.to_owned();
        if let Some(name) = &settings.tls_server_name {
            // The URL carries the name that the certificate must have. The resolver maps it to the dialled host.
            let (host, port) = authority
                .rsplit_once(':')
                .map_or((authority, None), |(h, p)| (h, Some(p)));
            origin = port.map_or_else(
                || format!("{scheme}://{name}"),
                |port| format!("{scheme}://{name}:{port}"),
            );
            builder = builder.dns_resolver(Fixed(host.to_owned()));
        }
        let issuer_host = settings.issuer.split_once("://").map(|(_, host)| host.to_owned());
        let dialled_as = origin.split_once("://").map(|(_, host)| host);
        Ok(Self {
            client: builder.build().map_err(|_| Failure::from(Reason::CABundleUnusable))?,
            instance_host: issuer_host.filter(|host| Some(host.as_str()) != dialled_as),
            origin,
        })
    }
}

impl Transport for Network {
    fn send<'a>(&'a self, request: Request<'a>) -> BoxFuture<'a, Result<Response, Failure>> {
        let url = format!("{}{}", self.origin, request.path);
        let mut builder = match request.call {
            Call::Get => self.client.get(url),
            Call::PostForm(form) => self.client.post(url).form(form),
            Call::PostJSON(body) => self.client.post(url).json(body),
            Call::PatchJSON(body) => self.client.patch(url).json(body),
            Call::Delete => self.client.delete(url),
        };
        if let Some(token) = request.bearer {
            builder = builder.bearer_auth(token.expose_secret());
        }
        if let Some(host) = &self.instance_host {
            builder = builder.header(INSTANCE_HOST, host);
        }
        Box::pin(async { builder.send().await.map_err(|e| failure(&e)) })
    }
}

/// A resolver that looks up the addresses of one fixed host for every name.
struct Fixed(String);

impl Resolve for Fixed {
    fn resolve(&self, _: Name) -> Resolving {
        let host = self.0.clone();
        Box::pin(async move {
            // Port 0 makes reqwest use the port of the URL.
            let found: Vec<SocketAddr> = tokio::net::lookup_host((host, 0)).await?.collect();
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// Classifies an error and drops its text, which may contain addresses or secrets.
pub fn failure(error: &reqwest::Error) -> Failure {
    if error.is_timeout() {
        return Failure::Timeout;
    }
    let mut cause: Option<&dyn Error> = Some(error);
    while let Some(e) = cause {
        if is_tls(e) {
            return Failure::Tls;
        }
        if e.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_parse) {
            return Failure::Malformed;
        }
        cause = e.source();
    }
    if error.is_body() || error.is_decode() {
        Failure::Malformed
    } else if error.is_connect() {
        Failure::Connect
    } else {
        Failure::Broken
    }
}

/// Finds a rustls error inside an `io::Error`, which may be nested. `io::Error::source()` skips the inner error itself.
fn is_tls(error: &(dyn Error + 'static)) -> bool {
    let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    error.is::<rustls::Error>() || inner.is_some_and(|e| is_tls(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tls_error_is_found_in_nested_errors() {
        use std::io;
        let once = io::Error::other(rustls::Error::DecryptError);
        assert!(is_tls(&once));
        assert!(is_tls(&io::Error::other(once)));
        assert!(!is_tls(&io::Error::other(io::Error::other("reset"))));
    }
}
