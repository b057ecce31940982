//! What users write and read: the two kinds, their schema rules, and the names of labels and annotations.

pub mod instance;
pub mod metadata;
pub mod service_user;

pub use instance::ZitadelInstance;
pub use service_user::ZitadelServiceUser;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSON, JSONSchemaProps,
};
use kube::CustomResourceExt;

/// A DNS name, as Kubernetes names most objects (RFC 1123).
const NAME: &str = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";

/// Scheme, host and maybe a port up to 65535.
const ORIGIN: &str = concat!(
    r"^https?://[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*",
    r"(:([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?$"
);

/// A duration as Go and CEL read it.
const DURATION: &str = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$";

/// A rule of the schema that looks at one value.
fn rule(rule: &str, message: &str) -> kube::core::cel::Rule {
    kube::core::cel::Rule::new(rule).message(message)
}

/// Plain http stays on the machine or in the cluster.
fn near(field: &str) -> kube::core::cel::Rule {
    rule(
        r"!self.startsWith('http://') || self.matches('^http://(localhost|127(\\.(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])){3}|[a-z0-9.-]+\\.svc(\\.cluster\\.local)?)(:[0-9]+)?$')",
        &format!("{field}: http:// goes only to loopback or *.svc; use https://"),
    )
}

/// The definitions of our kinds, as `zitadel-tokens crds` prints them.
#[must_use]
pub fn crds() -> Vec<CustomResourceDefinition> {
    [ZitadelInstance::crd(), ZitadelServiceUser::crd()]
        .into_iter()
        .map(with_status_default)
        .collect()
}

/// Gives `status` the default `{observedGeneration: -1}`: kstatus calls an object without a status Current, so that a
/// roll-out would pass before the first reconcile (decision K9). The derive has no attribute for it.
fn with_status_default(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    for version in &mut crd.spec.versions {
        let status = version
            .schema
            .as_mut()
            .and_then(|s| s.open_api_v3_schema.as_mut())
            .and_then(|s| s.properties.as_mut())
            .and_then(|p| p.get_mut("status"));
        if let Some(JSONSchemaProps { default, .. }) = status {
            *default = Some(JSON(serde_json::json!({"observedGeneration": -1})));
        }
    }
    crd
}
