//! The status of a `ZitadelInstance`.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

use crate::api::ZitadelInstance;
use crate::api::instance::{ADMIN_CREDENTIAL_READY, AdminCredentialStatus, ZitadelInstanceStatus};
use crate::domain::clock_skew::Skew;
use crate::domain::key_rotation_report::KeyCondition;
use crate::domain::reason::Reason;
use crate::domain::retry::Retry;
use crate::domain::time::whole_seconds;

/// What a reconcile found out about the admin credential.
pub struct AdminState {
    /// Its user, or why ZITADEL does not accept it.
    pub accepted: Result<AdminCredentialStatus, Reason>,
    /// The conditions about the rotation of its key.
    pub key_conditions: Vec<KeyCondition>,
}

/// The status of `instance` after discovery. `discovered` is the path of the token endpoint or the reason for the
/// failure; `admin` is what is known of the admin credential, if the spec has one. `now` is by the operator's own clock.
#[must_use]
pub fn status(
    instance: &ZitadelInstance,
    discovered: &Result<String, Reason>,
    zitadel_project_id: Option<&str>,
    admin: Option<&AdminState>,
    skew: Skew,
    now: Timestamp,
) -> ZitadelInstanceStatus {
    let before = instance.status.clone().unwrap_or_default();
    let pinned = instance.spec.zitadel_project_id.as_deref();
    let mismatch = pinned.is_some() && zitadel_project_id.is_some() && pinned != zitadel_project_id;
    let reason = match discovered {
        Ok(_) if mismatch => Reason::ProjectIDMismatch,
        Ok(_) if instance.spec.suspend == Some(true) => Reason::Suspended,
        Ok(_) => Reason::InstanceReady,
        Err(reason) => *reason,
    };
    let value = if reason.retry() == Retry::No { "True" } else { "False" };
    let insecure = instance.connection().allow_insecure_http == Some(true);
    let message = match (reason, insecure) {
        (Reason::InstanceReady, true) => format!("{} Plain HTTP is allowed.", reason.meaning()),
        (Reason::InstanceReady, false) => reason.meaning().to_owned(),
        _ => reason.advice(),
    };
    let condition = |kind: &str, value: &str, reason: Reason, message: String| {
        let mut last = before.conditions.iter();
        let last = last.find(|c| c.type_ == kind && c.status == value && c.last_transition_time.0 <= now);
        Condition {
            type_: kind.into(),
            status: value.into(),
            reason: reason.name().into(),
            message,
            observed_generation: instance.metadata.generation,
            last_transition_time: last.map_or_else(|| Time(whole_seconds(now)), |c| c.last_transition_time.clone()),
        }
    };
    let mut conditions = vec![condition("Ready", value, reason, message)];
    if let Some(admin) = admin {
        let (value, reason) = match &admin.accepted {
            Ok(_) => ("True", Reason::AdminCredentialReady),
            Err(reason) => ("False", *reason),
        };
        let all = [(ADMIN_CREDENTIAL_READY, value, reason)];
        let all = all.into_iter().chain(admin.key_conditions.iter().copied());
        conditions.extend(all.map(|(kind, value, reason)| {
            let message = match reason.retry() {
                Retry::No => reason.meaning().to_owned(),
                _ => reason.advice(),
            };
            condition(kind, value, reason, message)
        }));
    }
    ZitadelInstanceStatus {
        observed_generation: instance.metadata.generation,
        conditions,
        admin_credential: admin.and_then(|admin| admin.accepted.as_ref().ok().cloned()),
        token_endpoint: discovered
            .as_ref()
            .ok()
            .map(|path| format!("{}{path}", instance.spec.issuer)),
        zitadel_project_id: zitadel_project_id.map(str::to_owned).or(before.zitadel_project_id),
        clock_skew_seconds: skew.rounded_seconds(),
    }
}
