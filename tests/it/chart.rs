//! The chart, tested with the real Helm: what it installs, what stays after an uninstall, and several releases in one
//! cluster.

mod metadata;
mod rights;

use std::collections::BTreeSet;
use std::process::Command;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Secret};
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client};
use serde_json::{Value, json};
use zitadel_tokens::api::ZitadelServiceUser;

use crate::support::cluster::{Cluster, established};
use crate::support::helm::{NAME, Release, chart, refused, template};
use crate::support::issuer::Issuer;
use crate::support::operator::binary;
use crate::support::world::{World, condition, everything, one_token, until};
use crate::support::{EVENTUALLY, SOON};

/// Values of a release that serves this world only, on the cluster that all tests share.
fn values(world: &World, more: &Value) -> Value {
    let mut values = json!({"crds": {"enabled": false}, "instanceSelector": world.selector()});
    for (key, value) in more.as_object().expect("an object") {
        values[key] = value.clone();
    }
    values
}

#[tokio::test(flavor = "multi_thread")]
async fn release_installs_upgrades_and_uninstalls_without_deleting_service_users() {
    static ALONE: std::sync::LazyLock<Cluster> = std::sync::LazyLock::new(Cluster::start);
    let client = ALONE.client().await;
    let release = Release::install(&ALONE, "platform", &json!({}));
    established(&client).await;
    assert_crds_equal_this_build(&client).await;
    assert_eq!(release.deployment().await.spec.expect("a spec").replicas, Some(2));
    service_user(&client).await;

    // A namespace that enforces the restricted Pod Security Standard admits the pods.
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let enforce = json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}});
    namespaces
        .patch("platform", &PatchParams::default(), &Patch::Merge(&enforce))
        .await
        .expect("labelled");
    let template = serde_json::to_value(release.deployment().await.spec.expect("a spec").template).expect("JSON");
    let pod =
        json!({"metadata": {"name": "admitted", "labels": template["metadata"]["labels"]}, "spec": template["spec"]});
    let pods: Api<Pod> = Api::namespaced(client.clone(), "platform");
    let dry_run = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    pods.create(&dry_run, &serde_json::from_value(pod).expect("a pod"))
        .await
        .expect("admitted");

    // The roles view, edit and admin include service users, but no instances.
    let cluster_roles: Api<ClusterRole> = Api::all(client.clone());
    for (role, verb) in [("view", "list"), ("edit", "create"), ("admin", "create")] {
        let aggregated = |role: Option<&ClusterRole>| {
            let rules = role.and_then(|r| r.rules.as_deref()).unwrap_or_default();
            let ours = |r: &&PolicyRule| r.api_groups.as_deref() == Some(&["zitadel-tokens.dev".to_owned()]);
            let mut ours = rules.iter().filter(ours).peekable();
            ours.peek().is_some()
                && ours.clone().any(|r| r.verbs.iter().any(|v| v == verb))
                && ours.all(|r| r.resources.as_deref() == Some(&["zitadelserviceusers".to_owned()]))
        };
        let found = tokio::time::timeout(EVENTUALLY, await_condition(cluster_roles.clone(), role, aggregated));
        found.await.unwrap_or_else(|_| panic!("{role}")).expect("watched");
    }

    release.apply(&json!({"replicaCount": 3, "log": {"level": "debug"}}));
    assert_eq!(release.deployment().await.spec.expect("a spec").replicas, Some(3));

    release.uninstall();
    let name = "zitadel-tokens.platform";
    assert!(cluster_roles.get_opt(name).await.expect("readable").is_none());
    let users: Api<ZitadelServiceUser> = Api::namespaced(client.clone(), "default");
    users
        .get("billing")
        .await
        .expect("the service user outlives the release");

    // A second installation finds the CRDs. With `crds.keep: false`, its uninstall deletes them.
    release.apply(&json!({"crds": {"keep": false}}));
    users.get("billing").await.expect("the service user still exists");
    release.uninstall();
    let crds: Api<CustomResourceDefinition> = Api::all(client);
    for crd in zitadel_tokens::api::crds() {
        let name = crd.metadata.name.expect("a name");
        let gone = await_condition(crds.clone(), &name, |crd: Option<&CustomResourceDefinition>| {
            crd.is_none()
        });
        // The API server retries with growing intervals while objects remain.
        tokio::time::timeout(2 * EVENTUALLY, gone)
            .await
            .expect("gone")
            .expect("watched");
    }
}

/// The installed CRDs equal the output of `zitadel-tokens crds`: applying it changes nothing.
async fn assert_crds_equal_this_build(client: &Client) {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for crd in zitadel_tokens::api::crds() {
        let name = crd.metadata.name.clone().expect("a name");
        let installed = api.get(&name).await.expect("there").metadata.generation;
        let apply = PatchParams::apply("tests").force().dry_run();
        let applied = api.patch(&name, &apply, &Patch::Apply(&crd)).await.expect("accepted");
        assert_eq!(applied.metadata.generation, installed, "{name}");
    }
}

async fn service_user(client: &Client) {
    let object = json!({"metadata": {"name": "billing"}, "spec": {
        "instanceRef": {"name": "main"}, "keySecretRef": {"name": "billing-key"},
        "tokens": one_token("billing-token")["tokens"]}});
    let users: Api<ZitadelServiceUser> = Api::namespaced(client.clone(), "default");
    users
        .create(
            &PostParams::default(),
            &serde_json::from_value(object).expect("an object"),
        )
        .await
        .expect("created");
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaced_releases_stay_in_their_namespaces_and_share_an_instance() {
    let shop = World::with_issuer("scoped", Issuer::start(&["--tls"])).await;
    let bank = World::beside(&shop, "bank").await;
    let gone = format!("{}-gone", shop.name);
    shop.namespace(&gone).await;
    let mut spec = shop.instance_spec();
    let both = json!({"matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "In", "values": [shop.name, bank.name]}]});
    shop.allow(both, everything()).await;
    spec["connection"] = json!({"caSecretRef": {"name": "zitadel-ca"}});
    shop.apply_instance(spec).await.expect("an instance");
    let install = |world: &World, writes: bool, namespaces: &[&str]| {
        let home = format!("{}-home", world.name);
        let more = json!({"watchNamespaces": namespaces, "writeInstanceStatus": writes});
        Release::install(world.cluster, &home, &values(world, &more))
    };
    let for_shop = install(&shop, true, &[&shop.name, &gone]);
    let for_bank = install(&bank, false, &[&bank.name]);

    // Each operator reads the CA of the instance in its own namespace.
    let ca = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "zitadel-ca"}, "stringData": {"ca.crt": shop.issuer.ca}});
    for release in [&for_shop, &for_bank] {
        let secrets: Api<Secret> = Api::namespaced(shop.client.clone(), &release.namespace);
        let apply = PatchParams::apply("tests");
        secrets
            .patch("zitadel-ca", &apply, &Patch::Apply(&ca))
            .await
            .expect("written");
    }

    // After a namespace and the Role in it are deleted, a restarted operator still serves the other namespaces.
    let namespaces: Api<Namespace> = Api::all(shop.client.clone());
    namespaces
        .delete(&gone, &DeleteParams::default())
        .await
        .expect("deleted");
    let is_gone = await_condition(namespaces, &gone, |n: Option<&Namespace>| n.is_none());
    tokio::time::timeout(EVENTUALLY, is_gone)
        .await
        .expect("gone")
        .expect("watched");

    let operators = [for_shop.operator().await, for_bank.operator().await];
    for world in [&shop, &bank] {
        world.simple("billing", json!({"tokenType": "JWT"})).await;
        world.ready("billing", "True", "Issued").await;
        // The operator watches Secrets in this namespace: it replaces a deleted one.
        let old = world.secrets().get("billing-token").await.expect("there").metadata.uid;
        let delete = DeleteParams::default();
        world.secrets().delete("billing-token", &delete).await.expect("deleted");
        until(world.secrets(), "billing-token", SOON, |s: &Secret| {
            s.metadata.uid != old
        })
        .await;
    }
    // Both operators detect an outage, and one writes the instance's status. When the outage ends, the failed service
    // users of both recover at once.
    for path in ["/.well-known/openid-configuration", "/oauth/v2/token"] {
        shop.issuer.fault(json!({"path": path, "status": 503})).await;
    }
    for world in [&shop, &bank] {
        world.renew("billing").await;
        world.ready("billing", "True", "ServerError").await;
    }
    shop.instance_ready("False", "ServerError").await;
    shop.issuer.clear_faults().await;
    shop.instance_ready("True", "InstanceReady").await;
    for world in [&shop, &bank] {
        world.ready("billing", "True", "Issued").await;
    }
    for operator in operators {
        operator.terminate().await;
    }

    for (release, own) in [(&for_shop, &shop), (&for_bank, &bank)] {
        let requests = own.cluster.audit.requests_of(&release.user());
        let touched: BTreeSet<_> = requests
            .iter()
            .filter(|r| ["secrets", "zitadelserviceusers", "events"].contains(&r.resource.as_str()))
            .map(|r| r.namespace.as_str())
            .collect();
        let mut allowed: BTreeSet<_> = [own.name.as_str(), &release.namespace].into();
        if own.name == shop.name {
            allowed.insert(&gone);
        }
        assert_eq!(touched, allowed);
        let refused: Vec<_> = requests
            .iter()
            .filter(|r| r.code == 403 && r.namespace != gone)
            .collect();
        assert!(refused.is_empty(), "{refused:#?}");
        let status_writes = requests.iter().filter(|r| r.resource == "zitadelinstances/status");
        assert_eq!(status_writes.count() > 0, own.name == shop.name);
    }
}

/// Values that the chart passes through must be valid Kubernetes fields.
#[tokio::test(flavor = "multi_thread")]
async fn kubernetes_accepts_the_values_that_the_chart_passes_through() {
    let world = World::new("values").await;
    let more = json!({
        "namespaceOverride": world.name,
        "strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
        "priorityClassName": "system-cluster-critical",
        "runtimeClassName": "gvisor",
        "dnsPolicy": "None",
        "dnsConfig": {"nameservers": ["192.0.2.53"]},
        "hostAliases": [{"ip": "192.0.2.1", "hostnames": ["auth.example.com"]}],
        "podDisruptionBudget": {"minAvailable": "50%"},
        "networkPolicy": {"ingress": [{"from": [{"namespaceSelector": {}}], "ports": [{"port": "http"}]}]},
        "grafanaDashboard": {"enabled": true, "namespace": "default"},
        "extraObjects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-more", "namespace": world.name}}],
    });
    let release = Release::install(world.cluster, &format!("{}-home", world.name), &values(&world, &more));
    let deployments: Api<Deployment> = Api::namespaced(world.client.clone(), &world.name);
    let spec = deployments.get(NAME).await.expect("there").spec.expect("a spec");
    let pod = spec.template.spec.expect("a pod's spec");
    assert_eq!(pod.runtime_class_name.as_deref(), Some("gvisor"));
    let config_maps: Api<ConfigMap> = Api::namespaced(world.client.clone(), &world.name);
    config_maps.get("zitadel-tokens-more").await.expect("there");
    // The uninstall also deletes objects in other namespaces.
    release.uninstall();
    let dashboards: Api<ConfigMap> = Api::namespaced(world.client.clone(), "default");
    let dashboard = dashboards.get_opt("zitadel-tokens-dashboard").await.expect("readable");
    assert!(dashboard.is_none());
}

/// Helm 4 uses server-side apply and Helm 3 does not. They keep different fields of the old strategy.
#[tokio::test(flavor = "multi_thread")]
async fn upgrade_disables_and_re_enables_leader_election() {
    let world = World::new("strategy").await;
    for side in ["true", "false"] {
        let release = Release::named(world.cluster, &format!("{}-home-{side}", world.name));
        let alone = json!({"leaderElection": {"enabled": false}, "replicaCount": 1});
        for (more, expected) in [
            (json!({}), "RollingUpdate"),
            (alone, "Recreate"),
            (json!({}), "RollingUpdate"),
        ] {
            release.apply_with(&values(&world, &more), &[&format!("--server-side={side}")]);
            let spec = release.deployment().await.spec.expect("a spec");
            let strategy = spec.strategy.expect("a strategy");
            assert_eq!(strategy.type_.as_deref(), Some(expected), "--server-side={side}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn helm_test_probe_reports_operator_health() {
    let world = World::new("probe").await;
    let operator = world.operator().await;
    let probe = |path: &str| {
        let mut probe = Command::new(binary());
        let url = format!("http://{}{path}", operator.address());
        probe.args(["probe", &url]).status().expect("it runs").success()
    };
    assert!(probe("/readyz"));
    assert!(!probe("/no-such-path"));
}

#[test]
fn chart_version_equals_crate_version() {
    let metadata = std::fs::read_to_string(chart().join("Chart.yaml")).expect("a chart");
    for key in ["version", "appVersion"] {
        let line = format!("\n{key}: {}\n", env!("CARGO_PKG_VERSION"));
        assert!(
            metadata.contains(&line),
            "{key} of the chart differs from the crate's version"
        );
    }
}

/// A page on the branch `main` may be gone when a user of an installed version opens the link.
#[test]
fn chart_links_point_to_its_own_version() {
    let find = Command::new("grep")
        .args(["-rhoE", "--exclude-dir=tests", "/blob/[^/]+/"])
        .arg(chart())
        .output();
    let found = String::from_utf8(find.expect("grep runs").stdout).expect("UTF-8");
    let ours = concat!("/blob/v", env!("CARGO_PKG_VERSION"), "/");
    // Helm and helm-docs substitute these.
    let filled_in = [
        "/blob/v{{ .Chart.AppVersion }}/",
        "/blob/v{{ template \"chart.appVersion\" . }}/",
    ];
    let wrong: BTreeSet<_> = found.lines().filter(|l| *l != ours && !filled_in.contains(l)).collect();
    assert!(found.lines().any(|l| l == ours) && wrong.is_empty(), "{wrong:?}");
}

/// If a user sets a value to null, Helm removes its default before it checks the schema. The chart must refuse this for
/// values that need a default: a boolean would become false (which deletes the CRDs with the release, or disables a
/// policy), and the operator does not start with an empty setting.
#[test]
fn chart_refuses_null_where_it_has_no_meaning() {
    let values: Value =
        serde_saphyr::from_str(&std::fs::read_to_string(chart().join("values.yaml")).expect("values")).expect("YAML");
    let mut paths = vec![
        "concurrent".to_owned(),
        "leaderElection.leaseName".into(),
        "log.level".into(),
        "log.format".into(),
    ];
    booleans("", &values, &mut paths);
    assert!(paths.len() > 15, "{paths:?}");
    for path in paths {
        let error = refused(&chart(), &json!({&path: null}));
        let name = path.rsplit('.').next().expect("a name");
        assert!(error.contains(&format!("missing property '{name}'")), "{path}: {error}");
    }
}

/// Paths of all boolean values, except those that the chart passes through to Kubernetes.
fn booleans(at: &str, value: &Value, paths: &mut Vec<String>) {
    for (key, value) in value.as_object().into_iter().flatten() {
        match value {
            Value::Bool(_) => paths.push(format!("{at}{key}")),
            _ if key.to_lowercase().ends_with("securitycontext") => {}
            _ => booleans(&format!("{at}{key}."), value, paths),
        }
    }
}

/// The test sets the digest as .github/workflows/release.yaml does.
#[test]
fn published_chart_pins_the_image_digest_unless_a_tag_is_set() {
    let copy = std::env::temp_dir().join(format!("zitadel-tokens-chart-{}", std::process::id()));
    let copied = Command::new("cp").arg("-r").args([&chart(), &copy]).status();
    assert!(copied.expect("cp runs").success());
    let metadata = copy.join("Chart.yaml");
    let annotation = "annotations: {zitadel-tokens.dev/image-digest: \"sha256:abc\"}\n";
    let whole = std::fs::read_to_string(&metadata).expect("a chart") + annotation;
    std::fs::write(&metadata, whole).expect("written");

    let image = "image: ghcr.io/zitadel-tokens/zitadel-tokens";
    let published = template(&copy, &json!({"image": {"tag": ""}}));
    let tagged = template(&copy, &json!({"image": {"tag": "9"}}));
    std::fs::remove_dir_all(&copy).expect("removed");
    assert!(published.contains(&format!("{image}@sha256:abc\n")), "{published}");
    assert!(tagged.contains(&format!("{image}:9\n")), "{tagged}");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_survive_an_uninstall_and_a_deletion_waits_for_the_next_installation() {
    let world = World::new("keys-stay").await;
    let home = format!("{}-home", world.name);
    let release = Release::install(world.cluster, &home, &values(&world, &json!({})));
    let operator = release.operator().await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    let mut spec = one_token("billing-token");
    spec["keyRotation"] = json!({"interval": "1h"});
    world.service_user("billing", spec).await.expect("accepted");
    world
        .user_until("billing", |user| {
            condition(user, "KeyRotated").is_some_and(|(status, _, _)| status == "True")
        })
        .await;
    operator.terminate().await;
    release.uninstall();
    let ledgers: Api<Secret> = Api::namespaced(world.client.clone(), &home);
    let labelled = ListParams::default().labels("zitadel-tokens.dev/key-ledger");
    let count = async || ledgers.list(&labelled).await.expect("listed").items.len();
    assert_eq!(count().await, 1);

    world.delete("billing").await;
    let waiting = world.users().get("billing").await.expect("still there");
    assert!(waiting.metadata.deletion_timestamp.is_some());
    let release = Release::install(world.cluster, &home, &values(&world, &json!({})));
    let _operator = release.operator().await;
    world.user_gone("billing").await;
    assert_eq!(count().await, 0);
    let keys = world.issuer.keys(&user.id).await;
    let ids: Vec<String> = keys.into_iter().map(|key| key.id).collect();
    assert_eq!(ids, [user.key_id]);
}
