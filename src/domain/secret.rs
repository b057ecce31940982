//! The token Secret: what one must look like, whose one is, and whether somebody changed it (design §2.3).

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use secrecy::{ExposeSecret, SecretSlice, SecretString};

use crate::api::metadata::{ANNOTATION_ADOPT, ANNOTATION_RECORD, LABEL_MANAGED_BY, LABEL_SERVICE_USER, MANAGER};
use crate::api::service_user::{DeletionPolicy, Token};
use crate::domain::answer::{MAX_TOKEN_BYTES, Minted};
use crate::domain::facts::Facts;
use crate::domain::hash;
use crate::domain::reason::Reason;
use crate::domain::record::{Record, VERSION};

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

/// A Secret as it is to be.
#[derive(Debug)]
pub struct SecretDraft {
    /// Namespace of the object and its Secret.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Name and UID of the object that controls it.
    pub owner: (String, String),
    /// Whether it outlives that object: then nothing refers to the object.
    pub retained: bool,
    /// All labels that are ours to set.
    pub labels: BTreeMap<String, String>,
    /// All annotations that are ours to set, the record included.
    pub annotations: BTreeMap<String, String>,
    /// All data.
    pub data: BTreeMap<String, SecretString>,
    /// What must be there.
    pub precondition: WritePrecondition,
    /// It undoes what somebody did: the spec asks for nothing new.
    pub repair: bool,
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

    fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(name).map(ExposeSecret::expose_secret)
    }

    /// The token, if there is text in its place.
    #[must_use]
    pub fn token(&self) -> Option<&str> {
        std::str::from_utf8(self.data.get("token")?.expose_secret()).ok()
    }

    /// Whether something of `draft` is missing or changed. What others added is theirs.
    #[must_use]
    pub fn differs_from(&self, draft: &SecretDraft) -> bool {
        let missing = |(key, value): (&String, &String)| self.labels.get(key) != Some(value);
        let unset = |(key, value): (&String, &String)| self.annotation(key) != Some(value);
        self.controller.is_some() == draft.retained
            || draft.labels.iter().any(missing)
            || draft.annotations.iter().any(unset)
            || draft.data.iter().any(|(key, value)| {
                self.data
                    .get(key)
                    .is_none_or(|have| have.expose_secret() != value.expose_secret().as_bytes())
            })
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

/// Hash of what the spec wants around the token. A key that left the spec must leave the Secret, which a comparison
/// of what is there cannot see.
#[must_use]
pub fn template_hash(facts: &Facts, token: &Token) -> String {
    let secret = &token.secret;
    let json = serde_json::json!([
        facts.name(),
        secret.labels,
        secret.annotations,
        secret.template,
        secret.deletion_policy,
        facts.issuer(),
        audience(token)
    ]);
    hash::of([json.to_string().as_bytes()])
}

/// The record of a token that was just minted from these inputs.
#[must_use]
pub fn record(facts: &Facts, request_hash: &str, template_hash: &str, minted: &Minted) -> Record {
    Record {
        v: VERSION,
        owner: facts.uid().into(),
        request_hash: request_hash.into(),
        template_hash: template_hash.into(),
        issued_at: minted.issued,
        expires_at: minted.expires,
        request: facts.renew_request(),
        content: String::new(),
    }
    .sealed(minted.token.expose_secret())
}

/// Largest Secret that we write. A reconcile holds all of an object's Secrets in memory, and every kubelet has to carry
/// them; a token has about 1 kB.
pub const MAX_BYTES: usize = 128 * 1024;

/// The size of a token that is assumed before there is one; ZITADEL's with many roles have about 4 KiB.
const ASSUMED_BYTES: usize = 8 * 1024;

impl SecretDraft {
    /// Whether it is too large to be written.
    #[must_use]
    pub fn is_too_large(&self) -> bool {
        let texts = self.labels.iter().chain(&self.annotations);
        let data = self.data.iter().map(|(k, v)| k.len() + v.expose_secret().len());
        texts.map(|(k, v)| k.len() + v.len()).chain(data).sum::<usize>() > MAX_BYTES
    }
}

/// Whether the Secret of `token` will be small enough. Asked before a mint, since a token that cannot be written is
/// lost.
#[must_use]
pub fn fits(facts: &Facts, token: &Token) -> bool {
    // Without a template the rest has bounds of its own.
    token.secret.template.is_empty() || !placeholder(facts, token, "", "").is_too_large()
}

/// The Secret of `token` as it will be, with something of a token's size in it.
#[must_use]
pub fn placeholder(facts: &Facts, token: &Token, request_hash: &str, template_hash: &str) -> SecretDraft {
    let minted = Minted {
        token: "x".repeat(ASSUMED_BYTES).into(),
        issued: Timestamp::UNIX_EPOCH,
        expires: Timestamp::UNIX_EPOCH,
    };
    draft(
        facts,
        token,
        &minted.token,
        &record(facts, request_hash, template_hash, &minted),
    )
}

/// Renders the Secret of `token`.
#[must_use]
pub fn draft(facts: &Facts, token: &Token, value: &SecretString, record: &Record) -> SecretDraft {
    let expires_at = whole_seconds(record.expires_at).to_string();
    let audience = audience(token);
    let names = [
        ("token", value.expose_secret()),
        ("token_type", "Bearer"),
        ("expires_at", &expires_at),
        ("issuer", facts.issuer()),
        ("audience", &audience),
    ];
    let mut data: BTreeMap<String, SecretString> = token
        .secret
        .template
        .iter()
        .map(|(key, text)| (key.clone(), render(text, &names).into()))
        .collect();
    for (name, value) in &names[..4] {
        data.insert((*name).to_owned(), SecretString::from(*value));
    }
    let mut labels = token.secret.labels.clone();
    labels.insert(LABEL_MANAGED_BY.into(), MANAGER.into());
    labels.insert(LABEL_SERVICE_USER.into(), facts.name().into());
    let mut annotations = token.secret.annotations.clone();
    annotations.insert(ANNOTATION_RECORD.into(), record.render());
    SecretDraft {
        namespace: facts.namespace().into(),
        name: token.secret.name.clone(),
        owner: (facts.name().into(), facts.uid().into()),
        retained: token.secret.deletion_policy == Some(DeletionPolicy::Retain),
        labels,
        annotations,
        data,
        precondition: facts
            .secrets
            .get(&token.secret.name)
            .map_or(WritePrecondition::Absent, ObservedSecret::precondition),
        repair: false,
    }
}

/// The audience as templates show it: project ids in order, `zitadel` for the API, separated by commas.
fn audience(token: &Token) -> String {
    let mut ids = token.project_ids.clone();
    ids.sort();
    if token.zitadel_api == Some(true) {
        ids.push(crate::domain::scope::ZITADEL_ALIAS.into());
    }
    ids.join(",")
}

/// Literal substitution of `{{ name }}` by its value, one pass from left to right, so that nothing that was put in is
/// read again.
#[must_use]
pub fn render(text: &str, names: &[(&str, &str)]) -> String {
    let mut out = String::with_capacity(text.len() + 64);
    let mut rest = text;
    while let Some(start) = rest.find("{{") {
        let (before, tail) = rest.split_at(start);
        out.push_str(before);
        let found = tail[2..].find("}}").and_then(|end| {
            let name = tail[2..2 + end].trim();
            let (_, value) = names.iter().find(|(n, _)| *n == name)?;
            Some((value, end + 4))
        });
        if let Some((value, length)) = found {
            out.push_str(value);
            rest = &tail[length..];
        } else {
            out.push_str("{{");
            rest = &tail[2..];
        }
    }
    out + rest
}

/// Cut to whole seconds, towards earlier, as the Kubernetes API does with times.
#[must_use]
pub fn whole_seconds(time: Timestamp) -> Timestamp {
    time - SignedDuration::from_nanos(time.subsec_nanosecond().rem_euclid(1_000_000_000).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_literal_text_with_five_names() {
        let names = [("token", "{{ issuer }}"), ("issuer", "I")];
        let table = [
            ("Bearer {{ token }}", "Bearer {{ issuer }}"),
            ("{{token}}/{{  issuer  }}", "{{ issuer }}/I"),
            ("{{ unknown }} {{ issuer }}", "{{ unknown }} I"),
            ("{{ {{ issuer }} }}", "{{ I }}"),
            ("{{", "{{"),
            ("{{ issuer", "{{ issuer"),
            ("}} ü {{ issuer }}", "}} ü I"),
            ("{{{{{{", "{{{{{{"),
            ("", ""),
        ];
        for (text, expected) in table {
            assert_eq!(render(text, &names), expected, "{text}");
        }
    }

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
