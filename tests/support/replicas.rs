//! Several replicas of the operator with leader election.

use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use kube::Api;

use super::SOON;
use super::audit::Audit;
use super::clock::Clock;
use super::operator::Operator;
use super::proxy::Proxy;
use super::world::{World, until};

pub struct Replicas<'a> {
    world: &'a World,
    /// The operator's namespace, where the Lease is.
    pub home: String,
}

impl<'a> Replicas<'a> {
    pub async fn of(world: &'a World) -> Self {
        let home = format!("{}-home", world.name);
        world.namespace(&home).await;
        Self { world, home }
    }

    /// Starts a replica.
    pub async fn start(&self, name: &str) -> Operator {
        self.start_in(&self.world.cluster.kubeconfig, name, &[]).await
    }

    /// Starts a replica behind a proxy.
    pub async fn start_behind(&self, proxy: &Proxy, name: &str) -> Operator {
        self.start_in(&proxy.kubeconfig, name, &[]).await
    }

    /// Starts a replica whose wall clock can be set.
    pub async fn start_on_clock(&self, clock: &Clock, name: &str) -> Operator {
        self.start_in(&self.world.cluster.kubeconfig, name, &clock.environment())
            .await
    }

    async fn start_in(&self, kubeconfig: &Path, name: &str, environment: &[(&str, &OsStr)]) -> Operator {
        let flags = ["--leader-elect", "--namespace", &self.home, "--pod-name", name];
        Operator::start_in(kubeconfig, &self.world.selector(), &flags, environment).await
    }

    pub fn leases(&self) -> Api<Lease> {
        Api::namespaced(self.world.client.clone(), &self.home)
    }

    /// Waits until the replica of this name holds the Lease, and returns the spec of the Lease.
    pub async fn led_by(&self, name: &str) -> LeaseSpec {
        self.led_by_within(name, SOON).await
    }

    pub async fn led_by_within(&self, name: &str, limit: Duration) -> LeaseSpec {
        let lease = until(self.leases(), "zitadel-tokens", limit, |lease: &Lease| {
            holder(lease).as_deref() == Some(name)
        });
        lease.await.spec.expect("a spec")
    }

    /// Waits until the Lease is renewed once more.
    pub async fn renewed(&self) {
        let renewal = |lease: &Lease| lease.spec.as_ref().and_then(|s| s.renew_time.clone());
        let before = renewal(&self.leases().get("zitadel-tokens").await.expect("a Lease"));
        until(self.leases(), "zitadel-tokens", SOON, |lease| renewal(lease) != before).await;
    }

    /// The audit log of the API server.
    pub fn audit(&self) -> &Audit {
        &self.world.cluster.audit
    }

    /// The name of the replica that holds the Lease now.
    pub async fn leader(&self) -> Option<String> {
        holder(&self.leases().get("zitadel-tokens").await.expect("a Lease"))
    }
}

fn holder(lease: &Lease) -> Option<String> {
    let holder = lease.spec.as_ref()?.holder_identity.as_deref()?;
    Some(holder.split_once('_')?.0.to_owned())
}
