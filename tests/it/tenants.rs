//! No tenant hurts another: what the server does to the requests of one, it need not do to those of another.

use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::issuer::{Issuer, User};
use crate::support::operator::Operator;
use crate::support::world::{World, one_token};

const TOKEN: &str = "/oauth/v2/token";

/// A user whose token requests go wrong in this way.
async fn troubled(world: &World, mut fault: Value) -> User {
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    fault["path"] = json!(TOKEN);
    fault["userId"] = json!(user.id);
    world.issuer.fault(fault).await;
    user
}

/// So many service users with the key of `user`.
async fn service_users(world: &World, user: &User, count: usize) {
    world.key_secret("key", user).await;
    for i in 0..count {
        let mut spec = one_token(&format!("user-{i}-token"));
        spec["keySecretRef"] = json!({"name": "key"});
        world.service_user(&format!("user-{i}"), spec).await.expect("accepted");
    }
}

async fn fail(world: &World, count: usize, reason: &str) {
    for i in 0..count {
        world.ready(&format!("user-{i}"), "False", reason).await;
    }
}

async fn circuit_is_open(operator: &Operator, world: &World) -> bool {
    let (_, metrics) = operator.get("/metrics").await;
    let circuit = format!(
        "zitadel_tokens_instance_circuit_open{{zitadel_instance=\"{}\"}} ",
        world.instance
    );
    let (_, value) = metrics.split_once(&circuit).expect("the metric");
    value.starts_with('1')
}

#[tokio::test(flavor = "multi_thread")]
async fn two_tenants_whose_requests_hang_do_not_hold_up_a_third() {
    let one = World::new("hang").await;
    let two = World::beside(&one, "two").await;
    one.instance_for_all().await;
    let user = troubled(&one, json!({"hang": true})).await;
    service_users(&one, &user, 12).await;
    service_users(&two, &user, 12).await;
    // Theirs are all under way when the third comes. Each ends after the 10 seconds that a request may take.
    let _operator = one.operator().await;
    eventually("they hang", async || {
        let requests = one.issuer.requests().await;
        requests.iter().filter(|r| r.user_id == user.id).count() >= 7
    })
    .await;
    let third = World::beside(&one, "third").await;
    third.simple("quick", json!({"tokenType": "JWT"})).await;
    third.token("quick-token").await;
    let still = one.issuer.requests().await;
    let still = still.iter().filter(|r| r.user_id == user.id).count();
    assert_eq!(still, 7, "it waited for none of them");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_hangs_does_not_hold_up_another() {
    let slow = World::with_issuer("slow", Issuer::start(&[])).await;
    let quick = World::with_issuer("quick", Issuer::start(&[])).await;
    slow.instance_for_all().await;
    quick.instance().await;
    let user = troubled(&slow, json!({"hang": true})).await;
    let others = [World::beside(&slow, "two").await, World::beside(&slow, "three").await];
    for world in others.iter().chain([&slow]) {
        service_users(world, &user, 12).await;
    }
    let selector = format!("test in ({}, {})", slow.instance, quick.instance);
    let _operator = Operator::start(slow.cluster, &selector).await;
    let hanging = async || {
        let requests = slow.issuer.requests().await;
        requests.iter().filter(|r| r.path == TOKEN).count()
    };
    eventually("they hang", async || hanging().await >= 8).await;
    quick.simple("billing", json!({"tokenType": "JWT"})).await;
    quick.token("billing-token").await;
    assert_eq!(hanging().await, 8, "it waited for none of them");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_whose_connections_break_does_not_close_the_way_for_others() {
    let world = World::new("broken").await;
    let operator = world.operator().await;
    world.instance().await;
    let user = troubled(&world, json!({"reset": true, "afterHandling": true})).await;
    service_users(&world, &user, 5).await;
    fail(&world, 5, "InstanceUnreachable").await;
    assert!(!circuit_is_open(&operator, &world).await);
    world.simple("good", json!({"tokenType": "JWT"})).await;
    world.token("good-token").await;
}

/// Up to v4.13 a refused key is a 500 like an outage.
#[tokio::test(flavor = "multi_thread")]
async fn keys_that_an_older_server_refuses_do_not_close_the_way_for_others() {
    let world = World::new("refused").await;
    let other = World::beside(&world, "other").await;
    let operator = world.operator().await;
    world.instance_for_all().await;
    world.issuer.settings(json!({"dialect": "errors_internal"})).await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.issuer.remove_key(&user.id, &user.key_id).await;
    for of in [&world, &other] {
        service_users(of, &user, 3).await;
        fail(of, 3, "KeyRejected").await;
    }
    assert!(!circuit_is_open(&operator, &world).await);
}

/// Three users in two namespaces look like an outage, and so they may; but the first of another one shows that it is none.
#[tokio::test(flavor = "multi_thread")]
async fn tenants_for_whom_the_server_fails_do_not_keep_out_others() {
    let one = World::new("fails").await;
    let two = World::beside(&one, "two").await;
    let operator = one.operator().await;
    one.instance_for_all().await;
    let user = troubled(&one, json!({"status": 503})).await;
    for of in [&one, &two] {
        service_users(of, &user, 8).await;
    }
    eventually("the circuit opens", async || circuit_is_open(&operator, &one).await).await;
    // Whoever of them may try fails, and more often than anybody.
    for of in [&one, &two] {
        fail(of, 8, "ServerError").await;
    }
    let good = World::beside(&one, "good").await;
    good.simple("good", json!({"tokenType": "JWT"})).await;
    good.token("good-token").await;
}

/// The circuit is that of the host.
#[tokio::test(flavor = "multi_thread")]
async fn when_a_host_works_again_the_users_of_all_its_instances_come() {
    let one = World::new("share").await;
    let two = World::beside(&one, "two")
        .await
        .with_instance(&format!("{}-two", one.instance));
    let selector = format!("test in ({}, {})", one.instance, two.instance);
    let operator = Operator::start(one.cluster, &selector).await;
    for world in [&one, &two] {
        world.instance_for_all().await;
    }
    one.issuer.fault(json!({"path": TOKEN, "status": 503})).await;
    let user = one.issuer.user(json!({"tokenType": "JWT"})).await;
    for world in [&one, &two] {
        service_users(world, &user, 8).await;
        fail(world, 8, "ServerError").await;
    }
    assert!(circuit_is_open(&operator, &one).await && circuit_is_open(&operator, &two).await);
    one.issuer.clear_faults().await;
    for world in [&one, &two] {
        for i in 0..8 {
            world.token(&format!("user-{i}-token")).await;
        }
    }
    assert_eq!(one.issuer.mints().await, 16);
}

/// A pass that takes long does not go by what was true when it began.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_suspends_sees_no_further_mint() {
    let world = World::new("midway").await;
    world.instance().await;
    let user = troubled(&world, json!({"latencyMillis": 2000})).await;
    world.key_secret("key", &user).await;
    let token = |name: &str| one_token(&format!("{name}-token"))["tokens"][0].clone();
    let mut spec = json!({"keySecretRef": {"name": "key"}, "tokens": [token("a"), token("b"), token("c")]});
    for (i, name) in ["a", "b", "c"].into_iter().enumerate() {
        spec["tokens"][i]["name"] = json!(name);
    }
    world.service_user("billing", spec.clone()).await.expect("accepted");
    let _operator = world.operator().await;
    let asked = async || {
        let requests = world.issuer.requests().await;
        requests.iter().filter(|r| r.path == TOKEN).count()
    };
    // By one more request the id of the ZITADEL API's project is learned.
    eventually("the first is under way", async || asked().await == 2).await;
    spec["suspend"] = json!(true);
    world.service_user("billing", spec.clone()).await.expect("accepted");
    world.ready("billing", "False", "Suspended").await;
    assert_eq!(asked().await, 2);
    // What it brought is not lost.
    let first = world.token("a-token").await;
    spec["suspend"] = json!(false);
    world.service_user("billing", spec).await.expect("accepted");
    world.ready("billing", "True", "Issued").await;
    assert_eq!(world.token("a-token").await, first);
    assert_eq!(world.issuer.mints().await, 3);
}
