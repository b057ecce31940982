//! All decisions of the operator, as pure functions over plain data. This module has no I/O, no clock and no Kubernetes
//! client; `now` is an argument (`docs/adr/0016-one-package-with-rooms.md`).

pub mod access;
pub mod admin_credential;
pub mod allow_list;
pub mod allowance;
pub mod answer;
pub mod assertion;
pub mod backoff;
pub mod circuit_breaker;
pub mod clock_skew;
pub mod facts;
pub mod failure;
pub mod fair_queue;
#[cfg(test)]
pub(crate) mod fixtures;
pub mod hash;
pub mod instance_status;
pub mod key;
pub mod key_ledger;
pub mod key_rotation;
pub mod key_rotation_report;
pub mod limits;
pub mod managed_user;
pub mod manager_role;
pub mod object_ref;
pub mod observed_secret;
pub mod plan;
pub mod priority;
pub mod progress;
pub mod reason;
pub mod record;
pub mod refuser;
pub mod report;
pub mod retry;
pub mod role_ledger;
pub mod role_report;
pub mod schedule;
pub mod scope;
pub mod secret_draft;
pub mod stored;
pub mod summary;
pub mod time;
pub mod token_state;
pub mod user;
pub mod validate;
