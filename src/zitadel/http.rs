//! One HTTP exchange with a ZITADEL host: bounded in time and size, within the host's limits, without redirects.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::jiff::{SignedDuration, Timestamp, fmt::rfc2822};
use reqwest::Response;
use reqwest::header::{AGE, DATE, HeaderMap, RETRY_AFTER};
use secrecy::{SecretSlice, SecretString};
use tokio::time::Instant;

use crate::domain::backoff::LONGEST_RETRY_AFTER;
use crate::domain::clock_skew::{Reading, Sample, Skew, was_set};
use crate::domain::failure::Failure;
use crate::domain::time::shifted;
use crate::zitadel::clock::Clock;
use crate::zitadel::limits::Limits;
use crate::zitadel::transport::{Call, Request, Transport, failure};

/// Longest accepted body. A token has at most 32 KiB (`domain/answer.rs`), a discovery document about 3 KiB.
const MAX_BODY: usize = 256 * 1024;

/// Initial capacity without a `Content-Length`. A token with many roles has about 4 KiB.
const USUAL_BODY: usize = 16 * 1024;

/// An HTTP client for one host.
pub struct Http {
    transport: Box<dyn Transport>,
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
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Http").finish_non_exhaustive()
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
    /// A client that sends through `transport`.
    pub fn new(transport: Box<dyn Transport>, limits: Arc<Limits>, ours: Clock) -> Self {
        Self {
            transport,
            limits,
            ours,
            clock: Mutex::default(),
        }
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
        let call = Call::Get;
        self.send(Request { call, path, bearer }).await
    }

    /// Sends a form in a POST request.
    pub async fn post(&self, path: &str, form: &[(&str, &str)]) -> Result<Answer, Failure> {
        let (call, bearer) = (Call::PostForm(form), None);
        self.send(Request { call, path, bearer }).await
    }

    /// Sends a request to ZITADEL's API.
    pub async fn call_api(&self, call: Call<'_>, path: &str, token: &SecretString) -> Result<Answer, Failure> {
        let bearer = Some(token);
        self.send(Request { call, path, bearer }).await
    }

    async fn send(&self, request: Request<'_>) -> Result<Answer, Failure> {
        let _permit = self.limits.admit().await.ok_or(Failure::Connect)?;
        let sent = self.read_clocks();
        let response = self.transport.send(request).await?;
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
