//! What the status of a service user and its Events say about manager roles.

use crate::api::service_user::{MANAGER_ROLES_GRANTED, ZitadelServiceUserStatus};
use crate::domain::facts::Facts;
use crate::domain::manager_role::{RoleScope, wanted};
use crate::domain::progress::Progress;
use crate::domain::reason::Reason;
use crate::domain::report::EventDraft;
use crate::domain::retry::{Failed, Retry};
use crate::domain::validate;

/// Name of the manager roles among the backoffs of an object. No token can have this name.
pub const BACKOFF: &str = "managerRoles";

/// Roles that a message lists. The API server rejects an Event whose note is longer than 1024 bytes.
const MOST_DENIED: usize = 4;

/// How the manager roles stand after a reconcile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoleOutcome {
    /// Whether the user has its roles, or why not.
    pub outcome: Progress,
    /// The scope that the reason concerns, if it concerns one.
    pub scope: Option<Box<RoleScope>>,
}

impl From<Progress> for RoleOutcome {
    fn from(outcome: Progress) -> Self {
        Self { outcome, scope: None }
    }
}

impl RoleOutcome {
    /// What the queue retries. `None` if nothing failed.
    #[must_use]
    pub fn failed(&self) -> Option<Failed> {
        self.outcome.failed(BACKOFF)
    }

    /// The status of the condition `ManagerRolesGranted`.
    #[must_use]
    pub fn value(&self) -> &'static str {
        match self.outcome.reason {
            Reason::Suspended => "Unknown",
            Reason::ManagerRolesGranted => "True",
            _ => "False",
        }
    }
}

/// What is wrong with the roles, and the remedy.
#[must_use]
pub fn sentence(facts: &Facts, roles: &RoleOutcome) -> String {
    let reason = roles.outcome.reason;
    if reason.retry() == Retry::No {
        return reason.meaning().to_owned();
    }
    let violation = validate::manager_roles(&facts.user.spec).err();
    if let Some(violation) = violation.filter(|_| reason == Reason::InvalidSpec) {
        return format!("{} {violation} {}", reason.meaning(), reason.remedy());
    }
    let Some(scope) = roles.scope.as_deref() else {
        return reason.advice();
    };
    let entries = &facts.user.spec.manager_roles;
    let index = entries
        .iter()
        .position(|entry| RoleScope::of(entry).as_ref() == Some(scope));
    let place = match index {
        Some(index) => format!("spec.managerRoles[{index}]"),
        None => format!("Roles to revoke, {scope}"),
    };
    let denied = if reason == Reason::ManagerRolesDenied {
        denied(facts, scope)
    } else {
        String::new()
    };
    format!("{place}: {}{denied} {}", reason.meaning(), reason.remedy())
}

fn denied(facts: &Facts, scope: &RoleScope) -> String {
    let Ok(allowed) = &facts.allowed else {
        return String::new();
    };
    let wanted = wanted(&facts.user.spec, allowed);
    let entry = wanted.into_iter().find(|wanted| wanted.scope == *scope);
    let denied: Vec<String> = entry.into_iter().flat_map(|entry| entry.denied).collect();
    match denied.split_at_checked(MOST_DENIED) {
        Some((first, [_, ..])) => format!(" Denied: {} and {} more.", first.join(", "), denied.len() - MOST_DENIED),
        _ => format!(" Denied: {}.", denied.join(", ")),
    }
}

/// An Event when the roles begin to fail for a reason that lasts.
#[must_use]
pub fn event(facts: &Facts, roles: &RoleOutcome, before: &ZitadelServiceUserStatus) -> Option<EventDraft> {
    let reason = roles.outcome.reason;
    let text = sentence(facts, roles);
    let is_told = before
        .conditions
        .iter()
        .any(|c| c.type_ == MANAGER_ROLES_GRANTED && c.message == text);
    (reason.is_permanent() && !is_told).then_some(EventDraft {
        warning: true,
        reason,
        text,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::domain::fixtures::facts;

    #[test]
    fn message_names_the_entry_and_what_is_denied() {
        let mut facts = facts(&["a"]);
        Arc::make_mut(&mut facts.user).spec.manager_roles = serde_json::from_value(json!([
            {"instance": true, "roles": ["IAM_OWNER", "IAM_OWNER_VIEWER"]},
            {"organizationID": "1", "roles": ["ORG_OWNER"]},
        ]))
        .expect("roles");
        let outcome = |reason, scope| RoleOutcome {
            outcome: Progress::new(reason),
            scope,
        };
        let organization = |id: &str| Some(Box::new(RoleScope::Organization(id.into())));
        for (reason, scope, begins, contains) in [
            (
                Reason::ManagerRolesDenied,
                Some(Box::new(RoleScope::Instance)),
                "spec.managerRoles[0]: ",
                "Denied: IAM_OWNER, IAM_OWNER_VIEWER.",
            ),
            (
                Reason::ManagerRolesRejected,
                organization("1"),
                "spec.managerRoles[1]: ",
                "Correct the entry",
            ),
            (
                Reason::AdminForbidden,
                organization("2"),
                "Roles to revoke, organization 2: ",
                "Give it the role",
            ),
            (
                Reason::CredentialMissing,
                None,
                "The ZitadelInstance has no",
                "create the Secret",
            ),
        ] {
            let text = sentence(&facts, &outcome(reason, scope.clone()));
            assert!(text.starts_with(begins) && text.contains(contains), "{text}");
            let told = event(&facts, &outcome(reason, scope), &ZitadelServiceUserStatus::default());
            assert!(told.is_some_and(|event| event.text.len() <= 1024), "{text}");
        }
        let granted = outcome(Reason::ManagerRolesGranted, None);
        assert_eq!((granted.value(), granted.failed()), ("True", None));
    }
}
