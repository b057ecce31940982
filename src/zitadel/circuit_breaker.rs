//! The circuit breaker that instances share if they reach one host in the same way, and the permit for one token
//! request.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::domain::circuit_breaker::{Admission, CircuitBreaker, Refused};
use crate::domain::failure::Failure;
use crate::domain::object_ref::ObjectRef;

/// A circuit breaker with its own monotonic clock, behind a lock.
#[derive(Debug)]
pub struct Breaker {
    started: Instant,
    state: Mutex<CircuitBreaker>,
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            state: Mutex::default(),
        }
    }
}

impl Breaker {
    /// Requests permission to send a token request for `user`.
    pub fn admit(self: &Arc<Self>, user: &ObjectRef) -> Result<Permit, Refused> {
        let admission = self.lock().admit(self.now(), user)?;
        Ok(Permit {
            breaker: self.clone(),
            admission,
            ended: false,
        })
    }

    /// Records the outcome of a discovery of `instance`. Returns true if this closed the breaker.
    #[must_use]
    pub fn record_discovery(&self, instance: &str, ended: Result<(), Failure>) -> bool {
        self.lock().record_discovery(self.now(), instance, ended)
    }

    /// Whether the breaker refuses token requests.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.lock().is_open(self.now())
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, CircuitBreaker> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Permission to send one token request. Dropping it without an outcome releases the probe and counts as no evidence,
/// so an aborted reconcile does not block later probes.
#[derive(Debug)]
#[must_use]
pub struct Permit {
    breaker: Arc<Breaker>,
    admission: Admission,
    ended: bool,
}

impl Permit {
    /// Records a success: a token, or a refusal that shows that the host works. Returns true if this closed the
    /// breaker.
    #[must_use]
    pub fn record_success(mut self) -> bool {
        self.ended = true;
        self.breaker.lock().record_success(self.breaker.now(), &self.admission)
    }

    /// Records a failure. The server asked to wait for `retry_after`, counted from now.
    pub fn record_failure(mut self, failure: Failure, retry_after: Duration) {
        self.ended = true;
        let mut breaker = self.breaker.lock();
        breaker.record_failure(self.breaker.now(), &self.admission, failure, retry_after);
    }

    /// Records that no token was requested, because discovery of `instance` failed.
    pub fn record_discovery_failure(mut self, instance: &str, failure: Failure, retry_after: Duration) {
        self.ended = true;
        let mut breaker = self.breaker.lock();
        breaker.record_no_discovery(self.breaker.now(), &self.admission, instance, failure, retry_after);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if !self.ended {
            let mut breaker = self.breaker.lock();
            breaker.release(self.breaker.now(), &self.admission);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn dropped_probe_frees_its_slot() {
        let breaker = Arc::new(Breaker::default());
        let user = |name: &str| ObjectRef::new("shop", name);
        for _ in 0..3 {
            let permit = breaker.admit(&user("billing")).expect("closed");
            permit.record_failure(Failure::Connect, Duration::ZERO);
        }
        assert!(breaker.is_open());
        tokio::time::advance(Duration::from_secs(1)).await;
        let probe = breaker.admit(&user("billing")).expect("a probe");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(breaker.admit(&user("orders")).is_err());
        drop(probe);
        // A namespace whose probe had no outcome waits 1 s before its next probe.
        tokio::time::advance(Duration::from_secs(1)).await;
        let probe = breaker.admit(&user("orders")).expect("the next probe");
        assert!(probe.record_success() && !breaker.is_open());
    }
}
