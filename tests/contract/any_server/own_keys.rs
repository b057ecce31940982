//! A service user without roles manages its own keys (docs/reference/zitadel-protocol.md#self-management-of-keys).

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::KeyPair as _;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use pem::Pem;
use reqwest::Method;
use secrecy::SecretString;
use serde_json::{Value, json};
use zitadel_tokens::domain::key::{self, ServiceKey};
use zitadel_tokens::domain::reason::Reason;
use zitadel_tokens::domain::scope;
use zitadel_tokens::zitadel::ZitadelClient;

use super::refusal;
use crate::client::exchange;
use crate::server::{Answer, Kind, Server, on_any_server, takes_effect};

const SEARCH: &str = "/v2/users/keys/search";

/// Size of a page in these cases: smaller than the lists, so that every list has several pages.
const PAGE: usize = 2;

/// A service user without roles, a key of it, and the access token that it got with the key.
struct Own<'a> {
    server: &'a Server,
    instance: ZitadelClient,
    key: ServiceKey,
    token: SecretString,
}

/// A key pair of the caller.
pub(super) struct Pair {
    private: String,
    pub(super) public: String,
}

impl Pair {
    pub(super) fn new() -> Self {
        let pair = KeyPair::generate(KeySize::Rsa2048).expect("a key");
        let private: Pkcs8V1Der<'_> = pair.as_der().expect("PKCS#8");
        let public: PublicKeyX509Der<'_> = pair.public_key().as_der().expect("SPKI");
        Self {
            private: pem::encode(&Pem::new("PRIVATE KEY", private.as_ref())),
            public: pem::encode(&Pem::new("PUBLIC KEY", public.as_ref())),
        }
    }

    /// The fields of `AddKey`: the public key in base64.
    fn fields(&self, expires: Timestamp) -> Value {
        json!({"expirationDate": expires.to_string(), "publicKey": STANDARD.encode(&self.public)})
    }

    /// The private key as a key of this user.
    pub(super) fn key(&self, user_id: &str, key_id: &str) -> ServiceKey {
        let file = json!({"userId": user_id, "keyId": key_id, "key": self.private});
        key::parse(file.to_string().as_bytes()).expect("a key file")
    }
}

/// In one hour, in whole seconds.
pub(super) fn in_an_hour() -> Timestamp {
    let now = Timestamp::from_second(Timestamp::now().as_second()).expect("a time");
    now + SignedDuration::from_hours(1)
}

impl<'a> Own<'a> {
    /// Creates the user. On a server without user v2 (ZITADEL 3), asserts that the methods are absent and returns nothing.
    async fn on(server: &'a Server, kind: Kind) -> Option<Self> {
        let key = server.user(kind).await;
        let instance = server.instance();
        let scope = scope::field(&scope::zitadel_api()).expect("clean scopes");
        let exchanged = exchange(&instance, &key, &scope).await.expect("a token");
        let own = Self {
            server,
            instance,
            key,
            token: exchanged.answer.access_token,
        };
        if server.has_user_v2() {
            return Some(own);
        }
        let answers = [
            own.add(&Pair::new().fields(in_an_hour())).await,
            own.search(&json!({})).await,
            own.remove(&own.key.key_id).await,
        ];
        for answer in answers {
            assert!([404, 405].contains(&answer.status.as_u16()), "{answer:?}");
        }
        None
    }

    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> Answer {
        self.server.ask(Some(&self.token), method, path, body).await
    }

    async fn add(&self, fields: &Value) -> Answer {
        self.add_to(&self.key.user_id, fields).await
    }

    async fn add_to(&self, user: &str, fields: &Value) -> Answer {
        self.ask(Method::POST, &keys_of(user), Some(fields.clone())).await
    }

    /// Adds the public key and waits until the token endpoint accepts the private key.
    async fn add_pair(&self, pair: &Pair) -> ServiceKey {
        let key_id = added(&self.add(&pair.fields(in_an_hour())).await);
        let key = pair.key(&self.key.user_id, &key_id);
        self.accepted(&key).await;
        key
    }

    async fn accepted(&self, key: &ServiceKey) {
        let accepted = takes_effect(async || exchange(&self.instance, key, "openid").await, Result::is_ok);
        accepted.await.expect("a token");
    }

    async fn remove(&self, key_id: &str) -> Answer {
        self.remove_from(&self.key.user_id, key_id).await
    }

    async fn remove_from(&self, user: &str, key_id: &str) -> Answer {
        self.ask(Method::DELETE, &format!("{}/{key_id}", keys_of(user)), None)
            .await
    }

    async fn search(&self, body: &Value) -> Answer {
        self.ask(Method::POST, SEARCH, Some(body.clone())).await
    }

    /// All pages of the list of the user's own keys, the oldest key first.
    async fn list(&self) -> Vec<Value> {
        let mut all = Vec::new();
        loop {
            let pagination = json!({"offset": all.len(), "limit": PAGE, "asc": true});
            let answer = self.search(&search(&self.key.user_id, &pagination)).await;
            assert_eq!(answer.outcome(), "200", "{answer:?}");
            assert_eq!(answer.body["pagination"]["appliedLimit"], PAGE.to_string());
            let page = rows(&answer);
            all.extend_from_slice(page);
            assert!(all.len() <= 10, "the pages do not end: {all:?}");
            let total = answer.body["pagination"]["totalResult"].as_str();
            if page.is_empty() || total == Some(&all.len().to_string()) {
                return all;
            }
        }
    }

    async fn ids(&self) -> Vec<String> {
        self.list().await.iter().map(id).collect()
    }

    /// Waits until the list contains the key, or no longer contains it, and returns the list.
    async fn listed(&self, key_id: &str, wanted: bool) -> Vec<Value> {
        let has = |list: &Vec<Value>| list.iter().any(|row| id(row) == key_id);
        takes_effect(async || self.list().await, |list| has(list) == wanted).await
    }
}

fn keys_of(user: &str) -> String {
    format!("/v2/users/{user}/keys")
}

/// A search for the keys of a user.
fn search(user: &str, pagination: &Value) -> Value {
    json!({
        "pagination": pagination,
        "sortingColumn": "KEY_FIELD_NAME_CREATED_DATE",
        "filters": [{"userIdFilter": {"id": user}}],
    })
}

fn rows(answer: &Answer) -> &[Value] {
    answer.body["result"].as_array().map_or(&[], Vec::as_slice)
}

fn id(row: &Value) -> String {
    row["id"].as_str().expect("an id").to_owned()
}

/// The id of a key that was added.
fn added(answer: &Answer) -> String {
    assert_eq!(answer.outcome(), "200", "{answer:?}");
    answer.body["keyId"].as_str().expect("an id").to_owned()
}

#[tokio::test]
async fn own_key_by_public_key_is_accepted() {
    on_any_server(async |server| {
        for kind in [Kind::Jwt, Kind::Opaque] {
            let Some(me) = Own::on(server, kind).await else {
                return;
            };
            let pair = Pair::new();
            let answer = me.add(&pair.fields(in_an_hour())).await;
            let fields = answer.body.as_object().expect("fields");
            assert!(
                fields.keys().eq(["creationDate", "keyId"]),
                "no key content: {answer:?}"
            );
            me.accepted(&pair.key(&me.key.user_id, &added(&answer))).await;
        }
    })
    .await;
}

#[tokio::test]
async fn one_public_key_can_have_two_ids() {
    on_any_server(async |server| {
        let Some(me) = Own::on(server, Kind::Opaque).await else {
            return;
        };
        let pair = Pair::new();
        let (first, second) = (me.add_pair(&pair).await, me.add_pair(&pair).await);
        assert_ne!(first.key_id, second.key_id);
        // The first one still works.
        exchange(&me.instance, &first, "openid").await.expect("a token");
        me.listed(&first.key_id, true).await;
        me.listed(&second.key_id, true).await;
    })
    .await;
}

#[tokio::test]
async fn expiration_date_keeps_its_microseconds() {
    on_any_server(async |server| {
        let Some(me) = Own::on(server, Kind::Opaque).await else {
            return;
        };
        for micros in [1, 123_456, 999_000, 0] {
            let expires = in_an_hour() + SignedDuration::from_micros(micros);
            let key_id = added(&me.add(&Pair::new().fields(expires)).await);
            let list = me.listed(&key_id, true).await;
            let row = list.iter().find(|row| id(row) == key_id).expect("listed");
            let date: Timestamp = row["expirationDate"]
                .as_str()
                .expect("a date")
                .parse()
                .expect("RFC 3339");
            assert_eq!(date, expires);
        }
    })
    .await;
}

#[tokio::test]
async fn a_full_list_contains_the_calling_key() {
    on_any_server(async |server| {
        let Some(me) = Own::on(server, Kind::Jwt).await else {
            return;
        };
        let mut wanted = vec![me.key.key_id.clone()];
        for _ in 0..PAGE {
            wanted.push(added(&me.add(&Pair::new().fields(in_an_hour())).await));
        }
        takes_effect(async || me.ids().await, |ids| *ids == wanted).await;
        let list = me.list().await;
        assert!(
            list.iter().all(|row| row["userId"] == me.key.user_id.as_str()),
            "{list:?}"
        );
    })
    .await;
}

#[tokio::test]
async fn an_expired_key_stays_in_the_list() {
    on_any_server(async |server| {
        let Some(me) = Own::on(server, Kind::Opaque).await else {
            return;
        };
        let short = server.short_key(&me.key.user_id).await;
        assert_eq!(refusal(&me.instance, &short).await, Reason::KeyRejected);
        me.listed(&short.key_id, true).await;
        assert_eq!(me.remove(&short.key_id).await.outcome(), "200");
    })
    .await;
}

#[tokio::test]
async fn a_removed_own_key_is_rejected_and_leaves_the_list() {
    on_any_server(async |server| {
        let Some(me) = Own::on(server, Kind::Opaque).await else {
            return;
        };
        let next = me.add_pair(&Pair::new()).await;
        // The key that got the access token in use. The access token stays valid.
        let removed = me.remove(&me.key.key_id).await;
        assert_eq!(removed.outcome(), "200");
        let date: Result<Timestamp, _> = removed.body["deletionDate"].as_str().expect("a date").parse();
        date.expect("RFC 3339");
        // RemoveKey reads the events, so the second call needs no wait.
        assert_eq!(me.remove(&me.key.key_id).await.outcome(), "404 COMMAND-4m77G");
        assert_eq!(refusal(&me.instance, &me.key).await, Reason::KeyRejected);
        let list = me.listed(&me.key.key_id, false).await;
        assert_eq!(list.iter().map(id).collect::<Vec<_>>(), [next.key_id]);
    })
    .await;
}

#[tokio::test]
async fn keys_of_another_user_are_out_of_reach() {
    on_any_server(async |server| {
        let Some(me) = Own::on(server, Kind::Opaque).await else {
            return;
        };
        let other = Own::on(server, Kind::Opaque).await.expect("user v2");
        other.listed(&other.key.key_id, true).await;
        let user = other.key.user_id.as_str();
        let fields = Pair::new().fields(in_an_hour());
        assert_eq!(me.add_to(user, &fields).await.outcome(), "404 AUTHZ-cdgFk");
        let removed = me.remove_from(user, &other.key.key_id).await;
        assert_eq!(removed.outcome(), "404 AUTHZ-cdgFk");
        // The other user's key is not shown. Whether it is counted depends on a feature of the instance.
        let answer = me.search(&search(user, &json!({"limit": 10}))).await;
        assert_eq!(answer.outcome(), "200");
        assert!(rows(&answer).is_empty(), "{answer:?}");
        let all = me.search(&json!({})).await;
        assert_eq!(all.outcome(), "200");
        let foreign = rows(&all).iter().find(|row| row["userId"] != me.key.user_id.as_str());
        assert_eq!(foreign, None);
        assert_eq!(other.ids().await, [other.key.key_id.as_str()]);
        exchange(&other.instance, &other.key, "openid").await.expect("a token");
    })
    .await;
}

#[tokio::test]
async fn an_invalid_key_is_not_added() {
    on_any_server(async |server| {
        let Some(me) = Own::on(server, Kind::Opaque).await else {
            return;
        };
        let pair = Pair::new();
        let good = pair.fields(in_an_hour());
        let with = |field: &str, value: Value| {
            let mut fields = good.clone();
            fields[field] = value;
            fields
        };
        let past = Timestamp::now() - SignedDuration::from_hours(1);
        for (fields, outcome) in [
            (with("expirationDate", json!(past.to_string())), "400 DOMAIN-dv3t5"),
            (with("expirationDate", Value::Null), "400"),
            (with("publicKey", json!(STANDARD.encode("no PEM"))), "400 COMMAND-5F3h1"),
            (with("publicKey", json!(pair.public)), "400"),
        ] {
            let answer = me.add(&fields).await;
            assert_eq!(answer.outcome(), outcome, "{fields} {answer:?}");
            assert_eq!(answer.body["code"], 3, "{answer:?}");
        }
        // A key that was added earlier would be in a list that shows a later one.
        let last = added(&me.add(&good).await);
        me.listed(&last, true).await;
        assert_eq!(me.ids().await, [me.key.key_id.clone(), last]);
    })
    .await;
}

#[tokio::test]
async fn a_token_without_the_zitadel_audience_manages_no_keys() {
    on_any_server(async |server| {
        let Some(me) = Own::on(server, Kind::Jwt).await else {
            return;
        };
        let foreign = exchange(&me.instance, &me.key, "openid").await.expect("a token");
        let fields = Pair::new().fields(in_an_hour());
        let keys = keys_of(&me.key.user_id);
        let key = format!("{keys}/{}", me.key.key_id);
        for (token, outcome) in [(Some(&foreign.answer.access_token), "401 AUTH-7fs1e"), (None, "401")] {
            for (method, path, body) in [
                (Method::POST, keys.as_str(), Some(fields.clone())),
                (Method::POST, SEARCH, Some(json!({}))),
                (Method::DELETE, &key, None),
            ] {
                let answer = server.ask(token, method, path, body).await;
                assert_eq!(answer.outcome(), outcome, "{path} {answer:?}");
            }
        }
        exchange(&me.instance, &me.key, "openid").await.expect("still there");
    })
    .await;
}
