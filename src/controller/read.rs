//! Reads from the API server, bounded in time and memory. An object of a tenant may have more than a megabyte. Only a
//! few whole objects are in memory at once, and only the parts that the operator uses are decoded.

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
use crate::api::metadata::{GROUP, KEYS_FINALIZER, ROLES_FINALIZER, is_ours};
use crate::api::service_user::KeySecretRef;
use crate::controller::guarded::Guarded;
use crate::domain::key::{self, ServiceKey};
use crate::domain::key_ledger::{KeyLedger, StoredKeys};
use crate::domain::object_ref::ObjectRef;
use crate::domain::observed_secret::{Controller, MAX_BYTES, ObservedSecret, Wanted};
use crate::domain::reason::Reason;
use crate::domain::role_ledger::{RoleLedger, StoredRoles};
use crate::domain::stored::Stored;
use crate::domain::summary::MAX_TOKENS;

/// Longest time of one read.
const READ_TIMEOUT: Duration = Duration::from_secs(15);

/// Whole objects in memory at once. Each takes up to a few megabytes while it is decoded.
const AT_ONCE: usize = 4;

/// Largest spec, in bytes of JSON. A spec that satisfies the schema is smaller.
const MAX_SPEC: usize = 256 * 1024;

/// Most entries of a key Secret, where no entry is named.
const MOST_ENTRIES: usize = 64;

/// Largest certificate bundle in a Secret, in bytes. The schema allows the same for `caBundle`.
const MAX_CERTIFICATES: usize = 128 * 1024;

/// Reads a ledger from the data of its Secret.
type ParseLedger<L> = fn(&BTreeMap<String, SecretSlice<u8>>) -> Result<L, Reason>;

/// Reads objects from the API server.
pub struct Reader {
    client: Client,
    at_once: Semaphore,
}

/// Why a read failed. The text of kube's error is dropped, because it may quote an object.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub enum ReadError {
    /// The operator has no right to read Secrets in the namespace.
    #[error("the operator is not allowed to read this kind in this namespace")]
    Forbidden,
    /// Any other failure. The read can be retried.
    #[error("could not read an object")]
    Unavailable,
}

/// The result of reading a service user.
pub enum ReadUser {
    /// The object matches its schema.
    Readable(Arc<ZitadelServiceUser>),
    /// The object does not match its schema, or is too large.
    Unreadable {
        /// UID of the object.
        uid: String,
        /// Generation of the object.
        generation: Option<i64>,
    },
}

impl Reader {
    /// A reader that uses this client.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self {
            client,
            at_once: Semaphore::new(AT_ONCE),
        }
    }

    /// Reads a service user from the API server, not from the cache. `None` if it does not exist.
    pub async fn user(&self, id: &ObjectRef) -> Result<Option<ReadUser>, ReadError> {
        self.get::<ZitadelServiceUser, _>(&id.namespace, &id.name, read_user)
            .await?
            .map_or(Ok(None), |user| user.map(Some).ok_or(ReadError::Unavailable))
    }

    /// Reads the `wanted` parts of a token Secret. `None` if it does not exist.
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

    /// Reads the key in a Secret.
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

    /// Reads the keys in all entries of a Secret. `None` if it has too many entries.
    pub async fn keys_in(&self, namespace: &str, name: &str) -> Result<Option<Vec<ServiceKey>>, ReadError> {
        let read = self.get::<Secret, _>(namespace, name, |text| {
            let secret: SecretText<'_> = serde_json::from_str(text).ok()?;
            let entries = pick(secret.data, MOST_ENTRIES + 1, |_| true);
            Some((entries.len() <= MOST_ENTRIES).then(|| {
                let files = entries.into_iter().filter_map(|(_, raw)| decoded(raw, key::MAX_BYTES));
                files.filter_map(|file| key::parse(file.expose_secret()).ok()).collect()
            }))
        });
        read.await?
            .map_or(Ok(Some(Vec::new())), |keys| keys.ok_or(ReadError::Unavailable))
    }

    /// Reads the key ledger with this name.
    pub async fn key_ledger(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<Result<Option<StoredKeys>, Reason>, ReadError> {
        self.ledger(namespace, name, KeyLedger::has_entry, KeyLedger::parse)
            .await
    }

    /// Reads the role ledger with this name.
    pub async fn role_ledger(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<Result<Option<StoredRoles>, Reason>, ReadError> {
        self.ledger(namespace, name, RoleLedger::has_entry, RoleLedger::parse)
            .await
    }

    async fn ledger<L>(
        &self,
        namespace: &str,
        name: &str,
        has_entry: fn(&str) -> bool,
        parse: ParseLedger<L>,
    ) -> Result<Result<Option<Stored<L>>, Reason>, ReadError> {
        let read = self.get::<Secret, _>(namespace, name, |text| stored(text, has_entry, parse));
        match read.await? {
            Some(Some(stored)) => Ok(stored.map(Some)),
            Some(None) => Err(ReadError::Unavailable),
            None => Ok(Ok(None)),
        }
    }

    /// Reads a credential from the named entry of a Secret, or from its only entry, and the operator's annotations of the
    /// Secret. `None` if the Secret does not exist.
    pub async fn credential(
        &self,
        namespace: &str,
        name: &str,
        entry: Option<&str>,
    ) -> Result<Option<(BTreeMap<String, String>, Option<SecretSlice<u8>>)>, ReadError> {
        let read = self.get::<Secret, _>(namespace, name, |text| {
            let secret: SecretText<'_> = serde_json::from_str(text).ok()?;
            let annotations = pick(secret.metadata.annotations, usize::MAX, is_ours);
            let annotations = annotations
                .into_iter()
                .filter_map(|(key, raw)| Some((key, parsed(raw)?)));
            let entries = pick(secret.data, 2, |name| entry.is_none_or(|entry| entry == name));
            let value = match entries[..] {
                [(_, raw)] => decoded(raw, key::MAX_BYTES),
                _ => None,
            };
            Some((annotations.collect(), value))
        });
        read.await?
            .map_or(Ok(None), |read| read.map(Some).ok_or(ReadError::Unavailable))
    }

    /// Reads the certificates in an entry of a Secret. `None` if the entry does not exist or is too large.
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
        // The semaphore is never closed. The wait for a permit does not count toward the timeout.
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

/// Whether the API server reports that exactly this object does not exist. A 404 from a proxy, or for a kind that is
/// currently not served, says nothing about the object.
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

/// Keeps the metadata that the operator uses. Labels, owners and annotations of other tools can be most of an object,
/// and a status update does not change them.
fn needed(metadata: ObjectMeta) -> ObjectMeta {
    let annotations = metadata.annotations.map(|mut annotations| {
        annotations.retain(|key, _| is_ours(key));
        annotations
    });
    // Only the places of the operator's finalizers matter.
    let finalizers = metadata.finalizers.map(|mut finalizers| {
        let others = finalizers
            .iter_mut()
            .filter(|finalizer| ![KEYS_FINALIZER, ROLES_FINALIZER].contains(&finalizer.as_str()));
        others.for_each(|other| *other = String::new());
        finalizers
    });
    ObjectMeta {
        name: metadata.name,
        namespace: metadata.namespace,
        uid: metadata.uid,
        resource_version: metadata.resource_version,
        generation: metadata.generation,
        deletion_timestamp: metadata.deletion_timestamp,
        annotations,
        finalizers,
        ..ObjectMeta::default()
    }
}

/// A Secret as JSON text. Values are decoded only once it is known which are needed.
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

/// Omits managed fields, in which a writer can set any nesting depth and times that do not decode.
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

/// Decodes the `wanted` parts of a token Secret from JSON. A value that is larger than the operator would write is
/// omitted, so the Secret counts as changed.
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
        // Any value other than `false` counts as immutable, so that the operator does not write.
        immutable: secret.immutable.is_some_and(|immutable| immutable.get() != "false"),
    })
}

/// Reads the key from the JSON of a Secret: from the named entry, or from the only entry. `None` if the text is not a
/// Secret.
#[must_use]
pub fn service_key(text: &str, entry: Option<&str>) -> Option<Result<ServiceKey, Reason>> {
    let secret: SecretText<'_> = serde_json::from_str(text).ok()?;
    let labels = pick(secret.metadata.labels, usize::MAX, key::is_label_of_ours);
    let labels = labels.into_iter().filter_map(|(key, raw)| Some((key, parsed(raw)?)));
    let labels: BTreeMap<String, String> = labels.collect();
    // Two entries are enough to detect that the entry is ambiguous.
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

/// Reads a ledger from the JSON of a Secret. `None` if the text is not a Secret.
fn stored<L>(text: &str, has_entry: fn(&str) -> bool, parse: ParseLedger<L>) -> Option<Result<Stored<L>, Reason>> {
    let secret: SecretText<'_> = serde_json::from_str(text).ok()?;
    let data = pick(secret.data, usize::MAX, has_entry);
    let data = data
        .into_iter()
        .filter_map(|(entry, raw)| Some((entry, decoded(raw, key::MAX_BYTES)?)));
    let (uid, resource_version) = (secret.metadata.uid?, secret.metadata.resource_version?);
    let ledger = parse(&data.collect());
    Some(ledger.map(|ledger| Stored {
        ledger,
        uid,
        resource_version,
    }))
}

/// Decodes the value of an entry. Returns an empty value if it is not base64, and `None` if it is longer than
/// `longest`.
fn decoded(raw: &RawValue, longest: usize) -> Option<SecretSlice<u8>> {
    // Base64 encodes three bytes in four characters. JSON adds two quotes.
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

/// Returns at most `most` entries of a JSON object that are `wanted`, without decoding their values. Other entries take
/// no memory: a Secret can have a hundred thousand.
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

    /// A Secret after `kubectl apply`, with 20,000 entries that the operator does not use.
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
    fn only_wanted_parts_of_a_token_secret_are_decoded() {
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
        // Values that are too large or unreadable are missing or empty, so the Secret counts as changed.
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
    fn only_the_named_or_only_entry_of_a_key_secret_is_read() {
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
    fn service_user_is_readable_or_unreadable() {
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
            panic!("expected a readable service user")
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
                panic!("expected an unreadable service user")
            };
            assert_eq!((&*uid, generation), ("u", Some(3)));
        }
    }

    #[test]
    fn only_a_404_that_names_the_object_means_absent() {
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
