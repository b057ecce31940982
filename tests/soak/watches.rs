//! The operator finds changes that happened while it could not watch, even after the API server has dropped the
//! history.

use kube::api::DeleteParams;
use serde_json::{Value, json};

use crate::support::EVENTUALLY;
use crate::support::cluster::{Cluster, install_crds};
use crate::support::issuer::Issuer;
use crate::support::operator::Operator;
use crate::support::proxy::Proxy;
use crate::support::world::{World, data, one_token, until};

#[tokio::test(flavor = "multi_thread")]
async fn changes_during_a_watch_outage_are_repaired_after_the_relist() {
    // The API server's watch cache keeps a longer history. Without it, a compaction of etcd leads to a real 410.
    let cluster: &'static Cluster = Box::leak(Box::new(Cluster::start_with(&["--watch-cache=false"])));
    install_crds(&cluster.client().await).await;
    for breaks_off in [true, false] {
        let world = World::on(cluster, "relist", Issuer::start(&[])).await;
        missed(&world, breaks_off).await;
    }
}

/// Changes that the watch does not report: the watch either `breaks_off` with an error, or ends normally and resumes
/// too late.
async fn missed(world: &World, breaks_off: bool) {
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let mut operator = Operator::start_with(&proxy.kubeconfig, &world.selector(), &[]).await;
    world.instance().await;
    let names = ["deleted", "edited", "labelled", "untouched"];
    for name in names {
        world.simple(name, json!({"tokenType": "JWT"})).await;
    }
    let mut tokens = Vec::new();
    for name in names {
        world.ready(name, "True", "Issued").await;
        tokens.push(world.token(&format!("{name}-token")).await);
    }
    let untouched = world
        .secrets()
        .get("untouched-token")
        .await
        .expect("the Secret exists")
        .metadata
        .resource_version;

    let hold = proxy.hold_before("GET", "/api/v1/secrets?");
    if breaks_off {
        proxy.refuse("");
        let failed = "a watch failed and will be retried kind=Secret";
        operator.await_line(failed).await;
    } else {
        proxy.hang_up();
        hold.reached().await;
    }
    world
        .secrets()
        .delete("deleted-token", &DeleteParams::default())
        .await
        .expect("deleted");
    world
        .edit_secret("edited-token", json!({"stringData": {"token": "stolen"}}))
        .await;
    world.edit_secret("labelled-token", json!({"metadata": {"labels": {"zitadel-tokens.dev/service-user": null}}, "stringData": {"issuer": "other"}})).await;
    compact(world).await;
    proxy.open();
    hold.release();
    if !breaks_off {
        operator
            .await_line("kind=Secret error=\"the resource version is too old: 410\"")
            .await;
    }
    let deleted = until(world.secrets(), "deleted-token", EVENTUALLY, |s| {
        data(s).contains_key("token")
    })
    .await;
    assert_ne!(data(&deleted)["token"], tokens[0]);
    let edited = until(world.secrets(), "edited-token", EVENTUALLY, |s| {
        data(s)["token"] != "stolen"
    })
    .await;
    assert_ne!(data(&edited)["token"], tokens[1]);
    let labelled = until(world.secrets(), "labelled-token", EVENTUALLY, |s| {
        let label = s
            .metadata
            .labels
            .as_ref()
            .and_then(|l| l.get("zitadel-tokens.dev/service-user"));
        label.is_some_and(|l| l == "labelled") && data(s)["issuer"] == world.issuer.url
    })
    .await;
    assert_eq!(data(&labelled)["token"], tokens[2], "repaired without a token request");
    world.sentinel().await;
    let after = world
        .secrets()
        .get("untouched-token")
        .await
        .expect("there")
        .metadata
        .resource_version;
    assert_eq!(untouched, after);
    assert_eq!(world.issuer.mints().await, names.len() + 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_secret_of_an_entry_removed_while_the_operator_was_down_is_deleted() {
    let world = World::new("down").await;
    let operator = world.operator().await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    let mut two = one_token("billing-token");
    let more = json!({"name": "more", "projectIDs": ["2"], "secret": {"name": "more-token"}});
    two["tokens"].as_array_mut().expect("a list").push(more);
    world.service_user("billing", two).await.expect("accepted");
    world.token("more-token").await;
    let kept = world.token("billing-token").await;
    operator.terminate().await;
    world
        .service_user("billing", one_token("billing-token"))
        .await
        .expect("accepted");

    let _operator = world.operator().await;
    world.secret_gone("more-token").await;
    assert_eq!(world.token("billing-token").await, kept);
    assert_eq!(world.issuer.mints().await, 2);
}

/// Compacts etcd's history through its JSON gateway. A watch that resumes from an older version gets 410.
async fn compact(world: &World) {
    let port = world.cluster.ready["ports"]["etcd"].as_u64().expect("a port");
    let http = reqwest::Client::builder().no_proxy().build().expect("a client");
    let call = async |path: &str, body: Value| -> Value {
        let answer = http
            .post(format!("http://127.0.0.1:{port}/v3/kv/{path}"))
            .json(&body)
            .send()
            .await
            .expect("etcd answers");
        answer.json().await.expect("JSON")
    };
    let range = call("range", json!({"key": "AA=="})).await;
    let revision = range["header"]["revision"].as_str().expect("a revision").to_owned();
    let compacted = call("compaction", json!({"revision": revision, "physical": true})).await;
    assert!(compacted["header"].is_object(), "{compacted}");
}
