//! The allow list for labels and annotations on token Secrets, and that the operator and the chart agree on it. Why
//! there is an allow list: docs/adr/0001-allow-list-for-secret-metadata.md.

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use zitadel_tokens::api::ZitadelServiceUser;
use zitadel_tokens::api::metadata::ALLOWED_SECRET_METADATA;
use zitadel_tokens::domain::allow_list::AllowList;
use zitadel_tokens::domain::validate;

use super::values;
use crate::support::eventually;
use crate::support::helm::{Release, chart, refused, template};
use crate::support::world::{World, one_token};

/// Entries that a platform team adds.
const ADDED: [&str; 3] = ["team", "example.com/*", "example.org/cost-center"];

/// Keys that make controllers act on a Secret: they copy or delete it, or read it as a credential, a release, a cluster
/// or a file to load.
const OF_CONTROLLERS: [&str; 45] = [
    "argocd.argoproj.io/secret-type",
    "argocd.argoproj.io/tracking-id",
    "kustomize.toolkit.fluxcd.io/prune",
    "reconcile.fluxcd.io/watch",
    "kubed.appscode.com/sync",
    "kubed.appscode.com/origin",
    "velero.io/backup-name",
    "replicator.v1.mittwald.de/replicate-to",
    "replicator.v1.mittwald.de/replication-allowed",
    "reflector.v1.k8s.emberstack.com/reflection-auto-enabled",
    "synator/sync",
    "kube-syncer/auto",
    "secretsync.ibm.com/replicate",
    "generate.kyverno.io/clone-source",
    "policies.kyverno.io/title",
    "velero.io/exclude-from-backup",
    "field.cattle.io/projectId",
    "cattle.io/creator",
    "provisioning.cattle.io/managed",
    "istio/multiCluster",
    "jenkins.io/credentials-type",
    "jenkins.io/credentials-description",
    "tekton.dev/git-0",
    "tekton.dev/docker-0",
    "build.shipwright.io/referenced.secret",
    "cluster.x-k8s.io/cluster-name",
    "clusterctl.cluster.x-k8s.io/move",
    "multicluster.x-k8s.io/name",
    "cluster.open-cluster-management.io/backup",
    "apps.open-cluster-management.io/deliverables",
    "hive.openshift.io/secret-type",
    "strimzi.io/cluster",
    "sealedsecrets.bitnami.com/managed",
    "external-secrets.io/type",
    "vault.security.banzaicloud.io/vault-addr",
    "secrets.hashicorp.com/vso",
    "cert-manager.io/allow-direct-injection",
    "trust.cert-manager.io/bundle",
    "grafana_datasource",
    "grafana_dashboard",
    "owner",
    "name",
    "status",
    "helm.sh/resource-policy",
    "meta.helm.sh/release-name",
];

/// Such keys of Kubernetes. The operator's account may write them, because webhooks and cloud providers add them.
const OF_KUBERNETES: [&str; 5] = [
    "kubernetes.io/service-account.name",
    "app.kubernetes.io/instance",
    "storageos.csi.k8s.io/secret-name",
    "secrets-store.csi.k8s.io/managed",
    "kubectl.kubernetes.io/last-applied-configuration",
];

/// Where a key is set, and a value for it.
const PLACES: [(&str, &str); 2] = [("labels", "x"), ("annotations", "any text")];

/// A service user whose Secret gets these labels or annotations.
fn service_user(world: &World, place: &str, entries: &Value) -> Value {
    let mut spec = one_token("token");
    spec["instanceRef"] = json!({"name": world.instance});
    spec["keySecretRef"] = json!({"name": "key"});
    spec["tokens"][0]["secret"][place] = entries.clone();
    json!({"apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelServiceUser", "metadata": {"name": "tried"}, "spec": spec})
}

/// A token Secret with these labels or annotations, as the operator writes it.
fn token_secret(place: &str, entries: &Value) -> Value {
    let owners = json!([{"apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelServiceUser", "name": "tried",
        "uid": "6d0c5b1e-0000-4000-8000-000000000000", "controller": true}]);
    let mut secret = json!({"metadata": {"name": "tried", "ownerReferences": owners,
        "labels": {"app.kubernetes.io/managed-by": "zitadel-tokens", "zitadel-tokens.dev/service-user": "tried"},
        "annotations": {"zitadel-tokens.dev/record": "{}"}}, "type": "Opaque"});
    for (key, value) in entries.as_object().expect("entries") {
        secret["metadata"][place][key] = value.clone();
    }
    secret
}

fn entry(key: &str, value: &str) -> Value {
    Value::Object([(key.to_owned(), json!(value))].into_iter().collect())
}

/// All components that check a key.
struct Judges {
    allowed: AllowList,
    users: Api<ZitadelServiceUser>,
    as_operator: Api<Secret>,
}

impl Judges {
    /// A release for this world's namespace whose policies are in force; no operator runs.
    async fn of(world: &World, added: &[&str]) -> Self {
        let values =
            json!({"crds": {"enabled": false}, "watchNamespaces": [world.name], "allowedSecretMetadata": added});
        let release = Release::install(world.cluster, &format!("{}-home", world.name), &values);
        let judges = Self {
            allowed: AllowList::with(added).expect("well-formed"),
            users: world.users(),
            as_operator: Api::namespaced(release.client().await, &world.name),
        };
        let denied = entry("denied", "x");
        eventually("both policies are in force", async || {
            is_denied(&judges.user(&service_user(world, "labels", &denied)).await)
                && is_denied(&judges.secret(&token_secret("labels", &denied)).await)
        })
        .await;
        judges
    }

    /// What the API server answers if a tenant applies this service user.
    async fn user(&self, user: &Value) -> Result<(), String> {
        let user = serde_json::from_value(user.clone()).expect("a service user");
        let tried = self.users.create(&dry_run(), &user).await;
        tried.map(drop).map_err(|e| e.to_string())
    }

    /// What the API server answers if the operator's account writes this Secret.
    async fn secret(&self, secret: &Value) -> Result<(), String> {
        let secret = serde_json::from_value(secret.clone()).expect("a Secret");
        let tried = self.as_operator.create(&dry_run(), &secret).await;
        tried.map(drop).map_err(|e| e.to_string())
    }

    /// The result of the operator's own validation.
    fn operator(&self, user: &Value) -> Result<(), String> {
        let user: ZitadelServiceUser = serde_json::from_value(user.clone()).expect("a service user");
        validate::token(&user.spec, 0, &self.allowed).map_err(|v| v.to_string())
    }
}

/// Whether one of the chart's policies denied the request.
fn is_denied(result: &Result<(), String>) -> bool {
    result
        .as_ref()
        .is_err_and(|error| error.contains("allowedSecretMetadata"))
}

fn dry_run() -> PostParams {
    PostParams {
        dry_run: true,
        ..PostParams::default()
    }
}

/// A key that an entry of the list allows.
fn example_of(entry: &str) -> String {
    entry.replace('*', "some.key_1")
}

#[tokio::test(flavor = "multi_thread")]
async fn disallowed_keys_are_refused_to_tenants_and_to_the_operator_account() {
    let world = World::new("others-keys").await;
    let judges = Judges::of(&world, &ADDED).await;
    let mut wrong = Vec::new();
    for key in OF_CONTROLLERS.iter().chain(&OF_KUBERNETES) {
        for (place, value) in PLACES {
            let entries = entry(key, value);
            let user = service_user(&world, place, &entries);
            let field = format!("secret.{place}: ");
            let results = [judges.user(&user).await, judges.operator(&user)];
            let named = |result: &Result<(), String>| {
                let error = result.as_ref().err().map_or("", String::as_str);
                error.contains(&field) && error.contains(key) && error.contains("allowedSecretMetadata")
            };
            if !results.iter().all(named) {
                wrong.push(format!("{place} {key}: {results:?}"));
            }
            let result = judges.secret(&token_secret(place, &entries)).await;
            if is_denied(&result) != OF_CONTROLLERS.contains(key) {
                wrong.push(format!("{place} {key}: the operator's account: {result:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn allowed_keys_are_accepted_by_policies_and_operator() {
    let world = World::new("allowed-keys").await;
    let judges = Judges::of(&world, &ADDED).await;
    let more = [
        "app.kubernetes.io/part-of",
        "reloader.stakater.com/match",
        "reloader.stakater.com/ignore",
    ];
    let listed = ALLOWED_SECRET_METADATA
        .iter()
        .chain(&ADDED)
        .map(|entry| example_of(entry));
    for key in listed.chain(more.map(str::to_owned)) {
        for (place, value) in PLACES {
            let entries = entry(&key, value);
            let user = service_user(&world, place, &entries);
            assert_eq!(judges.operator(&user), Ok(()), "{place} {key}");
            assert_eq!(judges.user(&user).await, Ok(()), "{place} {key}");
            assert_eq!(
                judges.secret(&token_secret(place, &entries)).await,
                Ok(()),
                "{place} {key}"
            );
        }
    }
}

/// Objects created before the policy may contain keys that the policy refuses.
#[tokio::test(flavor = "multi_thread")]
async fn objects_older_than_the_policy_can_be_changed_and_deleted() {
    let world = World::new("old-keys").await;
    let users = world.users();
    let mut old = service_user(&world, "labels", &entry("old", "x"));
    old["metadata"]["finalizers"] = json!(["example.com/wait"]);
    old["spec"]["tokens"][0]["secret"]["annotations"] = json!({"example.net/old": "x"});
    let old = serde_json::from_value(old).expect("a service user");
    users.create(&PostParams::default(), &old).await.expect("created");
    // Another client creates this Secret before the operator's account writes it.
    let mut found = token_secret("labels", &entry("found", "x"));
    // No owner, as with deletionPolicy Retain: Kubernetes deletes a Secret whose owner does not exist.
    found["metadata"]["ownerReferences"] = json!([]);
    let found = serde_json::from_value(found).expect("a Secret");
    world
        .secrets()
        .create(&PostParams::default(), &found)
        .await
        .expect("created");
    let judges = Judges::of(&world, &[]).await;

    let merge = async |change: Value| {
        let patched = users
            .patch("tried", &PatchParams::default(), &Patch::Merge(&change))
            .await;
        patched.map(drop).map_err(|e| e.to_string())
    };
    let status = json!({"status": {"tokensReady": "1/1"}});
    let written = users
        .patch_status("tried", &PatchParams::default(), &Patch::Merge(&status))
        .await;
    written.expect("a status");
    assert_eq!(merge(json!({"metadata": {"annotations": {"a": "b"}}})).await, Ok(()));
    assert_eq!(merge(json!({"spec": {"suspend": true}})).await, Ok(()));

    let token = |name: &str, labels: Value| {
        let mut token = one_token(name)["tokens"][0].clone();
        token["name"] = json!(name);
        token["secret"]["labels"] = labels;
        token
    };
    let kept = serde_json::to_value(users.get("tried").await.expect("there").spec.tokens).expect("JSON")[0].clone();
    let with = |change: fn(&mut Value)| {
        let mut token = kept.clone();
        change(&mut token);
        token
    };
    let beside = token("beside", json!({"app.kubernetes.io/part-of": "shop"}));
    assert_eq!(merge(json!({"spec": {"tokens": [kept, beside]}})).await, Ok(()));
    for tokens in [
        json!([with(|t| t["secret"]["labels"]["old"] = json!("y"))]),
        json!([with(|t| t["secret"]["labels"]["older"] = json!("x"))]),
        json!([with(|t| t["secret"]["annotations"]["example.net/old"] = json!(""))]),
        json!([with(|t| t["secret"]["annotations"]["old"] = json!("x"))]),
        json!([kept, token("another", json!({"old": "x"}))]),
    ] {
        let result = merge(json!({"spec": {"tokens": tokens}})).await;
        assert!(is_denied(&result), "{result:?} {tokens}");
    }
    users.delete("tried", &DeleteParams::default()).await.expect("deleted");
    assert_eq!(merge(json!({"metadata": {"finalizers": null}})).await, Ok(()));
    assert!(users.get_opt("tried").await.expect("readable").is_none());

    // Existing keys of other clients stay unchanged.
    let edit = async |change: Value| {
        let patch = Patch::Merge(&change);
        let patched = judges.as_operator.patch("tried", &PatchParams::default(), &patch).await;
        patched.map(drop).map_err(|e| e.to_string())
    };
    assert_eq!(edit(json!({"stringData": {"token": "new"}})).await, Ok(()));
    // A new empty value is a change too.
    for change in [json!({"labels": {"found": "y"}}), json!({"annotations": {"found": ""}})] {
        let result = edit(json!({"metadata": change})).await;
        assert!(is_denied(&result), "{result:?} {change}");
    }
}

/// The API server limits the cost of a CEL expression. Beyond the limit, it refuses every change of the object.
#[tokio::test(flavor = "multi_thread")]
async fn largest_objects_and_lists_stay_within_the_cel_cost_limit() {
    let world = World::new("wide-keys").await;
    // As many keys with this prefix as one token may have, or as all tokens together may have.
    let large = |name: &str, prefix: &str, count: usize| {
        let prefix = format!("{prefix}/");
        let entries = (0..count).map(|i| (format!("{prefix}{}{i:02}", "k".repeat(61)), json!("v")));
        let keys = Value::Object(entries.collect());
        let tokens: Vec<Value> = (0..16)
            .map(|i| {
                json!({"name": format!("t{i}"), "projectIDs": ["1"], "secret": {"name": format!("{name}-{i}"),
                    "labels": keys, "annotations": keys}})
            })
            .collect();
        let mut user = service_user(&world, "labels", &json!({}));
        user["metadata"]["name"] = json!(name);
        user["spec"]["tokens"] = json!(tokens);
        user
    };
    let users = world.users();
    let create = async |user: Value| {
        let user = serde_json::from_value(user).expect("a service user");
        users.create(&PostParams::default(), &user).await
    };
    let long = "p".repeat(253);
    create(large("old", "example.net", 32))
        .await
        .expect("before the policy");
    let mut added: Vec<String> = (0..63).map(|i| format!("{}{i:02}", "e".repeat(61))).collect();
    added.push(format!("{long}/*"));
    let added: Vec<&str> = added.iter().map(String::as_str).collect();
    Judges::of(&world, &added).await;

    create(large("new", &long, 12)).await.expect("all keys are allowed");
    for name in ["old", "new"] {
        let change = json!({"spec": {"suspend": true}});
        let changed = users.patch(name, &PatchParams::default(), &Patch::Merge(&change)).await;
        changed.expect(name);
    }
}

/// With the chart's policies in force.
#[tokio::test(flavor = "multi_thread")]
async fn operator_writes_allowed_keys_and_names_disallowed_keys() {
    let world = World::new("written-keys").await;
    let more = json!({"allowedSecretMetadata": ADDED});
    let release = Release::install(world.cluster, &format!("{}-home", world.name), &values(&world, &more));
    let as_operator: Api<Secret> = Api::namespaced(release.client().await, &world.name);
    eventually("the policy is in force", async || {
        let denied = serde_json::from_value(token_secret("labels", &entry("denied", "x"))).expect("a Secret");
        let tried = as_operator.create(&dry_run(), &denied).await;
        is_denied(&tried.map(drop).map_err(|e| e.to_string()))
    })
    .await;
    let _operator = release.operator().await;
    world.instance().await;
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("billing-key", &user).await;
    let listed = ALLOWED_SECRET_METADATA
        .iter()
        .chain(&ADDED)
        .map(|entry| example_of(entry));
    let keys: Vec<String> = listed.collect();
    let entries: Value = Value::Object(keys.iter().map(|key| (key.clone(), json!("x"))).collect());
    let mut spec = one_token("billing-token");
    spec["tokens"][0]["secret"]["labels"] = entries.clone();
    spec["tokens"][0]["secret"]["annotations"] = entries.clone();
    world.service_user("billing", spec.clone()).await.expect("accepted");
    world.ready("billing", "True", "Issued").await;
    let metadata = world.secrets().get("billing-token").await.expect("there").metadata;
    for map in [metadata.labels, metadata.annotations] {
        let map = map.expect("entries");
        assert!(keys.iter().all(|key| map[key] == "x"), "{map:?}");
    }

    // No policy of this release checks the service user at apply: the chart does not know which operator serves the
    // instance.
    spec["tokens"][0]["secret"]["labels"] = entry("grafana_datasource", "1");
    world.service_user("billing", spec).await.expect("accepted");
    let user = world.ready("billing", "False", "InvalidSpec").await;
    let conditions = serde_json::to_value(user.status).expect("JSON")["conditions"].to_string();
    assert!(
        conditions.contains("spec.tokens[0].secret.labels: `grafana_datasource` is not among"),
        "{conditions}"
    );
}

#[test]
fn chart_and_operator_accept_the_same_entries() {
    let prefix = "p".repeat(253);
    let entries = [
        "team",
        "Cost_Center.1",
        "example.com/*",
        "example.com/Team",
        "cluster.x-k8s.io/*",
        "notkubernetes.io/*",
        "app.kubernetes.io/instance",
        "kubernetes.io/description",
        &format!("{prefix}/{}", "n".repeat(63)),
        "",
        "*",
        "/*",
        "*/*",
        "*.example.com/*",
        "example.com/",
        "example.com/a*",
        "example.com/a/b",
        "Example.com/*",
        "-team",
        "a b",
        "team ",
        "a'b",
        "a\"b",
        "a\\b",
        "a,b",
        "team\n",
        &"n".repeat(64),
        "zitadel-tokens.dev/*",
        "zitadel-tokens.dev/record",
        "x.zitadel-tokens.dev/*",
        "app.kubernetes.io/managed-by",
        "kubernetes.io/*",
        "app.kubernetes.io/*",
        "k8s.io/*",
        "scheduling.k8s.io/*",
    ];
    let (mut accepted, mut denied) = (0, 0);
    for entry in entries {
        let values = json!({"allowedSecretMetadata": [entry]});
        if AllowList::with(&[entry]).is_ok() {
            template(&chart(), &values);
            accepted += 1;
        } else {
            let error = refused(&chart(), &values);
            assert!(error.contains("/allowedSecretMetadata/0"), "{entry}: {error}");
            denied += 1;
        }
    }
    assert!(accepted == 9 && denied == entries.len() - 9, "{accepted} {denied}");
    let many: Vec<String> = (0..65).map(|i| format!("key{i}")).collect();
    for (entries, fit) in [(&many[1..], true), (&many[..], false)] {
        assert_eq!(AllowList::with(entries).is_ok(), fit);
        let values = json!({"allowedSecretMetadata": entries});
        if fit {
            template(&chart(), &values);
        } else {
            assert!(refused(&chart(), &values).contains("/allowedSecretMetadata"));
        }
    }
}

#[test]
fn operator_exits_on_an_invalid_allow_list_entry() {
    for (entries, message) in [
        ("team,*", "--allow-secret-metadata: `*` cannot be added"),
        (
            "kubernetes.io/*",
            "--allow-secret-metadata: `kubernetes.io/*` cannot be added",
        ),
    ] {
        let mut run = std::process::Command::new(crate::support::operator::binary());
        let ended = run
            .args(["run", "--allow-secret-metadata", entries])
            .output()
            .expect("the operator runs");
        let error = String::from_utf8_lossy(&ended.stderr);
        assert!(!ended.status.success() && error.contains(message), "{error}");
    }
}
