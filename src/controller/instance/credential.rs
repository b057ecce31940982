//! Reads the admin credential of an instance: a personal access token, or the key in its Secret and those that the operator
//! made instead of it.

use kube::ResourceExt;
use secrecy::SecretString;

use crate::api::ZitadelInstance;
use crate::api::metadata::ADMIN_LEDGER_PREFIX;
use crate::controller::Context;
use crate::controller::key_rotation;
use crate::controller::read::ReadError;
use crate::controller::triggers::reference;
use crate::domain::admin_credential::{self, AdminCredential};
use crate::domain::key::ServiceKey;
use crate::domain::key_ledger::KeyLedger;
use crate::domain::key_rotation::KeyState;
use crate::domain::reason::Reason;

/// A credential as it is stored.
pub enum Credential {
    /// Keys, with which the operator requests tokens.
    Keys(Box<KeyState>),
    /// A personal access token, and whether the operator holds keys nevertheless.
    Token(SecretString, bool),
}

impl Credential {
    /// The id of the key that signs.
    pub fn key_id(&self, ctx: &Context, instance: &ZitadelInstance) -> Option<String> {
        match self {
            Self::Keys(keys) => signer(ctx, instance, keys).ok().map(|key| key.key_id),
            Self::Token(..) => None,
        }
    }

    /// Whether the operator holds keys of the administrator.
    #[must_use]
    pub fn holds_keys(&self) -> bool {
        match self {
            Self::Keys(keys) => !matches!(keys.ledger, Ok(None)),
            Self::Token(_, holds_keys) => *holds_keys,
        }
    }

    /// The operator's keys.
    #[must_use]
    pub fn ledger(&self) -> Option<&KeyLedger> {
        match self {
            Self::Keys(keys) => keys.stored().map(|stored| &stored.ledger),
            Self::Token(..) => None,
        }
    }
}

/// Reads the credential. The annotations of its Secret also bind the operator's own keys.
pub async fn read(ctx: &Context, instance: &ZitadelInstance) -> Result<Credential, Reason> {
    let credential = instance.spec.admin_credential.as_ref();
    let secret = &credential.ok_or(Reason::CredentialMissing)?.secret_ref;
    let namespace = ctx.operator_namespace.as_deref().ok_or(Reason::CredentialMissing)?;
    let read = ctx.reader.credential(namespace, &secret.name, secret.key.as_deref());
    let (annotations, entry) = read.await.map_err(unreadable)?.ok_or(Reason::CredentialMissing)?;
    let credential = admin_credential::read(&annotations, entry.as_ref(), &instance.name_any(), &instance.spec)?;
    let name = format!("{ADMIN_LEDGER_PREFIX}{}", instance.name_any());
    let ledger = ctx.reader.key_ledger(namespace, &name).await.map_err(unreadable)?;
    Ok(match credential {
        AdminCredential::Token(token) => {
            let id = reference(instance);
            ctx.keys.forget(&id);
            if let Ok(Some(stored)) = &ledger {
                ctx.keys.learn_made(&id, stored.ledger.made_key_ids());
            }
            Credential::Token(token, !matches!(ledger, Ok(None)))
        }
        AdminCredential::Key(key) => {
            if let Ok(Some(stored)) = &ledger {
                let destination = admin_credential::destination(&instance.spec);
                if !stored.ledger.is_bound_by(&key, &instance.spec.issuer, &destination) {
                    return Err(Reason::CredentialNotBound);
                }
            }
            let bootstrap = Ok(*key);
            let keys = KeyState { bootstrap, ledger };
            ctx.keys.uses(&reference(instance), &keys);
            Credential::Keys(Box::new(keys))
        }
    })
}

fn unreadable(error: ReadError) -> Reason {
    match error {
        ReadError::Forbidden => Reason::CredentialMissing,
        ReadError::Unavailable => Reason::APIServerUnavailable,
    }
}

/// The key that signs for the administrator.
pub fn signer(ctx: &Context, instance: &ZitadelInstance, keys: &KeyState) -> Result<ServiceKey, Reason> {
    let skew = ctx.connections.skew(&instance.name_any());
    key_rotation::signer(ctx, &reference(instance), keys, &instance.spec.issuer, skew, false)
}
