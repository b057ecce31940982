//! Stands for election on a Lease: the one place of this room that writes to Kubernetes. Each write goes over exactly what
//! was seen, so that of two candidates one gets a conflict.

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

/// Longest time to give the lease back, so that a process that was asked to end does.
const LONGEST_RELEASE: Duration = Duration::from_secs(5);

/// What a watch of the Lease says.
type Changes = Pin<Box<dyn Stream<Item = watcher::Result<Option<Lease>>> + Send>>;

/// A candidate.
pub struct Election {
    leases: Api<Lease>,
    name: String,
    me: String,
    gate: Leadership,
    leadership: LeadershipGuard,
    sight: Option<ObservedLease>,
}

impl Election {
    /// Stands for the Lease `name` in `namespace` as `pod`, and the fence that is open while it leads.
    pub fn new(
        client: Client,
        namespace: &str,
        name: &str,
        pod: Option<String>,
        shutdown: Shutdown,
    ) -> Result<(Self, LeadershipGuard), String> {
        let (gate, leadership) = LeadershipGuard::new(shutdown);
        let election = Self {
            leases: Api::namespaced(client, namespace),
            name: name.to_owned(),
            me: identity(pod)?,
            gate,
            leadership: leadership.clone(),
            sight: None,
        };
        Ok((election, leadership))
    }

    /// Stands while `work` goes on, and gives the lease back when it has ended. It takes the lease only while it `can`;
    /// `begin` is called each time, before the first thing that is done as leader.
    pub async fn during<T>(mut self, work: impl Future<Output = T>, can: impl Fn() -> bool, begin: impl Fn()) -> T {
        let done = tokio::select! {
            biased;
            done = work => done,
            never = self.stand(can, begin) => match never {},
        };
        self.gate.close();
        if tokio::time::timeout(LONGEST_RELEASE, self.release()).await.is_err() {
            tracing::warn!("the lease could not be given back in time; it ends by itself");
        }
        done
    }

    async fn stand(&mut self, can: impl Fn() -> bool, begin: impl Fn()) -> Infallible {
        tracing::info!(lease = self.name, candidate = self.me, "standing for election");
        self.look().await;
        let mut led = false;
        let mut changes: Option<Changes> = None;
        loop {
            let leading = self.leadership.is_leading();
            if led && !leading {
                tracing::warn!("not leading any more; standing by");
            }
            led = leading;
            let wait = match evaluate(self.sight.as_ref(), &self.me, lease::now()) {
                Step::Wait(left) => left,
                Step::Acquire if !can() => RETRY,
                Step::Acquire | Step::Renew => match self.claim().await {
                    Some(sent) => {
                        if !self.leadership.is_leading() {
                            tracing::info!("leading");
                            begin();
                        }
                        self.gate.renewed(sent);
                        led = true;
                        // A leader needs none: it hears of others by a conflict.
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
                // One that tells nothing while a lease runs out may be dead.
                Err(_) if wait > RETRY => changes = None,
                Err(_) => {}
            }
        }
    }

    /// Takes or renews the lease. If that worked: when it was asked for.
    async fn claim(&mut self) -> Option<Duration> {
        let sent = lease::now();
        let wanted = lease::claimed(self.sight.as_ref(), &self.name, &self.me, Timestamp::now());
        let params = PostParams::default();
        let written = if self.sight.as_ref().is_some_and(ObservedLease::exists) {
            bounded(self.leases.replace(&self.name, &params, &wanted)).await
        } else {
            bounded(self.leases.create(&params, &wanted)).await
        };
        match written {
            Ok(lease) => {
                self.saw(Some(lease));
                return Some(sent);
            }
            // Somebody was faster, or an answer of ours was lost.
            Err(Trouble::Changed) => self.look().await,
            Err(trouble) => tracing::warn!(%trouble, "the lease could not be taken or renewed"),
        }
        None
    }

    /// Gives the lease back, if it is ours.
    async fn release(&mut self) {
        while let Some(sight) = self
            .sight
            .as_ref()
            .filter(|s| s.exists() && s.holder() == Some(&self.me))
        {
            let released = sight.released();
            let params = PostParams::default();
            match bounded(self.leases.replace(&self.name, &params, &released)).await {
                Ok(_) => return tracing::info!("the lease was given back"),
                Err(Trouble::Changed) => self.look().await,
                Err(trouble) => {
                    tracing::warn!(%trouble, "the lease could not be given back");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    async fn look(&mut self) {
        match bounded(self.leases.get_opt(&self.name)).await {
            Ok(lease) => self.saw(lease),
            Err(trouble) => tracing::warn!(%trouble, "the lease could not be read"),
        }
    }

    fn saw(&mut self, lease: Option<Lease>) {
        let now = lease::now();
        self.sight = ObservedLease::next(self.sight.take(), lease, now);
        if !self.leadership.is_leading() {
            self.sight = self.sight.take().map(|sight| sight.disowned(&self.me, now));
        }
        if self.sight.as_ref().and_then(ObservedLease::holder) != Some(&self.me) {
            self.gate.close();
        }
    }
}

/// Why a request came to nothing. The text of kube's error is dropped, as everywhere.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("it is not as it was seen")]
    Changed,
    #[error("the API server refused it with status {0}")]
    Refused(u16),
    #[error("the API server did not answer in time")]
    Unavailable,
}

async fn bounded<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, Trouble> {
    match tokio::time::timeout(LONGEST_REQUEST, request).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(kube::Error::Api(status))) => Err(match status.code {
            404 | 409 => Trouble::Changed,
            code => Trouble::Refused(code),
        }),
        Ok(Err(_)) | Err(_) => Err(Trouble::Unavailable),
    }
}

/// A pod that is started anew is another holder: what it knew of its lease is gone.
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
