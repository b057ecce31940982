//! The admin credential of an instance: a key file or a personal access token in a Secret of the operator's namespace, and
//! what its user may do.

use std::collections::{BTreeMap, BTreeSet};

use secrecy::{ExposeSecret, SecretSlice, SecretString};

use crate::api::instance::ZitadelInstanceSpec;
use crate::api::metadata::{ANNOTATION_INSTANCE, ANNOTATION_SEND_TO};
use crate::domain::key::{self, ServiceKey};
use crate::domain::manager_role::{ManagerRoles, RoleScope};
use crate::domain::reason::Reason;

/// Roles that may create and delete users, and manage their keys, in the whole instance. Measured for creating users and
/// adding keys (`docs/reference/zitadel-protocol.md#permissions-of-callers`).
const OF_INSTANCE: [&str; 3] = ["IAM_OWNER", "IAM_ORG_MANAGER", "IAM_USER_MANAGER"];

/// The same in one organization.
const OF_ORGANIZATION: [&str; 2] = ["ORG_OWNER", "ORG_USER_MANAGER"];

/// A credential for ZITADEL's API.
#[derive(Debug)]
pub enum AdminCredential {
    /// A key, with which the operator requests tokens.
    Key(Box<ServiceKey>),
    /// A personal access token.
    Token(SecretString),
}

/// Where the requests of an instance are sent to: the issuer, or `<endpoint> for <issuer>`, then ` as <tlsServerName>` and
/// ` via <proxy>` if the instance sets these. The Secret of the credential must name it: a person who edits the instance could
/// otherwise have the credential sent to a host of their own.
#[must_use]
pub fn destination(spec: &ZitadelInstanceSpec) -> String {
    let connection = spec.connection.clone().unwrap_or_default();
    let mut destination = match connection.endpoint {
        Some(endpoint) => format!("{endpoint} for {}", spec.issuer),
        None => spec.issuer.clone(),
    };
    for (word, value) in [("as", connection.tls_server_name), ("via", connection.proxy)] {
        if let Some(value) = value {
            destination = format!("{destination} {word} {value}");
        }
    }
    destination
}

/// Reads a credential from the annotations of its Secret and its entry.
pub fn read(
    annotations: &BTreeMap<String, String>,
    entry: Option<&SecretSlice<u8>>,
    instance: &str,
    spec: &ZitadelInstanceSpec,
) -> Result<AdminCredential, Reason> {
    let bound = |annotation: &str, value: &str| annotations.get(annotation).is_some_and(|bound| bound == value);
    if !bound(ANNOTATION_INSTANCE, instance) || !bound(ANNOTATION_SEND_TO, &destination(spec)) {
        return Err(Reason::CredentialNotBound);
    }
    let entry = entry.ok_or(Reason::CredentialMissing)?.expose_secret();
    if entry.trim_ascii_start().starts_with(b"{") {
        let key = key::parse(entry).map_err(|_| Reason::CredentialInvalid)?;
        return Ok(AdminCredential::Key(Box::new(key)));
    }
    let text = std::str::from_utf8(entry).map_err(|_| Reason::CredentialInvalid)?;
    Ok(AdminCredential::Token(text.trim().into()))
}

/// Whether a user with these roles may create and delete users in the organization. A 404 of ZITADEL means that a user does
/// not exist only if the caller may see it.
#[must_use]
pub fn may_manage_users(roles: &[ManagerRoles], organization_id: &str) -> bool {
    roles.iter().any(|held| {
        let sufficient: &[&str] = match &held.scope {
            RoleScope::Instance => &OF_INSTANCE,
            RoleScope::Organization(id) if id == organization_id => &OF_ORGANIZATION,
            _ => return false,
        };
        sufficient.iter().any(|role| held.roles.contains(*role))
    })
}

/// Whether a user with these roles of the instance may list all managers. Without that permission, ZITADEL returns a
/// shorter list instead of an error.
#[must_use]
pub fn sees_all_managers(of_instance: &BTreeSet<String>) -> bool {
    of_instance.contains("IAM_OWNER") || of_instance.contains("IAM_OWNER_VIEWER")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::fixtures::key_file;

    fn spec(connection: &serde_json::Value) -> ZitadelInstanceSpec {
        serde_json::from_value(json!({"issuer": "https://auth.example.com", "connection": connection})).expect("a spec")
    }

    #[test]
    fn credential_is_bound_to_its_instance_and_destination() {
        let token = SecretSlice::from(b"the-token\n".to_vec());
        let read = |instance: &str, send_to: &str, spec: &ZitadelInstanceSpec| {
            let annotations = [(ANNOTATION_INSTANCE, instance), (ANNOTATION_SEND_TO, send_to)];
            let annotations = annotations.map(|(key, value)| (key.to_owned(), value.to_owned()));
            super::read(&BTreeMap::from(annotations), Some(&token), "main", spec).map(drop)
        };
        let direct = spec(&json!({}));
        assert_eq!(read("main", "https://auth.example.com", &direct), Ok(()));
        for (instance, send_to) in [
            ("other", "https://auth.example.com"),
            ("main", ""),
            ("main", "https://evil.example.com"),
        ] {
            assert_eq!(
                read(instance, send_to, &direct),
                Err(Reason::CredentialNotBound),
                "{instance} {send_to}"
            );
        }
        // Someone edits the instance.
        let moved = spec(&json!({"endpoint": "https://evil.example.com"}));
        assert_eq!(
            read("main", "https://auth.example.com", &moved),
            Err(Reason::CredentialNotBound)
        );
        let named = spec(&json!({"tlsServerName": "evil.example.com"}));
        assert_eq!(
            read("main", "https://auth.example.com", &named),
            Err(Reason::CredentialNotBound)
        );
        let inside = spec(&json!({"endpoint": "https://zitadel.svc"}));
        let for_issuer = "https://zitadel.svc for https://auth.example.com";
        assert_eq!(read("main", for_issuer, &inside), Ok(()));
        assert_eq!(
            read("main", "https://zitadel.svc", &inside),
            Err(Reason::CredentialNotBound)
        );
        let proxied = spec(&json!({"proxy": "http://evil.example.com:3128"}));
        assert_eq!(
            read("main", "https://auth.example.com", &proxied),
            Err(Reason::CredentialNotBound)
        );
        assert_eq!(
            read(
                "main",
                "https://auth.example.com via http://evil.example.com:3128",
                &proxied
            ),
            Ok(())
        );
    }

    #[test]
    fn credential_is_a_key_file_or_a_token() {
        let direct = spec(&json!({}));
        let annotations = [
            (ANNOTATION_INSTANCE, "main"),
            (ANNOTATION_SEND_TO, "https://auth.example.com"),
        ];
        let annotations = BTreeMap::from(annotations.map(|(key, value)| (key.to_owned(), value.to_owned())));
        let read = |entry: &[u8]| super::read(&annotations, Some(&entry.to_vec().into()), "main", &direct);
        let file = key_file().to_string();
        assert!(matches!(read(file.as_bytes()), Ok(AdminCredential::Key(_))));
        assert!(
            matches!(read(b" a-token \n"), Ok(AdminCredential::Token(token)) if token.expose_secret() == "a-token")
        );
        for invalid in [&b"{}"[..], b"\xff"] {
            assert_eq!(read(invalid).err(), Some(Reason::CredentialInvalid));
        }
        assert_eq!(
            super::read(&annotations, None, "main", &direct).err(),
            Some(Reason::CredentialMissing)
        );
    }

    #[test]
    fn only_some_roles_manage_users() {
        let held = |scope: RoleScope, role: &str| ManagerRoles {
            scope,
            roles: BTreeSet::from([role.to_owned()]),
        };
        let organization = |id: &str| RoleScope::Organization(id.into());
        for (roles, expected) in [
            (vec![], false),
            (vec![held(RoleScope::Instance, "IAM_OWNER")], true),
            (vec![held(RoleScope::Instance, "IAM_OWNER_VIEWER")], false),
            (vec![held(organization("1"), "ORG_USER_MANAGER")], true),
            (vec![held(organization("2"), "ORG_OWNER")], false),
            (vec![held(organization("1"), "ORG_OWNER_VIEWER")], false),
            (vec![held(RoleScope::Project("1".into()), "PROJECT_OWNER")], false),
        ] {
            assert_eq!(may_manage_users(&roles, "1"), expected, "{roles:?}");
        }
    }
}
