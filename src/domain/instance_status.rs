//! The status of a `ZitadelInstance`.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

use crate::api::ZitadelInstance;
use crate::api::instance::ZitadelInstanceStatus;
use crate::domain::clock_skew::Skew;
use crate::domain::reason::Reason;
use crate::domain::time::whole_seconds;

/// The status of `instance` after discovery. `discovered` is the path of the token endpoint or the reason for the
/// failure. `now` is by the operator's own clock.
#[must_use]
pub fn status(
    instance: &ZitadelInstance,
    discovered: &Result<String, Reason>,
    zitadel_project_id: Option<&str>,
    skew: Skew,
    now: Timestamp,
) -> ZitadelInstanceStatus {
    let before = instance.status.clone().unwrap_or_default();
    let pinned = instance.spec.zitadel_project_id.as_deref();
    let mismatch = pinned.is_some() && zitadel_project_id.is_some() && pinned != zitadel_project_id;
    let reason = match discovered {
        Ok(_) if mismatch => Reason::ProjectIDMismatch,
        Ok(_) => Reason::InstanceReady,
        Err(reason) => *reason,
    };
    let value = if reason == Reason::InstanceReady {
        "True"
    } else {
        "False"
    };
    let last = before
        .conditions
        .iter()
        .find(|c| c.type_ == "Ready" && c.status == value && c.last_transition_time.0 <= now);
    let insecure = instance.connection().allow_insecure_http == Some(true);
    let message = match (reason, insecure) {
        (Reason::InstanceReady, true) => format!("{} Plain HTTP is allowed.", reason.meaning()),
        (Reason::InstanceReady, false) => reason.meaning().to_owned(),
        _ => reason.advice(),
    };
    ZitadelInstanceStatus {
        observed_generation: instance.metadata.generation,
        conditions: vec![Condition {
            type_: "Ready".into(),
            status: value.into(),
            reason: reason.name().into(),
            message,
            observed_generation: instance.metadata.generation,
            last_transition_time: last.map_or_else(|| Time(whole_seconds(now)), |c| c.last_transition_time.clone()),
        }],
        token_endpoint: discovered
            .as_ref()
            .ok()
            .map(|path| format!("{}{path}", instance.spec.issuer)),
        zitadel_project_id: zitadel_project_id.map(str::to_owned).or(before.zitadel_project_id),
        clock_skew_seconds: skew.rounded_seconds(),
    }
}
