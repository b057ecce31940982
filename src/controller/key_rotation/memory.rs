//! What this process remembers about keys: which ids each object uses, and which keys ZITADEL rejects. After a
//! restart no key counts as rejected, and what other objects use is read again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::domain::key_ledger::BootstrapKey;
use crate::domain::key_rotation::{KeyState, REJECTED_FOR, REJECTIONS};
use crate::domain::object_ref::ObjectRef;

/// The memory of all service users.
#[derive(Default)]
pub struct KeyMemory(Mutex<BTreeMap<ObjectRef, Keys>>);

#[derive(Default)]
struct Keys {
    /// The bootstrap keys: the one in the Secret, and the one that the rotation began with. `None` if they were not
    /// read, for example because no policy allows a token.
    bootstrap: Option<Vec<BootstrapKey>>,
    /// The ids of the keys that the operator made. `None` if the ledger was not read.
    made: Option<BTreeSet<String>>,
    rejected: BTreeMap<String, Rejections>,
}

struct Rejections {
    count: u32,
    first: Instant,
    last: Instant,
}

impl KeyMemory {
    /// Records the keys that `id` uses. Forgets the rejections of other keys.
    pub fn uses(&self, id: &ObjectRef, state: &KeyState) {
        let mut all = self.lock();
        let keys = all.entry(id.clone()).or_default();
        keys.bootstrap = Some(state.bootstrap_keys().collect());
        keys.made = Some(state.made_key_ids().map(str::to_owned).collect());
        let in_use: BTreeSet<&str> = state.key_ids().collect();
        keys.rejected.retain(|key_id, _| in_use.contains(&**key_id));
    }

    /// Records that the bootstrap key of `id` may have changed.
    pub fn unread(&self, id: &ObjectRef) {
        if let Some(keys) = self.lock().get_mut(id) {
            keys.bootstrap = None;
        }
    }

    /// Records the bootstrap key of an object that is not reconciled at present.
    pub fn learn_bootstrap(&self, id: &ObjectRef, keys: &[BootstrapKey]) {
        self.lock().entry(id.clone()).or_default().bootstrap = Some(keys.to_vec());
    }

    /// Records the keys that the operator made for an object that is not reconciled at present.
    pub fn learn_made<'a>(&self, id: &ObjectRef, key_ids: impl Iterator<Item = &'a str>) {
        let made = key_ids.map(str::to_owned).collect();
        self.lock().entry(id.clone()).or_default().made = Some(made);
    }

    /// Whether an object uses a bootstrap key. `None` if this process has not read its keys.
    #[must_use]
    pub fn uses_bootstrap(&self, id: &ObjectRef, key: &BootstrapKey) -> Option<bool> {
        let all = self.lock();
        let known = all.get(id)?.bootstrap.as_ref()?;
        Some(known.iter().any(|other| other.is(key)))
    }

    /// Whether this process knows which keys the operator made for an object.
    #[must_use]
    pub fn knows_made(&self, id: &ObjectRef) -> bool {
        self.lock().get(id).is_some_and(|keys| keys.made.is_some())
    }

    /// Whether the operator made keys for an object, as far as this process knows.
    #[must_use]
    pub fn has_made(&self, id: &ObjectRef) -> bool {
        let all = self.lock();
        let made = all.get(id).and_then(|keys| keys.made.as_ref());
        made.is_some_and(|made| !made.is_empty())
    }

    /// Whether the operator made the key for any object, as far as this process knows.
    #[must_use]
    pub fn is_made(&self, key_id: &str) -> bool {
        let all = self.lock();
        let mut made = all.values().filter_map(|keys| keys.made.as_ref());
        made.any(|made| made.contains(key_id))
    }

    /// Records that ZITADEL rejected a key of `id`.
    pub fn rejected(&self, id: &ObjectRef, key_id: &str) {
        let mut all = self.lock();
        let keys = all.entry(id.clone()).or_default();
        let now = Instant::now();
        let rejections = keys.rejected.entry(key_id.to_owned()).or_insert(Rejections {
            count: 0,
            first: now,
            last: now,
        });
        rejections.count += 1;
        rejections.last = now;
    }

    /// Records that ZITADEL accepted a key of `id`.
    pub fn accepted(&self, id: &ObjectRef, key_id: &str) {
        if let Some(keys) = self.lock().get_mut(id) {
            keys.rejected.remove(key_id);
        }
    }

    /// Whether ZITADEL has rejected a key of `id` often enough, and for long enough, to use another one.
    #[must_use]
    pub fn is_rejected_for_long(&self, id: &ObjectRef, key_id: &str) -> bool {
        let all = self.lock();
        let rejections = all.get(id).and_then(|keys| keys.rejected.get(key_id));
        let long = Duration::try_from(REJECTED_FOR).unwrap_or_default();
        rejections.is_some_and(|it| it.count >= REJECTIONS && it.last.duration_since(it.first) >= long)
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.lock().clear();
    }

    /// Forgets an object that no longer exists or that this operator does not serve.
    pub fn forget(&self, id: &ObjectRef) {
        self.lock().remove(id);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ObjectRef, Keys>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::key::ServiceKey;

    fn keys(key_id: &str) -> KeyState {
        let bootstrap = crate::domain::fixtures::facts(&["a"]).key;
        KeyState {
            bootstrap: bootstrap.map(|key| ServiceKey {
                key_id: key_id.into(),
                ..key
            }),
            ledger: Ok(None),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn key_is_rejected_for_long_after_three_rejections_over_ten_minutes() {
        let (memory, id) = (KeyMemory::default(), ObjectRef::new("shop", "billing"));
        memory.uses(&id, &keys("k1"));
        let later = |minutes| tokio::time::advance(Duration::from_mins(minutes));
        for _ in 0..9 {
            memory.rejected(&id, "k1");
        }
        assert!(!memory.is_rejected_for_long(&id, "k1"), "nine rejections at once");
        later(10).await;
        assert!(
            !memory.is_rejected_for_long(&id, "k1"),
            "nothing was rejected for ten minutes"
        );
        memory.rejected(&id, "k1");
        assert!(memory.is_rejected_for_long(&id, "k1") && !memory.is_rejected_for_long(&id, "k2"));
        memory.accepted(&id, "k1");
        assert!(!memory.is_rejected_for_long(&id, "k1"));

        memory.rejected(&id, "k1");
        later(60).await;
        memory.rejected(&id, "k1");
        assert!(!memory.is_rejected_for_long(&id, "k1"), "two rejections over an hour");
        memory.rejected(&id, "k1");
        assert!(memory.is_rejected_for_long(&id, "k1"));
        memory.uses(&id, &keys("k2"));
        memory.uses(&id, &keys("k1"));
        assert!(
            !memory.is_rejected_for_long(&id, "k1"),
            "its rejections were forgotten with the key"
        );
    }

    #[test]
    fn keys_of_an_object_that_was_not_read_are_unknown() {
        let (memory, id) = (KeyMemory::default(), ObjectRef::new("shop", "billing"));
        let state = keys("k1");
        let key = state.bootstrap_keys().next().expect("a key");
        assert_eq!(memory.uses_bootstrap(&id, &key), None);
        memory.rejected(&id, "k1");
        assert_eq!(
            (memory.uses_bootstrap(&id, &key), memory.knows_made(&id)),
            (None, false)
        );
        memory.uses(&id, &state);
        assert_eq!(
            (memory.uses_bootstrap(&id, &key), memory.knows_made(&id)),
            (Some(true), true)
        );
        // The same id in the key file of somebody who does not have the private key.
        let forged = BootstrapKey {
            public_hash: "other".into(),
            ..key.clone()
        };
        assert_eq!(memory.uses_bootstrap(&id, &forged), Some(false));
        assert!(
            !memory.has_made(&id) && !memory.is_made("k1"),
            "the bootstrap key is not the operator's"
        );
        memory.unread(&id);
        // Only the operator changes which keys it made.
        assert_eq!((memory.uses_bootstrap(&id, &key), memory.knows_made(&id)), (None, true));
        memory.learn_bootstrap(&id, std::slice::from_ref(&key));
        memory.learn_made(&id, ["own-1"].into_iter());
        assert_eq!(memory.uses_bootstrap(&id, &key), Some(true));
        assert!(memory.has_made(&id) && memory.is_made("own-1"));
        memory.clear();
        assert_eq!(memory.uses_bootstrap(&id, &key), None);
    }
}
