//! A service user under test: the operator rotates its key, and its ZITADEL user also has a key that the test created.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use kube::ResourceExt;
use serde_json::{Value, json};
use zitadel_tokens::api::ZitadelServiceUser;

use crate::support::issuer::{Recorded, User};
use crate::support::world::{World, condition, one_token, until};

/// Scope of the operator's own tokens for the ZITADEL API.
pub const API: &str = "urn:zitadel:iam:org:project:id:zitadel:aud";

pub const TOKEN: &str = "/oauth/v2/token";

/// Timeout until the operator has recovered and settled. After a crash between the stored key and `AddKey` it waits for
/// 30 seconds, and replaced keys stay for the overlap.
pub const RECOVERED: Duration = Duration::from_secs(100);

pub struct Subject {
    pub name: String,
    pub user: User,
    /// The key that the test created. The operator must not touch it.
    pub foreign: String,
    /// The token in the Secret.
    token: String,
    /// The number of tokens requested for the workload.
    tokens: usize,
    rotation: Value,
    /// The last rotate request.
    request: usize,
    /// The object as last read.
    pub object: ZitadelServiceUser,
}

impl Subject {
    /// Creates an object without a rotation, and waits until it has its token.
    pub async fn create(world: &World, name: &str) -> Self {
        let user = world.simple(name, json!({"tokenType": "JWT"})).await;
        let foreign = world.issuer.key(&user.id, json!({})).await.0;
        let token = world.token(&format!("{name}-token")).await;
        let object = world.ready(name, "True", "Issued").await;
        Self {
            name: name.to_owned(),
            user,
            foreign,
            token,
            tokens: 1,
            rotation: Value::Null,
            request: 0,
            object,
        }
    }

    /// Creates an object and waits until it has a key of the operator.
    pub async fn rotated(world: &World, name: &str, rotation: Value) -> Self {
        let mut subject = Self::create(world, name).await;
        subject.enable(world, rotation).await;
        subject.handled(world).await;
        subject
    }

    /// Turns the rotation on.
    pub async fn enable(&mut self, world: &World, rotation: Value) {
        self.rotation = rotation;
        self.apply(world).await;
    }

    /// Turns the rotation off.
    pub async fn disable(&mut self, world: &World) {
        self.enable(world, Value::Null).await;
    }

    async fn apply(&self, world: &World) {
        let mut spec = one_token(&self.secret());
        if !self.rotation.is_null() {
            spec["keyRotation"] = self.rotation.clone();
        }
        world.service_user(&self.name, spec).await.expect("accepted");
    }

    /// Requests a rotation.
    pub async fn request(&mut self, world: &World) {
        self.request += 1;
        world
            .annotate(&self.name, "rotate-request", &self.request.to_string())
            .await;
    }

    /// Waits until the last rotate request was handled and a key of the operator signs.
    pub async fn handled(&mut self, world: &World) {
        let wanted = (self.request > 0).then(|| self.request.to_string());
        let wanted = |object: &ZitadelServiceUser| {
            let status = object.status.as_ref().and_then(|status| status.key_rotation.as_ref());
            let handled = status.and_then(|status| status.last_handled_rotate_request.clone());
            handled == wanted
                && is_rotated(object)
                && key_id(object).is_some_and(|id| id != self.user.key_id && id != self.foreign)
        };
        self.object = until(world.users(), &self.name, RECOVERED, wanted).await;
    }

    /// Asserts that the rotation has ended well: the last request was handled, one key of the operator remains and
    /// signs, and no other key was touched.
    pub async fn assert_settled(&mut self, world: &World) {
        self.handled(world).await;
        let keeps_bootstrap = self.rotation["deleteBootstrapKey"] != true;
        self.remain(world, |object| {
            let own = key_id(object).expect("a key");
            let bootstrap = keeps_bootstrap.then(|| self.user.key_id.clone());
            bootstrap.into_iter().chain([self.foreign.clone(), own]).collect()
        })
        .await;
        // Nothing but the current key remains in the ledger.
        let entries = async || {
            let ledger = world.ledger(&self.object).await.unwrap_or_default();
            ledger.into_keys().collect::<Vec<_>>()
        };
        within("the ledger has only the current key", async || {
            entries().await == ["current.der", "ledger.json"]
        })
        .await;
        let status = self
            .object
            .status
            .as_ref()
            .and_then(|status| status.key_rotation.as_ref());
        let foreign = status.and_then(|status| status.foreign_credentials);
        // A count that a crash prevented is made at the next rotation.
        assert!(
            foreign.is_none_or(|count| count == 1),
            "{foreign:?} foreign credentials"
        );
        let own = key_id(&self.object).expect("a key");
        self.assert_signs(world, &own).await;
    }

    /// Asserts that nothing of the rotation is left to do, and that the same keys remain.
    pub async fn assert_ended(&mut self, world: &World) {
        let settled = async || {
            let ledger = world.ledger(&self.object).await.unwrap_or_default();
            let ledger: Value = serde_json::from_str(&ledger["ledger.json"]).expect("JSON");
            ledger["settled"] == true
        };
        within("the rotation has ended", settled).await;
        self.assert_settled(world).await;
    }

    /// Asserts that the object is gone, and that only the keys remain that the operator did not make.
    pub async fn assert_deleted(&self, world: &World) {
        within("the object is gone", async || {
            world.users().get_opt(&self.name).await.expect("readable").is_none()
        })
        .await;
        assert_eq!(self.keys(world).await, self.made_by_people());
        assert_eq!(world.ledger(&self.object).await, None);
        self.assert_no_token_was_requested(world).await;
    }

    /// Asserts that the bootstrap key signs again, and that nothing of the operator remains.
    pub async fn assert_handed_back(&mut self, world: &World) {
        let back = |object: &ZitadelServiceUser| {
            object.finalizers().is_empty() && key_id(object).as_ref() == Some(&self.user.key_id)
        };
        self.object = until(world.users(), &self.name, RECOVERED, back).await;
        assert_eq!(self.keys(world).await, self.made_by_people());
        assert_eq!(world.ledger(&self.object).await, None);
        assert_eq!(condition(&self.object, "KeyRotated"), None);
        let bootstrap = self.user.key_id.clone();
        self.assert_signs(world, &bootstrap).await;
    }

    /// Waits until ZITADEL has exactly the keys that `expected` names.
    async fn remain(&self, world: &World, expected: impl Fn(&ZitadelServiceUser) -> BTreeSet<String>) {
        let started = Instant::now();
        loop {
            let object = world.users().get(&self.name).await.expect("readable");
            let (keys, expected) = (self.keys(world).await, expected(&object));
            assert!(
                keys.contains(&self.foreign),
                "{}: a key that the operator did not make is gone",
                self.name
            );
            assert!(
                key_id(&object).is_some_and(|id| keys.contains(&id)),
                "{}: ZITADEL does not have the key in the status",
                self.name
            );
            if keys == expected {
                return;
            }
            assert!(
                started.elapsed() < RECOVERED,
                "{}: ZITADEL has {keys:?} and not {expected:?}",
                self.name
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Asserts that the operator requested no token for the workload since the last refresh, and that it can sign with
    /// this key.
    async fn assert_signs(&mut self, world: &World, key: &str) {
        self.assert_no_token_was_requested(world).await;
        world
            .annotate(&self.name, "renew-request", &format!("{}", self.tokens))
            .await;
        let renewed = world
            .secret_until(&self.secret(), |data| data["token"] != self.token)
            .await;
        self.token.clone_from(&renewed["token"]);
        self.tokens += 1;
        let requests = self.token_requests(world).await;
        let last = requests.last().expect("a request");
        assert_eq!(
            (last.assertion["header"]["kid"].as_str(), last.status),
            (Some(key), 200),
            "{}: the refresh was not signed with the key in the status",
            self.name
        );
        self.assert_no_token_was_requested(world).await;
    }

    async fn assert_no_token_was_requested(&self, world: &World) {
        let requests = self.token_requests(world).await.len();
        assert_eq!(requests, self.tokens, "{}: token requests for the workload", self.name);
        let secret = world.secrets().get_opt(&self.secret()).await.expect("readable");
        // The Secret of a deleted object may be gone.
        if let Some(secret) = secret {
            let data = crate::support::world::data(&secret);
            assert_eq!(data["token"], self.token, "{}: another token", self.name);
        }
    }

    /// The token requests for the workload.
    async fn token_requests(&self, world: &World) -> Vec<Recorded> {
        let mut all = world.issuer.requests().await;
        all.retain(|r| r.user_id == self.user.id && is_for_workload(r));
        all
    }

    /// The ids of all keys of the user.
    pub async fn keys(&self, world: &World) -> BTreeSet<String> {
        let keys = world.issuer.keys(&self.user.id).await;
        keys.into_iter().map(|key| key.id).collect()
    }

    fn made_by_people(&self) -> BTreeSet<String> {
        [&self.user.key_id, &self.foreign].into_iter().cloned().collect()
    }

    pub fn secret(&self) -> String {
        format!("{}-token", self.name)
    }

    pub fn uid(&self) -> &str {
        self.object.metadata.uid.as_deref().expect("a UID")
    }
}

pub fn is_for_workload(request: &Recorded) -> bool {
    request.path == TOKEN && request.scopes != [API]
}

pub fn is_rotated(object: &ZitadelServiceUser) -> bool {
    condition(object, "KeyRotated").is_some_and(|(status, _, _)| status == "True")
}

pub fn key_id(object: &ZitadelServiceUser) -> Option<String> {
    object.status.as_ref().and_then(|status| status.key_id.clone())
}

/// Polls until `done` returns true, for at most [`RECOVERED`].
pub async fn within(what: &str, done: impl AsyncFn() -> bool) {
    let started = Instant::now();
    while !done().await {
        assert!(started.elapsed() < RECOVERED, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
