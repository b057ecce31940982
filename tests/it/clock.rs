//! Clocks that are not right: the server's, and the operator's own.

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::json;

use crate::support::clock::Clock;
use crate::support::eventually;
use crate::support::operator::Operator;
use crate::support::world::{World, claims, data};

#[tokio::test(flavor = "multi_thread")]
async fn a_server_two_minutes_behind_has_its_tokens_kept_fresh_and_its_skew_told() {
    let world = World::new("skew").await;
    world.issuer.settings(json!({"clockOffsetMillis": -120_000})).await;
    let operator = world.operator().await;
    world.instance().await;
    let server_now = || Timestamp::now() - SignedDuration::from_secs(120);

    // By our clock a token of a minute is expired when it is minted.
    world
        .simple("billing", json!({"tokenType": "JWT", "lifetimeSeconds": 60}))
        .await;
    world
        .simple("orders", json!({"tokenType": "JWT", "lifetimeSeconds": 20}))
        .await;
    let status = world.ready("billing", "True", "Issued").await.status.expect("a status");
    let token = world.token("billing-token").await;
    let exp = claims(&token)["exp"].as_i64().expect("exp");
    let told = status.expires_at.expect("an expiry").0;
    assert!(
        (exp - 3..=exp).contains(&told.as_second()),
        "{told} by the server's clock, exp {exp}"
    );
    let instance = world.instance_ready("True", "InstanceReady").await;
    assert_eq!(instance.status.and_then(|s| s.clock_skew).as_deref(), Some("-120s"));

    // A refresh comes in time by the server's clock.
    let first = world.token("orders-token").await;
    let second = world.secret_until("orders-token", |data| data["token"] != first).await;
    let exp = claims(&first)["exp"].as_i64().expect("exp");
    assert!(server_now().as_second() < exp, "refreshed before {exp}");
    assert_ne!(second["token"], first);

    // Who starts knows nothing of the skew, and mints nothing before it does.
    operator.terminate().await;
    let slow = json!({"path": "/.well-known/openid-configuration", "latencyMillis": 300});
    world.issuer.fault(slow).await;
    let _operator = world.operator().await;
    world.simple("late", json!({"tokenType": "JWT"})).await;
    world.ready("late", "True", "Issued").await;
    assert_eq!(world.token("billing-token").await, token);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_half_an_hour_away_gets_no_assertion_until_its_clock_is_mended() {
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

#[tokio::test(flavor = "multi_thread")]
async fn our_own_clock_may_be_set_back_and_no_token_expires() {
    let world = World::new("jump").await;
    let clock = Clock::new();
    let mut operator = Operator::start_on_clock(world.cluster, &world.selector(), &clock).await;
    world.instance().await;
    world
        .simple("billing", json!({"tokenType": "JWT", "lifetimeSeconds": 40}))
        .await;
    let first = world.token("billing-token").await;

    // By this clock the token is due in more than four minutes.
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

    let noticed = || {
        let log = operator.log();
        log.iter()
            .filter(|l| l.contains("the clock of this machine was set"))
            .count()
    };
    let before = noticed();
    clock.set(0);
    eventually("the second jump is noticed", async || noticed() > before).await;
    world.ready("billing", "True", "Issued").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn our_own_clock_may_be_set_ahead_and_what_is_fresh_stays() {
    let world = World::new("ahead").await;
    let clock = Clock::new();
    // The objects of other tests would wake its queue before the jump is noticed, and then the wrong time counts.
    let flags = ["--watch-namespaces", &world.name];
    let kubeconfig = &world.cluster.kubeconfig;
    let mut operator = Operator::start_in(kubeconfig, &world.selector(), &flags, &clock.environment()).await;
    world.instance().await;
    // By the clock that comes, it is due half a minute ago.
    world
        .simple("billing", json!({"tokenType": "JWT", "lifetimeSeconds": 315}))
        .await;
    world.ready("billing", "True", "Issued").await;
    // Nobody may be judged before the server has told its time.
    let late = json!({"path": "/.well-known/openid-configuration", "latencyMillis": 1000});
    world.issuer.fault(late).await;
    clock.set(240);
    operator.await_line("the clock of this machine was set").await;
    let skew = format!("clock_skew_seconds{{zitadel_instance=\"{}\"}} -2", world.instance);
    eventually("the server is known to be behind", async || {
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
