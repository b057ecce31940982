//! Manager roles that the operator grants with the admin credential of the instance. Revocations are in
//! `role_revocation.rs`.

use kube::ResourceExt;
use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::issuer::User;
use crate::support::roles::{ADMINISTRATORS, allowed_on, has, key_user, on, owned, roles_on};
use crate::support::world::{condition, one_token};

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
