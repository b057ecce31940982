//! A token Secret as it is to be: what goes into it, and the hash that tells whether that changed.

use std::collections::BTreeMap;

use k8s_openapi::jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};

use crate::api::metadata::{ANNOTATION_RECORD, LABEL_MANAGED_BY, LABEL_SERVICE_USER, MANAGER};
use crate::api::service_user::{DeletionPolicy, Token};
use crate::domain::answer::Minted;
use crate::domain::facts::Facts;
use crate::domain::hash;
use crate::domain::observed_secret::{MAX_BYTES, ObservedSecret, WritePrecondition};
use crate::domain::record::{Record, VERSION};
use crate::domain::time::whole_seconds;

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

/// The size of a token that is assumed before there is one; ZITADEL's with many roles have about 4 KiB.
const ASSUMED_BYTES: usize = 8 * 1024;

impl SecretDraft {
    /// Whether something of this draft is missing in `observed` or differs there. What others added is theirs.
    #[must_use]
    pub fn differs_from(&self, observed: &ObservedSecret) -> bool {
        let missing = |(key, value): (&String, &String)| observed.labels.get(key) != Some(value);
        let unset = |(key, value): (&String, &String)| observed.annotation(key) != Some(value);
        observed.controller.is_some() == self.retained
            || self.labels.iter().any(missing)
            || self.annotations.iter().any(unset)
            || self.data.iter().any(|(key, value)| {
                observed
                    .data
                    .get(key)
                    .is_none_or(|have| have.expose_secret() != value.expose_secret().as_bytes())
            })
    }

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
}
