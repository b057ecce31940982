//! One HTTP exchange with a ZITADEL host: bounded in time and size, within the host's limits, without redirects.

use std::error::Error;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::jiff::{SignedDuration, Timestamp, fmt::rfc2822};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{AGE, DATE, HeaderMap, HeaderName, RETRY_AFTER};
use reqwest::redirect::Policy;
use reqwest::{Certificate, Proxy, RequestBuilder, Response};
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use tokio::time::Instant;

use crate::domain::backoff::LONGEST_RETRY_AFTER;
use crate::domain::clock_skew::{Reading, Sample, Skew, was_set};
use crate::domain::failure::Failure;
use crate::domain::reason::Reason;
use crate::domain::time::shifted;
use crate::zitadel::clock::Clock;
use crate::zitadel::limits::Limits;
use crate::zitadel::settings::Settings;

/// Longest accepted body. A token has at most 64 KiB, a discovery document about 3 KiB.
const MAX_BODY: usize = 256 * 1024;

/// Initial capacity without a `Content-Length`. A token with many roles has about 4 KiB.
const USUAL_BODY: usize = 16 * 1024;

/// Selects the instance if the dialled host name is not the issuer's
/// (docs/reference/zitadel-protocol.md#instance-selection).
const INSTANCE_HOST: HeaderName = HeaderName::from_static("x-zitadel-instance-host");

/// An HTTP client for one host.
pub struct Http {
    client: reqwest::Client,
    origin: String,
    instance_host: Option<String>,
    limits: Arc<Limits>,
    ours: Clock,
    clock: Mutex<ServerClock>,
}

/// The clock skew according to the responses, and the local time of the last response.
#[derive(Default)]
struct ServerClock {
    skew: Skew,
    last: Option<Reading>,
}

impl ServerClock {
    /// Whether the local clock was set since the last response.
    fn is_outdated(&self, now: Reading) -> bool {
        self.last.is_some_and(|last| was_set(last, now))
    }

    fn skew(&self, now: Reading) -> Skew {
        if self.is_outdated(now) {
            self.skew.unproven()
        } else {
            self.skew
        }
    }
}

impl std::fmt::Debug for Http {
    /// Omits reqwest's client, whose `Debug` output contains the proxy.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Http");
        shown.field("origin", &self.origin).finish_non_exhaustive()
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

/// A complete response.
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// `Retry-After` as a time by the server's clock, capped.
    pub retry_after: Option<Timestamp>,
    /// The whole body.
    pub body: SecretSlice<u8>,
    /// When the request was sent, by the server's clock.
    pub sent: Timestamp,
}

impl Http {
    /// A client that dials `origin`. If the issuer has another host, every request names the instance in a header.
    pub fn new(settings: &Settings, origin: &str, limits: Arc<Limits>, ours: Clock) -> Result<Self, Failure> {
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
            limits,
            ours,
            clock: Mutex::default(),
        })
    }

    /// How far the server's clock is ahead of the local clock, according to all responses so far.
    pub fn skew(&self) -> Skew {
        self.lock().skew(self.read_clocks())
    }

    /// Whether the local clock was set since the last response, so that the skew must be measured again.
    pub fn clock_was_set(&self) -> bool {
        self.lock().is_outdated(self.read_clocks())
    }

    /// Sends a GET request, with a bearer token if given.
    pub async fn get(&self, path: &str, bearer: Option<&SecretString>) -> Result<Answer, Failure> {
        let request = self.client.get(format!("{}{path}", self.origin));
        self.send(match bearer {
            Some(token) => request.bearer_auth(token.expose_secret()),
            None => request,
        })
        .await
    }

    /// Sends a form in a POST request.
    pub async fn post(&self, path: &str, form: &[(&str, &str)]) -> Result<Answer, Failure> {
        self.send(self.client.post(format!("{}{path}", self.origin)).form(form))
            .await
    }

    async fn send(&self, request: RequestBuilder) -> Result<Answer, Failure> {
        let _permit = self.limits.admit().await.ok_or(Failure::Connect)?;
        let request = match &self.instance_host {
            Some(host) => request.header(INSTANCE_HOST, host),
            None => request,
        };
        let sent = self.read_clocks();
        let response = request.send().await.map_err(|e| failure(&e))?;
        let received = self.read_clocks();
        let skew = self.observe(response.headers(), sent, received);
        let sent = skew.theirs(sent.0);
        let status = response.status().as_u16();
        let retry_after = retry_after(response.headers(), skew.theirs(received.0));
        let body = match body(response).await {
            // An error status is meaningful without its body, which can only add an OAuth error.
            Err(Failure::Malformed) if status != 200 => Vec::new().into(),
            read => read?,
        };
        Ok(Answer {
            status,
            retry_after,
            body,
            sent,
        })
    }

    /// Updates the clock skew from the `Date` of a response. A response with `Age` comes from a cache and is ignored:
    /// its `Date` is the time of its creation (RFC 9111 §5.1).
    fn observe(&self, headers: &HeaderMap, sent: Reading, received: Reading) -> Skew {
        let date = headers.get(DATE).filter(|_| !headers.contains_key(AGE));
        let date = date.and_then(|value| rfc2822::parse(value.to_str().ok()?).ok());
        let date = date.filter(|_| !was_set(sent, received));
        let sample = date.and_then(|date| Sample::new(date.timestamp(), sent.0, received.0));
        let mut clock = self.lock();
        clock.skew = clock.skew(received);
        clock.last = Some(received);
        if let Some(sample) = sample {
            clock.skew.observe(sample);
        }
        clock.skew
    }

    fn read_clocks(&self) -> Reading {
        (self.ours.now(), Instant::now().into_std())
    }

    fn lock(&self) -> MutexGuard<'_, ServerClock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the body, usually into one allocation: a growing buffer leaves copies in memory that are not wiped.
async fn body(mut response: Response) -> Result<SecretSlice<u8>, Failure> {
    let length = response
        .content_length()
        .and_then(|length| usize::try_from(length).ok());
    let mut body = Vec::with_capacity(length.unwrap_or(USUAL_BODY).min(MAX_BODY));
    while let Some(chunk) = response.chunk().await.map_err(|e| failure(&e))? {
        if body.len() + chunk.len() > MAX_BODY {
            return Err(Failure::Malformed);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.into())
}

/// Classifies an error and drops its text, which may contain addresses or secrets.
fn failure(error: &reqwest::Error) -> Failure {
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

/// Parses `Retry-After`, which is a number of seconds or a date (RFC 9110 §10.2.3).
fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Timestamp> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let at = match text.parse::<u32>() {
        Ok(seconds) => shifted(now, SignedDuration::from_secs(seconds.into())),
        Err(_) => rfc2822::parse(text).ok()?.timestamp(),
    };
    Some(at.clamp(now, shifted(now, LONGEST_RETRY_AFTER)))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::domain::fixtures::TEN_YEARS;

    #[test]
    fn tls_error_is_found_in_nested_errors() {
        use std::io;
        let once = io::Error::other(rustls::Error::DecryptError);
        assert!(is_tls(&once));
        assert!(is_tls(&io::Error::other(once)));
        assert!(!is_tls(&io::Error::other(io::Error::other("reset"))));
    }

    #[test]
    fn setting_the_local_clock_makes_the_skew_unproven() {
        let then = (Timestamp::UNIX_EPOCH, Instant::now());
        let mut skew = Skew::default();
        skew.observe(Sample::new(then.0, then.0, then.0).expect("a sample"));
        let clock = ServerClock { skew, last: Some(then) };
        // Seconds that pass on the wall clock and on the monotonic clock, and whether the skew stays proven.
        for (wall, monotonic, known) in [
            (0, 0, true),
            (3_600, 3_600, true),
            (3_600, 0, false),
            (-2, 0, false),
            (TEN_YEARS, 5, false),
            (-TEN_YEARS, 5, false),
        ] {
            let now = (
                shifted(then.0, SignedDuration::from_secs(wall)),
                then.1 + Duration::from_secs(monotonic),
            );
            assert_eq!(clock.is_outdated(now), !known, "{wall}");
            assert_eq!(clock.skew(now).certain(now.0), known.then_some(now.0), "{wall}");
        }
    }

    #[test]
    fn retry_after_accepts_seconds_and_dates_and_is_capped() {
        let now: Timestamp = "2026-11-25T12:00:00Z".parse().expect("a time");
        let table = [
            ("30", Some(30)),
            ("0", Some(0)),
            ("86400", Some(900)),
            ("Wed, 25 Nov 2026 12:01:00 GMT", Some(60)),
            ("Wed, 25 Nov 2026 11:00:00 GMT", Some(0)),
            ("Thu, 26 Nov 2026 12:00:00 GMT", Some(900)),
            ("soon", None),
            ("-1", None),
        ];
        for (value, seconds) in table {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, value.parse().expect("a header"))]);
            let got = retry_after(&headers, now).map(|at| at.as_second() - now.as_second());
            assert_eq!(got, seconds, "{value}");
        }
        // With a wrong `Date`, the server's clock may have any value.
        for now in [Timestamp::MIN, Timestamp::MAX] {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, "4294967295".parse().expect("a header"))]);
            assert!(retry_after(&headers, now).is_some_and(|at| at >= now), "{now}");
        }
    }
}
