//! Budget and concurrency toward each dialled host, shared by all instances that dial it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::domain::limits::Bucket;

/// The limits of one host.
#[derive(Debug)]
pub struct Limits {
    started: Instant,
    bucket: Mutex<Bucket>,
    slots: Semaphore,
}

impl Limits {
    /// Waits for a place among the concurrent requests and for the budget. The place is held until the permit drops.
    pub async fn admit(&self) -> Option<SemaphorePermit<'_>> {
        let permit = self.slots.acquire().await.ok()?;
        let wait = self
            .bucket
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take(self.started.elapsed());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        Some(permit)
    }
}

/// The limits of all hosts.
#[derive(Debug, Default)]
pub struct Hosts {
    limits: Mutex<HashMap<String, Host>>,
}

#[derive(Debug)]
struct Host {
    limits: Arc<Limits>,
    per_second: u32,
    burst: u32,
}

impl Hosts {
    /// The limits of `host`. Of two instances with one host the smaller rate counts (design §2.1); the concurrency is
    /// the first one's.
    pub fn limits(&self, host: &str, per_second: u32, burst: u32, concurrent: usize) -> Arc<Limits> {
        let mut all = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        let host = all.entry(host.to_owned()).or_insert_with(|| Host {
            limits: Arc::new(Limits {
                started: Instant::now(),
                bucket: Mutex::new(Bucket::new(per_second, burst)),
                slots: Semaphore::new(concurrent.max(1)),
            }),
            per_second,
            burst,
        });
        host.per_second = host.per_second.min(per_second);
        host.burst = host.burst.min(burst);
        host.limits
            .bucket
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .resize(host.per_second, host.burst);
        host.limits.clone()
    }
}
