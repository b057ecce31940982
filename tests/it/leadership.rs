//! Leader election between replicas. Crashes and partitions take as long as a lease lasts: see tests/soak/failover.rs.

use std::time::{Duration, Instant};

use kube::api::DeleteParams;
use serde_json::json;

use crate::support::eventually;
use crate::support::operator::Operator;
use crate::support::replicas::Replicas;
use crate::support::world::World;

/// Shorter than the time until an unreleased lease expires: 14 s from its last renewal, which happens every 3 s. The
/// soak test, which has the machine to itself, checks that the handover takes only moments.
const HANDED_OVER: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_replicas_leads_and_the_standby_takes_over_when_it_stops() {
    let world = World::new("leaders").await;
    let replicas = Replicas::of(&world).await;
    let (a, b) = tokio::join!(replicas.start("a"), replicas.start("b"));
    let has_leader = async || {
        let leads = |o: &Operator| o.log().iter().any(|l| l.contains("this replica is now the leader"));
        leads(&a) || leads(&b)
    };
    eventually("one replica leads", has_leader).await;
    let (name, leader, other, standby) = match replicas.leader().await.as_deref() {
        Some("a") => ("a", a, "b", b),
        Some("b") => ("b", b, "a", a),
        leader => panic!("{leader:?} leads"),
    };
    // The timeout is longer than a lease lasts. A token request may start nevertheless.
    let mut spec = world.instance_spec();
    spec["connection"]["timeout"] = json!("60s");
    world.apply_instance(spec).await.expect("an instance");
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "True", "Issued").await;
    world.sentinel().await;

    // The standby watches but reconciles nothing, and reports no overdue work.
    assert_eq!(standby.get("/readyz").await, (200, "ok\n".to_owned()));
    assert!(leader.passes().await > 0);
    assert_eq!(standby.passes().await, 0);
    let metrics = standby.get("/metrics").await.1;
    let oldest = "zitadel_tokens_queue_oldest_seconds{kind=\"ZitadelServiceUser\"} 0.0";
    assert!(metrics.contains(oldest), "{metrics}");
    let transitions = replicas.led_by(name).await.lease_transitions;

    // Deleting the Lease does not end leadership: the leader creates it again.
    let deleted = replicas
        .leases()
        .delete("zitadel-tokens", &DeleteParams::default())
        .await;
    deleted.expect("deleted");
    eventually("the leader creates the Lease again", async || {
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
    assert!(log.iter().any(|l| l.contains("lease released")), "{log:?}");
    eventually("the new leader refreshes the token", async || {
        world.issuer.mints().await == 2
    })
    .await;
    println!(
        "the standby led after {:.1} s and refreshed the token after {:.1} s",
        took.as_secs_f64(),
        ended.elapsed().as_secs_f64()
    );
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, 2);
    let log = standby.terminate().await;
    assert!(log.iter().any(|l| l.contains("lease released")), "{log:?}");
}
