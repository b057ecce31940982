//! The API: the kinds, their schema rules, and the names of labels and annotations.

pub mod access_policy;
pub mod instance;
pub mod metadata;
pub mod rules;
pub mod service_user;

pub use access_policy::ZitadelAccessPolicy;
pub use instance::ZitadelInstance;
pub use service_user::ZitadelServiceUser;

use crate::api::metadata::ANNOTATION_SCHEMA_VERSION;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSON, JSONSchemaProps,
};
use kube::CustomResourceExt;

/// Version of the schema of the CRDs. It rises with each change of the schema, so that an operator can tell that the
/// installed CRDs are older than it needs.
pub const SCHEMA_VERSION: u32 = 1;

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
    .map(with_schema_version)
    .collect()
}

fn with_schema_version(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    let version = (ANNOTATION_SCHEMA_VERSION.to_owned(), SCHEMA_VERSION.to_string());
    crd.metadata.annotations = Some([version].into());
    crd
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
