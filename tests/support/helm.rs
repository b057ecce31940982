//! Releases of the chart, installed by the real Helm, and operators that run with the permissions of a release.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::PostParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use serde_json::{Value, json};

use super::child::part;
use super::cluster::Cluster;
use super::operator::Operator;

/// Name of each release, and of the objects that the chart creates in its namespace.
pub const NAME: &str = "zitadel-tokens";

pub fn chart() -> PathBuf {
    concat!(env!("CARGO_MANIFEST_DIR"), "/charts/zitadel-tokens").into()
}

/// A release in a namespace of its own.
pub struct Release {
    cluster: &'static Cluster,
    pub namespace: String,
}

impl Release {
    /// Installs the chart with these values.
    pub fn install(cluster: &'static Cluster, namespace: &str, values: &Value) -> Self {
        let release = Self::named(cluster, namespace);
        release.apply(values);
        release
    }

    /// A release that is not installed yet.
    pub fn named(cluster: &'static Cluster, namespace: &str) -> Self {
        Self {
            cluster,
            namespace: namespace.to_owned(),
        }
    }

    /// Installs or upgrades to these values.
    pub fn apply(&self, values: &Value) {
        self.apply_with(values, &[]);
    }

    /// Installs or upgrades with additional Helm flags.
    pub fn apply_with(&self, values: &Value, flags: &[&str]) {
        let chart = chart();
        let set = format!("--set-json={}", flat(values));
        let mut arguments: Vec<&OsStr> = ["upgrade", "--install", "--create-namespace", NAME]
            .map(OsStr::new)
            .into();
        arguments.push(chart.as_os_str());
        arguments.extend(flags.iter().map(OsStr::new));
        if set != "--set-json=" {
            arguments.push(OsStr::new(&set));
        }
        self.helm(&arguments);
    }

    pub fn uninstall(&self) {
        self.helm(&["uninstall", NAME].map(OsStr::new));
    }

    fn helm(&self, arguments: &[&OsStr]) {
        helm(self.cluster, &self.namespace, arguments);
    }

    /// The user name of the release's service account.
    pub fn user(&self) -> String {
        format!("system:serviceaccount:{}:{NAME}", self.namespace)
    }

    pub async fn deployment(&self) -> Deployment {
        let api: Api<Deployment> = Api::namespaced(self.cluster.client().await, &self.namespace);
        api.get(NAME).await.expect("a Deployment")
    }

    /// A kubeconfig with a token of the release's service account.
    async fn kubeconfig(&self) -> PathBuf {
        let api: Api<ServiceAccount> = Api::namespaced(self.cluster.client().await, &self.namespace);
        let request = TokenRequest::default();
        let params = PostParams::default();
        let answer = api.create_token_request(NAME, &params, &request).await;
        let token = answer.expect("a token").status.expect("a status").token;
        let admin = std::fs::read_to_string(&self.cluster.kubeconfig).expect("a kubeconfig");
        let ours: String = admin
            .lines()
            .map(|line| match line.split_once("user: {token:") {
                Some((before, _)) => format!("{before}user: {{token: \"{token}\"}}\n"),
                None => format!("{line}\n"),
            })
            .collect();
        let path = self
            .cluster
            .kubeconfig
            .with_file_name(format!("{}.kubeconfig", self.namespace));
        std::fs::write(&path, ours).expect("written");
        path
    }

    /// A client with the identity of the operator.
    pub async fn client(&self) -> Client {
        let kubeconfig = Kubeconfig::read_from(self.kubeconfig().await).expect("a kubeconfig");
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
        Client::try_from(config.expect("a config")).expect("a client")
    }

    /// Runs the operator with the arguments, environment and service account of the Deployment.
    pub async fn operator(&self) -> Operator {
        let deployment = serde_json::to_value(self.deployment().await).expect("JSON");
        let container = &deployment["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["args"], json!(["run"]));
        let environment: Vec<(&str, OsString)> = container["env"]
            .as_array()
            .expect("an environment")
            .iter()
            .map(|variable| {
                let value = match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
                    Some("metadata.namespace") => &self.namespace,
                    Some("metadata.name") => "zitadel-tokens-0",
                    Some(other) => panic!("unknown field path {other}"),
                    // The API server omits an empty value.
                    None => variable["value"].as_str().unwrap_or_default(),
                };
                (variable["name"].as_str().expect("a name"), value.into())
            })
            .collect();
        let environment: Vec<(&str, &OsStr)> = environment.iter().map(|(name, value)| (*name, &**value)).collect();
        Operator::start_as_told(&self.kubeconfig().await, &environment).await
    }
}

/// Runs Helm in a namespace, and returns what it printed.
pub fn helm(cluster: &Cluster, namespace: &str, arguments: &[&OsStr]) -> String {
    let mut command = command();
    command
        .args(arguments)
        .args(["--namespace", namespace])
        .env("KUBECONFIG", &cluster.kubeconfig);
    if let Some(dir) = cluster.ready["dir"].as_str() {
        // Helm's own files are deleted with the cluster.
        for home in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(home, format!("{dir}/helm"));
        }
    }
    run(command)
}

/// The manifests of a chart with these values, rendered without a cluster.
pub fn template(chart: &Path, values: &Value) -> String {
    run(templating(chart, values))
}

/// The error message of Helm for values that a chart refuses.
pub fn refused(chart: &Path, values: &Value) -> String {
    let output = templating(chart, values).output().expect("helm runs");
    assert!(!output.status.success(), "{values} is accepted");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn templating(chart: &Path, values: &Value) -> Command {
    let mut command = command();
    command.arg("template").arg(chart);
    command.arg(format!("--set-json={}", flat(values)));
    command
}

fn command() -> Command {
    Command::new(part("helm").join("helm"))
}

fn run(mut command: Command) -> String {
    let output = command.output().expect("helm runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Values in the syntax of `--set-json`.
fn flat(values: &Value) -> String {
    let values = values.as_object().expect("an object");
    let all: Vec<String> = values.iter().map(|(key, value)| format!("{key}={value}")).collect();
    all.join(",")
}
