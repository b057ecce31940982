//! What the response to a token request says about the host, for the circuit breaker.

use crate::controller::Context;
use crate::domain::failure::{Failure, classify};
use crate::domain::reason::Reason;
use crate::zitadel::{Permit, ZitadelClient};

/// What a request says about the host.
#[derive(Clone, Copy)]
pub enum Evidence {
    /// It works.
    Healthy,
    /// The token request failed for a reason that may concern the host.
    Failure(Failure),
    /// Discovery failed, so that no token was requested.
    DiscoveryFailure(Failure),
    /// It says nothing.
    Nothing,
}

/// The reason of a failed token request, and what it says about the host. Discovery tells a refused key from an outage.
pub async fn judge(ctx: &Context, client: &ZitadelClient, failure: Failure) -> (Reason, Evidence) {
    let mut discovery_works = false;
    if failure.is_ambiguous() {
        let discovered = client.discover().await.map(drop);
        discovery_works = discovered.is_ok();
        ctx.record_discovery(client, discovered);
    }
    let evidence = match failure {
        _ if discovery_works => Evidence::Nothing,
        Failure::Known(_) => Evidence::Nothing,
        _ if failure.is_refusal() => Evidence::Healthy,
        _ => Evidence::Failure(failure),
    };
    (classify(failure, discovery_works), evidence)
}

/// Tells the circuit breaker what a token request says about the host. Returns whether the status of the instance may be
/// outdated.
pub fn record_evidence(ctx: &Context, client: &ZitadelClient, permit: Permit, evidence: Evidence) -> bool {
    let name = &client.settings().name;
    match evidence {
        Evidence::Healthy => {
            if permit.record_success() {
                ctx.breaker_closed(client.limits().breaker());
            }
            // Service users may wait for an instance that is not Ready.
            return !ctx.connections.is_ready(name);
        }
        Evidence::Failure(failure) => permit.record_failure(failure, client.retry_in(failure)),
        Evidence::DiscoveryFailure(failure) => {
            permit.record_discovery_failure(name, failure, client.retry_in(failure));
        }
        Evidence::Nothing => drop(permit),
    }
    false
}
