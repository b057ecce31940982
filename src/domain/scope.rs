//! Scopes: what a token of the spec asks ZITADEL for, and the audience that it must then carry (zitadel.md §4).

use std::collections::BTreeSet;

use crate::api::service_user::Token;

/// The alias that ZITADEL replaces by the real id of its own project (zitadel.md §4.1).
pub const ZITADEL_ALIAS: &str = "zitadel";

/// The scopes of `token`, sorted and without doubles, so that their order in the spec decides nothing.
#[must_use]
pub fn scopes(token: &Token) -> BTreeSet<String> {
    let audience = |id: &str| format!("urn:zitadel:iam:org:project:id:{id}:aud");
    let mut scopes: BTreeSet<String> = token.project_ids.iter().map(|id| audience(id)).collect();
    if token.zitadel_api == Some(true) {
        scopes.insert(audience(ZITADEL_ALIAS));
    }
    if token.project_roles == Some(true) {
        scopes.insert("urn:zitadel:iam:org:projects:roles".into());
    }
    if let Some(id) = &token.organization_id {
        scopes.insert(format!("urn:zitadel:iam:org:id:{id}"));
    }
    match &token.scopes {
        Some(further) => scopes.extend(further.iter().cloned()),
        None => {
            scopes.insert("openid".into());
        }
    }
    scopes
}

/// Further scopes as the schema lists them: complete ones, and prefixes with the characters that may follow besides
/// letters and digits.
const FURTHER: [&str; 7] = [
    "openid",
    "profile",
    "email",
    "phone",
    "address",
    "urn:zitadel:iam:user:metadata",
    "urn:zitadel:iam:user:resourceowner",
];
const FURTHER_OF: [(&str, &[u8]); 3] = [
    ("urn:zitadel:iam:org:project:role:", b"_.:-"),
    ("urn:zitadel:iam:org:roles:id:", b"_-"),
    ("urn:zitadel:iam:org:domain:primary:", b".-"),
];

/// Whether the ids and scopes of `token` are such as the schema lets through. The schema in the cluster may be another
/// one, and `access` is enforced here (design §2.1): an audience among the scopes, or the alias among the projects,
/// would pass it by.
#[must_use]
pub fn well_formed(token: &Token) -> bool {
    let made_of = |text: &str, more: &[u8]| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || more.contains(&b))
    };
    let further = |scope: &String| {
        FURTHER.contains(&scope.as_str())
            || FURTHER_OF
                .iter()
                .any(|(prefix, more)| scope.strip_prefix(prefix).is_some_and(|rest| made_of(rest, more)))
    };
    token
        .project_ids
        .iter()
        .all(|id| made_of(id, b"_-") && id != ZITADEL_ALIAS)
        && token.organization_id.as_ref().is_none_or(|id| made_of(id, b"_-"))
        && token.scopes.iter().flatten().all(further)
}

/// The scope of the operator's own look at the ZITADEL API.
#[must_use]
pub fn zitadel_api() -> BTreeSet<String> {
    BTreeSet::from([format!("urn:zitadel:iam:org:project:id:{ZITADEL_ALIAS}:aud")])
}

/// The value of the one `scope` field. ZITADEL splits at spaces only (zitadel.md §10.2), so that a scope that holds a
/// space would be two; such a list is refused here whatever the schema let through.
#[must_use]
pub fn field(scopes: &BTreeSet<String>) -> Option<String> {
    let clean = scopes
        .iter()
        .all(|s| !s.is_empty() && s.bytes().all(|b| b.is_ascii_graphic()));
    clean.then(|| scopes.iter().cloned().collect::<Vec<_>>().join(" "))
}
