//! The operator as a service: probes, metrics, an orderly end.

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
    assert!(metrics.contains("result=\"success\",reason=\"Issued\"} 1"), "{metrics}");

    let log = operator.terminate().await;
    assert!(log.last().is_some_and(|l| l.contains("stopped")), "{log:?}");
}
