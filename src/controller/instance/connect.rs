//! Connections to ZITADEL, by instance. Their state is only in memory: discovery documents, learned project ids, and
//! limits per host.

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

/// Default entry for certificates in a ConfigMap or Secret; trust-manager and cert-manager use the same name.
const CA_ENTRY: &str = "ca.crt";

/// Longest time to read certificates.
const READ_TIMEOUT: Duration = Duration::from_secs(15);

/// All connections.
pub struct Connections {
    hosts: Hosts,
    open: Mutex<HashMap<String, Open>>,
    /// The last reconcile of each instance, since the process started or last forgot them.
    reconciled: Mutex<HashMap<String, LastReconcile>>,
}

/// The result of the last reconcile of an instance. It is not read from the status, which is output only and may be
/// written by another operator (docs/adr/0005-status-is-output-only.md).
struct LastReconcile {
    /// The clock skew that its service users use.
    skew: SignedDuration,
    /// Whether the server's clock is close enough to be used.
    clock: Result<(), Reason>,
    ready: bool,
}

/// Which service users to reconcile after a reconcile of their instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wakeup {
    /// All service users: they waited for the first reconcile of the instance, the clock skew changed, or the server's
    /// clock became usable or unusable.
    AllUsers,
    /// Those that failed because of the instance, which is ready again.
    FailingUsers,
}

struct Open {
    instance: Arc<ZitadelClient>,
    /// The spec that the connection was created from. `None` if its certificates must be read again.
    spec: Option<ZitadelInstanceSpec>,
}

impl Connections {
    /// No connections yet. They share the limits of `hosts`.
    #[must_use]
    pub fn new(hosts: Hosts) -> Self {
        Self {
            hosts,
            open: Mutex::default(),
            reconciled: Mutex::default(),
        }
    }

    /// The real project id for the `zitadel` audience alias, if this process has learned it.
    #[must_use]
    pub fn known_project_id(&self, instance: &ZitadelInstance) -> Option<String> {
        let open = lock(&self.open);
        let known = open.get(instance.metadata.name.as_deref()?)?;
        known.instance.known_project_id().map(str::to_owned)
    }

    /// How far the clock of the instance is ahead of the local clock, as far as this process knows.
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

    /// Whether the instance was reconciled. Until then its clock skew is unknown, and a token that seems due may still
    /// be fresh.
    #[must_use]
    pub fn was_reconciled(&self, name: &str) -> bool {
        lock(&self.reconciled).contains_key(name)
    }

    /// Whether the instance was ready at its last reconcile.
    #[must_use]
    pub fn is_ready(&self, name: &str) -> bool {
        lock(&self.reconciled)
            .get(name)
            .is_some_and(|record_reconcile| record_reconcile.ready)
    }

    /// Records a reconcile of the instance, and returns which of its service users to reconcile.
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
        // While the clock is unusable, every service user reports it. All of them continue once the clock is usable
        // again.
        if is_news(before.skew, skew) || clock != before.clock {
            (before.skew, before.clock) = (skew, clock);
            return Some(Wakeup::AllUsers);
        }
        recovered.then_some(Wakeup::FailingUsers)
    }

    /// The instances that share this circuit breaker.
    #[must_use]
    pub fn instances_sharing(&self, breaker: &Arc<Breaker>) -> Vec<String> {
        let open = lock(&self.open);
        let those = open
            .iter()
            .filter(|(_, open)| Arc::ptr_eq(open.instance.limits().breaker(), breaker));
        those.map(|(name, _)| name.clone()).collect()
    }

    /// Forgets all reconciles, because they may be outdated. Each instance is then reconciled before its service users.
    pub fn forget_reconciles(&self) {
        lock(&self.reconciled).clear();
    }

    /// The longest request timeout of all instances.
    #[must_use]
    pub fn longest_timeout(&self) -> Duration {
        let open = lock(&self.open);
        let timeouts = open.values().map(|open| open.instance.settings().timeout);
        timeouts.max().unwrap_or_default()
    }

    /// Makes the next reconcile read the certificates again. TLS failed, and they may have been renewed.
    pub fn reload_certificates(&self, name: &str) {
        if let Some(open) = lock(&self.open).get_mut(name) {
            open.spec = None;
        }
    }

    /// Closes the connection of an instance that no longer exists or is unreadable.
    pub fn close(&self, name: &str) {
        lock(&self.open).remove(name);
        lock(&self.reconciled).remove(name);
        self.hosts.unregister(name);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The connection of `instance`. Creates a new one if the connection settings changed.
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
    // Unchanged settings keep the existing connection and its state.
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

/// The trusted CA certificates in PEM, if the instance configures any.
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
