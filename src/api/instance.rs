//! `ZitadelInstance`: one ZITADEL server and how to connect to it. Cluster-scoped; the platform team owns it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::api::rules::{DURATION_PATTERN, ID_PATTERN, NAME_PATTERN, ORIGIN_PATTERN};
use crate::api::service_user::{KeyRotation, KeyRotationStatus};

/// Condition: ZITADEL accepts the credential in `spec.adminCredential`.
pub const ADMIN_CREDENTIAL_READY: &str = "AdminCredentialReady";

/// A ZITADEL server and how to connect to it.
///
/// This object decides where the operator sends assertions. Write access to it is therefore equivalent to holding every
/// key that is used with it.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "zitadel-tokens.dev",
    version = "v1alpha1",
    kind = "ZitadelInstance",
    plural = "zitadelinstances",
    shortname = "zi",
    category = "zitadel",
    status = "ZitadelInstanceStatus",
    derive = "PartialEq",
    doc = "A ZITADEL server and how to connect to it.",
    validation = Rule::new("self.metadata.name.size() <= 63")
        .message("metadata.name: at most 63 characters, because it becomes a label value"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Issuer", type_ = "string", json_path = ".spec.issuer"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "self.issuer.startsWith('https://') || (has(self.connection) && has(self.connection.allowInsecureHTTP) && self.connection.allowInsecureHTTP == true)"
    ).message("spec.issuer: http:// needs spec.connection.allowInsecureHTTP: true; prefer https://")
)]
pub struct ZitadelInstanceSpec {
    /// The issuer, exactly as ZITADEL's discovery document states it: scheme, lowercase host, and the port if it is
    /// not the default port of the scheme. The operator compares it as it is and never normalizes it. Immutable.
    #[schemars(
        length(max = 253),
        regex(pattern = ORIGIN_PATTERN)
    )]
    #[x_kube(
        validation = Rule::new("self == oldSelf")
            .message("spec.issuer is immutable because tokens contain it; create a new ZitadelInstance"),
        validation = Rule::new("!(self.startsWith('https://') && self.endsWith(':443')) && !(self.startsWith('http://') && self.endsWith(':80'))")
            .message("spec.issuer: leave out the scheme's own port (:443, :80), as ZITADEL does"),
        validation = near("spec.issuer")
    )]
    pub issuer: String,

    /// How to connect to the server. If absent, the operator connects to the issuer's host and port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<Connection>,

    /// Expected ID of the project behind the `zitadel` audience. The operator always learns the ID from the server. If
    /// that ID differs from this value, the instance is not Ready.
    #[serde(default, rename = "zitadelProjectID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), regex(pattern = ID_PATTERN))]
    pub zitadel_project_id: Option<String>,

    /// The credential that the operator creates service users and grants manager roles with. Needed only for `spec.user`
    /// and `spec.managerRoles` of a `ZitadelServiceUser`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin_credential: Option<AdminCredential>,

    /// If true, the operator requests no token from this server, rotates no key, grants and revokes no roles, and changes
    /// no Secret of its service users, for example during an incident. The deletion of service users goes on. Default
    /// false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,
}

/// A credential for ZITADEL's API.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct AdminCredential {
    /// The Secret in the operator's namespace that holds a key file (JSON) or a personal access token. Its annotations
    /// `zitadel-tokens.dev/instance` and `zitadel-tokens.dev/send-to` must name this instance and where its requests go (the
    /// issuer, or `<endpoint> for <issuer>`, then ` as <tlsServerName>` and ` via <proxy>` if set), so that nobody can send
    /// the credential elsewhere by editing this object.
    pub secret_ref: CredentialRef,

    /// Rotates the key of the administrator: the operator creates keys at ZITADEL, keeps them in the Secret
    /// `admin-key-<name of this object>` in its own namespace, and signs with them instead of the key in `secretRef`. That
    /// Secret must stay: its annotations also apply to these keys, and its key takes over when the rotation ends. Needs a
    /// key file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_rotation: Option<KeyRotation>,
}

/// Reference to the entry of a Secret in the operator's namespace.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct CredentialRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253), regex(pattern = NAME_PATTERN))]
    #[x_kube(validation = Rule::new("!self.startsWith('admin-key-') && !self.startsWith('service-user-')")
        .message("spec.adminCredential.secretRef.name: must not start with admin-key- or service-user-, like the operator's own Secrets"))]
    pub name: String,

    /// Key of the entry. Optional if the Secret has exactly one entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._a-zA-Z0-9]+$"))]
    pub key: Option<String>,
}

/// How the operator connects to the server. Every field is optional.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "!has(self.endpoint) || self.endpoint.startsWith('https://') || (has(self.allowInsecureHTTP) && self.allowInsecureHTTP == true)"
    ).message("spec.connection.endpoint: http:// needs spec.connection.allowInsecureHTTP: true; prefer https://"),
    validation = Rule::new("(has(self.caBundle) ? 1 : 0) + (has(self.caConfigMapRef) ? 1 : 0) + (has(self.caSecretRef) ? 1 : 0) <= 1")
        .message("spec.connection: set at most one of caBundle, caConfigMapRef and caSecretRef"),
    validation = Rule::new("!(has(self.proxy) && has(self.tlsServerName))")
        .message("spec.connection.tlsServerName: cannot be combined with spec.connection.proxy, because the proxy connects to the host in the URL")
)]
pub struct Connection {
    /// URL to connect to instead of the issuer, such as an in-cluster Service. The issuer stays the same: requests
    /// carry the header `x-zitadel-instance-host` with the issuer's `host[:port]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 253),
        regex(pattern = ORIGIN_PATTERN)
    )]
    #[x_kube(validation = near("spec.connection.endpoint"))]
    pub endpoint: Option<String>,

    /// Host name that the server's certificate must be valid for. Defaults to the host that the operator connects to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253), regex(pattern = NAME_PATTERN))]
    pub tls_server_name: Option<String>,

    /// CA certificates in PEM, trusted instead of the system's. Set at most one of caBundle, caConfigMapRef and
    /// caSecretRef.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 131_072))]
    pub ca_bundle: Option<String>,

    /// CA certificates in a ConfigMap in the operator's namespace, such as one that trust-manager writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_config_map_ref: Option<EntryRef>,

    /// CA certificates in a Secret in the operator's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<EntryRef>,

    /// Proxy for this instance, such as `http://proxy.example.com:3128`. The URL that the operator connects to must
    /// then be https://. The operator ignores proxy environment variables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253), regex(pattern = ORIGIN_PATTERN))]
    pub proxy: Option<String>,

    /// Timeout of one request, including connecting and reading the response body: a duration from 1s to 60s. Default
    /// `10s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = DURATION_PATTERN))]
    #[x_kube(validation = Rule::new("duration(self) >= duration('1s') && duration(self) <= duration('60s')")
        .message("spec.connection.timeout: must be a duration from 1s to 60s"))]
    pub timeout: Option<String>,

    /// Sustained requests per second to the host that the operator connects to, for all objects together. Default 30.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub requests_per_second: Option<i32>,

    /// Maximum number of requests in a burst after an idle period. Default 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub burst: Option<i32>,

    /// Maximum number of concurrent requests. Default 8: measured on a live server, more concurrency made it slower.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub max_concurrent_requests: Option<i32>,

    /// Allows plain HTTP (`http://`), but only to loopback addresses and in-cluster Services (`*.svc`). Default false.
    #[serde(default, rename = "allowInsecureHTTP", skip_serializing_if = "Option::is_none")]
    pub allow_insecure_http: Option<bool>,
}

/// Reference to an entry of a ConfigMap or Secret in the operator's namespace.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct EntryRef {
    /// Name of the ConfigMap or Secret.
    #[schemars(length(min = 1, max = 253), regex(pattern = NAME_PATTERN))]
    pub name: String,

    /// Key of the entry. Default `ca.crt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._a-zA-Z0-9]+$"))]
    pub key: Option<String>,
}

/// The rule that restricts plain HTTP to loopback addresses and in-cluster Services.
fn near(field: &str) -> kube::core::cel::Rule {
    let octet = "[.](25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])";
    kube::core::cel::Rule::new(format!(
        "!self.matches('^http:') || self.matches('^http://(localhost|127{octet}{octet}{octet}|[^:]*[.]svc([.]cluster[.]local)?)(:[0-9]+)?$')"
    ))
    .message(format!("{field}: http:// is allowed only for loopback addresses and *.svc hosts; use https://").as_str())
}

/// Observed state of the server. Output only.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ZitadelInstanceStatus {
    /// Generation of the spec that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// `Ready`: the server's discovery document is available and states this issuer. `AdminCredentialReady`, with
    /// `spec.adminCredential` only: ZITADEL accepts the credential. `KeyRotated`, with `spec.adminCredential.keyRotation`,
    /// or as long as the operator has keys of the administrator: it rotates the key on schedule. `ForeignCredentials`: the
    /// number of the administrator's keys and personal access tokens that this operator did not make has grown.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,

    /// URL that the operator requests tokens from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_endpoint: Option<String>,

    /// ID of the project behind the `zitadel` audience, once the operator has learned it from the server.
    #[serde(default, rename = "zitadelProjectID", skip_serializing_if = "Option::is_none")]
    pub zitadel_project_id: Option<String>,

    /// The user of `spec.adminCredential`, once ZITADEL has accepted the credential.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin_credential: Option<AdminCredentialStatus>,

    /// How many seconds the server's clock is ahead of the operator's; negative if it is behind. Rounded to 5 seconds,
    /// and absent if the clocks agree within that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_skew_seconds: Option<i64>,
}

/// The user of an admin credential, and what it may do.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct AdminCredentialStatus {
    /// ID of the user.
    #[serde(rename = "userID")]
    pub user_id: String,

    /// Its manager roles, at most 16 of them, each with what it is for: `IAM_OWNER: instance`,
    /// `ORG_USER_MANAGER: organization 69234237810729019`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub roles: Vec<String>,

    /// ID of the key in use. Absent with a personal access token.
    #[serde(default, rename = "keyID", skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,

    /// State of the key rotation, as long as the operator has keys of the administrator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_rotation: Option<KeyRotationStatus>,
}

impl ZitadelInstance {
    /// Whether the condition `Ready` is `True`.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let conditions = self.status.iter().flat_map(|s| &s.conditions);
        conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
    }

    /// The connection settings, or empty settings if the spec has none.
    #[must_use]
    pub fn connection(&self) -> Connection {
        self.spec.connection.clone().unwrap_or_default()
    }
}
