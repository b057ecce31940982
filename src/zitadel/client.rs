//! The client of one ZITADEL instance: its connection, its discovery document, and the id of the ZITADEL API's project.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use secrecy::ExposeSecret;
use serde::Deserialize;
use tokio::time::Instant;

use crate::domain::answer::{self, TokenAnswer};
use crate::domain::assertion;
use crate::domain::clock_skew::{Skew, is_news};
use crate::domain::failure::Failure;
use crate::domain::hash;
use crate::domain::key::{ServiceKey, is_plain_id};
use crate::domain::reason::Reason;
use crate::domain::scope;
use crate::domain::validate::is_origin;
use crate::zitadel::api_call::APIToken;
use crate::zitadel::api_error::APIError;
use crate::zitadel::clock::Clock;
use crate::zitadel::discovery::{self, Discovery};
use crate::zitadel::http::Http;
use crate::zitadel::limits::{Hosts, Limits};
use crate::zitadel::settings::{Settings, is_local};
use crate::zitadel::token;
use crate::zitadel::transport::Call;

/// A discovery document older than this is fetched again before it is used.
const DISCOVERY_AGE: Duration = Duration::from_hours(1);

/// For this long after a failed discovery, the service users of the instance get the same failure without a request of
/// their own.
const DISCOVERY_PAUSE: Duration = Duration::from_secs(5);

/// The management API's path for the id of the instance's own project
/// (docs/reference/zitadel-protocol.md#the-zitadel-apis-audience).
const IAM_PATH: &str = "/management/v1/iam";

/// Longest wait for another service user's attempt to learn the project id. A tenant whose requests hang must not block
/// the others.
const WAIT_FOR_PROJECT_ID: Duration = Duration::from_millis(500);

/// A token response and the time of its request.
#[derive(Debug)]
pub struct Exchanged {
    /// The token response, not validated yet.
    pub answer: TokenAnswer,
    /// When the request was sent, by the server's clock.
    pub sent: Timestamp,
}

/// The last discovery that succeeded, and the last discovery if it failed.
#[derive(Debug, Default)]
struct Discoveries {
    known: Option<(Discovery, Instant)>,
    failed: Option<(Failure, Instant)>,
}

/// A connected instance.
#[derive(Debug)]
pub struct ZitadelClient {
    settings: Settings,
    clock: Clock,
    http: Http,
    limits: Arc<Limits>,
    discovery: Mutex<Discoveries>,
    project_id: OnceLock<String>,
    learning: tokio::sync::Mutex<()>,
}

impl ZitadelClient {
    /// Prepares the connection. Sends nothing.
    pub fn new(settings: Settings, hosts: &Hosts) -> Result<Self, Failure> {
        let addresses = [
            Some(&settings.issuer),
            settings.endpoint.as_ref(),
            settings.proxy.as_ref(),
        ];
        if !addresses.into_iter().flatten().all(|address| is_origin(address)) {
            return Err(Reason::InstanceInvalid.into());
        }
        let (scheme, authority) = settings.origin().split_once("://").ok_or(Failure::Malformed)?;
        // Requests to a proxy leave the machine or cluster, even if the host itself is local.
        let near = settings.proxy.is_none() && is_local(authority);
        if scheme != "https" && !(settings.allow_insecure_http && near) {
            return Err(Reason::InsecureHTTP.into());
        }
        // Besides the host, these settings decide whether a request gets through. Instances that differ in them have
        // separate circuit breakers, so that wrong settings of one do not open the breaker of another.
        let timeout = settings.timeout.as_millis().to_string();
        let way = [&settings.ca, &settings.tls_server_name, &settings.proxy];
        let way = way.map(|part| part.as_deref().unwrap_or_default());
        let way = hash::of(way.into_iter().chain([scheme, &timeout]).map(str::as_bytes));
        let limits = hosts.dial(&settings.name, authority, &way, settings.budget);
        let clock = hosts.clock().clone();
        let http = Http::new(hosts.transport(&settings)?, limits.clone(), clock.clone());
        Ok(Self {
            settings,
            clock,
            http,
            limits,
            discovery: Mutex::default(),
            project_id: OnceLock::new(),
            learning: tokio::sync::Mutex::default(),
        })
    }

    /// The connection settings.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The limits of the dialled host.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// For requests to ZITADEL's API.
    pub(super) fn http(&self) -> &Http {
        &self.http
    }

    /// How far the server's clock is ahead of the local clock, according to all responses so far.
    #[must_use]
    pub fn skew(&self) -> Skew {
        self.http.skew()
    }

    /// How long the server asked to wait, counted from now.
    #[must_use]
    pub fn retry_in(&self, failure: Failure) -> Duration {
        let now = self.skew().theirs(self.clock.now());
        let left = failure.retry_after().map(|at| at.duration_since(now));
        left.and_then(|left| Duration::try_from(left).ok()).unwrap_or_default()
    }

    /// Fetches the discovery document. If the response contradicts the known clock skew, fetches it once more, because
    /// only two agreeing responses change the skew (docs/adr/0011-times-follow-the-servers-clock.md).
    pub async fn discover(&self) -> Result<Discovery, Failure> {
        let found = self.ask_discovery().await?;
        if self.skew().is_in_doubt() {
            self.ask_discovery().await
        } else {
            Ok(found)
        }
    }

    /// The discovery document, from the cache if it is fresh. It is fetched again if the local clock was set: signing
    /// an assertion needs a current clock skew.
    pub async fn discovery(&self) -> Result<Discovery, Failure> {
        {
            let discoveries = self.discoveries();
            if let Some((known, at)) = &discoveries.known
                && at.elapsed() < DISCOVERY_AGE
                && !self.http.clock_was_set()
            {
                return Ok(known.clone());
            }
            if let Some((failure, at)) = discoveries.failed
                && at.elapsed() < DISCOVERY_PAUSE
            {
                return Err(failure);
            }
        }
        self.discover().await
    }

    async fn ask_discovery(&self) -> Result<Discovery, Failure> {
        let asked = self.request_discovery().await;
        let now = Instant::now();
        let mut discoveries = self.discoveries();
        discoveries.failed = asked.as_ref().err().map(|failure| (*failure, now));
        if let Ok(found) = &asked {
            discoveries.known = Some((found.clone(), now));
        }
        asked
    }

    async fn request_discovery(&self) -> Result<Discovery, Failure> {
        let reply = self.http.get(discovery::PATH, None).await?;
        if reply.status != 200 {
            return Err(Failure::Status {
                code: reply.status,
                error: None,
                retry_after: reply.retry_after,
            });
        }
        Ok(discovery::parse(reply.body.expose_secret(), &self.settings.issuer)?)
    }

    /// Exchanges an assertion signed with `key` for a token with these scopes (the value of the `scope` field). If a
    /// refusal shows that the clock skew differs from the assumed one, signs a new assertion and retries once.
    pub async fn exchange(&self, key: &ServiceKey, scope: &str) -> Result<Exchanged, Failure> {
        // Discovery confirms the issuer before anything is signed
        // (docs/reference/zitadel-protocol.md#instance-selection).
        let path = self.discovery().await?.token_path;
        let assumed = self.skew().usable();
        match self.exchange_at(&path, key, scope).await {
            Err(failure) if failure.may_be_the_clock() => {
                if self.skew().is_in_doubt() {
                    // If this fails too, the refusal is the more useful error.
                    let _ = self.discover().await;
                }
                self.skew().check()?;
                if is_news(assumed, self.skew().usable()) {
                    self.exchange_at(&path, key, scope).await
                } else {
                    Err(failure)
                }
            }
            exchanged => exchanged,
        }
    }

    async fn exchange_at(&self, path: &str, key: &ServiceKey, scope: &str) -> Result<Exchanged, Failure> {
        let skew = self.skew();
        skew.check()?;
        let assertion = assertion::sign(key, &self.settings.issuer, skew.theirs(self.clock.now()))?;
        let (answer, reply) = token::exchange(&self.http, path, &assertion, scope).await?;
        // If the response shows an unusable skew, the lifetime of the token is unknown.
        self.skew().check()?;
        Ok(Exchanged {
            answer,
            sent: reply.sent,
        })
    }

    /// The real id of the ZITADEL API's project, if this process has learned it.
    #[must_use]
    pub fn known_project_id(&self) -> Option<&str> {
        self.project_id.get().map(String::as_str)
    }

    /// The real id of the ZITADEL API's project. It is learned once, with the key of the first service user that needs
    /// it: from the audience of a token requested for the alias or, if that token is opaque, from the management API,
    /// which any user may call (docs/adr/0007-audience-must-be-equal.md).
    pub async fn project_id(&self, key: &ServiceKey) -> Result<&str, Failure> {
        // Usually one service user learns the id while the others wait for it here.
        let _guard = tokio::time::timeout(WAIT_FOR_PROJECT_ID, self.learning.lock()).await;
        if let Some(known) = self.project_id.get() {
            return Ok(known);
        }
        let learned = self.learn_project_id(key).await?;
        Ok(self.project_id.get_or_init(|| learned))
    }

    async fn learn_project_id(&self, key: &ServiceKey) -> Result<String, Failure> {
        let scope = scope::field(&scope::zitadel_api()).ok_or(Failure::Malformed)?;
        let token = self.exchange(key, &scope).await?.answer.access_token;
        let id = if let Some(claims) = answer::claims(token.expose_secret()) {
            claims.only_audience().ok_or(Failure::Malformed)?.to_owned()
        } else {
            let reply = self.http.get(IAM_PATH, Some(&token)).await?;
            if reply.status != 200 {
                return Err(Failure::Status {
                    code: reply.status,
                    error: None,
                    retry_after: reply.retry_after,
                });
            }
            let iam: Iam = serde_json::from_slice(reply.body.expose_secret()).map_err(|_| Failure::Malformed)?;
            iam.iam_project_id
        };
        checked_project_id(id)
    }

    /// The real id of the ZITADEL API's project, with the token of an administrator.
    pub async fn project_id_as(&self, token: &APIToken) -> Result<String, APIError> {
        if let Some(known) = self.project_id.get() {
            return Ok(known.clone());
        }
        let iam: Iam = self.ask(Call::Get, IAM_PATH, token).await?;
        Ok(checked_project_id(iam.iam_project_id)?)
    }

    fn discoveries(&self) -> std::sync::MutexGuard<'_, Discoveries> {
        self.discovery.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Iam {
    iam_project_id: String,
}

/// The id is written into the status, so it must match the pattern in the CRD schema.
fn checked_project_id(id: String) -> Result<String, Failure> {
    let is_id = is_plain_id(&id) && id != scope::ZITADEL_ALIAS;
    is_id.then_some(id).ok_or(Failure::Malformed)
}
