//! Service users that the operator creates in ZITADEL with the admin credential of the instance.

use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use serde_json::{Value, json};
use zitadel_tokens::api::ZitadelServiceUser;

use crate::support::managed::{CLUSTER, Managed, admin};
use crate::support::world::{condition, one_token, until};
use crate::support::{SOON, eventually};

fn user_id(user: &ZitadelServiceUser) -> String {
    user.status
        .as_ref()
        .and_then(|status| status.user_id.clone())
        .expect("a user id")
}

#[tokio::test(flavor = "multi_thread")]
async fn user_is_created_gets_tokens_and_is_deleted() {
    let managed = Managed::new("user").await;
    let world = &managed.world;
    let instance = managed.credential_is("True", "AdminCredentialReady").await;
    let shown = instance
        .status
        .and_then(|status| status.admin_credential)
        .expect("a user");
    assert_eq!(shown.user_id, managed.admin.id);
    assert_eq!(
        shown.roles,
        [format!("ORG_USER_MANAGER: organization {}", managed.organization)]
    );

    managed.user("billing", json!({"description": "Invoices"})).await;
    let token = world.token("billing-token").await;
    let object = world.ready("billing", "True", "Issued").await;
    managed.user_is("billing", "True", "UserReady").await;
    assert_eq!(token.split('.').count(), 3, "a JWT");
    let [user] = &managed.users().await[..] else {
        panic!("one user")
    };
    let username = format!("prod-{}-billing", world.name);
    assert_eq!(
        (&user["id"], &user["username"], &user["name"], &user["description"]),
        (
            &json!(user_id(&object)),
            &json!(username),
            &json!(username),
            &json!("Invoices")
        )
    );
    let owner = format!("prod/{}/billing", world.name);
    assert_eq!(user["metadata"]["zitadel-tokens.dev/owner"], json!(owner));
    // No private key is in the tenant's namespace.
    let secrets = world
        .secrets()
        .list(&ListParams::default())
        .await
        .expect("listed")
        .items;
    let names: Vec<_> = secrets
        .iter()
        .filter_map(|secret| secret.metadata.name.clone())
        .collect();
    assert_eq!(names, ["billing-token"]);
    assert_eq!(world.issuer.mints().await, 1);

    // A changed spec changes the user, and costs no token.
    managed
        .user(
            "billing",
            json!({"description": "All invoices", "displayName": "Billing"}),
        )
        .await;
    eventually("the user is changed", async || {
        let users = managed.users().await;
        users[0]["name"] == "Billing" && users[0]["description"] == "All invoices"
    })
    .await;
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, 1);

    // What identifies the user cannot change.
    for (change, message) in [
        (json!({"user": {"organizationID": "1"}}), "organizationID is immutable"),
        (
            json!({"user": {"organizationID": managed.organization, "username": "a"}}),
            "username is immutable",
        ),
        (json!({}), "cannot be added or removed"),
    ] {
        let mut spec = one_token("billing-token");
        spec.as_object_mut()
            .expect("an object")
            .extend(change.as_object().expect("an object").clone());
        let refused = world
            .service_user("billing", spec)
            .await
            .expect_err(message)
            .to_string();
        assert!(refused.contains(message), "{refused}");
    }

    managed.deleted("billing").await;
    assert_eq!(managed.users().await, Vec::<Value>::new());
    assert!(world.ledger(&object).await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn credential_must_be_bound_and_accepted() {
    let managed = Managed::new("credential").await;
    managed.credential_is("True", "AdminCredentialReady").await;
    // Another destination, another kind of content, a token that ZITADEL does not know.
    managed
        .bound_credential(&managed.admin.key, "https://other.example.com")
        .await;
    managed.credential_is("False", "CredentialNotBound").await;
    managed.credential("{}").await;
    managed.credential_is("False", "CredentialInvalid").await;
    managed.credential("unknown-token").await;
    managed.credential_is("False", "CredentialRejected").await;
    managed.user("billing", json!({})).await;
    managed.user_is("billing", "False", "CredentialRejected").await;
    assert_eq!(managed.users().await, Vec::<Value>::new());
    // A personal access token. The object goes on at once.
    let token = managed.world.issuer.personal_token(&managed.admin.id).await;
    managed.credential(&token).await;
    managed.credential_is("True", "AdminCredentialReady").await;
    managed.world.ready("billing", "True", "Issued").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn user_is_refused_without_policy_or_role() {
    let managed = Managed::new("refused").await;
    let world = &managed.world;
    managed.allow(json!({"organizationIDs": ["1"]})).await;
    managed.user("billing", json!({})).await;
    managed.user_is("billing", "False", "UserDenied").await;
    managed.allow(json!({"organizationIDs": [managed.organization]})).await;
    world.ready("billing", "True", "Issued").await;
    // Another name needs a pattern.
    managed.user("named", json!({"username": "ci-bot"})).await;
    managed.user_is("named", "False", "UserDenied").await;
    let users = json!({"organizationIDs": [managed.organization], "usernamePattern": "ci-*"});
    managed.allow(users).await;
    world.ready("named", "True", "Issued").await;
    // A name that is taken is never taken over.
    managed.user("second", json!({"username": "ci-bot"})).await;
    managed.user_is("second", "False", "UserConflict").await;
    assert_eq!(managed.users().await.len(), 2);
    managed.deleted("second").await;
    assert_eq!(managed.users().await.len(), 2);

    let viewer = admin(
        world,
        json!({"organizationId": managed.organization}),
        "ORG_OWNER_VIEWER",
    )
    .await;
    managed.credential(&viewer.key).await;
    managed.user("third", json!({})).await;
    managed.user_is("third", "False", "AdminForbidden").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_after_the_request_creates_no_second_user() {
    let managed = Managed::new("crash").await;
    let world = &managed.world;
    managed.credential_is("True", "AdminCredentialReady").await;
    let hang = json!({"path": "/v2/users/new", "times": 1, "afterHandling": true, "hang": true});
    world.issuer.fault(hang).await;
    managed.user("billing", json!({})).await;
    eventually("ZITADEL has the user", async || managed.users().await.len() == 1).await;
    managed.operator.kill();
    let managed = Managed {
        operator: managed.world.rotating_operator_with(&CLUSTER).await,
        world: managed.world,
        organization: managed.organization,
        admin: managed.admin,
    };
    managed.world.ready("billing", "True", "Issued").await;
    assert_eq!(managed.users().await.len(), 1);
    managed.deleted("billing").await;
    assert_eq!(managed.users().await, Vec::<Value>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn deletion_reads_neither_status_nor_a_foreign_owner() {
    let managed = Managed::new("owner").await;
    let world = &managed.world;
    let victim = world.issuer.user(json!({"organizationId": managed.organization})).await;
    managed.user("billing", json!({})).await;
    let object = world.ready("billing", "True", "Issued").await;
    let forged = json!({"status": {"userID": victim.id}});
    let forged = world
        .users()
        .patch_status("billing", &PatchParams::default(), &Patch::Merge(&forged))
        .await;
    forged.expect("written");
    managed.deleted("billing").await;
    let left: Vec<Value> = managed
        .users()
        .await
        .into_iter()
        .map(|user| user["id"].clone())
        .collect();
    assert_eq!(left, [json!(victim.id)]);
    assert_ne!(user_id(&object), victim.id);

    // Somebody else is the owner now.
    managed.user("orders", json!({})).await;
    let object = world.ready("orders", "True", "Issued").await;
    let metadata = json!({"zitadel-tokens.dev/owner": "another"});
    world.issuer.change_metadata(&user_id(&object), metadata).await;
    world.issuer.settled().await;
    managed.deleted("orders").await;
    assert_eq!(managed.users().await.len(), 2);
    eventually("an Event", async || {
        world.events("orders").await.contains("Warning UserLeftBehind")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deletion_waits_for_a_working_credential() {
    let managed = Managed::new("revoked").await;
    let world = &managed.world;
    // ZITADEL up to 4.13 answers to a rejected key like to a failure of its database.
    world.issuer.settings(json!({"dialect": "errors_internal"})).await;
    managed.user("billing", json!({})).await;
    world.ready("billing", "True", "Issued").await;
    world.issuer.remove_key(&managed.admin.id, &managed.admin.key_id).await;
    managed.deletion_waits("billing", "CredentialRejected").await;
    let (_, key) = world.issuer.key(&managed.admin.id, json!({})).await;
    managed.credential(&key).await;
    world.user_gone("billing").await;
    assert_eq!(managed.users().await, Vec::<Value>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn user_rotates_its_key_and_is_not_taken_over_after_the_ledger_is_lost() {
    let managed = Managed::new("lost").await;
    let world = &managed.world;
    managed.user("billing", json!({})).await;
    let object = world.ready("billing", "True", "Issued").await;
    let keys = |user: &ZitadelServiceUser| user.status.as_ref().and_then(|status| status.key_id.clone());
    let first = keys(&object).expect("a key");
    // The user rotates its key itself.
    world.annotate("billing", "rotate-request", "1").await;
    let object = world
        .user_until("billing", |user| keys(user).is_some_and(|key| key != first))
        .await;
    managed.user_is("billing", "True", "UserReady").await;
    // The ledger is lost: the user stays, and nobody takes it over.
    let ledgers: Api<Secret> = Api::namespaced(world.client.clone(), &world.home());
    let ledger = format!("service-user-key-{}", object.metadata.uid.as_deref().expect("a UID"));
    ledgers
        .delete(&ledger, &DeleteParams::default())
        .await
        .expect("deleted");
    world.renew("billing").await;
    managed.user_is("billing", "False", "UserConflict").await;
    assert_eq!(managed.users().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn existing_user_is_taken_over_only_if_its_metadata_names_the_object() {
    let managed = Managed::new("adopt").await;
    let world = &managed.world;
    managed.promote("IAM_OWNER_VIEWER").await;
    managed
        .allow(json!({"organizationIDs": [managed.organization], "usernamePattern": "ci-*"}))
        .await;
    let owner = |name: &str| json!({"zitadel-tokens.dev/owner": format!("prod/{}/{name}", world.name)});
    let user = async |username: &str| {
        let fields = json!({"organizationId": managed.organization, "username": username, "name": "By hand"});
        world.issuer.user(fields).await
    };
    let existing = user("ci-bot").await;
    let spec = json!({"existingUserID": existing.id, "accessTokenType": "JWT"});
    managed.user("billing", spec.clone()).await;
    managed.user_is("billing", "False", "UserNotAdoptable").await;
    world.issuer.change_metadata(&existing.id, owner("other")).await;
    world.issuer.settled().await;
    world.renew("billing").await;
    managed.user_is("billing", "False", "UserNotAdoptable").await;
    world.issuer.change_metadata(&existing.id, owner("billing")).await;
    world.issuer.settled().await;
    world.annotate("billing", "renew-request", "again").await;
    let object = world.ready("billing", "True", "Issued").await;
    managed.user_is("billing", "True", "UserReady").await;
    assert_eq!(user_id(&object), existing.id);
    // Only the fields that the spec sets are changed, and the key of the person stays.
    let users = managed.users().await;
    let [shown] = &users[..] else { panic!("one user") };
    assert_eq!(
        (&shown["name"], &shown["username"]),
        (&json!("By hand"), &json!("ci-bot"))
    );
    assert_eq!(world.token("billing-token").await.split('.').count(), 3, "a JWT");
    assert_eq!(world.issuer.keys(&existing.id).await.len(), 2);
    managed.deleted("billing").await;
    assert_eq!(managed.users().await.len(), 1);
    let keys = world.issuer.keys(&existing.id).await;
    assert_eq!(keys.iter().map(|key| &key.id).collect::<Vec<_>>(), [&existing.key_id]);

    // A username that no policy allows, and a user with roles of the instance.
    let named = user("root").await;
    world.issuer.change_metadata(&named.id, owner("named")).await;
    world.issuer.settled().await;
    managed.user("named", json!({"existingUserID": named.id})).await;
    managed.user_is("named", "False", "UserDenied").await;
    let holder = user("ci-holder").await;
    world.issuer.change_metadata(&holder.id, owner("holder")).await;
    let instance = json!({"instance": true});
    world
        .issuer
        .set_manager_roles(&holder.id, &instance, &["IAM_OWNER_VIEWER"])
        .await;
    managed.user("holder", json!({"existingUserID": holder.id})).await;
    managed.user_is("holder", "False", "UserNotAdoptable").await;
    managed.deleted("holder").await;
    assert_eq!(world.issuer.keys(&holder.id).await.len(), 1);

    // A person, and a user of another organization.
    let refused = async |name: &str, fields: Value| {
        let user = world.issuer.user(fields).await;
        world.issuer.change_metadata(&user.id, owner(name)).await;
        world.issuer.settled().await;
        managed.user(name, json!({"existingUserID": user.id})).await;
        managed.user_is(name, "False", "UserNotAdoptable").await;
        assert_eq!(world.issuer.keys(&user.id).await.len(), 1);
    };
    let person = json!({"organizationId": managed.organization, "username": "ci-person", "human": true});
    refused("person", person).await;
    let elsewhere = json!({"organizationId": world.issuer.organization().await, "username": "ci-elsewhere"});
    refused("elsewhere", elsewhere).await;
}

/// Its roles of the instance alone would keep it from being taken over, so it has none here.
#[tokio::test(flavor = "multi_thread")]
async fn administrator_takes_over_neither_itself_nor_what_it_cannot_check() {
    let managed = Managed::new("itself").await;
    let world = &managed.world;
    managed
        .allow(json!({"organizationIDs": [managed.organization], "usernamePattern": "*"}))
        .await;
    let owner = json!({"zitadel-tokens.dev/owner": format!("prod/{}/billing", world.name)});
    world.issuer.change_metadata(&managed.admin.id, owner).await;
    world.issuer.settled().await;
    managed
        .user("billing", json!({"existingUserID": managed.admin.id}))
        .await;
    // It may not see who has roles of the instance.
    managed.user_is("billing", "False", "AdminForbidden").await;
    managed.promote("IAM_OWNER_VIEWER").await;
    world.renew("billing").await;
    managed.user_is("billing", "False", "UserNotAdoptable").await;
    managed.deleted("billing").await;
    assert_eq!(world.issuer.keys(&managed.admin.id).await.len(), 1);
}

/// People work in ZITADEL's console too.
#[tokio::test(flavor = "multi_thread")]
async fn user_changed_by_hand_is_corrected_or_reported() {
    let managed = Managed::new("by-hand").await;
    let world = &managed.world;
    managed
        .user(
            "billing",
            json!({"description": "Invoices", "accessTokenType": "Opaque"}),
        )
        .await;
    let object = world.ready("billing", "True", "Issued").await;
    managed.user_is("billing", "True", "UserReady").await;
    let user_id = user_id(&object);
    let format = object.status.and_then(|status| status.tokens[0].format.clone());
    assert_eq!(format.as_deref(), Some("Opaque"));

    // A renew request also compares the user with the spec.
    let by_hand = json!({"description": "By hand", "name": "By hand", "tokenType": "JWT"});
    world.issuer.change_user(&user_id, by_hand).await;
    world.annotate("billing", "renew-request", "1").await;
    eventually("the user is corrected", async || {
        let users = managed.users().await;
        let name = format!("prod-{}-billing", world.name);
        users[0]["description"] == "Invoices" && users[0]["name"] == name && users[0]["tokenType"] == "BEARER"
    })
    .await;

    for (i, state) in ["inactive", "locked"].into_iter().enumerate() {
        world.issuer.change_user(&user_id, json!({"state": state})).await;
        world
            .annotate("billing", "renew-request", &format!("{state}-{i}"))
            .await;
        managed.user_is("billing", "False", "UserInactive").await;
        // The state is a decision of a person.
        assert_eq!(managed.users().await[0]["state"], state);
        world.issuer.change_user(&user_id, json!({"state": "active"})).await;
        world.annotate("billing", "renew-request", &format!("active-{i}")).await;
        managed.user_is("billing", "True", "UserReady").await;
        world.ready("billing", "True", "Issued").await;
    }

    // No second user is created for one that a person deleted.
    world.issuer.delete_user(&user_id).await;
    world.annotate("billing", "renew-request", "deleted").await;
    let missing = |user: &ZitadelServiceUser| {
        condition(user, "UserReady").is_some_and(|(status, reason, _)| (status, reason) == ("False", "UserMissing"))
    };
    // At first, ZITADEL may not show it yet.
    until(world.users(), "billing", 2 * SOON, missing).await;
    assert_eq!(managed.users().await, Vec::<Value>::new());
    managed.deleted("billing").await;
}

/// Not to see a user does not mean that it is gone.
#[tokio::test(flavor = "multi_thread")]
async fn administrator_without_its_role_neither_creates_nor_forgets_a_user() {
    let managed = Managed::new("no-role").await;
    let world = &managed.world;
    managed.user("billing", json!({})).await;
    let object = world.ready("billing", "True", "Issued").await;
    let resource = json!({"organizationId": managed.organization});
    world.issuer.set_manager_roles(&managed.admin.id, &resource, &[]).await;
    managed.user("billing", json!({"description": "Invoices"})).await;
    managed.user_is("billing", "False", "AdminForbidden").await;
    managed.deletion_waits("billing", "AdminForbidden").await;
    assert_eq!(managed.users().await.len(), 1);
    assert!(world.ledger(&object).await.is_some());
    world
        .issuer
        .set_manager_roles(&managed.admin.id, &resource, &["ORG_USER_MANAGER"])
        .await;
    // Nothing tells of the role. A change of the object ends the wait.
    world.annotate("billing", "note", "retry").await;
    world.user_gone("billing").await;
    assert_eq!(managed.users().await, Vec::<Value>::new());
    assert!(world.ledger(&object).await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn organization_that_does_not_exist_is_reported() {
    let managed = Managed::new("nowhere").await;
    managed.promote("IAM_OWNER").await;
    managed.allow(json!({"organizationIDs": ["1"]})).await;
    let mut spec = one_token("billing-token");
    spec["user"] = json!({"organizationID": "1"});
    managed.world.service_user("billing", spec).await.expect("accepted");
    managed.user_is("billing", "False", "UserRejected").await;
    managed.deleted("billing").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_owner_old_server_and_orphan_are_reported() {
    let managed = Managed::new("foreign").await;
    let world = &managed.world;
    managed.user("billing", json!({})).await;
    let object = world.ready("billing", "True", "Issued").await;
    // The user changes its own metadata. That harms only this user, and only at the next comparison.
    let owner = |value: String| json!({"zitadel-tokens.dev/owner": value});
    world
        .issuer
        .change_metadata(&user_id(&object), owner("prod/shop/orders".into()))
        .await;
    world.issuer.settled().await;
    managed.user("billing", json!({"description": "Invoices"})).await;
    managed.user_is("billing", "False", "UserConflict").await;
    world.ready("billing", "True", "Issued").await;
    let restored = owner(format!("prod/{}/billing", world.name));
    world.issuer.change_metadata(&user_id(&object), restored).await;
    world.issuer.settled().await;
    managed.user("billing", json!({"description": "All invoices"})).await;
    managed.user_is("billing", "True", "UserReady").await;

    world.issuer.settings(json!({"userV2": false})).await;
    managed.user("orders", json!({})).await;
    managed.user_is("orders", "False", "NotSupportedByServer").await;
    world.issuer.settings(json!({"userV2": true})).await;
    managed.deleted("orders").await;

    // The user stays if the object asks for it.
    world
        .merge("billing", json!({"spec": {"deletionPolicy": "Orphan"}}))
        .await;
    managed.deleted("billing").await;
    assert_eq!(managed.users().await.len(), 1);
    eventually("an Event", async || {
        world.events("billing").await.contains("Warning UserLeftBehind")
    })
    .await;
}
