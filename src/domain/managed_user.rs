//! The service user that `spec.user` describes: what the operator creates in ZITADEL, and how it recognises it later.

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::api::service_user::{AccessTokenType, ManagedUser};
use crate::domain::answer::Format;
use crate::domain::hash;
use crate::domain::key_ledger::Managed;
use crate::domain::object_ref::ObjectRef;
use crate::domain::time::shifted;
use crate::domain::user::Machine;

/// A user is compared with the spec this long after the last time.
const CHECKED_EVERY: SignedDuration = SignedDuration::from_hours(6);

/// What the spec asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Desired {
    /// The organization of the user.
    pub organization_id: String,
    /// Its username.
    pub username: String,
    /// Everything that can change later.
    pub machine: Machine,
    /// Cluster, namespace and name of the object, which the metadata of the user states.
    pub owner: String,
}

/// The default username.
#[must_use]
pub fn default_username(cluster: &str, id: &ObjectRef) -> String {
    format!("{cluster}-{}-{}", id.namespace, id.name)
}

impl Desired {
    /// What `user` asks for.
    #[must_use]
    pub fn of(user: &ManagedUser, cluster: &str, id: &ObjectRef) -> Self {
        let username = user.username.clone();
        let username = username.unwrap_or_else(|| default_username(cluster, id));
        Self {
            organization_id: user.organization_id.clone(),
            machine: Machine {
                name: user.display_name.clone().unwrap_or_else(|| username.clone()),
                description: user.description.clone().unwrap_or_default(),
                token_format: match user.access_token_type {
                    Some(AccessTokenType::Opaque) => Format::Opaque,
                    Some(AccessTokenType::Jwt) | None => Format::Jwt,
                },
            },
            username,
            owner: format!("{cluster}/{}/{}", id.namespace, id.name),
        }
    }

    /// A hash of what can change later, to notice that the spec changed.
    #[must_use]
    pub fn hash(&self) -> String {
        let Machine {
            name,
            description,
            token_format,
        } = &self.machine;
        let format = if *token_format == Format::Jwt { "JWT" } else { "Opaque" };
        hash::of([name.as_bytes(), description.as_bytes(), format.as_bytes()])
    }

    /// Whether ZITADEL has to be asked about the user: it does not exist yet, the spec changed, or nobody compared them for
    /// long. Only a reconcile that has another cause compares them, so an idle object costs nothing.
    #[must_use]
    pub fn is_to_be_checked(&self, managed: &Managed, now: Timestamp) -> bool {
        let is_recent = |at: &Timestamp| shifted(*at, CHECKED_EVERY) > now && *at <= now;
        !(self.is_applied(managed) && managed.checked.as_ref().is_some_and(is_recent))
    }

    /// Whether ZITADEL had the user as the spec describes it.
    #[must_use]
    pub fn is_applied(&self, managed: &Managed) -> bool {
        managed.created && managed.applied.as_ref() == Some(&self.hash())
    }

    /// The entry of the ledger for a user that does not exist yet.
    #[must_use]
    pub fn planned(&self, now: Timestamp) -> Managed {
        Managed {
            organization_id: self.organization_id.clone(),
            username: self.username.clone(),
            owner: self.owner.clone(),
            created: false,
            since: now,
            applied: None,
            checked: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::fixtures::at;

    #[test]
    fn defaults_come_from_cluster_and_object() {
        let desired = |user: serde_json::Value| {
            let user: ManagedUser = serde_json::from_value(user).expect("a user");
            Desired::of(&user, "prod", &ObjectRef::new("shop", "billing"))
        };
        let plain = desired(json!({"organizationID": "1"}));
        assert_eq!(
            (&*plain.username, &*plain.machine.name),
            ("prod-shop-billing", "prod-shop-billing")
        );
        assert_eq!(
            (&*plain.owner, plain.machine.token_format),
            ("prod/shop/billing", Format::Jwt)
        );
        let named =
            desired(json!({"organizationID": "1", "username": "ci", "displayName": "CI", "accessTokenType": "Opaque"}));
        assert_eq!((&*named.username, &*named.machine.name), ("ci", "CI"));
        assert_ne!(plain.hash(), named.hash());
        let mut managed = plain.planned(at(0));
        assert!(plain.is_to_be_checked(&managed, at(0)));
        managed.created = true;
        managed.applied = Some(plain.hash());
        managed.checked = Some(at(0));
        assert!(!plain.is_to_be_checked(&managed, at(6 * 3_600 - 1)));
        assert!(plain.is_to_be_checked(&managed, at(6 * 3_600)));
        assert!(named.is_to_be_checked(&managed, at(0)));
        assert_eq!(
            plain.hash(),
            desired(json!({"organizationID": "2", "username": "prod-shop-billing"})).hash()
        );
    }
}
