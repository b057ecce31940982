//! `GitOps` tools: what kstatus (Flux, Helm) and this repository's Argo CD health check report for each state of an
//! object (docs/adr/0005-status-is-output-only.md), and that applying a manifest again changes nothing.

use std::io::Write;
use std::process::{Command, Stdio};

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::{DeleteParams, Patch, PatchParams};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::support::child::part;
use crate::support::world::{PROJECT, World, condition, everything, one_token};

#[derive(Debug, Deserialize)]
struct Verdict {
    kstatus: String,
    argo: String,
    message: String,
}

/// The verdicts of kstatus and Argo CD on an object as the API server returns it.
fn verdict(object: &str) -> Verdict {
    let tool = part("gitops").join("gitops");
    let mut child = Command::new(tool)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/gitops/argocd-health.lua"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the tool runs");
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(object.as_bytes()).expect("it reads");
    drop(stdin);
    let output = child.wait_with_output().expect("it ends");
    serde_json::from_slice(&output.stdout).expect("a verdict")
}

fn stored(world: &World, kind: &str, name: &str) -> String {
    let arguments = ["get", kind, name, "-n", &world.name, "-o", "json"];
    let (succeeded, output) = world.cluster.kubectl(&arguments, "");
    assert!(succeeded, "{output}");
    output
}

#[track_caller]
fn assert_verdict(world: &World, kind: &str, name: &str, kstatus: &str, argo: &str) -> String {
    let object = stored(world, kind, name);
    let verdict = verdict(&object);
    assert_eq!((&*verdict.kstatus, &*verdict.argo), (kstatus, argo), "{object}");
    verdict.message
}

/// Moves `failingSince` of the only token back, past the time after which the operator reports `Stalled`.
async fn failing_for_long(world: &World, name: &str) {
    let long_ago = Timestamp::now() - SignedDuration::from_mins(6);
    let mut status = world.users().get(name).await.expect("there").status.expect("a status");
    status.tokens[0].failing_since = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(long_ago));
    let change = json!({"status": {"tokens": status.tokens}});
    let params = PatchParams::default();
    world
        .users()
        .patch_status(name, &params, &Patch::Merge(&change))
        .await
        .expect("patched");
    world
        .user_until(name, |user| condition(user, "Stalled").is_some_and(|c| c.0 == "True"))
        .await;
}

async fn instance_that_allows(world: &World, audiences: Value) {
    world.allow(world.selector_of_namespace(), audiences).await;
    world.apply_instance(world.instance_spec()).await.expect("an instance");
}

#[tokio::test(flavor = "multi_thread")]
async fn rollout_waits_for_a_key_secret_that_is_created_later() {
    let world = World::new("late").await;
    world.instance().await;
    world
        .service_user("billing", one_token("billing-token"))
        .await
        .expect("accepted");
    // The operator has not reconciled yet. Without the default status, kstatus would report Current.
    assert_verdict(&world, "zsu", "billing", "InProgress", "Progressing");
    assert_verdict(&world, "zi", &world.instance, "InProgress", "Progressing");

    let operator = world.operator().await;
    world.ready("billing", "False", "KeySecretMissing").await;
    assert_verdict(&world, "zi", &world.instance, "Current", "Healthy");
    let message = assert_verdict(&world, "zsu", "billing", "InProgress", "Progressing");
    assert!(message.contains("spec.keySecretRef"), "{message}");
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    world.ready("billing", "True", "Issued").await;
    assert_verdict(&world, "zsu", "billing", "Current", "Healthy");

    // A new generation that the operator has not reconciled.
    operator.terminate().await;
    let mut spec = one_token("billing-token");
    spec["tokens"][0]["projectRoles"] = json!(true);
    world.service_user("billing", spec).await.expect("accepted");
    assert_verdict(&world, "zsu", "billing", "InProgress", "Progressing");
    let _operator = world.operator().await;
    world.ready("billing", "True", "Issued").await;
    assert_verdict(&world, "zsu", "billing", "Current", "Healthy");
}

#[tokio::test(flavor = "multi_thread")]
async fn lasting_failure_is_reported_as_failed_and_its_fix_as_healthy() {
    let world = World::new("lasting").await;
    let _operator = world.operator().await;
    world.instance().await;
    world
        .service_user("billing", one_token("billing-token"))
        .await
        .expect("accepted");
    world.ready("billing", "False", "KeySecretMissing").await;
    failing_for_long(&world, "billing").await;
    let message = assert_verdict(&world, "zsu", "billing", "Failed", "Degraded");
    assert!(message.contains("spec.keySecretRef"), "{message}");
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    world.ready("billing", "True", "Issued").await;
    assert_verdict(&world, "zsu", "billing", "Current", "Healthy");

    // A policy withdraws access: the token stays in its Secret, and the object is not Ready.
    instance_that_allows(&world, json!({})).await;
    world.ready("billing", "False", "AccessDenied").await;
    assert_verdict(&world, "zsu", "billing", "InProgress", "Progressing");
    failing_for_long(&world, "billing").await;
    assert_verdict(&world, "zsu", "billing", "Failed", "Degraded");
    // A new generation starts the time until `Stalled` again.
    world
        .service_user("billing", one_token("billing-other"))
        .await
        .expect("accepted");
    world.ready("billing", "False", "AccessDenied").await;
    assert_verdict(&world, "zsu", "billing", "InProgress", "Progressing");
    instance_that_allows(&world, everything()).await;
    world.ready("billing", "True", "Issued").await;
    assert_verdict(&world, "zsu", "billing", "Current", "Healthy");
}

#[tokio::test(flavor = "multi_thread")]
async fn outage_does_not_fail_a_rollout() {
    let world = World::new("outages").await;
    let _operator = world.operator().await;
    world.instance().await;
    let user = world
        .issuer
        .user(json!({"tokenType": "JWT", "lifetimeSeconds": 30}))
        .await;
    world.key_secret("billing-key", &user).await;
    let apply = async |roles: bool, suspend: bool| {
        let mut spec = one_token("billing-token");
        // The refresh is due early, which leaves the test time before the token expires.
        spec["tokens"][0]["renewBeforePercentage"] = json!(75);
        spec["tokens"][0]["projectRoles"] = json!(roles);
        spec["suspend"] = json!(suspend);
        world.service_user("billing", spec).await.expect("accepted");
    };
    apply(false, false).await;
    world.ready("billing", "True", "Issued").await;
    world
        .issuer
        .fault(json!({"path": "/oauth/v2/token", "status": 503}))
        .await;
    // The token is valid, and its refresh fails.
    world.ready("billing", "True", "ServerError").await;
    let message = assert_verdict(&world, "zsu", "billing", "Current", "Healthy");
    assert!(message.contains("returned an internal error"), "{message}");
    // After a change of the spec, the old token no longer matches it.
    apply(true, false).await;
    world.ready("billing", "False", "ServerError").await;
    assert_verdict(&world, "zsu", "billing", "InProgress", "Progressing");
    apply(false, false).await;
    world.ready("billing", "True", "ServerError").await;
    // The token expires. The object stays InProgress during an outage of any length.
    world.ready("billing", "False", "ServerError").await;
    assert_verdict(&world, "zsu", "billing", "InProgress", "Progressing");

    // Suspended, without a token and with one.
    apply(false, true).await;
    world.ready("billing", "False", "Suspended").await;
    assert_verdict(&world, "zsu", "billing", "InProgress", "Suspended");
    world.issuer.clear_faults().await;
    apply(false, false).await;
    world.ready("billing", "True", "Issued").await;
    apply(false, true).await;
    world.ready("billing", "True", "Suspended").await;
    assert_verdict(&world, "zsu", "billing", "Current", "Suspended");
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_instance_is_degraded() {
    let world = World::new("degraded").await;
    let _operator = world.operator().await;
    let mut spec = world.instance_spec();
    // Nothing listens on the discard port.
    spec["connection"]["endpoint"] = json!("http://127.0.0.1:9");
    world.apply_instance(spec).await.expect("an instance");
    world.instance_ready("False", "InstanceUnreachable").await;
    assert_verdict(&world, "zi", &world.instance, "InProgress", "Degraded");
    world.instance().await;
    world.instance_ready("True", "InstanceReady").await;
    assert_verdict(&world, "zi", &world.instance, "Current", "Healthy");
}

/// The manifests of `examples/`, adapted to this world.
fn examples(world: &World) -> String {
    let example = |file: &str| {
        let path = format!("{}/examples/{file}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(path).expect("an example")
    };
    let connection = format!(
        "  issuer: {}\n  connection: {{allowInsecureHTTP: true}}\n",
        world.issuer.url
    );
    let instance = example("instance.yaml")
        .replace("  issuer: https://auth.example.com\n", &connection)
        .replace(
            "  name: main\n",
            &format!("  name: {0}\n  labels: {{test: {0}}}\n", world.instance),
        );
    let user = example("service-user.yaml").replace("    name: main\n", &format!("    name: {}\n", world.instance));
    format!("{instance}\n---\n{user}").replace(" shop\n", &format!(" {}\n", world.name))
}

#[tokio::test(flavor = "multi_thread")]
async fn reapplying_a_manifest_changes_nothing() {
    for flags in [&[][..], &["--server-side"][..]] {
        let world = World::new("drift").await;
        let manifest = examples(&world);
        let kubectl = |verb: &str| {
            let arguments = [&[verb, "-f", "-"], flags].concat();
            world.cluster.kubectl(&arguments, &manifest)
        };
        let (succeeded, output) = kubectl("apply");
        assert!(succeeded, "{output}");
        let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
        world.key_secret("billing-key", &user).await;
        let _operator = world.operator().await;
        world.ready("billing", "True", "Issued").await;
        world.instance_ready("True", "InstanceReady").await;
        // `kubectl diff` compares by a dry run on the API server. Exit code 0 means no difference.
        let (same, difference) = kubectl("diff");
        assert!(same && difference.is_empty(), "{flags:?}: {difference}");
        let versions = || {
            ["zsu/billing".to_owned(), format!("zi/{}", world.instance)].map(|object| {
                let path = "jsonpath={.metadata.generation} {.metadata.resourceVersion}";
                world
                    .cluster
                    .kubectl(&["get", &object, "-n", &world.name, "-o", path], "")
                    .1
            })
        };
        let before = versions();
        let (succeeded, output) = kubectl("apply");
        assert!(succeeded, "{output}");
        assert_eq!(versions(), before, "{flags:?}");
        assert_eq!(world.issuer.mints().await, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spec_is_stored_as_written() {
    let world = World::new("whole").await;
    let _operator = world.operator().await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("full-key", &user).await;
    // Every field, with values that a tool might normalize.
    let manifest = json!({
        "apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelServiceUser",
        "metadata": {"name": "full", "namespace": world.name},
        "spec": {
            "instanceRef": {"name": world.instance}, "keySecretRef": {"name": "full-key", "key": "key.json"}, "suspend": false,
            "tokens": [
                {"name": "b", "projectIDs": [PROJECT, "1"], "zitadelAPI": false, "projectRoles": true, "scopes": [],
                 "renewBefore": "90m0s", "secret": {"name": "full-b", "labels": {"app.kubernetes.io/version": "", "app.kubernetes.io/name": "x"}, "deletionPolicy": "Delete",
                 "annotations": {"reloader.stakater.com/match": ""}, "template": {"header": "Authorization: {{ token_type }} {{token}}\n"}}},
                {"name": "a", "projectIDs": [PROJECT], "scopes": ["profile", "openid"], "renewBeforePercentage": 33, "secret": {"name": "full-a"}},
            ],
        },
    })
    .to_string();
    for flags in [&[][..], &["--server-side", "--force-conflicts"][..]] {
        let (succeeded, output) = world
            .cluster
            .kubectl(&[&["apply", "-f", "-"], flags].concat(), &manifest);
        assert!(succeeded, "{output}");
        world.ready("full", "True", "Issued").await;
        let (same, difference) = world
            .cluster
            .kubectl(&[&["diff", "-f", "-"], flags].concat(), &manifest);
        assert!(same && difference.is_empty(), "{flags:?}: {difference}");
        world
            .users()
            .delete("full", &DeleteParams::default())
            .await
            .expect("deleted");
        world.secret_gone("full-a").await;
        world.secret_gone("full-b").await;
    }
}
