//! Places in a sequence of requests where a test kills the operator.

use std::sync::Arc;

use serde_json::json;

use crate::support::eventually;
use crate::support::issuer::Issuer;
use crate::support::proxy::{Hold, Proxy};

/// Where the operator is killed.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// At the n-th such request to the API server, before it takes effect or after.
    Kubernetes(&'static str, &'static str, usize, bool),
    /// At a request to ZITADEL, before it takes effect or after.
    Zitadel(&'static str, bool),
}

/// Does what begins the sequence, and waits until the operator is at the place.
pub async fn stop_at(issuer: &Issuer, proxy: &Proxy, place: Place, begin: impl AsyncFnOnce()) -> Option<Arc<Hold>> {
    let hold = |method, piece, after| {
        if after {
            proxy.hold_after(method, piece)
        } else {
            proxy.hold_before(method, piece)
        }
    };
    match place {
        Place::Kubernetes(method, piece, nth, after) => {
            let mut at = hold(method, piece, after && nth == 1);
            begin().await;
            for n in 2..=nth {
                at.reached().await;
                let next = hold(method, piece, after && n == nth);
                at.release();
                at = next;
            }
            at.reached().await;
            Some(at)
        }
        Place::Zitadel(path, after) => {
            let count = async || {
                let requests = issuer.requests().await;
                requests.iter().filter(|request| request.path == path).count()
            };
            let before = count().await;
            issuer
                .fault(json!({"path": path, "times": 1, "hang": true, "afterHandling": after}))
                .await;
            begin().await;
            eventually("the request is there", async || count().await > before).await;
            None
        }
    }
}
