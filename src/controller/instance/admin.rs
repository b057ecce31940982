//! The administrator of an instance. Its credential is read, checked and used for one reconcile, and written nowhere.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::api::ZitadelInstance;
use crate::controller::Context;
use crate::controller::instance::connect;
use crate::controller::read::ReadError;
use crate::domain::admin_credential::{self, AdminCredential};
use crate::domain::failure::{Failure, classify};
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

/// Why the administrator cannot do something.
#[derive(Clone, Copy, Debug)]
pub struct Refused {
    /// The reason.
    pub reason: Reason,
    /// The earliest time of the next attempt.
    pub not_before: Option<Timestamp>,
}

impl From<Reason> for Refused {
    fn from(reason: Reason) -> Self {
        Self {
            reason,
            not_before: None,
        }
    }
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        let reason = match classify(failure, false) {
            Reason::KeyRejected | Reason::UserInactive => Reason::CredentialRejected,
            reason => reason,
        };
        Self {
            reason,
            not_before: failure.retry_after(),
        }
    }
}

impl From<APIError> for Refused {
    fn from(error: APIError) -> Self {
        match error {
            APIError::Unavailable => Reason::NotSupportedByServer.into(),
            APIError::Unauthenticated => Reason::CredentialRejected.into(),
            APIError::Rejected | APIError::UnknownOrganization => Reason::UserRejected.into(),
            APIError::UserIDTaken | APIError::UsernameTaken => Reason::UserConflict.into(),
            APIError::TooMany => Reason::KeyListIncomplete.into(),
            APIError::Failed(failure) => failure.into(),
            // A 404 about an object that the operator knows means that the caller may not see it.
            _ => Reason::AdminForbidden.into(),
        }
    }
}

impl Admin {
    /// Begins a session with the credential of the instance.
    pub async fn of(ctx: &Context, instance: &ZitadelInstance) -> Result<Self, Refused> {
        let credential = instance.spec.admin_credential.as_ref();
        let reference = &credential.ok_or(Reason::CredentialMissing)?.secret_ref;
        let namespace = ctx.operator_namespace.as_deref().ok_or(Reason::CredentialMissing)?;
        let read = ctx
            .reader
            .credential(namespace, &reference.name, reference.key.as_deref());
        let text = read.await.map_err(|error| match error {
            ReadError::Forbidden => Reason::CredentialMissing,
            ReadError::Unavailable => Reason::APIServerUnavailable,
        })?;
        let (annotations, entry) = text.ok_or(Reason::CredentialMissing)?;
        let credential = admin_credential::read(&annotations, entry.as_ref(), &instance.name_any(), &instance.spec)?;
        let client = connect(ctx, instance).await?;
        // Discovery confirms the issuer before a credential is sent.
        client.discovery().await?;
        let (token, user_id) = match credential {
            AdminCredential::Key(key) => (client.api_token(&key).await?, key.user_id.clone()),
            AdminCredential::Token(text) => {
                let token = APIToken::personal(&text).ok_or(Reason::CredentialInvalid)?;
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
