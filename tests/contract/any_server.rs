//! Cases that hold on the stand-in and on a real ZITADEL server.

mod administrators;
mod own_keys;
mod users;

use std::collections::BTreeSet;

use k8s_openapi::jiff::Timestamp;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use zitadel_tokens::domain::answer::{Format, Minted, accept};
use zitadel_tokens::domain::assertion;
use zitadel_tokens::domain::key::ServiceKey;
use zitadel_tokens::domain::reason::Reason;
use zitadel_tokens::zitadel::ZitadelClient;

use super::client::{connect, exchange, expected, mint, scope, settings};
use super::server::{Kind, Server, on_any_server, takes_effect};
use super::support::world::{PROJECT, claims};

/// A second project. Neither project needs to exist, because ZITADEL copies ids into the audience without a check
/// (docs/reference/zitadel-protocol.md#audience).
const OTHER_PROJECT: &str = "69234237810729020";

/// The audience claim of a JWT.
fn audience(minted: &Minted) -> BTreeSet<String> {
    let claims = claims(minted.token.expose_secret());
    let list = claims["aud"].as_array().expect("a list");
    list.iter().map(|id| id.as_str().expect("an id").to_owned()).collect()
}

fn set<const N: usize>(ids: [&str; N]) -> BTreeSet<String> {
    ids.map(str::to_owned).into()
}

/// Repeats the token request until the server refuses it, and returns the reason.
async fn refusal(instance: &ZitadelClient, key: &ServiceKey) -> Reason {
    let refused = takes_effect(async || exchange(instance, key, "openid").await, Result::is_err);
    refused.await.expect_err("refused")
}

/// docs/reference/zitadel-protocol.md#token-response
#[tokio::test]
async fn an_exchange_returns_a_bearer_token_and_its_lifetime() {
    on_any_server(async |server| {
        for kind in [Kind::Jwt, Kind::Opaque] {
            let key = server.user(kind).await;
            let scope = scope(&json!({"projectIDs": [PROJECT]}));
            let got = exchange(&server.instance(), &key, &scope).await.expect("a token");
            assert_eq!(got.answer.token_type, "Bearer");
            assert!(
                got.answer.expires_in.is_some_and(|s| s > 0),
                "{:?}",
                got.answer.expires_in
            );
        }
    })
    .await;
}

/// `aud` equals the requested ids, whether or not the projects exist (docs/reference/zitadel-protocol.md#audience).
#[tokio::test]
async fn a_jwt_names_issuer_user_and_exactly_the_requested_projects() {
    on_any_server(async |server| {
        let key = server.user(Kind::Jwt).await;
        let instance = server.instance();
        for projects in [vec![PROJECT], vec![OTHER_PROJECT, PROJECT], vec!["no-such-project"]] {
            let minted = mint(&instance, &key, &json!({"projectIDs": projects}))
                .await
                .expect("a token");
            let claims = claims(minted.token.expose_secret());
            assert_eq!(claims["iss"], server.issuer());
            assert_eq!(claims["sub"], key.user_id.as_str());
            assert_eq!(audience(&minted), projects.into_iter().map(str::to_owned).collect());
            let exp = claims["exp"].as_i64().expect("exp");
            assert!(minted.expires.as_second() <= exp, "expiry is later than exp");
            assert!(minted.expires > minted.issued);
        }
    })
    .await;
}

/// A token with a larger or smaller audience than requested is rejected (docs/adr/0007-audience-must-be-equal.md).
#[tokio::test]
async fn a_larger_or_smaller_audience_is_rejected() {
    on_any_server(async |server| {
        let key = server.user(Kind::Jwt).await;
        let instance = server.instance();
        let (one, two) = (
            json!({"projectIDs": [PROJECT]}),
            json!({"projectIDs": [PROJECT, OTHER_PROJECT]}),
        );
        for (asked, wanted) in [(&one, &two), (&two, &one)] {
            let got = exchange(&instance, &key, &scope(asked)).await.expect("a token");
            let judged = accept(got.answer, &expected(&instance, &key, wanted, "unused"), got.sent);
            assert_eq!(judged.err(), Some(Reason::TokenMismatch));
        }
    })
    .await;
}

/// ZITADEL replaces the alias by an id. The operator learns it from the audience of a JWT or, with an opaque token,
/// from `GET /management/v1/iam`. Both return the same id
/// (docs/reference/zitadel-protocol.md#the-zitadel-apis-audience).
#[tokio::test]
async fn the_zitadel_alias_resolves_to_the_learned_id() {
    on_any_server(async |server| {
        let (jwt, opaque) = (server.user(Kind::Jwt).await, server.user(Kind::Opaque).await);
        let (by_jwt, by_opaque) = (server.instance(), server.instance());
        let id = by_jwt.project_id(&jwt).await.expect("learned");
        assert_eq!(by_opaque.project_id(&opaque).await, Ok(id));

        let alone = mint(&by_jwt, &jwt, &json!({"zitadelAPI": true}))
            .await
            .expect("a token");
        assert_eq!(audience(&alone), set([id]));
        let both = json!({"zitadelAPI": true, "projectIDs": [PROJECT]});
        let both = mint(&by_jwt, &jwt, &both).await.expect("a token");
        assert_eq!(audience(&both), set([id, PROJECT]));
    })
    .await;
}

/// An opaque token may have five parts like a JWE (docs/reference/zitadel-protocol.md#token-formats).
#[tokio::test]
async fn an_opaque_token_is_recognized() {
    on_any_server(async |server| {
        let key = server.user(Kind::Opaque).await;
        let minted = mint(&server.instance(), &key, &json!({"projectIDs": [PROJECT]})).await;
        let minted = minted.expect("a token");
        let token = minted.token.expose_secret();
        assert_eq!(Format::of(token), Format::Opaque);
        assert_ne!(token.split('.').count(), 3);
    })
    .await;
}

/// docs/reference/zitadel-protocol.md#token-formats
#[tokio::test]
async fn a_changed_token_type_affects_later_tokens() {
    on_any_server(async |server| {
        let key = server.user(Kind::Opaque).await;
        let instance = server.instance();
        let format = async || {
            let minted = mint(&instance, &key, &json!({"projectIDs": [PROJECT]})).await;
            Format::of(minted.expect("a token").token.expose_secret())
        };
        assert_eq!(format().await, Format::Opaque);
        for (kind, wanted) in [(Kind::Jwt, Format::Jwt), (Kind::Opaque, Format::Opaque)] {
            server.change_kind(&key.user_id, kind).await;
            takes_effect(&format, |format| *format == wanted).await;
        }
    })
    .await;
}

/// `scopes: []` therefore loses nothing that the operator uses (docs/reference/zitadel-protocol.md#token-response).
#[tokio::test]
async fn openid_adds_only_an_id_token() {
    on_any_server(async |server| {
        let key = server.user(Kind::Jwt).await;
        let without = json!({"projectIDs": [PROJECT], "scopes": []});
        let with = json!({"projectIDs": [PROJECT]});
        let (lean, full) = (answer(server, &key, &without).await, answer(server, &key, &with).await);
        let names = |answer: &Value| {
            answer
                .as_object()
                .expect("fields")
                .keys()
                .cloned()
                .collect::<BTreeSet<_>>()
        };
        let added: Vec<_> = names(&full).difference(&names(&lean)).cloned().collect();
        assert_eq!(added, ["id_token"]);
        assert!(names(&lean).is_subset(&names(&full)));
        let access = |answer: &Value| names(&claims(answer["access_token"].as_str().expect("a token")));
        assert_eq!(access(&lean), access(&full));

        let instance = server.instance();
        for fields in [&without, &with] {
            let minted = mint(&instance, &key, fields).await.expect("a token");
            assert_eq!(audience(&minted), set([PROJECT]));
        }
    })
    .await;
}

/// The complete answer of the token endpoint. The product reads only a part of it.
async fn answer(server: &Server, key: &ServiceKey, fields: &Value) -> Value {
    let instance = server.instance();
    let path = instance.discover().await.expect("discovered").token_path;
    let assertion = assertion::sign(key, server.issuer(), Timestamp::now()).expect("signed");
    let form = [
        ("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer"),
        ("assertion", assertion.expose_secret()),
        ("scope", &scope(fields)),
    ];
    let http = reqwest::Client::builder().no_proxy().build().expect("a client");
    let answer = http.post(format!("{}{path}", server.issuer())).form(&form).send();
    answer.await.expect("answered").json().await.expect("JSON")
}

/// ZITADEL adds the claim for the user's own organization. It drops the scope of another organization silently, and
/// only the missing claim shows that (docs/reference/zitadel-protocol.md#scopes).
#[tokio::test]
async fn a_token_without_the_requested_organization_is_rejected() {
    on_any_server(async |server| {
        let key = server.user(Kind::Jwt).await;
        let instance = server.instance();
        let of = |organization: &str| json!({"projectIDs": [PROJECT], "organizationID": organization});
        let own = mint(&instance, &key, &of(server.organization()))
            .await
            .expect("a token");
        let claims = claims(own.token.expose_secret());
        assert_eq!(claims["urn:zitadel:iam:org:id"], server.organization());

        let foreign = mint(&instance, &key, &of("69234237810729000")).await;
        assert_eq!(foreign.err(), Some(Reason::TokenMismatch));
    })
    .await;
}

/// Without a grant there is no role claim, and the audience stays as requested
/// (docs/reference/zitadel-protocol.md#claims-of-access-tokens).
#[tokio::test]
async fn project_roles_without_a_grant_add_no_claim() {
    on_any_server(async |server| {
        let key = server.user(Kind::Jwt).await;
        let fields = json!({"projectIDs": [PROJECT], "projectRoles": true});
        let minted = mint(&server.instance(), &key, &fields).await.expect("a token");
        assert_eq!(audience(&minted), set([PROJECT]));
        let claims = claims(minted.token.expose_secret());
        let names = claims.as_object().expect("claims").keys();
        assert_eq!(
            names.filter(|name| name.starts_with("urn:zitadel:")).count(),
            0,
            "{claims}"
        );
    })
    .await;
}

/// In the error dialect of the server. `only_stand_in` covers both dialects
/// (docs/reference/zitadel-protocol.md#errors-of-the-token-endpoint).
#[tokio::test]
async fn a_removed_key_is_rejected() {
    on_any_server(async |server| {
        let key = server.user(Kind::Jwt).await;
        let instance = server.instance();
        exchange(&instance, &key, "openid").await.expect("a token");
        server.remove_key(&key).await;
        assert_eq!(refusal(&instance, &key).await, Reason::KeyRejected);
    })
    .await;
}

/// docs/reference/zitadel-protocol.md#key-lookup
#[tokio::test]
async fn an_expired_key_is_rejected() {
    on_any_server(async |server| {
        let user = server.user(Kind::Jwt).await.user_id;
        let key = server.short_key(&user).await;
        let instance = server.instance();
        exchange(&instance, &key, "openid")
            .await
            .expect("a token while the key is valid");
        assert_eq!(refusal(&instance, &key).await, Reason::KeyRejected);
    })
    .await;
}

/// ZITADEL looks up the key by its id and the user id (docs/reference/zitadel-protocol.md#key-lookup).
#[tokio::test]
async fn an_unknown_user_or_a_key_of_another_user_is_rejected() {
    on_any_server(async |server| {
        let (key, other) = (server.user(Kind::Jwt).await, server.user(Kind::Jwt).await);
        let instance = server.instance();
        for user_id in ["69234237810729000".to_owned(), other.user_id.clone()] {
            let stolen = ServiceKey { user_id, ..key.clone() };
            assert_eq!(
                exchange(&instance, &stolen, "openid").await.err(),
                Some(Reason::KeyRejected)
            );
        }
        let unknown = ServiceKey {
            key_id: "69234237810729000".into(),
            ..key
        };
        assert_eq!(
            exchange(&instance, &unknown, "openid").await.err(),
            Some(Reason::KeyRejected)
        );
    })
    .await;
}

/// docs/reference/zitadel-protocol.md#errors-of-the-token-endpoint
#[tokio::test]
async fn a_deactivated_user_has_its_own_reason() {
    on_any_server(async |server| {
        let key = server.user(Kind::Jwt).await;
        let instance = server.instance();
        server.deactivate(&key.user_id).await;
        assert_eq!(refusal(&instance, &key).await, Reason::UserInactive);
        server.reactivate(&key.user_id).await;
        let minted = async || mint(&instance, &key, &json!({"projectIDs": [PROJECT]})).await;
        takes_effect(minted, Result::is_ok).await.expect("a token");
    })
    .await;
}

/// The issuer in discovery equals the configured issuer to the letter, including the port. Another spelling is refused
/// (docs/reference/zitadel-protocol.md#instance-selection).
#[tokio::test]
async fn discovery_names_the_issuer_to_the_letter() {
    on_any_server(async |server| {
        let found = server.instance().discover().await.expect("discovered");
        assert!(found.token_path.starts_with('/'), "{}", found.token_path);
        // An issuer that this server does not state.
        let other = server.issuer().replace("://", "://x.");
        let mut elsewhere = settings(&other);
        elsewhere.endpoint = Some(server.issuer().to_owned());
        let failure = connect(elsewhere).discover().await;
        assert!(failure.is_err(), "{failure:?}");
    })
    .await;
}
