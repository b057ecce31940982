//! A ZITADEL that knows which tokens it issued, and what it thinks of the requests.

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
use crate::zitadel::{Request, Settings, Transport};

/// Id of the instance's own project.
const OWN_PROJECT: &str = "900";

/// Longest lead of an assertion's `iat` that ZITADEL takes.
const LEAD: SignedDuration = SignedDuration::from_secs(1);

/// What goes wrong at the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No connection.
    Away,
    /// No answer.
    Hangs,
    /// Token requests get a 503.
    Errors,
    /// Token requests get a 429 and are to come back after so many seconds.
    Throttles(u32),
    /// Token requests are refused as by a key that was deleted.
    Refuses,
    /// The same, as up to v4.13.
    RefusesAsBefore,
    /// Answers that are none.
    Babbles,
    /// A token is issued, and the answer is lost.
    LosesAnswers,
}

/// A token, as the server knows it.
#[derive(Clone, Debug)]
pub struct Given {
    pub value: String,
    pub audience: BTreeSet<String>,
    pub key_id: String,
    /// By the server's clock.
    pub issued: Timestamp,
    pub expires: Timestamp,
    /// By how much the operator may have been wrong about that clock when it asked.
    pub doubt: Duration,
}

/// The server.
pub struct Zitadel {
    pub lifetime: SignedDuration,
    pub opaque: bool,
    pub latency: Duration,
    pub fault: Option<Fault>,
    pub given: Vec<Given>,
    /// Requests of any kind.
    pub requests: usize,
    /// Tokens that showed the id of the server's own project.
    pub learned: usize,
}

impl Zitadel {
    pub fn given(&self, value: &str) -> Option<&Given> {
        self.given.iter().find(|given| given.value == value)
    }
}

/// The way to this server.
pub struct Way {
    shared: Shared,
    timeout: Duration,
}

impl Way {
    pub fn new(shared: &Shared, settings: &Settings) -> Self {
        Self {
            shared: shared.clone(),
            timeout: settings.timeout,
        }
    }
}

impl Transport for Way {
    fn send<'a>(&'a self, request: Request<'a>) -> BoxFuture<'a, Result<Response, Failure>> {
        let asked = match request.form {
            Some(form) => Asked::Token {
                assertion: field(form, "assertion"),
                scope: field(form, "scope"),
            },
            None if request.path.starts_with("/.well-known") => Asked::Discovery,
            None => Asked::OwnProject(request.bearer.expect("a token").expose_secret().to_owned()),
        };
        Box::pin(async move {
            let latency = lock(&self.shared).zitadel.latency;
            sleep(latency).await;
            let answer = lock(&self.shared).serve(&asked);
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
            Ok(response.body(body).expect("an answer").into())
        })
    }
}

enum Asked {
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
    let (_, value) = form.iter().find(|(key, _)| *key == name).expect("a field");
    (*value).to_owned()
}

/// The projects in a scope.
fn projects(scope: &str) -> BTreeSet<String> {
    let id = |scope: &str| {
        let id = scope.strip_prefix("urn:zitadel:iam:org:project:id:")?;
        id.strip_suffix(":aud").map(str::to_owned)
    };
    scope.split(' ').filter_map(id).collect()
}

impl State {
    fn date(&mut self) -> String {
        self.date_was_told();
        let date = self.now() + self.date_ahead;
        rfc2822::DateTimePrinter::new()
            .timestamp_to_rfc9110_string(&date)
            .expect("a date")
    }

    fn serve(&mut self, asked: &Asked) -> Result<Answer, Failure> {
        self.zitadel.requests += 1;
        match self.zitadel.fault {
            Some(Fault::Away) => return Err(Failure::Connect),
            Some(Fault::Hangs) => return Err(Failure::Timeout),
            _ => {}
        }
        match asked {
            Asked::Discovery => {
                let token = format!("{ISSUER}/oauth/v2/token");
                Ok(answer(200, &json!({"issuer": ISSUER, "token_endpoint": token})))
            }
            Asked::OwnProject(token) => {
                if self.zitadel.given(token).is_none() && !token.starts_with("learn") {
                    self.violated("a token is shown that the server did not issue");
                }
                Ok(answer(200, &json!({"iamProjectId": OWN_PROJECT})))
            }
            Asked::Token { assertion, scope } => self.serve_token(assertion, &projects(scope)),
        }
    }

    fn serve_token(&mut self, assertion: &str, asked: &BTreeSet<String>) -> Result<Answer, Failure> {
        let part = |n: usize| -> Value {
            let part = assertion.split('.').nth(n).expect("a JWT");
            serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).expect("base64")).expect("JSON")
        };
        let (header, claims) = (part(0), part(1));
        self.requests_since_event += 1;
        self.token_is_asked_for(asked);
        let refusal = json!({"error": "invalid_grant"});
        let as_before = json!({"error": "server_error", "error_description": "Errors.Internal"});
        match self.zitadel.fault {
            Some(Fault::Errors) => return Ok(answer(503, &json!({}))),
            Some(Fault::Throttles(seconds)) => {
                self.is_to_wait(asked, seconds);
                return Ok(Answer {
                    retry: Some(seconds),
                    ..answer(429, &json!({}))
                });
            }
            Some(Fault::Refuses) => return Ok(answer(400, &refusal)),
            Some(Fault::RefusesAsBefore) => return Ok(answer(500, &as_before)),
            Some(Fault::Babbles) => return Ok(answer(200, &json!("hello"))),
            _ => {}
        }
        let time = |claim: &str| Timestamp::from_second(claims[claim].as_i64().expect("a time")).expect("in range");
        let good = claims["sub"] == USER_ID && claims["aud"] == ISSUER;
        if !good || time("iat") > self.now() + LEAD || time("exp") <= self.now() {
            return Ok(answer(400, &refusal));
        }
        let lifetime = self.zitadel.lifetime;
        let key_id = header["kid"].as_str().expect("a key").to_owned();
        let expires = self.now() + lifetime;
        let own = asked.contains("zitadel");
        let audience: BTreeSet<String> = asked
            .iter()
            .map(|id| {
                if id == "zitadel" {
                    OWN_PROJECT.to_owned()
                } else {
                    id.clone()
                }
            })
            .collect();
        let number = self.zitadel.given.len() + self.zitadel.learned;
        let value = if self.zitadel.opaque {
            format!("{}-{number}", if own { "learn" } else { "opaque" })
        } else {
            jwt(&json!({"iss": ISSUER, "sub": USER_ID, "aud": audience, "exp": expires.as_second(), "jti": number}))
        };
        if own {
            self.zitadel.learned += 1;
        } else {
            self.token_is_given(Given {
                value: value.clone(),
                audience,
                key_id,
                issued: self.now(),
                expires,
                doubt: self.unseen,
            });
        }
        if self.zitadel.fault == Some(Fault::LosesAnswers) {
            self.answer_is_lost(asked);
            return Err(Failure::Broken);
        }
        let body = json!({"access_token": value, "token_type": "Bearer", "expires_in": lifetime.as_secs()});
        Ok(answer(200, &body))
    }
}
