//! Service users and their metadata at ZITADEL, managed by an administrator
//! (`docs/reference/zitadel-protocol.md#service-users`).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use crate::domain::answer::Format;
use crate::domain::failure::Failure;
use crate::domain::user::{Machine, User, UserState};
use crate::zitadel::api_call::{APIToken, user_path};
use crate::zitadel::api_error::APIError;
use crate::zitadel::client::ZitadelClient;
use crate::zitadel::transport::Call;

const JWT: &str = "ACCESS_TOKEN_TYPE_JWT";
const BEARER: &str = "ACCESS_TOKEN_TYPE_BEARER";

/// A service user to create.
#[derive(Clone, Copy, Debug)]
pub struct NewUser<'a> {
    /// The id, which the caller chooses. A repeated request after a crash then finds the user instead of creating
    /// another.
    pub id: &'a str,
    /// The organization of the user.
    pub organization_id: &'a str,
    /// The username.
    pub username: &'a str,
    /// Everything that can be changed later.
    pub machine: &'a Machine,
}

#[derive(Deserialize)]
struct Found {
    user: FoundUser,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct FoundUser {
    user_id: String,
    details: Details,
    #[serde(default)]
    username: String,
    #[serde(default)]
    state: String,
    machine: Option<FoundMachine>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Details {
    resource_owner: String,
}

/// ZITADEL omits empty fields, and the default token type.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct FoundMachine {
    name: String,
    description: String,
    access_token_type: String,
}

/// An entry of the metadata.
#[derive(Deserialize)]
struct Entry {
    key: String,
    #[serde(default, deserialize_with = "base64")]
    value: Vec<u8>,
}

impl ZitadelClient {
    /// Creates a service user with the chosen id. If such a user exists, the error is [`APIError::UserIDTaken`]: the
    /// caller then decides with [`user`](Self::user) and [`metadata`](Self::metadata) whether an earlier request
    /// created it.
    pub async fn create_machine_user(&self, token: &APIToken, new: NewUser<'_>) -> Result<(), APIError> {
        #[derive(Deserialize)]
        struct Created {
            id: String,
        }
        // The id must be usable in paths later.
        user_path(new.id)?;
        let body = json!({
            "organizationId": new.organization_id,
            "userId": new.id,
            "username": new.username,
            "machine": fields(new.machine),
        });
        let created: Created = self.ask(Call::PostJSON(&body), "/v2/users/new", token).await?;
        if created.id == new.id {
            Ok(())
        } else {
            Err(Failure::Malformed.into())
        }
    }

    /// The user with this id, or `None` if ZITADEL says that it does not exist. A user that was created within the last
    /// second may not show yet. A user that the caller may not see is [`APIError::Forbidden`].
    pub async fn user(&self, token: &APIToken, user_id: &str) -> Result<Option<User>, APIError> {
        let found: Found = match self.ask(Call::Get, &user_path(user_id)?, token).await {
            Err(APIError::UnknownUser) => return Ok(None),
            found => found?,
        };
        if found.user.user_id != user_id {
            return Err(Failure::Malformed.into());
        }
        Ok(Some(found.user.into()))
    }

    /// Sets name, description and token format of a service user. Succeeds if they are the same already.
    pub async fn update_machine_user(
        &self,
        token: &APIToken,
        user_id: &str,
        machine: &Machine,
    ) -> Result<(), APIError> {
        let body = json!({"machine": fields(machine)});
        self.tell(Call::PatchJSON(&body), &user_path(user_id)?, token).await
    }

    /// Deletes a user with its keys and roles. Succeeds if ZITADEL says that there is no such user.
    pub async fn delete_user(&self, token: &APIToken, user_id: &str) -> Result<(), APIError> {
        match self.tell(Call::Delete, &user_path(user_id)?, token).await {
            Err(APIError::UnknownUser) => Ok(()),
            deleted => deleted,
        }
    }

    /// The value of a metadata key. `None` does not prove that the user has no such key: ZITADEL also answers so if the
    /// caller may not see the user, or if the user does not exist.
    pub async fn metadata(&self, token: &APIToken, user_id: &str, key: &str) -> Result<Option<Vec<u8>>, APIError> {
        let path = format!("{}/metadata/search", user_path(user_id)?);
        let filters = json!([{"keyFilter": {"key": key}}]);
        let entries: Vec<Entry> = self.list(&path, &filters, None, token).await?;
        let entry = entries.into_iter().find(|entry| entry.key == key);
        Ok(entry.map(|entry| entry.value))
    }

    /// Sets a metadata key. Succeeds if it has this value already.
    pub async fn set_metadata(&self, token: &APIToken, user_id: &str, key: &str, value: &[u8]) -> Result<(), APIError> {
        let body = json!({"metadata": [{"key": key, "value": STANDARD.encode(value)}]});
        let path = format!("{}/metadata", user_path(user_id)?);
        self.tell(Call::PostJSON(&body), &path, token).await
    }
}

impl From<FoundUser> for User {
    fn from(found: FoundUser) -> Self {
        Self {
            organization_id: found.details.resource_owner,
            username: found.username,
            state: match found.state.as_str() {
                "USER_STATE_ACTIVE" => UserState::Active,
                "USER_STATE_INACTIVE" => UserState::Inactive,
                "USER_STATE_LOCKED" => UserState::Locked,
                _ => UserState::Other,
            },
            machine: found.machine.map(|machine| Machine {
                name: machine.name,
                description: machine.description,
                token_format: if machine.access_token_type == JWT {
                    Format::Jwt
                } else {
                    Format::Opaque
                },
            }),
        }
    }
}

/// The fields of a service user in a request.
fn fields(machine: &Machine) -> Value {
    let access_token_type = match machine.token_format {
        Format::Jwt => JWT,
        Format::Opaque => BEARER,
    };
    json!({"name": machine.name, "description": machine.description, "accessTokenType": access_token_type})
}

fn base64<'de, D: Deserializer<'de>>(text: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(text)?;
    STANDARD.decode(text).map_err(|_| serde::de::Error::custom("no base64"))
}
