//! Errors of ZITADEL's API (`docs/reference/zitadel-protocol.md#api-errors`).

use k8s_openapi::jiff::Timestamp;
use secrecy::ExposeSecret;
use serde_json::Value;

use crate::domain::failure::Failure;
use crate::zitadel::http::Answer;

/// Why a request to ZITADEL's API failed. A variant other than [`Failed`](Self::Failed) repeats until an input changes:
/// the spec, the roles of the caller, or the version of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum APIError {
    /// The server has no such API.
    Unavailable,
    /// ZITADEL does not accept the token: it has expired, was removed, or lacks the ZITADEL API's audience.
    Unauthenticated,
    /// The caller may not do this. It says nothing about whether the object exists.
    Forbidden,
    /// ZITADEL refuses a value of the request.
    Rejected,
    /// A user with this id exists.
    UserIDTaken,
    /// A user with this username exists.
    UsernameTaken,
    /// The user does not exist.
    UnknownUser,
    /// The organization does not exist.
    UnknownOrganization,
    /// The project does not exist.
    UnknownProject,
    /// The project is not granted to the organization.
    UnknownProjectGrant,
    /// A role does not exist, or does not belong to this kind of resource.
    UnknownRole,
    /// The user has manager roles in the scope.
    IsManager,
    /// The user has no manager roles in the scope.
    IsNoManager,
    /// The list has too many entries.
    TooMany,
    /// Any other failure.
    Failed(Failure),
}

impl From<Failure> for APIError {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl APIError {
    /// The `Retry-After` deadline of the server.
    #[must_use]
    pub fn retry_after(self) -> Option<Timestamp> {
        match self {
            Self::Failed(failure) => failure.retry_after(),
            _ => None,
        }
    }

    /// What an answer other than 200 means.
    ///
    /// A 404 does not prove absence: a caller without a role gets a 404 that names the missing membership. Therefore
    /// only the ids of [`named`] do.
    pub(super) fn of(answer: &Answer) -> Self {
        let id = error_id(answer);
        let named = id.as_deref().and_then(named);
        named.unwrap_or(match (answer.status, id) {
            (401, _) => Self::Unauthenticated,
            (403, _) => Self::Forbidden,
            (400 | 412, _) => Self::Rejected,
            (300..=399 | 404 | 405 | 501, None) => Self::Unavailable,
            (code, _) => Self::Failed(Failure::Status {
                code,
                error: None,
                retry_after: answer.retry_after,
            }),
        })
    }
}

/// The error ids that have one meaning in all methods
/// (`docs/reference/zitadel-protocol.md#service-users`, `docs/reference/zitadel-protocol.md#manager-roles`).
fn named(id: &str) -> Option<APIError> {
    Some(match id {
        "AUTHZ-cdgFk" => APIError::Forbidden,
        "COMMAND-k2una" => APIError::UserIDTaken,
        "V3-DKcYh" => APIError::UsernameTaken,
        // GetUserByID, UpdateUser, DeleteUser, AddKey, SetUserMetadata and members of projects, members of the instance
        // and of organizations.
        "QUERY-Dfbg2" | "COMMAND-ugjs0upun6" | "COMMAND-bd4ir1mblj" | "COMMAND-bnipwm1" | "COMMAND-uXHNj"
        | "INSTA-GSXOn" | "ORG-GoXOn" => APIError::UnknownUser,
        "COMMAND-QXPGs" => APIError::UnknownOrganization,
        "COMMAND-EbFMN" => APIError::UnknownProject,
        // CreateAdministrator and UpdateAdministrator of the instance, organizations, projects and grants.
        "INSTANCE-4m0fS" | "INSTANCE-3m9fs" | "Org-4N8es" | "INST-m9fG8" | "PROJECT-3m9ds" | "PROJECT-3m9d"
        | "PROJECT-m9gKK" | "PROJECT-m0sDf" => APIError::UnknownRole,
        _ => return None,
    })
}

/// ZITADEL's id of an error, in the form of REST or of Connect. Empty if the error has details without a readable id:
/// ZITADEL has answered then, and not a proxy or a missing route.
pub(super) fn error_id(answer: &Answer) -> Option<String> {
    let body: Value = serde_json::from_slice(answer.body.expose_secret()).ok()?;
    let detail = body.get("details")?.get(0)?;
    let id = detail["id"].as_str().or_else(|| detail["debug"]["id"].as_str());
    Some(id.unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn answer(status: u16, body: &str) -> Answer {
        Answer {
            status,
            retry_after: None,
            body: body.as_bytes().to_vec().into(),
            sent: Timestamp::UNIX_EPOCH,
        }
    }

    fn rest(id: &str) -> String {
        json!({"code": 5, "message": "m", "details": [{"@type": "t", "id": id, "message": "m"}]}).to_string()
    }

    fn connect(id: &str) -> String {
        json!({"code": "not_found", "message": "m", "details": [{"type": "t", "value": "", "debug": {"id": id}}]})
            .to_string()
    }

    #[test]
    fn both_error_bodies_are_read() {
        for (id, error) in [
            ("AUTHZ-cdgFk", APIError::Forbidden),
            ("QUERY-Dfbg2", APIError::UnknownUser),
            ("COMMAND-QXPGs", APIError::UnknownOrganization),
            ("Org-4N8es", APIError::UnknownRole),
        ] {
            for body in [rest(id), connect(id)] {
                assert_eq!(APIError::of(&answer(404, &body)), error, "{body}");
            }
        }
    }

    #[test]
    fn an_absent_method_differs_from_an_absent_object() {
        let status = |code| {
            APIError::Failed(Failure::Status {
                code,
                error: None,
                retry_after: None,
            })
        };
        for (code, body, error) in [
            // ZITADEL 3 over REST, an unknown method of Connect, a proxy.
            (
                404,
                r#"{"code":5,"message":"Not Found","details":[]}"#,
                APIError::Unavailable,
            ),
            (
                405,
                r#"{"code":12,"message":"Method Not Allowed"}"#,
                APIError::Unavailable,
            ),
            (404, "404 page not found", APIError::Unavailable),
            (501, r#"{"code":"unimplemented","message":"m"}"#, APIError::Unavailable),
            (302, "", APIError::Unavailable),
            // An id that the operator does not know proves nothing.
            (404, &rest("QUERY-other"), status(404)),
            (404, &connect("QUERY-other"), status(404)),
            (
                404,
                r#"{"code":"not_found","details":[{"type":"t","value":"x"}]}"#,
                status(404),
            ),
            (409, &rest("V3-other"), status(409)),
            (401, &rest("AUTH-7fs1e"), APIError::Unauthenticated),
            (403, &rest("AUTH-AWfge"), APIError::Forbidden),
            (400, r#"{"code":3,"message":"invalid"}"#, APIError::Rejected),
            (429, "", status(429)),
            (503, "<html>", status(503)),
        ] {
            assert_eq!(APIError::of(&answer(code, body)), error, "{code} {body}");
        }
    }
}
