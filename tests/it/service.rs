//! The operator as a service: probes, metrics, an orderly end, and nothing that leaks.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

use crate::support::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn probes_metrics_and_an_orderly_end() {
    let world = World::new("service").await;
    let operator = world.operator().await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "True", "Issued").await;
    assert_eq!(operator.get("/livez").await, (200, "ok\n".to_owned()));
    assert_eq!(operator.get("/readyz").await, (200, "ok\n".to_owned()));
    let (status, metrics) = operator.get("/metrics").await;
    assert_eq!(status, 200);
    assert!(
        metrics.contains("zitadel_tokens_mints_total{reason=\"Issued\"} 1"),
        "{metrics}"
    );

    let log = operator.terminate().await;
    assert!(log.last().is_some_and(|l| l.contains("stopped")), "{log:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_key_assertion_or_token_is_seen_where_it_does_not_belong() {
    let world = World::new("canary").await;
    let operator = crate::support::operator::Operator::start_with(
        &world.cluster.kubeconfig,
        &world.selector(),
        &["--log-level", "trace"],
    )
    .await;
    world.instance().await;
    let user = world
        .simple("billing", json!({"tokenType": "JWT", "lifetimeSeconds": 8}))
        .await;
    let token = world.token("billing-token").await;
    world.secret_until("billing-token", |d| d["token"] != token).await;
    world
        .secret(
            "bad-key",
            json!({"key.json": user.key.replace("serviceaccount", "robot")}),
        )
        .await;
    world
        .service_user("bad", crate::support::world::one_token("bad-token"))
        .await
        .expect("accepted");
    world.ready("bad", "False", "KeyTypeUnknown").await;

    let mut marks: Vec<String> = Vec::new();
    for request in world.issuer.requests().await {
        marks.push(request.access_token.clone());
        marks.extend(request.form["assertion"][0].as_str().map(str::to_owned));
    }
    let key: serde_json::Value = serde_json::from_str(&user.key).expect("JSON");
    marks.extend(
        key["key"]
            .as_str()
            .expect("PEM")
            .lines()
            .filter(|l| !l.starts_with('-'))
            .map(str::to_owned),
    );
    marks.retain(|mark| mark.len() > 20);
    assert!(marks.len() > 20, "keys, assertions and tokens to look for");

    let (_, metrics) = operator.get("/metrics").await;
    let statuses = format!(
        "{:?}",
        world
            .users()
            .list(&kube::api::ListParams::default())
            .await
            .expect("listed")
            .items
    );
    let events: kube::Api<k8s_openapi::api::events::v1::Event> =
        kube::Api::namespaced(world.client.clone(), &world.name);
    let events = format!(
        "{:?}",
        events
            .list(&kube::api::ListParams::default())
            .await
            .expect("listed")
            .items
    );
    let log = operator.terminate().await.join("\n");
    for mark in &marks {
        for shown in [mark.clone(), STANDARD.encode(mark)] {
            for (place, text) in [
                ("log", &log),
                ("metrics", &metrics),
                ("status", &statuses),
                ("Events", &events),
            ] {
                assert!(!text.contains(&shown), "a secret is in the {place}");
            }
        }
    }
}
