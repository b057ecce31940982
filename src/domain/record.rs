//! The record: an annotation on the token Secret that describes the token, the request that led to it, and its expiry.
//! It is the only durable state of a token, so that a restart requests no tokens
//! (`docs/adr/0002-the-secret-is-the-record.md`).

use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::domain::hash;

/// The version that the operator writes. A later release has to compare an older record by the rule of its version, so
/// that an upgrade requests no tokens (`docs/adr/0002-the-secret-is-the-record.md`).
pub const VERSION: u32 = 1;

/// The record of the token in a Secret.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Version of this record.
    pub v: u32,
    /// UID of the object that the Secret was written for. A Secret with `deletionPolicy: Retain` has no owner
    /// reference.
    pub owner: String,
    /// Hash of the inputs of the token request. If they change, the operator requests a new token.
    pub request_hash: String,
    /// Hash of the labels, annotations and templates. If they change, the operator writes the Secret again and requests
    /// no token.
    pub template_hash: String,
    /// When the token was issued, by the server's clock.
    pub issued_at: Timestamp,
    /// When the token expires, by the server's clock.
    pub expires_at: Timestamp,
    /// The last renew request that was served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
    /// Hash of the token and the fields above. It reveals an edited token or record.
    pub content: String,
}

impl Record {
    /// The record with `content` computed for `token`.
    #[must_use]
    pub fn sealed(mut self, token: &str) -> Self {
        self.content = self.seal(token);
        self
    }

    /// The record of `token` with another template hash and owner. The owner changes if the object with this UID
    /// adopted the Secret of another object.
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

    /// Whether this record was written for `token`, and neither was edited.
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

    /// Parses the annotation. Returns `None` if it is not a record.
    #[must_use]
    pub fn parse(annotation: &str) -> Option<Self> {
        serde_json::from_str(annotation).ok()
    }

    /// The value of the annotation.
    #[must_use]
    pub fn render(&self) -> String {
        // A struct of strings and numbers always serializes.
        serde_json::to_string(self).unwrap_or_default()
    }
}
