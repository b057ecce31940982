//! The rules of the schema once more. A cluster may still have the CRDs of an older version, or objects that were
//! stored under them, and some rules guard a secret or an access (docs/adr/0008-access-policies-are-objects.md): what the API server should have refused
//! is refused here. `tests/it/schema.rs` checks that both refuse the same.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::jiff::SignedDuration;

use crate::api::instance::{Connection, ZitadelInstanceSpec};
use crate::api::metadata::is_operators_own;
use crate::api::service_user::{MAX_TEXT, Token, TokenSecret, ZitadelServiceUserSpec};
use crate::domain::allow_list::AllowList;
use crate::domain::schedule::duration;
use crate::domain::scope::ZITADEL_ALIAS;

/// A rule that is broken, and where. Its text is ours. Of what a user wrote it holds positions, and the key of a label or
/// annotation if that is well-formed, so that its length and characters are bounded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    field: String,
    rule: Cow<'static, str>,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}.", self.field, self.rule)
    }
}

type Checked = Result<(), Violation>;

fn must(kept: bool, field: impl FnOnce() -> String, rule: &'static str) -> Checked {
    if kept {
        return Ok(());
    }
    Err(Violation {
        field: field(),
        rule: rule.into(),
    })
}

const SHORT_NAME: &str = "at most 63 characters, because it becomes a label value";
const NAME: &str =
    "a Kubernetes name is wanted: at most 253 (an instance's 63) of a-z 0-9 - and dots between its parts";
const DATA_KEY: &str = "1 to 253 of A-Z a-z 0-9 - _ . are allowed";
const ID: &str = "1 to 64 of A-Z a-z 0-9 - _ are allowed";
const ALIAS: &str = "`zitadel` is the ZITADEL API itself; use zitadelAPI: true for it";
const INSECURE: &str = "http:// needs spec.connection.allowInsecureHTTP: true; better, use https://";
const FAR: &str = "http:// is allowed only for loopback addresses and *.svc hosts; use https://";

/// Whether a service user of this name and spec is such as the schema and the platform team let through.
pub fn service_user(name: &str, spec: &ZitadelServiceUserSpec, allowed: &AllowList) -> Checked {
    (0..spec.tokens.len()).try_for_each(|index| token(name, spec, index, allowed))?;
    head(name, spec)
}

/// The same for what decides about one token, so that a mistake in one stops no other: the token, and what it shares
/// with all.
pub fn token(name: &str, spec: &ZitadelServiceUserSpec, index: usize, allowed: &AllowList) -> Checked {
    head(name, spec)?;
    let Some(token) = spec.tokens.get(index) else {
        return Ok(());
    };
    let at = |field: &str| format!("spec.tokens[{index}]{field}");
    let others = || {
        spec.tokens
            .iter()
            .enumerate()
            .filter(|(i, _)| *i != index)
            .map(|(_, t)| t)
    };
    must(
        is_label(&token.name, 63),
        || at(".name"),
        "1 to 63 of a-z 0-9 - are allowed, - not at an end",
    )?;
    must(
        others().all(|other| other.name != token.name),
        || at(".name"),
        "two tokens have this name; give each its own",
    )?;
    audiences(token, at)?;
    renewal(token, at)?;
    let name = || at(".secret.name");
    must(is_name(&token.secret.name, 253), name, NAME)?;
    must(
        token.secret.name != spec.key_secret_ref.name,
        name,
        "must differ from spec.keySecretRef.name; the key would be overwritten",
    )?;
    must(
        others().all(|other| other.secret.name != token.secret.name),
        name,
        "two tokens name the same Secret; give each its own",
    )?;
    secret(&token.secret, allowed, |field| at(&format!(".secret{field}")))
}

/// One of the maps of a token's Secret.
type MapOf = fn(&TokenSecret) -> &BTreeMap<String, String>;

fn head(name: &str, spec: &ZitadelServiceUserSpec) -> Checked {
    let field = |field: &str| field.to_owned();
    must(name.len() <= 63, || field("metadata.name"), SHORT_NAME)?;
    must(
        is_name(&spec.instance_ref.name, 63),
        || field("spec.instanceRef.name"),
        NAME,
    )?;
    let key = &spec.key_secret_ref;
    must(is_name(&key.name, 253), || field("spec.keySecretRef.name"), NAME)?;
    let entry = key.key.as_ref();
    must(
        entry.is_none_or(|e| is_data_key(e)),
        || field("spec.keySecretRef.key"),
        DATA_KEY,
    )?;
    must(
        (1..=16).contains(&spec.tokens.len()),
        || field("spec.tokens"),
        "1 to 16 tokens are allowed",
    )?;
    let maps: [(&str, MapOf); 3] = [
        ("template", |secret| &secret.template),
        ("annotations", |secret| &secret.annotations),
        ("labels", |secret| &secret.labels),
    ];
    maps.into_iter().try_for_each(|(name, map)| {
        let entries = spec.tokens.iter().flat_map(|token| map(&token.secret));
        let bytes: usize = entries.map(|(key, value)| key.len() + value.len()).sum();
        let field = || format!("spec.tokens[].secret.{name}");
        must(
            bytes <= MAX_TEXT,
            field,
            "all tokens together have at most 64 KiB; shorten or remove entries",
        )
    })
}

fn audiences(token: &Token, at: impl Fn(&str) -> String) -> Checked {
    let ids = || at(".projectIDs");
    must(token.project_ids.len() <= 32, ids, "at most 32 are allowed")?;
    must(token.project_ids.iter().all(|id| is_id(id)), ids, ID)?;
    must(token.project_ids.iter().all(|id| id != ZITADEL_ALIAS), ids, ALIAS)?;
    let different: BTreeSet<&String> = token.project_ids.iter().collect();
    must(different.len() == token.project_ids.len(), ids, "an id is named twice")?;
    must(
        !token.project_ids.is_empty() || token.zitadel_api == Some(true),
        || at(""),
        "name at least one audience, in projectIDs or with zitadelAPI: true",
    )?;
    let organization = token.organization_id.as_ref();
    must(organization.is_none_or(|id| is_id(id)), || at(".organizationID"), ID)?;
    let scopes = || at(".scopes");
    let further = token.scopes.as_deref().unwrap_or_default();
    must(further.len() <= 16, scopes, "at most 16 are allowed")?;
    must(
        further.iter().all(|scope| is_further_scope(scope)),
        scopes,
        "one is none of the allowed scopes; audiences go to projectIDs and zitadelAPI",
    )
}

fn renewal(token: &Token, at: impl Fn(&str) -> String) -> Checked {
    must(
        token.renew_before.is_none() || token.renew_before_percentage.is_none(),
        || at(""),
        "set renewBefore or renewBeforePercentage, not both",
    )?;
    let before = token.renew_before.as_ref();
    must(
        before.is_none_or(|text| is_duration(text, SignedDuration::from_nanos(1), SignedDuration::from_hours(744))),
        || at(".renewBefore"),
        "a duration such as 30m is wanted, more than 0s and at most 744h",
    )?;
    let percentage = token.renew_before_percentage;
    must(
        percentage.is_none_or(|p| (1..=99).contains(&p)),
        || at(".renewBeforePercentage"),
        "1 to 99 is allowed",
    )
}

fn secret(secret: &TokenSecret, allowed: &AllowList, at: impl Fn(&str) -> String) -> Checked {
    for (map, field) in [(&secret.labels, ".labels"), (&secret.annotations, ".annotations")] {
        let field = || at(field);
        must(map.len() <= 32, field, "at most 32 are allowed")?;
        must(
            map.keys().all(|key| is_qualified(key)),
            field,
            "a key is a name of at most 63 characters, or one with a lower-case DNS name and / before it",
        )?;
        must(
            !map.keys().any(|key| is_operators_own(key)),
            field,
            "keys of zitadel-tokens.dev and app.kubernetes.io/managed-by are the operator's own; remove them",
        )?;
        if let Some(key) = map.keys().find(|key| !allowed.allows(key)) {
            let rule = format!(
                "`{key}` is not among the keys that the platform team allows; remove it, or ask the platform team to add it to allowedSecretMetadata"
            );
            return Err(Violation {
                field: field(),
                rule: rule.into(),
            });
        }
    }
    must(
        secret.labels.values().all(|value| is_label_value(value)),
        || at(".labels"),
        "a value has at most 63 of A-Z a-z 0-9 - _ . and begins and ends with a letter or digit",
    )?;
    must(
        secret.annotations.values().all(|value| is_at_most(value, 1024)),
        || at(".annotations"),
        "a value has at most 1024 characters",
    )?;
    let template = || at(".template");
    must(secret.template.len() <= 32, template, "at most 32 are allowed")?;
    must(
        secret.template.keys().all(|key| is_template_key(key)),
        template,
        "a data key has 1 to 253 of A-Z a-z 0-9 - _ . and no dots alone or two at its start, and is none of token, token_type, expires_at, issuer",
    )?;
    must(
        secret.template.values().all(|text| is_at_most(text, 16 * 1024)),
        template,
        "a text has at most 16384 characters",
    )?;
    must(
        secret.template.values().all(|text| text.matches("{{").count() <= 16),
        template,
        "a text has at most 16 placeholders, counted by {{",
    )
}

/// Whether an instance of this name and spec is such as the schema lets through. That the issuer stays the same is
/// the schema's alone: a token's inputs hold the issuer, so that another one only costs new tokens.
pub fn instance(name: &str, spec: &ZitadelInstanceSpec) -> Checked {
    let field = |field: &str| field.to_owned();
    must(name.len() <= 63, || field("metadata.name"), SHORT_NAME)?;
    let insecure = spec.connection.as_ref().and_then(|c| c.allow_insecure_http) == Some(true);
    origin(&spec.issuer, insecure, "spec.issuer")?;
    let own_port = spec.issuer.starts_with("https://") && spec.issuer.ends_with(":443")
        || spec.issuer.starts_with("http://") && spec.issuer.ends_with(":80");
    must(
        !own_port,
        || field("spec.issuer"),
        "leave out the scheme's own port (:443, :80), as ZITADEL does",
    )?;
    if let Some(settings) = &spec.connection {
        connection(settings, insecure)?;
    }
    let id = spec.zitadel_project_id.as_ref();
    must(id.is_none_or(|id| is_id(id)), || field("spec.zitadelProjectID"), ID)
}

fn origin(text: &str, insecure: bool, field: &str) -> Checked {
    let field = || field.to_owned();
    let authority = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    must(
        text.len() <= 253 && authority.is_some_and(is_authority),
        field,
        "https:// (or http://), a lower-case host and maybe a port up to 65535 are wanted, and nothing else",
    )?;
    if let Some(authority) = text.strip_prefix("http://") {
        must(insecure, field, INSECURE)?;
        must(is_near(authority), field, FAR)?;
    }
    Ok(())
}

fn connection(connection: &Connection, insecure: bool) -> Checked {
    let at = |field: &str| format!("spec.connection.{field}");
    if let Some(endpoint) = &connection.endpoint {
        origin(endpoint, insecure, "spec.connection.endpoint")?;
    }
    let proxy = connection.proxy.as_deref();
    let authority = |text: &str| {
        text.strip_prefix("https://")
            .or_else(|| text.strip_prefix("http://"))
            .is_some_and(is_authority)
    };
    must(
        proxy.is_none_or(authority),
        || at("proxy"),
        "http:// or https://, a host and maybe a port are wanted",
    )?;
    let server_name = connection.tls_server_name.as_deref();
    must(
        server_name.is_none_or(|n| is_name(n, 253)),
        || at("tlsServerName"),
        NAME,
    )?;
    must(
        proxy.is_none() || server_name.is_none(),
        || at("tlsServerName"),
        "does not go with a proxy, which dials by the name in the URL",
    )?;
    for (field, entry) in [
        ("caConfigMapRef", &connection.ca_config_map_ref),
        ("caSecretRef", &connection.ca_secret_ref),
    ] {
        let Some(entry) = entry else { continue };
        must(is_name(&entry.name, 253), || at(&format!("{field}.name")), NAME)?;
        let key = entry.key.as_deref();
        must(key.is_none_or(is_data_key), || at(&format!("{field}.key")), DATA_KEY)?;
    }
    let authorities = [
        connection.ca_bundle.is_some(),
        connection.ca_config_map_ref.is_some(),
        connection.ca_secret_ref.is_some(),
    ];
    must(
        authorities.into_iter().filter(|set| *set).count() <= 1,
        || at("caBundle"),
        "set at most one of caBundle, caConfigMapRef and caSecretRef",
    )?;
    let timeout = connection.timeout.as_ref();
    must(
        timeout.is_none_or(|text| is_duration(text, SignedDuration::from_secs(1), SignedDuration::from_mins(1))),
        || at("timeout"),
        "a duration from 1s to 60s is wanted, such as 10s",
    )?;
    for (field, value, most, rule) in [
        (
            "requestsPerSecond",
            connection.requests_per_second,
            1_000,
            "1 to 1000 is allowed",
        ),
        ("burst", connection.burst, 10_000, "1 to 10000 is allowed"),
        (
            "maxConcurrentRequests",
            connection.max_concurrent_requests,
            64,
            "1 to 64 is allowed",
        ),
    ] {
        must(value.is_none_or(|v| (1..=most).contains(&v)), || at(field), rule)?;
    }
    Ok(())
}

/// Whether plain http to this `host[:port]` stays on the machine or in the cluster.
#[must_use]
pub fn is_near(authority: &str) -> bool {
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    host == "localhost"
        || host.parse::<std::net::Ipv4Addr>().is_ok_and(|ip| ip.is_loopback())
        || [".svc", ".svc.cluster.local"]
            .iter()
            .any(|suffix| host.ends_with(suffix))
}

fn is_authority(text: &str) -> bool {
    let (host, port) = text
        .split_once(':')
        .map_or((text, None), |(host, port)| (host, Some(port)));
    let is_port =
        |port: &str| port.bytes().all(|b| b.is_ascii_digit()) && !port.starts_with('0') && port.parse::<u16>().is_ok();
    is_name(host, 253) && port.is_none_or(is_port)
}

/// The schema counts characters, not bytes.
fn is_at_most(text: &str, most: usize) -> bool {
    text.len() <= most || text.chars().count() <= most
}

fn is_made_of(text: &str, more: &[u8], most: usize) -> bool {
    (1..=most).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || more.contains(&b))
}

fn is_id(text: &str) -> bool {
    is_made_of(text, b"_-", 64)
}

fn is_data_key(text: &str) -> bool {
    is_made_of(text, b"-._", 253)
}

fn is_template_key(text: &str) -> bool {
    is_data_key(text)
        && text != "."
        && !text.starts_with("..")
        && !["token", "token_type", "expires_at", "issuer"].contains(&text)
}

/// Begins and ends with a letter or digit.
fn has_plain_ends(text: &str) -> bool {
    let plain = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
    plain(text.bytes().next()) && plain(text.bytes().last())
}

/// A DNS label.
fn is_label(text: &str, most: usize) -> bool {
    is_made_of(text, b"-", most) && has_plain_ends(text) && !text.bytes().any(|b| b.is_ascii_uppercase())
}

/// A DNS name: labels with dots between.
fn is_name(text: &str, most: usize) -> bool {
    text.len() <= most && text.split('.').all(|label| is_label(label, most))
}

fn is_label_value(text: &str) -> bool {
    text.is_empty() || is_made_of(text, b"-_.", 63) && has_plain_ends(text)
}

/// A label's or annotation's key. Kubernetes also accepts annotation prefixes in capitals, which would bypass the rules on
/// prefixes.
pub(super) fn is_qualified(key: &str) -> bool {
    let (prefix, name) = key.split_once('/').map_or((None, key), |(p, n)| (Some(p), n));
    !name.is_empty() && is_label_value(name) && prefix.is_none_or(|p| is_name(p, 253))
}

fn is_duration(text: &str, least: SignedDuration, most: SignedDuration) -> bool {
    text.len() <= 32 && duration(text).is_some_and(|d| d >= least && d <= most)
}

/// Further scopes: complete ones, and prefixes with the characters that may follow besides letters and digits.
/// Access is enforced by the operator, and an audience among the scopes would pass it by.
fn is_further_scope(scope: &str) -> bool {
    const WHOLE: [&str; 7] = [
        "openid",
        "profile",
        "email",
        "phone",
        "address",
        "urn:zitadel:iam:user:metadata",
        "urn:zitadel:iam:user:resourceowner",
    ];
    const BEGINNINGS: [(&str, &[u8]); 3] = [
        ("urn:zitadel:iam:org:project:role:", b"_.:-"),
        ("urn:zitadel:iam:org:roles:id:", b"_-"),
        ("urn:zitadel:iam:org:domain:primary:", b".-"),
    ];
    let begins = |(beginning, more): &(&str, &[u8])| {
        scope
            .strip_prefix(beginning)
            .is_some_and(|rest| is_made_of(rest, more, 256 - beginning.len()))
    };
    WHOLE.contains(&scope) || BEGINNINGS.iter().any(begins)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::fixtures::{facts, user};

    #[test]
    fn plain_http_goes_nowhere_far() {
        for (authority, near) in [
            ("127.0.0.1:8080", true),
            ("localhost", true),
            ("zitadel.zitadel.svc:8080", true),
            ("zitadel.zitadel.svc.cluster.local", true),
            ("auth.example.com", false),
            ("127.0.0.1.example.com", false),
            ("evil.svc.example.com", false),
            ("localhost.example.com:80", false),
            ("10.0.0.1", false),
        ] {
            assert_eq!(is_near(authority), near, "{authority}");
        }
    }

    #[test]
    fn a_label_or_annotation_must_be_allowed() {
        let allowed = AllowList::with(&["team", "example.com/*"]).expect("well-formed");
        for (key, said) in [
            ("app.kubernetes.io/part-of", ""),
            ("reloader.stakater.com/match", ""),
            ("team", ""),
            ("example.com/note", ""),
            ("owner", "`owner` is not among"),
            (
                "kubernetes.io/service-account.name",
                "`kubernetes.io/service-account.name` is not among",
            ),
            (
                "app.kubernetes.io/instance",
                "`app.kubernetes.io/instance` is not among",
            ),
            ("istio/multiCluster", "`istio/multiCluster` is not among"),
            ("a.example.com/note", "`a.example.com/note` is not among"),
            ("zitadel-tokens.dev/record", "the operator's own"),
            ("x.zitadel-tokens.dev/record", "the operator's own"),
            ("app.kubernetes.io/managed-by", "the operator's own"),
            ("Example.com/note", "a key is a name of at most 63 characters"),
            ("example.com/`\n", "a key is a name of at most 63 characters"),
        ] {
            let mut facts = facts(&["a", "b"]);
            let user = user(&mut facts);
            for (map, field) in [("labels", ".labels: "), ("annotations", ".annotations: ")] {
                let secret = &mut user.spec.tokens[1].secret;
                (secret.labels, secret.annotations) = (BTreeMap::new(), BTreeMap::new());
                let entries = if map == "labels" {
                    &mut secret.labels
                } else {
                    &mut secret.annotations
                };
                entries.insert(key.into(), "v".into());
                let told = token("billing", &user.spec, 1, &allowed).err().map(|v| v.to_string());
                let told = told.unwrap_or_default();
                assert_eq!(told.is_empty(), said.is_empty(), "{key}: {told}");
                assert!(told.contains(said), "{key}: {told}");
                assert!(
                    told.is_empty() || told.starts_with(&format!("spec.tokens[1].secret{field}")),
                    "{told}"
                );
                assert!(!told.contains('\n'), "{told}");
            }
        }
    }
}
