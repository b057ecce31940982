//! What this process remembers of service users beside the Secrets: tokens that wait for their write, and what was
//! requested lately. It dies with the process: a crash costs the requests in flight.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use k8s_openapi::jiff::Timestamp;
use secrecy::ExposeSecret;

use crate::domain::facts::{CONTEST_WINDOW, UnwrittenToken};
use crate::domain::object_ref::ObjectRef;
use crate::domain::plan::MintRequest;

/// Bytes of tokens of one namespace that wait for their write. A token that finds no room is requested again once its
/// write is allowed.
const MAX_UNWRITTEN: usize = 1024 * 1024;

/// What is remembered of all service users, by name: a name that is used again keeps its memory.
#[derive(Default)]
pub struct Memory(Mutex<BTreeMap<ObjectRef, BTreeMap<String, TokenMemory>>>);

/// What is remembered of one token.
#[derive(Clone, Debug, Default)]
pub struct TokenMemory {
    /// A token that was requested and could not be written yet.
    pub unwritten: Option<Arc<UnwrittenToken>>,
    /// The last write failed: whether the next would be allowed is asked before a token is requested.
    pub write_failed: bool,
    /// Inputs and refresh time of the last token.
    pub last: Option<(String, Timestamp)>,
    /// A scheduled request was tried that was not counted, and no token came of it yet.
    pub tried: bool,
    /// When it was requested before its time, or its Secret repaired, within [`CONTEST_WINDOW`]: by a clock that nobody
    /// sets.
    pub unscheduled: Vec<Instant>,
}

impl Memory {
    /// What is remembered of an object. What its spec no longer names is forgotten.
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

    /// A token was requested. It is kept until it is written.
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

    /// Whether a scheduled request of this token need not be counted: one for each token that was issued. A record can be
    /// forged, and each change of the object begins its back-off anew.
    #[must_use]
    pub fn try_scheduled(&self, id: &ObjectRef, token: &str) -> bool {
        let mut all = self.lock();
        let memory = all.entry(id.clone()).or_default().entry(token.to_owned()).or_default();
        !std::mem::replace(&mut memory.tried, true)
    }

    /// The Secret of a token holds what it should.
    pub fn written(&self, id: &ObjectRef, token: &str) {
        if let Some(memory) = self.lock().get_mut(id).and_then(|tokens| tokens.get_mut(token)) {
            memory.unwritten = None;
            memory.write_failed = false;
        }
    }

    /// The write of a Secret failed.
    pub fn write_failed(&self, id: &ObjectRef, token: &str) {
        self.change(id, token, |memory| memory.write_failed = true);
    }

    /// A Secret was repaired that somebody had changed.
    pub fn repaired(&self, id: &ObjectRef, token: &str) {
        self.change(id, token, |memory| memory.unscheduled.push(Instant::now()));
    }

    /// The object is gone or is not ours.
    pub fn forget(&self, id: &ObjectRef) {
        self.lock().remove(id);
    }

    /// Keeps what is remembered of these objects only. A standby hears that objects go and reconciles none.
    pub fn retain(&self, is_there: impl Fn(&ObjectRef) -> bool) {
        self.lock().retain(|id, _| is_there(id));
    }

    fn change(&self, id: &ObjectRef, token: &str, change: impl FnOnce(&mut TokenMemory)) {
        let mut all = self.lock();
        change(all.entry(id.clone()).or_default().entry(token.to_owned()).or_default());
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ObjectRef, BTreeMap<String, TokenMemory>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
