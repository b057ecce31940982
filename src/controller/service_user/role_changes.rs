//! What this process changed of late of the manager roles of a user. ZITADEL replaces all roles of a user in a scope with each
//! change, and lists may not show the last one yet. Several objects can have one user: each of them would otherwise write
//! back the roles that another one has just revoked, and take them for roles that a person granted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use crate::domain::key_rotation::lags_until;
use crate::domain::manager_role::RoleScope;
use crate::domain::time::shifted;

/// A change is remembered for this time, which is longer than any lag.
const REMEMBERED: Duration = Duration::from_mins(1);

/// The recent changes of all users, by issuer and id of the user.
#[derive(Default)]
pub struct RoleChanges(Mutex<BTreeMap<(String, String), OneUser>>);

type OneUser = Arc<tokio::sync::Mutex<Recent>>;

/// The recent changes of one user.
#[derive(Default)]
pub struct Recent(Vec<Change>);

struct Change {
    scope: RoleScope,
    /// All roles that the user then has.
    roles: BTreeSet<String>,
    /// When it was requested.
    at: Instant,
}

impl RoleChanges {
    /// Waits until no other reconcile changes the roles of the user.
    pub async fn lock(&self, issuer: &str, user_id: &str) -> OwnedMutexGuard<Recent> {
        let user = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|_, user| Arc::strong_count(user) > 1 || user.try_lock().is_ok_and(|mut user| user.is_used()));
            all.entry((issuer.to_owned(), user_id.to_owned())).or_default().clone()
        };
        user.lock_owned().await
    }
}

impl Recent {
    fn is_used(&mut self) -> bool {
        self.0.retain(|change| change.at.elapsed() < REMEMBERED);
        !self.0.is_empty()
    }

    /// Records a change that was requested, whether or not ZITADEL carried it out.
    pub fn requested(&mut self, scope: &RoleScope, roles: &BTreeSet<String>) {
        self.shown(scope);
        self.0.push(Change {
            scope: scope.clone(),
            roles: roles.clone(),
            at: Instant::now(),
        });
    }

    /// Records that ZITADEL shows the last change in a scope.
    pub fn shown(&mut self, scope: &RoleScope) {
        self.0.retain(|change| change.scope != *scope);
    }

    /// Since when ZITADEL does not show the last change in a scope, and until when that may last, by the clock of `now`. `held`
    /// is what it shows.
    #[must_use]
    pub fn lags(&self, scope: &RoleScope, held: &BTreeSet<String>, now: Timestamp) -> Option<(Timestamp, Timestamp)> {
        let change = self.0.iter().find(|change| change.scope == *scope)?;
        if change.roles == *held {
            return None;
        }
        let waited = SignedDuration::try_from(change.at.elapsed()).ok()?;
        let since = shifted(now, -waited);
        Some((since, lags_until(since, now)?))
    }
}
