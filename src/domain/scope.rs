//! The scopes that a token of the spec requests from ZITADEL (`docs/reference/zitadel-protocol.md#scopes`).

use std::collections::BTreeSet;

pub use crate::api::rules::ZITADEL_ALIAS;
use crate::api::service_user::Token;

/// The scopes of `token`, sorted and without duplicates, so that their order in the spec does not matter.
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

/// The scope of the operator's own request to the ZITADEL API.
#[must_use]
pub fn zitadel_api() -> BTreeSet<String> {
    BTreeSet::from([format!("urn:zitadel:iam:org:project:id:{ZITADEL_ALIAS}:aud")])
}

/// The value of the `scope` field of a token request. ZITADEL splits it only at spaces
/// (`docs/reference/zitadel-protocol.md#scopes`), so a scope that contains a space would count as two. Such a list is
/// refused here, whatever the schema accepted.
#[must_use]
pub fn field(scopes: &BTreeSet<String>) -> Option<String> {
    let clean = scopes
        .iter()
        .all(|s| !s.is_empty() && s.bytes().all(|b| b.is_ascii_graphic()));
    clean.then(|| scopes.iter().cloned().collect::<Vec<_>>().join(" "))
}
