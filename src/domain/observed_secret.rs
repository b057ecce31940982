//! A token Secret as it was read: whose it is, what it holds, and what a write must meet.

use std::collections::BTreeMap;
use std::sync::Arc;

use secrecy::{ExposeSecret, SecretSlice, SecretString};

use crate::api::metadata::{ANNOTATION_ADOPT, ANNOTATION_RECORD, LABEL_MANAGED_BY, LABEL_SERVICE_USER};
use crate::api::service_user::Token;
use crate::domain::answer::MAX_TOKEN_BYTES;
use crate::domain::reason::Reason;
use crate::domain::record::Record;

/// Largest Secret that we write. A reconcile holds all of an object's Secrets in memory, and every kubelet has to carry
/// them; a token has about 1 kB.
pub const MAX_BYTES: usize = 128 * 1024;

/// Kind of the controller that token Secrets belong to.
pub const OWNER_KIND: &str = "ZitadelServiceUser";

/// Longest annotation of ours: a record has about 600 bytes, a name 253.
const MAX_ANNOTATION: usize = 4 * 1024;

/// Which parts of a token Secret decide: what a draft of the token sets, or what every token Secret has. Of the others
/// nothing is read, however much they hold.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a>(Option<&'a Token>);

impl<'a> Wanted<'a> {
    /// What decides about the Secret of a token, or about one that the spec no longer names.
    #[must_use]
    pub fn of(token: Option<&'a Token>) -> Self {
        Self(token)
    }

    /// The longest value of this label that can be right, if the label decides.
    #[must_use]
    pub fn label(self, key: &str) -> Option<usize> {
        let named = || self.0.and_then(|token| token.secret.labels.get(key));
        match key {
            LABEL_MANAGED_BY | LABEL_SERVICE_USER => Some(63),
            _ => named().map(String::len),
        }
    }

    /// The same for an annotation.
    #[must_use]
    pub fn annotation(self, key: &str) -> Option<usize> {
        let named = || self.0.and_then(|token| token.secret.annotations.get(key));
        match key {
            ANNOTATION_RECORD | ANNOTATION_ADOPT => Some(MAX_ANNOTATION),
            _ => named().map(String::len),
        }
    }

    /// The same for an entry of the data.
    #[must_use]
    pub fn data(self, key: &str) -> Option<usize> {
        let named = || self.0.is_some_and(|token| token.secret.template.contains_key(key));
        match key {
            "token" => Some(MAX_TOKEN_BYTES),
            "token_type" | "expires_at" | "issuer" => Some(MAX_ANNOTATION),
            _ => named().then_some(MAX_BYTES),
        }
    }
}

/// A Secret that exists, reduced to what is [`Wanted`]. Values are redacted in `Debug` and zeroized on drop.
#[derive(Debug)]
pub struct ObservedSecret {
    /// Its UID.
    pub uid: String,
    /// Its version.
    pub resource_version: String,
    /// The object that controls it.
    pub controller: Option<Controller>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations. Tools keep copies of the whole object there, values and all.
    pub annotations: BTreeMap<String, SecretString>,
    /// Its data, decoded.
    pub data: Arc<BTreeMap<String, SecretSlice<u8>>>,
    /// Whether its type is `Opaque`.
    pub opaque: bool,
    /// Whether it is immutable.
    pub immutable: bool,
}

/// The controller in an owner reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Controller {
    /// Its kind.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
}

/// A Secret to delete, guarded by what was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretRef {
    /// Its name, in the object's namespace.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Its version.
    pub resource_version: String,
}

/// What a write expects to meet: the guard against writing over somebody else's Secret (decision K5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WritePrecondition {
    /// Nothing of that name.
    Absent,
    /// This very version.
    Present {
        /// Its UID.
        uid: String,
        /// Its version.
        resource_version: String,
    },
}

impl ObservedSecret {
    /// Whether the object of this name and UID may write it.
    pub fn owned_by(&self, name: &str, uid: &str) -> Result<(), Reason> {
        match &self.controller {
            Some(c) if c.uid == uid && self.opaque && !self.immutable => Ok(()),
            // The object was deleted and made again before garbage collection ran (decision K24).
            Some(c) if c.uid != uid && c.kind == OWNER_KIND && c.name == name => Err(Reason::SecretBeingReplaced),
            None if self.opaque
                && !self.immutable
                && (self.annotation(ANNOTATION_ADOPT) == Some(name) || self.is_retained_for(uid)) =>
            {
                Ok(())
            }
            _ => Err(Reason::SecretConflict),
        }
    }

    /// Whether it was written for the object of this UID without an owner reference.
    fn is_retained_for(&self, uid: &str) -> bool {
        self.record().is_some_and(|record| record.owner == uid)
    }

    /// The record, if there is one.
    #[must_use]
    pub fn record(&self) -> Option<Record> {
        Record::parse(self.annotation(ANNOTATION_RECORD)?)
    }

    /// An annotation that decides.
    #[must_use]
    pub fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(name).map(ExposeSecret::expose_secret)
    }

    /// The token, if there is text in its place.
    #[must_use]
    pub fn token(&self) -> Option<&str> {
        std::str::from_utf8(self.data.get("token")?.expose_secret()).ok()
    }

    /// The guard for a write over it.
    #[must_use]
    pub fn precondition(&self) -> WritePrecondition {
        WritePrecondition::Present {
            uid: self.uid.clone(),
            resource_version: self.resource_version.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_a_secret_is() {
        let controller = |kind: &str, name: &str, uid: &str| {
            Some(Controller {
                kind: kind.into(),
                name: name.into(),
                uid: uid.into(),
            })
        };
        let adopt = BTreeMap::from([(ANNOTATION_ADOPT.to_owned(), SecretString::from("billing"))]);
        let none = BTreeMap::new();
        let table = [
            (
                "ours",
                controller(OWNER_KIND, "billing", "u1"),
                &none,
                true,
                false,
                Ok(()),
            ),
            (
                "ours, immutable",
                controller(OWNER_KIND, "billing", "u1"),
                &none,
                true,
                true,
                Err(Reason::SecretConflict),
            ),
            (
                "ours, of another type",
                controller(OWNER_KIND, "billing", "u1"),
                &none,
                false,
                false,
                Err(Reason::SecretConflict),
            ),
            (
                "an earlier object's",
                controller(OWNER_KIND, "billing", "u0"),
                &none,
                true,
                false,
                Err(Reason::SecretBeingReplaced),
            ),
            (
                "another object's",
                controller(OWNER_KIND, "orders", "u2"),
                &none,
                true,
                false,
                Err(Reason::SecretConflict),
            ),
            (
                "another kind's",
                controller("Certificate", "billing", "u1x"),
                &adopt,
                true,
                false,
                Err(Reason::SecretConflict),
            ),
            ("nobody's", None, &none, true, false, Err(Reason::SecretConflict)),
            ("nobody's, to adopt", None, &adopt, true, false, Ok(())),
            (
                "nobody's, to adopt, immutable",
                None,
                &adopt,
                true,
                true,
                Err(Reason::SecretConflict),
            ),
        ];
        for (name, controller, annotations, opaque, immutable, expected) in table {
            let observed = ObservedSecret {
                uid: "s".into(),
                resource_version: "1".into(),
                controller,
                labels: BTreeMap::new(),
                annotations: annotations.clone(),
                data: Arc::default(),
                opaque,
                immutable,
            };
            assert_eq!(observed.owned_by("billing", "u1"), expected, "{name}");
        }
    }
}
