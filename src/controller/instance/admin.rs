//! The administrator of an instance. Its credential is read, checked and used for one reconcile, and written nowhere.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::api::ZitadelInstance;
use crate::controller::Context;
use crate::controller::evidence::judge;
use crate::controller::instance::connect;
use crate::controller::instance::credential::{self, Credential};
use crate::controller::refused::Refused;
use crate::controller::session::note_rejection;
use crate::controller::triggers::reference;
use crate::domain::admin_credential;
use crate::domain::failure::Failure;
use crate::domain::key::ServiceKey;
use crate::domain::manager_role::{ManagerRoles, RoleScope};
use crate::domain::reason::Reason;
use crate::zitadel::{APIError, APIToken, ZitadelClient};

/// A session of the administrator at ZITADEL's API.
pub struct Admin {
    /// The connection.
    pub client: Arc<ZitadelClient>,
    /// The token.
    pub token: APIToken,
    /// The id of its user.
    pub user_id: String,
}

impl Admin {
    /// Begins a session with the credential of the instance.
    pub async fn of(ctx: &Context, instance: &ZitadelInstance) -> Result<Self, Refused> {
        let credential = credential::read(ctx, instance).await?;
        Self::with(ctx, instance, &credential).await
    }

    /// Begins a session with a credential that was read.
    pub async fn with(ctx: &Context, instance: &ZitadelInstance, credential: &Credential) -> Result<Self, Refused> {
        let client = connect(ctx, instance).await?;
        // Discovery confirms the issuer before a credential is sent.
        client.discovery().await?;
        let (token, user_id) = match credential {
            Credential::Keys(keys) => {
                let mut key = credential::signer(ctx, instance, keys)?;
                let mut ended = token(ctx, instance, &client, &key).await;
                // ZITADEL may have rejected the key for long by now.
                let next = credential::signer(ctx, instance, keys)?;
                if ended.is_err() && next.key_id != key.key_id {
                    ended = token(ctx, instance, &client, &next).await;
                    key = next;
                }
                (ended?, key.user_id)
            }
            Credential::Token(text, _) => {
                let token = APIToken::personal(text).ok_or(Reason::CredentialInvalid)?;
                let user_id = client.who_am_i(&token).await?;
                (token, user_id)
            }
        };
        Ok(Self { client, token, user_id })
    }

    /// The manager roles of the administrator in one scope.
    pub async fn roles_in(&self, scope: &RoleScope) -> Result<BTreeSet<String>, Refused> {
        Ok(self.client.list_roles(&self.token, &self.user_id, scope).await?)
    }

    /// All manager roles of the administrator, for people to read. Others may give it so many that they cannot be listed;
    /// those of the instance then stand for all.
    pub async fn roles(&self) -> Result<Vec<ManagerRoles>, Refused> {
        match self.client.list_own_roles(&self.token, &self.user_id).await {
            Ok(roles) => Ok(roles),
            Err(APIError::TooMany | APIError::Failed(Failure::Malformed)) => {
                let scope = RoleScope::Instance;
                let roles = self.roles_in(&scope).await?;
                Ok(vec![ManagerRoles { scope, roles }])
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Fails unless the administrator may manage the users of an organization. Only then does a 404 mean that a user does not
    /// exist.
    pub async fn may_manage_users(&self, organization_id: &str) -> Result<(), Refused> {
        let mut roles = Vec::new();
        for scope in [RoleScope::Instance, RoleScope::Organization(organization_id.to_owned())] {
            let held = self.roles_in(&scope).await?;
            roles.push(ManagerRoles { scope, roles: held });
        }
        if admin_credential::may_manage_users(&roles, organization_id) {
            Ok(())
        } else {
            Err(Reason::AdminForbidden.into())
        }
    }
}

/// Requests a token with a key of the administrator. A key of the operator that ZITADEL rejects for long is replaced.
async fn token(
    ctx: &Context,
    instance: &ZitadelInstance,
    client: &ZitadelClient,
    key: &ServiceKey,
) -> Result<APIToken, Refused> {
    let id = reference(instance);
    let failure = match client.api_token(key).await {
        Ok(token) => {
            ctx.keys.accepted(&id, &key.key_id);
            return Ok(token);
        }
        Err(failure) => failure,
    };
    let (reason, _) = judge(ctx, client, failure).await;
    note_rejection(ctx, client, &id, &key.key_id, reason).await;
    Err(Refused::token(reason, failure))
}
