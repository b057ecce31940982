//! Whether the installed CRDs are those of this operator version or newer. With older ones the API server accepts specs
//! that this version expects to be refused. Checked once, at the start.

use std::time::Duration;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{Api, Client, ResourceExt};

use crate::api::metadata::ANNOTATION_SCHEMA_VERSION;
use crate::api::{SCHEMA_VERSION, crds};

/// Time between two checks while a CRD is outdated or cannot be read.
const CHECK_EVERY: Duration = Duration::from_secs(2);

/// Completes when no installed CRD is older than this operator version. A CRD that is missing, or that the operator may
/// not read, is left to the watches, which report it.
pub async fn up_to_date(client: Client) {
    let api: Api<CustomResourceDefinition> = Api::all(client);
    for name in crds().iter().map(ResourceExt::name_any) {
        let mut reported = None;
        loop {
            let outdated = is_outdated(&api, &name).await;
            if outdated == Some(false) {
                break;
            }
            // Once for each state.
            if reported != Some(outdated) {
                reported = Some(outdated);
                if outdated.is_some() {
                    tracing::error!(
                        crd = name,
                        "the CRD is older than this operator version; apply the new CRDs"
                    );
                } else {
                    tracing::warn!(crd = name, "could not read the version of the CRD; retrying");
                }
            }
            tokio::time::sleep(CHECK_EVERY).await;
        }
    }
}

/// None if the version cannot be read.
async fn is_outdated(api: &Api<CustomResourceDefinition>, name: &str) -> Option<bool> {
    match api.get_metadata(name).await {
        Ok(crd) => {
            let version = crd.annotations().get(ANNOTATION_SCHEMA_VERSION);
            Some(version.and_then(|version| version.parse().ok()).unwrap_or(0) < SCHEMA_VERSION)
        }
        Err(kube::Error::Api(status)) if status.is_forbidden() => {
            tracing::warn!(
                crd = name,
                "the operator may not read the CRD, so its version is not checked"
            );
            Some(false)
        }
        Err(kube::Error::Api(status)) if status.is_not_found() => Some(false),
        Err(_) => None,
    }
}
