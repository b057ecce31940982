//! The chart, by the real Helm: what it installs and leaves, and releases beside each other.

mod metadata;
mod rights;

use std::collections::BTreeSet;
use std::process::Command;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Secret};
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client};
use serde_json::{Value, json};
use zitadel_tokens::api::ZitadelServiceUser;

use crate::support::cluster::{Cluster, established};
use crate::support::helm::{NAME, Release, chart, refused, template};
use crate::support::issuer::Issuer;
use crate::support::operator::binary;
use crate::support::world::{World, everything, one_token, until};
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
async fn a_release_is_installed_upgraded_and_uninstalled_and_leaves_the_tokens() {
    static ALONE: std::sync::LazyLock<Cluster> = std::sync::LazyLock::new(Cluster::start);
    let client = ALONE.client().await;
    let release = Release::install(&ALONE, "platform", &json!({}));
    established(&client).await;
    the_crds_are_ours(&client).await;
    assert_eq!(release.deployment().await.spec.expect("a spec").replicas, Some(2));
    service_user(&client).await;

    // Its pods are let in where the restricted standard is enforced.
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let enforce = json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}});
    namespaces
        .patch("platform", &PatchParams::default(), &Patch::Merge(&enforce))
        .await
        .expect("labelled");
    let template = serde_json::to_value(release.deployment().await.spec.expect("a spec").template).expect("JSON");
    let pod =
        json!({"metadata": {"name": "as-told", "labels": template["metadata"]["labels"]}, "spec": template["spec"]});
    let pods: Api<Pod> = Api::namespaced(client.clone(), "platform");
    let dry_run = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    pods.create(&dry_run, &serde_json::from_value(pod).expect("a pod"))
        .await
        .expect("let in");

    // People get service users by the roles that they have, and no instance.
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
    assert!(cluster_roles.get_opt(name).await.expect("asked").is_none());
    let users: Api<ZitadelServiceUser> = Api::namespaced(client.clone(), "default");
    users.get("billing").await.expect("it outlives the release");

    // Another go finds the CRDs, and takes them along if told so.
    release.apply(&json!({"crds": {"keep": false}}));
    users.get("billing").await.expect("it is still there");
    release.uninstall();
    let crds: Api<CustomResourceDefinition> = Api::all(client);
    for crd in zitadel_tokens::api::crds() {
        let name = crd.metadata.name.expect("a name");
        let gone = await_condition(crds.clone(), &name, |crd: Option<&CustomResourceDefinition>| {
            crd.is_none()
        });
        // The API server tries again ever more seldom while objects are left.
        tokio::time::timeout(2 * EVENTUALLY, gone)
            .await
            .expect("gone")
            .expect("watched");
    }
}

/// What went through the templates is what `zitadel-tokens crds` prints: to apply that changes nothing.
async fn the_crds_are_ours(client: &Client) {
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
async fn releases_for_some_namespaces_stay_there_and_share_an_instance() {
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

    // Each reads the instance's certificates in its own namespace.
    let ca = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "zitadel-ca"}, "stringData": {"ca.crt": shop.issuer.ca}});
    for release in [&for_shop, &for_bank] {
        let secrets: Api<Secret> = Api::namespaced(shop.client.clone(), &release.namespace);
        let apply = PatchParams::apply("tests");
        secrets
            .patch("zitadel-ca", &apply, &Patch::Apply(&ca))
            .await
            .expect("written");
    }

    // A tenant that goes, and its Role with it, does not keep the others from being served after a restart.
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
        // Watched there: what is deleted comes back.
        let old = world.secrets().get("billing-token").await.expect("there").metadata.uid;
        let delete = DeleteParams::default();
        world.secrets().delete("billing-token", &delete).await.expect("deleted");
        until(world.secrets(), "billing-token", SOON, |s: &Secret| {
            s.metadata.uid != old
        })
        .await;
    }
    // An outage, seen by both, is told by the one; when it is over, those of both that failed go on at once.
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
        let mut may: BTreeSet<_> = [own.name.as_str(), &release.namespace].into();
        if own.name == shop.name {
            may.insert(&gone);
        }
        assert_eq!(touched, may);
        let refused: Vec<_> = requests
            .iter()
            .filter(|r| r.code == 403 && r.namespace != gone)
            .collect();
        assert!(refused.is_empty(), "{refused:#?}");
        let told = requests.iter().filter(|r| r.resource == "zitadelinstances/status");
        assert_eq!(told.count() > 0, own.name == shop.name);
    }
}

/// Where the chart hands on what users say, Kubernetes has to know it.
#[tokio::test(flavor = "multi_thread")]
async fn kubernetes_takes_what_users_may_say() {
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
    // What is elsewhere goes too.
    release.uninstall();
    let dashboards: Api<ConfigMap> = Api::namespaced(world.client.clone(), "default");
    let dashboard = dashboards.get_opt("zitadel-tokens-dashboard").await.expect("asked");
    assert!(dashboard.is_none());
}

/// Helm 4 applies on the server's side, Helm 3 does not, and what it leaves of an old strategy differs.
#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_gives_up_leader_election_and_takes_it_back() {
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
async fn the_probe_of_helm_test_tells_whether_an_operator_is_well() {
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
fn the_chart_has_the_version_of_the_crate() {
    let metadata = std::fs::read_to_string(chart().join("Chart.yaml")).expect("a chart");
    for key in ["version", "appVersion"] {
        let line = format!("\n{key}: {}\n", env!("CARGO_PKG_VERSION"));
        assert!(metadata.contains(&line), "{key} of the chart is another");
    }
}

/// Of `main` they may be gone when an installed version needs them.
#[test]
fn links_of_the_chart_lead_to_its_own_version() {
    let find = Command::new("grep")
        .args(["-rhoE", "--exclude-dir=tests", "/blob/[^/]+/"])
        .arg(chart())
        .output();
    let found = String::from_utf8(find.expect("grep runs").stdout).expect("UTF-8");
    let ours = concat!("/blob/v", env!("CARGO_PKG_VERSION"), "/");
    // Filled in by Helm and by helm-docs.
    let filled_in = [
        "/blob/v{{ .Chart.AppVersion }}/",
        "/blob/v{{ template \"chart.appVersion\" . }}/",
    ];
    let wrong: BTreeSet<_> = found.lines().filter(|l| *l != ours && !filled_in.contains(l)).collect();
    assert!(found.lines().any(|l| l == ours) && wrong.is_empty(), "{wrong:?}");
}

/// A user's null removes the default before the schema is checked. A value that has no meaning of its own without one
/// must be refused then: a boolean would be false (CRDs that are deleted with the release, a policy that is off), and the
/// operator does not start with an empty setting.
#[test]
fn null_is_refused_where_it_has_no_meaning() {
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
        let said = refused(&chart(), &json!({&path: null}));
        let name = path.rsplit('.').next().expect("a name");
        assert!(said.contains(&format!("missing property '{name}'")), "{path}: {said}");
    }
}

/// Paths of all values that are true or false, but for those that are handed on to Kubernetes as they are.
fn booleans(at: &str, value: &Value, paths: &mut Vec<String>) {
    for (key, value) in value.as_object().into_iter().flatten() {
        match value {
            Value::Bool(_) => paths.push(format!("{at}{key}")),
            _ if key.to_lowercase().ends_with("securitycontext") => {}
            _ => booleans(&format!("{at}{key}."), value, paths),
        }
    }
}

/// As .github/workflows/release.yaml publishes it.
#[test]
fn a_published_chart_takes_the_image_by_its_digest_unless_a_tag_is_asked_for() {
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
