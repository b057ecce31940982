//! The record: an annotation on the token Secret that says what was minted, from what, until when. The Secret is the
//! record, so that a restart needs no other state and mints nothing (design §2.3).

use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::domain::hash;

/// Version that we write. An older one will be compared by its own rule, so that an upgrade mints nothing (K8).
pub const VERSION: u32 = 1;

/// What is known of the token in a Secret.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Version of this record.
    pub v: u32,
    /// UID of the object that it was written for; a Secret that is to outlive its object has no owner reference.
    pub owner: String,
    /// Hash of what decided the token: other inputs need another token.
    pub request_hash: String,
    /// Hash of what is rendered around the token: another shape needs another write, and no mint.
    pub template_hash: String,
    /// When the token was minted, by our clock.
    pub issued_at: Timestamp,
    /// When it expires, by our clock.
    pub expires_at: Timestamp,
    /// The last renew request that was served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
    /// Hash of the token and the fields above: finds a token or record that somebody edited.
    pub content: String,
}

impl Record {
    /// The record with its `content` for `token`.
    #[must_use]
    pub fn sealed(mut self, token: &str) -> Self {
        self.content = self.seal(token);
        self
    }

    /// The record of `token` with another shape, for the object of this UID: the token may have been another's, whose
    /// Secret was adopted.
    #[must_use]
    pub fn rehashed(&self, owner: &str, template_hash: &str, token: &str) -> Self {
        let (owner, template_hash) = (owner.to_owned(), template_hash.to_owned());
        let record = self.clone();
        Self {
            owner,
            template_hash,
            ..record
        }
        .sealed(token)
    }

    /// Whether `token` is the one that this record was written for, and the record unedited.
    #[must_use]
    pub fn vouches_for(&self, token: &str) -> bool {
        self.v == VERSION && self.content == self.seal(token)
    }

    fn seal(&self, token: &str) -> String {
        hash::of([
            &self.v.to_be_bytes()[..],
            self.owner.as_bytes(),
            self.request_hash.as_bytes(),
            self.template_hash.as_bytes(),
            self.issued_at.to_string().as_bytes(),
            self.expires_at.to_string().as_bytes(),
            self.request.as_deref().unwrap_or_default().as_bytes(),
            token.as_bytes(),
        ])
    }

    /// Reads the annotation; anything that is not a record is none.
    #[must_use]
    pub fn parse(annotation: &str) -> Option<Self> {
        serde_json::from_str(annotation).ok()
    }

    /// The annotation.
    #[must_use]
    pub fn render(&self) -> String {
        // A struct of strings and numbers always serializes.
        serde_json::to_string(self).unwrap_or_default()
    }
}
