//! Helpers that exchange a key for a token, and call ZITADEL's API, with the product's own code.

use std::time::Duration;

use serde_json::{Value, json};
use zitadel_tokens::api::service_user::Token;
use zitadel_tokens::domain::access;
use zitadel_tokens::domain::answer::{Expected, Minted, accept};
use zitadel_tokens::domain::failure::{Failure, classify};
use zitadel_tokens::domain::key::ServiceKey;
use zitadel_tokens::domain::reason::Reason;
use zitadel_tokens::domain::scope;
use zitadel_tokens::zitadel::{APIToken, Exchanged, Hosts, RequestBudget, Settings, ZitadelClient};

/// A client, and the token of a caller of ZITADEL's API.
pub struct Caller {
    pub client: ZitadelClient,
    pub token: APIToken,
}

/// Settings for `issuer`.
pub fn settings(issuer: &str) -> Settings {
    Settings {
        name: "contract".into(),
        issuer: issuer.to_owned(),
        endpoint: None,
        ca: None,
        tls_server_name: None,
        proxy: None,
        timeout: Duration::from_secs(10),
        allow_insecure_http: true,
        budget: RequestBudget {
            per_second: 30,
            burst: 300,
            concurrent: 8,
        },
    }
}

pub fn connect(settings: Settings) -> ZitadelClient {
    // Another test of this process may have installed the providers already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let _ = jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER.install_default();
    ZitadelClient::new(settings, &Hosts::default()).expect("valid settings")
}

/// An entry of `spec.tokens` with these fields.
pub fn token(fields: &Value) -> Token {
    let mut entry = json!({"name": "main", "secret": {"name": "main-token"}});
    for (name, value) in fields.as_object().expect("fields") {
        entry[name] = value.clone();
    }
    serde_json::from_value(entry).expect("an entry of spec.tokens")
}

/// The `scope` field of the token request for these fields of a token.
pub fn scope(fields: &Value) -> String {
    scope::field(&scope::scopes(&token(fields))).expect("clean scopes")
}

/// One token request. A failure is classified as in the controller.
pub async fn exchange(instance: &ZitadelClient, key: &ServiceKey, scope: &str) -> Result<Exchanged, Reason> {
    match instance.exchange(key, scope).await {
        Ok(exchanged) => Ok(exchanged),
        Err(failure) => Err(reason(instance, failure).await),
    }
}

/// The reason of a failure. Discovery distinguishes a refused assertion from an outage
/// (docs/reference/zitadel-protocol.md#errors-of-the-token-endpoint).
pub async fn reason(instance: &ZitadelClient, failure: Failure) -> Reason {
    classify(failure, instance.discover().await.is_ok())
}

/// What a token with these fields must contain, with `zitadel_project_id` as the id behind the alias.
pub fn expected(instance: &ZitadelClient, key: &ServiceKey, fields: &Value, zitadel_project_id: &str) -> Expected {
    let token = token(fields);
    Expected {
        issuer: instance.settings().issuer.clone(),
        user_id: key.user_id.clone(),
        audience: access::audience(&token, zitadel_project_id),
        organization_id: token.organization_id,
    }
}

/// Requests a token with these fields as the controller does: the project id first, then the exchange, then the checks.
pub async fn mint(instance: &ZitadelClient, key: &ServiceKey, fields: &Value) -> Result<Minted, Reason> {
    let id = match instance.project_id(key).await {
        Ok(id) => id,
        Err(failure) => return Err(reason(instance, failure).await),
    };
    let expected = expected(instance, key, fields, id);
    let exchanged = exchange(instance, key, &scope(fields)).await?;
    accept(exchanged.answer, &expected, exchanged.sent)
}
