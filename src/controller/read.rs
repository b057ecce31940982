//! Reads from the API server, bounded in time and memory. An object that a tenant writes may have more than a megabyte:
//! few are in memory as a whole at once, and of each only the parts that decide are decoded.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::GetParams;
use kube::core::{Request, Status};
use kube::{Client, Resource};
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use tokio::sync::Semaphore;

use crate::api::ZitadelServiceUser;
use crate::api::metadata::{GROUP, is_ours};
use crate::api::service_user::KeySecretRef;
use crate::controller::guarded::Guarded;
use crate::domain::key::{self, ServiceKey};
use crate::domain::object_ref::ObjectRef;
use crate::domain::observed_secret::{Controller, MAX_BYTES, ObservedSecret, Wanted};
use crate::domain::reason::Reason;
use crate::domain::summary::MAX_TOKENS;

/// Longest time of one read.
const READ_TIMEOUT: Duration = Duration::from_secs(15);

/// So many objects are in memory as a whole at once. Each has up to a few megabytes while it is decoded.
const AT_ONCE: usize = 4;

/// Bytes of a spec, as JSON. One that keeps every rule of the schema has less.
const MAX_SPEC: usize = 256 * 1024;

/// Bytes of the certificates in a Secret, as the schema allows for `caBundle`.
const MAX_CERTIFICATES: usize = 128 * 1024;

/// Reads.
pub struct Reader {
    client: Client,
    at_once: Semaphore,
}

/// A read that failed; the text of kube's error may quote an object and is dropped.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub enum ReadError {
    /// The operator has no right to read Secrets in the namespace.
    #[error("the operator may not read this kind in this namespace")]
    Forbidden,
    /// Any other failure, which will pass.
    #[error("an object could not be read")]
    Unavailable,
}

/// A service user as it was read.
pub enum ReadUser {
    /// It fits its type.
    Readable(Arc<ZitadelServiceUser>),
    /// It does not, or is too large.
    Unreadable {
        /// Its UID.
        uid: String,
        /// Its generation.
        generation: Option<i64>,
    },
}

impl Reader {
    /// Reads by this client.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self {
            client,
            at_once: Semaphore::new(AT_ONCE),
        }
    }

    /// A service user, as it is now. None if it does not exist.
    pub async fn user(&self, id: &ObjectRef) -> Result<Option<ReadUser>, ReadError> {
        self.get::<ZitadelServiceUser, _>(&id.namespace, &id.name, read_user)
            .await?
            .map_or(Ok(None), |user| user.map(Some).ok_or(ReadError::Unavailable))
    }

    /// A token Secret: of it, what is `wanted`. None if it does not exist.
    pub async fn token_secret(
        &self,
        namespace: &str,
        name: &str,
        wanted: &Wanted<'_>,
    ) -> Result<Option<ObservedSecret>, ReadError> {
        self.get::<Secret, _>(namespace, name, |text| observed(text, wanted))
            .await?
            .map_or(Ok(None), |secret| secret.map(Some).ok_or(ReadError::Unavailable))
    }

    /// The key in a Secret.
    pub async fn key(
        &self,
        namespace: &str,
        reference: &KeySecretRef,
    ) -> Result<Result<ServiceKey, Reason>, ReadError> {
        let entry = reference.key.as_deref();
        let read = self.get::<Secret, _>(namespace, &reference.name, |text| service_key(text, entry));
        match read.await? {
            Some(key) => key.ok_or(ReadError::Unavailable),
            None => Ok(Err(Reason::KeySecretMissing)),
        }
    }

    /// Certificates in an entry of a Secret. None if there is no such entry, or if it is too large.
    pub async fn certificates(
        &self,
        namespace: &str,
        name: &str,
        entry: &str,
    ) -> Result<Option<SecretSlice<u8>>, ReadError> {
        let read = self.get::<Secret, _>(namespace, name, |text| {
            let secret: SecretText<'_> = serde_json::from_str(text).ok()?;
            let (_, value) = pick(secret.data, 1, |key| key == entry).pop()?;
            decoded(value, MAX_CERTIFICATES)
        });
        Ok(read.await?.flatten())
    }

    async fn get<K, T>(&self, namespace: &str, name: &str, read: impl FnOnce(&str) -> T) -> Result<Option<T>, ReadError>
    where
        K: Resource<DynamicType = ()>,
    {
        let request = Request::new(K::url_path(&(), Some(namespace))).get(name, &GetParams::default());
        let request = request.map_err(|_| ReadError::Unavailable)?;
        // Closed never; who waits for a place does not use up its time.
        let _place = self.at_once.acquire().await;
        let whole = async {
            let text = self.client.request_text(request).await.map(SecretString::from)?;
            Ok(read(text.expose_secret()))
        };
        let whole = tokio::time::timeout(READ_TIMEOUT, whole).await;
        match whole.map_err(|_| ReadError::Unavailable)? {
            Ok(read) => Ok(Some(read)),
            Err(kube::Error::Api(status)) if is_absent(&status, name) => Ok(None),
            Err(kube::Error::Api(status)) if status.is_forbidden() => Err(ReadError::Forbidden),
            Err(_) => Err(ReadError::Unavailable),
        }
    }
}

/// Whether the API server says of this very object that it does not exist. A 404 of something in between, or for a kind
/// that is not served at the moment, says nothing about the object.
#[must_use]
pub fn is_absent(status: &Status, name: &str) -> bool {
    status.code == 404 && status.details.as_ref().is_some_and(|details| details.name == name)
}

fn read_user(text: &str) -> Option<ReadUser> {
    #[derive(Deserialize)]
    struct Spec<'a> {
        #[serde(borrow)]
        spec: Option<&'a RawValue>,
    }
    let guarded: Guarded<ZitadelServiceUser> = serde_json::from_str(text).ok()?;
    let spec: Spec<'_> = serde_json::from_str(text).ok()?;
    let fits = spec.spec.is_some_and(|spec| spec.get().len() <= MAX_SPEC);
    let meta = guarded.meta();
    let (uid, generation) = (meta.uid.clone().unwrap_or_default(), meta.generation);
    Some(match guarded.0 {
        Ok(mut user) if fits && user.spec.tokens.len() <= MAX_TOKENS => {
            user.metadata = needed(user.metadata);
            ReadUser::Readable(Arc::new(user))
        }
        _ => ReadUser::Unreadable { uid, generation },
    })
}

/// Of an object's metadata what decides. Labels, owners and other tools' annotations may be most of an object, and a
/// status is written without touching them.
fn needed(metadata: ObjectMeta) -> ObjectMeta {
    let annotations = metadata.annotations.map(|mut annotations| {
        annotations.retain(|key, _| is_ours(key));
        annotations
    });
    ObjectMeta {
        name: metadata.name,
        namespace: metadata.namespace,
        uid: metadata.uid,
        resource_version: metadata.resource_version,
        generation: metadata.generation,
        deletion_timestamp: metadata.deletion_timestamp,
        annotations,
        ..ObjectMeta::default()
    }
}

/// A Secret as text. Its values are not looked into before it is known which are needed.
#[derive(Deserialize)]
struct SecretText<'a> {
    #[serde(borrow)]
    metadata: MetadataText<'a>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    #[serde(borrow, rename = "type")]
    kind: Option<&'a RawValue>,
    #[serde(borrow)]
    immutable: Option<&'a RawValue>,
}

/// Without managed fields, in which a writer may set any depth and times that do not decode.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct MetadataText<'a> {
    uid: Option<String>,
    resource_version: Option<String>,
    owner_references: Option<Vec<OwnerReference>>,
    #[serde(borrow)]
    labels: Option<&'a RawValue>,
    #[serde(borrow)]
    annotations: Option<&'a RawValue>,
}

/// A token Secret from its JSON: of it, what is `wanted`. A value that is larger than one of ours is left out: so it
/// differs from what is to be there.
#[must_use]
pub fn observed(text: &str, wanted: &Wanted<'_>) -> Option<ObservedSecret> {
    let secret: SecretText<'_> = serde_json::from_str(text).ok()?;
    let meta = secret.metadata;
    let labels = pick(meta.labels, usize::MAX, |key| wanted.label(key).is_some());
    let labels = labels.into_iter().filter_map(|(key, raw)| {
        let value: String = parsed(raw)?;
        (value.len() <= wanted.label(&key)?).then_some((key, value))
    });
    let annotations = pick(meta.annotations, usize::MAX, |key| wanted.annotation(key).is_some());
    let annotations = annotations.into_iter().filter_map(|(key, raw)| {
        let value: SecretString = parsed(raw)?;
        (value.expose_secret().len() <= wanted.annotation(&key)?).then_some((key, value))
    });
    let mut room = MAX_BYTES;
    let data = pick(secret.data, usize::MAX, |key| wanted.data(key).is_some());
    let data = data.into_iter().filter_map(|(key, raw)| {
        let value = decoded(raw, wanted.data(&key)?.min(room))?;
        room -= value.expose_secret().len();
        Some((key, value))
    });
    let owners = meta.owner_references.unwrap_or_default();
    let controller = owners.into_iter().find(|owner| owner.controller == Some(true));
    Some(ObservedSecret {
        controller: controller.map(|owner| Controller {
            kind: if owner.api_version.starts_with(GROUP) {
                owner.kind
            } else {
                String::new()
            },
            name: owner.name,
            uid: owner.uid,
        }),
        uid: meta.uid.unwrap_or_default(),
        resource_version: meta.resource_version.unwrap_or_default(),
        labels: labels.collect(),
        annotations: annotations.collect(),
        data: Arc::new(data.collect()),
        opaque: secret.kind.is_some_and(|kind| kind.get() == r#""Opaque""#),
        // Whatever else stands there is not ours to write over.
        immutable: secret.immutable.is_some_and(|immutable| immutable.get() != "false"),
    })
}

/// The key in a Secret from its JSON: from the entry that is named, or from the only one. None if it is no Secret.
#[must_use]
pub fn service_key(text: &str, entry: Option<&str>) -> Option<Result<ServiceKey, Reason>> {
    let secret: SecretText<'_> = serde_json::from_str(text).ok()?;
    let labels = pick(secret.metadata.labels, usize::MAX, key::is_label_of_ours);
    let labels = labels.into_iter().filter_map(|(key, raw)| Some((key, parsed(raw)?)));
    let labels: BTreeMap<String, String> = labels.collect();
    // Two show that the only one is not meant.
    let entries = pick(secret.data, 2, |name| entry.is_none_or(|entry| entry == name));
    let too_large = |raw: &RawValue| decoded(raw, key::MAX_BYTES).is_none();
    if let [(_, raw)] = entries[..]
        && too_large(raw)
    {
        return Some(Err(Reason::KeyTooLarge));
    }
    let data = entries
        .into_iter()
        .map(|(key, raw)| (key, decoded(raw, key::MAX_BYTES).unwrap_or_default()));
    Some(key::from_secret(Some(&labels), &data.collect(), entry))
}

/// The decoded value of an entry; empty if it is no base64, none if it is longer.
fn decoded(raw: &RawValue, longest: usize) -> Option<SecretSlice<u8>> {
    // Three bytes are four characters, and there are two quotes.
    if raw.get().len() > longest.div_ceil(3) * 4 + 2 {
        return None;
    }
    let value: SecretString = parsed(raw).unwrap_or_default();
    let value = SecretSlice::from(STANDARD.decode(value.expose_secret()).unwrap_or_default());
    (value.expose_secret().len() <= longest).then_some(value)
}

fn parsed<T: DeserializeOwned>(raw: &RawValue) -> Option<T> {
    serde_json::from_str(raw.get()).ok()
}

/// The entries of a JSON object that are `wanted`, at most so many, not looked into. The others take no memory: a Secret
/// has room for a hundred thousand.
fn pick(object: Option<&RawValue>, most: usize, wanted: impl Fn(&str) -> bool) -> Vec<(String, &RawValue)> {
    struct Pick<F> {
        most: usize,
        wanted: F,
    }
    impl<'de, F: Fn(&str) -> bool> Visitor<'de> for Pick<F> {
        type Value = Vec<(String, &'de RawValue)>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut picked = Vec::new();
            while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                if picked.len() < self.most && (self.wanted)(&key) {
                    picked.push((key.into_owned(), map.next_value()?));
                } else {
                    map.next_value::<IgnoredAny>()?;
                }
            }
            Ok(picked)
        }
    }
    let Some(object) = object else { return Vec::new() };
    let mut object = serde_json::Deserializer::from_str(object.get());
    object.deserialize_map(Pick { most, wanted }).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::api::metadata::ANNOTATION_RECORD;
    use crate::domain::fixtures;

    /// As the API server sends it after `kubectl apply`, and with more than a megabyte of what is not ours.
    fn secret(change: impl FnOnce(&mut Value)) -> String {
        let many: serde_json::Map<String, Value> = (0..20_000).map(|i| (format!("e{i}"), json!("canary"))).collect();
        let mut secret = json!({
            "metadata": {"name": "s", "uid": "u", "resourceVersion": "7",
                "labels": {"team": "a", "other": "canary"},
                "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "a copy of canary", "note": "b",
                    ANNOTATION_RECORD: "{}"},
                "managedFields": [{"manager": "canary", "time": "9999-12-31T23:59:59Z"}]},
            "data": many, "type": "Opaque"
        });
        secret["data"]["token"] = json!(STANDARD.encode("the token"));
        secret["data"]["header"] = json!(STANDARD.encode("Bearer the token"));
        change(&mut secret);
        secret.to_string()
    }

    #[test]
    fn of_a_token_secret_only_what_decides_is_kept() {
        let facts = fixtures::facts(&["invoices"]);
        let token = &facts.user.spec.tokens[0];
        let read = observed(&secret(|_| {}), &Wanted::of(Some(token))).expect("a Secret");
        assert_eq!(read.token(), Some("the token"));
        assert_eq!(read.data.keys().collect::<Vec<_>>(), ["header", "token"]);
        assert_eq!(read.labels.keys().collect::<Vec<_>>(), ["team"]);
        assert_eq!(read.annotations.keys().collect::<Vec<_>>(), ["note", ANNOTATION_RECORD]);
        assert!(read.opaque && !read.immutable && read.controller.is_none());
        assert!(!format!("{read:?}").contains("canary"));
        let leftover = observed(&secret(|_| {}), &Wanted::of(None)).expect("a Secret");
        assert_eq!(leftover.data.keys().collect::<Vec<_>>(), ["token"]);
        // What is larger than ours, or cannot be read, is missing or empty: it differs from what is to be there.
        let large = "A".repeat(2 * MAX_BYTES);
        let read = observed(
            &secret(|s| {
                s["data"]["token"] = json!("%%%");
                s["data"]["header"] = json!(large);
                s["metadata"]["annotations"]["note"] = json!(large);
                s["metadata"]["labels"]["team"] = json!(7);
            }),
            &Wanted::of(Some(token)),
        );
        let read = read.expect("a Secret");
        assert_eq!(
            (read.token(), read.data.len(), read.annotations.len(), read.labels.len()),
            (Some(""), 1, 1, 0)
        );
    }

    #[test]
    fn of_a_key_secret_only_the_entry_is_read() {
        let file = fixtures::key_file().to_string();
        let with = |entries: Value| {
            let data = entries.as_object().expect("an object").iter();
            let data = data.map(|(k, v)| (k.clone(), json!(STANDARD.encode(v.as_str().expect("a text")))));
            secret(|s| s["data"] = Value::Object(data.collect()))
        };
        let large = "x".repeat(key::MAX_BYTES + 1);
        let table = [
            (with(json!({"key.json": file})), None, Ok(())),
            (
                with(json!({"key.json": file, "large": large})),
                Some("key.json"),
                Ok(()),
            ),
            (
                with(json!({"key.json": file, "large": large})),
                None,
                Err(Reason::KeyEntryAmbiguous),
            ),
            (with(json!({"key.json": large})), None, Err(Reason::KeyTooLarge)),
            (
                with(json!({"key.json": large})),
                Some("key.json"),
                Err(Reason::KeyTooLarge),
            ),
            (
                with(json!({"key.json": file})),
                Some("other"),
                Err(Reason::KeyEntryMissing),
            ),
            (with(json!({})), None, Err(Reason::KeyEntryMissing)),
            (secret(|_| {}), None, Err(Reason::KeyEntryAmbiguous)),
        ];
        for (text, entry, expected) in table {
            let key = service_key(&text, entry).expect("a Secret");
            assert_eq!(key.map(drop), expected, "{entry:?} of {text:.300}");
        }
        let ours = secret(|s| s["metadata"]["labels"] = json!({"zitadel-tokens.dev/service-user": "billing"}));
        let key = service_key(&ours, None).expect("a Secret");
        assert_eq!(key.map(drop), Err(Reason::KeyIsTokenSecret));
        assert!(service_key("<html>", None).is_none());
    }

    #[test]
    fn a_service_user_is_read_or_said_to_be_unreadable() {
        let user = |spec: Value| {
            json!({"apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelServiceUser",
                "metadata": {"name": "n", "uid": "u", "generation": 3, "labels": {"a": "b"},
                    "annotations": {"zitadel-tokens.dev/renew-request": "now", "other": "x".repeat(200_000)}},
                "spec": spec})
            .to_string()
        };
        let token =
            |text: &str| json!([{"name": "t", "projectIDs": ["1"], "secret": {"name": "s", "template": {"a": text}}}]);
        let spec =
            |tokens: Value| json!({"instanceRef": {"name": "i"}, "keySecretRef": {"name": "k"}, "tokens": tokens});
        let Some(ReadUser::Readable(read)) = read_user(&user(spec(token("a")))) else {
            panic!("not readable")
        };
        let annotations = read.metadata.annotations.clone().unwrap_or_default();
        assert_eq!(
            annotations.keys().collect::<Vec<_>>(),
            ["zitadel-tokens.dev/renew-request"]
        );
        assert_eq!(read.metadata.labels, None);
        let many: Vec<Value> = (0..=MAX_TOKENS).map(|_| token("a")[0].clone()).collect();
        for spec in [
            json!({}),
            spec(json!("none")),
            spec(json!(many)),
            spec(token(&"x".repeat(MAX_SPEC))),
        ] {
            let Some(ReadUser::Unreadable { uid, generation }) = read_user(&user(spec)) else {
                panic!("readable")
            };
            assert_eq!((&*uid, generation), ("u", Some(3)));
        }
    }

    #[test]
    fn only_a_404_about_the_object_says_that_it_is_gone() {
        let status = |code: u16, name: Option<&str>| {
            let details = name.map(|name| json!({"name": name, "kind": "zitadelserviceusers"}));
            let status = json!({"status": "Failure", "message": "", "reason": "", "code": code, "details": details});
            serde_json::from_value::<Status>(status).expect("a status")
        };
        for (status, absent) in [
            (status(404, Some("billing")), true),
            (status(404, Some("shop")), false),
            (status(404, None), false),
            (status(403, Some("billing")), false),
        ] {
            assert_eq!(is_absent(&status, "billing"), absent, "{status:?}");
        }
    }
}
