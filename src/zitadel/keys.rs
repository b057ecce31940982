//! The keys of a user at ZITADEL, which the user manages itself
//! (`docs/reference/zitadel-protocol.md#self-management-of-keys`).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::domain::failure::{Failure, classify};
use crate::domain::key::{ServiceKey, is_plain_id};
use crate::domain::key_ledger::ListedKey;
use crate::domain::reason::Reason;
use crate::domain::scope;
use crate::zitadel::client::ZitadelClient;
use crate::zitadel::http::Answer;
use crate::zitadel::transport::Call;

/// Entries of a page. The server's limit is 1000, and its default 100. A page of 500 has about 130 kB.
const PAGE: usize = 500;

/// Most pages of a list.
const MOST_PAGES: usize = 2;

/// With this many keys or personal access tokens, a list is not complete.
pub const MOST_LISTED: usize = PAGE * MOST_PAGES;

/// Why a request about keys failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyError {
    /// The server has no such API.
    Unavailable,
    /// The user must not do this.
    Forbidden,
    /// The list has too many entries.
    TooMany,
    /// Any other failure.
    Failed(Failure),
}

impl KeyError {
    /// The reason to report.
    #[must_use]
    pub fn reason(self) -> Reason {
        match self {
            Self::Unavailable => Reason::KeyManagementUnavailable,
            Self::Forbidden => Reason::KeyManagementForbidden,
            Self::TooMany => Reason::KeyListIncomplete,
            Self::Failed(failure) => classify(failure, false),
        }
    }
}

impl From<Failure> for KeyError {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// A token of a service user for ZITADEL's own API. It lives as long as a reconcile and is written nowhere.
pub struct APIToken {
    token: SecretString,
    user_id: String,
    /// The key that the token was requested with.
    pub key_id: String,
}

/// A page of a list. ZITADEL omits an empty list.
#[derive(Deserialize)]
struct Page<T> {
    #[serde(default = "Vec::new")]
    result: Vec<T>,
    #[serde(default)]
    pagination: Pagination,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Pagination {
    /// The server may apply a lower limit than the one requested.
    applied_limit: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Key {
    id: String,
    user_id: String,
    expiration_date: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Owned {
    user_id: String,
}

impl APIToken {
    /// The user of the token.
    #[must_use]
    pub fn user_id(&self) -> &str {
        &self.user_id
    }
}

impl ZitadelClient {
    /// Requests a token for ZITADEL's own API with `key`.
    pub async fn api_token(&self, key: &ServiceKey) -> Result<APIToken, Failure> {
        if !is_plain_id(&key.user_id) {
            return Err(Reason::KeyFieldInvalid.into());
        }
        let scope = scope::field(&scope::zitadel_api()).ok_or(Failure::Malformed)?;
        let exchanged = self.exchange(key, &scope).await?;
        Ok(APIToken {
            token: exchanged.answer.access_token,
            user_id: key.user_id.clone(),
            key_id: key.key_id.clone(),
        })
    }

    /// Adds a public key (PEM) to the user of the token. Returns the key's id.
    pub async fn add_key(&self, token: &APIToken, public: &str, expires: Timestamp) -> Result<String, KeyError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Added {
            key_id: String,
        }
        let body = json!({"expirationDate": expires.to_string(), "publicKey": STANDARD.encode(public)});
        let path = format!("/v2/users/{}/keys", token.user_id);
        let added: Added = self.call(Call::PostJSON(&body), &path, token).await?;
        if is_plain_id(&added.key_id) {
            Ok(added.key_id)
        } else {
            Err(Failure::Malformed.into())
        }
    }

    /// All keys of the user of the token.
    pub async fn list_keys(&self, token: &APIToken) -> Result<Vec<ListedKey>, KeyError> {
        let keys = self
            .list::<Key>("/v2/users/keys/search", Some("KEY_FIELD_NAME_CREATED_DATE"), token)
            .await?;
        let mine = keys.into_iter().filter(|key| key.user_id == token.user_id);
        let listed = mine.map(|key| ListedKey {
            // A date in the year 9999 is later than the maximum of `Timestamp` and means "never".
            expires_at: key.expiration_date.and_then(|date| date.parse().ok()),
            key_id: key.id,
        });
        Ok(listed.filter(|key| is_plain_id(&key.key_id)).collect())
    }

    /// The number of personal access tokens of the user of the token.
    pub async fn count_personal_tokens(&self, token: &APIToken) -> Result<usize, KeyError> {
        let tokens = self.list::<Owned>("/v2/users/pats/search", None, token).await?;
        Ok(tokens.iter().filter(|owned| owned.user_id == token.user_id).count())
    }

    /// Removes a key of the user of the token. Succeeds if there is no such key.
    pub async fn remove_key(&self, token: &APIToken, key_id: &str) -> Result<(), KeyError> {
        let path = format!("/v2/users/{}/keys/{key_id}", token.user_id);
        let answer = self.http().call_api(Call::Delete, &path, &token.token).await?;
        match (answer.status, error_id(&answer).as_deref()) {
            (200, _) | (404, Some("COMMAND-4m77G")) => Ok(()),
            _ => Err(refusal(&answer)),
        }
    }

    async fn list<T: DeserializeOwned>(
        &self,
        path: &str,
        sorted_by: Option<&str>,
        token: &APIToken,
    ) -> Result<Vec<T>, KeyError> {
        let mut all = Vec::new();
        for _ in 0..MOST_PAGES {
            let mut body = json!({
                "pagination": {"offset": all.len(), "limit": PAGE, "asc": true},
                "filters": [{"userIdFilter": {"id": token.user_id}}],
            });
            if let Some(column) = sorted_by {
                body["sortingColumn"] = column.into();
            }
            let page: Page<T> = self.call(Call::PostJSON(&body), path, token).await?;
            let limit = page.pagination.applied_limit.and_then(|limit| limit.parse().ok());
            let is_last = page.result.len() < limit.unwrap_or(PAGE).min(PAGE);
            all.extend(page.result);
            if is_last {
                return Ok(all);
            }
        }
        Err(KeyError::TooMany)
    }

    async fn call<T: DeserializeOwned>(&self, call: Call<'_>, path: &str, token: &APIToken) -> Result<T, KeyError> {
        let answer = self.http().call_api(call, path, &token.token).await?;
        if answer.status != 200 {
            return Err(refusal(&answer));
        }
        serde_json::from_slice(answer.body.expose_secret()).map_err(|_| Failure::Malformed.into())
    }
}

/// What an answer other than 200 means. A user without the right gets a 404 that names the missing membership
/// (`docs/reference/zitadel-protocol.md#api-errors`).
fn refusal(answer: &Answer) -> KeyError {
    match (answer.status, error_id(answer).as_deref()) {
        (400 | 403 | 412, _) | (404, Some("AUTHZ-cdgFk")) => KeyError::Forbidden,
        (300..=399 | 404 | 405 | 501, None) => KeyError::Unavailable,
        (code, _) => KeyError::Failed(Failure::Status {
            code,
            error: None,
            retry_after: answer.retry_after,
        }),
    }
}

/// ZITADEL's id of an error.
fn error_id(answer: &Answer) -> Option<String> {
    let body: Value = serde_json::from_slice(answer.body.expose_secret()).ok()?;
    Some(body["details"][0]["id"].as_str()?.to_owned())
}
