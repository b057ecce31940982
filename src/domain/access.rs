//! Which audiences, users and manager roles a namespace may request. ZITADEL does not check whether a service user may request the audience of a
//! project (<https://github.com/zitadel/zitadel/issues/9515>), so this is the only check
//! (docs/adr/0008-access-policies-are-objects.md).

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::api::access_policy::{AllowedRoles, ZitadelAccessPolicySpec};
use crate::api::service_user::Token;
use crate::domain::manager_role::RoleScope;
use crate::domain::reason::Reason;

/// Entry of `projectIDs` in an access policy that allows every project except that of the ZITADEL API.
const EVERY_PROJECT: &str = "*";

/// What the access policies of one instance allow one namespace. By default that is nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    project_ids: BTreeSet<String>,
    zitadel_api: bool,
    /// Organizations in which the operator may create users, each with the usernames allowed besides the default one.
    users: BTreeSet<(String, Option<String>)>,
    manager_roles: Vec<AllowedRoles>,
}

/// Under which condition a manager role is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RoleAccess {
    /// Not at all.
    Denied,
    /// Unless the role is privileged there.
    Unprivileged,
    /// In any case.
    Always,
}

impl Allowed {
    /// The union of the `policies` that select a namespace with these `labels`.
    #[must_use]
    pub fn of<'a>(
        policies: impl IntoIterator<Item = &'a ZitadelAccessPolicySpec>,
        labels: &BTreeMap<String, String>,
    ) -> Self {
        let mut allowed = Self::default();
        let matching = policies
            .into_iter()
            .filter(|policy| selects(&policy.namespace_selector, labels));
        for policy in matching {
            if let Some(audiences) = &policy.audiences {
                allowed.project_ids.extend(audiences.project_ids.iter().cloned());
                allowed.zitadel_api |= audiences.zitadel_api == Some(true);
            }
            if let Some(users) = &policy.users {
                let organizations = users.organization_ids.iter().cloned();
                allowed
                    .users
                    .extend(organizations.map(|id| (id, users.username_pattern.clone())));
            }
            allowed.manager_roles.extend(policy.manager_roles.iter().cloned());
        }
        allowed
    }

    /// Whether the operator may create a user with this name in an organization, or take it over. The default name needs no pattern.
    #[must_use]
    pub fn allows_user(&self, organization_id: &str, username: &str, default: &str) -> bool {
        let mut here = self.users.iter().filter(|(id, _)| id == organization_id);
        here.any(|(_, pattern)| {
            username == default
                || pattern
                    .as_ref()
                    .is_some_and(|pattern| matches_pattern(pattern, username))
        })
    }

    /// Whether a user may have this manager role. Nothing matches by a wildcard.
    #[must_use]
    pub fn role_access(&self, scope: &RoleScope, role: &str) -> RoleAccess {
        let is_in = |ids: &[String], id: &String| ids.contains(id);
        let covers = |entry: &AllowedRoles| match scope {
            RoleScope::Instance => entry.instance == Some(true),
            RoleScope::Organization(id) => is_in(&entry.organization_ids, id),
            RoleScope::Project(id) => entry.granted_organization_ids.is_empty() && is_in(&entry.project_ids, id),
            RoleScope::ProjectGrant {
                project_id,
                organization_id,
            } => is_in(&entry.granted_organization_ids, organization_id) && is_in(&entry.project_ids, project_id),
        };
        let matching = self
            .manager_roles
            .iter()
            .filter(|entry| covers(entry) && entry.roles.iter().any(|allowed| allowed == role));
        let access = matching.map(|entry| match entry.allow_privileged {
            Some(true) => RoleAccess::Always,
            _ => RoleAccess::Unprivileged,
        });
        access.max().unwrap_or(RoleAccess::Denied)
    }

    /// The audiences of `token` that are not allowed, as the token's spec names them. `zitadel_project_id` is the ID of
    /// the ZITADEL API's project, if it is known: this ID requires `zitadelAPI: true`, and `"*"` does not include it.
    #[must_use]
    pub fn denied<'a>(&self, token: &'a Token, zitadel_project_id: Option<&str>) -> Vec<&'a str> {
        let is_denied = |id: &&str| {
            if Some(*id) == zitadel_project_id {
                return !self.zitadel_api;
            }
            !self.project_ids.contains(EVERY_PROJECT) && !self.project_ids.contains(*id)
        };
        let mut denied: Vec<&str> = token.project_ids.iter().map(String::as_str).filter(is_denied).collect();
        if token.zitadel_api == Some(true) && !self.zitadel_api {
            denied.push("zitadelAPI");
        }
        denied
    }

    /// Refuses `token` unless all its audiences are allowed.
    pub fn check(&self, token: &Token, zitadel_project_id: Option<&str>) -> Result<(), Reason> {
        if self.denied(token, zitadel_project_id).is_empty() {
            Ok(())
        } else {
            Err(Reason::AccessDenied)
        }
    }
}

/// The exact audience that an issued token must have. An additional audience would be access that no policy allows
/// (docs/adr/0007-audience-must-be-equal.md).
#[must_use]
pub fn audience(token: &Token, zitadel_project_id: &str) -> BTreeSet<String> {
    let mut audience: BTreeSet<String> = token.project_ids.iter().cloned().collect();
    if token.zitadel_api == Some(true) {
        audience.insert(zitadel_project_id.to_owned());
    }
    audience
}

/// Whether `labels` match `selector`, by the rules of `metav1.LabelSelector`. A requirement that Kubernetes would
/// reject matches nothing, so that a mistake denies access.
#[must_use]
pub fn selects(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    let equal = selector
        .match_labels
        .as_ref()
        .is_none_or(|wanted| wanted.iter().all(|(key, value)| labels.get(key) == Some(value)));
    let expressions = selector.match_expressions.as_ref().is_none_or(|all| {
        all.iter().all(|requirement| {
            let value = labels.get(&requirement.key);
            let values = requirement.values.as_deref().unwrap_or_default();
            match (requirement.operator.as_str(), values) {
                ("In", [_, ..]) => value.is_some_and(|value| values.contains(value)),
                ("NotIn", [_, ..]) => value.is_none_or(|value| !values.contains(value)),
                ("Exists", []) => value.is_some(),
                ("DoesNotExist", []) => value.is_none(),
                _ => false,
            }
        })
    });
    equal && expressions
}

/// Whether a text matches a pattern in which `*` stands for any characters.
fn matches_pattern(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else {
        return false;
    };
    let mut last = None;
    for part in parts {
        if let Some(part) = last.replace(part) {
            match rest.find(part) {
                Some(at) => rest = &rest[at + part.len()..],
                None => return false,
            }
        }
    }
    last.map_or(rest.is_empty(), |last| rest.ends_with(last))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn policy(selector: &Value, ids: &[&str], zitadel_api: bool) -> ZitadelAccessPolicySpec {
        serde_json::from_value(json!({
            "instanceRef": {"name": "main"}, "namespaceSelector": selector,
            "audiences": {"projectIDs": ids, "zitadelAPI": zitadel_api}
        }))
        .expect("a policy")
    }

    fn token(ids: &[&str], zitadel_api: bool) -> Token {
        serde_json::from_value(json!({
            "name": "t", "projectIDs": ids, "zitadelAPI": zitadel_api, "secret": {"name": "s"}
        }))
        .expect("a token")
    }

    fn labels() -> BTreeMap<String, String> {
        BTreeMap::from([("kubernetes.io/metadata.name".to_owned(), "shop".to_owned())])
    }

    #[test]
    fn access_is_closed_by_default_and_policies_form_a_union() {
        let shop = json!({"matchLabels": {"kubernetes.io/metadata.name": "shop"}});
        let named = |ids: &[&str], api: bool| policy(&shop, ids, api);
        let elsewhere = policy(
            &json!({"matchLabels": {"kubernetes.io/metadata.name": "other"}}),
            &["*"],
            true,
        );
        let empty: ZitadelAccessPolicySpec =
            serde_json::from_value(json!({"instanceRef": {"name": "main"}, "namespaceSelector": {}}))
                .expect("a policy");
        let cases = [
            ("no policy", vec![], token(&["1"], false), vec!["1"]),
            ("no audiences", vec![empty], token(&["1"], false), vec!["1"]),
            (
                "other namespace",
                vec![elsewhere],
                token(&["1"], true),
                vec!["1", "zitadelAPI"],
            ),
            ("same project", vec![named(&["1"], false)], token(&["1"], false), vec![]),
            (
                "one of two",
                vec![named(&["1"], false)],
                token(&["1", "2"], false),
                vec!["2"],
            ),
            (
                "union of two policies",
                vec![named(&["1"], false), named(&["2"], false)],
                token(&["1", "2"], false),
                vec![],
            ),
            (
                "any project",
                vec![named(&["*"], false)],
                token(&["1", "2"], false),
                vec![],
            ),
            (
                "API by alias, denied",
                vec![named(&["*"], false)],
                token(&["1"], true),
                vec!["zitadelAPI"],
            ),
            (
                "API by id, denied",
                vec![named(&["*"], false)],
                token(&["99"], false),
                vec!["99"],
            ),
            (
                "API by id, listed as a project",
                vec![named(&["99"], false)],
                token(&["99"], false),
                vec!["99"],
            ),
            ("API by alias", vec![named(&[], true)], token(&[], true), vec![]),
            ("API by id", vec![named(&[], true)], token(&["99"], false), vec![]),
        ];
        for (name, policies, token, denied) in cases {
            let allowed = Allowed::of(&policies, &labels());
            assert_eq!(allowed.denied(&token, Some("99")), denied, "{name}");
            assert_eq!(allowed.check(&token, Some("99")).is_ok(), denied.is_empty(), "{name}");
        }
    }

    #[test]
    fn users_are_allowed_by_organization_and_name() {
        let policy = |users: Value| -> ZitadelAccessPolicySpec {
            serde_json::from_value(json!({"instanceRef": {"name": "main"}, "namespaceSelector": {}, "users": users}))
                .expect("a policy")
        };
        let policies = [
            policy(json!({"organizationIDs": ["1"]})),
            policy(json!({"organizationIDs": ["2"], "usernamePattern": "ci-*-bot"})),
        ];
        let allowed = Allowed::of(&policies, &labels());
        for (organization, username, expected) in [
            ("1", "c-shop-billing", true),
            ("1", "ci-x-bot", false),
            ("2", "c-shop-billing", true),
            ("2", "ci-x-bot", true),
            ("2", "ci-bot", false),
            ("2", "xci-x-bot", false),
            ("2", "ci-x-bots", false),
            ("3", "c-shop-billing", false),
        ] {
            let got = allowed.allows_user(organization, username, "c-shop-billing");
            assert_eq!(got, expected, "{organization} {username}");
        }
        assert!(!Allowed::default().allows_user("1", "a", "a"));
        for (pattern, text, expected) in [
            ("*", "", true),
            ("a*", "a", true),
            ("a*b*c", "abc", true),
            ("a*b*c", "acb", false),
            ("a", "a", true),
            ("a", "ab", false),
        ] {
            assert_eq!(matches_pattern(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn selector_that_kubernetes_rejects_selects_nothing() {
        let requirement = |operator: &str, values: Value| {
            let selector = json!({"matchExpressions": [{"key": "team", "operator": operator, "values": values}]});
            serde_json::from_value::<LabelSelector>(selector).expect("a selector")
        };
        let name = "kubernetes.io/metadata.name";
        for (selector, selected) in [
            (requirement("NotIn", json!(["a"])), true),
            (requirement("DoesNotExist", json!(null)), true),
            (requirement("DoesNotExist", json!([])), true),
            (requirement("Exists", json!([])), false),
            (requirement("In", json!(["a"])), false),
            (requirement("NotIn", json!([])), false),
            (requirement("NotIn", json!(null)), false),
            (requirement("DoesNotExist", json!(["a"])), false),
            (requirement("Like", json!(["a"])), false),
            (requirement("", json!(["a"])), false),
        ] {
            assert_eq!(selects(&selector, &labels()), selected, "{selector:?}");
        }
        for (selector, selected) in [
            (json!({}), true),
            (json!({"matchLabels": {name: "shop"}}), true),
            (json!({"matchLabels": {name: "shop", "team": "a"}}), false),
            (
                json!({"matchExpressions": [{"key": name, "operator": "In", "values": ["a", "shop"]}]}),
                true,
            ),
            (
                json!({"matchExpressions": [{"key": name, "operator": "NotIn", "values": ["shop"]}]}),
                false,
            ),
            (json!({"matchExpressions": [{"key": name, "operator": "Exists"}]}), true),
        ] {
            let parsed = serde_json::from_value::<LabelSelector>(selector.clone()).expect("a selector");
            assert_eq!(selects(&parsed, &labels()), selected, "{selector}");
        }
    }

    #[test]
    fn roles_are_allowed_one_by_one_in_their_scope() {
        let policy = |roles: Value| -> ZitadelAccessPolicySpec {
            serde_json::from_value(json!({
                "instanceRef": {"name": "main"}, "namespaceSelector": {}, "managerRoles": roles,
            }))
            .expect("a policy")
        };
        let policies = [
            policy(json!([
                {"roles": ["IAM_OWNER_VIEWER"], "instance": true},
                {"roles": ["ORG_OWNER", "ORG_USER_MANAGER"], "organizationIDs": ["1", "2"]},
                {"roles": ["PROJECT_OWNER"], "projectIDs": ["5"]},
                {"roles": ["PROJECT_GRANT_OWNER"], "projectIDs": ["5"], "grantedOrganizationIDs": ["1"]},
                // The API server refuses these.
                {"roles": ["*"], "organizationIDs": ["*"]}, {"roles": ["IAM_OWNER"], "instance": false},
            ])),
            policy(json!([{"roles": ["ORG_OWNER"], "organizationIDs": ["2"], "allowPrivileged": true}])),
        ];
        let allowed = Allowed::of(&policies, &BTreeMap::new());
        let organization = |id: &str| RoleScope::Organization(id.to_owned());
        let project = |id: &str| RoleScope::Project(id.to_owned());
        let grant = |project: &str, organization: &str| RoleScope::ProjectGrant {
            project_id: project.to_owned(),
            organization_id: organization.to_owned(),
        };
        for (scope, role, access) in [
            (RoleScope::Instance, "IAM_OWNER_VIEWER", RoleAccess::Unprivileged),
            (RoleScope::Instance, "IAM_OWNER", RoleAccess::Denied),
            (organization("1"), "ORG_OWNER", RoleAccess::Unprivileged),
            (organization("2"), "ORG_OWNER", RoleAccess::Always),
            (organization("2"), "ORG_USER_MANAGER", RoleAccess::Unprivileged),
            (organization("3"), "ORG_OWNER", RoleAccess::Denied),
            (organization("1"), "ORG_OWNER_VIEWER", RoleAccess::Denied),
            (organization("*"), "ORG_OWNER", RoleAccess::Denied),
            (project("5"), "PROJECT_OWNER", RoleAccess::Unprivileged),
            (project("5"), "PROJECT_GRANT_OWNER", RoleAccess::Denied),
            (project("1"), "PROJECT_OWNER", RoleAccess::Denied),
            (grant("5", "1"), "PROJECT_GRANT_OWNER", RoleAccess::Unprivileged),
            (grant("5", "2"), "PROJECT_GRANT_OWNER", RoleAccess::Denied),
            (grant("6", "1"), "PROJECT_GRANT_OWNER", RoleAccess::Denied),
            (grant("5", "1"), "PROJECT_OWNER", RoleAccess::Denied),
        ] {
            assert_eq!(allowed.role_access(&scope, role), access, "{scope:?} {role}");
        }
    }
}
