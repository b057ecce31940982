//! The main job: one service user's token in a Secret, kept fresh.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::api::DeleteParams;
use serde_json::json;

use crate::support::EVENTUALLY;
use crate::support::world::{PROJECT, World, claims, condition, one_token, until};

#[tokio::test(flavor = "multi_thread")]
async fn secret_holds_a_token_with_the_requested_audience() {
    let world = World::new("main-job").await;
    let mut operator = world.operator().await;
    world.instance().await;
    let user = world.simple("billing", json!({"tokenType": "JWT"})).await;

    let data = world.secret_until("billing-token", |d| d.contains_key("token")).await;
    let claims = claims(&data["token"]);
    assert_eq!(claims["aud"], json!([PROJECT]));
    assert_eq!(claims["sub"], json!(user.id));
    assert_eq!(claims["iss"], json!(world.issuer.url));
    assert_eq!(data["token_type"], "Bearer");
    assert_eq!(data["issuer"], world.issuer.url);

    let object = world.ready("billing", "True", "Issued").await;
    let status = object.status.clone().expect("a status");
    assert_eq!(status.user_id.as_deref(), Some(&*user.id));
    assert_eq!(status.key_id.as_deref(), Some(&*user.key_id));
    assert_eq!(status.tokens_ready.as_deref(), Some("1/1"));
    assert_eq!(data["expires_at"], status.expires_at.expect("an expiry").0.to_string());
    assert_eq!(condition(&object, "Stalled"), None);
    assert_eq!(condition(&object, "Reconciling"), None);
    assert_eq!(world.issuer.mints().await, 1);

    let secret = world.secrets().get("billing-token").await.expect("a Secret");
    let owner = &secret.metadata.owner_references.expect("owners")[0];
    assert_eq!(
        (owner.kind.as_str(), owner.controller),
        ("ZitadelServiceUser", Some(true))
    );
    assert_eq!(Some(&owner.uid), object.metadata.uid.as_ref());

    // At the default log level, the log has one line for each change of the outcome.
    world
        .secrets()
        .delete("billing-key", &DeleteParams::default())
        .await
        .expect("deleted");
    operator.await_line(r#"reason="KeySecretMissing""#).await;
    let lines = operator.log();
    let lines = lines
        .iter()
        .filter(|line| line.contains("INFO") && line.contains("token outcome changed"));
    let logged: Vec<_> = lines.filter_map(|line| line.split("object=").nth(1)).collect();
    let line = |reason: &str| format!(r#"{}/billing token="main" reason="{reason}""#, world.name);
    assert_eq!(logged, [line("Issued"), line("KeySecretMissing")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn opaque_token_for_the_zitadel_api_is_issued() {
    let world = World::new("opaque").await;
    let _operator = world.operator().await;
    world.instance().await;
    // BEARER is ZITADEL's default token type for a service user.
    let user = world.issuer.user(json!({"tokenType": "BEARER"})).await;
    world.key_secret("api-key", &user).await;
    let spec = json!({"tokens": [{"name": "api", "zitadelAPI": true, "scopes": [], "secret": {"name": "api-token"}}]});
    world.service_user("api", spec).await.expect("accepted");

    let token = world.token("api-token").await;
    let status = world.ready("api", "True", "Issued").await.status.expect("a status");
    assert_eq!(status.tokens[0].format.as_deref(), Some("Opaque"));
    let requests = world.issuer.requests().await;
    let mint = requests
        .iter()
        .find(|r| r.access_token == token)
        .expect("the token request");
    assert_eq!(
        mint.form["scope"],
        json!(["urn:zitadel:iam:org:project:id:zitadel:aud"])
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn token_is_refreshed_before_expiry_and_requested_once_per_lifetime() {
    let world = World::new("refresh").await;
    let _operator = world.operator().await;
    world.instance().await;
    world
        .simple("billing", json!({"tokenType": "JWT", "lifetimeSeconds": 15}))
        .await;

    let mut token = world.token("billing-token").await;
    let mut expires: Timestamp = world.secret_until("billing-token", |_| true).await["expires_at"]
        .parse()
        .expect("a time");
    for _ in 0..3 {
        let next = world.secret_until("billing-token", |d| d["token"] != token).await;
        assert!(Timestamp::now() < expires, "the token was refreshed after its expiry");
        token.clone_from(&next["token"]);
        expires = next["expires_at"].parse().expect("a time");
    }
    let status = world.ready("billing", "True", "Issued").await.status.expect("a status");
    let line = &status.tokens[0];
    assert_eq!(
        line.lifetime_seconds,
        Some(14),
        "expires_in is a second less than the lifetime"
    );
    assert!(line.renew_at < line.expires_at && line.issued_at < line.renew_at);
    // The wait above ends with a watch event. ZITADEL may have issued a fifth token by then.
    let seen = 4;
    let mints = world.issuer.mints().await;
    assert!(mints == seen || mints == seen + 1, "{mints} mints for {seen} tokens");
    // A successful refresh emits no further Event.
    assert_eq!(world.events("billing").await, BTreeSet::from(["Normal Issued".into()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn restart_with_fresh_tokens_requests_and_writes_nothing() {
    let world = World::new("restart").await;
    let operator = world.operator().await;
    world.instance().await;
    for name in ["one", "two", "three"] {
        world.simple(name, json!({"tokenType": "JWT"})).await;
    }
    for name in ["one", "two", "three"] {
        world.ready(name, "True", "Issued").await;
    }
    operator.kill();
    let audit = &world.cluster.audit;
    let written = || {
        ["zitadelserviceusers/status", "secrets"].map(|resource| {
            ["update", "patch", "create"]
                .iter()
                .map(|verb| audit.count(&world.name, verb, resource))
                .sum::<usize>()
        })
    };
    let before = written();

    let _operator = world.operator().await;
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, 3);
    // The sentinel object adds one status write.
    assert_eq!(written(), [before[0] + 1, before[1]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_refresh_costs_one_secret_write_and_one_status_write() {
    let world = World::new("cost").await;
    let _operator = world.operator().await;
    world.instance().await;
    world
        .simple("billing", json!({"tokenType": "JWT", "lifetimeSeconds": 3600}))
        .await;
    let status = world.ready("billing", "True", "Issued").await.status.expect("a status");
    // Status times are whole seconds. A refresh within the same second would not change the status.
    let issued = status.tokens[0].issued_at.clone().expect("a time").0;
    while Timestamp::now().as_second() <= issued.as_second() + 1 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let operator_requests = |verb: &str, resource: &str| {
        let all = world.cluster.audit.requests(&world.name);
        all.iter()
            .filter(|r| r.verb == verb && r.resource == resource && r.name.starts_with("billing") && r.agent != "tests")
            .count()
    };
    let before = (
        operator_requests("patch", "secrets"),
        operator_requests("update", "zitadelserviceusers/status"),
        operator_requests("get", "secrets"),
    );

    let token = world.token("billing-token").await;
    world.renew("billing").await;
    world.secret_until("billing-token", |d| d["token"] != token).await;
    world
        .user_until("billing", |u| {
            u.status
                .as_ref()
                .is_some_and(|s| s.tokens[0].issued_at.as_ref().is_some_and(|t| t.0 > issued))
        })
        .await;
    let status = world.ready("billing", "True", "Issued").await.status.expect("a status");
    assert_eq!(status.last_handled_renew_request.as_deref(), Some("now"));
    world.sentinel().await;

    assert_eq!(world.issuer.mints().await, 2, "a renew request is handled once");
    assert_eq!(operator_requests("patch", "secrets") - before.0, 1);
    assert_eq!(operator_requests("update", "zitadelserviceusers/status") - before.1, 1);
    assert_eq!(
        operator_requests("get", "secrets") - before.2,
        2,
        "one read each of the key Secret and the token Secret; the operator's own writes start no reconcile"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn replaced_key_or_deleted_secret_leads_to_a_new_token() {
    let world = World::new("inputs").await;
    let _operator = world.operator().await;
    world.instance().await;
    let user = world.simple("billing", json!({"tokenType": "JWT"})).await;
    let first = world.token("billing-token").await;

    let (key_id, key) = world.issuer.key(&user.id, json!({"pkcs8": true})).await;
    world.secret("billing-key", json!({"key.json": key})).await;
    let second = world.secret_until("billing-token", |d| d["token"] != first).await["token"].clone();
    world
        .user_until("billing", |u| {
            u.status.as_ref().and_then(|s| s.key_id.as_deref()) == Some(&*key_id)
        })
        .await;

    let old = world.secrets().get("billing-token").await.expect("there").metadata.uid;
    world
        .secrets()
        .delete("billing-token", &DeleteParams::default())
        .await
        .expect("deleted");
    let third = until(world.secrets(), "billing-token", EVENTUALLY, |s| s.metadata.uid != old).await;
    assert_ne!(String::from_utf8_lossy(&third.data.expect("data")["token"].0), second);
    assert_eq!(world.issuer.mints().await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn drift_is_repaired_without_a_token_request_and_an_edited_token_costs_one() {
    let world = World::new("drift").await;
    let _operator = world.operator().await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    let mut spec = one_token("billing-token");
    spec["tokens"][0]["secret"]["labels"] = json!({"app.kubernetes.io/part-of": "shop"});
    spec["tokens"][0]["secret"]["template"] = json!({"header": "Authorization: {{ token_type }} {{ token }}"});
    world.service_user("billing", spec).await.expect("accepted");
    let token = world.token("billing-token").await;

    world
        .edit_secret(
            "billing-token",
            json!({"metadata": {"labels": {"app.kubernetes.io/part-of": "other", "theirs": "stays"}}, "stringData": {"header": "gone"}}),
        )
        .await;
    let wanted = format!("Authorization: Bearer {token}");
    let repaired = until(world.secrets(), "billing-token", EVENTUALLY, |s| {
        let labels = s.metadata.labels.clone().unwrap_or_default();
        labels["app.kubernetes.io/part-of"] == "shop" && crate::support::world::data(s)["header"] == wanted
    })
    .await;
    assert_eq!(repaired.metadata.labels.expect("labels")["theirs"], "stays");
    assert_eq!(world.issuer.mints().await, 1);

    world
        .edit_secret("billing-token", json!({"stringData": {"token": "stolen"}}))
        .await;
    let renewed = world.secret_until("billing-token", |d| d["token"] != "stolen").await;
    assert_ne!(renewed["token"], token);
    assert_eq!(world.issuer.mints().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_an_object_or_token_entry_deletes_its_secret() {
    let world = World::new("delete").await;
    let _operator = world.operator().await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    let mut two = one_token("billing-token");
    two["tokens"]
        .as_array_mut()
        .expect("a list")
        .push(json!({"name": "more", "projectIDs": ["2"], "secret": {"name": "more-token"}}));
    world.service_user("billing", two).await.expect("accepted");
    world.token("more-token").await;

    // Removing a token from the spec deletes its Secret. The other Secret stays unchanged.
    let kept = world.token("billing-token").await;
    world
        .service_user("billing", one_token("billing-token"))
        .await
        .expect("accepted");
    world.secret_gone("more-token").await;
    assert_eq!(world.token("billing-token").await, kept);

    world
        .users()
        .delete("billing", &DeleteParams::default())
        .await
        .expect("deleted");
    world.secret_gone("billing-token").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn suspended_object_keeps_its_token_unchanged() {
    let world = World::new("suspend").await;
    let _operator = world.operator().await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    let token = world.token("billing-token").await;
    let mut spec = one_token("billing-token");
    spec["suspend"] = json!(true);
    spec["tokens"][0]["projectRoles"] = json!(true);
    world.service_user("billing", spec.clone()).await.expect("accepted");
    // Ready stays True while the token is valid. The reason says that the object is suspended.
    world.ready("billing", "True", "Suspended").await;
    assert_eq!(world.token("billing-token").await, token);
    spec["suspend"] = json!(false);
    world.service_user("billing", spec).await.expect("accepted");
    world.secret_until("billing-token", |d| d["token"] != token).await;
    world.ready("billing", "True", "Issued").await;
    assert_eq!(world.issuer.mints().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn refresh_time_follows_the_spec() {
    let world = World::new("renewal").await;
    let _operator = world.operator().await;
    world.instance().await;
    let user = world
        .issuer
        .user(json!({"tokenType": "JWT", "lifetimeSeconds": 1001}))
        .await;
    world.key_secret("billing-key", &user).await;
    let token = |name: &str, key: &str, value: serde_json::Value| json!({"name": name, "projectIDs": ["1"], "secret": {"name": format!("{name}-token")}, key: value});
    let tokens = json!({"tokens": [
        token("default", "projectRoles", json!(false)), token("before", "renewBefore", json!("5m")),
        token("percentage", "renewBeforePercentage", json!(50)), token("clamped", "renewBeforePercentage", json!(99)),
        token("ignored", "renewBefore", json!("2h")),
    ]});
    world.service_user("billing", tokens).await.expect("accepted");
    let status = world.ready("billing", "True", "Issued").await.status.expect("a status");
    for (line, latest) in status.tokens.iter().zip([667, 700, 500, 200, 667]) {
        let time =
            |t: &Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Time>| t.clone().expect("a time").0.as_second();
        let after = time(&line.renew_at) - time(&line.issued_at);
        // The jitter moves the refresh forward by up to a tenth of the lifetime, but never below a fifth of it.
        assert!(
            (latest - 101..=latest + 1).contains(&after) && after >= 199,
            "{}: {after} s",
            line.name
        );
    }
}
