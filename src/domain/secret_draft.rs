//! The desired state of a token Secret: its content, and the hash that shows whether the spec of that content changed.

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

/// The desired state of a Secret.
#[derive(Debug)]
pub struct SecretDraft {
    /// Namespace of the object and its Secret.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Name and UID of the object that controls it.
    pub owner: (String, String),
    /// Whether the Secret outlives that object. It then has no owner reference.
    pub retained: bool,
    /// All labels that the operator sets.
    pub labels: BTreeMap<String, String>,
    /// All annotations that the operator sets, including the record.
    pub annotations: BTreeMap<String, String>,
    /// All data.
    pub data: BTreeMap<String, SecretString>,
    /// What the write expects to replace.
    pub precondition: WritePrecondition,
    /// The write reverts a change of another writer: the spec has not changed.
    pub repair: bool,
}

/// Hash of the parts of the Secret besides the token that the spec decides. A key that was removed from the spec must
/// be removed from the Secret. A comparison with the observed Secret cannot detect that, because other writers may add
/// keys.
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

/// The record of a newly issued token.
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

/// Assumed size of a token that is not issued yet. Tokens of ZITADEL with many roles have about 4 KiB.
const ASSUMED_BYTES: usize = 8 * 1024;

impl SecretDraft {
    /// Whether a part of this draft is missing in `observed` or differs. Additions of other writers are ignored.
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

    /// Whether the Secret is too large to be written.
    #[must_use]
    pub fn is_too_large(&self) -> bool {
        let texts = self.labels.iter().chain(&self.annotations);
        let data = self.data.iter().map(|(k, v)| k.len() + v.expose_secret().len());
        texts.map(|(k, v)| k.len() + v.len()).chain(data).sum::<usize>() > MAX_BYTES
    }
}

/// Whether the Secret of `token` will be small enough. The operator checks this before it requests a token, because a
/// token that cannot be written is lost.
#[must_use]
pub fn fits(facts: &Facts, token: &Token) -> bool {
    // Without a template, other rules bound the size.
    token.secret.template.is_empty() || !placeholder(facts, token, "", "").is_too_large()
}

/// The future Secret of `token`, with a placeholder of `ASSUMED_BYTES` as the token.
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

/// The audience for templates: the sorted project ids, then `zitadel` for the API, separated by commas.
fn audience(token: &Token) -> String {
    let mut ids = token.project_ids.clone();
    ids.sort();
    if token.zitadel_api == Some(true) {
        ids.push(crate::api::rules::ZITADEL_ALIAS.into());
    }
    ids.join(",")
}

/// Replaces each `{{ name }}` by its value, once from left to right. Inserted values are not expanded again, and
/// unknown names stay as they are.
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
    fn templates_replace_only_known_names_once() {
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
