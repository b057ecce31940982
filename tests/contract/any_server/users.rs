//! An administrator manages service users (docs/reference/zitadel-protocol.md#service-users).

use secrecy::SecretString;
use zitadel_tokens::domain::answer::Format;
use zitadel_tokens::domain::key::ServiceKey;
use zitadel_tokens::domain::manager_role::RoleScope;
use zitadel_tokens::domain::user::{Machine, User, UserState};
use zitadel_tokens::zitadel::{APIError, APIToken, NewUser};

use super::own_keys::{Pair, in_an_hour};
use crate::client::{Caller, exchange};
use crate::server::{Kind, Server, on_any_server, takes_effect};

/// A user that does not exist.
const UNKNOWN: &str = "69234237810729000";

const OWNER: &str = "zitadel-tokens.dev/owner";

fn machine(description: &str, token_format: Format) -> Machine {
    Machine {
        name: "Contract".into(),
        description: description.into(),
        token_format,
    }
}

/// The administrator, and a service user that it created.
struct Made<'a> {
    server: &'a Server,
    admin: Caller,
    id: String,
    machine: Machine,
}

impl<'a> Made<'a> {
    /// Creates the user and waits until it shows. On a server without user v2 (ZITADEL 3), asserts that the methods are
    /// absent and returns nothing.
    async fn on(server: &'a Server) -> Option<Self> {
        let made = Self {
            server,
            admin: server.administrator().await,
            id: server.new_user_id(),
            machine: machine("made by a contract case", Format::Opaque),
        };
        match made.create(&made.id, &made.id).await {
            Err(APIError::Unavailable) => made.assert_unavailable().await,
            created => {
                assert_eq!(created, Ok(()));
                made.shows(Option::is_some).await;
                return Some(made);
            }
        }
        None
    }

    async fn assert_unavailable(&self) {
        let Caller { client, token } = &self.admin;
        let absent = Err(APIError::Unavailable);
        let updated = client.update_machine_user(token, &self.id, &self.machine).await;
        assert_eq!(updated, absent);
        assert_eq!(client.set_metadata(token, &self.id, OWNER, b"me").await, absent);
        let metadata = client.metadata(token, &self.id, OWNER).await;
        assert_eq!(metadata.map(drop), absent);
        let added = client.add_key(token, &self.id, &Pair::new().public, in_an_hour()).await;
        assert_eq!(added.map(drop), absent);
    }

    async fn create(&self, id: &str, username: &str) -> Result<(), APIError> {
        self.create_as(&self.admin, id, username).await
    }

    async fn create_as(&self, caller: &Caller, id: &str, username: &str) -> Result<(), APIError> {
        let new = NewUser {
            id,
            organization_id: self.server.organization(),
            username,
            machine: &self.machine,
        };
        caller.client.create_machine_user(&caller.token, new).await
    }

    async fn update(&self, machine: &Machine) -> Result<(), APIError> {
        let Caller { client, token } = &self.admin;
        client.update_machine_user(token, &self.id, machine).await
    }

    /// Waits until the user is as `wanted`.
    async fn shows(&self, wanted: impl Fn(&Option<User>) -> bool) -> Option<User> {
        let Caller { client, token } = &self.admin;
        let shown = takes_effect(async || client.user(token, &self.id).await.expect("visible"), wanted);
        shown.await
    }

    /// Waits until the user has these fields.
    async fn has(&self, machine: &Machine) {
        self.shows(|user| user.as_ref().and_then(|user| user.machine.as_ref()) == Some(machine))
            .await;
    }

    /// A caller without roles.
    async fn stranger(&self) -> Caller {
        self.server.caller(&self.server.user(Kind::Jwt).await).await
    }

    /// A caller with one role in the organization of the user.
    async fn with_role(&self, role: &str) -> (ServiceKey, Caller) {
        let key = self.server.user(Kind::Opaque).await;
        let scope = RoleScope::Organization(self.server.organization().to_owned());
        let Caller { client, token } = &self.admin;
        let roles = [role.to_owned()].into();
        let granted = client.create_roles(token, &key.user_id, &scope, &roles).await;
        granted.expect("granted");
        let caller = self.server.caller(&key).await;
        (key, caller)
    }
}

#[tokio::test]
async fn a_repeated_creation_is_recognized_by_the_chosen_id() {
    on_any_server(async |server| {
        let Some(made) = Made::on(server).await else { return };
        let user = made.shows(Option::is_some).await.expect("a user");
        assert_eq!(
            user,
            User {
                organization_id: server.organization().to_owned(),
                username: made.id.clone(),
                state: UserState::Active,
                machine: Some(made.machine.clone()),
            }
        );
        assert_eq!(made.create(&made.id, &made.id).await, Err(APIError::UserIDTaken));
        let (other_id, other_name) = (server.new_user_id(), server.new_user_id());
        assert_eq!(made.create(&made.id, &other_name).await, Err(APIError::UserIDTaken));
        assert_eq!(made.create(&other_id, &made.id).await, Err(APIError::UsernameTaken));
        assert_eq!(made.create("1/keys", &other_name).await, Err(APIError::Rejected));
    })
    .await;
}

/// The status of both is 404.
#[tokio::test]
async fn an_unknown_user_differs_from_an_invisible_user() {
    on_any_server(async |server| {
        let (user, other) = (server.user(Kind::Jwt).await, server.user(Kind::Jwt).await);
        let admin = server.administrator().await;
        assert_eq!(admin.client.user(&admin.token, UNKNOWN).await, Ok(None));

        let caller = server.caller(&user).await;
        let invisible = caller.client.user(&caller.token, &other.user_id).await;
        assert_eq!(invisible, Err(APIError::Forbidden));
        let own = caller.client.user(&caller.token, &user.user_id).await;
        let own = own.expect("visible").expect("a user");
        assert_eq!(own.state, UserState::Active);
        assert_eq!(own.machine.expect("a service user").token_format, Format::Jwt);
    })
    .await;
}

#[tokio::test]
async fn the_state_of_a_user_is_visible() {
    on_any_server(async |server| {
        let id = server.user(Kind::Opaque).await.user_id;
        let admin = server.administrator().await;
        let state = async || {
            let user = admin.client.user(&admin.token, &id).await;
            user.expect("visible").expect("a user").state
        };
        assert_eq!(state().await, UserState::Active);
        server.deactivate(&id).await;
        takes_effect(&state, |state| *state == UserState::Inactive).await;
        server.reactivate(&id).await;
        takes_effect(&state, |state| *state == UserState::Active).await;
    })
    .await;
}

#[tokio::test]
async fn update_of_a_user_can_be_repeated() {
    on_any_server(async |server| {
        let Some(made) = Made::on(server).await else { return };
        for changed in [
            machine("changed", Format::Jwt),
            machine("changed again", Format::Opaque),
            machine("", Format::Opaque),
        ] {
            // The second update changes nothing.
            for _ in 0..2 {
                assert_eq!(made.update(&changed).await, Ok(()));
                made.has(&changed).await;
            }
        }
        let Caller { client, token } = &made.admin;
        let unknown = client.update_machine_user(token, UNKNOWN, &made.machine).await;
        assert_eq!(unknown, Err(APIError::UnknownUser));
    })
    .await;
}

#[tokio::test]
async fn metadata_is_stored_and_replaced() {
    on_any_server(async |server| {
        let Some(made) = Made::on(server).await else { return };
        let Caller { client, token } = &made.admin;
        let value = async || client.metadata(token, &made.id, OWNER).await.expect("visible");
        assert_eq!(value().await, None);
        // All bytes, so that the base64 text has every character.
        let bytes: Vec<u8> = (0..=255).collect();
        for wanted in [&b"cluster-1/shop/billing"[..], b"cluster-2/shop/billing", &bytes] {
            for _ in 0..2 {
                assert_eq!(client.set_metadata(token, &made.id, OWNER, wanted).await, Ok(()));
                takes_effect(&value, |value| value.as_deref() == Some(wanted)).await;
            }
        }
        let other = client.metadata(token, &made.id, "zitadel-tokens.dev/other").await;
        assert_eq!(other, Ok(None));
        // An empty value is refused, an unknown user is not listed and cannot be written.
        let empty = client.set_metadata(token, &made.id, OWNER, b"").await;
        assert_eq!(empty, Err(APIError::Rejected));
        assert_eq!(client.metadata(token, UNKNOWN, OWNER).await, Ok(None));
        let unknown = client.set_metadata(token, UNKNOWN, OWNER, b"me").await;
        assert_eq!(unknown, Err(APIError::UnknownUser));
    })
    .await;
}

#[tokio::test]
async fn an_administrator_manages_the_keys_of_a_user() {
    on_any_server(async |server| {
        let Some(made) = Made::on(server).await else { return };
        let Caller { client, token } = &made.admin;
        let pair = Pair::new();
        let expires = in_an_hour();
        let key_id = client
            .add_key(token, &made.id, &pair.public, expires)
            .await
            .expect("added");
        let key = pair.key(&made.id, &key_id);
        let accepted = takes_effect(async || exchange(client, &key, "openid").await, Result::is_ok);
        accepted.await.expect("a token");

        let list = async || client.list_keys(token, &made.id).await.expect("visible");
        let listed = takes_effect(list, |list| !list.is_empty()).await;
        let listed: Vec<_> = listed.iter().map(|key| (&key.key_id, key.expires_at)).collect();
        assert_eq!(listed, [(&key_id, Some(expires))]);
        assert_eq!(client.count_personal_tokens(token, &made.id).await, Ok(0));

        for _ in 0..2 {
            assert_eq!(client.remove_key(token, &made.id, &key_id).await, Ok(()));
        }
        takes_effect(list, Vec::is_empty).await;
        let unknown = client.add_key(token, UNKNOWN, &pair.public, expires).await;
        assert_eq!(unknown, Err(APIError::UnknownUser));
        assert_eq!(client.list_keys(token, UNKNOWN).await.map(|list| list.len()), Ok(0));
    })
    .await;
}

#[tokio::test]
async fn a_user_is_deleted_once() {
    on_any_server(async |server| {
        let Some(made) = Made::on(server).await else { return };
        let Caller { client, token } = &made.admin;
        for _ in 0..2 {
            assert_eq!(client.delete_user(token, &made.id).await, Ok(()));
        }
        made.shows(Option::is_none).await;
        assert_eq!(client.delete_user(token, UNKNOWN).await, Ok(()));
    })
    .await;
}

/// Without a membership the status is 404, with one that lacks the permission it is 403.
#[tokio::test]
async fn a_caller_without_the_permission_is_refused() {
    on_any_server(async |server| {
        let Some(made) = Made::on(server).await else { return };
        let public = Pair::new().public;
        let key_id = made
            .admin
            .client
            .add_key(&made.admin.token, &made.id, &public, in_an_hour());
        let key_id = key_id.await.expect("added");
        let viewer = made.with_role("ORG_OWNER_VIEWER").await.1;
        let forbidden = Err(APIError::Forbidden);
        for (caller, sees) in [(made.stranger().await, false), (viewer, true)] {
            let Caller { client, token } = &caller;
            let new = server.new_user_id();
            assert_eq!(made.create_as(&caller, &new, &new).await, forbidden);
            let updated = client
                .update_machine_user(token, &made.id, &machine("x", Format::Jwt))
                .await;
            assert_eq!(updated, forbidden);
            assert_eq!(client.delete_user(token, &made.id).await, forbidden);
            assert_eq!(client.set_metadata(token, &made.id, OWNER, b"me").await, forbidden);
            let added = client.add_key(token, &made.id, &public, in_an_hour()).await;
            assert_eq!(added.map(drop), forbidden);
            assert_eq!(client.remove_key(token, &made.id, &key_id).await, forbidden);

            if sees {
                let visible = async || client.user(token, &made.id).await.is_ok_and(|user| user.is_some());
                takes_effect(visible, |visible| *visible).await;
                let listed = async || client.list_keys(token, &made.id).await.expect("a list").len();
                takes_effect(listed, |listed| *listed == 1).await;
            } else {
                assert_eq!(client.user(token, &made.id).await, Err(APIError::Forbidden));
                assert_eq!(client.metadata(token, &made.id, OWNER).await, Ok(None));
                assert_eq!(client.list_keys(token, &made.id).await.map(|list| list.len()), Ok(0));
            }
        }
        made.has(&made.machine).await;
    })
    .await;
}

#[tokio::test]
async fn the_user_of_a_token_is_known() {
    on_any_server(async |server| {
        for kind in [Kind::Jwt, Kind::Opaque] {
            let key = server.user(kind).await;
            let Caller { client, token } = server.caller(&key).await;
            assert_eq!(client.who_am_i(&token).await, Ok(key.user_id));
        }
    })
    .await;
}

/// docs/reference/zitadel-protocol.md#personal-access-tokens
#[tokio::test]
async fn a_personal_access_token_is_a_credential() {
    on_any_server(async |server| {
        let Some(made) = Made::on(server).await else { return };
        let (manager, _) = made.with_role("ORG_USER_MANAGER").await;
        let (id, text) = server.personal_access_token(&manager.user_id).await;
        let client = server.instance();
        let token = APIToken::personal(&text).expect("a token");
        // ZITADEL reads a projection of the tokens.
        let known = takes_effect(async || client.who_am_i(&token).await, Result::is_ok).await;
        assert_eq!(known, Ok(manager.user_id.clone()));
        let caller = Caller { client, token };
        let new = server.new_user_id();
        assert_eq!(made.create_as(&caller, &new, &new).await, Ok(()));

        server.remove_personal_access_token(&manager.user_id, &id).await;
        let Caller { client, token } = &caller;
        let refused = takes_effect(async || client.user(token, &new).await, Result::is_err).await;
        assert_eq!(refused, Err(APIError::Unauthenticated));
        assert_eq!(client.who_am_i(token).await, Err(APIError::Unauthenticated));
        let invented = APIToken::personal(&SecretString::from("no-such-token")).expect("a word");
        assert_eq!(client.user(&invented, &new).await, Err(APIError::Unauthenticated));
    })
    .await;
}

/// A token of another audience is valid, but not for ZITADEL's API.
#[tokio::test]
async fn a_token_without_the_zitadel_audience_is_no_credential() {
    on_any_server(async |server| {
        let key = server.user(Kind::Jwt).await;
        let client = server.instance();
        let foreign = exchange(&client, &key, "openid")
            .await
            .expect("a token")
            .answer
            .access_token;
        let token = APIToken::personal(&foreign).expect("a word");
        assert_eq!(client.user(&token, &key.user_id).await, Err(APIError::Unauthenticated));
    })
    .await;
}
