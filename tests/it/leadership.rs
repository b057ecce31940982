//! Replicas that stand by for each other. Crashes and partitions take as long as a lease: tests/soak/failover.rs.

use std::time::{Duration, Instant};

use kube::api::DeleteParams;
use serde_json::json;

use crate::support::eventually;
use crate::support::operator::Operator;
use crate::support::replicas::Replicas;
use crate::support::world::World;

/// A lease that was not given back lasts longer: 14 s from its last renewal, and one is renewed every 3 s. That it takes
/// moments is for the soak test, which has the machine for itself.
const HANDED_OVER: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn of_two_that_start_together_one_leads_and_the_other_takes_over_when_it_ends() {
    let world = World::new("leaders").await;
    let replicas = Replicas::of(&world).await;
    let (a, b) = tokio::join!(replicas.start("a"), replicas.start("b"));
    let one = async || {
        let led = |o: &Operator| o.log().iter().any(|l| l.contains(" leading"));
        led(&a) || led(&b)
    };
    eventually("one leads", one).await;
    let (name, leader, other, standby) = match replicas.leader().await.as_deref() {
        Some("a") => ("a", a, "b", b),
        Some("b") => ("b", b, "a", a),
        leader => panic!("{leader:?} leads"),
    };
    // Longer than a lease lasts: a mint may begin all the same.
    let mut spec = world.instance_spec();
    spec["connection"]["timeout"] = json!("60s");
    world.apply_instance(spec).await.expect("an instance");
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "True", "Issued").await;
    world.sentinel().await;

    // It watches and does nothing, and nothing there is late.
    assert_eq!(standby.get("/readyz").await, (200, "ok\n".to_owned()));
    assert!(leader.passes().await > 0);
    assert_eq!(standby.passes().await, 0);
    let metrics = standby.get("/metrics").await.1;
    let oldest = "zitadel_tokens_queue_oldest_seconds{kind=\"ZitadelServiceUser\"} 0.0";
    assert!(metrics.contains(oldest), "{metrics}");
    let transitions = replicas.led_by(name).await.lease_transitions;

    // Whoever deletes the Lease frees nothing: its holder, who does not know yet, makes it anew.
    let deleted = replicas
        .leases()
        .delete("zitadel-tokens", &DeleteParams::default())
        .await;
    deleted.expect("deleted");
    eventually("made anew", async || {
        let lease = replicas.leases().get_opt("zitadel-tokens").await;
        lease.expect("readable").is_some()
    })
    .await;
    assert_eq!(replicas.leader().await.as_deref(), Some(name));

    let ended = Instant::now();
    let log = leader.terminate().await;
    world.renew("billing").await;
    let spec = replicas.led_by(other).await;
    let took = ended.elapsed();
    assert!(took < HANDED_OVER, "{took:?}");
    assert_eq!(spec.lease_transitions, transitions.map(|n| n + 1));
    assert!(log.iter().any(|l| l.contains("the lease was given back")), "{log:?}");
    eventually("renewed", async || world.issuer.mints().await == 2).await;
    println!(
        "led by the other after {:.1} s, renewed after {:.1} s",
        took.as_secs_f64(),
        ended.elapsed().as_secs_f64()
    );
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, 2);
    let log = standby.terminate().await;
    assert!(log.iter().any(|l| l.contains("the lease was given back")), "{log:?}");
}
