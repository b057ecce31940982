//! The API: the kinds, their schema rules, and the names of labels and annotations.

pub mod access_policy;
pub mod instance;
pub mod metadata;
pub mod service_user;

pub use access_policy::ZitadelAccessPolicy;
pub use instance::ZitadelInstance;
pub use service_user::ZitadelServiceUser;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSON, JSONSchemaProps,
};
use kube::CustomResourceExt;

/// The CRDs, as `zitadel-tokens crds` prints them.
#[must_use]
pub fn crds() -> Vec<CustomResourceDefinition> {
    [
        ZitadelInstance::crd(),
        ZitadelAccessPolicy::crd(),
        ZitadelServiceUser::crd(),
    ]
    .into_iter()
    .map(with_status_default)
    .collect()
}

/// Gives `status` the default `{observedGeneration: -1}`. kstatus treats an object without a status as Current, so a
/// roll-out would succeed before the first reconcile (docs/adr/0005-status-is-output-only.md). The derive macro has no
/// attribute for this default.
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
