//! Manager roles that the operator grants with the admin credential of the instance.

use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use zitadel_tokens::api::ZitadelServiceUser;

use crate::support::eventually;
use crate::support::issuer::{Recorded, User};
use crate::support::managed::{CLUSTER, Managed};
use crate::support::operator::Operator;
use crate::support::proxy::Proxy;
use crate::support::world::{World, condition, one_token};

const ADMINISTRATORS: &str = "/zitadel.internal_permission.v2.InternalPermissionService";

fn on(organization: &str) -> Value {
    json!({"organizationId": organization})
}

/// An entry of `spec.managerRoles`.
fn roles_on(organization: &str, roles: &[&str]) -> Value {
    json!({"organizationID": organization, "roles": roles})
}

/// An entry of a policy.
fn allowed_on(organization: &str, roles: &[&str]) -> Value {
    json!({"organizationIDs": [organization], "roles": roles})
}

/// A world whose administrator owns the instance, and an organization without users with roles of the instance.
async fn owned(test: &str) -> (Managed, String) {
    let managed = Managed::new(test).await;
    managed.promote("IAM_OWNER").await;
    let organization = managed.world.issuer.organization().await;
    (managed, organization)
}

async fn key_user(managed: &Managed) -> User {
    managed.world.issuer.user(json!({"tokenType": "JWT"})).await
}

/// Waits until the user has exactly these roles in the organization.
async fn has(managed: &Managed, user: &str, organization: &str, roles: &[&str]) {
    eventually(&format!("the roles {roles:?}"), async || {
        managed.world.issuer.manager_roles(user, &on(organization)).await == roles
    })
    .await;
}

/// The guide "Access ZITADEL APIs" as one manifest.
#[tokio::test(flavor = "multi_thread")]
async fn created_user_gets_roles_at_each_level_and_calls_zitadel() {
    let (managed, _) = owned("levels").await;
    let world = &managed.world;
    let organization = world.issuer.organization().await;
    let granted_to = world.issuer.organization().await;
    let project = world.issuer.project().await;
    world.issuer.grant(&project, &granted_to).await;
    managed
        .allow_roles(json!([
            {"instance": true, "roles": ["IAM_OWNER_VIEWER"]},
            allowed_on(&organization, &["ORG_OWNER"]),
            {"projectIDs": [project], "roles": ["PROJECT_OWNER"]},
            {"projectIDs": [project], "grantedOrganizationIDs": [granted_to], "roles": ["PROJECT_GRANT_OWNER"]},
        ]))
        .await;
    let mut spec = one_token("billing-token");
    spec["user"] = json!({"organizationID": managed.organization});
    spec["tokens"][0]["zitadelAPI"] = json!(true);
    let instance = json!({"instance": true, "roles": ["IAM_OWNER_VIEWER"]});
    let of_organization = roles_on(&organization, &["ORG_OWNER"]);
    let of_project = json!({"projectID": project, "roles": ["PROJECT_OWNER"]});
    let of_grant = json!({"projectID": project, "grantedOrganizationID": granted_to, "roles": ["PROJECT_GRANT_OWNER"]});
    spec["managerRoles"] = json!([instance, of_organization, of_project, of_grant]);
    world.service_user("billing", spec.clone()).await.expect("accepted");
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    let object = world.ready("billing", "True", "Issued").await;
    let user = object
        .status
        .as_ref()
        .and_then(|status| status.user_id.clone())
        .expect("an id");
    let scopes = [
        (json!({"instance": true}), "IAM_OWNER_VIEWER"),
        (on(&organization), "ORG_OWNER"),
        (json!({"projectId": project}), "PROJECT_OWNER"),
        (
            json!({"projectGrant": {"projectId": project, "organizationId": granted_to}}),
            "PROJECT_GRANT_OWNER",
        ),
    ];
    for (scope, role) in &scopes {
        assert_eq!(world.issuer.manager_roles(&user, scope).await, [*role], "{scope}");
    }
    let (_, metrics) = managed.operator.get("/metrics").await;
    let granted = format!(
        "zitadel_tokens_manager_role_changes_total{{zitadel_instance=\"{}\",action=\"grant\"}} 4",
        world.instance
    );
    assert!(metrics.contains(&granted), "{metrics}");

    // Entries that leave the spec are revoked. Nothing costs a token request.
    spec["managerRoles"] = json!([of_organization]);
    world.service_user("billing", spec).await.expect("accepted");
    eventually("the other roles are revoked", async || {
        let mut held = 0;
        for (scope, _) in &scopes {
            held += world.issuer.manager_roles(&user, scope).await.len();
        }
        held == 1
    })
    .await;
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    assert_eq!(world.issuer.mints().await, 1);

    // The token calls ZITADEL's API with the role that is left.
    let token = world.token("billing-token").await;
    let query = json!({"queries": [{"idQuery": {"id": organization}}]});
    let url = format!("{}/v2/organizations/_search", world.issuer.url);
    let found = async || {
        let request = reqwest::Client::new().post(&url).bearer_auth(&token).json(&query);
        let answer: Value = request.send().await.expect("an answer").json().await.expect("JSON");
        answer["result"][0]["id"].clone()
    };
    assert_eq!(found().await, json!(organization));
    managed.allow_roles(json!([])).await;
    has(&managed, &user, &organization, &[]).await;
    world.issuer.settled().await;
    assert_eq!(found().await, Value::Null);
    eventually("Events", async || {
        let events = world.events("billing").await;
        events.contains("Normal ManagerRolesGranted")
    })
    .await;

    managed.deleted("billing").await;
    assert_eq!(managed.users().await, Vec::<Value>::new());
    assert!(world.role_ledger(&object).await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_of_others_stay_unless_the_mode_is_exclusive() {
    let (managed, organization) = owned("merge").await;
    let world = &managed.world;
    managed
        .allow_roles(json!([allowed_on(
            &organization,
            &["ORG_USER_MANAGER", "ORG_SETTINGS_MANAGER"]
        )]))
        .await;
    let user = key_user(&managed).await;
    let by_hand = async |roles: &[&str]| {
        world
            .issuer
            .set_manager_roles(&user.id, &on(&organization), roles)
            .await;
    };
    by_hand(&["ORG_OWNER_VIEWER"]).await;
    let mut entry = roles_on(&organization, &["ORG_USER_MANAGER"]);
    managed.with_roles("billing", &user, json!([entry])).await;
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    let both = ["ORG_OWNER_VIEWER", "ORG_USER_MANAGER"];
    has(&managed, &user.id, &organization, &both).await;

    // A role that a person removes comes back, and one that a person grants stays.
    by_hand(&["ORG_OWNER_VIEWER", "ORG_SETTINGS_MANAGER"]).await;
    world.renew("billing").await;
    let all = ["ORG_OWNER_VIEWER", "ORG_SETTINGS_MANAGER", "ORG_USER_MANAGER"];
    has(&managed, &user.id, &organization, &all).await;

    // The user has the second role already, so the operator does not claim it.
    entry = roles_on(&organization, &["ORG_USER_MANAGER", "ORG_SETTINGS_MANAGER"]);
    managed.with_roles("billing", &user, json!([entry])).await;
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    managed.with_roles("billing", &user, json!([])).await;
    has(
        &managed,
        &user.id,
        &organization,
        &["ORG_OWNER_VIEWER", "ORG_SETTINGS_MANAGER"],
    )
    .await;
    let object = world
        .user_until("billing", |user| {
            user.finalizers().is_empty() && condition(user, "ManagerRolesGranted").is_none()
        })
        .await;
    assert!(world.role_ledger(&object).await.is_none());

    entry["mode"] = json!("Exclusive");
    entry["roles"] = json!(["ORG_USER_MANAGER"]);
    managed.with_roles("billing", &user, json!([entry])).await;
    has(&managed, &user.id, &organization, &["ORG_USER_MANAGER"]).await;
    managed.deleted("billing").await;
    has(&managed, &user.id, &organization, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn policy_decides_and_its_withdrawal_revokes() {
    let (managed, organization) = owned("policy").await;
    let world = &managed.world;
    let user = key_user(&managed).await;
    let entry = roles_on(&organization, &["ORG_OWNER", "ORG_OWNER_VIEWER"]);
    managed.with_roles("billing", &user, json!([entry])).await;
    let message = managed.roles_are("billing", "False", "ManagerRolesDenied").await;
    let denied = "Denied: ORG_OWNER, ORG_OWNER_VIEWER.";
    assert!(
        message.starts_with("spec.managerRoles[0]: ") && message.contains(denied),
        "{message}"
    );
    // Tokens do not depend on roles, and a denied role costs no request: the administrator asks only for its own roles.
    world.ready("billing", "True", "Issued").await;
    let asked = world.issuer.requests().await;
    let of_user = asked.iter().filter(|request| request.path.starts_with(ADMINISTRATORS));
    let of_user: Vec<_> = of_user
        .filter(|request| request.body.to_string().contains(&user.id))
        .collect();
    assert!(of_user.is_empty(), "{of_user:?}");

    managed
        .allow_roles(json!([allowed_on(&organization, &["ORG_OWNER"])]))
        .await;
    has(&managed, &user.id, &organization, &["ORG_OWNER"]).await;
    managed.roles_say("billing", &["Denied: ORG_OWNER_VIEWER."]).await;
    managed
        .allow_roles(json!([allowed_on(&organization, &["ORG_OWNER", "ORG_OWNER_VIEWER"])]))
        .await;
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    managed.allow_roles(json!([])).await;
    has(&managed, &user.id, &organization, &[]).await;
    managed.roles_are("billing", "False", "ManagerRolesDenied").await;
    // An Event for each change, also within a few minutes.
    for change in [
        "granted ORG_OWNER.",
        "granted ORG_OWNER_VIEWER.",
        "revoked ORG_OWNER, ORG_OWNER_VIEWER.",
    ] {
        let text = format!("Manager roles, organization {organization}: {change}");
        eventually(&text, async || world.notes("billing").await.contains(&text)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_organization_needs_the_word_of_the_policy() {
    let (managed, organization) = owned("privileged").await;
    let world = &managed.world;
    let holder = world.issuer.user(json!({"organizationId": organization})).await;
    let instance = json!({"instance": true});
    let make_holder = async |roles: &[&str]| {
        world.issuer.set_manager_roles(&holder.id, &instance, roles).await;
    };
    make_holder(&["IAM_OWNER_VIEWER"]).await;
    let roles = ["ORG_END_USER_IMPERSONATOR", "ORG_OWNER", "ORG_OWNER_VIEWER"];
    // The user lives in the organization of the administrator, whose takeover would be as bad.
    managed
        .allow_roles(json!([
            allowed_on(&organization, &roles),
            allowed_on(&managed.organization, &["ORG_USER_MANAGER"])
        ]))
        .await;
    let user = key_user(&managed).await;
    let entry = roles_on(&organization, &roles);
    managed.with_roles("billing", &user, json!([entry])).await;
    let message = managed.roles_are("billing", "False", "PrivilegedRolesDenied").await;
    assert!(message.starts_with("spec.managerRoles[0]: "), "{message}");
    has(&managed, &user.id, &organization, &["ORG_OWNER_VIEWER"]).await;
    let other = key_user(&managed).await;
    let entry = roles_on(&managed.organization, &["ORG_USER_MANAGER"]);
    managed.with_roles("orders", &other, json!([entry])).await;
    managed.roles_are("orders", "False", "PrivilegedRolesDenied").await;

    // Without the holder, the roles are allowed.
    make_holder(&[]).await;
    world.renew("billing").await;
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    has(&managed, &user.id, &organization, &roles).await;
    // The holder is back. An administrator that may not list holders finds out nothing.
    make_holder(&["IAM_OWNER_VIEWER"]).await;
    managed.promote("IAM_ORG_MANAGER").await;
    world.annotate("billing", "renew-request", "again").await;
    managed.roles_are("billing", "False", "PrivilegedRolesDenied").await;
    has(&managed, &user.id, &organization, &["ORG_OWNER_VIEWER"]).await;
    let mut allowed = allowed_on(&organization, &roles);
    allowed["allowPrivileged"] = json!(true);
    managed.allow_roles(json!([allowed])).await;
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    has(&managed, &user.id, &organization, &roles).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entry_that_fails_does_not_stop_the_others() {
    let (managed, organization) = owned("rejected").await;
    let world = &managed.world;
    managed
        .allow_roles(json!([
            allowed_on("404", &["ORG_OWNER_VIEWER"]),
            allowed_on(&organization, &["ORG_OWNER_VIEWER", "ORG_NO_SUCH_ROLE"]),
            {"projectIDs": ["404"], "roles": ["PROJECT_OWNER"]},
            {"projectIDs": ["404"], "grantedOrganizationIDs": [organization], "roles": ["PROJECT_GRANT_OWNER"]},
        ]))
        .await;
    let user = key_user(&managed).await;
    let good = roles_on(&organization, &["ORG_OWNER_VIEWER"]);
    for wrong in [
        roles_on("404", &["ORG_OWNER_VIEWER"]),
        json!({"projectID": "404", "roles": ["PROJECT_OWNER"]}),
        json!({"projectID": "404", "grantedOrganizationID": organization, "roles": ["PROJECT_GRANT_OWNER"]}),
    ] {
        managed.with_roles("billing", &user, json!([good, wrong])).await;
        let message = managed.roles_are("billing", "False", "ManagerRolesRejected").await;
        assert!(message.starts_with("spec.managerRoles[1]: "), "{message}");
        has(&managed, &user.id, &organization, &["ORG_OWNER_VIEWER"]).await;
        managed.with_roles("billing", &user, json!([good])).await;
        managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    }
    let unknown = roles_on(&organization, &["ORG_OWNER_VIEWER", "ORG_NO_SUCH_ROLE"]);
    managed.with_roles("billing", &user, json!([unknown])).await;
    managed.roles_are("billing", "False", "ManagerRolesRejected").await;
    eventually("an Event", async || {
        world.events("billing").await.contains("Warning ManagerRolesRejected")
    })
    .await;
    has(&managed, &user.id, &organization, &["ORG_OWNER_VIEWER"]).await;

    // An administrator without the role can neither grant nor revoke. Nothing is lost.
    managed.promote("IAM_OWNER_VIEWER").await;
    managed.with_roles("billing", &user, json!([])).await;
    let message = managed.roles_are("billing", "False", "AdminForbidden").await;
    assert!(message.starts_with("Roles to revoke, organization "), "{message}");
    managed.promote("IAM_OWNER").await;
    world.renew("billing").await;
    has(&managed, &user.id, &organization, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_go_only_to_the_user_of_the_key() {
    let (managed, organization) = owned("sub").await;
    managed
        .allow_roles(json!([allowed_on(&organization, &["ORG_OWNER"])]))
        .await;
    let entry = json!([roles_on(&organization, &["ORG_OWNER"])]);
    let (own, victim) = (key_user(&managed).await, key_user(&managed).await);
    // A tenant puts the id of another user into its key file.
    let forged = User {
        id: own.id.clone(),
        key: own.key.replace(&own.id, &victim.id),
        key_id: own.key_id.clone(),
    };
    managed.with_roles("billing", &forged, entry.clone()).await;
    managed.roles_are("billing", "False", "KeyRejected").await;
    has(&managed, &victim.id, &organization, &[]).await;
    // Nor does the victim lose its roles, and the operator does not claim them.
    let mut exclusive = roles_on(&organization, &["ORG_OWNER"]);
    exclusive["mode"] = json!("Exclusive");
    for roles in [
        &["ORG_OWNER_VIEWER"][..],
        &["ORG_OWNER", "ORG_OWNER_VIEWER"],
        &["ORG_OWNER"],
    ] {
        let issuer = &managed.world.issuer;
        issuer.set_manager_roles(&victim.id, &on(&organization), roles).await;
        managed.with_roles("exclusive", &forged, json!([exclusive])).await;
        managed.roles_are("exclusive", "False", "KeyRejected").await;
        managed.deleted("exclusive").await;
        has(&managed, &victim.id, &organization, roles).await;
    }
    let none = on(&organization);
    managed.world.issuer.set_manager_roles(&victim.id, &none, &[]).await;

    // With its own key the user gets the role. With the key of another user, the former one loses it.
    managed.with_roles("billing", &own, entry.clone()).await;
    has(&managed, &own.id, &organization, &["ORG_OWNER"]).await;
    managed.with_roles("billing", &victim, entry).await;
    has(&managed, &victim.id, &organization, &["ORG_OWNER"]).await;
    has(&managed, &own.id, &organization, &[]).await;
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;

    // The administrator never gets roles, even with its own key.
    managed
        .with_roles(
            "admin",
            &managed.admin,
            json!([roles_on(&organization, &["ORG_OWNER"])]),
        )
        .await;
    managed.roles_are("admin", "False", "UserIsAdministrator").await;
}

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
    world.delete("billing").await;
    world
        .user_until("billing", |user| {
            condition(user, "Ready").is_some_and(|(_, reason, _)| reason == "CredentialRejected")
        })
        .await;
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
    world.delete("orders").await;
    let waits = |user: &ZitadelServiceUser| {
        condition(user, "Ready").is_some_and(|(_, reason, _)| reason == "CredentialRejected")
    };
    world.user_until("orders", waits).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn server_without_the_api_says_so_and_serves_tokens() {
    let (managed, organization) = owned("old").await;
    let world = &managed.world;
    managed
        .allow_roles(json!([allowed_on(&organization, &["ORG_OWNER_VIEWER"])]))
        .await;
    world.issuer.settings(json!({"internalPermissionV2": false})).await;
    let user = key_user(&managed).await;
    managed
        .with_roles(
            "billing",
            &user,
            json!([roles_on(&organization, &["ORG_OWNER_VIEWER"])]),
        )
        .await;
    managed.roles_are("billing", "False", "NotSupportedByServer").await;
    world.ready("billing", "True", "Issued").await;
    // Nothing was granted, so the deletion needs no answer.
    managed.deleted("billing").await;
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

/// ZITADEL replaces all roles of a user in an organization with each change.
#[tokio::test(flavor = "multi_thread")]
async fn objects_with_one_user_do_not_write_back_each_others_roles() {
    let (managed, organization) = owned("shared").await;
    let world = &managed.world;
    world.issuer.settings(json!({"projectionLagMillis": 1_000})).await;
    let all = ["ORG_OWNER_VIEWER", "ORG_SETTINGS_MANAGER"];
    managed.allow_roles(json!([allowed_on(&organization, &all)])).await;
    let user = key_user(&managed).await;
    for (name, role) in ["billing", "orders"].into_iter().zip(all) {
        managed
            .with_roles(name, &user, json!([roles_on(&organization, &[role])]))
            .await;
        managed.roles_are(name, "True", "ManagerRolesGranted").await;
    }
    has(&managed, &user.id, &organization, &all).await;
    // Each of them still sees the role of the other one in ZITADEL, for some time.
    for name in ["billing", "orders"] {
        world.delete(name).await;
    }
    for name in ["billing", "orders"] {
        world.user_gone(name).await;
    }
    has(&managed, &user.id, &organization, &[]).await;
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

/// The administrator lives in an organization whose owner lives in another one.
#[tokio::test(flavor = "multi_thread")]
async fn user_who_can_take_over_a_privileged_user_is_privileged_too() {
    let (managed, organization) = owned("hops").await;
    let world = &managed.world;
    let owner = world.issuer.user(json!({"organizationId": organization})).await;
    let in_admins = on(&managed.organization);
    world
        .issuer
        .set_manager_roles(&owner.id, &in_admins, &["ORG_OWNER"])
        .await;
    managed
        .allow_roles(json!([allowed_on(&organization, &["ORG_OWNER"])]))
        .await;
    let user = key_user(&managed).await;
    managed
        .with_roles("billing", &user, json!([roles_on(&organization, &["ORG_OWNER"])]))
        .await;
    managed.roles_are("billing", "False", "PrivilegedRolesDenied").await;
    has(&managed, &user.id, &organization, &[]).await;
    world
        .issuer
        .set_manager_roles(&owner.id, &in_admins, &["ORG_OWNER_VIEWER"])
        .await;
    world.renew("billing").await;
    managed.roles_are("billing", "True", "ManagerRolesGranted").await;
    has(&managed, &user.id, &organization, &["ORG_OWNER"]).await;
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
