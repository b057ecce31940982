//! The API for users and manager roles on a server that lacks a part of it, or that answers out of order
//! (docs/reference/zitadel-protocol.md#versions-of-services, docs/reference/zitadel-protocol.md#api-errors).

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use zitadel_tokens::domain::answer::Format;
use zitadel_tokens::domain::failure::Failure;
use zitadel_tokens::domain::key;
use zitadel_tokens::domain::manager_role::RoleScope;
use zitadel_tokens::domain::user::Machine;
use zitadel_tokens::zitadel::{APIError, NewUser};

use crate::client::{Caller, connect, settings};
use crate::support::issuer::Issuer;

const ADMINISTRATORS: &str = "/zitadel.internal_permission.v2.InternalPermissionService";

/// The id of a user that a case creates.
const NEW: &str = "zitadel-tokens-contract";

/// A stand-in and its administrator.
struct Place {
    issuer: Issuer,
    admin: Caller,
    organization: String,
    own_id: String,
}

impl Place {
    async fn new() -> Self {
        let issuer = Issuer::start(&[]);
        let user = issuer.user(json!({"administrator": true})).await;
        let client = connect(settings(&issuer.url));
        let key = key::parse(user.key.as_bytes()).expect("a key file");
        let token = client.api_token(&key).await.expect("a token");
        let own = client.user(&token, &user.id).await.expect("visible").expect("a user");
        Self {
            issuer,
            admin: Caller { client, token },
            organization: own.organization_id,
            own_id: user.id,
        }
    }

    async fn create(&self) -> Result<(), APIError> {
        let machine = Machine {
            name: "Contract".into(),
            description: String::new(),
            token_format: Format::Jwt,
        };
        let new = NewUser {
            id: NEW,
            organization_id: &self.organization,
            username: NEW,
            machine: &machine,
        };
        self.admin.client.create_machine_user(&self.admin.token, new).await
    }

    async fn update_roles(&self, role: &str) -> Result<(), APIError> {
        let Caller { client, token } = &self.admin;
        let roles = [role.to_owned()].into();
        client
            .update_roles(token, &self.own_id, &RoleScope::Instance, &roles)
            .await
    }

    /// The error of a look-up of a user whose answer is this one.
    async fn judge(&self, status: u16, body: &str) -> Result<bool, APIError> {
        let path = format!("/v2/users/{}", self.own_id);
        let fault = json!({"path": path, "times": 1, "status": status, "body": body});
        self.issuer.fault(fault).await;
        let Caller { client, token } = &self.admin;
        client.user(token, &self.own_id).await.map(|user| user.is_some())
    }
}

/// ZITADEL 4.0 to 4.4.
#[tokio::test]
async fn a_server_can_have_users_without_manager_roles() {
    let place = Place::new().await;
    place.issuer.settings(json!({"internalPermissionV2": false})).await;
    let Caller { client, token } = &place.admin;
    assert_eq!(place.create().await, Ok(()));
    let absent = Err(APIError::Unavailable);
    assert_eq!(place.update_roles("IAM_OWNER").await, absent);
    let scope = RoleScope::Instance;
    assert_eq!(client.remove_roles(token, NEW, &scope).await, absent);
    assert_eq!(client.list_own_roles(token, NEW).await.map(drop), absent);

    // An upgrade needs no restart of the operator.
    place.issuer.settings(json!({"internalPermissionV2": true})).await;
    assert_eq!(place.update_roles("IAM_OWNER").await, Ok(()));
}

/// The chosen id tells the operator that its first request was served.
#[tokio::test]
async fn a_creation_whose_answer_was_lost_is_recognized() {
    let place = Place::new().await;
    place
        .issuer
        .fault(json!({"path": "/v2/users/new", "times": 1, "afterHandling": true, "reset": true}))
        .await;
    assert_eq!(place.create().await, Err(APIError::Failed(Failure::Broken)));
    assert_eq!(place.create().await, Err(APIError::UserIDTaken));
    place.issuer.settled().await;
    let Caller { client, token } = &place.admin;
    let user = client.user(token, NEW).await.expect("visible").expect("a user");
    assert_eq!(
        (user.username.as_str(), user.organization_id),
        (NEW, place.organization)
    );
}

#[tokio::test]
async fn roles_that_a_lost_request_created_are_recognized() {
    let place = Place::new().await;
    assert_eq!(place.create().await, Ok(()));
    let Caller { client, token } = &place.admin;
    let scope = RoleScope::Organization(place.organization.clone());
    let roles = ["ORG_OWNER".to_owned()].into();
    let path = format!("{ADMINISTRATORS}/CreateAdministrator");
    place
        .issuer
        .fault(json!({"path": path, "times": 1, "afterHandling": true, "reset": true}))
        .await;
    let lost = client.create_roles(token, NEW, &scope, &roles).await;
    assert_eq!(lost, Err(APIError::Failed(Failure::Broken)));
    let again = client.create_roles(token, NEW, &scope, &roles).await;
    assert_eq!(again, Err(APIError::IsManager));
    place.issuer.settled().await;
    assert_eq!(client.list_roles(token, NEW, &scope).await, Ok(roles));
}

/// Only the error id of ZITADEL counts as absence: a proxy answers 404 too.
#[tokio::test]
async fn a_404_is_not_absence() {
    let place = Place::new().await;
    let with = |id: &str| json!({"code": 5, "message": "m", "details": [{"id": id}]}).to_string();
    let failed = |code| {
        Err(APIError::Failed(Failure::Status {
            code,
            error: None,
            retry_after: None,
        }))
    };
    for (status, body, wanted) in [
        (404, with("QUERY-Dfbg2"), Ok(false)),
        (404, with("AUTHZ-cdgFk"), Err(APIError::Forbidden)),
        (404, with("QUERY-unknown"), failed(404)),
        (404, "<html>not found</html>".to_owned(), Err(APIError::Unavailable)),
        (404, String::new(), Err(APIError::Unavailable)),
        (503, String::new(), failed(503)),
    ] {
        assert_eq!(place.judge(status, &body).await, wanted, "{status} {body}");
    }
}

#[tokio::test]
async fn an_answer_about_another_user_is_refused() {
    let place = Place::new().await;
    let malformed = Err(APIError::Failed(Failure::Malformed));
    let about =
        |id: &str| json!({"user": {"userId": id, "details": {"resourceOwner": "1"}, "username": "u"}}).to_string();
    assert_eq!(place.judge(200, &about(&place.own_id)).await, Ok(true));
    for body in [
        about("69234237810729000"),
        "{}".to_owned(),
        "[".repeat(100_000),
        String::new(),
    ] {
        assert_eq!(place.judge(200, &body).await, malformed, "{body:.100}");
    }
    let body = json!({"id": "69234237810729000"}).to_string();
    place
        .issuer
        .fault(json!({"path": "/v2/users/new", "times": 1, "status": 200, "body": body}))
        .await;
    assert_eq!(place.create().await, malformed.map(drop));
}

#[tokio::test]
async fn a_rate_limit_keeps_the_time_of_the_next_request() {
    let place = Place::new().await;
    let fault =
        json!({"path": "/v2/users/new", "times": 1, "status": 429, "headers": {"Retry-After": "120"}, "body": ""});
    place.issuer.fault(fault).await;
    let Err(APIError::Failed(failure)) = place.create().await else {
        panic!("not refused");
    };
    let left = failure.retry_after().expect("a time").duration_since(Timestamp::now());
    assert!(left > SignedDuration::from_secs(100), "{left}");
    assert_eq!(place.create().await, Ok(()));
}

/// A list has a bound, whatever the server sends.
#[tokio::test]
async fn an_endless_list_is_not_read() {
    let place = Place::new().await;
    let rows: Vec<Value> = (0..250)
        .map(|_| json!({"user": {"id": place.own_id}, "instance": true, "roles": ["IAM_OWNER"]}))
        .collect();
    let body = json!({"administrators": rows}).to_string();
    let path = format!("{ADMINISTRATORS}/ListAdministrators");
    place
        .issuer
        .fault(json!({"path": path, "status": 200, "body": body}))
        .await;
    let Caller { client, token } = &place.admin;
    let own = client.list_own_roles(token, &place.own_id).await;
    assert_eq!(own, Err(APIError::TooMany));
    let asked = place.issuer.requests().await;
    assert_eq!(asked.iter().filter(|request| request.path == path).count(), 4);
}
