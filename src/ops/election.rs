//! Leader election on a Lease. This is the only part of `ops` that writes to Kubernetes. Each write states the version
//! of the Lease that it replaces, so that one of two candidates gets a conflict.

use std::convert::Infallible;
use std::pin::Pin;
use std::time::Duration;

use futures::{Stream, StreamExt};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::runtime::watcher::{self, watch_object};
use kube::{Api, Client};

use crate::ops::lease::{
    self, LONGEST_REQUEST, Leadership, LeadershipGuard, ObservedLease, RENEW_EVERY, RETRY, Step, evaluate,
};
use crate::ops::shutdown::Shutdown;

/// Longest time to release the lease. It bounds the shutdown.
const LONGEST_RELEASE: Duration = Duration::from_secs(5);

/// A watch of the Lease.
type Changes = Pin<Box<dyn Stream<Item = watcher::Result<Option<Lease>>> + Send>>;

/// A candidate for leadership.
pub struct Election {
    leases: Api<Lease>,
    name: String,
    me: String,
    leadership: Leadership,
    guard: LeadershipGuard,
    observed: Option<ObservedLease>,
}

impl Election {
    /// A candidate for the Lease `name` in `namespace`, identified by `pod`, and the guard that grants leadership.
    pub fn new(
        client: Client,
        namespace: &str,
        name: &str,
        pod: Option<String>,
        shutdown: Shutdown,
    ) -> Result<(Self, LeadershipGuard), String> {
        let (leadership, guard) = LeadershipGuard::new(shutdown);
        let election = Self {
            leases: Api::namespaced(client, namespace),
            name: name.to_owned(),
            me: identity(pod)?,
            leadership,
            guard: guard.clone(),
            observed: None,
        };
        Ok((election, guard))
    }

    /// Runs the election while `work` runs, and releases the lease when `work` ends. Acquires the lease only while
    /// `can` returns true. Calls `begin` each time this process becomes the leader, before any work of the leader
    /// starts.
    pub async fn during<T>(mut self, work: impl Future<Output = T>, can: impl Fn() -> bool, begin: impl Fn()) -> T {
        let done = tokio::select! {
            biased;
            done = work => done,
            never = self.stand(can, begin) => match never {},
        };
        self.leadership.close();
        if tokio::time::timeout(LONGEST_RELEASE, self.release()).await.is_err() {
            tracing::warn!("the lease could not be released in time; it expires without a release");
        }
        done
    }

    async fn stand(&mut self, can: impl Fn() -> bool, begin: impl Fn()) -> Infallible {
        tracing::info!(lease = self.name, candidate = self.me, "starting leader election");
        self.read().await;
        let mut led = false;
        let mut changes: Option<Changes> = None;
        loop {
            let leading = self.guard.is_leading();
            if led && !leading {
                tracing::warn!("leadership lost; this replica is now a standby");
            }
            led = leading;
            let wait = match evaluate(self.observed.as_ref(), &self.me, lease::now()) {
                Step::Wait(left) => left,
                Step::Acquire if !can() => RETRY,
                Step::Acquire | Step::Renew => match self.claim().await {
                    Some(sent) => {
                        if !self.guard.is_leading() {
                            tracing::info!("this replica is now the leader");
                            begin();
                        }
                        self.leadership.renewed(sent);
                        led = true;
                        // The leader does not need the watch: a conflict shows that another replica wrote the Lease.
                        changes = None;
                        RENEW_EVERY
                    }
                    None => RETRY,
                },
            };
            if led {
                tokio::time::sleep(wait).await;
                continue;
            }
            let watch = changes.get_or_insert_with(|| Box::pin(watch_object(self.leases.clone(), &self.name)));
            match tokio::time::timeout(wait, watch.next()).await {
                Ok(Some(Ok(lease))) => self.saw(lease),
                Ok(_) => {
                    changes = None;
                    tokio::time::sleep(RETRY.min(wait)).await;
                }
                // A watch without an event until the lease expired may be broken, so start a new one.
                Err(_) if wait > RETRY => changes = None,
                Err(_) => {}
            }
        }
    }

    /// Acquires or renews the lease. Returns when the request was sent if it succeeded.
    async fn claim(&mut self) -> Option<Duration> {
        let mut claimed = self.write().await;
        if matches!(claimed, Err(LeaseError::Changed)) {
            // Another candidate was faster, or the response to an earlier request was lost. In the second case this
            // process still leads, perhaps for less than `RETRY`.
            self.read().await;
            if self.guard.is_leading() {
                claimed = self.write().await;
            }
        }
        match claimed {
            Ok(sent) => Some(sent),
            Err(LeaseError::Changed) => None,
            Err(error) => {
                tracing::warn!(%error, "the lease could not be acquired or renewed");
                None
            }
        }
    }

    /// Writes this process into the lease. Returns when the request was sent.
    async fn write(&mut self) -> Result<Duration, LeaseError> {
        let sent = lease::now();
        let wanted = lease::claimed(self.observed.as_ref(), &self.name, &self.me, Timestamp::now());
        let params = PostParams::default();
        let written = if self.observed.as_ref().is_some_and(ObservedLease::exists) {
            bounded(self.leases.replace(&self.name, &params, &wanted)).await
        } else {
            bounded(self.leases.create(&params, &wanted)).await
        };
        self.saw(Some(written?));
        Ok(sent)
    }

    /// Releases the lease, if this process holds it.
    async fn release(&mut self) {
        while let Some(observed) = self
            .observed
            .as_ref()
            .filter(|s| s.exists() && s.holder() == Some(&self.me))
        {
            let released = observed.released();
            let params = PostParams::default();
            match bounded(self.leases.replace(&self.name, &params, &released)).await {
                Ok(_) => return tracing::info!("lease released"),
                Err(LeaseError::Changed) => self.read().await,
                Err(error) => {
                    tracing::warn!(%error, "the lease could not be released");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    async fn read(&mut self) {
        match bounded(self.leases.get_opt(&self.name)).await {
            Ok(lease) => self.saw(lease),
            Err(error) => tracing::warn!(%error, "the lease could not be read"),
        }
    }

    fn saw(&mut self, lease: Option<Lease>) {
        let now = lease::now();
        self.observed = ObservedLease::next(self.observed.take(), lease, now);
        if !self.guard.is_leading() {
            self.observed = self.observed.take().map(|observed| observed.disowned(&self.me, now));
        }
        if self.observed.as_ref().and_then(ObservedLease::holder) != Some(&self.me) {
            self.leadership.close();
        }
    }
}

/// Why a request failed. The text of kube's error is dropped, because it may quote data.
#[derive(Debug, thiserror::Error)]
enum LeaseError {
    #[error("the Lease changed since it was read")]
    Changed,
    #[error("the API server refused the request with status {0}")]
    Refused(u16),
    #[error("the API server did not answer in time")]
    Unavailable,
}

async fn bounded<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, LeaseError> {
    match tokio::time::timeout(LONGEST_REQUEST, request).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(kube::Error::Api(status))) => Err(match status.code {
            404 | 409 => LeaseError::Changed,
            code => LeaseError::Refused(code),
        }),
        Ok(Err(_)) | Err(_) => Err(LeaseError::Unavailable),
    }
}

/// A unique identity. A restarted pod is a different holder, because it knows nothing about the lease of its
/// predecessor.
fn identity(pod: Option<String>) -> Result<String, String> {
    let mut random = [0; 4];
    aws_lc_rs::rand::fill(&mut random).map_err(|_| "no random numbers")?;
    let host = || rustix::system::uname().nodename().to_string_lossy().into_owned();
    Ok(format!(
        "{}_{:08x}",
        pod.unwrap_or_else(host),
        u32::from_be_bytes(random)
    ))
}
