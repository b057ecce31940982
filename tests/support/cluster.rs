//! The real control plane, which all tests of a binary share.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use serde_json::json;
use zitadel_tokens::api::crds;

use super::child::{Running, part};
use super::{EVENTUALLY, audit::Audit};

pub struct Cluster {
    /// The process that runs the cluster, or `None` for an existing cluster.
    running: Option<Running>,
    pub kubeconfig: PathBuf,
    pub kubectl: Option<PathBuf>,
    pub server: String,
    pub audit: Audit,
    pub ready: serde_json::Value,
}

impl Cluster {
    /// Starts a cluster. It stops when this value is dropped or the process exits.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a cluster with additional flags for its API server.
    pub fn start_with(flags: &[&str]) -> Self {
        Self::up(&[], flags)
    }

    /// Starts a cluster with a node. The node has these images (name and archive). Its pods reach these ports of
    /// 127.0.0.1 at [`Cluster::node`].
    pub fn start_with_node(images: &[(&str, &Path)], reach: &[&str]) -> Self {
        let mut options = vec!["--node".to_owned()];
        options.extend(
            images
                .iter()
                .map(|(name, file)| format!("--image={name}={}", file.display())),
        );
        options.extend(reach.iter().map(|port| format!("--reach={port}")));
        Self::up(&options, &[])
    }

    /// A cluster that already runs. Its audit log is not available.
    pub fn existing(kubeconfig: &Path) -> Self {
        let kubectl = part("controlplane").join("kubectl");
        Self {
            running: None,
            kubeconfig: kubeconfig.to_owned(),
            kubectl: kubectl.exists().then_some(kubectl),
            server: String::new(),
            audit: Audit::new(PathBuf::new()),
            ready: serde_json::Value::Null,
        }
    }

    fn up(options: &[String], flags: &[&str]) -> Self {
        let (running, ready) = Running::announced(
            "cluster",
            Command::new(part("cluster").join("cluster"))
                .args(["up", "--bin"])
                .arg(part("controlplane"))
                .args(options)
                .arg("--")
                .args(flags),
        );
        let text = |key: &str| ready[key].as_str().map(PathBuf::from);
        Self {
            running: Some(running),
            kubeconfig: text("kubeconfig").expect("a kubeconfig"),
            kubectl: text("kubectl"),
            server: ready["server"].as_str().expect("an address").to_owned(),
            audit: Audit::new(text("auditLog").expect("an audit log")),
            ready,
        }
    }

    /// The cluster that the tests of this binary share, with the CRDs installed.
    pub fn shared() -> &'static Self {
        static SHARED: LazyLock<Cluster> = LazyLock::new(|| {
            let cluster = Cluster::start();
            std::thread::scope(|scope| {
                let installed = scope.spawn(|| {
                    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
                    runtime.block_on(async { install_crds(&cluster.client().await).await });
                });
                installed.join().expect("the CRDs are accepted");
            });
            cluster
        });
        &SHARED
    }

    /// The address at which pods of its node reach this machine.
    pub fn node(&self) -> Option<&str> {
        self.ready["node"].as_str()
    }

    /// Runs the testbed's kubectl, or the one on the PATH. Returns whether it succeeded, and its output.
    pub fn kubectl(&self, arguments: &[&str], input: &str) -> (bool, String) {
        let mut child = Command::new(self.kubectl.clone().unwrap_or_else(|| "kubectl".into()))
            .args(arguments)
            .env("KUBECONFIG", &self.kubeconfig)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl runs");
        let mut stdin = child.stdin.take().expect("piped");
        stdin.write_all(input.as_bytes()).expect("kubectl reads");
        drop(stdin);
        let output = child.wait_with_output().expect("kubectl ends");
        let printed = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&printed).into_owned())
    }

    /// A client with full permissions. Each test needs its own, because a client belongs to the runtime that created
    /// it.
    pub async fn client(&self) -> Client {
        // Another test may have installed the provider already.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let kubeconfig = Kubeconfig::read_from(&self.kubeconfig).expect("a kubeconfig");
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .expect("a config");
        Client::try_from(config).expect("a client")
    }
}

/// Installs the CRDs of this build and waits until they are served.
pub async fn install_crds(client: &Client) {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for crd in zitadel_tokens::api::crds() {
        let name = crd.metadata.name.clone().expect("a name");
        api.patch(&name, &PatchParams::apply("tests").force(), &Patch::Apply(&crd))
            .await
            .unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    established(client).await;
}

/// Waits until the CRDs are served.
pub async fn established(client: &Client) {
    use kube::runtime::wait::{await_condition, conditions::is_crd_established};
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for crd in zitadel_tokens::api::crds() {
        let name = crd.metadata.name.expect("a name");
        let established = await_condition(api.clone(), &name, is_crd_established());
        tokio::time::timeout(EVENTUALLY, established)
            .await
            .expect("established in time")
            .expect("watched");
    }
}

/// Installs the CRDs without any rule on spec and status, as if an administrator had relaxed them.
pub async fn install_relaxed_crds(client: &Client) {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for crd in crds() {
        let mut crd = serde_json::to_value(crd).expect("JSON");
        let anything = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        let version = &mut crd["spec"]["versions"][0];
        version["schema"]["openAPIV3Schema"] =
            json!({"type": "object", "properties": {"spec": anything, "status": anything}});
        version["selectableFields"] = json!([]);
        version["additionalPrinterColumns"] = json!([]);
        let crd: CustomResourceDefinition = serde_json::from_value(crd).expect("a CRD");
        api.create(&PostParams::default(), &crd).await.expect("a CRD");
    }
    established(client).await;
}
