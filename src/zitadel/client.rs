//! One ZITADEL instance as this process knows it: connection, discovery, and the id of its own project.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use secrecy::ExposeSecret;
use serde::Deserialize;

use crate::domain::answer::{self, TokenAnswer};
use crate::domain::assertion;
use crate::domain::clock_skew::{Skew, is_news};
use crate::domain::failure::Failure;
use crate::domain::hash;
use crate::domain::key::ServiceKey;
use crate::domain::reason::Reason;
use crate::domain::scope;
use crate::domain::validate::is_near;
use crate::zitadel::discovery::{self, Discovery};
use crate::zitadel::http::Http;
use crate::zitadel::limits::{Hosts, Limits};
use crate::zitadel::settings::Settings;
use crate::zitadel::token;

/// Discovery is asked again after this, when it is needed.
const DISCOVERY_AGE: Duration = Duration::from_hours(1);

/// After a failed discovery no user of the instance starts another one before this time has passed: not every user
/// has to find the failure by a request of its own.
const DISCOVERY_PAUSE: Duration = Duration::from_secs(5);

/// Where the management API names the instance's own project (zitadel.md §6.2).
const IAM_PATH: &str = "/management/v1/iam";

/// Another's attempt to learn the project id is waited for so long: one tenant whose requests hang must not hold up
/// the others.
const PATIENCE_WITH_OTHERS: Duration = Duration::from_millis(500);

/// A token as it came, and when it was asked for.
#[derive(Debug)]
pub struct Exchanged {
    /// The answer, not judged yet.
    pub answer: TokenAnswer,
    /// When the request went out, by the server's clock.
    pub sent: Timestamp,
}

/// The last discovery that succeeded, and the last one if it failed.
#[derive(Debug, Default)]
struct Discoveries {
    known: Option<(Discovery, Instant)>,
    failed: Option<(Failure, Instant)>,
}

/// A connected instance.
#[derive(Debug)]
pub struct ZitadelClient {
    settings: Settings,
    http: Http,
    limits: Arc<Limits>,
    discovery: Mutex<Discoveries>,
    project_id: OnceLock<String>,
    learning: tokio::sync::Mutex<()>,
}

impl ZitadelClient {
    /// Prepares the connection; nothing is sent yet.
    pub fn new(settings: Settings, hosts: &Hosts) -> Result<Self, Failure> {
        let origin = settings.endpoint.as_deref().unwrap_or(&settings.issuer);
        let (scheme, authority) = origin.split_once("://").ok_or(Failure::Malformed)?;
        // A proxy is far, wherever the host is.
        let near = settings.proxy.is_none() && is_near(authority);
        if scheme != "https" && !(settings.allow_insecure_http && near) {
            return Err(Reason::InsecureHTTP.into());
        }
        // All that decides, besides the host, whether a request gets through: these settings of one instance must not
        // open the circuit breaker of another.
        let timeout = settings.timeout.as_millis().to_string();
        let way = [&settings.ca, &settings.tls_server_name, &settings.proxy];
        let way = way.map(|part| part.as_deref().unwrap_or_default());
        let way = hash::of(way.into_iter().chain([scheme, &timeout]).map(str::as_bytes));
        let limits = hosts.dial(&settings.name, authority, &way, settings.budget);
        let http = Http::new(&settings, origin, limits.clone())?;
        Ok(Self {
            settings,
            http,
            limits,
            discovery: Mutex::default(),
            project_id: OnceLock::new(),
            learning: tokio::sync::Mutex::default(),
        })
    }

    /// How it is reached.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The limits of the host that it dials.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// How far the server's clock is from ours, by all answers so far.
    #[must_use]
    pub fn skew(&self) -> Skew {
        self.http.skew()
    }

    /// How long the server asked to wait, from now on.
    #[must_use]
    pub fn retry_in(&self, failure: Failure) -> Duration {
        let now = self.skew().theirs(Timestamp::now());
        let left = failure.retry_after().map(|at| at.duration_since(now));
        left.and_then(|left| Duration::try_from(left).ok()).unwrap_or_default()
    }

    /// Asks for the discovery document now; twice where the answer casts doubt on the server's clock, so that two tell.
    pub async fn discover(&self) -> Result<Discovery, Failure> {
        let found = self.ask_discovery().await?;
        if self.skew().is_in_doubt() {
            self.ask_discovery().await
        } else {
            Ok(found)
        }
    }

    /// The discovery document. The server is asked if it is old, or if our clock was set: what follows goes by both
    /// clocks.
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

    /// Exchanges an assertion of `key` for a token with these scopes (the value of the `scope` field). Where a refusal
    /// shows that the server's clock is not as assumed, it is signed again, once.
    pub async fn exchange(&self, key: &ServiceKey, scope: &str) -> Result<Exchanged, Failure> {
        // Before anything is signed: the issuer must be the one that we know (zitadel.md §5.2).
        let path = self.discovery().await?.token_path;
        let assumed = self.skew().usable();
        match self.exchange_at(&path, key, scope).await {
            Err(failure) if failure.may_be_the_clock() => {
                if self.skew().is_in_doubt() {
                    // Its failure would say less than the refusal does.
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
        let assertion = assertion::sign(key, &self.settings.issuer, skew.theirs(Timestamp::now()))?;
        let (answer, reply) = token::exchange(&self.http, path, &assertion, scope).await?;
        // By a clock that turns out to be so far away, its lifetime cannot be told.
        self.skew().check()?;
        Ok(Exchanged {
            answer,
            sent: reply.sent,
        })
    }

    /// The real id of the ZITADEL API's project, if it was learned.
    #[must_use]
    pub fn known_project_id(&self) -> Option<&str> {
        self.project_id.get().map(String::as_str)
    }

    /// The real id of the ZITADEL API's project: learned once, with the key of whoever is first, from the audience
    /// of a token that names the alias or, if that token is opaque, from the API, which any user may ask
    /// (design §3.11).
    pub async fn project_id(&self, key: &ServiceKey) -> Result<&str, Failure> {
        // Usually one asks and the others find the answer.
        let _turn = tokio::time::timeout(PATIENCE_WITH_OTHERS, self.learning.lock()).await;
        if let Some(known) = self.project_id.get() {
            return Ok(known);
        }
        let learned = self.learn_project_id(key).await?;
        Ok(self.project_id.get_or_init(|| learned))
    }

    async fn learn_project_id(&self, key: &ServiceKey) -> Result<String, Failure> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Iam {
            iam_project_id: String,
        }
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
        // It goes into status: an id and nothing else (the pattern of the schema).
        let is_id = (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        if !is_id || id == scope::ZITADEL_ALIAS {
            return Err(Failure::Malformed);
        }
        Ok(id)
    }

    fn discoveries(&self) -> std::sync::MutexGuard<'_, Discoveries> {
        self.discovery.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
