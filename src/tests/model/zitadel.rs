//! A fake ZITADEL in memory. It remembers the tokens that it issued and validates each request.

use std::collections::BTreeSet;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures::future::BoxFuture;
use k8s_openapi::jiff::{SignedDuration, Timestamp, fmt::rfc2822};
use reqwest::Response;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::{ISSUER, Shared, State, USER_ID, lock};
use crate::domain::failure::Failure;
use crate::domain::fixtures::jwt;
use crate::zitadel::{Call, Request, Settings, Transport};

/// Id of ZITADEL's own project.
const OWN_PROJECT: &str = "900";

/// ZITADEL accepts an assertion whose `iat` is at most this far ahead of its clock.
const MAX_IAT_LEAD: SignedDuration = SignedDuration::from_secs(1);

/// A failure of ZITADEL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Connections fail.
    Unreachable,
    /// Requests time out.
    Hangs,
    /// Token requests fail with 503.
    Unavailable,
    /// Token requests fail with 429 and a `Retry-After` of this many seconds.
    Throttled(u32),
    /// Token requests fail with 400, as for a deleted key.
    RejectsKey,
    /// Token requests fail with 500, as for a deleted key in ZITADEL up to v4.13.
    RejectsKeyLegacy,
    /// The response to a token request is valid JSON but no token response.
    MalformedResponse,
    /// ZITADEL issues the token, and the response is lost.
    ResponseLost,
}

/// A token that ZITADEL issued.
#[derive(Clone, Debug)]
pub struct IssuedToken {
    pub value: String,
    pub audience: BTreeSet<String>,
    pub key_id: String,
    /// By ZITADEL's clock.
    pub issued_at: Timestamp,
    /// By ZITADEL's clock.
    pub expires_at: Timestamp,
    /// How far the operator's estimate of ZITADEL's clock may have been off when it requested the token.
    pub clock_uncertainty: Duration,
}

/// The state of ZITADEL.
pub struct Zitadel {
    pub lifetime: SignedDuration,
    pub opaque: bool,
    /// Delay of a request, and again of its response.
    pub latency: Duration,
    pub fault: Option<Fault>,
    pub issued: Vec<IssuedToken>,
    /// Number of requests of any kind.
    pub requests: usize,
    /// Number of tokens issued to look up the id of ZITADEL's own project.
    pub lookup_tokens: usize,
}

impl Zitadel {
    pub fn find(&self, value: &str) -> Option<&IssuedToken> {
        self.issued.iter().find(|issued| issued.value == value)
    }
}

/// A transport whose requests go to this fake ZITADEL.
pub struct FakeTransport {
    shared: Shared,
    timeout: Duration,
}

impl FakeTransport {
    pub fn new(shared: &Shared, settings: &Settings) -> Self {
        Self {
            shared: shared.clone(),
            timeout: settings.timeout,
        }
    }
}

impl Transport for FakeTransport {
    fn send<'a>(&'a self, request: Request<'a>) -> BoxFuture<'a, Result<Response, Failure>> {
        let call = match request.call {
            Call::PostForm(form) => ServerCall::Token {
                assertion: field(form, "assertion"),
                scope: field(form, "scope"),
            },
            _ if request.path.starts_with("/.well-known") => ServerCall::Discovery,
            _ => ServerCall::OwnProject(request.bearer.expect("a bearer token").expose_secret().to_owned()),
        };
        Box::pin(async move {
            let latency = lock(&self.shared).zitadel.latency;
            sleep(latency).await;
            let answer = lock(&self.shared).serve(&call);
            match answer {
                Err(Failure::Timeout) => sleep(self.timeout.saturating_sub(latency)).await,
                _ => sleep(latency).await,
            }
            let Answer { code, body, retry } = answer?;
            let date = lock(&self.shared).date();
            let mut response = hyper::Response::builder().status(code).header("date", date);
            if let Some(seconds) = retry {
                response = response.header("retry-after", seconds.to_string());
            }
            Ok(response.body(body).expect("the response is valid").into())
        })
    }
}

enum ServerCall {
    Discovery,
    Token { assertion: String, scope: String },
    OwnProject(String),
}

struct Answer {
    code: u16,
    body: String,
    retry: Option<u32>,
}

fn answer(code: u16, body: &Value) -> Answer {
    Answer {
        code,
        body: body.to_string(),
        retry: None,
    }
}

fn field(form: &[(&str, &str)], name: &str) -> String {
    let (_, value) = form
        .iter()
        .find(|(key, _)| *key == name)
        .expect("the form has the field");
    (*value).to_owned()
}

/// Returns the project ids in a scope.
fn projects(scope: &str) -> BTreeSet<String> {
    let id = |scope: &str| {
        let id = scope.strip_prefix("urn:zitadel:iam:org:project:id:")?;
        id.strip_suffix(":aud").map(str::to_owned)
    };
    scope.split(' ').filter_map(id).collect()
}

impl State {
    fn date(&mut self) -> String {
        self.on_date_sent();
        let date = self.now() + self.date_ahead;
        rfc2822::DateTimePrinter::new()
            .timestamp_to_rfc9110_string(&date)
            .expect("a valid date")
    }

    fn serve(&mut self, call: &ServerCall) -> Result<Answer, Failure> {
        self.zitadel.requests += 1;
        match self.zitadel.fault {
            Some(Fault::Unreachable) => return Err(Failure::Connect),
            Some(Fault::Hangs) => return Err(Failure::Timeout),
            _ => {}
        }
        match call {
            ServerCall::Discovery => {
                let token = format!("{ISSUER}/oauth/v2/token");
                Ok(answer(200, &json!({"issuer": ISSUER, "token_endpoint": token})))
            }
            ServerCall::OwnProject(token) => {
                if self.zitadel.find(token).is_none() && !token.starts_with("lookup") {
                    self.violation("the operator sent a token that ZITADEL did not issue");
                }
                Ok(answer(200, &json!({"iamProjectId": OWN_PROJECT})))
            }
            ServerCall::Token { assertion, scope } => self.serve_token(assertion, &projects(scope)),
        }
    }

    fn serve_token(&mut self, assertion: &str, requested: &BTreeSet<String>) -> Result<Answer, Failure> {
        let part = |n: usize| -> Value {
            let part = assertion.split('.').nth(n).expect("a JWT");
            serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).expect("base64")).expect("JSON")
        };
        let (header, claims) = (part(0), part(1));
        self.requests_since_event += 1;
        self.on_token_requested(requested);
        let rejection = json!({"error": "invalid_grant"});
        let legacy_rejection = json!({"error": "server_error", "error_description": "Errors.Internal"});
        match self.zitadel.fault {
            Some(Fault::Unavailable) => return Ok(answer(503, &json!({}))),
            Some(Fault::Throttled(seconds)) => {
                self.on_throttled(requested, seconds);
                return Ok(Answer {
                    retry: Some(seconds),
                    ..answer(429, &json!({}))
                });
            }
            Some(Fault::RejectsKey) => return Ok(answer(400, &rejection)),
            Some(Fault::RejectsKeyLegacy) => return Ok(answer(500, &legacy_rejection)),
            Some(Fault::MalformedResponse) => return Ok(answer(200, &json!("hello"))),
            _ => {}
        }
        let claim_time =
            |claim: &str| Timestamp::from_second(claims[claim].as_i64().expect("a time")).expect("in range");
        let good = claims["sub"] == USER_ID && claims["aud"] == ISSUER;
        if !good || claim_time("iat") > self.now() + MAX_IAT_LEAD || claim_time("exp") <= self.now() {
            return Ok(answer(400, &rejection));
        }
        let lifetime = self.zitadel.lifetime;
        let key_id = header["kid"].as_str().expect("a key id").to_owned();
        let expires_at = self.now() + lifetime;
        let for_own_project = requested.contains("zitadel");
        let audience: BTreeSet<String> = requested.iter().map(|id| id.replace("zitadel", OWN_PROJECT)).collect();
        let number = self.zitadel.issued.len() + self.zitadel.lookup_tokens;
        let value = if self.zitadel.opaque {
            format!("{}-{number}", if for_own_project { "lookup" } else { "opaque" })
        } else {
            jwt(&json!({"iss": ISSUER, "sub": USER_ID, "aud": audience, "exp": expires_at.as_second(), "jti": number}))
        };
        if for_own_project {
            self.zitadel.lookup_tokens += 1;
        } else {
            self.on_token_issued(IssuedToken {
                value: value.clone(),
                audience,
                key_id,
                issued_at: self.now(),
                expires_at,
                clock_uncertainty: self.undetected_clock_step,
            });
        }
        if self.zitadel.fault == Some(Fault::ResponseLost) {
            self.on_response_lost(requested);
            return Err(Failure::Broken);
        }
        let body = json!({"access_token": value, "token_type": "Bearer", "expires_in": lifetime.as_secs()});
        Ok(answer(200, &body))
    }
}
