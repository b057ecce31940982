//! The keys of a user at ZITADEL, managed by the user itself
//! (`docs/reference/zitadel-protocol.md#self-management-of-keys`) or by an administrator.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::domain::failure::Failure;
use crate::domain::key::is_plain_id;
use crate::domain::key_ledger::ListedKey;
use crate::zitadel::api_call::{APIToken, done, user_path};
use crate::zitadel::api_error::{APIError, error_id};
use crate::zitadel::client::ZitadelClient;
use crate::zitadel::transport::Call;

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

impl ZitadelClient {
    /// Adds a public key (PEM) to a user. Returns the key's id.
    pub async fn add_key(
        &self,
        token: &APIToken,
        user_id: &str,
        public: &str,
        expires: Timestamp,
    ) -> Result<String, APIError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Added {
            key_id: String,
        }
        let body = json!({"expirationDate": expires.to_string(), "publicKey": STANDARD.encode(public)});
        let path = format!("{}/keys", user_path(user_id)?);
        let added: Added = self.ask(Call::PostJSON(&body), &path, token).await?;
        if is_plain_id(&added.key_id) {
            Ok(added.key_id)
        } else {
            Err(Failure::Malformed.into())
        }
    }

    /// All keys of a user that the caller may see. The list is empty if the caller may not see the user, or if the user
    /// does not exist.
    pub async fn list_keys(&self, token: &APIToken, user_id: &str) -> Result<Vec<ListedKey>, APIError> {
        let (path, sorted_by) = ("/v2/users/keys/search", Some("KEY_FIELD_NAME_CREATED_DATE"));
        let keys: Vec<Key> = self.list(path, &of_user(user_id), sorted_by, token).await?;
        let of_user = keys.into_iter().filter(|key| key.user_id == user_id);
        let listed = of_user.map(|key| ListedKey {
            // A date in the year 9999 is later than the maximum of `Timestamp` and means "never".
            expires_at: key.expiration_date.and_then(|date| date.parse().ok()),
            key_id: key.id,
        });
        Ok(listed.filter(|key| is_plain_id(&key.key_id)).collect())
    }

    /// The number of personal access tokens of a user that the caller may see.
    pub async fn count_personal_tokens(&self, token: &APIToken, user_id: &str) -> Result<usize, APIError> {
        let path = "/v2/users/pats/search";
        let tokens: Vec<Owned> = self.list(path, &of_user(user_id), None, token).await?;
        Ok(tokens.iter().filter(|owned| owned.user_id == user_id).count())
    }

    /// Removes a key of a user. Succeeds if there is no such key.
    pub async fn remove_key(&self, token: &APIToken, user_id: &str, key_id: &str) -> Result<(), APIError> {
        if !is_plain_id(key_id) {
            return Err(APIError::Rejected);
        }
        let path = format!("{}/keys/{key_id}", user_path(user_id)?);
        let answer = self.send(Call::Delete, &path, token).await?;
        match error_id(&answer).as_deref() {
            Some("COMMAND-4m77G") => Ok(()),
            _ => done(&answer),
        }
    }
}

/// The filter of a list for the entries of a user.
fn of_user(user_id: &str) -> Value {
    json!([{"userIdFilter": {"id": user_id}}])
}
