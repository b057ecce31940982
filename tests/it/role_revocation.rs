//! Revocations of manager roles, which a tenant must not be able to prevent.

use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::issuer::Recorded;
use crate::support::managed::{CLUSTER, Managed};
use crate::support::operator::Operator;
use crate::support::proxy::Proxy;
use crate::support::roles::{ADMINISTRATORS, allowed_on, has, key_user, on, owned, roles_on};
use crate::support::world::{World, one_token};

#[tokio::test(flavor = "multi_thread")]
async fn deletion_revokes_what_the_ledger_names() {
    let (managed, organization) = owned("revoke").await;
    let world = &managed.world;
    managed
        .allow_roles(json!([allowed_on(&organization, &["ORG_OWNER"])]))
        .await;
    let entry = json!([roles_on(&organization, &["ORG_OWNER"])]);
    let user = key_user(&managed).await;
    managed.with_roles("billing", &user, entry.clone()).await;
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    // Neither a forged status nor suspension matter.
    let victim = key_user(&managed).await;
    world
        .issuer
        .set_manager_roles(&victim.id, &on(&organization), &["ORG_OWNER"])
        .await;
    let forged = json!({"status": {"userID": victim.id}});
    let params = PatchParams::default();
    let forged = world
        .users()
        .patch_status("billing", &params, &Patch::Merge(&forged))
        .await;
    forged.expect("written");
    world.merge("billing", json!({"spec": {"suspend": true}})).await;
    managed.roles_are("billing", "Unknown", "Suspended").await;

    // It waits for a working credential, and says so.
    world.issuer.remove_key(&managed.admin.id, &managed.admin.key_id).await;
    managed.deletion_waits("billing", "CredentialRejected").await;
    let (key_id, key) = world.issuer.key(&managed.admin.id, json!({})).await;
    managed.credential(&key).await;
    world.user_gone("billing").await;
    has(&managed, &user.id, &organization, &[]).await;
    has(&managed, &victim.id, &organization, &["ORG_OWNER"]).await;

    // The tenant cannot leave the roles in ZITADEL. The platform team can, by deleting the ledger.
    managed
        .allow_roles(json!([allowed_on(&organization, &["ORG_OWNER"])]))
        .await;
    managed.with_roles("orders", &user, entry).await;
    managed.roles_are("orders", "True", "ManagerRolesGranted").await;
    let orphan = json!({"spec": {"deletionPolicy": "Orphan"}});
    let uid = world.merge("orders", orphan).await.uid().expect("a UID");
    world.annotate("orders", "abandon", &uid).await;
    world.issuer.remove_key(&managed.admin.id, &key_id).await;
    managed.deletion_waits("orders", "CredentialRejected").await;
    let secrets: Api<Secret> = Api::namespaced(world.client.clone(), &world.home());
    let ledger = format!("service-user-roles-{uid}");
    secrets
        .delete(&ledger, &DeleteParams::default())
        .await
        .expect("deleted");
    world.annotate("orders", "abandon", "again").await;
    world.user_gone("orders").await;
    has(&managed, &user.id, &organization, &["ORG_OWNER"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_after_the_request_leaves_no_role_behind() {
    let (managed, organization) = owned("crash").await;
    managed
        .allow_roles(json!([allowed_on(&organization, &["ORG_OWNER"])]))
        .await;
    let user = key_user(&managed).await;
    let path = format!("{ADMINISTRATORS}/CreateAdministrator");
    let hang = json!({"path": path, "times": 1, "afterHandling": true, "hang": true});
    managed.world.issuer.fault(hang).await;
    managed
        .with_roles("billing", &user, json!([roles_on(&organization, &["ORG_OWNER"])]))
        .await;
    has(&managed, &user.id, &organization, &["ORG_OWNER"]).await;
    managed.operator.kill();
    // The next process knows that it granted the role: without its entry, it is revoked.
    let dropped = json!({"spec": {"managerRoles": null}});
    managed.world.merge("billing", dropped).await;
    let operator = managed.world.rotating_operator_with(&CLUSTER).await;
    let managed = Managed { operator, ..managed };
    has(&managed, &user.id, &organization, &[]).await;
}

/// A tenant tries to keep a role that the platform team withdraws, or that its object no longer justifies.
#[tokio::test(flavor = "multi_thread")]
async fn tenant_cannot_keep_a_role() {
    let (managed, organization) = owned("keep").await;
    let world: &World = &managed.world;
    let allowed = json!([allowed_on(&organization, &["ORG_OWNER"])]);
    let entry = json!([roles_on(&organization, &["ORG_OWNER"])]);
    let user = key_user(&managed).await;
    let merge = async |change: Value| world.merge("billing", change).await;
    let granted = async || {
        managed.allow_roles(allowed.clone()).await;
        managed.with_roles("billing", &user, entry.clone()).await;
        merge(json!({"spec": {"suspend": null}})).await;
        managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    };
    let revoked = async || has(&managed, &user.id, &organization, &[]).await;

    // A suspended object keeps its roles, but only as long as the policies allow them.
    granted().await;
    merge(json!({"spec": {"suspend": true, "managerRoles": null}})).await;
    managed.roles_are("billing", "Unknown", "Suspended").await;
    assert_eq!(
        world.issuer.manager_roles(&user.id, &on(&organization)).await,
        ["ORG_OWNER"]
    );
    managed.allow_roles(json!([])).await;
    revoked().await;

    // An instance that does not exist has no policies.
    granted().await;
    merge(json!({"spec": {"instanceRef": {"name": "nope"}}})).await;
    revoked().await;

    // The operator does not read an object that is too large.
    granted().await;
    let text = "\u{1}".repeat(16_000);
    let mut large = one_token("billing-token");
    large["tokens"][0]["secret"]["template"] = json!({"a": text, "b": text, "c": text, "d": text});
    merge(json!({"spec": large})).await;
    world.ready("billing", "False", "ObjectUnreadable").await;
    assert_eq!(
        world.issuer.manager_roles(&user.id, &on(&organization)).await,
        ["ORG_OWNER"]
    );
    managed.allow_roles(json!([])).await;
    revoked().await;
    merge(json!({"spec": one_token("billing-token")})).await;

    // A manifest that replaces the object drops the finalizer.
    granted().await;
    merge(json!({"metadata": {"finalizers": null}, "spec": {"managerRoles": null}})).await;
    revoked().await;

    // The object is suspended, loses its finalizer, and is deleted.
    granted().await;
    merge(json!({"spec": {"suspend": true}})).await;
    managed.roles_are("billing", "Unknown", "Suspended").await;
    merge(json!({"metadata": {"finalizers": null}})).await;
    managed.deleted("billing").await;
    revoked().await;
}

/// What a reconcile has read is outdated when it acts.
#[tokio::test(flavor = "multi_thread")]
async fn tenant_cannot_keep_a_role_by_changing_the_object_all_the_time() {
    let (managed, organization) = owned("edits").await;
    let world: &World = &managed.world;
    let user = key_user(&managed).await;
    let entry = |roles: &[&str]| json!([roles_on(&organization, roles)]);
    let edits = [
        // Each edit changes the generation.
        |round: usize| json!({"spec": {"suspend": if round.is_multiple_of(2) { json!(false) } else { Value::Null }}}),
        // Each edit changes the version that the finalizer is set on.
        |round: usize| json!({"metadata": {"finalizers": null, "annotations": {"round": round.to_string()}}}),
    ];
    for edit in edits {
        managed
            .allow_roles(json!([allowed_on(&organization, &["ORG_OWNER"])]))
            .await;
        managed.with_roles("billing", &user, entry(&["ORG_OWNER"])).await;
        managed.roles_are("billing", "True", "ManagerRolesGranted").await;
        let editing = async {
            let mut round = 0;
            loop {
                round += 1;
                world.merge("billing", edit(round)).await;
            }
        };
        let revoked = async {
            managed.allow_roles(json!([])).await;
            has(&managed, &user.id, &organization, &[]).await;
        };
        tokio::select! {
            () = editing => {}
            () = revoked => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn suspended_instance_gets_no_grant_and_deletions_revoke() {
    let (managed, organization) = owned("suspended").await;
    let world = &managed.world;
    let all = ["ORG_OWNER", "ORG_OWNER_VIEWER"];
    managed.allow_roles(json!([allowed_on(&organization, &all)])).await;
    let mut spec = one_token("billing-token");
    spec["user"] = json!({"organizationID": managed.organization});
    spec["managerRoles"] = json!([roles_on(&organization, &["ORG_OWNER"])]);
    world.service_user("billing", spec.clone()).await.expect("accepted");
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    let object = world.ready("billing", "True", "Issued").await;
    let user = object.status.and_then(|status| status.user_id).expect("an id");
    managed.suspended().await;
    world.instance_ready("True", "Suspended").await;

    spec["managerRoles"] = json!([roles_on(&organization, &all)]);
    world.service_user("billing", spec).await.expect("accepted");
    managed.roles_are("billing", "Unknown", "Suspended").await;
    managed.user("orders", json!({})).await;
    managed.user_is("orders", "False", "Suspended").await;
    has(&managed, &user, &organization, &["ORG_OWNER"]).await;
    assert_eq!(managed.users().await.len(), 1);
    managed.deleted("billing").await;
    assert_eq!(managed.users().await, Vec::<Value>::new());
    let requests = world.issuer.requests().await;
    let revoked = |request: &Recorded| request.path.ends_with("/DeleteAdministrator") && request.status == 200;
    assert_eq!(requests.iter().filter(|request| revoked(request)).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn next_process_revokes_the_roles_of_an_unreadable_object() {
    let (managed, organization) = owned("restart").await;
    let allowed = json!([allowed_on(&organization, &["ORG_OWNER"])]);
    managed.allow_roles(allowed).await;
    let user = key_user(&managed).await;
    let entry = json!([roles_on(&organization, &["ORG_OWNER"])]);
    managed.with_roles("billing", &user, entry).await;
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    managed.operator.terminate().await;
    let text = "\u{1}".repeat(16_000);
    let mut large = one_token("billing-token");
    large["tokens"][0]["secret"]["template"] = json!({"a": text, "b": text, "c": text, "d": text});
    managed.world.merge("billing", json!({"spec": large})).await;
    let operator = managed.world.rotating_operator_with(&CLUSTER).await;
    let managed = Managed { operator, ..managed };
    managed.world.ready("billing", "False", "ObjectUnreadable").await;
    has(&managed, &user.id, &organization, &["ORG_OWNER"]).await;
    managed.allow_roles(json!([])).await;
    has(&managed, &user.id, &organization, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn token_requests_do_not_delay_a_withdrawn_privilege() {
    let (managed, _) = owned("starved").await;
    let world = &managed.world;
    // The organization of the administrator is privileged.
    let organization = managed.organization.clone();
    let mut allowed = allowed_on(&organization, &["ORG_OWNER"]);
    allowed["allowPrivileged"] = json!(true);
    managed.allow_roles(json!([allowed])).await;
    let user = key_user(&managed).await;
    let entry = json!([roles_on(&organization, &["ORG_OWNER"])]);
    managed.with_roles("billing", &user, entry).await;
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    // Tokens ask for more than the object may request.
    for round in 0..5 {
        let scope = if round % 2 == 0 { "openid" } else { "profile" };
        let token = |i| json!({"name": format!("t{i}"), "projectIDs": ["1"], "scopes": [scope], "secret": {"name": format!("s{i}")}});
        let tokens: Vec<Value> = (0..16).map(token).collect();
        world.merge("billing", json!({"spec": {"tokens": tokens}})).await;
        if round < 2 {
            world.ready("billing", "True", "Issued").await;
        }
    }
    world.ready("billing", "False", "RequestsThrottled").await;
    allowed["allowPrivileged"] = json!(false);
    managed.allow_roles(json!([allowed])).await;
    has(&managed, &user.id, &organization, &[]).await;
}

/// A list of all roles of a user could be made too long by every user who may add members to some project.
#[tokio::test(flavor = "multi_thread")]
async fn revocation_lists_roles_scope_by_scope() {
    let (managed, organization) = owned("many").await;
    let world = &managed.world;
    managed
        .allow_roles(json!([allowed_on(&organization, &["ORG_OWNER"])]))
        .await;
    let user = key_user(&managed).await;
    managed
        .with_roles("billing", &user, json!([roles_on(&organization, &["ORG_OWNER"])]))
        .await;
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    let path = format!("{ADMINISTRATORS}/ListAdministrators");
    let before = world.issuer.requests().await.len();
    managed.allow_roles(json!([])).await;
    has(&managed, &user.id, &organization, &[]).await;
    // Each list of the user's roles names the organization, so that only one entry matches.
    let asked = world.issuer.requests().await;
    let lists = asked.iter().skip(before).filter(|request| request.path == path);
    let filters: Vec<String> = lists.map(|request| request.body["filters"].to_string()).collect();
    let of_user: Vec<_> = filters.iter().filter(|text| text.contains(&user.id)).collect();
    assert!(!of_user.is_empty());
    assert!(of_user.iter().all(|text| text.contains(&organization)), "{of_user:?}");
}

/// The next process finds the ledgers of objects that do not show that they have roles.
#[tokio::test(flavor = "multi_thread")]
async fn roles_of_an_object_that_vanished_without_an_operator_are_revoked() {
    let (managed, organization) = owned("vanished").await;
    managed
        .allow_roles(json!([allowed_on(&organization, &["ORG_OWNER"])]))
        .await;
    let users = [
        key_user(&managed).await,
        key_user(&managed).await,
        key_user(&managed).await,
    ];
    for (name, user) in ["billing", "orders", "shipping"].iter().zip(&users) {
        let entry = json!([roles_on(&organization, &["ORG_OWNER"])]);
        managed.with_roles(name, user, entry).await;
        managed.roles_are(name, "True", "ManagerRolesGranted").await;
    }
    managed.operator.kill();
    let world = &managed.world;
    let dropped = json!({"metadata": {"finalizers": null}, "spec": {"managerRoles": null}});
    for name in ["billing", "orders"] {
        world.merge(name, dropped.clone()).await;
    }
    world.delete("billing").await;
    world.user_gone("billing").await;
    // The operator reconciles no object before it has reached ZITADEL.
    let slow = json!({"path": "/.well-known/openid-configuration", "times": 1, "latencyMillis": 3_000});
    world.issuer.fault(slow).await;
    let operator = world.rotating_operator_with(&CLUSTER).await;
    world.merge("shipping", dropped).await;
    world.delete("shipping").await;
    world.user_gone("shipping").await;
    let managed = Managed { operator, ..managed };
    for user in &users {
        has(&managed, &user.id, &organization, &[]).await;
    }
}

/// With a Role for each namespace, people there may be able to remove it.
#[tokio::test(flavor = "multi_thread")]
async fn operator_without_rights_in_a_namespace_revokes_roles() {
    let world = World::new("rights").await;
    let home = world.home();
    world.namespace(&home).await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let flags = ["--namespace", &home, "--watch-namespaces", &world.name];
    let flags = [&flags[..], &CLUSTER].concat();
    let operator = Operator::start_with(&proxy.kubeconfig, &world.selector(), &flags).await;
    let managed = Managed::with_operator(world, operator).await;
    managed.promote("IAM_OWNER").await;
    let world = &managed.world;
    let organization = async || world.issuer.organization().await;
    let [first, second, third] = [organization().await, organization().await, organization().await];
    let allow = async |organizations: &[&String]| {
        let entry = |organization: &&String| allowed_on(organization, &["ORG_OWNER"]);
        managed.allow_roles(organizations.iter().map(entry).collect()).await;
    };
    allow(&[&first, &second, &third]).await;
    let user = key_user(&managed).await;
    let roles = [&first, &second, &third].map(|id| roles_on(id, &["ORG_OWNER"]));
    managed.with_roles("billing", &user, json!(roles)).await;
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;

    proxy.answer("GET", &format!("/namespaces/{}/secrets/", world.name), 403, 1_000);
    allow(&[&second, &third]).await;
    has(&managed, &user.id, &first, &[]).await;
    world.ready("billing", "False", "SecretsForbidden").await;
    has(&managed, &user.id, &second, &["ORG_OWNER"]).await;

    // The operator sees the object in its watch, but may not read it.
    proxy.answer("GET", "/zitadelserviceusers/billing", 403, 1_000);
    allow(&[&third]).await;
    has(&managed, &user.id, &second, &[]).await;
    has(&managed, &user.id, &third, &["ORG_OWNER"]).await;

    // It no longer sees the object either.
    let failures = || {
        let log = managed.operator.log();
        let failed = |line: &&String| line.contains("a watch failed") && line.contains("kind=ZitadelServiceUser");
        log.iter().filter(failed).count()
    };
    let before = failures();
    proxy.answer("GET", &format!("/namespaces/{}/", world.name), 403, 1_000);
    proxy.hang_up();
    eventually("the object is hidden", async || failures() > before).await;
    allow(&[]).await;
    has(&managed, &user.id, &third, &[]).await;
}
