//! The operator as a service: probes, metrics and shutdown.

use serde_json::json;

use tokio::net::TcpStream;

use crate::support::eventually;
use crate::support::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn probes_and_metrics_are_served_and_shutdown_is_clean() {
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

#[tokio::test(flavor = "multi_thread")]
async fn port_answers_during_shutdown_and_open_connections_do_not_delay_it() {
    let world = World::new("port").await;
    let mut operator = world.operator().await;
    world.instance().await;
    let slow = json!({"path": "/oauth/v2/token", "afterHandling": true, "latencyMillis": 3000});
    world.issuer.fault(slow).await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    eventually("the first token request is in flight", async || {
        world.issuer.mints().await == 1
    })
    .await;
    operator.signal("TERM");
    operator.await_line("shutting down").await;
    let _idle = TcpStream::connect(operator.address()).await.expect("connected");
    assert_eq!(operator.get("/livez").await, (200, "ok\n".to_owned()));
    operator.terminate().await;
    world.token("billing-token").await;
}
