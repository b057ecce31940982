//! What the operator may send to each dialled host: its request budget, concurrency limit and circuit breakers, shared
//! by all instances that dial it. `domain/backoff.rs` has the wait after the server's own limit, a 429.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::domain::failure::Failure;
use crate::domain::limits::Bucket;
use crate::zitadel::circuit_breaker::Breaker;
use crate::zitadel::clock::Clock;
use crate::zitadel::settings::{RequestBudget, Settings};
use crate::zitadel::transport::{Dial, Transport, dial};

impl RequestBudget {
    /// If two instances dial one host, the smaller value of each limit applies
    /// (docs/adr/0013-request-budget-per-host.md).
    fn min(self, other: Self) -> Self {
        Self {
            per_second: self.per_second.min(other.per_second),
            burst: self.burst.min(other.burst),
            concurrent: self.concurrent.min(other.concurrent),
        }
    }
}

/// The limits for one host, reached with one set of connection settings.
#[derive(Debug)]
pub struct Limits {
    budget: Arc<Budget>,
    breaker: Arc<Breaker>,
}

/// The request budget of a host, whatever the connection settings.
#[derive(Debug)]
struct Budget {
    started: Instant,
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    budget: RequestBudget,
    bucket: Bucket,
    slots: Arc<Semaphore>,
}

impl Limits {
    /// The circuit breaker for this host and these connection settings.
    #[must_use]
    pub fn breaker(&self) -> &Arc<Breaker> {
        &self.breaker
    }

    /// Waits for a concurrency slot and for the request budget. The permit keeps the slot until it is dropped.
    pub async fn admit(&self) -> Option<OwnedSemaphorePermit> {
        let slots = self.budget.lock().slots.clone();
        let permit = slots.acquire_owned().await.ok()?;
        let wait = self.budget.lock().bucket.take(self.budget.elapsed());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        Some(permit)
    }
}

impl Budget {
    fn new(budget: RequestBudget) -> Self {
        Self {
            started: Instant::now(),
            now: Mutex::new(Now {
                budget,
                bucket: Bucket::new(budget.per_second, budget.burst),
                slots: Arc::new(Semaphore::new(budget.concurrent.max(1))),
            }),
        }
    }

    fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    fn change(&self, budget: RequestBudget) {
        let mut now = self.lock();
        now.bucket.resize(budget.per_second, budget.burst);
        if now.budget.concurrent != budget.concurrent {
            // Requests in flight finish with their permits of the old semaphore.
            now.slots = Arc::new(Semaphore::new(budget.concurrent.max(1)));
        }
        now.budget = budget;
    }

    fn lock(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The limits of all hosts, the way to them, and the clock that theirs are compared with.
pub struct Hosts {
    dial: Dial,
    clock: Clock,
    known: Mutex<HashMap<String, Host>>,
}

#[derive(Debug)]
struct Host {
    budget: Arc<Budget>,
    /// The budget in the spec of each instance that dials this host.
    wanted: BTreeMap<String, RequestBudget>,
    /// By hash of the connection settings: a failure with the settings of one instance says nothing about other
    /// settings.
    breakers: HashMap<String, Weak<Breaker>>,
}

impl Default for Hosts {
    fn default() -> Self {
        Self::new(Box::new(dial), Clock::default())
    }
}

impl Hosts {
    /// No hosts yet, to be reached this way, for a process with this clock.
    #[must_use]
    pub fn new(dial: Dial, clock: Clock) -> Self {
        Self {
            dial,
            clock,
            known: Mutex::default(),
        }
    }

    /// The operator's clock.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The transport to an instance.
    pub fn transport(&self, settings: &Settings) -> Result<Box<dyn Transport>, Failure> {
        (self.dial)(settings)
    }

    /// Registers that `instance` dials `host` with this budget and with the connection settings whose hash is `way`.
    /// Returns the limits that apply.
    pub fn dial(&self, instance: &str, host: &str, way: &str, budget: RequestBudget) -> Arc<Limits> {
        self.unregister(instance);
        let mut hosts = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let host = hosts.entry(host.to_owned()).or_insert_with(|| Host {
            budget: Arc::new(Budget::new(budget)),
            wanted: BTreeMap::new(),
            breakers: HashMap::new(),
        });
        host.wanted.insert(instance.to_owned(), budget);
        let smallest = host.wanted.values().copied().fold(budget, RequestBudget::min);
        host.budget.change(smallest);
        host.breakers.retain(|_, breaker| breaker.strong_count() > 0);
        let breaker = host.breakers.get(way).and_then(Weak::upgrade).unwrap_or_default();
        host.breakers.insert(way.to_owned(), Arc::downgrade(&breaker));
        let budget = host.budget.clone();
        Arc::new(Limits { budget, breaker })
    }

    /// Unregisters `instance`. The used budget of a host stays until the process ends, so that deleting and recreating
    /// an instance does not reset it.
    pub fn unregister(&self, instance: &str) {
        let mut hosts = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for host in hosts.values_mut() {
            if host.wanted.remove(instance).is_some()
                && let Some(smallest) = host.wanted.values().copied().reduce(RequestBudget::min)
            {
                host.budget.change(smallest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smallest_rate_of_the_dialling_instances_applies() {
        let budget = |per_second| RequestBudget {
            per_second,
            burst: 10,
            concurrent: 8,
        };
        let hosts = Hosts::default();
        let limits = hosts.dial("a", "h", "", budget(5));
        let now = || limits.budget.lock().budget.per_second;
        hosts.dial("b", "h", "by a proxy", budget(1));
        assert_eq!(now(), 1);
        hosts.unregister("b");
        assert_eq!(now(), 5);
        hosts.dial("a", "h", "", budget(50));
        assert_eq!(now(), 50, "a raised rate takes effect");
    }

    #[test]
    fn instances_share_a_breaker_only_with_equal_connection_settings() {
        let budget = RequestBudget {
            per_second: 1,
            burst: 1,
            concurrent: 1,
        };
        let hosts = Hosts::default();
        let [one, same, other] = ["a", "a", "b"].map(|way| hosts.dial(way, "h", way, budget));
        for _ in 0..3 {
            let _ = one.breaker().record_discovery("one", Err(Failure::Tls));
        }
        let open = [&one, &same, &other].map(|limits| limits.breaker().is_open());
        assert_eq!(open, [true, true, false]);
    }
}
