//! A ledger in its Secret.

use crate::domain::observed_secret::SecretRef;

/// A ledger as it is stored.
#[derive(Clone, Debug)]
pub struct Stored<L> {
    /// Its content.
    pub ledger: L,
    /// UID of the Secret.
    pub uid: String,
    /// Resource version of the Secret. Each write names it, so that two processes cannot both take a step.
    pub resource_version: String,
}

impl<L> Stored<L> {
    /// The Secret, whose name is `name`.
    #[must_use]
    pub fn secret(&self, name: &str) -> SecretRef {
        SecretRef {
            name: name.to_owned(),
            uid: self.uid.clone(),
            resource_version: self.resource_version.clone(),
        }
    }
}
