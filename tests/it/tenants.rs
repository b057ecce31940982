//! Isolation of tenants: failing requests of one tenant do not affect another.

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tokio::net::{TcpSocket, TcpStream};

use crate::support::eventually;
use crate::support::issuer::{Issuer, User};
use crate::support::operator::Operator;
use crate::support::world::{World, everything, one_token};

const TOKEN: &str = "/oauth/v2/token";

/// A user whose token requests fail in this way.
async fn user_with_fault(world: &World, mut fault: Value) -> User {
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    fault["path"] = json!(TOKEN);
    fault["userId"] = json!(user.id);
    world.issuer.fault(fault).await;
    user
}

/// Creates `count` service users with the key of `user`.
async fn service_users(world: &World, user: &User, count: usize) {
    world.key_secret("key", user).await;
    for i in 0..count {
        let mut spec = one_token(&format!("user-{i}-token"));
        spec["keySecretRef"] = json!({"name": "key"});
        world.service_user(&format!("user-{i}"), spec).await.expect("accepted");
    }
}

async fn wait_until_not_ready(world: &World, count: usize, reason: &str) {
    for i in 0..count {
        world.ready(&format!("user-{i}"), "False", reason).await;
    }
}

/// `None` before the operator has connected to the instance.
async fn circuit_is_open(operator: &Operator, world: &World) -> Option<bool> {
    let (_, metrics) = operator.get("/metrics").await;
    let circuit = format!(
        "zitadel_tokens_instance_circuit_open{{zitadel_instance=\"{}\"}} ",
        world.instance
    );
    let (_, value) = metrics.split_once(&circuit)?;
    Some(value.starts_with('1'))
}

#[tokio::test(flavor = "multi_thread")]
async fn hanging_requests_of_two_tenants_do_not_delay_a_third() {
    let one = World::new("hang").await;
    let two = World::beside(&one, "two").await;
    one.instance_for_all().await;
    let user = user_with_fault(&one, json!({"hang": true})).await;
    service_users(&one, &user, 12).await;
    service_users(&two, &user, 12).await;
    let third = World::beside(&one, "third").await;
    let quick = third.issuer.user(json!({"tokenType": "JWT"})).await;
    third.key_secret("quick-key", &quick).await;
    // All their requests are in flight when the third tenant arrives. Each ends at the request timeout of 10 seconds.
    let _operator = one.operator().await;
    eventually("the requests hang", async || {
        let requests = one.issuer.requests().await;
        requests.iter().filter(|r| r.user_id == user.id).count() >= 6
    })
    .await;
    third
        .service_user("quick", one_token("quick-token"))
        .await
        .expect("accepted");
    third.token("quick-token").await;
    let before = one.issuer.requests().await.into_iter();
    let before = before.take_while(|r| r.user_id != quick.id);
    let in_flight = before.filter(|r| r.user_id == user.id).count();
    assert_eq!(in_flight, 6, "the quick request waited for no hanging request");
}

#[tokio::test(flavor = "multi_thread")]
async fn hanging_instance_does_not_delay_another() {
    let slow = World::with_issuer("slow", Issuer::start(&[])).await;
    let quick = World::with_issuer("quick", Issuer::start(&[])).await;
    slow.instance_for_all().await;
    quick.instance().await;
    let user = user_with_fault(&slow, json!({"hang": true})).await;
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
    eventually("the requests hang", async || hanging().await >= 8).await;
    quick.simple("billing", json!({"tokenType": "JWT"})).await;
    quick.token("billing-token").await;
    assert_eq!(hanging().await, 8, "the quick request waited for no hanging request");
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_connections_of_one_user_do_not_open_the_breaker() {
    let world = World::new("broken").await;
    let operator = world.operator().await;
    world.instance().await;
    let user = user_with_fault(&world, json!({"reset": true, "afterHandling": true})).await;
    service_users(&world, &user, 5).await;
    wait_until_not_ready(&world, 5, "InstanceUnreachable").await;
    assert_eq!(circuit_is_open(&operator, &world).await, Some(false));
    world.simple("good", json!({"tokenType": "JWT"})).await;
    world.token("good-token").await;
}

/// Up to v4.13, ZITADEL answers a refused key with status 500, as in an outage.
#[tokio::test(flavor = "multi_thread")]
async fn keys_refused_by_older_zitadel_do_not_open_the_breaker() {
    let world = World::new("refused").await;
    let other = World::beside(&world, "other").await;
    let operator = world.operator().await;
    world.instance_for_all().await;
    world.issuer.settings(json!({"dialect": "errors_internal"})).await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.issuer.remove_key(&user.id, &user.key_id).await;
    for of in [&world, &other] {
        service_users(of, &user, 3).await;
        wait_until_not_ready(of, 3, "KeyRejected").await;
    }
    assert_eq!(circuit_is_open(&operator, &world).await, Some(false));
}

/// Failures of three users in two namespaces open the breaker. The first request of another namespace succeeds and
/// shows that there is no outage.
#[tokio::test(flavor = "multi_thread")]
async fn failing_tenants_that_open_the_breaker_do_not_block_others() {
    let one = World::new("fails").await;
    let two = World::beside(&one, "two").await;
    let operator = one.operator().await;
    one.instance_for_all().await;
    let user = user_with_fault(&one, json!({"status": 503})).await;
    for of in [&one, &two] {
        service_users(of, &user, 8).await;
    }
    eventually("the circuit opens", async || {
        circuit_is_open(&operator, &one).await == Some(true)
    })
    .await;
    // Every probe of these namespaces fails, and they send more probes than any other namespace.
    for of in [&one, &two] {
        wait_until_not_ready(of, 8, "ServerError").await;
    }
    let good = World::beside(&one, "good").await;
    good.simple("good", json!({"tokenType": "JWT"})).await;
    good.token("good-token").await;
}

/// All instances on a host share one circuit breaker.
#[tokio::test(flavor = "multi_thread")]
async fn recovered_host_serves_the_users_of_all_its_instances() {
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
        wait_until_not_ready(world, 8, "ServerError").await;
    }
    for world in [&one, &two] {
        assert_eq!(circuit_is_open(&operator, world).await, Some(true));
    }
    one.issuer.clear_faults().await;
    for world in [&one, &two] {
        for i in 0..8 {
            world.token(&format!("user-{i}-token")).await;
        }
    }
    assert_eq!(one.issuer.mints().await, 16);
}

/// Two instances use one host. The issuer of one is wrong, so the host answers its discovery with 404.
#[tokio::test(flavor = "multi_thread")]
async fn instance_with_a_wrong_issuer_does_not_affect_another_on_the_same_host() {
    const WRONG: &str = "wrong.example.com";
    let good = World::new("issuer").await;
    let wrong = World::beside(&good, "wrong").await;
    let wrong = wrong.with_instance(&format!("{}-wrong", good.instance));
    let more = World::beside(&good, "more").await.with_instance(&wrong.instance);
    let selector = format!("test in ({}, {})", good.instance, wrong.instance);
    let operator = Operator::start(good.cluster, &selector).await;
    let mut spec = good.instance_spec();
    spec["connection"]["endpoint"] = json!(good.issuer.url);
    good.allow(json!({}), everything()).await;
    wrong.allow(json!({}), everything()).await;
    good.apply_instance(spec.clone()).await.expect("an instance");
    good.instance_ready("True", "InstanceReady").await;
    spec["issuer"] = json!(format!("https://{WRONG}"));
    wrong.apply_instance(spec).await.expect("an instance");
    eventually("the operator retries discovery", async || {
        let requests = good.issuer.requests().await;
        requests.iter().filter(|r| r.instance_host == WRONG).count() >= 4
    })
    .await;
    assert_eq!(circuit_is_open(&operator, &good).await, Some(false));
    let user = good.issuer.user(json!({"tokenType": "JWT"})).await;
    for world in [&wrong, &more] {
        service_users(world, &user, 3).await;
        wait_until_not_ready(world, 3, "MalformedResponse").await;
    }
    assert_eq!(circuit_is_open(&operator, &good).await, Some(false));
    good.simple("billing", json!({"tokenType": "JWT"})).await;
    good.token("billing-token").await;
    let requests = good.issuer.requests().await;
    assert!(requests.iter().all(|r| r.instance_host != WRONG || r.path != TOKEN));
}

/// An operator starts while its host is down. No token is due, so only discovery detects the outage and its end.
#[tokio::test(flavor = "multi_thread")]
async fn discovery_closes_a_breaker_that_discovery_opened() {
    let world = World::new("restart").await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    let operator = world.operator().await;
    let token = world.token("billing-token").await;
    world.ready("billing", "True", "Issued").await;
    operator.terminate().await;

    // A reserved port that does not accept connections yet.
    let port = TcpSocket::new_v4().expect("a socket");
    port.bind("127.0.0.1:0".parse().expect("an address")).expect("bound");
    let mut spec = world.instance_spec();
    spec["connection"]["endpoint"] = json!(format!("http://{}", port.local_addr().expect("an address")));
    world.apply_instance(spec).await.expect("an instance");
    let operator = world.operator().await;
    eventually("the breaker opens", async || {
        circuit_is_open(&operator, &world).await == Some(true)
    })
    .await;

    let host = world.issuer.url.replace("http://", "");
    let port = port.listen(16).expect("listens");
    let relay = tokio::spawn(async move {
        while let Ok((mut from, _)) = port.accept().await {
            let mut to = TcpStream::connect(&host).await.expect("the issuer");
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut from, &mut to).await });
        }
    });
    eventually("the breaker closes", async || {
        circuit_is_open(&operator, &world).await == Some(false)
    })
    .await;
    world.instance_ready("True", "InstanceReady").await;
    assert_eq!(world.token("billing-token").await, token);
    assert_eq!(world.issuer.mints().await, 1);
    relay.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn host_wide_retry_after_stops_all_requests_until_it_ends() {
    const USERS: usize = 12;
    let wait = SignedDuration::from_secs(10);
    let one = World::new("quota").await;
    let worlds = [World::beside(&one, "two").await, World::beside(&one, "three").await];
    let worlds = || worlds.iter().chain([&one]);
    let _operator = one.operator().await;
    one.instance_for_all().await;
    one.instance_ready("True", "InstanceReady").await;
    let limited = json!({"path": TOKEN, "status": 429, "headers": {"Retry-After": wait.as_secs().to_string()}});
    one.issuer.fault(limited).await;
    let user = one.issuer.user(json!({"tokenType": "JWT"})).await;
    for world in worlds() {
        service_users(world, &user, USERS).await;
    }
    for world in worlds() {
        wait_until_not_ready(world, USERS, "RateLimited").await;
    }
    let token_requests = async || {
        let requests = one.issuer.requests().await.into_iter();
        let times = requests
            .filter(|r| r.path == TOKEN)
            .map(|r| r.time.parse().expect("a time"));
        times.collect::<Vec<Timestamp>>()
    };
    // By now, each token has been requested or deferred.
    let before = token_requests().await.len();
    assert!(before < 2 * USERS, "{before} requests");
    one.issuer.clear_faults().await;
    for world in worlds() {
        for i in 0..USERS {
            world.token(&format!("user-{i}-token")).await;
        }
    }
    let all = token_requests().await;
    let pause = all[before].duration_since(all[before - 1]);
    assert!(pause >= wait, "requested again after {pause:#}");
}

/// A long reconcile follows changes of the spec that are made while it runs.
#[tokio::test(flavor = "multi_thread")]
async fn suspending_stops_further_token_requests_of_a_running_reconcile() {
    let world = World::new("midway").await;
    world.instance().await;
    let user = user_with_fault(&world, json!({"latencyMillis": 2000})).await;
    world.key_secret("key", &user).await;
    let token = |name: &str| one_token(&format!("{name}-token"))["tokens"][0].clone();
    let mut spec = json!({"keySecretRef": {"name": "key"}, "tokens": [token("a"), token("b"), token("c")]});
    for (i, name) in ["a", "b", "c"].into_iter().enumerate() {
        spec["tokens"][i]["name"] = json!(name);
    }
    world.service_user("billing", spec.clone()).await.expect("accepted");
    let _operator = world.operator().await;
    let token_requests = async || {
        let requests = world.issuer.requests().await;
        requests.iter().filter(|r| r.path == TOKEN).count()
    };
    // One further request is for the id of the ZITADEL API's project.
    eventually("the first token request is in flight", async || {
        token_requests().await == 2
    })
    .await;
    spec["suspend"] = json!(true);
    world.service_user("billing", spec.clone()).await.expect("accepted");
    world.ready("billing", "False", "Suspended").await;
    assert_eq!(token_requests().await, 2);
    // The operator keeps the token of the request that was in flight.
    let first = world.token("a-token").await;
    spec["suspend"] = json!(false);
    world.service_user("billing", spec).await.expect("accepted");
    world.ready("billing", "True", "Issued").await;
    assert_eq!(world.token("a-token").await, first);
    assert_eq!(world.issuer.mints().await, 3);
}
