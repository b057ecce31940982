//! The policy point: which audiences a namespace may have. ZITADEL itself lets every service user have every
//! project's audience (zitadel#9515), so that this check is the only one (design §2.1).

use std::collections::{BTreeMap, BTreeSet};

use crate::api::instance::{AccessRule, selects};
use crate::api::service_user::Token;
use crate::domain::reason::Reason;

/// Whether some rule allows each audience of `token` to a namespace with `labels`. `zitadel_project_id` is the real
/// id of the ZITADEL API's project if it is known: asked for by number it needs `zitadelApi: true` like its alias,
/// and `"*"` does not cover it (design §3.11).
pub fn check(
    rules: &[AccessRule],
    labels: &BTreeMap<String, String>,
    token: &Token,
    zitadel_project_id: Option<&str>,
) -> Result<(), Reason> {
    let matching: Vec<&AccessRule> = rules
        .iter()
        .filter(|rule| selects(&rule.namespace_selector, labels))
        .collect();
    let zitadel_api = matching.iter().any(|rule| rule.zitadel_api == Some(true));
    let allowed = |id: &String| {
        if Some(id.as_str()) == zitadel_project_id {
            return zitadel_api;
        }
        matching
            .iter()
            .any(|rule| rule.project_ids.iter().any(|p| p == "*" || p == id))
    };
    let asks_for_api = token.zitadel_api == Some(true);
    if (asks_for_api && !zitadel_api) || !token.project_ids.iter().all(allowed) {
        return Err(Reason::AccessDenied);
    }
    Ok(())
}

/// The audience that a minted token must have, to the letter: an audience more is power that nobody allowed
/// (decision K28).
#[must_use]
pub fn audience(token: &Token, zitadel_project_id: &str) -> BTreeSet<String> {
    let mut audience: BTreeSet<String> = token.project_ids.iter().cloned().collect();
    if token.zitadel_api == Some(true) {
        audience.insert(zitadel_project_id.to_owned());
    }
    audience
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(json: serde_json::Value) -> AccessRule {
        serde_json::from_value(json).expect("a rule")
    }

    fn token(ids: &[&str], zitadel_api: bool) -> Token {
        serde_json::from_value(serde_json::json!({
            "name": "t", "projectIds": ids, "zitadelApi": zitadel_api, "secret": {"name": "s"}
        }))
        .expect("a token")
    }

    #[test]
    fn closed_by_default_and_a_union_of_rules() {
        let shop = BTreeMap::from([("kubernetes.io/metadata.name".to_owned(), "shop".to_owned())]);
        let named = |ids: &[&str], api: bool| {
            rule(serde_json::json!({
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "shop"}},
                "projectIds": ids, "zitadelApi": api
            }))
        };
        let elsewhere = rule(serde_json::json!({
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "other"}}, "projectIds": ["*"], "zitadelApi": true
        }));
        let odd = rule(serde_json::json!({
            "namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "Like", "values": ["b"]}]}, "projectIds": ["*"]
        }));
        let zitadel = Some("99");
        let cases: Vec<(&str, Vec<AccessRule>, Token, bool)> = vec![
            ("no rule", vec![], token(&["1"], false), false),
            ("another namespace's rule", vec![elsewhere], token(&["1"], false), false),
            (
                "an operator that does not exist",
                vec![odd],
                token(&["1"], false),
                false,
            ),
            (
                "its own project",
                vec![named(&["1"], false)],
                token(&["1"], false),
                true,
            ),
            (
                "one of two",
                vec![named(&["1"], false)],
                token(&["1", "2"], false),
                false,
            ),
            (
                "a union",
                vec![named(&["1"], false), named(&["2"], false)],
                token(&["1", "2"], false),
                true,
            ),
            (
                "any project",
                vec![named(&["*"], false)],
                token(&["1", "2"], false),
                true,
            ),
            (
                "the API by alias, not allowed",
                vec![named(&["*"], false)],
                token(&["1"], true),
                false,
            ),
            (
                "the API by number, not allowed",
                vec![named(&["*"], false)],
                token(&["99"], false),
                false,
            ),
            (
                "the API by number, listed as a project",
                vec![named(&["99"], false)],
                token(&["99"], false),
                false,
            ),
            ("the API by alias", vec![named(&[], true)], token(&[], true), true),
            ("the API by number", vec![named(&[], true)], token(&["99"], false), true),
        ];
        for (name, rules, token, allowed) in cases {
            assert_eq!(check(&rules, &shop, &token, zitadel).is_ok(), allowed, "{name}");
        }
    }
}
