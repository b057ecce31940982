//! `make demo`: shows the operator's main job on this machine, for people who see it for the first time. It starts a
//! real API server, applies the manifests of `examples/`, waits for a token and its refresh, has the operator create a
//! service user that calls ZITADEL's own API, and removes everything.
#![allow(clippy::expect_used, reason = "a demo fails by panicking")]

#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use support::cluster::{Cluster, established};
use support::issuer::Issuer;
use support::operator::Operator;
use support::world::{claims, data, until};
use zitadel_tokens::api::ZitadelServiceUser;

const HOME: &str = "zitadel-tokens";
const NAMESPACE: &str = "shop";
const SECRET: &str = "billing-invoices-token";
const ONBOARDING: &str = "onboarding";
const ONBOARDING_SECRET: &str = "onboarding-zitadel-token";

#[tokio::main]
async fn main() {
    step("Starting a Kubernetes control plane (etcd, kube-apiserver, kube-controller-manager)");
    let cluster = Cluster::start();
    let client = cluster.client().await;

    step("Starting a ZITADEL stand-in and creating a service user (token lifetime: 20 seconds)");
    let issuer = Issuer::start(&[]);
    let user = issuer
        .user(serde_json::json!({"tokenType": "JWT", "lifetimeSeconds": 20}))
        .await;

    step("Applying the CRDs, a key Secret and the manifests of examples/");
    kubectl(
        &cluster,
        &[
            "apply",
            "--server-side",
            "-f",
            concat!(env!("CARGO_MANIFEST_DIR"), "/crds/"),
        ],
        None,
    );
    established(&client).await;
    kubectl(&cluster, &["create", "namespace", NAMESPACE], None);
    kubectl(
        &cluster,
        &[
            "-n",
            NAMESPACE,
            "create",
            "secret",
            "generic",
            "billing-key",
            "--from-file=key.json=/dev/stdin",
        ],
        Some(&user.key),
    );
    let insecure = format!(
        "  issuer: {}\n  connection: {{allowInsecureHTTP: true}} # plain HTTP to localhost, for the demo only",
        issuer.url
    );
    let instance = example("instance.yaml").replace("  issuer: https://auth.example.com", &insecure);
    apply(
        &cluster,
        "examples/instance.yaml, with the address of the stand-in",
        &instance,
    );
    apply(&cluster, "examples/access-policy.yaml", &example("access-policy.yaml"));
    apply(&cluster, "examples/service-user.yaml", &example("service-user.yaml"));

    step("Starting the operator; it issues the first token");
    kubectl(&cluster, &["create", "namespace", HOME], None);
    let flags = ["--namespace", HOME, "--cluster-name", "demo"];
    let operator = Operator::start_with(&cluster.kubeconfig, "", &flags).await;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    let first = data(
        &until(secrets.clone(), SECRET, support::SOON, |s| {
            data(s).contains_key("token")
        })
        .await,
    );
    let users: Api<ZitadelServiceUser> = Api::namespaced(client, NAMESPACE);
    settled(&users, &first).await;
    kubectl(&cluster, &["-n", NAMESPACE, "get", "zsu"], None);

    step("The token Secret, which a pod would mount");
    show(&first);

    step("The operator refreshes the token before it expires");
    let second = data(
        &until(secrets.clone(), SECRET, support::SOON, |s| {
            data(s)["token"] != first["token"]
        })
        .await,
    );
    show(&second);
    settled(&users, &second).await;
    kubectl(&cluster, &["-n", NAMESPACE, "get", "zsu"], None);

    call_zitadel(&cluster, &issuer, &instance, (&users, &secrets)).await;

    step("Stopping the operator, the stand-in and the control plane");
    operator.terminate().await;
    drop(issuer);
    drop(cluster);
    println!("\nDone. To use the operator in your own cluster, continue with README.md.");
}

/// The guide "Access ZITADEL APIs" as manifests: the operator creates a service user, makes it a manager, and its token calls
/// ZITADEL's own API.
async fn call_zitadel(
    cluster: &Cluster,
    issuer: &Issuer,
    instance: &str,
    (users, secrets): (&Api<ZitadelServiceUser>, &Api<Secret>),
) {
    step("A service user from Git: no key, but a policy and the admin credential of the platform team");
    let organization = issuer.organization().await;
    credential(cluster, issuer).await;
    let instance = format!("{instance}  adminCredential: {{secretRef: {{name: zitadel-admin}}}}\n");
    apply(cluster, "the instance, with spec.adminCredential", &instance);
    for file in ["zitadel-api/access-policy.yaml", "zitadel-api/service-user.yaml"] {
        let what = format!("examples/{file}, with the id of the organization");
        apply(
            cluster,
            &what,
            &example(file).replace("69234237810729030", &organization),
        );
    }

    step("The operator creates the user, makes it ORG_OWNER, and issues a token for ZITADEL's own API");
    let is_granted = |user: &ZitadelServiceUser| {
        let mut conditions = user.status.iter().flat_map(|status| &status.conditions);
        conditions.any(|condition| condition.type_ == "ManagerRolesGranted" && condition.status == "True")
    };
    until(users.clone(), ONBOARDING, support::SOON, is_granted).await;
    let token = until(secrets.clone(), ONBOARDING_SECRET, support::SOON, |secret| {
        data(secret).contains_key("token")
    })
    .await;
    kubectl(
        cluster,
        &["-n", NAMESPACE, "get", "zsu", ONBOARDING, "-o", "wide"],
        None,
    );

    step("The token calls ZITADEL's API: which organizations may the user see?");
    println!(
        "    $ curl -X POST -H \"Authorization: Bearer $(cat token)\" {}/v2/organizations/_search",
        issuer.url
    );
    let answer = reqwest::Client::new()
        .post(format!("{}/v2/organizations/_search", issuer.url))
        .bearer_auth(&data(&token)["token"])
        .json(&serde_json::json!({}))
        .send()
        .await
        .expect("the stand-in answers");
    let status = answer.status();
    let found = answer.text().await.expect("a body");
    println!("    {status} {found}");
    assert!(
        status.is_success() && found.contains(&organization),
        "the role gives access"
    );

    step("Deleting the object revokes the role and deletes the user");
    kubectl(cluster, &["-n", NAMESPACE, "delete", "zsu", ONBOARDING], None);
}

/// Stores the key of an administrator of the stand-in, bound to the instance and its address.
async fn credential(cluster: &Cluster, issuer: &Issuer) {
    let roles = serde_json::json!([{"resource": {"instance": true}, "roles": ["IAM_OWNER"]}]);
    let admin = issuer
        .user(serde_json::json!({"managerRoles": roles, "organizationId": issuer.organization().await}))
        .await;
    let file = "--from-file=key.json=/dev/stdin";
    let create = ["-n", HOME, "create", "secret", "generic", "zitadel-admin", file];
    kubectl(cluster, &create, Some(&admin.key));
    let send_to = format!("zitadel-tokens.dev/send-to={}", issuer.url);
    let bind = [
        "-n",
        HOME,
        "annotate",
        "secret",
        "zitadel-admin",
        "zitadel-tokens.dev/instance=main",
        &send_to,
    ];
    kubectl(cluster, &bind, None);
}

fn step(text: &str) {
    println!("==> {text}");
}

fn example(file: &str) -> String {
    let path = format!("{}/examples/{file}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(path).expect("an example")
}

fn show(secret: &BTreeMap<String, String>) {
    for (key, value) in secret {
        let short = if value.len() > 60 {
            format!("{}… ({} characters)", &value[..40], value.len())
        } else {
            value.clone()
        };
        println!("    {key}: {short}");
    }
    let claims = claims(&secret["token"]);
    println!(
        "    claims of the token: {}",
        serde_json::to_string(&claims).expect("JSON")
    );
}

/// Waits until the status shows this token. The operator writes the status after the Secret.
async fn settled(users: &Api<ZitadelServiceUser>, secret: &BTreeMap<String, String>) {
    let is_reported = |user: &ZitadelServiceUser| {
        let expires = user.status.as_ref().and_then(|s| s.expires_at.as_ref());
        expires.is_some_and(|e| e.0.to_string() == secret["expires_at"])
    };
    until(users.clone(), "billing", support::SOON, is_reported).await;
}

fn apply(cluster: &Cluster, what: &str, manifest: &str) {
    println!("    # {what}");
    kubectl(cluster, &["apply", "-f", "-"], Some(manifest));
}

/// Runs the testbed's kubectl, or the one on the PATH, and prints its output.
fn kubectl(cluster: &Cluster, arguments: &[&str], input: Option<&str>) {
    let binary = cluster.kubectl.clone().unwrap_or_else(|| "kubectl".into());
    println!("    $ kubectl {}", arguments.join(" "));
    let mut child = Command::new(binary)
        .args(arguments)
        .env("KUBECONFIG", &cluster.kubeconfig)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("kubectl runs");
    let mut stdin = child.stdin.take().expect("piped");
    stdin
        .write_all(input.unwrap_or_default().as_bytes())
        .expect("kubectl reads");
    drop(stdin);
    let output = child.wait_with_output().expect("kubectl ends");
    assert!(output.status.success(), "kubectl failed");
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        println!("    {line}");
    }
}
