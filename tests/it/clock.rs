//! Wrong clocks: ZITADEL's and the operator's.

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use zitadel_tokens::api::ZitadelInstance;

use crate::support::clock::Clock;
use crate::support::eventually;
use crate::support::issuer::User;
use crate::support::operator::Operator;
use crate::support::world::{World, claims, condition, data, one_token};

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_a_server_two_minutes_behind_stay_fresh_and_its_skew_is_reported() {
    let world = World::new("skew").await;
    world.issuer.settings(json!({"clockOffsetMillis": -120_000})).await;
    let operator = world.operator().await;
    world.instance().await;
    let server_now = || Timestamp::now() - SignedDuration::from_secs(120);

    // By the operator's clock, a token with a lifetime of one minute has expired when ZITADEL issues it.
    world
        .simple("billing", json!({"tokenType": "JWT", "lifetimeSeconds": 60}))
        .await;
    world
        .simple("orders", json!({"tokenType": "JWT", "lifetimeSeconds": 20}))
        .await;
    let status = world.ready("billing", "True", "Issued").await.status.expect("a status");
    let token = world.token("billing-token").await;
    let exp = claims(&token)["exp"].as_i64().expect("exp");
    let expires_at = status.expires_at.expect("an expiry").0;
    assert!(
        (exp - 3..=exp).contains(&expires_at.as_second()),
        "{expires_at}, exp {exp} by the server's clock"
    );
    let instance = world.instance_ready("True", "InstanceReady").await;
    assert_eq!(instance.status.and_then(|s| s.clock_skew_seconds), Some(-120));

    // The refresh is in time by the server's clock.
    let first = world.token("orders-token").await;
    let second = world.secret_until("orders-token", |data| data["token"] != first).await;
    let exp = claims(&first)["exp"].as_i64().expect("exp");
    assert!(server_now().as_second() < exp, "refreshed before {exp}");
    assert_ne!(second["token"], first);

    // After a restart, the operator does not know the skew. It requests no token before it has measured it.
    operator.terminate().await;
    let slow = json!({"path": "/.well-known/openid-configuration", "latencyMillis": 300});
    world.issuer.fault(slow).await;
    let _operator = world.operator().await;
    world.simple("late", json!({"tokenType": "JWT"})).await;
    world.ready("late", "True", "Issued").await;
    assert_eq!(world.token("billing-token").await, token);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_assertion_is_sent_while_the_server_clock_is_half_an_hour_off() {
    let world = World::new("far").await;
    world.issuer.settings(json!({"clockOffsetMillis": -1_800_000})).await;
    let _operator = world.operator().await;
    world.instance().await;
    world.instance_ready("False", "ClockSkew").await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    let user = world.ready("billing", "False", "ClockSkew").await;
    let message = format!("{user:?}");
    assert!(message.contains("Set the clock"), "{message}");
    let requests = world.issuer.requests().await;
    assert!(requests.iter().all(|r| r.assertion.is_null()), "{requests:?}");

    world.issuer.settings(json!({"clockOffsetMillis": 0})).await;
    world.instance_ready("True", "InstanceReady").await;
    world.ready("billing", "True", "Issued").await;
}

/// Shifts the `Date` of every answer by this many years, and makes the operator reconcile the instance.
async fn shift_server_date(world: &World, years: i64) {
    let date = Timestamp::now() + SignedDuration::from_hours(years * 365 * 24);
    let headers = json!({"Date": date.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()});
    for path in ["/.well-known/openid-configuration", "/oauth/v2/token"] {
        world.issuer.fault(json!({"path": path, "headers": headers})).await;
    }
    // Any change of the instance makes the operator run discovery. This one keeps the connection.
    let change = json!({"metadata": {"labels": {"changed": "true"}}});
    let instances: Api<ZitadelInstance> = Api::all(world.client.clone());
    let params = PatchParams::default();
    instances
        .patch(&world.instance, &params, &Patch::Merge(&change))
        .await
        .expect("patched");
    world.instance_ready("False", "ClockSkew").await;
}

/// One token with another audience than that of [`one_token`], in this Secret.
fn another_token(secret: &str) -> Value {
    let mut spec = one_token(secret);
    spec["tokens"][0]["projectIDs"] = json!(["2"]);
    spec
}

async fn wrong_server_date_is_reported_and_changes_nothing(years: i64) {
    let world = World::new("lie").await;
    let _operator = world.operator().await;
    world.instance().await;
    let unchanged = world.simple("moved", json!({"tokenType": "JWT"})).await;
    let user = world.simple("changed", json!({"tokenType": "JWT"})).await;
    let end = Timestamp::now() + SignedDuration::from_hours(365 * 24);
    let (_, key) = world
        .issuer
        .key(&user.id, json!({"expirationDate": end.to_string()}))
        .await;
    world.secret("changed-key", json!({"key.json": key})).await;
    world
        .simple("short", json!({"tokenType": "JWT", "lifetimeSeconds": 20}))
        .await;
    for name in ["moved", "changed", "short"] {
        world.ready(name, "True", "Issued").await;
    }
    shift_server_date(&world, years).await;
    let (moved, changed) = (world.token("moved-token").await, world.token("changed-token").await);
    let token_requests = async |user: &User| {
        let requests = world.issuer.requests().await;
        let tokens = requests
            .iter()
            .filter(|r| r.path == "/oauth/v2/token" && r.user_id == user.id);
        tokens.count()
    };
    let mints = world.issuer.mints().await;
    let before = (token_requests(&unchanged).await, token_requests(&user).await);

    // The operator deletes a Secret that the spec no longer names only after it has written the token to the new one.
    world
        .service_user("moved", one_token("moved-new"))
        .await
        .expect("renamed");
    world.secret_until("moved-new", |data| data["token"] == moved).await;
    world.secret_gone("moved-token").await;
    world.ready("moved", "True", "Issued").await;
    world
        .service_user("changed", another_token("changed-new"))
        .await
        .expect("renamed");
    let changed_user = world.ready("changed", "False", "ClockSkew").await;
    assert_eq!(
        condition(&changed_user, "KeyValid").map(|(_, reason, _)| reason),
        Some("KeyUsable")
    );

    // The short token is due and cannot be refreshed. Its object stays Ready until the token expires, and no longer.
    let exp = claims(&world.token("short-token").await)["exp"].as_i64().expect("exp");
    let short = world.ready("short", "False", "ClockSkew").await;
    let conditions = short.status.expect("a status").conditions;
    let ready = conditions.iter().find(|c| c.type_ == "Ready").expect("Ready");
    assert!(
        ready.last_transition_time.0.as_second() >= exp - 1,
        "{ready:?}, exp {exp}"
    );

    world.sentinel().await;
    assert_eq!(world.token("changed-token").await, changed, "the valid token stays");
    assert_eq!(world.issuer.mints().await, mints, "the operator signs nothing");

    world.issuer.clear_faults().await;
    world.instance_ready("True", "InstanceReady").await;
    for name in ["moved", "changed", "short"] {
        world.ready(name, "True", "Issued").await;
    }
    world.secret_gone("changed-token").await;
    assert_eq!(world.token("moved-new").await, moved);
    assert_eq!(
        (token_requests(&unchanged).await, token_requests(&user).await),
        (before.0, before.1 + 1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn server_date_ten_years_ahead_deletes_no_valid_token_and_expires_no_key() {
    wrong_server_date_is_reported_and_changes_nothing(10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn server_date_ten_years_back_keeps_no_expired_token_ready() {
    wrong_server_date_is_reported_and_changes_nothing(-10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operator_with_clock_far_ahead_signs_nothing_even_before_it_detects_the_jump() {
    let world = World::new("jumped").await;
    let clock = Clock::new();
    let flags = ["--watch-namespaces", &world.name];
    let kubeconfig = &world.cluster.kubeconfig;
    let operator = Operator::start_in(kubeconfig, &world.selector(), &flags, &clock.environment()).await;
    world.instance().await;
    world
        .simple("billing", json!({"tokenType": "JWT", "lifetimeSeconds": 3_600}))
        .await;
    world.ready("billing", "True", "Issued").await;
    let token = world.token("billing-token").await;
    let token_requests = async || {
        let requests = world.issuer.requests().await;
        requests.iter().filter(|r| r.path == "/oauth/v2/token").count()
    };
    let before = token_requests().await;

    clock.set(7_200);
    let expired = format!("tokens{{zitadel_instance=\"{}\",state=\"expired\"}} 1", world.instance);
    eventually("the operator uses the new time", async || {
        operator.get("/metrics").await.1.contains(&expired)
    })
    .await;
    world.renew("billing").await;
    world.ready("billing", "False", "ClockSkew").await;
    assert_eq!(token_requests().await, before, "the operator signs nothing");

    clock.set(0);
    world.secret_until("billing-token", |data| data["token"] != token).await;
    world.ready("billing", "True", "Issued").await;
    assert_eq!(token_requests().await, before + 1, "the requested refresh");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_operator_clock_during_an_outage_deletes_no_valid_token() {
    let world = World::new("wrong").await;
    let clock = Clock::new();
    let flags = ["--watch-namespaces", &world.name];
    let start = async || {
        let kubeconfig = &world.cluster.kubeconfig;
        Operator::start_in(kubeconfig, &world.selector(), &flags, &clock.environment()).await
    };
    let mut operator = start().await;
    world.instance().await;
    let end = Timestamp::now() + SignedDuration::from_hours(1);
    for name in ["before", "after"] {
        let user = world
            .simple(name, json!({"tokenType": "JWT", "lifetimeSeconds": 3_600}))
            .await;
        let (_, key) = world
            .issuer
            .key(&user.id, json!({"expirationDate": end.to_string()}))
            .await;
        if name == "after" {
            world.secret("after-key", json!({"key.json": key})).await;
        }
        world.ready(name, "True", "Issued").await;
    }
    let tokens = (world.token("before-token").await, world.token("after-token").await);
    let down = ["/.well-known/openid-configuration", "/oauth/v2/token"];
    for path in down {
        world.issuer.fault(json!({"path": path, "reset": true})).await;
    }

    // The clock is two hours ahead, first while the operator runs and then when it starts.
    clock.set(7_200);
    operator.await_line("the clock of this machine was set").await;
    world
        .service_user("before", another_token("before-new"))
        .await
        .expect("renamed");
    world.ready("before", "False", "InstanceUnreachable").await;
    operator.terminate().await;
    let _operator = start().await;
    world
        .service_user("after", another_token("after-new"))
        .await
        .expect("renamed");
    world.ready("after", "False", "KeyExpired").await;
    world.sentinel().await;
    let kept = (world.token("before-token").await, world.token("after-token").await);
    assert_eq!(kept, tokens, "the valid tokens stay");

    // When the server answers again, the operator reports the clock as the cause.
    world.issuer.clear_faults().await;
    for name in ["before", "after"] {
        world.ready(name, "False", "ClockSkew").await;
    }
    clock.set(0);
    for name in ["before", "after"] {
        world.ready(name, "True", "Issued").await;
        world.secret_gone(&format!("{name}-token")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_refreshed_in_time_after_the_operator_clock_is_set_back() {
    let world = World::new("jump").await;
    let clock = Clock::new();
    let mut operator = Operator::start_on_clock(world.cluster, &world.selector(), &clock).await;
    world.instance().await;
    world
        .simple("billing", json!({"tokenType": "JWT", "lifetimeSeconds": 40}))
        .await;
    let first = world.token("billing-token").await;

    // By the new clock, the token is due in more than four minutes.
    clock.set(-240);
    operator.await_line("the clock of this machine was set").await;
    let second = world.secret_until("billing-token", |data| data["token"] != first).await;
    let exp = claims(&first)["exp"].as_i64().expect("exp");
    assert!(Timestamp::now().as_second() < exp, "refreshed before {exp}");
    let expires_at: Timestamp = second["expires_at"].parse().expect("a time");
    let exp = claims(&second["token"])["exp"].as_i64().expect("exp");
    assert!(
        (exp - 3..=exp).contains(&expires_at.as_second()),
        "{expires_at}, exp {exp}"
    );

    let jumps = || {
        let log = operator.log();
        log.iter()
            .filter(|l| l.contains("the clock of this machine was set"))
            .count()
    };
    let before = jumps();
    clock.set(0);
    eventually("the operator detects the second jump", async || jumps() > before).await;
    world.ready("billing", "True", "Issued").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fresh_tokens_stay_after_the_operator_clock_is_set_ahead() {
    let world = World::new("ahead").await;
    let clock = Clock::new();
    // Objects of other tests would start reconciles with the wrong time before the operator detects the jump.
    let flags = ["--watch-namespaces", &world.name];
    let kubeconfig = &world.cluster.kubeconfig;
    let mut operator = Operator::start_in(kubeconfig, &world.selector(), &flags, &clock.environment()).await;
    world.instance().await;
    // By the clock that the test sets below, the token has been due for half a minute.
    world
        .simple("billing", json!({"tokenType": "JWT", "lifetimeSeconds": 315}))
        .await;
    world.ready("billing", "True", "Issued").await;
    // The operator must not decide on any token before it knows the server's time.
    let late = json!({"path": "/.well-known/openid-configuration", "latencyMillis": 1000});
    world.issuer.fault(late).await;
    clock.set(240);
    operator.await_line("the clock of this machine was set").await;
    let skew = format!("clock_skew_seconds{{zitadel_instance=\"{}\"}} -2", world.instance);
    eventually("the operator knows that the server is behind", async || {
        operator.get("/metrics").await.1.contains(&skew)
    })
    .await;
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, 1);
    let secret = data(&world.secrets().get("billing-token").await.expect("there"));
    let expires_at: Timestamp = secret["expires_at"].parse().expect("a time");
    let exp = claims(&secret["token"])["exp"].as_i64().expect("exp");
    assert!(
        (exp - 3..=exp).contains(&expires_at.as_second()),
        "{expires_at}, exp {exp}"
    );
}
