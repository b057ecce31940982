//! What `GitOps` tools see: the verdict of kstatus (Flux, Helm) and of our health check in Argo CD, in each state that an
//! object can be in (design §3.4), and that applying a manifest again changes nothing.

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

/// What both make of an object as the API server gives it.
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
    let (agreed, said) = world.cluster.kubectl(&arguments, "");
    assert!(agreed, "{said}");
    said
}

#[track_caller]
fn assert_verdict(world: &World, kind: &str, name: &str, kstatus: &str, argo: &str) -> String {
    let object = stored(world, kind, name);
    let verdict = verdict(&object);
    assert_eq!((&*verdict.kstatus, &*verdict.argo), (kstatus, argo), "{object}");
    verdict.message
}

/// Sets back since when the only token has failed, so that the operator's patience has run out.
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
async fn a_roll_out_waits_for_a_key_that_comes_later() {
    let world = World::new("late").await;
    world.instance().await;
    world
        .service_user("billing", one_token("billing-token"))
        .await
        .expect("accepted");
    // Nobody has looked yet: without a status, kstatus would call it done.
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

    // A new version of it, which nobody has looked at.
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
async fn what_lasts_is_told_as_a_failure_and_mended_as_a_success() {
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

    // Access is withdrawn: the token stays where it is, and is not told as good.
    instance_that_allows(&world, json!({})).await;
    world.ready("billing", "False", "AccessDenied").await;
    assert_verdict(&world, "zsu", "billing", "InProgress", "Progressing");
    failing_for_long(&world, "billing").await;
    assert_verdict(&world, "zsu", "billing", "Failed", "Degraded");
    // A new version gets the same patience again.
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
async fn an_outage_is_no_failure_of_a_roll_out() {
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
        // Due early, so that there is time to look around before it expires.
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
    // The token is valid, and its renewal fails.
    world.ready("billing", "True", "ServerError").await;
    let message = assert_verdict(&world, "zsu", "billing", "Current", "Healthy");
    assert!(message.contains("error of its own"), "{message}");
    // A token of other inputs is not what is asked for.
    apply(true, false).await;
    world.ready("billing", "False", "ServerError").await;
    assert_verdict(&world, "zsu", "billing", "InProgress", "Progressing");
    apply(false, false).await;
    world.ready("billing", "True", "ServerError").await;
    // It expires: on its way still, however long that takes.
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
async fn an_instance_that_does_not_answer_is_degraded() {
    let world = World::new("degraded").await;
    let _operator = world.operator().await;
    let mut spec = world.instance_spec();
    // Nobody listens on the discard port.
    spec["connection"]["endpoint"] = json!("http://127.0.0.1:9");
    world.apply_instance(spec).await.expect("an instance");
    world.instance_ready("False", "InstanceUnreachable").await;
    assert_verdict(&world, "zi", &world.instance, "InProgress", "Degraded");
    world.instance().await;
    world.instance_ready("True", "InstanceReady").await;
    assert_verdict(&world, "zi", &world.instance, "Current", "Healthy");
}

/// The manifests of `examples/`, made for this world.
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
async fn applying_a_manifest_again_changes_nothing() {
    for how in [&[][..], &["--server-side"][..]] {
        let world = World::new("drift").await;
        let manifest = examples(&world);
        let kubectl = |verb: &str| {
            let arguments = [&[verb, "-f", "-"], how].concat();
            world.cluster.kubectl(&arguments, &manifest)
        };
        let (agreed, said) = kubectl("apply");
        assert!(agreed, "{said}");
        let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
        world.key_secret("billing-key", &user).await;
        let _operator = world.operator().await;
        world.ready("billing", "True", "Issued").await;
        world.instance_ready("True", "InstanceReady").await;
        // Exit code 0: no difference, by a dry run on the API server.
        let (same, difference) = kubectl("diff");
        assert!(same && difference.is_empty(), "{how:?}: {difference}");
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
        let (agreed, said) = kubectl("apply");
        assert!(agreed, "{said}");
        assert_eq!(versions(), before, "{how:?}");
        assert_eq!(world.issuer.mints().await, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_whole_spec_comes_back_as_it_was_written() {
    let world = World::new("whole").await;
    let _operator = world.operator().await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("full-key", &user).await;
    // Every field, and values that a tool might make prettier.
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
    for how in [&[][..], &["--server-side", "--force-conflicts"][..]] {
        let (agreed, said) = world.cluster.kubectl(&[&["apply", "-f", "-"], how].concat(), &manifest);
        assert!(agreed, "{said}");
        world.ready("full", "True", "Issued").await;
        let (same, difference) = world.cluster.kubectl(&[&["diff", "-f", "-"], how].concat(), &manifest);
        assert!(same && difference.is_empty(), "{how:?}: {difference}");
        world
            .users()
            .delete("full", &DeleteParams::default())
            .await
            .expect("deleted");
        world.secret_gone("full-a").await;
        world.secret_gone("full-b").await;
    }
}
