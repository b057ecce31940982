//! Requests to ZITADEL's API with an access token: of a service user for its own keys, or of an administrator.

use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::domain::failure::Failure;
use crate::domain::key::{ServiceKey, is_plain_id};
use crate::domain::reason::Reason;
use crate::domain::scope;
use crate::zitadel::api_error::APIError;
use crate::zitadel::client::ZitadelClient;
use crate::zitadel::http::Answer;
use crate::zitadel::transport::Call;

/// Entries of a page. The server's limit is 1000, and its default 100. Names chosen to be long must not make a page longer
/// than a response may be (256 KiB): a manager with the longest names has less than 5 kB.
const PAGE: usize = 50;

/// With this many entries, a list is not complete.
pub const MOST_LISTED: usize = 1_000;

/// Longest personal access token. ZITADEL's have about 70 characters.
const MAX_TOKEN: usize = 4096;

/// An access token for ZITADEL's API. It has no `Debug`, and the operator writes it nowhere.
pub struct APIToken(SecretString);

impl APIToken {
    /// A personal access token, as a Secret holds it. White space around it is ignored. `None` if the text cannot be a
    /// token.
    #[must_use]
    pub fn personal(text: &SecretString) -> Option<Self> {
        let text = text.expose_secret().trim();
        let is_token = (1..=MAX_TOKEN).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        is_token.then(|| Self(text.into()))
    }
}

/// A page of a list. ZITADEL omits an empty list.
#[derive(Deserialize)]
struct Page<T> {
    #[serde(
        default = "Vec::new",
        alias = "administrators",
        alias = "metadata",
        alias = "projects"
    )]
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

impl ZitadelClient {
    /// Requests a token for ZITADEL's API with `key`.
    pub async fn api_token(&self, key: &ServiceKey) -> Result<APIToken, Failure> {
        if !is_plain_id(&key.user_id) {
            return Err(Reason::KeyFieldInvalid.into());
        }
        let scope = scope::field(&scope::zitadel_api()).ok_or(Failure::Malformed)?;
        Ok(APIToken(self.exchange(key, &scope).await?.answer.access_token))
    }

    /// The id of the user that the token belongs to.
    pub async fn who_am_i(&self, token: &APIToken) -> Result<String, APIError> {
        #[derive(Deserialize)]
        struct UserInfo {
            sub: String,
        }
        let path = self.discovery().await?.userinfo_path.ok_or(Failure::Malformed)?;
        let user: UserInfo = self.ask(Call::Get, &path, token).await?;
        is_plain_id(&user.sub)
            .then_some(user.sub)
            .ok_or(Failure::Malformed.into())
    }

    /// Sends a request and returns the answer with any status.
    pub(super) async fn send(&self, call: Call<'_>, path: &str, token: &APIToken) -> Result<Answer, Failure> {
        self.http().call_api(call, path, &token.0).await
    }

    /// Sends a request whose answer has no content of interest.
    pub(super) async fn tell(&self, call: Call<'_>, path: &str, token: &APIToken) -> Result<(), APIError> {
        done(&self.send(call, path, token).await?)
    }

    /// Sends a request and reads the fields of the answer.
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        call: Call<'_>,
        path: &str,
        token: &APIToken,
    ) -> Result<T, APIError> {
        let answer = self.send(call, path, token).await?;
        done(&answer)?;
        serde_json::from_slice(answer.body.expose_secret()).map_err(|_| Failure::Malformed.into())
    }

    /// All entries of a list that match `filters` and that the caller may see. With the id of a user among the filters,
    /// the pages are exact (`docs/reference/zitadel-protocol.md#what-a-list-shows`).
    pub(super) async fn list<T: DeserializeOwned>(
        &self,
        path: &str,
        filters: &Value,
        sorted_by: Option<&str>,
        token: &APIToken,
    ) -> Result<Vec<T>, APIError> {
        let mut all = Vec::new();
        for _ in 0..MOST_LISTED / PAGE {
            let mut body = json!({
                "pagination": {"offset": all.len(), "limit": PAGE, "asc": true},
                "filters": filters,
            });
            if let Some(column) = sorted_by {
                body["sortingColumn"] = column.into();
            }
            let page: Page<T> = self.ask(Call::PostJSON(&body), path, token).await?;
            let limit = page.pagination.applied_limit.and_then(|limit| limit.parse().ok());
            let is_last = page.result.len() < limit.unwrap_or(PAGE).min(PAGE);
            all.extend(page.result);
            if is_last {
                return Ok(all);
            }
            // A server may send more than it was asked for.
            if all.len() >= MOST_LISTED {
                break;
            }
        }
        Err(APIError::TooMany)
    }
}

/// Success, or what the refusal means.
pub(super) fn done(answer: &Answer) -> Result<(), APIError> {
    if answer.status == 200 {
        Ok(())
    } else {
        Err(APIError::of(answer))
    }
}

/// The REST path of a user. An id with other characters than ZITADEL's could change the path.
pub(super) fn user_path(user_id: &str) -> Result<String, APIError> {
    is_plain_id(user_id)
        .then(|| format!("/v2/users/{user_id}"))
        .ok_or(APIError::Rejected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn personal_token_is_a_single_word() {
        let read = |text: &str| APIToken::personal(&text.into()).map(|token| token.0.expose_secret().to_owned());
        assert_eq!(read(" c2VjcmV0-_.\n"), Some("c2VjcmV0-_.".into()));
        for text in ["", " \n", "two words", "two\nlines", "ö", &"x".repeat(MAX_TOKEN + 1)] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn an_id_cannot_change_the_path() {
        assert_eq!(
            user_path("401085856582077478").as_deref(),
            Ok("/v2/users/401085856582077478")
        );
        for id in ["", "..", "1/keys", "1?x", "1%2f", "1 2", "new/"] {
            assert_eq!(user_path(id), Err(APIError::Rejected), "{id}");
        }
    }
}
