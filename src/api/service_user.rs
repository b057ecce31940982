//! `ZitadelServiceUser`: one ZITADEL service user and the tokens that are wanted for it.
//! Namespaced, owned by the application team.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::api::metadata::{DURATION_PATTERN, GROUP, ID_PATTERN, LABEL_MANAGED_BY, NAME_PATTERN};

/// Condition: every token Secret holds a valid token for the current spec.
pub const READY: &str = "Ready";

/// Condition: the latest refresh of every token succeeded. Unknown while the object is suspended.
pub const UP_TO_DATE: &str = "UpToDate";

/// Condition: the key is usable.
pub const KEY_VALID: &str = "KeyValid";

/// A ZITADEL service user, the Secret with its key, and the tokens that are kept fresh for it.
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
    doc = "A ZITADEL service user, the Secret with its key, and the tokens that are kept fresh in Secrets.",
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
    validation = Rule::new("!self.tokens.exists(t, t.secret.name == self.keySecretRef.name)")
        .message("spec.tokens[].secret.name: must differ from spec.keySecretRef.name; the key would be overwritten"),
    validation = Rule::new("self.tokens.all(t, self.tokens.exists_one(u, u.secret.name == t.secret.name))")
        .message("spec.tokens[].secret.name: two tokens name the same Secret; give each its own"),
    validation = at_most("template"),
    validation = at_most("annotations"),
    validation = at_most("labels")
)]
pub struct ZitadelServiceUserSpec {
    /// The `ZitadelInstance` that mints.
    pub instance_ref: InstanceRef,

    /// The Secret with ZITADEL's machine key JSON, in the same namespace.
    pub key_secret_ref: KeySecretRef,

    /// Change nothing while true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,

    /// The tokens that are wanted.
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub tokens: Vec<Token>,
}

/// Names a `ZitadelInstance`.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct InstanceRef {
    /// Its name.
    #[schemars(length(min = 1, max = 63), regex(pattern = NAME_PATTERN))]
    pub name: String,
}

/// Names the entry of a Secret that holds a key. There is no `namespace`, here or on any reference of ours: it is
/// always the object's own (CVE-2026-42875, CVE-2026-39961).
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct KeySecretRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253), regex(pattern = NAME_PATTERN))]
    pub name: String,

    /// Data key in it; may be left out when the Secret holds one entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._a-zA-Z0-9]+$"))]
    pub key: Option<String>,
}

/// One token: its audiences and the Secret that it is kept in.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(has(self.projectIDs) && self.projectIDs.size() > 0) || (has(self.zitadelAPI) && self.zitadelAPI == true)")
        .message("spec.tokens[]: name at least one audience, in projectIDs or with zitadelAPI: true"),
    validation = Rule::new("!(has(self.renewBefore) && has(self.renewBeforePercentage))")
        .message("spec.tokens[]: set renewBefore or renewBeforePercentage, not both")
)]
pub struct Token {
    /// Name of the token in this object.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,

    /// Projects whose APIs are to accept the token; each becomes an audience.
    #[serde(default, rename = "projectIDs", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(max = 64), regex(pattern = ID_PATTERN)))]
    #[x_kube(
        merge_strategy = ListMerge::Set,
        validation = Rule::new("!self.exists(p, p == 'zitadel')")
            .message("projectIDs: `zitadel` is the ZITADEL API itself; ask for it with zitadelAPI: true")
    )]
    pub project_ids: Vec<String>,

    /// Adds the ZITADEL API's own audience.
    #[serde(default, rename = "zitadelAPI", skip_serializing_if = "Option::is_none")]
    pub zitadel_api: Option<bool>,

    /// Adds the roles that the user has in the audience's projects, as claims.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project_roles: Option<bool>,

    /// Adds the claims of the user's own organization; must be that organization.
    #[serde(default, rename = "organizationID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), regex(pattern = ID_PATTERN))]
    pub organization_id: Option<String>,

    /// Further scopes. Absent means `[openid]`, as ZITADEL's guide asks; `[]` is up to twice as cheap for the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 16),
        inner(
            length(max = 256),
            regex(
                pattern = r"^(openid|profile|email|phone|address|urn:zitadel:iam:user:metadata|urn:zitadel:iam:user:resourceowner|urn:zitadel:iam:org:project:role:[a-zA-Z0-9_.:-]+|urn:zitadel:iam:org:roles:id:[a-zA-Z0-9_-]+|urn:zitadel:iam:org:domain:primary:[a-zA-Z0-9.-]+)$"
            )
        )
    )]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub scopes: Option<Vec<String>>,

    /// How long before its expiry the token is renewed; a duration such as `30m`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = DURATION_PATTERN))]
    #[x_kube(validation = Rule::new("duration(self) > duration('0s') && duration(self) <= duration('744h')")
        .message("renewBefore: more than 0s and at most 744h, the longest lifetime of a token"))]
    pub renew_before: Option<String>,

    /// The same as a percentage of the lifetime, 1 to 99. Absent means a third.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 99))]
    pub renew_before_percentage: Option<i32>,

    /// The Secret that the token is kept in.
    pub secret: TokenSecret,
}

/// The Secret of a token.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct TokenSecret {
    /// Its name.
    #[schemars(length(min = 1, max = 253), regex(pattern = NAME_PATTERN))]
    pub name: String,

    /// Labels to add, with keys that the platform team allows.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend(
        "maxProperties" = 32,
        "additionalProperties" = {"type": "string", "maxLength": 63, "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"}
    ))]
    #[x_kube(validation = qualified("labels"), validation = not_operators_own("labels"))]
    pub labels: BTreeMap<String, String>,

    /// Annotations to add, with keys that the platform team allows.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32, "additionalProperties" = {"type": "string", "maxLength": 1024}))]
    #[x_kube(validation = qualified("annotations"), validation = not_operators_own("annotations"))]
    pub annotations: BTreeMap<String, String>,

    /// Further data keys. Each value is literal text in which `{{ token }}`, `{{ token_type }}`, `{{ expires_at }}`,
    /// `{{ issuer }}` and `{{ audience }}` are replaced; nothing else is. The Secret that this makes has at most 128 KiB.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32, "additionalProperties" = {"type": "string", "maxLength": 16384}))]
    #[x_kube(
        validation = Rule::new("self.all(k, k.matches('^[-._a-zA-Z0-9]{1,253}$') && k != '.' && !k.startsWith('..') && !(k in ['token', 'token_type', 'expires_at', 'issuer']))")
            .message("secret.template: a data key has 1 to 253 of A-Z a-z 0-9 - _ . and no dots alone or two at its start, and is none of token, token_type, expires_at, issuer"),
        validation = Rule::new("self.all(k, self[k].split('{{').size() <= 17)")
            .message("secret.template: a text has at most 16 placeholders, counted by {{")
    )]
    pub template: BTreeMap<String, String>,

    /// What becomes of the Secret when its entry or the object is deleted: `Delete`, the default, or `Retain`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletion_policy: Option<DeletionPolicy>,
}

/// What becomes of a token Secret that is no longer asked for.
#[derive(schemars::JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeletionPolicy {
    /// It goes.
    Delete,
    /// It stays with the token in it until somebody removes it; it has no owner reference.
    Retain,
}

/// Bytes of all templates of an object together, keys included; of all labels of its Secrets; and of all annotations. The
/// operator holds an object in memory while it works on it, and 16 tokens with 32 templates each could otherwise have
/// 8 MiB.
pub const MAX_TEXT: usize = 64 * 1024;

/// The rule on the size of a map of all tokens together.
fn at_most(field: &str) -> kube::core::cel::Rule {
    let map = format!("t.secret.{field}");
    kube::core::cel::Rule::new(format!(
        "self.tokens.map(t, has({map}) ? {map}.map(k, bytes(k).size() + bytes({map}[k]).size()).sum() : 0).sum() <= {MAX_TEXT}"
    ))
    .message(format!("spec.tokens[].secret.{field}: all tokens together have at most 64 KiB").as_str())
}

/// The rule on the form of label and annotation keys. Kubernetes also accepts annotation prefixes in capitals, which would
/// bypass the rules on prefixes.
fn qualified(field: &str) -> kube::core::cel::Rule {
    kube::core::cel::Rule::new(
        "self.all(k, k.indexOf('/') <= 253 && k.matches('^([a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$'))",
    )
    .message(
        format!("secret.{field}: a key is a name of at most 63 characters, or one with a lower-case DNS name and / before it")
            .as_str(),
    )
}

/// The rule on keys that no list can allow (`is_operators_own`). Which others are allowed differs from cluster to cluster:
/// the operator checks it, and the chart's admission policy.
fn not_operators_own(field: &str) -> kube::core::cel::Rule {
    let group = GROUP.replace('.', "[.]");
    kube::core::cel::Rule::new(format!(
        "!self.exists(k, k == '{LABEL_MANAGED_BY}' || k.matches('^([^/]*[.])?{group}/'))"
    ))
    .message(format!("secret.{field}: keys of {GROUP} and {LABEL_MANAGED_BY} are the operator's own").as_str())
}

/// What the operator did. Output only.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ZitadelServiceUserStatus {
    /// Generation of the spec that this status describes; -1 before the first look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// The ZITADEL user that the key belongs to.
    #[serde(default, rename = "userID", skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,

    /// The key in use.
    #[serde(default, rename = "keyID", skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,

    /// When the key expires, if it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_expires_at: Option<Time>,

    /// The earliest expiry among the tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Time>,

    /// The earliest refresh among the tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renew_at: Option<Time>,

    /// Valid tokens of wanted tokens, such as `2/3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_ready: Option<String>,

    /// Value of the annotation `zitadel-tokens.dev/renew-request` that was last served: every token was refreshed for it.
    /// A value of more than 256 bytes is shown as its hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_handled_renew_request: Option<String>,

    /// `Ready`: every Secret holds a valid token for the spec. `UpToDate`: the latest refresh of every token succeeded.
    /// `KeyValid`: the key is usable. `Reconciling` and `Stalled` follow kstatus.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,

    /// One line per token of the spec.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub tokens: Vec<TokenStatus>,
}

/// What is known of one token.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct TokenStatus {
    /// Name of the token in the spec.
    pub name: String,

    /// The Secret that it is kept in.
    pub secret_name: String,

    /// When the token in the Secret was minted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issued_at: Option<Time>,

    /// When it expires.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Time>,

    /// When it will be renewed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renew_at: Option<Time>,

    /// The lifetime that the server gave, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lifetime_seconds: Option<i64>,

    /// `JWT` or `Opaque`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,

    /// How the last attempt went: a reason of the documented set (docs/reasons.md).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,

    /// Since when attempts fail; absent while they succeed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failing_since: Option<Time>,
}

impl ZitadelServiceUser {
    /// Whether it names this instance.
    #[must_use]
    pub fn is_of(&self, instance: &str) -> bool {
        self.spec.instance_ref.name == instance
    }
}
