//! The permissions that the chart grants: they suffice for the operator, they contain nothing that it does not use, and
//! an attacker with a stolen service account token can do little with them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, RoleRef, Subject};
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use zitadel_tokens::api::ZitadelServiceUser;

use super::values;
use crate::support::audit::Request;
use crate::support::helm::{NAME, Release};
use crate::support::issuer::Issuer;
use crate::support::world::{World, condition, one_token, until};
use crate::support::{SOON, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn operator_has_exactly_the_permissions_that_it_uses() {
    let world = World::with_issuer("rights", Issuer::start(&["--tls"])).await;
    assert_documented(&granted_and_used(&world, json!({})).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaced_operator_has_exactly_the_permissions_that_it_uses() {
    let world = World::with_issuer("rights-there", Issuer::start(&["--tls"])).await;
    let granted = granted_and_used(&world, json!({"watchNamespaces": [world.name]})).await;
    let of_tenants = ["secrets", "zitadelserviceusers", "events"];
    let everywhere = |g: &&Grant| g.place == "cluster" && of_tenants.iter().any(|r| g.resource.contains(r));
    assert_eq!(granted.iter().find(everywhere), None);
}

/// Permissions that this test does not exercise. API servers before Kubernetes 1.34 have no streaming lists. The
/// operator patches a status only if it cannot decode the object or has no room for it.
const UNUSED_HERE: &[(&str, &str)] = &[
    ("secrets", "list"),
    ("zitadel-tokens.dev/zitadelserviceusers", "list"),
    ("zitadel-tokens.dev/zitadelserviceusers/status", "patch"),
    ("zitadel-tokens.dev/zitadelinstances/status", "patch"),
];

/// The permissions of a release with these values, after a check that the operator uses all of them and needs no
/// others.
async fn granted_and_used(world: &World, more: Value) -> BTreeSet<Grant> {
    let home = format!("{}-home", world.name);
    let release = Release::install(world.cluster, &home, &values(world, &more));
    policy_is_in_force(&release, &world.name).await;
    // The second operator is a standby, which watches the Lease.
    let operators = [release.operator().await, release.operator().await];
    exercise_all_permissions(world, &home).await;
    for operator in operators {
        operator.terminate().await;
    }

    let requests = world.cluster.audit.requests_of(&release.user());
    let refused: Vec<_> = requests.iter().filter(|r| r.code == 403).collect();
    assert!(refused.is_empty(), "used and not granted: {refused:#?}");
    let granted = granted(world, &home).await;
    let unused: Vec<_> = granted
        .iter()
        .filter(|grant| !UNUSED_HERE.contains(&(&*grant.resource, &*grant.verb)))
        .filter(|grant| !requests.iter().any(|r| grant.is_used_by(r, world, &home)))
        .collect();
    assert!(unused.is_empty(), "granted and not used: {unused:#?}");
    granted
}

/// Makes the operator use all its permissions: each verb that the chart grants is needed for a step below.
async fn exercise_all_permissions(world: &World, home: &str) {
    let apply = PatchParams::apply("tests").force();
    let connect = async |connection: Value| {
        let mut spec = world.instance_spec();
        spec["connection"] = connection;
        world.apply_instance(spec).await.expect("an instance");
        world.instance_ready("True", "InstanceReady").await;
    };
    let config_map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "ca"}, "data": {"ca.crt": world.issuer.ca}});
    let config_maps: Api<ConfigMap> = Api::namespaced(world.client.clone(), home);
    config_maps
        .patch("ca", &apply, &Patch::Apply(&config_map))
        .await
        .expect("written");
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "ca"}, "stringData": {"ca.crt": world.issuer.ca}});
    let secrets: Api<Secret> = Api::namespaced(world.client.clone(), home);
    secrets
        .patch("ca", &apply, &Patch::Apply(&secret))
        .await
        .expect("written");
    connect(json!({"caConfigMapRef": {"name": "ca"}})).await;
    connect(json!({"caSecretRef": {"name": "ca"}})).await;

    let user = world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "True", "Issued").await;
    let ours = "zitadel-tokens.dev/service-user";
    let theirs = json!({"metadata": {"labels": {ours: "theirs"}}});
    world.edit_secret("billing-token", theirs).await;
    let repaired = |s: &Secret| s.metadata.labels.as_ref().is_some_and(|l| l[ours] == "billing");
    until(world.secrets(), "billing-token", SOON, repaired).await;

    // For a repeated outcome, the operator patches the Event of the first.
    for reason in ["KeySecretMissing", "Issued", "KeySecretMissing", "Issued"] {
        if reason == "Issued" {
            world.key_secret("billing-key", &user).await;
        } else {
            let delete = DeleteParams::default();
            world.secrets().delete("billing-key", &delete).await.expect("deleted");
        }
        let ready = if reason == "Issued" { "True" } else { "False" };
        world.ready("billing", ready, reason).await;
    }

    // The Secret is renamed, and the operator deletes the old one.
    world
        .service_user("billing", one_token("moved-token"))
        .await
        .expect("accepted");
    world.token("moved-token").await;
    world.secret_gone("billing-token").await;

    // A retained Secret has no owner, whether it is retained from the start or later.
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("retained-key", &user).await;
    let policy = async |policy: &str| {
        let mut spec = one_token("retained-token");
        spec["tokens"][0]["secret"]["deletionPolicy"] = json!(policy);
        world.service_user("retained", spec).await.expect("accepted");
        let owned = |s: &Secret| s.metadata.owner_references.is_some() == (policy == "Delete");
        until(world.secrets(), "retained-token", SOON, owned).await;
    };
    policy("Retain").await;
    policy("Delete").await;
    policy("Retain").await;

    // An adopted Secret had no owner.
    world.secret("adopted-token", json!({"token": "old"})).await;
    let hand_over = json!({"metadata": {"annotations": {"zitadel-tokens.dev/adopt": "adopted"}}});
    world.edit_secret("adopted-token", hand_over).await;
    world.simple("adopted", json!({"tokenType": "JWT"})).await;
    world.ready("adopted", "True", "Issued").await;

    // The operator makes a key, and removes it when the object is deleted.
    let user = world.issuer.user(json!({"tokenType": "JWT"})).await;
    world.key_secret("rotated-key", &user).await;
    let mut spec = one_token("rotated-token");
    spec["keyRotation"] = json!({"interval": "1h"});
    world.service_user("rotated", spec).await.expect("accepted");
    world
        .user_until("rotated", |user| {
            condition(user, "KeyRotated").is_some_and(|(status, _, _)| status == "True")
        })
        .await;
    world.delete("rotated").await;
    world.user_gone("rotated").await;
}

// Places, as docs/install.md names them. All other permissions are cluster-wide.
const HOME: &str = "the release's namespace";
const WATCHED: &str = "a watched namespace";

/// One verb on one resource in one place.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Grant {
    place: &'static str,
    /// The resource, with its API group as prefix unless it is in the core group.
    resource: String,
    verb: String,
}

impl Grant {
    fn is_used_by(&self, request: &Request, world: &World, home: &str) -> bool {
        let resource = match request.group.as_str() {
            "" => request.resource.clone(),
            group => format!("{group}/{}", request.resource),
        };
        // For a create by apply, the audit log says patch, but the API server checks both verbs.
        let created = self.verb == "create" && request.verb == "patch" && request.code == 201;
        resource == self.resource
            && (request.verb == self.verb || created)
            && request.code < 300
            && match self.place {
                HOME => request.namespace == home,
                WATCHED => request.namespace == world.name,
                _ => true,
            }
    }
}

/// All permissions that roles grant to the release's service account.
async fn granted(world: &World, home: &str) -> BTreeSet<Grant> {
    let client = &world.client;
    let is_bound = |subjects: &Option<Vec<Subject>>| {
        let mut subjects = subjects.iter().flatten();
        subjects.any(|s| s.kind == "ServiceAccount" && s.name == NAME && s.namespace.as_deref() == Some(home))
    };
    let mut all = BTreeSet::new();
    let mut add = |place: &'static str, rules: Option<Vec<PolicyRule>>| {
        for rule in rules.into_iter().flatten() {
            let groups = rule.api_groups.unwrap_or_default();
            let [group] = &groups[..] else { panic!("{groups:?}") };
            for resource in rule.resources.into_iter().flatten() {
                for verb in &rule.verbs {
                    assert!(resource != "*" && verb != "*", "a wildcard");
                    let resource = if group.is_empty() {
                        resource.clone()
                    } else {
                        format!("{group}/{resource}")
                    };
                    let verb = verb.clone();
                    all.insert(Grant { place, resource, verb });
                }
            }
        }
    };
    let everything = ListParams::default();
    let cluster_roles: Api<ClusterRole> = Api::all(client.clone());
    let rules_of = async |role: RoleRef| cluster_roles.get(&role.name).await.expect("a role").rules;
    let bindings: Api<ClusterRoleBinding> = Api::all(client.clone());
    for binding in bindings.list(&everything).await.expect("listed") {
        if is_bound(&binding.subjects) {
            add("cluster", rules_of(binding.role_ref).await);
        }
    }
    let bindings: Api<RoleBinding> = Api::all(client.clone());
    for binding in bindings.list(&everything).await.expect("listed") {
        if is_bound(&binding.subjects) {
            let namespace = binding.metadata.namespace.as_deref().unwrap_or_default();
            assert_eq!(binding.role_ref.kind, "Role");
            assert!([home, &world.name].contains(&namespace), "a Role in {namespace}");
            let roles: Api<Role> = Api::namespaced(client.clone(), namespace);
            let role = roles.get(&binding.role_ref.name).await.expect("a role");
            add(if namespace == home { HOME } else { WATCHED }, role.rules);
        }
    }
    all
}

/// docs/install.md has a row for each resource, with exactly these verbs.
fn assert_documented(granted: &BTreeSet<Grant>) {
    let mut rows: BTreeMap<(&str, &str), BTreeSet<&str>> = BTreeMap::new();
    for grant in granted {
        rows.entry((grant.place, &grant.resource))
            .or_default()
            .insert(&grant.verb);
    }
    let expected: BTreeSet<String> = rows
        .into_iter()
        .map(|((place, resource), verbs)| {
            let verbs: Vec<&str> = verbs.into_iter().collect();
            format!("| {place} | `{resource}` | {} |", verbs.join(", "))
        })
        .collect();
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/install.md");
    let page = std::fs::read_to_string(page).expect("a page");
    let mut parts = page.split("| where | resource | verbs |");
    let table = parts.nth(1).expect("a table of rights in docs/install.md");
    let table = table.split("\n\n").next().unwrap_or_default();
    let written: BTreeSet<String> = table
        .lines()
        .filter(|line| line.contains('`'))
        .map(|line| line.split_inclusive('|').take(4).collect())
        .collect();
    let lines = |rows: &BTreeSet<String>| rows.iter().cloned().collect::<Vec<_>>().join("\n");
    assert_eq!(
        lines(&written),
        lines(&expected),
        "docs/install.md and the chart differ"
    );
}

/// An object with further fields.
fn merged(object: &Value, more: &Value) -> Value {
    let mut object = object.clone();
    for (key, value) in more.as_object().expect("an object") {
        object[key] = value.clone();
    }
    object
}

/// Waits until the chart's policy is in force. The API server enforces a new policy only after a moment.
async fn policy_is_in_force(release: &Release, namespace: &str) {
    let secrets: Api<Secret> = Api::namespaced(release.client().await, namespace);
    eventually("the policy is in force", async || {
        let refused = create(&secrets, json!({"metadata": {"name": "early"}})).await;
        refused.is_err_and(|message| message.contains("ValidatingAdmissionPolicy"))
    })
    .await;
}

/// Creates a Secret by a dry run, and returns the error message of the API server.
async fn create(secrets: &Api<Secret>, secret: Value) -> Result<(), String> {
    let params = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    let secret = serde_json::from_value(secret).expect("a Secret");
    let created = secrets.create(&params, &secret).await;
    created.map(drop).map_err(|e| e.to_string())
}

/// A UID that no object has.
const UID: &str = "6d0c5b1e-0000-4000-8000-000000000000";

fn owners() -> Value {
    json!([{"apiVersion": "zitadel-tokens.dev/v1alpha1", "kind": "ZitadelServiceUser", "name": "billing", "uid": UID,
        "controller": true}])
}

/// An object with another value at a place that exists.
fn with(object: &Value, pointer: &str, value: Value) -> Value {
    let mut object = object.clone();
    *object.pointer_mut(pointer).expect("there") = value;
    object
}

/// A release whose policy is in force, and a client with its service account token.
async fn stolen(world: &World) -> kube::Client {
    let home = format!("{}-home", world.name);
    let release = Release::install(world.cluster, &home, &values(world, &json!({})));
    policy_is_in_force(&release, &world.name).await;
    release.client().await
}

#[tokio::test(flavor = "multi_thread")]
async fn stolen_service_account_token_can_write_only_token_secrets() {
    let world = World::new("stolen").await;
    let stolen = stolen(&world).await;
    let theirs: Api<Secret> = Api::namespaced(stolen.clone(), &world.name);

    let owners = owners();
    let record = json!({"zitadel-tokens.dev/record": "{}"});
    let label = json!({"zitadel-tokens.dev/service-user": "billing"});
    let owned = json!({"metadata": {"name": "s", "ownerReferences": owners}, "type": "Opaque"});
    let retained = json!({"metadata": {"name": "s", "labels": label, "annotations": record}, "type": "Opaque"});
    assert_eq!(create(&theirs, owned.clone()).await, Ok(()));
    assert_eq!(create(&theirs, retained.clone()).await, Ok(()));

    let account = json!({"kubernetes.io/service-account.name": "default", "zitadel-tokens.dev/record": "{}"});
    let token = with(&retained, "/metadata/annotations", account);
    let token = with(&token, "/type", json!("kubernetes.io/service-account-token"));
    let another_kind = with(&owned, "/metadata/ownerReferences/0/kind", json!("ConfigMap"));
    let another_group = with(&owned, "/metadata/ownerReferences/0/apiVersion", json!("v1"));
    let no_controller = with(&owned, "/metadata/ownerReferences/0/controller", json!(false));
    let no_record = with(&retained, "/metadata/annotations", json!({}));
    for (what, secret, message) in [
        ("a token of a service account", token, "only Secrets of type Opaque"),
        (
            "another type",
            with(&owned, "/type", json!("example.com/other")),
            "only Secrets of type Opaque",
        ),
        (
            "no owner",
            json!({"metadata": {"name": "s"}}),
            "write only Secrets that belong",
        ),
        (
            "an owner of another kind",
            another_kind,
            "write only Secrets that belong",
        ),
        (
            "an owner of another API group",
            another_group,
            "write only Secrets that belong",
        ),
        (
            "an owner that does not control",
            no_controller,
            "write only Secrets that belong",
        ),
        ("a label without a record", no_record, "write only Secrets that belong"),
    ] {
        let refused = create(&theirs, secret).await.expect_err(what);
        assert!(refused.contains(message), "{what}: {refused}");
    }
    let system: Api<Secret> = Api::namespaced(stolen.clone(), "kube-system");
    let refused = create(&system, owned.clone()).await.expect_err("kube-system");
    assert!(refused.contains("must not write Secrets in kube-system"), "{refused}");

    // The policy refuses to change, take over or delete a foreign Secret.
    world.secret("foreign", json!({"password": "theirs"})).await;
    let take_over = json!({"metadata": {"ownerReferences": owners, "labels": label, "annotations": record}});
    let adopt = json!({"metadata": {"annotations": {"zitadel-tokens.dev/adopt": "billing"}}});
    for change in [take_over, adopt, json!({"stringData": {"password": "mine"}})] {
        let patch = Patch::Merge(&change);
        let refused = theirs.patch("foreign", &PatchParams::default(), &patch).await;
        let refused = refused.expect_err("refused").to_string();
        assert!(refused.contains("ZitadelServiceUser"), "{refused}");
    }
    let refused = theirs.delete("foreign", &DeleteParams::default()).await;
    let refused = refused.expect_err("refused").to_string();
    assert!(refused.contains("must change only Secrets that belong"), "{refused}");
    // The account has no permission for deletecollection.
    let (one, all) = (DeleteParams::default(), ListParams::default());
    let refused = theirs.delete_collection(&one, &all).await;
    let refused = refused.expect_err("refused").to_string();
    assert!(refused.contains("cannot deletecollection"), "{refused}");
    // The policy does not apply to other accounts.
    world.secret("foreign", json!({"password": "changed"})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stolen_service_account_token_can_write_only_key_ledgers_in_its_own_namespace() {
    let world = World::new("stolen-home").await;
    let home = format!("{}-home", world.name);
    let stolen = stolen(&world).await;
    let theirs: Api<Secret> = Api::namespaced(stolen.clone(), &world.name);
    let owned = json!({"metadata": {"name": "s", "ownerReferences": owners()}, "type": "Opaque"});
    let own: Api<Secret> = Api::namespaced(stolen.clone(), &home);
    let ledger = json!({"metadata": {"name": format!("service-user-key-{UID}"), "labels": {"zitadel-tokens.dev/key-ledger": UID}}});
    assert_eq!(create(&own, ledger.clone()).await, Ok(()));
    let label = json!({"zitadel-tokens.dev/key-ledger": "main"});
    let of_admin = json!({"metadata": {"name": "admin-key-main", "labels": label}});
    assert_eq!(create(&own, of_admin.clone()).await, Ok(()));
    let of_another = with(&of_admin, "/metadata/name", json!("admin-key-other"));
    let another = with(&ledger, "/metadata/name", json!("zitadel-admin"));
    let unlabelled = with(&ledger, "/metadata/labels", json!({}));
    let typed = merged(&ledger, &json!({"type": "example.com/other"}));
    for (secret, message) in [
        (owned, "only Secrets with its own keys"),
        (another, "only Secrets with its own keys"),
        (of_another, "only Secrets with its own keys"),
        (unlabelled, "only Secrets with its own keys"),
        (typed, "only Secrets of type Opaque"),
    ] {
        let refused = create(&own, secret).await.expect_err(message);
        assert!(refused.contains(message), "{refused}");
    }
    let refused = create(&theirs, ledger).await.expect_err("a ledger elsewhere");
    assert!(refused.contains("write only Secrets that belong"), "{refused}");
    let admins: Api<Secret> = Api::namespaced(world.client.clone(), &home);
    let secret = serde_json::from_value(json!({"metadata": {"name": "zitadel-admin"}})).expect("a Secret");
    admins.create(&PostParams::default(), &secret).await.expect("created");
    let refused = own.delete("zitadel-admin", &DeleteParams::default()).await;
    let refused = refused.expect_err("refused").to_string();
    assert!(refused.contains("only Secrets with its own keys"), "{refused}");
    let secret = serde_json::from_value(of_admin).expect("a Secret");
    admins.create(&PostParams::default(), &secret).await.expect("created");
    let deleted = own.delete("admin-key-main", &DeleteParams::default()).await;
    deleted.expect("a ledger");
}

#[tokio::test(flavor = "multi_thread")]
async fn stolen_service_account_token_can_change_only_the_finalizer_of_a_service_user() {
    let world = World::new("stolen-user").await;
    let stolen = stolen(&world).await;
    world
        .service_user("billing", one_token("billing-token"))
        .await
        .expect("accepted");
    let users: Api<ZitadelServiceUser> = Api::namespaced(stolen.clone(), &world.name);
    let change = async |change: Value| {
        let patched = users
            .patch("billing", &PatchParams::default(), &Patch::Merge(&change))
            .await;
        patched.map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(
        change(json!({"metadata": {"finalizers": ["zitadel-tokens.dev/keys"]}})).await,
        Ok(())
    );
    for other in [
        json!({"spec": {"suspend": true}}),
        json!({"metadata": {"annotations": {"zitadel-tokens.dev/renew-request": "1"}}}),
        json!({"metadata": {"labels": {"a": "b"}}}),
        json!({"metadata": {"finalizers": ["example.com/other"]}}),
    ] {
        let refused = change(other).await.expect_err("refused");
        assert!(refused.contains("must change only its finalizer"), "{refused}");
    }
    assert_eq!(change(json!({"metadata": {"finalizers": null}})).await, Ok(()));
}
