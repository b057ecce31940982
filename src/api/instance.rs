//! `ZitadelInstance`: one ZITADEL server and how to reach it. Cluster-scoped, owned by the platform team.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::api::metadata::{DURATION_PATTERN, ID_PATTERN, NAME_PATTERN};

/// A ZITADEL server and how to reach it.
///
/// Write access to this object decides where assertions are sent. That equals holding every key used with it.
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
    doc = "A ZITADEL server and how to reach it.",
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
    ).message("spec.issuer: http:// needs spec.connection.allowInsecureHTTP: true; better, use https://")
)]
pub struct ZitadelInstanceSpec {
    /// The issuer, exactly as ZITADEL's discovery document states it: scheme, lowercase host, and the port if it is
    /// not the scheme's own. Opaque text, compared and never normalised. Immutable.
    #[schemars(
        length(max = 253),
        regex(pattern = ORIGIN_PATTERN)
    )]
    #[x_kube(
        validation = Rule::new("self == oldSelf")
            .message("spec.issuer is immutable: tokens carry it; make a new ZitadelInstance"),
        validation = Rule::new("!(self.startsWith('https://') && self.endsWith(':443')) && !(self.startsWith('http://') && self.endsWith(':80'))")
            .message("spec.issuer: leave out the scheme's own port (:443, :80), as ZITADEL does"),
        validation = near("spec.issuer")
    )]
    pub issuer: String,

    /// How to reach the server; absent means: dial the issuer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<Connection>,

    /// Pins the real id of the project behind the `zitadel` audience. It is learned from the server in any case; a
    /// pinned value that differs makes the instance not Ready.
    #[serde(default, rename = "zitadelProjectID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), regex(pattern = ID_PATTERN))]
    pub zitadel_project_id: Option<String>,
}

/// How the server is dialled. Every field is optional.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "!has(self.endpoint) || self.endpoint.startsWith('https://') || (has(self.allowInsecureHTTP) && self.allowInsecureHTTP == true)"
    ).message("spec.connection.endpoint: http:// needs spec.connection.allowInsecureHTTP: true; better, use https://"),
    validation = Rule::new("(has(self.caBundle) ? 1 : 0) + (has(self.caConfigMapRef) ? 1 : 0) + (has(self.caSecretRef) ? 1 : 0) <= 1")
        .message("spec.connection: set at most one of caBundle, caConfigMapRef and caSecretRef"),
    validation = Rule::new("!(has(self.proxy) && has(self.tlsServerName))")
        .message("spec.connection.tlsServerName does not go with a proxy, which dials by the name in the URL")
)]
pub struct Connection {
    /// Dial here and keep the issuer: requests carry `x-zitadel-instance-host` with the issuer's `host[:port]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 253),
        regex(pattern = ORIGIN_PATTERN)
    )]
    #[x_kube(validation = near("spec.connection.endpoint"))]
    pub endpoint: Option<String>,

    /// Name that the server's certificate must carry, if it is not the dialled host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253), regex(pattern = NAME_PATTERN))]
    pub tls_server_name: Option<String>,

    /// Certificates in PEM that are trusted instead of the system's. Set one of caBundle, caConfigMapRef, caSecretRef.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 131_072))]
    pub ca_bundle: Option<String>,

    /// The same in a ConfigMap of the operator's namespace, as trust-manager writes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_config_map_ref: Option<EntryRef>,

    /// The same in a Secret of the operator's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<EntryRef>,

    /// Proxy for this instance, such as `http://proxy.example.com:3128`. None is taken from the environment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253), regex(pattern = ORIGIN_PATTERN))]
    pub proxy: Option<String>,

    /// Time for one request, connect and body included; a duration such as `10s` (the default), 1s to 60s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = DURATION_PATTERN))]
    #[x_kube(validation = Rule::new("duration(self) >= duration('1s') && duration(self) <= duration('60s')")
        .message("spec.connection.timeout: 1s to 60s"))]
    pub timeout: Option<String>,

    /// Sustained requests per second to the dialled host, all objects together. Default 30.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub requests_per_second: Option<i32>,

    /// Requests that may go out at once after a quiet time. Default 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub burst: Option<i32>,

    /// Requests under way at once. Default 8: on a live server more made it slower.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub max_concurrent_requests: Option<i32>,

    /// Allows `http://`, and only to loopback or `*.svc`.
    #[serde(default, rename = "allowInsecureHTTP", skip_serializing_if = "Option::is_none")]
    pub allow_insecure_http: Option<bool>,
}

/// Names an entry of a ConfigMap or Secret in the operator's namespace.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct EntryRef {
    /// Name of the object.
    #[schemars(length(min = 1, max = 253), regex(pattern = NAME_PATTERN))]
    pub name: String,

    /// Its entry; `ca.crt` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._a-zA-Z0-9]+$"))]
    pub key: Option<String>,
}

/// Scheme, lower-case host, and maybe a port up to 65535.
const ORIGIN_PATTERN: &str = r"^https?://[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*(:([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?$";

/// The rule on the host of plain http.
fn near(field: &str) -> kube::core::cel::Rule {
    let octet = "[.](25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])";
    kube::core::cel::Rule::new(format!(
        "!self.matches('^http:') || self.matches('^http://(localhost|127{octet}{octet}{octet}|[^:]*[.]svc([.]cluster[.]local)?)(:[0-9]+)?$')"
    ))
    .message(format!("{field}: http:// goes only to loopback or *.svc; use https://").as_str())
}

/// What the operator knows of the server. Output only.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ZitadelInstanceStatus {
    /// Generation of the spec that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// `Ready`: the server answers discovery and names this issuer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,

    /// Where tokens are asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_endpoint: Option<String>,

    /// The id of the project behind the `zitadel` audience, once the server has told it.
    #[serde(default, rename = "zitadelProjectID", skip_serializing_if = "Option::is_none")]
    pub zitadel_project_id: Option<String>,

    /// How many seconds the server's clock is ahead of the operator's; negative if it is behind. Rounded to 5 seconds,
    /// and absent if the clocks agree within that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_skew_seconds: Option<i64>,
}

impl ZitadelInstance {
    /// Whether its condition `Ready` is `True`.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let conditions = self.status.iter().flat_map(|s| &s.conditions);
        conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
    }

    /// The connection settings, defaults where none are given.
    #[must_use]
    pub fn connection(&self) -> Connection {
        self.spec.connection.clone().unwrap_or_default()
    }
}
