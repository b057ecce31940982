//! An administrator grants manager roles (docs/reference/zitadel-protocol.md#manager-roles).

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::{Value, json};
use zitadel_tokens::domain::manager_role::{ManagerRoles, RoleScope};
use zitadel_tokens::zitadel::{APIError, Manager};

use super::set;
use crate::client::Caller;
use crate::server::{Kind, Server, on_any_server, takes_effect};

/// A user, an organization and a project that do not exist.
const UNKNOWN: &str = "69234237810729000";

const UPDATE: &str = "/zitadel.internal_permission.v2.InternalPermissionService/UpdateAdministrator";

/// A scope, its form in requests, and two of its roles in the order of the alphabet.
struct Level {
    scope: RoleScope,
    resource: Value,
    roles: [&'static str; 2],
}

/// A user, and the administrator that gives roles to it.
struct Roles<'a> {
    server: &'a Server,
    admin: Caller,
    user: String,
}

impl<'a> Roles<'a> {
    /// On a server without `internal_permission` v2 (before ZITADEL 4.5), asserts that the methods are absent and
    /// returns nothing.
    async fn on(server: &'a Server) -> Option<Self> {
        let this = Self {
            server,
            admin: server.administrator().await,
            user: server.user(Kind::Opaque).await.user_id,
        };
        let Caller { client, token } = &this.admin;
        let scope = RoleScope::Instance;
        if client.list_roles(token, &this.user, &scope).await != Err(APIError::Unavailable) {
            return Some(this);
        }
        let absent = Err(APIError::Unavailable);
        let roles = ["IAM_OWNER_VIEWER"];
        assert_eq!(this.create(&scope, &roles).await, absent);
        assert_eq!(this.update(&scope, &roles).await, absent);
        assert_eq!(client.remove_roles(token, &this.user, &scope).await, absent);
        assert_eq!(client.list_managers(token, &scope).await.map(drop), absent);
        None
    }

    /// All four levels. The project belongs to the organization of the user and is granted to another one.
    async fn levels(&self) -> [Level; 4] {
        let organization = self.server.organization().to_owned();
        let project = self.server.project().await;
        let granted = self.server.other_organization().await;
        self.server.grant(&project, &granted).await;
        [
            Level {
                scope: RoleScope::Instance,
                resource: json!({"instance": true}),
                roles: ["IAM_OWNER_VIEWER", "IAM_USER_MANAGER"],
            },
            Level {
                resource: json!({"organizationId": organization}),
                scope: RoleScope::Organization(organization),
                roles: ["ORG_OWNER_VIEWER", "ORG_USER_MANAGER"],
            },
            Level {
                resource: json!({"projectId": project}),
                scope: RoleScope::Project(project.clone()),
                roles: ["PROJECT_OWNER", "PROJECT_OWNER_VIEWER"],
            },
            Level {
                resource: json!({"projectGrant": {"projectId": project, "organizationId": granted}}),
                scope: RoleScope::ProjectGrant {
                    project_id: project,
                    organization_id: granted,
                },
                roles: ["PROJECT_GRANT_OWNER", "PROJECT_GRANT_OWNER_VIEWER"],
            },
        ]
    }

    async fn create(&self, scope: &RoleScope, roles: &[&str]) -> Result<(), APIError> {
        create_as(&self.admin, &self.user, scope, roles).await
    }

    async fn update(&self, scope: &RoleScope, roles: &[&str]) -> Result<(), APIError> {
        update_as(&self.admin, &self.user, scope, roles).await
    }

    async fn remove(&self, scope: &RoleScope) -> Result<(), APIError> {
        let Caller { client, token } = &self.admin;
        client.remove_roles(token, &self.user, scope).await
    }

    /// Waits until the user has exactly these roles.
    async fn has(&self, scope: &RoleScope, wanted: BTreeSet<String>) {
        let listed = async || roles_as(&self.admin, &self.user, scope).await;
        takes_effect(listed, |roles| *roles == wanted).await;
    }
}

async fn create_as(caller: &Caller, user: &str, scope: &RoleScope, roles: &[&str]) -> Result<(), APIError> {
    let roles = roles.iter().map(|role| (*role).to_owned()).collect();
    caller.client.create_roles(&caller.token, user, scope, &roles).await
}

async fn update_as(caller: &Caller, user: &str, scope: &RoleScope, roles: &[&str]) -> Result<(), APIError> {
    let roles = roles.iter().map(|role| (*role).to_owned()).collect();
    caller.client.update_roles(&caller.token, user, scope, &roles).await
}

/// The roles of a user in one scope, as far as the caller sees them.
async fn roles_as(caller: &Caller, user: &str, scope: &RoleScope) -> BTreeSet<String> {
    let listed = caller.client.list_roles(&caller.token, user, scope).await;
    listed.expect("a list")
}

#[tokio::test]
async fn roles_are_granted_changed_and_removed_at_each_level() {
    on_any_server(async |server| {
        let Some(these) = Roles::on(server).await else { return };
        for Level { scope, resource, roles } in these.levels().await {
            let [first, second] = roles;
            these.has(&scope, set([])).await;
            let absent = these.update(&scope, &[first]).await;
            assert_eq!(absent, Err(APIError::IsNoManager), "{scope:?}");
            assert_eq!(these.create(&scope, &[first]).await, Ok(()), "{scope:?}");
            these.has(&scope, set([first])).await;
            for roles in [&roles[..1], &roles[..]] {
                let present = these.create(&scope, roles).await;
                assert_eq!(present, Err(APIError::IsManager), "{scope:?}");
            }
            // The second call changes nothing.
            for _ in 0..2 {
                assert_eq!(these.update(&scope, &roles).await, Ok(()), "{scope:?}");
                these.has(&scope, set(roles)).await;
            }
            // The same roles in another order, as a person may have set them.
            let token = server.administrator_token();
            let body = json!({"userId": these.user, "resource": resource, "roles": [second, first]});
            let turned = server.ask(Some(token), Method::POST, UPDATE, Some(body)).await;
            assert_eq!(turned.outcome(), "200", "{turned:?}");
            these.has(&scope, set(roles)).await;
            assert_eq!(these.update(&scope, &roles).await, Ok(()), "{scope:?}");
            assert_eq!(these.update(&scope, &[second]).await, Ok(()), "{scope:?}");
            these.has(&scope, set([second])).await;

            for _ in 0..2 {
                assert_eq!(these.remove(&scope).await, Ok(()), "{scope:?}");
            }
            these.has(&scope, set([])).await;
        }
    })
    .await;
}

#[tokio::test]
async fn unknown_roles_users_and_resources_differ() {
    on_any_server(async |server| {
        let Some(these) = Roles::on(server).await else { return };
        let levels = these.levels().await;
        for Level { scope, roles, .. } in &levels {
            let [first, _] = *roles;
            let wrong = ["NO_SUCH_ROLE", "SYSTEM_OWNER"];
            for wrong in wrong {
                let refused = these.create(scope, &[first, wrong]).await;
                assert_eq!(refused, Err(APIError::UnknownRole), "{scope:?} {wrong}");
            }
            assert_eq!(these.create(scope, &[first]).await, Ok(()), "{scope:?}");
            for wrong in wrong {
                let refused = these.update(scope, &[first, wrong]).await;
                assert_eq!(refused, Err(APIError::UnknownRole), "{scope:?} {wrong}");
            }
            let unknown = create_as(&these.admin, UNKNOWN, scope, &[first]).await;
            assert_eq!(unknown, Err(APIError::UnknownUser), "{scope:?}");
            assert_eq!(roles_as(&these.admin, UNKNOWN, scope).await, set([]));
            these.remove(scope).await.expect("removed");
        }
        // A role of another level.
        let organization = &levels[1].scope;
        let refused = these.create(organization, &["IAM_OWNER_VIEWER"]).await;
        assert_eq!(refused, Err(APIError::UnknownRole));

        let RoleScope::Project(project_id) = levels[2].scope.clone() else {
            unreachable!("the third level is the project")
        };
        let (organization, project) = (
            RoleScope::Organization(UNKNOWN.into()),
            RoleScope::Project(UNKNOWN.into()),
        );
        let grant = RoleScope::ProjectGrant {
            project_id,
            organization_id: UNKNOWN.into(),
        };
        for (scope, role, error) in [
            (organization, "ORG_OWNER_VIEWER", APIError::UnknownOrganization),
            (project, "PROJECT_OWNER", APIError::UnknownProject),
            (grant, "PROJECT_GRANT_OWNER", APIError::UnknownProjectGrant),
        ] {
            assert_eq!(these.create(&scope, &[role]).await, Err(error), "{scope:?}");
        }
    })
    .await;
}

/// Without a membership the status is 404, with one that lacks the permission it is 403.
#[tokio::test]
async fn a_caller_without_the_permission_grants_and_removes_nothing() {
    on_any_server(async |server| {
        let Some(these) = Roles::on(server).await else { return };
        let levels = these.levels().await;
        let key = server.user(Kind::Opaque).await;
        let caller = server.caller(&key).await;
        let Caller { client, token } = &caller;
        for Level { scope, roles, .. } in &levels {
            // Another user, so that creation is refused too.
            let new = create_as(&caller, &key.user_id, scope, &roles[..1]).await;
            assert_eq!(new, Err(APIError::Forbidden), "{scope:?}");
            these.create(scope, &roles[..1]).await.expect("granted");
            these.has(scope, set([roles[0]])).await;
            let changed = update_as(&caller, &these.user, scope, roles).await;
            assert_eq!(changed, Err(APIError::Forbidden), "{scope:?}");
            let removed = client.remove_roles(token, &these.user, scope).await;
            assert_eq!(removed, Err(APIError::Forbidden), "{scope:?}");
            assert_eq!(roles_as(&caller, &these.user, scope).await, set([]));
            these.has(scope, set([roles[0]])).await;
        }
        // Without roles to remove, ZITADEL checks the permission for the instance only.
        for Level { scope, .. } in &levels {
            let removed = client.remove_roles(token, &key.user_id, scope).await;
            let wanted = match scope {
                RoleScope::Instance => Err(APIError::Forbidden),
                _ => Ok(()),
            };
            assert_eq!(removed, wanted, "{scope:?}");
        }

        let organization = &levels[1].scope;
        let granted = create_as(&these.admin, &key.user_id, organization, &["ORG_OWNER_VIEWER"]);
        granted.await.expect("granted");
        let visible = async || roles_as(&caller, &these.user, organization).await;
        takes_effect(visible, |roles| !roles.is_empty()).await;
        for Level { scope, roles, .. } in &levels[..3] {
            let changed = update_as(&caller, &these.user, scope, roles).await;
            assert_eq!(changed, Err(APIError::Forbidden), "{scope:?}");
        }
        for Level { scope, .. } in &levels {
            these.remove(scope).await.expect("removed");
        }
    })
    .await;
}

#[tokio::test]
async fn a_caller_sees_its_own_roles() {
    on_any_server(async |server| {
        let Some(these) = Roles::on(server).await else { return };
        let Caller { client, token } = &these.admin;
        let me = client.who_am_i(token).await.expect("known");
        let own = client.list_own_roles(token, &me).await.expect("a list");
        let instance = own.iter().find(|held| held.scope == RoleScope::Instance);
        assert!(instance.is_some_and(|held| held.roles.contains("IAM_OWNER")), "{own:?}");

        let key = server.user(Kind::Jwt).await;
        let caller = server.caller(&key).await;
        let own = async || {
            let own = caller.client.list_own_roles(&caller.token, &key.user_id).await;
            own.expect("a list").into_iter().collect::<BTreeSet<_>>()
        };
        assert_eq!(own().await, BTreeSet::new());
        let mut wanted = BTreeSet::new();
        for Level { scope, roles, .. } in these.levels().await {
            let granted = create_as(&these.admin, &key.user_id, &scope, &roles).await;
            assert_eq!(granted, Ok(()), "{scope:?}");
            wanted.insert(ManagerRoles {
                scope,
                roles: set(roles),
            });
        }
        takes_effect(own, |own| *own == wanted).await;
        // Among the managers of each scope is this user, with its organization. Without roles, a caller sees none.
        let organization = server.organization();
        let other = server.caller(&server.user(Kind::Opaque).await).await;
        for ManagerRoles { scope, roles } in wanted {
            let managers = async || client.list_managers(token, &scope).await.expect("a list");
            let is_listed = |manager: &Manager| {
                manager.user_id == key.user_id && manager.organization_id == organization && manager.roles == roles
            };
            takes_effect(managers, |managers| managers.iter().any(is_listed)).await;
            let visible = other.client.list_managers(&other.token, &scope).await;
            assert_eq!(visible, Ok(Vec::new()), "{scope}");
        }
        // The owner of a project.
        let project = server.project().await;
        let owner = client.organization_of_project(token, &project).await;
        assert_eq!(owner, Ok(Some(organization.to_owned())));
        assert_eq!(client.organization_of_project(token, UNKNOWN).await, Ok(None));
    })
    .await;
}
