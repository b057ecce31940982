//! A crash at each step of granting and revoking a manager role.

use std::time::Duration;

use serde_json::{Value, json};

use crate::managed_users::{behind_proxy, kill};
use crate::places::{Place, stop_at};
use crate::reduced;
use crate::support::managed::Managed;
use crate::support::world::{condition, until};

const CREATE: &str = "/zitadel.internal_permission.v2.InternalPermissionService/CreateAdministrator";
const UPDATE: &str = "/zitadel.internal_permission.v2.InternalPermissionService/UpdateAdministrator";
const NEW_LEDGER: &str = "-home/secrets?";
const LEDGER: &str = "/secrets/service-user-roles-";
const OBJECT: &str = "/zitadelserviceusers/user-";
const STATUS: &str = "/status";

/// Places in the grant of a role in an organization where the user has none, and in another where a person granted one.
const GRANT: &[Place] = &[
    Place::Zitadel(CREATE, true),
    Place::Kubernetes("POST", NEW_LEDGER, 1, true),
    Place::Zitadel(UPDATE, true),
    Place::Kubernetes("PATCH", OBJECT, 1, false),
    Place::Kubernetes("PATCH", OBJECT, 1, true),
    Place::Kubernetes("POST", NEW_LEDGER, 1, false),
    Place::Zitadel(CREATE, false),
    Place::Zitadel(UPDATE, false),
    Place::Kubernetes("PUT", LEDGER, 1, false),
    Place::Kubernetes("PUT", LEDGER, 1, true),
    Place::Kubernetes("PUT", STATUS, 1, true),
];

const REVOKE: &[Place] = &[
    Place::Zitadel(UPDATE, true),
    Place::Kubernetes("DELETE", LEDGER, 1, true),
    Place::Zitadel(UPDATE, false),
    Place::Kubernetes("DELETE", LEDGER, 1, false),
    Place::Kubernetes("PATCH", OBJECT, 1, false),
    Place::Kubernetes("PATCH", OBJECT, 1, true),
];

/// The longest wait: ZITADEL gets half a minute to show a change.
const LIMIT: Duration = Duration::from_secs(100);

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_step_of_a_grant_leaves_no_role_behind_and_takes_none_of_others() {
    let (mut managed, proxy) = behind_proxy("rolesteps").await;
    managed.promote("IAM_OWNER").await;
    managed.credential_is("True", "AdminCredentialReady").await;
    let [one, two] = [
        managed.world.issuer.organization().await,
        managed.world.issuer.organization().await,
    ];
    let resources = [json!({"organizationId": one}), json!({"organizationId": two})];
    let allowed = json!([{"organizationIDs": [one, two], "roles": ["ORG_OWNER"]}]);
    managed.allow_roles(allowed).await;
    let entry = |organization: &str| json!({"organizationID": organization, "roles": ["ORG_OWNER"]});
    let entries = json!([entry(&one), entry(&two)]);
    let places = GRANT.iter().map(|place| (place, false));
    let places = places.chain(REVOKE.iter().map(|place| (place, true)));
    let places: Vec<_> = places
        .filter(|(place, _)| {
            !reduced()
                || [&GRANT[0], &GRANT[2], &REVOKE[0]]
                    .iter()
                    .any(|kept| std::ptr::eq(*kept, *place))
        })
        .collect();
    for (n, (place, revokes)) in places.into_iter().enumerate() {
        let name = format!("user-{n}");
        let issuer = &managed.world.issuer;
        let user = issuer.user(json!({"tokenType": "JWT"})).await;
        issuer
            .set_manager_roles(&user.id, &resources[1], &["ORG_OWNER_VIEWER"])
            .await;
        managed
            .with_roles(&name, &user, if revokes { entries.clone() } else { json!([]) })
            .await;
        managed.world.ready(&name, "True", "Issued").await;
        if revokes {
            granted(&managed, &name, &user.id, &resources).await;
        }
        let begin = async || {
            if revokes {
                managed.world.delete(&name).await;
            } else {
                managed.with_roles(&name, &user, entries.clone()).await;
            }
        };
        let hold = stop_at(issuer, &proxy, *place, begin).await;
        kill(&mut managed, &proxy, hold).await;
        if !revokes {
            granted(&managed, &name, &user.id, &resources).await;
            managed.world.delete(&name).await;
        }
        managed.world.user_gone(&name).await;
        let left = held(&managed, &user.id, &resources).await;
        assert_eq!(left, [&[][..], &["ORG_OWNER_VIEWER"]], "{place:?}, revokes: {revokes}");
        println!("{place:?}, revokes: {revokes}: no role is left, and none of others is lost");
    }
}

async fn held(managed: &Managed, user: &str, resources: &[Value; 2]) -> [Vec<String>; 2] {
    let issuer = &managed.world.issuer;
    [
        issuer.manager_roles(user, &resources[0]).await,
        issuer.manager_roles(user, &resources[1]).await,
    ]
}

/// Waits until the status says that the roles are granted, and checks that they are.
async fn granted(managed: &Managed, name: &str, user: &str, resources: &[Value; 2]) {
    until(managed.world.users(), name, LIMIT, |user| {
        condition(user, "ManagerRolesGranted").is_some_and(|(status, _, _)| status == "True")
    })
    .await;
    let held = held(managed, user, resources).await;
    assert_eq!(held, [&["ORG_OWNER"][..], &["ORG_OWNER", "ORG_OWNER_VIEWER"]]);
}
