//! `ZitadelServiceUser`: one ZITADEL service user and the tokens to issue for it. Namespaced, owned by the application
//! team.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::api::metadata::{GROUP, LABEL_MANAGED_BY};
use crate::api::rules::{
    self, DURATION_PATTERN, ID_PATTERN, MAX_TEXT, NAME_PATTERN, ROLE_PATTERN, SCOPE_PATTERN, TOKEN_NAME_PATTERN,
    USERNAME_PATTERN,
};

/// Condition: every token Secret holds a valid token for the current spec.
pub const READY: &str = "Ready";

/// Condition: the latest attempt to refresh every token succeeded. Unknown while the object is suspended.
pub const UP_TO_DATE: &str = "UpToDate";

/// Condition: the key is usable.
pub const KEY_VALID: &str = "KeyValid";

/// Condition: the operator rotates the key on schedule. Absent if the object does not rotate its key and the operator
/// holds none for it.
pub const KEY_ROTATED: &str = "KeyRotated";

/// Condition: the service user exists in ZITADEL as `spec.user` describes it. Absent without `spec.user`.
pub const USER_READY: &str = "UserReady";

/// Condition: the user has the roles in `spec.managerRoles` in ZITADEL. Absent if the spec has none and the operator
/// granted none.
pub const MANAGER_ROLES_GRANTED: &str = "ManagerRolesGranted";

/// Condition: between the last two counts, the number of keys and personal access tokens of the user that the operator
/// did not make has grown.
pub const FOREIGN_CREDENTIALS: &str = "ForeignCredentials";

/// A ZITADEL service user, the Secret with its key, and the tokens that the operator keeps fresh for it.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "zitadel-tokens.dev",
    version = "v1alpha1",
    kind = "ZitadelServiceUser",
    plural = "zitadelserviceusers",
    shortname = "zsu",
    category = "zitadel",
    namespaced,
    status = "ZitadelServiceUserStatus",
    derive = "PartialEq",
    doc = "A ZITADEL service user, the Secret with its key, and the tokens that the operator keeps fresh in Secrets.",
    validation = Rule::new("self.metadata.name.size() <= 63")
        .message("metadata.name: at most 63 characters, because it becomes a label value"),
    selectable = ".spec.instanceRef.name",
    selectable = ".spec.keySecretRef.name",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Up-To-Date", type_ = "string", json_path = ".status.conditions[?(@.type==\"UpToDate\")].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"UpToDate\")].reason"),
    printcolumn(name = "Tokens", type_ = "string", json_path = ".status.tokensReady"),
    printcolumn(name = "Expires", type_ = "string", json_path = ".status.expiresAt"),
    printcolumn(name = "Instance", type_ = "string", json_path = ".spec.instanceRef.name"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "User ID", type_ = "string", json_path = ".status.userID", priority = 1),
    printcolumn(name = "Key Expires", type_ = "string", json_path = ".status.keyExpiresAt", priority = 1),
    printcolumn(name = "Next Refresh", type_ = "string", json_path = ".status.renewAt", priority = 1)
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.keySecretRef) != has(self.user)")
        .message(at("spec", rules::KEY_OR_USER).as_str()),
    validation = Rule::new("has(self.user) == has(oldSelf.user)")
        .message("spec.user cannot be added or removed; create another object"),
    validation = Rule::new("!has(self.user) || self.instanceRef.name == oldSelf.instanceRef.name")
        .message("spec.instanceRef: immutable with spec.user; create another object"),
    validation = Rule::new("!has(self.keySecretRef) || !self.tokens.exists(t, t.secret.name == self.keySecretRef.name)")
        .message(at("spec.tokens[].secret.name", rules::KEY_OVERWRITTEN).as_str()),
    validation = Rule::new("self.tokens.all(t, self.tokens.exists_one(u, u.secret.name == t.secret.name))")
        .message(at("spec.tokens[].secret.name", rules::SECRET_NAMED_TWICE).as_str()),
    validation = at_most("template"),
    validation = at_most("annotations"),
    validation = at_most("labels")
)]
pub struct ZitadelServiceUserSpec {
    /// The `ZitadelInstance` that issues the tokens. Immutable with `spec.user`.
    pub instance_ref: InstanceRef,

    /// The Secret with ZITADEL's key file (JSON), in the namespace of this object. Set exactly one of keySecretRef and user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_secret_ref: Option<KeySecretRef>,

    /// Has the operator create the service user in ZITADEL or take it over, and make, rotate and keep its keys. Needs `spec.adminCredential`
    /// of the `ZitadelInstance`, an operator with `--cluster-name`, and a `ZitadelAccessPolicy` that allows users in the
    /// organization. Cannot be added or removed later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<ManagedUser>,

    /// Has the operator replace the key on a schedule. The key in `keySecretRef` begins the first rotation, and is used
    /// again if the operator's keys are lost or the rotation stops. The operator's keys stay in its own namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_rotation: Option<KeyRotation>,

    /// Manager roles of the user, which let it use ZITADEL's own API. Needs `spec.adminCredential` of the
    /// `ZitadelInstance`, and a `ZitadelAccessPolicy` that allows each role. A role that a person removes in ZITADEL is
    /// granted again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(validation = scopes_once())]
    pub manager_roles: Vec<ManagerRole>,

    /// See [`UserDeletionPolicy`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletion_policy: Option<UserDeletionPolicy>,

    /// If true, the operator changes no Secret of this object, requests no tokens, rotates no key, and grants no roles. It
    /// still revokes roles that no policy allows. A deletion still removes what the operator made at ZITADEL. Default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,

    /// Tokens to issue and keep fresh.
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub tokens: Vec<Token>,
}

/// Reference to a `ZitadelInstance`.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct InstanceRef {
    /// Name of the `ZitadelInstance`.
    #[schemars(length(min = 1, max = 63), regex(pattern = NAME_PATTERN))]
    pub name: String,
}

/// Reference to the Secret entry that holds a key. No reference in this API has a `namespace` field: it always refers
/// to the namespace of the object (CVE-2026-42875, CVE-2026-39961).
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct KeySecretRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253), regex(pattern = NAME_PATTERN))]
    pub name: String,

    /// Key of the Secret's entry that holds the key file. Optional if the Secret has exactly one entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._a-zA-Z0-9]+$"))]
    pub key: Option<String>,
}

/// A service user that the operator creates in ZITADEL. A user that exists already is taken over only if
/// `existingUserID` and the user's own metadata ask for it.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.existingUserID) == has(oldSelf.existingUserID) && (!has(self.existingUserID) || self.existingUserID == oldSelf.existingUserID)")
        .message("spec.user.existingUserID is immutable; create another object"),
    validation = Rule::new("!(has(self.existingUserID) && has(self.username))")
        .message(at("spec.user.username", rules::NAME_OF_EXISTING).as_str()),
    validation = Rule::new("has(self.username) == has(oldSelf.username) && (!has(self.username) || self.username == oldSelf.username)")
        .message("spec.user.username is immutable; create another object")
)]
pub struct ManagedUser {
    /// ID of the organization that the user belongs to. Immutable.
    #[serde(rename = "organizationID")]
    #[schemars(length(min = 1, max = 64), regex(pattern = ID_PATTERN))]
    #[x_kube(validation = Rule::new("self == oldSelf")
        .message("spec.user.organizationID is immutable; create another object"))]
    pub organization_id: String,

    /// Username. Default: `<cluster>-<namespace>-<name>`. Other names need `users.usernamePattern` of a
    /// `ZitadelAccessPolicy`. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 200), regex(pattern = USERNAME_PATTERN))]
    pub username: Option<String>,

    /// ID of a service user that the operator takes over instead of creating one. A manager of the organization must have
    /// set the metadata `zitadel-tokens.dev/owner` of this user to `<cluster>/<namespace>/<name>` of this object, and a
    /// `ZitadelAccessPolicy` must allow its username. Humans, the administrator and users with roles of the instance are
    /// refused. The operator never deletes this user, and changes only the fields that are set here. Immutable.
    #[serde(default, rename = "existingUserID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = ID_PATTERN))]
    pub existing_user_id: Option<String>,

    /// Display name. Default: the username.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 200))]
    pub display_name: Option<String>,

    /// Description. Default: empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 500))]
    pub description: Option<String>,

    /// Format of the user's access tokens. Default `JWT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_token_type: Option<AccessTokenType>,
}

/// Format of access tokens.
#[derive(schemars::JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessTokenType {
    /// Signed tokens, which an API can verify itself.
    #[serde(rename = "JWT")]
    Jwt,
    /// Tokens that an API verifies by asking ZITADEL.
    Opaque,
}

/// Manager roles of the user for one instance, organization, project or project grant.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(has(self.instance) ? 1 : 0) + (has(self.organizationID) ? 1 : 0) + (has(self.projectID) ? 1 : 0) == 1")
        .message(at("spec.managerRoles[]", rules::ROLE_SCOPE).as_str()),
    validation = Rule::new("!has(self.grantedOrganizationID) || has(self.projectID)")
        .message(at("spec.managerRoles[].grantedOrganizationID", rules::GRANT_WITHOUT_PROJECT).as_str()),
    validation = Rule::new("self.roles.all(r, has(self.instance) ? r.startsWith('IAM_') : has(self.organizationID) ? r.startsWith('ORG_') : has(self.grantedOrganizationID) ? r.startsWith('PROJECT_GRANT_') : r.startsWith('PROJECT_') && !r.startsWith('PROJECT_GRANT_'))")
        .message(at("spec.managerRoles[].roles", rules::ROLE_LEVEL).as_str())
)]
pub struct ManagerRole {
    /// If true, the roles are for the whole instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self").message(at("spec.managerRoles[].instance", rules::ROLE_SCOPE).as_str()))]
    pub instance: Option<bool>,

    /// The organization that the roles are for.
    #[serde(default, rename = "organizationID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = ID_PATTERN))]
    pub organization_id: Option<String>,

    /// The project that the roles are for.
    #[serde(default, rename = "projectID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = ID_PATTERN))]
    pub project_id: Option<String>,

    /// With projectID: the roles are for the grant of the project to this organization.
    #[serde(default, rename = "grantedOrganizationID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = ID_PATTERN))]
    pub granted_organization_id: Option<String>,

    /// Names of the roles, such as `ORG_OWNER`.
    #[schemars(length(min = 1, max = 16), inner(length(max = 64), regex(pattern = ROLE_PATTERN)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub roles: Vec<String>,

    /// See [`RoleMode`], whose text the schema shows here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<RoleMode>,
}

/// What happens to roles that the user has here and that the spec does not list. `Merge` (the default) leaves those that
/// the operator did not grant. `Exclusive` removes all of them.
#[derive(schemars::JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoleMode {
    /// The operator removes only what it granted.
    Merge,
    /// The operator removes every other role.
    Exclusive,
}

/// The schedule of key rotations.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.overlap) || duration(self.overlap) < duration(self.interval)")
        .message(at("keyRotation.overlap", rules::ROTATION_OVERLAP).as_str()),
    validation = Rule::new("!has(self.keyLifetime) || duration(self.keyLifetime) > duration(self.interval) + (has(self.overlap) ? duration(self.overlap) : duration('1h'))")
        .message(at("keyRotation.keyLifetime", rules::ROTATION_LIFETIME).as_str())
)]
pub struct KeyRotation {
    /// Time between two rotations, such as `720h`. A rotation is up to a tenth earlier, so that rotations spread.
    #[schemars(length(max = 32), regex(pattern = DURATION_PATTERN))]
    #[x_kube(validation = Rule::new("duration(self) >= duration('1h') && duration(self) <= duration('8760h')")
        .message(at("keyRotation.interval", rules::ROTATION_INTERVAL).as_str()))]
    pub interval: String,

    /// How long a replaced key stays at ZITADEL. Default `1h`, or half of a shorter interval.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = DURATION_PATTERN))]
    #[x_kube(validation = Rule::new("duration(self) >= duration('10s')")
        .message(at("keyRotation.overlap", rules::ROTATION_OVERLAP).as_str()))]
    pub overlap: Option<String>,

    /// Lifetime of a key at ZITADEL. Default: three times the interval.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = DURATION_PATTERN))]
    #[x_kube(validation = Rule::new("duration(self) <= duration('26280h')")
        .message(at("keyRotation.keyLifetime", rules::ROTATION_LIFETIME).as_str()))]
    pub key_lifetime: Option<String>,

    /// If true, the operator removes at ZITADEL the key that the rotation began with, after the overlap and if no other
    /// object that this operator serves uses it. Default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delete_bootstrap_key: Option<bool>,
}

/// What happens at ZITADEL to what the operator made when this object is deleted. `Delete` (the default) deletes the user in
/// `spec.user` that the operator created, or removes the keys. `Orphan` leaves the user, and the keys until they expire. The
/// roles in `spec.managerRoles` are revoked in any case.
#[derive(schemars::JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserDeletionPolicy {
    /// The operator removes it before the object disappears.
    Delete,
    /// Users stay, and keys until they expire.
    Orphan,
}

/// One token: its audiences, and the Secret that holds it.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(has(self.projectIDs) && self.projectIDs.size() > 0) || (has(self.zitadelAPI) && self.zitadelAPI == true)")
        .message(at("spec.tokens[]", rules::NO_AUDIENCE).as_str()),
    validation = Rule::new("!(has(self.renewBefore) && has(self.renewBeforePercentage))")
        .message("spec.tokens[]: set renewBefore or renewBeforePercentage, not both")
)]
pub struct Token {
    /// Name of the token, unique in this object.
    #[schemars(length(min = 1, max = 63), regex(pattern = TOKEN_NAME_PATTERN))]
    pub name: String,

    /// IDs of the projects whose APIs accept the token. Each ID becomes an audience of the token.
    #[serde(default, rename = "projectIDs", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(max = 64), regex(pattern = ID_PATTERN)))]
    #[x_kube(
        merge_strategy = ListMerge::Set,
        validation = Rule::new("!self.exists(p, p == 'zitadel')")
            .message(at("projectIDs", rules::ALIAS).as_str())
    )]
    pub project_ids: Vec<String>,

    /// Adds the audience of the ZITADEL API.
    #[serde(default, rename = "zitadelAPI", skip_serializing_if = "Option::is_none")]
    pub zitadel_api: Option<bool>,

    /// Adds the user's roles in the projects of the audience, as claims.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project_roles: Option<bool>,

    /// Adds claims about the user's organization. Must be the ID of the organization that the user belongs to.
    #[serde(default, rename = "organizationID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), regex(pattern = ID_PATTERN))]
    pub organization_id: Option<String>,

    /// Additional scopes. Default `[openid]`, as ZITADEL's guide asks. `[]` can halve the server's cost of a token
    /// request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 16),
        inner(
            length(max = 256),
            regex(pattern = SCOPE_PATTERN)
        )
    )]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub scopes: Option<Vec<String>>,

    /// How long before its expiry the operator refreshes the token: a duration such as `30m`. Set at most one of
    /// renewBefore and renewBeforePercentage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = DURATION_PATTERN))]
    #[x_kube(validation = Rule::new("duration(self) > duration('0s') && duration(self) <= duration('744h')")
        .message("renewBefore: must be more than 0s and at most 744h, the longest lifetime of a token"))]
    pub renew_before: Option<String>,

    /// How long before its expiry the operator refreshes the token, as a percentage of its lifetime. Default: a third
    /// of the lifetime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 99))]
    pub renew_before_percentage: Option<i32>,

    /// The Secret that holds the token.
    pub secret: TokenSecret,
}

/// The Secret that the operator creates for a token.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct TokenSecret {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253), regex(pattern = NAME_PATTERN))]
    pub name: String,

    /// Labels to add to the Secret. The platform team decides which keys are allowed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend(
        "maxProperties" = 32,
        "additionalProperties" = {"type": "string", "maxLength": 63, "pattern": rules::LABEL_VALUE_PATTERN}
    ))]
    #[x_kube(validation = qualified("labels"), validation = not_operators_own("labels"))]
    pub labels: BTreeMap<String, String>,

    /// Annotations to add to the Secret. The platform team decides which keys are allowed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32, "additionalProperties" = {"type": "string", "maxLength": 1024}))]
    #[x_kube(validation = qualified("annotations"), validation = not_operators_own("annotations"))]
    pub annotations: BTreeMap<String, String>,

    /// Additional data keys of the Secret. In each value the operator replaces `{{ token }}`, `{{ token_type }}`,
    /// `{{ expires_at }}`, `{{ issuer }}` and `{{ audience }}`; all other text stays as it is. The resulting Secret may
    /// have at most 128 KiB.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32, "additionalProperties" = {"type": "string", "maxLength": 16384}))]
    #[x_kube(
        validation = data_keys(),
        validation = Rule::new("self.all(k, self[k].split('{{').size() <= 17)")
            .message(at("secret.template", rules::TOO_MANY_PLACEHOLDERS).as_str())
    )]
    pub template: BTreeMap<String, String>,

    /// See [`DeletionPolicy`], whose text the schema shows here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletion_policy: Option<DeletionPolicy>,
}

/// What happens to the Secret when its token is removed from the spec or the object is deleted. `Delete` (the default)
/// deletes it. `Retain` keeps it, without an owner reference.
#[derive(schemars::JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeletionPolicy {
    /// The Secret is deleted.
    Delete,
    /// The Secret stays, with its last token, until a user deletes it. It has no owner reference.
    Retain,
}

/// The rule that each scope has one entry. It compares fields directly, because the API server takes values of unknown
/// size for too expensive.
fn scopes_once() -> kube::core::cel::Rule {
    let same = |field: &str| format!("has(a.{field}) && has(b.{field}) && a.{field} == b.{field}");
    let (organization, project) = (same("organizationID"), same("projectID"));
    let grant = "has(a.grantedOrganizationID) == has(b.grantedOrganizationID) && (!has(a.grantedOrganizationID) || a.grantedOrganizationID == b.grantedOrganizationID)";
    kube::core::cel::Rule::new(format!(
        "self.all(a, self.exists_one(b, has(a.instance) && has(b.instance) || {organization} || {project} && {grant}))"
    ))
    .message(at("spec.managerRoles", rules::ROLE_SCOPE_TWICE).as_str())
}

/// The rule that limits the size of the map `field` of all tokens together.
fn at_most(field: &str) -> kube::core::cel::Rule {
    let map = format!("t.secret.{field}");
    kube::core::cel::Rule::new(format!(
        "self.tokens.map(t, has({map}) ? {map}.map(k, bytes(k).size() + bytes({map}[k]).size()).sum() : 0).sum() <= {MAX_TEXT}"
    ))
    .message(at(&format!("spec.tokens[].secret.{field}"), rules::TOO_MUCH_TEXT).as_str())
}

/// The rule on the data keys of templates.
fn data_keys() -> kube::core::cel::Rule {
    let own = rules::OPERATORS_DATA.map(|key| format!("'{key}'")).join(", ");
    let form = format!(
        "k.matches('{}') && k != '.' && !k.startsWith('..')",
        rules::DATA_KEY_PATTERN
    );
    kube::core::cel::Rule::new(format!("self.all(k, {form} && !(k in [{own}]))"))
        .message(at("secret.template", rules::DATA_KEY).as_str())
}

/// A message with the field in front.
fn at(field: &str, message: &str) -> String {
    format!("{field}: {message}")
}

/// The rule on the syntax of label and annotation keys. Kubernetes also accepts uppercase letters in annotation
/// prefixes, which would bypass the rules on prefixes.
fn qualified(field: &str) -> kube::core::cel::Rule {
    let (longest, pattern) = (rules::MAX_NAME, rules::METADATA_KEY_PATTERN);
    kube::core::cel::Rule::new(format!(
        "self.all(k, k.indexOf('/') <= {longest} && k.matches('{pattern}'))"
    ))
    .message(at(&format!("secret.{field}"), rules::METADATA_KEY).as_str())
}

/// The rule on keys that are reserved for the operator (`is_operators_own`). Which other keys are allowed depends on
/// the cluster; the operator and the chart's admission policy check that.
fn not_operators_own(field: &str) -> kube::core::cel::Rule {
    let group = GROUP.replace('.', "[.]");
    kube::core::cel::Rule::new(format!(
        "!self.exists(k, k == '{LABEL_MANAGED_BY}' || k.matches('^([^/]*[.])?{group}/'))"
    ))
    .message(at(&format!("secret.{field}"), rules::OPERATORS_OWN).as_str())
}

/// Observed state of the service user and its tokens. Output only.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ZitadelServiceUserStatus {
    /// Generation of the spec that this status describes; -1 before the first reconcile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// ID of the ZITADEL user that the key belongs to.
    #[serde(default, rename = "userID", skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,

    /// ID of the key in use.
    #[serde(default, rename = "keyID", skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,

    /// When the key expires; absent if the key file does not state it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_expires_at: Option<Time>,

    /// State of the key rotation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_rotation: Option<KeyRotationStatus>,

    /// Earliest expiry of the tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Time>,

    /// Earliest scheduled refresh of the tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renew_at: Option<Time>,

    /// Number of valid tokens and of tokens in the spec, such as `2/3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_ready: Option<String>,

    /// Last value of the annotation `zitadel-tokens.dev/renew-request` for which the operator has refreshed every
    /// token. A value of more than 256 bytes is shown as its hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub last_handled_renew_request: Option<String>,

    /// `Ready`: every Secret holds a valid token for the spec, and the operator refuses no token because of, for
    /// example, its spec, instance, access policies or key file; docs/tokens.md lists all causes. `UpToDate`:
    /// the latest attempt to refresh every token succeeded. `KeyValid`: the key is usable. `KeyRotated`: the operator
    /// rotates the key on schedule. `UserReady`: the user in `spec.user` exists. `ManagerRolesGranted`: the user has the
    /// roles in `spec.managerRoles`. `ForeignCredentials`: the user got keys or personal access tokens from elsewhere.
    /// `Reconciling` and `Stalled` follow kstatus.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,

    /// Status of each token in the spec.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub tokens: Vec<TokenStatus>,
}

/// State of the key rotation.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct KeyRotationStatus {
    /// When the key in use replaced another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotated_at: Option<Time>,

    /// When the next rotation is due.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotate_at: Option<Time>,

    /// Last value of the annotation `zitadel-tokens.dev/rotate-request` for which the operator has rotated the key. A
    /// value of more than 256 bytes is shown as its hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub last_handled_rotate_request: Option<String>,

    /// Number of keys and personal access tokens of the user at ZITADEL that this operator did not make, counted at each
    /// rotation. The key in the Secret of the spec is not among them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub foreign_credentials: Option<i32>,
}

/// Status of one token.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct TokenStatus {
    /// Name of the token in the spec.
    pub name: String,

    /// Name of the Secret that holds the token.
    pub secret_name: String,

    /// When the token in the Secret was issued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issued_at: Option<Time>,

    /// When the token expires.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Time>,

    /// When the operator will refresh the token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renew_at: Option<Time>,

    /// Lifetime of the token in seconds, as the server returned it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lifetime_seconds: Option<i64>,

    /// Format of the token: `JWT` or `Opaque`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,

    /// Result of the latest attempt to keep the token fresh: one of the reasons in docs/reasons.md.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,

    /// Time since which attempts fail; absent while they succeed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failing_since: Option<Time>,
}

impl ZitadelServiceUser {
    /// Whether the object refers to this instance.
    #[must_use]
    pub fn is_of(&self, instance: &str) -> bool {
        self.spec.instance_ref.name == instance
    }
}
