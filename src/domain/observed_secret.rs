//! A token Secret as the operator read it: whether an object owns it or may take it over, its content, and the precondition
//! of a write.

use std::collections::BTreeMap;
use std::sync::Arc;

use secrecy::{ExposeSecret, SecretSlice, SecretString};

use crate::api::metadata::{ANNOTATION_ADOPT, ANNOTATION_RECORD, LABEL_MANAGED_BY, LABEL_SERVICE_USER};
use crate::api::service_user::Token;
use crate::domain::answer::MAX_TOKEN_BYTES;
use crate::domain::reason::Reason;
use crate::domain::record::Record;

/// Maximum size of a Secret that the operator writes. A reconcile holds all Secrets of an object in memory, and
/// kubelets cache and mount them. A token has about 1 kB.
pub const MAX_BYTES: usize = 128 * 1024;

/// Kind of the object that controls a token Secret.
pub const OWNER_KIND: &str = "ZitadelServiceUser";

/// Maximum size of an annotation that the operator reads: a record has about 600 bytes, a name at most 253.
const MAX_ANNOTATION: usize = 4 * 1024;

/// The parts of a token Secret that decisions depend on: those that a draft of the token sets, and those that every
/// token Secret has. The operator ignores all other parts, whatever their size.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a>(Option<&'a Token>);

impl<'a> Wanted<'a> {
    /// The relevant parts of the Secret of `token`, or with `None` of a Secret that the spec no longer names.
    #[must_use]
    pub fn of(token: Option<&'a Token>) -> Self {
        Self(token)
    }

    /// The maximum length of a correct value of this label, or `None` if no decision depends on the label.
    #[must_use]
    pub fn label(self, key: &str) -> Option<usize> {
        let named = || self.0.and_then(|token| token.secret.labels.get(key));
        match key {
            LABEL_MANAGED_BY | LABEL_SERVICE_USER => Some(63),
            _ => named().map(String::len),
        }
    }

    /// Like [`Self::label`], for an annotation.
    #[must_use]
    pub fn annotation(self, key: &str) -> Option<usize> {
        let named = || self.0.and_then(|token| token.secret.annotations.get(key));
        match key {
            ANNOTATION_RECORD | ANNOTATION_ADOPT => Some(MAX_ANNOTATION),
            _ => named().map(String::len),
        }
    }

    /// Like [`Self::label`], for an entry of the data.
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

/// An existing Secret, reduced to the parts that are [`Wanted`]. `Debug` redacts the values, and they are zeroized on
/// drop.
#[derive(Debug)]
pub struct ObservedSecret {
    /// Its UID.
    pub uid: String,
    /// Its resource version.
    pub resource_version: String,
    /// The object that controls it.
    pub controller: Option<Controller>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations. They are secret, because some tools store a copy of the whole object in an annotation.
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

/// A Secret to delete, with the UID and resource version that the operator read as preconditions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretRef {
    /// Its name, in the object's namespace.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Its resource version.
    pub resource_version: String,
}

/// What a write expects to replace. It prevents the operator from overwriting a Secret that it does not own
/// (`docs/adr/0003-guarded-server-side-apply.md`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WritePrecondition {
    /// There is no Secret with this name.
    Absent,
    /// The Secret has exactly this UID and resource version.
    Present {
        /// Its UID.
        uid: String,
        /// Its resource version.
        resource_version: String,
    },
}

impl ObservedSecret {
    /// Checks that the object with this name and UID may write this Secret.
    pub fn may_be_written_by(&self, name: &str, uid: &str) -> Result<(), Reason> {
        match &self.controller {
            Some(c) if c.uid == uid && self.opaque && !self.immutable => Ok(()),
            // The object was deleted and recreated, and garbage collection has not run yet
            // (docs/adr/0003-guarded-server-side-apply.md).
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

    /// Whether the record says that the Secret was written for the object with this UID.
    fn is_retained_for(&self, uid: &str) -> bool {
        self.record().is_some_and(|record| record.owner == uid)
    }

    /// The record, if there is a readable one.
    #[must_use]
    pub fn record(&self) -> Option<Record> {
        Record::parse(self.annotation(ANNOTATION_RECORD)?)
    }

    /// The value of a [`Wanted`] annotation.
    #[must_use]
    pub fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(name).map(ExposeSecret::expose_secret)
    }

    /// The token, if the entry exists and is UTF-8.
    #[must_use]
    pub fn token(&self) -> Option<&str> {
        std::str::from_utf8(self.data.get("token")?.expose_secret()).ok()
    }

    /// The precondition for a write that replaces this Secret.
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
    fn ownership_of_existing_secrets() {
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
                "owned",
                controller(OWNER_KIND, "billing", "u1"),
                &none,
                true,
                false,
                Ok(()),
            ),
            (
                "owned, immutable",
                controller(OWNER_KIND, "billing", "u1"),
                &none,
                true,
                true,
                Err(Reason::SecretConflict),
            ),
            (
                "owned, of another type",
                controller(OWNER_KIND, "billing", "u1"),
                &none,
                false,
                false,
                Err(Reason::SecretConflict),
            ),
            (
                "owned by an earlier object of the same name",
                controller(OWNER_KIND, "billing", "u0"),
                &none,
                true,
                false,
                Err(Reason::SecretBeingReplaced),
            ),
            (
                "owned by another object",
                controller(OWNER_KIND, "orders", "u2"),
                &none,
                true,
                false,
                Err(Reason::SecretConflict),
            ),
            (
                "owned by another kind",
                controller("Certificate", "billing", "u1x"),
                &adopt,
                true,
                false,
                Err(Reason::SecretConflict),
            ),
            ("no controller", None, &none, true, false, Err(Reason::SecretConflict)),
            ("no controller, adopt", None, &adopt, true, false, Ok(())),
            (
                "no controller, adopt, immutable",
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
            assert_eq!(observed.may_be_written_by("billing", "u1"), expected, "{name}");
        }
    }
}
