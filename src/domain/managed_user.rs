//! The service user that `spec.user` describes: what the operator creates in ZITADEL, and how it recognises it later.

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::api::service_user::{AccessTokenType, ManagedUser};
use crate::domain::answer::Format;
use crate::domain::hash;
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
    /// The id of the user to take over, if the operator does not create one.
    pub existing_id: Option<String>,
    /// Everything that can change later.
    pub machine: Machine,
    /// What of it the spec sets.
    is_set: IsSet,
    /// Cluster, namespace and name of the object, which the metadata of the user states.
    pub owner: String,
    /// The renew request of the object, which also asks for a comparison.
    request: Option<String>,
}

/// Which fields the spec sets. Of a user that existed before, the operator changes no others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct IsSet {
    name: bool,
    description: bool,
    token_format: bool,
}

/// A user that the operator created or took over, or is about to.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Managed {
    /// Its organization.
    pub organization_id: String,
    /// Its username.
    pub username: String,
    /// What its metadata states: cluster, namespace and name of the object.
    pub owner: String,
    /// Whether the user existed before. The operator never deletes it.
    #[serde(default)]
    pub adopted: bool,
    /// Whether ZITADEL has the user and its metadata.
    pub confirmed: bool,
    /// When the user entered its present state.
    pub since: Timestamp,
    /// A hash of the fields that were applied last.
    #[serde(default)]
    pub applied: Option<String>,
    /// When the user was last compared with the spec.
    #[serde(default)]
    pub checked: Option<Timestamp>,
    /// The renew request at that time. Another one asks for another comparison.
    #[serde(default)]
    pub request: Option<String>,
}

/// The default username.
#[must_use]
pub fn default_username(cluster: &str, id: &ObjectRef) -> String {
    format!("{cluster}-{}-{}", id.namespace, id.name)
}

impl Desired {
    /// What `user` asks for. A user that exists keeps its username, also if the cluster got another name.
    #[must_use]
    pub fn of(
        user: &ManagedUser,
        cluster: &str,
        id: &ObjectRef,
        existing: Option<&Managed>,
        request: Option<String>,
    ) -> Self {
        let username = existing.map(|managed| managed.username.clone());
        let username = username.or_else(|| user.username.clone());
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
            existing_id: user.existing_user_id.clone(),
            is_set: IsSet {
                name: user.display_name.is_some(),
                description: user.description.is_some(),
                token_format: user.access_token_type.is_some(),
            },
            owner: format!("{cluster}/{}/{}", id.namespace, id.name),
            request,
        }
    }

    /// What a user of ZITADEL is to be changed to.
    #[must_use]
    pub fn for_user(&self, found: &Machine) -> Machine {
        let keeps = |is_set: bool| self.existing_id.is_some() && !is_set;
        let from = |is_set: bool| if keeps(is_set) { found } else { &self.machine };
        Machine {
            name: from(self.is_set.name).name.clone(),
            description: from(self.is_set.description).description.clone(),
            token_format: from(self.is_set.token_format).token_format,
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
        let IsSet {
            name: by_name,
            description: by_description,
            token_format: by_format,
        } = self.is_set;
        let is_set = format!("{by_name} {by_description} {by_format}");
        let is_set = if self.existing_id.is_some() { &*is_set } else { "" };
        hash::of([
            name.as_bytes(),
            description.as_bytes(),
            format.as_bytes(),
            is_set.as_bytes(),
        ])
    }

    /// Whether ZITADEL has to be asked about the user: it does not exist yet, the spec or the renew request changed, or nobody
    /// compared them for long. Only a reconcile that has another cause compares them, so an idle object costs nothing.
    #[must_use]
    pub fn is_to_be_checked(&self, managed: &Managed, now: Timestamp) -> bool {
        let is_recent = |at: &Timestamp| shifted(*at, CHECKED_EVERY) > now && *at <= now;
        let is_compared = managed.checked.as_ref().is_some_and(is_recent) && managed.request == self.request;
        !(self.is_applied(managed) && is_compared)
    }

    /// The entry of the ledger after a comparison.
    #[must_use]
    pub fn compared(&self, managed: Managed, now: Timestamp) -> Managed {
        Managed {
            checked: Some(now),
            request: self.request.clone(),
            ..managed
        }
    }

    /// Whether ZITADEL had the user as the spec describes it.
    #[must_use]
    pub fn is_applied(&self, managed: &Managed) -> bool {
        managed.confirmed && managed.applied.as_ref() == Some(&self.hash())
    }

    /// The entry of the ledger for a user that does not exist yet.
    #[must_use]
    pub fn planned(&self, now: Timestamp) -> Managed {
        Managed {
            organization_id: self.organization_id.clone(),
            username: self.username.clone(),
            owner: self.owner.clone(),
            adopted: self.existing_id.is_some(),
            confirmed: false,
            since: now,
            applied: None,
            checked: None,
            request: None,
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
            Desired::of(&user, "prod", &ObjectRef::new("shop", "billing"), None, None)
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
        let found = Machine {
            name: "Found".into(),
            description: "By hand".into(),
            token_format: Format::Opaque,
        };
        assert_eq!(plain.for_user(&found), plain.machine);
        let adopted = desired(json!({"organizationID": "1", "existingUserID": "7", "description": ""}));
        assert!(adopted.planned(at(0)).adopted);
        let jwt = json!({"organizationID": "1", "existingUserID": "7", "description": "", "accessTokenType": "JWT"});
        assert_ne!(adopted.hash(), desired(jwt).hash());
        let kept = Machine {
            description: String::new(),
            ..found.clone()
        };
        assert_eq!(adopted.for_user(&found), kept);
        // The cluster got another name.
        let user: ManagedUser = serde_json::from_value(json!({"organizationID": "1"})).expect("a user");
        let existing = plain.planned(at(0));
        let renamed = Desired::of(
            &user,
            "other",
            &ObjectRef::new("shop", "billing"),
            Some(&existing),
            None,
        );
        assert_eq!((renamed.hash(), &renamed.username), (plain.hash(), &plain.username));
        let named =
            desired(json!({"organizationID": "1", "username": "ci", "displayName": "CI", "accessTokenType": "Opaque"}));
        assert_eq!((&*named.username, &*named.machine.name), ("ci", "CI"));
        assert_ne!(plain.hash(), named.hash());
        let mut managed = plain.planned(at(0));
        assert!(plain.is_to_be_checked(&managed, at(0)));
        managed.confirmed = true;
        managed.applied = Some(plain.hash());
        managed.checked = Some(at(0));
        assert!(!plain.is_to_be_checked(&managed, at(6 * 3_600 - 1)));
        assert!(plain.is_to_be_checked(&managed, at(6 * 3_600)));
        let renewed = Desired {
            request: Some("1".into()),
            ..plain.clone()
        };
        assert!(renewed.is_to_be_checked(&managed, at(0)));
        assert!(!renewed.is_to_be_checked(&renewed.compared(managed.clone(), at(0)), at(0)));
        assert!(named.is_to_be_checked(&managed, at(0)));
        assert_eq!(
            plain.hash(),
            desired(json!({"organizationID": "2", "username": "prod-shop-billing"})).hash()
        );
    }
}
