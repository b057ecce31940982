//! Rules that guard a key, an access, or the operator's memory. The schema has them too; the operator checks them in case
//! the installed CRDs were edited, and because the API server does not check stored objects again. Patterns and messages are the schema's ([`rules`]). All other rules are the schema's
//! alone: the operator does not start on CRDs that are older than it (`controller/crd_version.rs`).

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use regex::Regex;

use crate::api::metadata::is_operators_own;
use crate::api::rules;
use crate::api::service_user::{ManagedUser, Token, TokenSecret, ZitadelServiceUserSpec};
use crate::domain::allow_list::AllowList;
use crate::domain::manager_role::RoleScope;

/// A rule that is broken, and where. It quotes nothing that a user wrote but the key of a label or annotation, and that
/// only if it is well-formed, so that its length and characters are bounded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    field: String,
    rule: Cow<'static, str>,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}.", self.field, self.rule)
    }
}

/// A pattern, compiled once. One that does not compile matches nothing.
struct Pattern(LazyLock<Option<Regex>>);

impl Pattern {
    fn matches(&self, text: &str, longest: usize) -> bool {
        text.len() <= longest && self.0.as_ref().is_some_and(|regex| regex.is_match(text))
    }
}

static NAME: Pattern = Pattern(LazyLock::new(|| Regex::new(rules::NAME_PATTERN).ok()));
static ID: Pattern = Pattern(LazyLock::new(|| Regex::new(rules::ID_PATTERN).ok()));
static SCOPE: Pattern = Pattern(LazyLock::new(|| Regex::new(rules::SCOPE_PATTERN).ok()));
static LABEL_VALUE: Pattern = Pattern(LazyLock::new(|| Regex::new(rules::LABEL_VALUE_PATTERN).ok()));
static USERNAME: Pattern = Pattern(LazyLock::new(|| Regex::new(rules::USERNAME_PATTERN).ok()));
static ROLE: Pattern = Pattern(LazyLock::new(|| Regex::new(rules::ROLE_PATTERN).ok()));
static DATA_KEY: Pattern = Pattern(LazyLock::new(|| Regex::new(rules::DATA_KEY_PATTERN).ok()));
static TOKEN_NAME: Pattern = Pattern(LazyLock::new(|| Regex::new(rules::TOKEN_NAME_PATTERN).ok()));
static ORIGIN: Pattern = Pattern(LazyLock::new(|| Regex::new(rules::ORIGIN_PATTERN).ok()));
static METADATA_KEY: Pattern = Pattern(LazyLock::new(|| Regex::new(rules::METADATA_KEY_PATTERN).ok()));

const ID_FORM: &str = "an id must have 1 to 64 characters of A-Z a-z 0-9 - _";
const NAME_FORM: &str = "must be a Kubernetes name: at most 253 characters of a-z 0-9 - and dots between its parts";

/// Checks one token of a spec and what all its tokens share, so that a mistake in one token does not stop the others.
pub fn token(spec: &ZitadelServiceUserSpec, index: usize, allowed: &AllowList) -> Result<(), Violation> {
    let Some(token) = spec.tokens.get(index) else {
        return Ok(());
    };
    let at = |field: &str| format!("spec.tokens[{index}].{field}");
    shared(spec)?;
    let named = TOKEN_NAME.matches(&token.name, rules::MAX_TOKEN_NAME);
    check(
        named,
        || at("name"),
        "must have 1 to 63 characters of a-z 0-9 - and no - at an end",
    )?;
    audiences(token, at)?;
    let name = &token.secret.name;
    check(NAME.matches(name, rules::MAX_NAME), || at("secret.name"), NAME_FORM)?;
    let differs = spec.key_secret_ref.as_ref().is_none_or(|key| key.name != *name);
    check(differs, || at("secret.name"), rules::KEY_OVERWRITTEN)?;
    let mut others = spec.tokens.iter().enumerate().filter(|(i, _)| *i != index);
    let unique = others.all(|(_, other)| other.secret.name != *name);
    check(unique, || at("secret.name"), rules::SECRET_NAMED_TWICE)?;
    metadata(&token.secret, allowed, at)?;
    template(&token.secret, at)
}

fn check(holds: bool, field: impl FnOnce() -> String, rule: impl Into<Cow<'static, str>>) -> Result<(), Violation> {
    if holds {
        return Ok(());
    }
    Err(Violation {
        field: field(),
        rule: rule.into(),
    })
}

/// Whether a text is the name of a Kubernetes object, and so can be part of a URL.
#[must_use]
pub fn is_name(text: &str) -> bool {
    NAME.matches(text, rules::MAX_NAME)
}

/// Checks the source of the key. The name of the key Secret becomes part of a URL.
pub fn key_source(spec: &ZitadelServiceUserSpec) -> Result<(), Violation> {
    let name = spec.key_secret_ref.as_ref().map(|key| &key.name);
    let is_name = name.is_none_or(|name| NAME.matches(name, rules::MAX_NAME));
    check(is_name, || "spec.keySecretRef.name".to_owned(), NAME_FORM)?;
    let one = spec.key_secret_ref.is_some() != spec.user.is_some();
    check(one, || "spec".to_owned(), rules::KEY_OR_USER)?;
    spec.user.as_ref().map_or(Ok(()), managed_user)
}

/// Checks what becomes part of a request to ZITADEL.
fn managed_user(user: &ManagedUser) -> Result<(), Violation> {
    let organization = ID.matches(&user.organization_id, rules::MAX_ID);
    check(organization, || "spec.user.organizationID".to_owned(), ID_FORM)?;
    let username = user
        .username
        .as_ref()
        .is_none_or(|name| USERNAME.matches(name, rules::MAX_USERNAME));
    let form = "must have 1 to 200 characters of A-Z a-z 0-9 . _ @ + -";
    let field = || "spec.user.username".to_owned();
    check(username, field, form)?;
    let existing = user.existing_user_id.as_ref();
    let is_id = existing.is_none_or(|id| ID.matches(id, rules::MAX_ID));
    check(is_id, || "spec.user.existingUserID".to_owned(), ID_FORM)?;
    let one = existing.is_none() || user.username.is_none();
    check(one, field, rules::NAME_OF_EXISTING)
}

/// Checks the manager roles. Their ids and names become part of requests to ZITADEL.
pub fn manager_roles(spec: &ZitadelServiceUserSpec) -> Result<(), Violation> {
    let entries = &spec.manager_roles;
    let all = || "spec.managerRoles".to_owned();
    check(
        entries.len() <= rules::MAX_MANAGER_ROLES,
        all,
        "must have at most 16 entries",
    )?;
    let mut scopes = BTreeSet::new();
    for (index, entry) in entries.iter().enumerate() {
        let at = |field: &str| format!("spec.managerRoles[{index}]{field}");
        let ids = [
            (".organizationID", &entry.organization_id),
            (".projectID", &entry.project_id),
            (".grantedOrganizationID", &entry.granted_organization_id),
        ];
        for (field, id) in ids {
            let is_id = id.as_ref().is_none_or(|id| ID.matches(id, rules::MAX_ID));
            check(is_id, || at(field), ID_FORM)?;
        }
        let orphan = entry.granted_organization_id.is_some() && entry.project_id.is_none();
        check(!orphan, || at(".grantedOrganizationID"), rules::GRANT_WITHOUT_PROJECT)?;
        let Some(scope) = RoleScope::of(entry) else {
            return check(false, || at(""), rules::ROLE_SCOPE);
        };
        let size = (1..=rules::MAX_ROLES).contains(&entry.roles.len());
        check(size, || at(".roles"), "must have 1 to 16 roles")?;
        let fits = |role: &String| ROLE.matches(role, rules::MAX_ID) && scope.fits(role);
        check(entry.roles.iter().all(fits), || at(".roles"), rules::ROLE_LEVEL)?;
        check(scopes.insert(scope), || at(""), rules::ROLE_SCOPE_TWICE)?;
    }
    Ok(())
}

/// The texts are held in memory.
fn shared(spec: &ZitadelServiceUserSpec) -> Result<(), Violation> {
    key_source(spec)?;
    let size = |map: fn(&TokenSecret) -> &BTreeMap<String, String>| {
        let entries = spec.tokens.iter().flat_map(|token| map(&token.secret));
        entries.map(|(key, value)| key.len() + value.len()).sum::<usize>()
    };
    let sizes = [
        ("template", size(|secret| &secret.template)),
        ("annotations", size(|secret| &secret.annotations)),
        ("labels", size(|secret| &secret.labels)),
    ];
    sizes.into_iter().try_for_each(|(map, size)| {
        let field = || format!("spec.tokens[].secret.{map}");
        check(size <= rules::MAX_TEXT, field, rules::TOO_MUCH_TEXT)
    })
}

/// Everything that becomes a scope. A value with a space would become two scopes.
fn audiences(token: &Token, at: impl Fn(&str) -> String) -> Result<(), Violation> {
    let is_id = |id: &String| ID.matches(id, rules::MAX_ID);
    let ids = || at("projectIDs");
    check(
        token.project_ids.len() <= rules::MAX_PROJECTS,
        ids,
        "must have at most 32 ids",
    )?;
    check(token.project_ids.iter().all(is_id), ids, ID_FORM)?;
    let has_alias = token.project_ids.iter().any(|id| id == rules::ZITADEL_ALIAS);
    check(!has_alias, ids, rules::ALIAS)?;
    let has_audience = !token.project_ids.is_empty() || token.zitadel_api == Some(true);
    check(has_audience, ids, rules::NO_AUDIENCE)?;
    let organization = token.organization_id.iter().all(is_id);
    check(organization, || at("organizationID"), ID_FORM)?;
    let scopes = token.scopes.as_deref().unwrap_or_default();
    check(
        scopes.len() <= rules::MAX_SCOPES,
        || at("scopes"),
        "must have at most 16 scopes",
    )?;
    let mut scopes = scopes.iter();
    let allowed = scopes.all(|scope| SCOPE.matches(scope, rules::MAX_SCOPE));
    let rule = "not an allowed scope; request audiences with projectIDs and zitadelAPI";
    check(allowed, || at("scopes"), rule)
}

/// A Secret that the API server refuses costs a token that cannot be written. A placeholder becomes a whole token.
fn template(secret: &TokenSecret, at: impl Fn(&str) -> String) -> Result<(), Violation> {
    let is_data_key = |key: &String| {
        let own = rules::OPERATORS_DATA.contains(&key.as_str());
        DATA_KEY.matches(key, rules::MAX_NAME) && key != "." && !key.starts_with("..") && !own
    };
    let field = || at("secret.template");
    check(
        secret.template.len() <= rules::MAX_TEMPLATES,
        field,
        "must have at most 32 keys",
    )?;
    check(secret.template.keys().all(is_data_key), field, rules::DATA_KEY)?;
    let mut texts = secret.template.values();
    let few = texts.all(|text| text.matches("{{").count() <= rules::MAX_PLACEHOLDERS);
    check(few, field, rules::TOO_MANY_PLACEHOLDERS)
}

/// Other controllers act on labels and annotations of Secrets.
fn metadata(secret: &TokenSecret, allowed: &AllowList, at: impl Fn(&str) -> String) -> Result<(), Violation> {
    for (map, field) in [
        (&secret.labels, "secret.labels"),
        (&secret.annotations, "secret.annotations"),
    ] {
        let field = || at(field);
        check(map.keys().all(|key| is_metadata_key(key)), field, rules::METADATA_KEY)?;
        check(
            !map.keys().any(|key| is_operators_own(key)),
            field,
            rules::OPERATORS_OWN,
        )?;
        if let Some(key) = map.keys().find(|key| !allowed.allows(key)) {
            let rule = format!(
                "`{key}` is not among the keys that the platform team allows; remove it, or ask the platform team to add it to allowedSecretMetadata"
            );
            return check(false, field, rule);
        }
    }
    let is_value = |value: &String| LABEL_VALUE.matches(value, 63);
    check(
        secret.labels.values().all(is_value),
        || at("secret.labels"),
        rules::LABEL_VALUE,
    )
}

/// Whether `text` is a scheme, a host and an optional port, and nothing else: a path could make a host look local.
#[must_use]
pub fn is_origin(text: &str) -> bool {
    ORIGIN.matches(text, rules::MAX_NAME)
}

/// Whether `key` has the form of a label or annotation key.
#[must_use]
pub fn is_metadata_key(key: &str) -> bool {
    let prefix = key.split_once('/').map_or("", |(prefix, _)| prefix);
    prefix.len() <= rules::MAX_NAME && METADATA_KEY.matches(key, usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::fixtures::{facts, user};

    #[test]
    fn a_label_or_annotation_must_be_allowed() {
        let allowed = AllowList::with(&["team", "example.com/*"]).expect("well-formed");
        for (key, said) in [
            ("app.kubernetes.io/part-of", ""),
            ("reloader.stakater.com/match", ""),
            ("team", ""),
            ("example.com/note", ""),
            ("owner", "`owner` is not among"),
            (
                "kubernetes.io/service-account.name",
                "`kubernetes.io/service-account.name` is not among",
            ),
            (
                "app.kubernetes.io/instance",
                "`app.kubernetes.io/instance` is not among",
            ),
            ("istio/multiCluster", "`istio/multiCluster` is not among"),
            ("a.example.com/note", "`a.example.com/note` is not among"),
            ("zitadel-tokens.dev/record", "reserved for the operator"),
            ("x.zitadel-tokens.dev/record", "reserved for the operator"),
            ("app.kubernetes.io/managed-by", "reserved for the operator"),
            ("Example.com/note", "a key must be a name of at most 63 characters"),
            ("example.com/`\n", "a key must be a name of at most 63 characters"),
        ] {
            let mut facts = facts(&["a", "b"]);
            let user = user(&mut facts);
            for (map, field) in [("labels", ".labels: "), ("annotations", ".annotations: ")] {
                let secret = &mut user.spec.tokens[1].secret;
                (secret.labels, secret.annotations) = (BTreeMap::new(), BTreeMap::new());
                let entries = if map == "labels" {
                    &mut secret.labels
                } else {
                    &mut secret.annotations
                };
                entries.insert(key.into(), "v".into());
                let told = token(&user.spec, 1, &allowed).err().map(|v| v.to_string());
                let told = told.unwrap_or_default();
                assert_eq!(told.is_empty(), said.is_empty(), "{key}: {told}");
                assert!(told.contains(said), "{key}: {told}");
                assert!(
                    told.is_empty() || told.starts_with(&format!("spec.tokens[1].secret{field}")),
                    "{told}"
                );
                assert!(!told.contains('\n'), "{told}");
            }
        }
    }
}
