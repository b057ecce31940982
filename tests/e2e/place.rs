//! Where the test runs: on its own node or on an existing cluster. Differences between the two are only in this file.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::{HostAlias, Pod, Service};
use kube::api::{DeleteParams, ListParams, LogParams, PostParams};
use kube::{Api, ResourceExt};

use crate::support::cluster::Cluster;
use crate::support::helm::{NAME, chart, helm};
use crate::support::issuer::Issuer;
use crate::support::world::until;

/// The chart's default image.
const IMAGE: &str = concat!("ghcr.io/zitadel-tokens/zitadel-tokens:", env!("CARGO_PKG_VERSION"));
const ROOT: &str = env!("CARGO_MANIFEST_DIR");

pub struct Place {
    pub cluster: &'static Cluster,
    /// The issuer's address for pods. Its certificate is valid for `localhost`.
    pub endpoint: String,
    /// An image with a shell.
    pub shell_image: String,
    /// Lifetime of a token in seconds. Its last third must be longer than a node takes to update a pod's file.
    pub lifetime: u64,
    /// Maximum time for a pod to start, or for a change to reach a pod's file.
    pub patience: Duration,
    /// Values of the chart that select another image.
    image: Vec<String>,
}

impl Place {
    /// Returns the place, and an issuer that its pods can reach.
    pub fn find() -> (Self, Issuer) {
        match env::var_os("E2E_KUBECONFIG") {
            None => Self::own(),
            Some(kubeconfig) => Self::existing(&PathBuf::from(kubeconfig)),
        }
    }

    fn own() -> (Self, Issuer) {
        let issuer = Issuer::start(&["--tls"]);
        let archive = env::var_os("IMAGE_ARCHIVE").unwrap_or_else(|| "target/image/zitadel-tokens.tar".into());
        let archive = Path::new(ROOT).join(archive);
        let port = issuer.url.rsplit(':').next().expect("a port");
        let cluster = Cluster::start_with_node(&[(IMAGE, &archive)], &[port]);
        let place = Self {
            endpoint: format!("https://{}:{port}", cluster.node().expect("a node")),
            cluster: Box::leak(Box::new(cluster)),
            shell_image: "busybox:testbed".to_owned(),
            lifetime: 30,
            patience: Duration::from_mins(1),
            image: Vec::new(),
        };
        (place, issuer)
    }

    /// By default, a kubelet updates the files of a pod once a minute. `patience` allows for that.
    fn existing(kubeconfig: &Path) -> (Self, Issuer) {
        let listen = env::var("E2E_LISTEN").expect("E2E_LISTEN: address and port of this machine that pods reach");
        let issuer = Issuer::start(&["--tls", "--listen", &listen]);
        let (name, tag) = env::var("E2E_IMAGE").map_or_else(
            |_| (None, None),
            |image| {
                let (name, tag) = image.rsplit_once(':').expect("E2E_IMAGE: NAME:TAG");
                (Some(name.to_owned()), Some(tag.to_owned()))
            },
        );
        let values = [
            name.as_ref().map(|_| "image.registry=".to_owned()),
            name.map(|name| format!("image.repository={name}")),
            tag.map(|tag| format!("image.tag={tag}")),
        ];
        let place = Self {
            cluster: Box::leak(Box::new(Cluster::existing(kubeconfig))),
            endpoint: issuer.url.clone(),
            shell_image: env::var("E2E_SHELL_IMAGE").unwrap_or_else(|_| "busybox:stable".to_owned()),
            lifetime: 600,
            patience: Duration::from_mins(3),
            image: values.into_iter().flatten().collect(),
        };
        (place, issuer)
    }

    /// Runs `helm ACTION RELEASE CHART` with these values and waits until everything is ready.
    pub fn release(&self, action: &str, namespace: &str, values: &[&str]) {
        let chart = chart();
        let mut arguments = vec![OsStr::new(action), OsStr::new(NAME), chart.as_os_str()];
        arguments.extend(["--create-namespace", "--wait", "--timeout", "3m"].map(OsStr::new));
        for value in &self.image {
            arguments.extend(["--set-string", value].map(OsStr::new));
        }
        for value in values {
            arguments.extend(["--set", value].map(OsStr::new));
        }
        helm(self.cluster, namespace, &arguments);
    }

    /// Runs `helm test`. The test's own node has no DNS and no Service proxy. There the pod of Helm's test hook gets an
    /// entry in `/etc/hosts` that maps the Service's name to a pod that the Service selects.
    pub async fn test(&self, namespace: &str) {
        if self.cluster.node().is_none() {
            let arguments = ["test", NAME, "--timeout", "3m"].map(OsStr::new);
            helm(self.cluster, namespace, &arguments);
            return;
        }
        let client = self.cluster.client().await;
        let services: Api<Service> = Api::namespaced(client.clone(), namespace);
        let selector = services
            .get(NAME)
            .await
            .expect("a Service")
            .spec
            .expect("a spec")
            .selector;
        let selector: Vec<String> = selector.iter().flatten().map(|(k, v)| format!("{k}={v}")).collect();
        let pods: Api<Pod> = Api::namespaced(client, namespace);
        let selected = pods.list(&ListParams::default().labels(&selector.join(","))).await;
        let selected = selected
            .expect("listed")
            .items
            .into_iter()
            .find_map(|pod| pod.status?.pod_ip);
        let address = selected.expect("the Service selects a pod");

        let hooks = helm(self.cluster, namespace, &["get", "hooks", NAME].map(OsStr::new));
        let (read, pod) = self
            .cluster
            .kubectl(&["create", "--dry-run=client", "-o", "json", "-f", "-"], &hooks);
        assert!(read, "{pod}");
        let mut pod: Pod = serde_json::from_str(&pod).expect("one pod");
        let name = pod.name_any();
        let spec = pod.spec.as_mut().expect("a spec");
        spec.host_aliases = Some(vec![HostAlias {
            ip: address,
            hostnames: Some(vec![format!("{NAME}.{namespace}.svc")]),
        }]);
        pods.create(&PostParams::default(), &pod).await.expect("created");
        let phase = |pod: &Pod| pod.status.as_ref()?.phase.clone();
        let ended = until(pods.clone(), &name, self.patience, |pod| {
            matches!(phase(pod).as_deref(), Some("Succeeded" | "Failed"))
        });
        let phase = phase(&ended.await);
        let log = pods.logs(&name, &LogParams::default()).await;
        assert_eq!(phase.as_deref(), Some("Succeeded"), "helm test: {log:?}");
        let params = DeleteParams::default();
        pods.delete(&name, &params).await.expect("deleted");
    }

    pub fn uninstall(&self, namespace: &str) {
        let arguments = ["uninstall", NAME, "--wait", "--timeout", "3m"].map(OsStr::new);
        helm(self.cluster, namespace, &arguments);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for look in [
                "get pods,leases -A -o wide",
                "events -A --types Warning",
                "get zsu,zitadelinstances -A -o wide",
                "-n zitadel-tokens logs --prefix --tail 30 -l app.kubernetes.io/name=zitadel-tokens",
            ] {
                let words: Vec<&str> = look.split(' ').collect();
                eprintln!("--- kubectl {look} ---\n{}", self.cluster.kubectl(&words, "").1);
            }
        }
    }
}
