//! State of service users that is only in memory: unwritten tokens and recent requests. It is lost when the process
//! ends, so a crash costs the requests in flight.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::jiff::Timestamp;
use secrecy::ExposeSecret;
use tokio::time::Instant;

use crate::controller::service_user::role_changes::RoleChanges;
use crate::domain::facts::{CONTEST_WINDOW, UnwrittenToken};
use crate::domain::manager_role::RoleScope;
use crate::domain::object_ref::ObjectRef;
use crate::domain::plan::MintRequest;

/// Most bytes of unwritten tokens per namespace. A token that exceeds the limit is dropped, and requested again once
/// its write is allowed.
const MAX_UNWRITTEN: usize = 1024 * 1024;

/// The memory of all service users, by namespace and name. A recreated object of the same name keeps it.
#[derive(Default)]
pub struct Memory {
    tokens: Mutex<BTreeMap<ObjectRef, BTreeMap<String, TokenMemory>>>,
    roles: Mutex<BTreeMap<ObjectRef, RoleMemory>>,
    /// The manager roles that were changed of late.
    pub role_changes: RoleChanges,
}

/// The memory of the manager roles of one object.
#[derive(Default)]
struct RoleMemory {
    /// UIDs of the objects of this name that have a ledger. A tenant can drop the finalizer and delete the object, but not
    /// the roles.
    ledgers: BTreeSet<String>,
    /// The scope of the last failure. The status names it until the next attempt.
    failed: Option<Box<RoleScope>>,
}

/// The memory of one token.
#[derive(Clone, Debug, Default)]
pub struct TokenMemory {
    /// A token that was issued and not written yet.
    pub unwritten: Option<Arc<UnwrittenToken>>,
    /// Whether the last write failed. If so, the operator checks whether a write is allowed before it requests a token.
    pub write_failed: bool,
    /// Request hash and refresh time of the last token.
    pub last: Option<(String, Timestamp)>,
    /// Whether one uncounted scheduled request was made since the last token was issued.
    pub tried: bool,
    /// Times of unscheduled refreshes and of repairs of the Secret within [`CONTEST_WINDOW`]. They are monotonic, so
    /// that a change of the wall clock does not affect them.
    pub unscheduled: Vec<Instant>,
}

impl Memory {
    /// The memory of an object. Forgets tokens that its spec no longer names.
    #[must_use]
    pub fn of(&self, id: &ObjectRef, names: &HashSet<&str>) -> BTreeMap<String, TokenMemory> {
        let mut all = self.lock();
        let Some(tokens) = all.get_mut(id) else {
            return BTreeMap::new();
        };
        tokens.retain(|name, memory| {
            memory.unscheduled.retain(|at| at.elapsed() < CONTEST_WINDOW);
            names.contains(name.as_str())
        });
        tokens.clone()
    }

    /// Records an issued token, which is kept until it is written.
    pub fn requested(
        &self,
        id: &ObjectRef,
        token: &str,
        request: &MintRequest,
        unwritten: UnwrittenToken,
        renew: Timestamp,
    ) {
        let mut all = self.lock();
        let mine = all.entry(id.clone()).or_default().entry(token.to_owned()).or_default();
        mine.unwritten = None;
        mine.tried = false;
        mine.last = Some((request.request_hash.clone(), renew));
        if request.unscheduled {
            mine.unscheduled.push(Instant::now());
        }
        let namespace = all
            .range(ObjectRef::new(&id.namespace, "")..)
            .take_while(|(other, _)| other.namespace == id.namespace);
        let waiting = namespace
            .flat_map(|(_, tokens)| tokens.values())
            .filter_map(|token| token.unwritten.as_deref());
        let size = |unwritten: &UnwrittenToken| unwritten.minted.token.expose_secret().len();
        if waiting.map(size).sum::<usize>() + size(&unwritten) <= MAX_UNWRITTEN
            && let Some(mine) = all.get_mut(id).and_then(|tokens| tokens.get_mut(token))
        {
            mine.unwritten = Some(Arc::new(unwritten));
        }
    }

    /// Whether a scheduled request of this token may go uncounted. This is allowed once per issued token: a record can
    /// be forged, and each change of the object resets its backoff.
    #[must_use]
    pub fn try_scheduled(&self, id: &ObjectRef, token: &str) -> bool {
        let mut all = self.lock();
        let memory = all.entry(id.clone()).or_default().entry(token.to_owned()).or_default();
        !std::mem::replace(&mut memory.tried, true)
    }

    /// Records that the Secret of a token is as intended.
    pub fn written(&self, id: &ObjectRef, token: &str) {
        if let Some(memory) = self.lock().get_mut(id).and_then(|tokens| tokens.get_mut(token)) {
            memory.unwritten = None;
            memory.write_failed = false;
        }
    }

    /// Records that the write of a Secret failed.
    pub fn write_failed(&self, id: &ObjectRef, token: &str) {
        self.change(id, token, |memory| memory.write_failed = true);
    }

    /// Records that the operator repaired a Secret that another writer had changed.
    pub fn repaired(&self, id: &ObjectRef, token: &str) {
        self.change(id, token, |memory| memory.unscheduled.push(Instant::now()));
    }

    /// Records whether the object with this UID has a role ledger.
    pub fn note_roles(&self, id: &ObjectRef, uid: &str, in_ledger: bool) {
        let mut all = self.roles();
        if in_ledger {
            all.entry(id.clone()).or_default().ledgers.insert(uid.to_owned());
        } else if let Some(roles) = all.get_mut(id) {
            roles.ledgers.remove(uid);
        }
    }

    /// UIDs of the objects of this name that have a role ledger, as far as this process knows.
    #[must_use]
    pub fn role_ledgers(&self, id: &ObjectRef) -> BTreeSet<String> {
        self.roles()
            .get(id)
            .map(|roles| roles.ledgers.clone())
            .unwrap_or_default()
    }

    /// Records the scope of the last failure, if it concerned one.
    pub fn note_failed_role(&self, id: &ObjectRef, scope: Option<Box<RoleScope>>) {
        self.roles().entry(id.clone()).or_default().failed = scope;
    }

    /// The scope of the last failure.
    #[must_use]
    pub fn failed_role(&self, id: &ObjectRef) -> Option<Box<RoleScope>> {
        self.roles().get(id)?.failed.clone()
    }

    /// Forgets an object that no longer exists or that this operator does not serve. Role ledgers are remembered until their
    /// roles are revoked.
    pub fn forget(&self, id: &ObjectRef) {
        self.forget_tokens(id);
        let mut all = self.roles();
        if all.get(id).is_some_and(|roles| roles.ledgers.is_empty()) {
            all.remove(id);
        }
    }

    /// Forgets the tokens of an object that is being deleted.
    pub fn forget_tokens(&self, id: &ObjectRef) {
        self.lock().remove(id);
    }

    /// Keeps only the memory of objects for which `is_there` returns true. A standby does not reconcile, so it does not
    /// forget deleted objects one by one.
    pub fn retain(&self, is_there: impl Fn(&ObjectRef) -> bool) {
        self.lock().retain(|id, _| is_there(id));
        self.roles()
            .retain(|id, roles| !roles.ledgers.is_empty() || is_there(id));
    }

    fn change(&self, id: &ObjectRef, token: &str, change: impl FnOnce(&mut TokenMemory)) {
        let mut all = self.lock();
        change(all.entry(id.clone()).or_default().entry(token.to_owned()).or_default());
    }

    fn roles(&self) -> MutexGuard<'_, BTreeMap<ObjectRef, RoleMemory>> {
        self.roles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ObjectRef, BTreeMap<String, TokenMemory>>> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
