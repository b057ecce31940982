//! The part of a service user that stays in memory: enough to order the queue, to find the objects that a change
//! affects, and to export metrics. Its size is bounded, however large the object is. Each reconcile reads the object
//! from the API server.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::api::metadata::{KEYS_FINALIZER, ROLES_FINALIZER};
use crate::api::service_user::{KEY_ROTATED, READY, UP_TO_DATE};
use crate::domain::key_rotation;
use crate::domain::reason::Reason;

/// Maximum number of tokens, as in the schema. An outdated CRD may allow more.
pub const MAX_TOKENS: usize = 16;

/// The maximum length of a Kubernetes name. An object with a longer name cannot exist.
const MAX_NAME: usize = 253;

/// Bytes charged for an object in addition to its tokens: its entries in cache and queue.
const CHARGE_OBJECT: usize = 1024;

/// Bytes charged for each token: its entry, its backoff and its lines in `/metrics`.
const CHARGE_TOKEN: usize = 1024;

/// A service user in the cache.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct UserSummary {
    /// UID of the object.
    pub uid: Box<str>,
    /// Resource version of the object.
    pub resource_version: Box<str>,
    /// Generation of the spec.
    pub generation: Option<i64>,
    /// Whether the object is being deleted.
    pub deleting: bool,
    /// What the operator has made for the object at ZITADEL.
    pub holds: Holdings,
    /// Name of the instance. Empty if the spec is unreadable.
    pub instance: Box<str>,
    /// Name of the Secret with the key.
    pub key_secret: Box<str>,
    /// Whether the object is suspended.
    pub suspended: bool,
    /// The tokens of the spec.
    pub tokens: Vec<TokenSummary>,
    /// Whether the condition `Ready` is true, and the reason of `UpToDate`. `None` before the first reconcile. The
    /// reason is `None` if it is not a known [`Reason`].
    pub ready: Option<(bool, Option<Reason>)>,
    /// When the key expires. `None` while the operator rotates it on schedule: then nobody has to act.
    pub key_expires_at: Option<Timestamp>,
    /// Generation that the status describes.
    pub observed_generation: Option<i64>,
}

/// What the operator has made for an object, by its finalizers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Keys.
    pub keys: bool,
    /// Manager roles.
    pub roles: bool,
}

/// A token of the spec, with the status of the token of that name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenSummary {
    /// Name of the token.
    pub name: Box<str>,
    /// Name of its Secret.
    pub secret: Box<str>,
    /// `None` before the first reconcile.
    pub status: Option<TokenTimes>,
}

/// The times in the status of one token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenTimes {
    /// When it is due for a refresh.
    pub renew_at: Option<Timestamp>,
    /// When it expires.
    pub expires_at: Option<Timestamp>,
    /// Since when refreshes fail.
    pub failing_since: Option<Timestamp>,
    /// Result of the last refresh.
    pub reason: Option<Reason>,
}

impl UserSummary {
    /// Whether the object refers to this instance.
    #[must_use]
    pub fn is_of(&self, instance: &str) -> bool {
        &*self.instance == instance
    }

    /// Names of the Secrets that the object refers to.
    pub fn secrets(&self) -> impl Iterator<Item = &str> {
        let tokens = self.tokens.iter().map(|token| &*token.secret);
        tokens.chain([&*self.key_secret]).filter(|name| !name.is_empty())
    }

    /// The number of bytes that the object counts toward the memory limit. It is usually more than the object takes, so
    /// that a limit on the sum bounds the memory.
    #[must_use]
    pub fn charge(&self) -> usize {
        let names = |token: &TokenSummary| 2 * (token.name.len() + token.secret.len());
        let tokens = self.tokens.iter().map(|token| CHARGE_TOKEN + names(token));
        CHARGE_OBJECT + tokens.sum::<usize>()
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Object {
    metadata: Metadata,
    spec: Option<Box<RawValue>>,
    status: Option<Box<RawValue>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    #[serde(default)]
    uid: String,
    #[serde(default)]
    resource_version: String,
    generation: Option<i64>,
    deletion_timestamp: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    finalizers: Option<Vec<String>>,
}

/// Each field is parsed separately, so that an unreadable field does not affect the others.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    instance_ref: Option<Box<RawValue>>,
    key_secret_ref: Option<Box<RawValue>>,
    suspend: Option<Box<RawValue>>,
    tokens: Option<Box<RawValue>>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

#[derive(Deserialize)]
struct SpecToken {
    name: String,
    secret: Named,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    key_expires_at: Option<Time>,
    observed_generation: Option<i64>,
    #[serde(default)]
    conditions: Vec<Condition>,
    #[serde(default)]
    tokens: Vec<StatusToken>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct StatusToken {
    name: String,
    renew_at: Option<Time>,
    expires_at: Option<Time>,
    failing_since: Option<Time>,
    reason: Option<String>,
}

impl<'de> Deserialize<'de> for UserSummary {
    /// Reads the object as the API server sends it. Unreadable parts count as missing.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let object = Object::deserialize(deserializer)?;
        let meta = object.metadata;
        let status: Status = read(object.status.as_deref()).unwrap_or_default();
        let condition = |kind| status.conditions.iter().find(|condition| condition.type_ == kind);
        let reason = condition(UP_TO_DATE).and_then(|condition| Reason::named(&condition.reason));
        let has_finalizer = |name: &str| meta.finalizers.iter().flatten().any(|other| other == name);
        let mut summary = Self {
            holds: Holdings {
                keys: has_finalizer(KEYS_FINALIZER),
                roles: has_finalizer(ROLES_FINALIZER),
            },
            uid: meta.uid.into(),
            resource_version: meta.resource_version.into(),
            generation: meta.generation,
            deleting: meta.deletion_timestamp.is_some(),
            ready: condition(READY).map(|ready| (ready.status == "True", reason)),
            key_expires_at: status.key_expires_at.as_ref().map(|time| time.0).filter(|_| {
                !condition(KEY_ROTATED)
                    .is_some_and(|rotated| Reason::named(&rotated.reason).is_some_and(key_rotation::replaces_in_time))
            }),
            observed_generation: status.observed_generation,
            ..Self::default()
        };
        if let Some(spec) = read::<Spec>(object.spec.as_deref()) {
            let name =
                |reference: Option<&RawValue>| read::<Named>(reference).map_or_else(String::new, |named| named.name);
            summary.instance = bounded(name(spec.instance_ref.as_deref()));
            summary.key_secret = bounded(name(spec.key_secret_ref.as_deref()));
            summary.suspended = read(spec.suspend.as_deref()) == Some(true);
            let tokens: Vec<SpecToken> = read(spec.tokens.as_deref()).unwrap_or_default();
            let tokens = tokens.into_iter().take(MAX_TOKENS).map(|token| TokenSummary {
                status: status.tokens.iter().find(|item| item.name == token.name).map(times),
                name: bounded(token.name),
                secret: bounded(token.secret.name),
            });
            summary.tokens = tokens.collect();
        }
        Ok(summary)
    }
}

fn read<T: DeserializeOwned>(raw: Option<&RawValue>) -> Option<T> {
    serde_json::from_str(raw?.get()).ok()
}

fn bounded(name: String) -> Box<str> {
    if name.len() > MAX_NAME { "".into() } else { name.into() }
}

fn times(token: &StatusToken) -> TokenTimes {
    let at = |time: &Option<Time>| time.as_ref().map(|time| time.0);
    TokenTimes {
        renew_at: at(&token.renew_at),
        expires_at: at(&token.expires_at),
        failing_since: at(&token.failing_since),
        reason: token.reason.as_deref().and_then(Reason::named),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn memory_is_bounded_whatever_the_object_holds() {
        let long = "x".repeat(10_000);
        let token = |i: usize| {
            json!({"name": format!("t{i}"), "projectIDs": vec![&long; 100], "secret": {
                "name": if i == 3 { long.clone() } else { format!("s{i}") },
                "labels": {&long: &long}, "annotations": {&long: &long}, "template": {&long: &long}}})
        };
        let object = json!({
            "metadata": {"name": "n", "uid": "u", "resourceVersion": "7", "generation": 2,
                "annotations": {&long: &long}, "labels": {&long: &long}, "managedFields": [{"manager": &long}]},
            "spec": {"instanceRef": {"name": "main"}, "keySecretRef": {"name": "key"}, "suspend": true,
                "tokens": (0..100).map(token).collect::<Vec<_>>()},
            "status": {"conditions": [{"type": "Ready", "status": "True", "reason": &long, "message": &long,
                "lastTransitionTime": "2026-11-25T00:00:00Z"}],
                "tokens": [{"name": "t1", "secretName": &long, "expiresAt": "2026-11-25T00:00:00Z", "reason": "Issued"}]},
        });
        let summary: UserSummary = serde_json::from_str(&object.to_string()).expect("a summary");
        assert_eq!(
            (&*summary.uid, &*summary.resource_version, summary.generation),
            ("u", "7", Some(2))
        );
        assert_eq!(
            (&*summary.instance, &*summary.key_secret, summary.suspended),
            ("main", "key", true)
        );
        assert_eq!(summary.ready, Some((true, None)));
        assert_eq!(summary.tokens.len(), MAX_TOKENS);
        assert_eq!(&*summary.tokens[3].secret, "");
        let times = summary.tokens[1].status.expect("a status");
        assert_eq!(times.reason, Some(Reason::Issued));
        assert!(times.expires_at.is_some() && summary.tokens[0].status.is_none());
        assert!(format!("{summary:?}").len() < summary.charge());
    }

    #[test]
    fn unreadable_part_counts_as_missing_and_affects_no_other() {
        let status = json!({"keyExpiresAt": "2026-11-25T00:00:00Z"});
        let spec = json!({"instanceRef": {"name": "main"}, "tokens": []});
        let deep = "[".repeat(10_000) + &"]".repeat(10_000);
        for (spec, status, has_spec, has_status) in [
            (spec.to_string(), status.to_string(), true, true),
            (
                json!({"instanceRef": {"name": "main"}, "tokens": [7]}).to_string(),
                status.to_string(),
                true,
                true,
            ),
            ("7".to_owned(), status.to_string(), false, true),
            (spec.to_string(), r#"{"tokens":[[]]}"#.to_owned(), true, false),
            (deep.clone(), deep, false, false),
        ] {
            let object = format!(r#"{{"metadata":{{"name":"n","uid":"u"}},"spec":{spec},"status":{status}}}"#);
            let summary: UserSummary = serde_json::from_str(&object).expect("a summary");
            assert_eq!(&*summary.uid, "u");
            assert_eq!(summary.is_of("main"), has_spec);
            assert_eq!(summary.key_expires_at.is_some(), has_status);
        }
    }
}
