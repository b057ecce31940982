//! Connections to ZITADEL, by instance. State in memory: discovery, the learned project id, limits by host.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::jiff::SignedDuration;
use kube::Api;
use secrecy::ExposeSecret;

use crate::api::ZitadelInstance;
use crate::api::instance::{Connection, EntryRef, ZitadelInstanceSpec};
use crate::controller::Context;
use crate::domain::clock_skew::{Skew, is_news};
use crate::domain::failure::Failure;
use crate::domain::reason::Reason;
use crate::domain::schedule::duration;
use crate::zitadel::{Breaker, Hosts, RequestBudget, Settings, ZitadelClient};

/// Entry of a ConfigMap or Secret with certificates, as trust-manager and cert-manager name it.
const CA_ENTRY: &str = "ca.crt";

/// Longest time to read certificates.
const READ_TIMEOUT: Duration = Duration::from_secs(15);

/// All connections.
#[derive(Default)]
pub struct Connections {
    hosts: Hosts,
    open: Mutex<HashMap<String, Open>>,
    /// The instances that were looked at since we started.
    reconciled: Mutex<HashMap<String, LastReconcile>>,
}

/// What the last look at an instance showed. Kept here and not read from its status, which is output, and which another
/// operator may write.
struct LastReconcile {
    /// By which skew its service users reckon.
    skew: SignedDuration,
    /// Whether its clock may be used at all.
    clock: Result<(), Reason>,
    ready: bool,
}

/// What a look at an instance means for its service users.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wakeup {
    /// They waited for it, or its clock is another, can be used again or no longer: all are reconciled.
    AllUsers,
    /// It works again: those that failed because of it may come.
    FailingUsers,
}

struct Open {
    instance: Arc<ZitadelClient>,
    /// What it was made from; none if its certificates are to be read again.
    spec: Option<ZitadelInstanceSpec>,
}

impl Connections {
    /// The real id behind the `zitadel` audience, if this process learned it.
    #[must_use]
    pub fn known_project_id(&self, instance: &ZitadelInstance) -> Option<String> {
        let open = lock(&self.open);
        let known = open.get(instance.metadata.name.as_deref()?)?;
        known.instance.known_project_id().map(str::to_owned)
    }

    /// How far the clock of the instance is ahead of ours, as far as this process knows.
    #[must_use]
    pub fn skew(&self, name: &str) -> Skew {
        let open = lock(&self.open);
        open.get(name).map_or_else(Skew::default, |open| open.instance.skew())
    }

    /// The connection of the instance, if this process has one.
    #[must_use]
    pub fn opened(&self, name: &str) -> Option<Arc<ZitadelClient>> {
        lock(&self.open).get(name).map(|open| open.instance.clone())
    }

    /// Whether the instance was looked at. Until then its clock is not known, and a token that seems to be due may be
    /// fresh.
    #[must_use]
    pub fn was_reconciled(&self, name: &str) -> bool {
        lock(&self.reconciled).contains_key(name)
    }

    /// Whether the last look found it well.
    #[must_use]
    pub fn is_ready(&self, name: &str) -> bool {
        lock(&self.reconciled)
            .get(name)
            .is_some_and(|record_reconcile| record_reconcile.ready)
    }

    /// Notes a look at the instance.
    pub fn record_reconcile(&self, name: &str, ready: bool) -> Option<Wakeup> {
        let skew = self.skew(name);
        let (skew, clock) = (skew.usable(), skew.check());
        let mut all = lock(&self.reconciled);
        let Some(before) = all.get_mut(name) else {
            all.insert(name.to_owned(), LastReconcile { skew, clock, ready });
            return Some(Wakeup::AllUsers);
        };
        let recovered = ready && !before.ready;
        before.ready = ready;
        // Under a clock that cannot be used every service user says so, whatever it said before, and goes on when the clock
        // can be used again.
        if is_news(before.skew, skew) || clock != before.clock {
            (before.skew, before.clock) = (skew, clock);
            return Some(Wakeup::AllUsers);
        }
        recovered.then_some(Wakeup::FailingUsers)
    }

    /// The instances that share this circuit breaker.
    #[must_use]
    pub fn that_share(&self, breaker: &Arc<Breaker>) -> Vec<String> {
        let open = lock(&self.open);
        let those = open
            .iter()
            .filter(|(_, open)| Arc::ptr_eq(open.instance.limits().breaker(), breaker));
        those.map(|(name, _)| name.clone()).collect()
    }

    /// What was known may be of long ago: each instance is to be looked at again before its service users are.
    pub fn forget_reconciles(&self) {
        lock(&self.reconciled).clear();
    }

    /// The longest that a request may take, of all instances.
    #[must_use]
    pub fn longest_timeout(&self) -> Duration {
        let open = lock(&self.open);
        let timeouts = open.values().map(|open| open.instance.settings().timeout);
        timeouts.max().unwrap_or_default()
    }

    /// TLS failed: the certificates may have been renewed since they were read.
    pub fn doubt_certificates(&self, name: &str) {
        if let Some(open) = lock(&self.open).get_mut(name) {
            open.spec = None;
        }
    }

    /// The instance is gone.
    pub fn close(&self, name: &str) {
        lock(&self.open).remove(name);
        lock(&self.reconciled).remove(name);
        self.hosts.hang_up(name);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The connection of `instance`; a new one when the way to it changed.
pub async fn connect(ctx: &Context, instance: &ZitadelInstance) -> Result<Arc<ZitadelClient>, Failure> {
    let name = instance.metadata.name.as_deref().unwrap_or_default();
    if let Some(open) = lock(&ctx.connections.open).get(name)
        && open.spec.as_ref() == Some(&instance.spec)
    {
        return Ok(open.instance.clone());
    }
    let connection = instance.connection();
    let ca = certificates(ctx, &connection).await?;
    let settings = settings(name, &instance.spec.issuer, connection, ca);
    let mut all = lock(&ctx.connections.open);
    // The same way as before keeps what was learned on it.
    let kept = all
        .get(name)
        .map(|open| open.instance.clone())
        .filter(|i| *i.settings() == settings);
    let connected = match kept {
        Some(kept) => kept,
        None => Arc::new(ZitadelClient::new(settings, &ctx.connections.hosts)?),
    };
    let open = Open {
        instance: connected.clone(),
        spec: Some(instance.spec.clone()),
    };
    all.insert(name.to_owned(), open);
    Ok(connected)
}

/// The trusted certificates in PEM, if the instance names any.
async fn certificates(ctx: &Context, connection: &Connection) -> Result<Option<String>, Failure> {
    let unusable = || Failure::from(Reason::CABundleUnusable);
    let own = || ctx.operator_namespace.as_deref().ok_or_else(unusable);
    let entry = |reference: &EntryRef| reference.key.clone().unwrap_or_else(|| CA_ENTRY.to_owned());
    if let Some(reference) = &connection.ca_config_map_ref {
        let api: Api<ConfigMap> = Api::namespaced(ctx.client.clone(), own()?);
        let read = tokio::time::timeout(READ_TIMEOUT, api.get(&reference.name)).await;
        let mut object = read.map_err(|_| unusable())?.map_err(|_| unusable())?;
        let pem = object.data.as_mut().and_then(|data| data.remove(&entry(reference)));
        return pem.map(Some).ok_or_else(unusable);
    }
    if let Some(reference) = &connection.ca_secret_ref {
        let read = ctx
            .reader
            .certificates(own()?, &reference.name, &entry(reference))
            .await;
        let pem = read.map_err(|_| unusable())?.ok_or_else(unusable)?;
        let pem = std::str::from_utf8(pem.expose_secret()).map_err(|_| unusable())?;
        return Ok(Some(pem.to_owned()));
    }
    Ok(connection.ca_bundle.clone())
}

fn settings(name: &str, issuer: &str, connection: Connection, ca: Option<String>) -> Settings {
    let timeout = connection.timeout.as_deref().and_then(duration);
    let timeout = timeout
        .and_then(|d| Duration::try_from(d).ok())
        .unwrap_or(Duration::from_secs(10));
    let positive = |value: Option<i32>, default: u32| value.and_then(|v| u32::try_from(v).ok()).unwrap_or(default);
    Settings {
        name: name.to_owned(),
        issuer: issuer.to_owned(),
        endpoint: connection.endpoint,
        ca,
        tls_server_name: connection.tls_server_name,
        proxy: connection.proxy,
        timeout: timeout.clamp(Duration::from_secs(1), Duration::from_mins(1)),
        allow_insecure_http: connection.allow_insecure_http == Some(true),
        budget: RequestBudget {
            per_second: positive(connection.requests_per_second, 30),
            burst: positive(connection.burst, 300),
            concurrent: positive(connection.max_concurrent_requests, 8) as usize,
        },
    }
}
