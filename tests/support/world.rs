//! The world of one test: a namespace, an issuer, an instance whose policy allows the namespace everything, and an
//! operator that serves only this instance.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use k8s_openapi::api::core::v1::{Namespace, Secret};
use k8s_openapi::api::events::v1::Event;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use zitadel_tokens::api::{ZitadelAccessPolicy, ZitadelInstance, ZitadelServiceUser};

use super::cluster::Cluster;
use super::issuer::{Issuer, User};
use super::operator::Operator;
use super::{EVENTUALLY, SOON, eventually};

/// The id of a project for which tests request tokens.
pub const PROJECT: &str = "69234237810729019";

pub struct World {
    pub cluster: &'static Cluster,
    pub client: Client,
    pub issuer: Arc<Issuer>,
    /// Name of the instance, and value of the label in the operator's selector.
    pub instance: String,
    /// Name of the namespace. Equals `instance` unless [`World::beside`] created the world.
    pub name: String,
}

impl World {
    /// A new world, without an operator.
    pub async fn new(test: &str) -> Self {
        Self::with_issuer(test, Issuer::start(&[])).await
    }

    pub async fn with_issuer(test: &str, issuer: Issuer) -> Self {
        Self::on(Cluster::shared(), test, issuer).await
    }

    /// A new world on a cluster with the CRDs. A policy allows its namespace everything.
    pub async fn on(cluster: &'static Cluster, test: &str, issuer: Issuer) -> Self {
        let world = Self::without_policy(cluster, test, issuer).await;
        world.allow(world.selector_of_namespace(), everything()).await;
        world
    }

    /// A new world without a policy, on a cluster that may not have the CRDs yet.
    pub async fn without_policy(cluster: &'static Cluster, test: &str, issuer: Issuer) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let client = cluster.client().await;
        let name = format!(
            "{test}-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let world = Self {
            cluster,
            client,
            issuer: Arc::new(issuer),
            instance: name.clone(),
            name,
        };
        world.namespace(&world.name).await;
        world
    }

    /// Another namespace with the instance, issuer and operator of `other`.
    pub async fn beside(other: &Self, suffix: &str) -> Self {
        let name = format!("{}-{suffix}", other.name);
        other.namespace(&name).await;
        Self {
            cluster: other.cluster,
            client: other.client.clone(),
            issuer: other.issuer.clone(),
            instance: other.instance.clone(),
            name,
        }
    }

    /// The same world with another instance.
    pub fn with_instance(self, name: &str) -> Self {
        Self {
            instance: name.to_owned(),
            ..self
        }
    }

    pub async fn namespace(&self, name: &str) {
        let namespace = serde_json::from_value(json!({"metadata": {"name": name}})).expect("a namespace");
        Api::<Namespace>::all(self.client.clone())
            .create(&PostParams::default(), &namespace)
            .await
            .expect("created");
    }

    /// Starts an operator for this world.
    pub async fn operator(&self) -> Operator {
        Operator::start(self.cluster, &self.selector()).await
    }

    /// Starts an operator for this world that keeps the keys it makes in the namespace [`World::home`].
    pub async fn rotating_operator(&self) -> Operator {
        self.rotating_operator_with(&[]).await
    }

    pub async fn rotating_operator_with(&self, flags: &[&str]) -> Operator {
        let home = self.home();
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        if namespaces.get_opt(&home).await.expect("readable").is_none() {
            self.namespace(&home).await;
        }
        let flags = [&["--namespace", &home], flags].concat();
        Operator::start_with(&self.cluster.kubeconfig, &self.selector(), &flags).await
    }

    /// The operator's own namespace.
    pub fn home(&self) -> String {
        format!("{}-home", self.instance)
    }

    /// The key ledger of a service user, if there is one.
    pub async fn ledger(&self, user: &ZitadelServiceUser) -> Option<BTreeMap<String, String>> {
        self.in_home("service-user-key", user).await
    }

    /// The role ledger of a service user, if there is one.
    pub async fn role_ledger(&self, user: &ZitadelServiceUser) -> Option<BTreeMap<String, String>> {
        self.in_home("service-user-roles", user).await
    }

    async fn in_home(&self, prefix: &str, user: &ZitadelServiceUser) -> Option<BTreeMap<String, String>> {
        let uid = user.metadata.uid.as_deref().expect("a UID");
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.home());
        let secret = secrets.get_opt(&format!("{prefix}-{uid}")).await;
        secret.expect("readable").as_ref().map(data)
    }

    pub fn selector(&self) -> String {
        format!("test={}", self.instance)
    }

    /// The spec of the instance.
    pub fn instance_spec(&self) -> Value {
        json!({"issuer": self.issuer.url, "connection": {"allowInsecureHTTP": true}})
    }

    /// Creates the instance with [`World::instance_spec`].
    pub async fn instance(&self) -> ZitadelInstance {
        self.apply_instance(self.instance_spec()).await.expect("an instance")
    }

    /// Creates the instance, and a policy that allows every namespace everything.
    pub async fn instance_for_all(&self) {
        self.allow(json!({}), everything()).await;
        self.apply_instance(self.instance_spec()).await.expect("an instance");
    }

    /// A selector for this namespace only.
    pub fn selector_of_namespace(&self) -> Value {
        json!({"matchLabels": {"kubernetes.io/metadata.name": self.name}})
    }

    /// Applies the policy of this world: the selected namespaces may have these audiences of the instance.
    pub async fn allow(&self, namespaces: Value, audiences: Value) {
        self.policy(&self.policy_name(), namespaces, audiences).await;
    }

    /// Name of the policy that [`World::allow`] applies.
    pub fn policy_name(&self) -> String {
        format!("{}.{}", self.instance, self.name)
    }

    /// Applies a policy.
    pub async fn policy(&self, name: &str, namespaces: Value, audiences: Value) {
        let object = json!({
            "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelAccessPolicy", "metadata": {"name": name},
            "spec": {"instanceRef": {"name": self.instance}, "namespaceSelector": namespaces, "audiences": audiences},
        });
        let params = PatchParams::apply("tests").force();
        let applied = self.policies().patch(name, &params, &Patch::Apply(&object)).await;
        applied.expect("a policy");
    }

    pub fn policies(&self) -> Api<ZitadelAccessPolicy> {
        Api::all(self.client.clone())
    }

    pub async fn apply_instance(&self, spec: Value) -> kube::Result<ZitadelInstance> {
        let object = json!({
            "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelInstance",
            "metadata": {"name": self.instance, "labels": {"test": self.instance}}, "spec": spec,
        });
        let api = Api::<ZitadelInstance>::all(self.client.clone());
        api.patch(
            &self.instance,
            &PatchParams::apply("tests").force(),
            &Patch::Apply(&object),
        )
        .await
    }

    /// Creates a key Secret.
    pub async fn key_secret(&self, name: &str, user: &User) {
        self.secret(name, json!({"key.json": user.key})).await;
    }

    pub async fn secret(&self, name: &str, data: Value) {
        let object = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data});
        let params = PatchParams::apply("tests").force();
        self.secrets()
            .patch(name, &params, &Patch::Apply(&object))
            .await
            .expect("a Secret");
    }

    /// Applies a service user with this spec; `instanceRef` and, without `user`, `keySecretRef` (Secret `NAME-key`) are filled
    /// in.
    pub async fn service_user(&self, name: &str, spec: Value) -> kube::Result<ZitadelServiceUser> {
        let mut full = json!({"instanceRef": {"name": self.instance}});
        if spec.get("user").is_none() {
            full["keySecretRef"] = json!({"name": format!("{name}-key")});
        }
        for (key, value) in spec.as_object().expect("an object") {
            full[key] = value.clone();
        }
        let object = json!({
            "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelServiceUser",
            "metadata": {"name": name}, "spec": full,
        });
        self.users()
            .patch(name, &PatchParams::apply("tests").force(), &Patch::Apply(&object))
            .await
    }

    /// A user with a key Secret and a service user with one token in the Secret `NAME-token`.
    pub async fn simple(&self, name: &str, fields: Value) -> User {
        let user = self.issuer.user(fields).await;
        self.key_secret(&format!("{name}-key"), &user).await;
        self.service_user(name, one_token(&format!("{name}-token")))
            .await
            .expect("a service user");
        user
    }

    /// Edits a Secret, as another client would.
    pub async fn edit_secret(&self, name: &str, change: Value) {
        let patch = Patch::Merge(&change);
        self.secrets()
            .patch(name, &PatchParams::default(), &patch)
            .await
            .expect("edited");
    }

    /// Requests a refresh of a service user's tokens.
    pub async fn renew(&self, name: &str) {
        self.annotate(name, "renew-request", "now").await;
    }

    /// Sets one of the operator's annotations on a service user.
    pub async fn annotate(&self, name: &str, annotation: &str, value: &str) {
        let request = json!({"metadata": {"annotations": {format!("zitadel-tokens.dev/{annotation}"): value}}});
        self.merge(name, request).await;
    }

    /// Changes a service user by a merge patch, as another client would.
    pub async fn merge(&self, name: &str, change: Value) -> ZitadelServiceUser {
        let patch = Patch::Merge(&change);
        let patched = self.users().patch(name, &PatchParams::default(), &patch).await;
        patched.expect("patched")
    }

    /// Deletes a service user, which may wait for its finalizer.
    pub async fn delete(&self, name: &str) {
        let deleted = self.users().delete(name, &DeleteParams::default()).await;
        deleted.expect("accepted");
    }

    /// Waits until the service user is gone.
    pub async fn user_gone(&self, name: &str) {
        eventually("the object is gone", async || {
            self.users().get_opt(name).await.expect("readable").is_none()
        })
        .await;
    }

    /// Waits until the Secret is gone.
    pub async fn secret_gone(&self, name: &str) {
        let gone = await_condition(self.secrets(), name, |secret: Option<&Secret>| secret.is_none());
        tokio::time::timeout(EVENTUALLY, gone)
            .await
            .expect("gone in time")
            .expect("watched");
    }

    pub fn users(&self) -> Api<ZitadelServiceUser> {
        Api::namespaced(self.client.clone(), &self.name)
    }

    pub fn secrets(&self) -> Api<Secret> {
        Api::namespaced(self.client.clone(), &self.name)
    }

    /// Waits until the service user satisfies `wanted`.
    pub async fn user_until(&self, name: &str, wanted: impl Fn(&ZitadelServiceUser) -> bool) -> ZitadelServiceUser {
        until(self.users(), name, SOON, wanted).await
    }

    /// Waits until `Ready` has this status and `UpToDate` this reason.
    pub async fn ready(&self, name: &str, status: &str, reason: &str) -> ZitadelServiceUser {
        self.user_until(name, |user| {
            condition(user, "Ready").is_some_and(|(s, _, _)| s == status)
                && condition(user, "UpToDate").is_some_and(|(_, r, _)| r == reason)
                && user.status.as_ref().and_then(|s| s.observed_generation) == user.metadata.generation
        })
        .await
    }

    /// Waits until the instance's Ready condition has this status and reason.
    pub async fn instance_ready(&self, status: &str, reason: &str) -> ZitadelInstance {
        let api: Api<ZitadelInstance> = Api::all(self.client.clone());
        until(api, &self.instance, SOON, |i: &ZitadelInstance| {
            let conditions = i.status.iter().flat_map(|s| &s.conditions);
            i.status.as_ref().and_then(|s| s.observed_generation) == i.metadata.generation
                && conditions
                    .into_iter()
                    .any(|c| c.type_ == "Ready" && c.status == status && c.reason == reason)
        })
        .await
    }

    /// Waits until the data of the Secret satisfies `wanted`, and returns it.
    pub async fn secret_until(
        &self,
        name: &str,
        wanted: impl Fn(&BTreeMap<String, String>) -> bool,
    ) -> BTreeMap<String, String> {
        data(&until(self.secrets(), name, SOON, |secret| wanted(&data(secret))).await)
    }

    /// The token in a Secret, once there is one.
    pub async fn token(&self, secret: &str) -> String {
        self.secret_until(secret, |data| data.contains_key("token")).await["token"].clone()
    }

    /// Creates an object and waits until the operator has reconciled it, after everything that the test did before.
    /// What has not happened by then is no consequence of it.
    pub async fn sentinel(&self) {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("sentinel-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let missing = json!({"keySecretRef": {"name": "no-such-key"}, "tokens": one_token("no-such-token")["tokens"]});
        self.service_user(&name, missing).await.expect("a sentinel");
        self.ready(&name, "False", "KeySecretMissing").await;
        self.users()
            .delete(&name, &DeleteParams::default())
            .await
            .expect("deleted");
    }

    /// The Events on a service user, as `type reason`; repeats are a series of one Event.
    pub async fn events(&self, name: &str) -> BTreeSet<String> {
        let all = self.all_events(name).await.into_iter();
        all.map(|e| format!("{} {}", e.type_.unwrap_or_default(), e.reason.unwrap_or_default()))
            .collect()
    }

    /// The notes of the Events of an object.
    pub async fn notes(&self, name: &str) -> BTreeSet<String> {
        let all = self.all_events(name).await.into_iter();
        all.filter_map(|e| e.note).collect()
    }

    async fn all_events(&self, name: &str) -> Vec<Event> {
        let api: Api<Event> = Api::namespaced(self.client.clone(), &self.name);
        let mut all = api.list(&ListParams::default()).await.expect("Events").items;
        all.retain(|e| e.regarding.as_ref().and_then(|r| r.name.as_deref()) == Some(name));
        all
    }
}

/// Every project and the ZITADEL API.
pub fn everything() -> Value {
    json!({"projectIDs": ["*"], "zitadelAPI": true})
}

/// A spec with one token for [`PROJECT`].
pub fn one_token(secret: &str) -> Value {
    json!({"tokens": [{"name": "main", "projectIDs": [PROJECT], "secret": {"name": secret}}]})
}

/// Waits by a watch until an object satisfies `wanted`.
pub async fn until<K>(api: Api<K>, name: &str, limit: Duration, wanted: impl Fn(&K) -> bool) -> K
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static,
{
    let found = await_condition(api.clone(), name, |object: Option<&K>| object.is_some_and(&wanted));
    if let Ok(found) = tokio::time::timeout(limit, found).await {
        return found.expect("watched").expect("there");
    }
    let last = api.get_opt(name).await.expect("readable");
    panic!(
        "{} {name} did not reach the expected state in {limit:?}: {last:#?}",
        K::kind(&())
    );
}

/// Status, reason and message of a condition.
pub fn condition<'a>(user: &'a ZitadelServiceUser, kind: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let condition = user.status.as_ref()?.conditions.iter().find(|c| c.type_ == kind)?;
    Some((&condition.status, &condition.reason, &condition.message))
}

/// The data of a Secret as text.
pub fn data(secret: &Secret) -> BTreeMap<String, String> {
    let data = secret.data.clone().unwrap_or_default();
    data.into_iter()
        .map(|(k, v)| (k, String::from_utf8_lossy(&v.0).into_owned()))
        .collect()
}

/// The claims of a JWT.
pub fn claims(token: &str) -> Value {
    let payload = token.split('.').nth(1).expect("a JWT");
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).expect("base64url")).expect("claims")
}
