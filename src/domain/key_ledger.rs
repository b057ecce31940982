//! The key ledger: which keys the operator has made for one service user, and in which state each of them is. It is the
//! content of a Secret in the operator's namespace, and all that a rotation needs to continue after a crash
//! (`docs/adr/0020-keys-rotate-by-a-ledger.md`). `key_rotation.rs` decides the next step.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use serde::{Deserialize, Serialize};

use crate::domain::key::{self, PrivateKey, ServiceKey};
use crate::domain::managed_user::Managed;
use crate::domain::reason::Reason;
use crate::domain::stored::Stored;

/// The version that the operator writes.
const VERSION: u32 = 1;

/// Entry of the Secret that holds everything but private keys.
const LEDGER: &str = "ledger.json";

/// Entries of the Secret that hold private keys (PKCS#8 DER), in the order of [`KeyLedger::own`].
const PRIVATE_KEYS: [&str; 3] = ["current.der", "pending.der", "previous.der"];

/// Past keys that are remembered. The operator never signs with a key of these ids again. Those that ZITADEL may still
/// have are few (`key_rotation::MOST_REPLACED`).
const MOST_PAST: usize = 32;

/// Longest rotate request, as `Facts::rotate_request` shortens it.
const MAX_REQUEST: usize = 256;

/// All keys of one service user that the operator has made, and the bootstrap key. All times are by the server's clock.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(rename_all = "camelCase")]
pub struct KeyLedger {
    /// Version of this format.
    v: u32,
    /// Namespace and name of the object, for people who read the Secret.
    pub object: String,
    /// Name of the instance that the keys belong to.
    pub instance: String,
    /// Its issuer.
    pub issuer: String,
    /// The ZITADEL user that the keys belong to.
    pub user_id: String,
    /// Where the operator may send what these keys sign, in the words of `admin_credential::destination`. Only of an
    /// administrator's keys.
    #[serde(default)]
    pub send_to: Option<String>,
    /// The key that a person put in. `None` if the operator created the user.
    #[serde(default)]
    pub bootstrap: Option<BootstrapKey>,
    /// The user, if the operator created it.
    #[serde(default)]
    pub managed: Option<Managed>,
    /// The key that the operator signs with.
    pub current: Option<OwnKey>,
    /// A key that is not proven yet.
    pub pending: Option<OwnKey>,
    /// The key before the current one. It still works until the overlap has passed.
    pub previous: Option<OwnKey>,
    /// Keys before that, oldest first.
    #[serde(default)]
    pub past: Vec<PastKey>,
    /// Whether everything that the last rotation replaced is gone at ZITADEL.
    pub settled: bool,
    /// The number of keys and personal access tokens that are not of the operator, at the last two counts.
    #[serde(default)]
    pub foreign: Option<ForeignCount>,
    /// The last rotate request that was served.
    #[serde(default)]
    pub request: Option<String>,
    /// The rotate request that the pending key serves. A later request needs a key that is newer than it.
    #[serde(default)]
    pub pending_request: Option<String>,
}

impl BootstrapKey {
    /// A key that still signs.
    #[must_use]
    pub fn of(key: &ServiceKey) -> Self {
        Self {
            key_id: key.key_id.clone(),
            public_hash: key.public_hash.clone(),
            replaced_at: None,
            removed: false,
        }
    }

    /// Whether both are the same key.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        self.key_id == other.key_id && self.public_hash == other.public_hash
    }
}

/// The key that a person put in.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(rename_all = "camelCase")]
pub struct BootstrapKey {
    /// Its id.
    pub key_id: String,
    /// A hash of its public half.
    pub public_hash: String,
    /// When a key of the operator was first used instead of it.
    pub replaced_at: Option<Timestamp>,
    /// Whether the operator removed it at ZITADEL.
    pub removed: bool,
}

/// A key that the operator made.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(rename_all = "camelCase")]
pub struct OwnKey {
    /// Its id at ZITADEL. `None` if the operator does not know yet whether ZITADEL has the key.
    pub key_id: Option<String>,
    /// When it expires. The microseconds are random: ZITADEL lists only ids and dates of keys, and this date tells the
    /// operator's own keys from others (`docs/adr/0020-keys-rotate-by-a-ledger.md`).
    pub expires_at: Timestamp,
    /// When it entered its present state.
    pub since: Timestamp,
    /// The private key. Stored in an entry of its own.
    #[serde(skip, default = "missing")]
    pub private: PrivateKey,
}

/// A key that the operator made and no longer signs with.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct PastKey {
    /// Its id, if it was known.
    pub key_id: Option<String>,
    /// When it expires.
    pub expires_at: Timestamp,
    /// Whether it is gone at ZITADEL.
    pub removed: bool,
}

/// Two counts of the keys and personal access tokens that are not of the operator.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ForeignCount {
    /// At the last rotation.
    pub now: usize,
    /// At the rotation before.
    pub before: usize,
}

/// A key as ZITADEL lists it.
#[derive(Clone, Debug, PartialEq)]
pub struct ListedKey {
    /// Its id.
    pub key_id: String,
    /// When it expires.
    pub expires_at: Option<Timestamp>,
}

/// A key ledger in its Secret.
pub type StoredKeys = Stored<KeyLedger>;

fn missing() -> PrivateKey {
    SecretSlice::default()
}

impl KeyLedger {
    /// A ledger without keys of the operator.
    #[must_use]
    pub fn new(object: String, instance: &str, issuer: &str, bootstrap: &ServiceKey) -> Self {
        Self {
            bootstrap: Some(BootstrapKey::of(bootstrap)),
            ..Self::empty(object, instance, issuer, bootstrap.user_id.clone())
        }
    }

    /// A ledger of a user that does not exist yet.
    #[must_use]
    pub fn of_user(object: String, instance: &str, issuer: &str, user_id: String, managed: Managed) -> Self {
        Self {
            managed: Some(managed),
            ..Self::empty(object, instance, issuer, user_id)
        }
    }

    fn empty(object: String, instance: &str, issuer: &str, user_id: String) -> Self {
        Self {
            v: VERSION,
            object,
            instance: instance.to_owned(),
            issuer: issuer.to_owned(),
            user_id,
            send_to: None,
            bootstrap: None,
            managed: None,
            current: None,
            pending: None,
            previous: None,
            past: Vec::new(),
            settled: true,
            foreign: None,
            request: None,
            pending_request: None,
        }
    }

    fn is_bootstrap(&self, key_id: &str) -> bool {
        self.bootstrap.as_ref().is_some_and(|key| key.key_id == key_id)
    }

    /// Whether the Secret of a ledger has an entry with this name.
    #[must_use]
    pub fn has_entry(name: &str) -> bool {
        name == LEDGER || PRIVATE_KEYS.contains(&name)
    }

    /// Reads a ledger from the data of its Secret. A ledger without a readable current key is invalid: it was edited.
    pub fn parse(data: &BTreeMap<String, SecretSlice<u8>>) -> Result<Self, Reason> {
        let text = data.get(LEDGER).ok_or(Reason::KeyLedgerInvalid)?;
        // The parser's error could quote the Secret.
        let ledger = serde_json::from_slice(text.expose_secret()).map_err(|_| Reason::KeyLedgerInvalid);
        let mut ledger: Self = ledger?;
        let mut lost = Vec::new();
        let ids = ledger.key_ids().chain([&*ledger.user_id]).all(key::is_plain_id);
        // Two keys with one id, or a replaced bootstrap key without a current key, would be settled without end.
        let named = ledger.own().filter_map(|key| key.key_id.as_deref());
        let named = named.chain(ledger.bootstrap.as_ref().map(|key| &*key.key_id));
        let named: Vec<&str> = named.collect();
        let distinct = named.iter().collect::<BTreeSet<_>>().len() == named.len();
        let replaced = ledger.bootstrap.as_ref().is_some_and(|key| key.replaced_at.is_some());
        let consistent = distinct && (ledger.current.is_some() || !replaced);
        let renewed = ledger.managed.iter().filter_map(|managed| managed.request.as_ref());
        let mut requests = ledger.request.iter().chain(&ledger.pending_request).chain(renewed);
        let requests = requests.all(|request| request.len() <= MAX_REQUEST);
        // Only a pending key may be unknown to ZITADEL.
        let known = [&ledger.current, &ledger.previous];
        let known = known.into_iter().flatten().all(|key| key.key_id.is_some());
        if ledger.v != VERSION || !ids || !requests || !known || !consistent || ledger.past.len() > MOST_PAST {
            return Err(Reason::KeyLedgerInvalid);
        }
        let readable = |entry: &str| data.get(entry).filter(|private| key::signing(private).is_some());
        let [current, pending, previous] = PRIVATE_KEYS.map(readable);
        if let Some(key) = &mut ledger.current {
            key.private = current.ok_or(Reason::KeyLedgerInvalid)?.clone();
        }
        // Without its private half, a pending or previous key is of no use but must still be removed at ZITADEL.
        for (key, private) in [(&mut ledger.pending, pending), (&mut ledger.previous, previous)] {
            match (key.take(), private) {
                (Some(mut own), Some(private)) => {
                    own.private = private.clone();
                    *key = Some(own);
                }
                (Some(own), None) => lost.push(own),
                (None, _) => {}
            }
        }
        for own in lost {
            ledger.push_past(own, false);
            ledger.settled = false;
        }
        Ok(ledger)
    }

    /// The data of its Secret.
    #[must_use]
    pub fn data(&self) -> BTreeMap<&'static str, SecretSlice<u8>> {
        // A struct of strings, numbers and times always serializes.
        let text = SecretString::from(serde_json::to_string_pretty(self).unwrap_or_default());
        let own = [&self.current, &self.pending, &self.previous];
        let private = own.into_iter().zip(PRIVATE_KEYS);
        let private = private.filter_map(|(key, entry)| Some((entry, key.as_ref()?.private.clone())));
        private
            .chain([(LEDGER, text.expose_secret().as_bytes().to_vec().into())])
            .collect()
    }

    /// The keys whose private half the operator has: the current, the pending and the previous one.
    pub fn own(&self) -> impl Iterator<Item = &OwnKey> {
        [&self.current, &self.pending, &self.previous].into_iter().flatten()
    }

    /// The known ids of the keys that the operator made.
    pub fn made_key_ids(&self) -> impl Iterator<Item = &str> {
        let own = self.own().filter_map(|key| key.key_id.as_deref());
        let past = self.past.iter().filter_map(|key| key.key_id.as_deref());
        own.chain(past)
    }

    /// All known ids, that of the bootstrap key included.
    pub fn key_ids(&self) -> impl Iterator<Item = &str> {
        self.made_key_ids()
            .chain(self.bootstrap.as_ref().map(|key| &*key.key_id))
    }

    /// The number of keys that the operator replaced or gave up, and that still work at ZITADEL for all it knows.
    #[must_use]
    pub fn replaced_keys(&self, now: Timestamp) -> usize {
        let past = self
            .past
            .iter()
            .filter(|key| !key.removed && key.expires_at > now)
            .count();
        past + usize::from(self.previous.is_some())
    }

    /// The operator's keys that ZITADEL may still have: their ids, or else when they expire.
    #[must_use]
    pub fn left_keys(&self) -> Vec<String> {
        let own = self.own().map(|key| (&key.key_id, key.expires_at));
        let past = self.past.iter().filter(|key| !key.removed);
        let past = past.map(|key| (&key.key_id, key.expires_at));
        // ZITADEL may have a key whose id the operator did not learn.
        let name = |(id, at): (&Option<String>, Timestamp)| id.clone().unwrap_or(format!("that expires at {at}"));
        own.chain(past).map(name).collect()
    }

    /// Whether the keys belong to this user of this issuer.
    #[must_use]
    pub fn is_of(&self, issuer: &str, user_id: &str) -> bool {
        self.issuer == issuer && self.user_id == user_id
    }

    /// Whether the annotations of a Secret with this key may say where the operator sends what its own keys sign: the
    /// destination is the one of the ledger, or the key is the one that the rotation began with. Otherwise a person who
    /// can create a Secret for the instance could have assertions of the administrator sent to a host of their own.
    #[must_use]
    pub fn is_bound_by(&self, key: &ServiceKey, issuer: &str, destination: &str) -> bool {
        let is_bootstrap = |own: &BootstrapKey| own.is(&BootstrapKey::of(key));
        self.issuer != issuer
            || self.send_to.as_deref() == Some(destination)
            || self.bootstrap.as_ref().is_some_and(is_bootstrap)
    }

    /// Whether the operator has removed or replaced the key with this id, so that it must not sign with it again.
    #[must_use]
    pub fn is_retired(&self, key_id: &str) -> bool {
        let removed_bootstrap = self
            .bootstrap
            .as_ref()
            .is_some_and(|key| key.removed && key.key_id == key_id);
        let replaced = self.previous.iter().filter_map(|key| key.key_id.as_deref());
        let past = self.past.iter().filter_map(|key| key.key_id.as_deref());
        removed_bootstrap || replaced.chain(past).any(|id| id == key_id)
    }

    /// The current key, ready to sign.
    #[must_use]
    pub fn current_key(&self) -> Option<ServiceKey> {
        self.current.as_ref().and_then(|own| self.service_key(own))
    }

    /// An own key, ready to sign. `None` if its id is not known.
    #[must_use]
    pub fn service_key(&self, own: &OwnKey) -> Option<ServiceKey> {
        let (signing, public_hash) = key::signing(&own.private)?;
        Some(ServiceKey {
            user_id: self.user_id.clone(),
            key_id: own.key_id.clone()?,
            expires: Some(own.expires_at),
            signing,
            public_hash,
            // Without a bootstrap key, tokens belong to the user.
            bootstrap_id: Some(self.bootstrap.as_ref().map_or(&self.user_id, |key| &key.key_id).clone()),
        })
    }

    /// Whether a listed key is one that the operator made: its id is known, or its date is that of a key that the
    /// operator made.
    #[must_use]
    pub fn is_own(&self, listed: &ListedKey) -> bool {
        let past = self.past.iter().map(|key| (key.key_id.as_deref(), key.expires_at));
        let own = self.own().map(|key| (key.key_id.as_deref(), key.expires_at));
        let mut all = own.chain(past);
        !self.is_bootstrap(&listed.key_id)
            && all.any(|(id, expires_at)| id == Some(&*listed.key_id) || listed.expires_at == Some(expires_at))
    }

    /// The id of the pending key, if ZITADEL lists it.
    #[must_use]
    pub fn find_pending<'a>(&self, listed: &'a [ListedKey]) -> Option<&'a str> {
        let pending = self.pending.as_ref()?;
        let mut listed = listed.iter();
        listed
            .find(|key| key.expires_at == Some(pending.expires_at))
            .map(|key| &*key.key_id)
    }

    /// The ids of the keys to remove at ZITADEL after a rotation: of every key that the operator made, except the current
    /// one, the pending one and the one that signs (`keep`). The key proven last is one of these, so it always stays.
    #[must_use]
    pub fn replaced(&self, listed: &[ListedKey], keep: &str) -> BTreeSet<String> {
        let kept = [&self.current, &self.pending];
        let kept = kept.map(|key| key.as_ref().and_then(|key| key.key_id.as_deref()));
        // While the id of the pending key is unknown, a key with its date may be it.
        let unknown = self.pending.as_ref().filter(|key| key.key_id.is_none());
        let unknown = unknown.map(|key| key.expires_at);
        let listed = listed.iter().filter(|key| self.is_own(key));
        let listed = listed.filter(|key| unknown.is_none() || key.expires_at != unknown);
        let all = listed.map(|key| &*key.key_id).chain(self.unremoved_key_ids());
        all.filter(|id| *id != keep && !kept.contains(&Some(*id)))
            .map(str::to_owned)
            .collect()
    }

    /// The ids of the operator's keys that ZITADEL may still have. A list may lack one that was added a moment ago.
    pub fn unremoved_key_ids(&self) -> impl Iterator<Item = &str> {
        let own = self.own().filter_map(|key| key.key_id.as_deref());
        let past = self.past.iter().filter(|key| !key.removed);
        let all = own.chain(past.filter_map(|key| key.key_id.as_deref()));
        all.filter(|id| !self.is_bootstrap(id))
    }

    /// Has another key of a person take the place of the bootstrap key.
    pub fn adopt(&mut self, bootstrap: &ServiceKey) {
        self.bootstrap = Some(BootstrapKey::of(bootstrap));
    }

    /// Has the bootstrap key sign again. The operator's keys are still to be removed.
    pub fn give_way_to(&mut self, bootstrap: &ServiceKey) {
        self.forget_previous(false);
        self.previous = self.current.take();
        self.forget_previous(false);
        self.settled = false;
        self.adopt(bootstrap);
    }

    /// Adds a generated key, which ZITADEL does not know yet.
    pub fn begin(&mut self, private: PrivateKey, expires_at: Timestamp, request: Option<String>, now: Timestamp) {
        self.pending_request = request;
        self.pending = Some(OwnKey {
            key_id: None,
            expires_at,
            since: now,
            private,
        });
    }

    /// Records that ZITADEL has the pending key.
    pub fn register(&mut self, key_id: &str, now: Timestamp) {
        if let Some(pending) = &mut self.pending {
            pending.key_id = Some(key_id.to_owned());
            pending.since = now;
        }
    }

    /// Records that the pending key works. It becomes the current key.
    pub fn promote(&mut self, now: Timestamp) {
        let Some(mut proven) = self.pending.take() else {
            return;
        };
        proven.since = now;
        self.forget_previous(false);
        self.previous = self.current.replace(proven).map(|key| OwnKey { since: now, ..key });
        if let Some(bootstrap) = &mut self.bootstrap {
            bootstrap.replaced_at.get_or_insert(now);
        }
        self.settled = false;
        self.request = self.pending_request.take();
    }

    /// Drops the pending key. If ZITADEL has it, the next settlement removes it there.
    pub fn drop_pending(&mut self) {
        if let Some(pending) = self.pending.take() {
            self.push_past(pending, false);
            self.settled = false;
        }
    }

    /// Records that the previous and all past keys are gone at ZITADEL, except the one that signs (`keep`).
    pub fn settle(&mut self, keep: &str) {
        let previous = self.previous.as_ref().and_then(|key| key.key_id.as_deref());
        let is_kept = previous == Some(keep);
        if !is_kept {
            self.forget_previous(true);
        }
        for key in &mut self.past {
            key.removed = true;
        }
        self.settled = !is_kept;
    }

    /// Records the number of foreign credentials, or that ZITADEL does not tell it.
    pub fn count_foreign(&mut self, count: Option<usize>) {
        let before = self.foreign.map(|count| count.now);
        self.foreign = count.map(|now| ForeignCount {
            now,
            before: before.unwrap_or(now),
        });
    }

    fn forget_previous(&mut self, removed: bool) {
        if let Some(previous) = self.previous.take() {
            self.push_past(previous, removed);
        }
    }

    fn push_past(&mut self, key: OwnKey, removed: bool) {
        // Removed keys are forgotten first.
        if self.past.len() >= MOST_PAST {
            let place = self.past.iter().position(|key| key.removed).unwrap_or(0);
            self.past.remove(place);
        }
        self.past.push(PastKey {
            key_id: key.key_id,
            expires_at: key.expires_at,
            removed,
        });
    }
}

/// The expiry of a new key: after `lifetime`, with the given microseconds as its mark.
#[must_use]
pub fn marked_expiry(now: Timestamp, lifetime: SignedDuration, microseconds: u64) -> Timestamp {
    use crate::domain::time::{shifted, whole_seconds};
    let marker = SignedDuration::from_micros(i64::try_from(microseconds % 1_000_000).unwrap_or_default());
    shifted(whole_seconds(shifted(now, lifetime)), marker)
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::domain::fixtures::{at, facts};

    static PRIVATE: LazyLock<PrivateKey> = LazyLock::new(|| key::generate().expect("a key"));

    fn empty() -> KeyLedger {
        let bootstrap = facts(&["a"]).key.expect("a key");
        KeyLedger::new("shop/billing".into(), "main", "https://auth.example.com", &bootstrap)
    }

    /// A ledger after `rotations` rotations, the last of them not settled. Key `n` has the id `own-n`.
    fn rotated(rotations: i64) -> KeyLedger {
        let mut ledger = empty();
        for n in 1..=rotations {
            ledger.begin(PRIVATE.clone(), expiry(n), None, at(n));
            ledger.register(&format!("own-{n}"), at(n));
            ledger.promote(at(n));
        }
        ledger
    }

    fn expiry(n: i64) -> Timestamp {
        marked_expiry(at(n), SignedDuration::from_hours(1), 123_456)
    }

    fn listed(key_id: &str, expires_at: Option<Timestamp>) -> ListedKey {
        let key_id = key_id.to_owned();
        ListedKey { key_id, expires_at }
    }

    fn stored(ledger: &KeyLedger) -> BTreeMap<String, SecretSlice<u8>> {
        let data = ledger.data().into_iter();
        data.map(|(entry, value)| (entry.to_owned(), value)).collect()
    }

    #[test]
    fn ledger_survives_its_secret() {
        let mut ledger = rotated(3);
        ledger.begin(PRIVATE.clone(), expiry(9), None, at(9));
        let read = KeyLedger::parse(&stored(&ledger)).expect("a ledger");
        assert_eq!(
            read.data().into_keys().collect::<Vec<_>>(),
            ["current.der", "ledger.json", "pending.der", "previous.der"]
        );
        let text = |ledger: &KeyLedger| serde_json::to_value(ledger).expect("JSON");
        assert_eq!(text(&read), text(&ledger));
        assert_eq!(read.current_key().map(|key| key.key_id), Some("own-3".to_owned()));
        assert!(
            !text(&ledger).to_string().contains("MII"),
            "a private key in the readable part"
        );
        // The mark survives to the microsecond.
        assert_eq!(read.pending.map(|key| key.expires_at), Some(expiry(9)));
    }

    #[test]
    fn edited_ledger_is_invalid() {
        let good = stored(&rotated(2));
        assert!(KeyLedger::parse(&good).is_ok());
        let text = String::from_utf8(good[LEDGER].expose_secret().to_vec()).expect("text");
        let edits: [(&str, Option<String>); 7] = [
            (LEDGER, None),
            ("current.der", None),
            ("current.der", Some("x".into())),
            (LEDGER, Some("{}".into())),
            (LEDGER, Some(text.replace("\"v\": 1", "\"v\": 2"))),
            (LEDGER, Some(text.replace("\"own-2\"", "null"))),
            (LEDGER, Some(text.replace("own-1", "own-1/../other"))),
        ];
        for (entry, value) in edits {
            let mut data = good.clone();
            match &value {
                Some(value) => data.insert(entry.into(), value.clone().into_bytes().into()),
                None => data.remove(entry),
            };
            assert_eq!(
                KeyLedger::parse(&data).err(),
                Some(Reason::KeyLedgerInvalid),
                "{entry} {value:?}"
            );
        }
    }

    #[test]
    fn damaged_old_key_is_removed_and_the_current_one_still_signs() {
        let mut ledger = rotated(2);
        ledger.settle("");
        ledger.begin(PRIVATE.clone(), expiry(3), None, at(3));
        ledger.register("own-3", at(3));
        let mut data = stored(&ledger);
        data.insert("pending.der".into(), b"x".to_vec().into());
        let read = KeyLedger::parse(&data).expect("a ledger");
        assert_eq!(read.current_key().map(|key| key.key_id), Some("own-2".to_owned()));
        assert!(read.pending.is_none() && !read.settled);
        let list = [listed("own-2", Some(expiry(2))), listed("own-3", Some(expiry(3)))];
        assert_eq!(Vec::from_iter(read.replaced(&list, "")), ["own-3"]);
    }

    #[test]
    fn replaced_keys_are_never_signed_with_again() {
        let mut ledger = rotated(3);
        assert_eq!(
            ["k1", "own-1", "own-2", "own-3"].map(|id| ledger.is_retired(id)),
            [false, true, true, false]
        );
        ledger.bootstrap.as_mut().expect("a key").removed = true;
        assert!(ledger.is_retired("k1"));
        ledger.settle("");
        assert_eq!(
            ["own-1", "own-2", "own-3"].map(|id| ledger.is_retired(id)),
            [true, true, false]
        );
        assert!(ledger.previous.is_none() && ledger.settled);
    }

    #[test]
    fn key_that_was_added_twice_is_removed_once_another_is_proven() {
        // The process died after AddKey, or a stopped leader sent its request late: two keys have the same mark.
        let mut ledger = rotated(1);
        ledger.begin(PRIVATE.clone(), expiry(2), None, at(2));
        let list = [
            listed("own-1", Some(expiry(1))),
            listed("a", Some(expiry(2))),
            listed("b", Some(expiry(2))),
        ];
        // Before its id is known, no key with the mark is removed.
        assert!(ledger.replaced(&list, "").is_empty());
        assert_eq!(ledger.find_pending(&list), Some("a"));
        ledger.register("a", at(2));
        ledger.promote(at(2));
        assert_eq!(Vec::from_iter(ledger.replaced(&list, "")), ["b", "own-1"]);
    }

    #[test]
    fn bootstrap_key_is_never_taken_for_an_own_key() {
        let ledger = rotated(2);
        let listed = [listed("k1", Some(expiry(1)))];
        assert!(!ledger.is_own(&listed[0]));
        assert!(!ledger.replaced(&listed, "").contains("k1"));
    }

    #[test]
    fn key_that_the_list_lacks_is_removed_by_its_id_and_the_signer_stays() {
        let mut ledger = rotated(3);
        assert_eq!(Vec::from_iter(ledger.replaced(&[], "")), ["own-1", "own-2"]);
        // ZITADEL rejects the current key, and the one before it signs.
        assert_eq!(Vec::from_iter(ledger.replaced(&[], "own-2")), ["own-1"]);
        ledger.settle("own-2");
        assert_eq!(
            ledger.previous.as_ref().and_then(|key| key.key_id.as_deref()),
            Some("own-2")
        );
        assert!(ledger.replaced(&[], "own-2").is_empty());
        assert_eq!(ledger.replaced_keys(at(9)), 1);
    }

    #[test]
    fn keys_that_may_remain_are_named_by_id_or_expiry() {
        let mut ledger = rotated(2);
        ledger.begin(PRIVATE.clone(), expiry(3), None, at(3));
        let pending = format!("that expires at {}", expiry(3));
        assert_eq!(ledger.left_keys(), ["own-2", &pending, "own-1"]);
    }

    #[test]
    fn count_of_foreign_credentials_grows_only_against_the_last_count() {
        let mut ledger = rotated(1);
        for (count, now, before) in [(2, 2, 2), (3, 3, 2), (3, 3, 3), (1, 1, 3)] {
            ledger.count_foreign(Some(count));
            assert_eq!(ledger.foreign, Some(ForeignCount { now, before }));
        }
        ledger.count_foreign(None);
        assert_eq!(ledger.foreign, None);
    }

    #[test]
    fn ledger_stays_small() {
        let mut ledger = rotated(200);
        assert_eq!(ledger.past.len(), MOST_PAST);
        ledger.settle("");
        assert!(KeyLedger::parse(&stored(&ledger)).is_ok());
        // Keys that ZITADEL may still have outlive those that are gone.
        for n in 0..20 {
            ledger.begin(PRIVATE.clone(), expiry(n), None, at(n));
            ledger.drop_pending();
        }
        assert_eq!(ledger.past.iter().filter(|key| !key.removed).count(), 20);
    }

    proptest! {
        #[test]
        fn only_own_keys_are_removed_and_never_the_current_one(
            rotations in 1..6_i64,
            pending in 0..3,
            settled: bool,
            foreign in prop::collection::vec((0..9_u32, prop::option::of(0..1_000_000_000_i64)), 0..6),
            order: u64,
        ) {
            let mut ledger = rotated(rotations);
            if settled {
                ledger.settle("");
            }
            if pending > 0 {
                ledger.begin(PRIVATE.clone(), expiry(99), None, at(99));
            }
            if pending > 1 {
                ledger.register("own-99", at(99));
            }
            let mut list: Vec<_> = (1..=rotations).map(|n| listed(&format!("own-{n}"), Some(expiry(n)))).collect();
            list.push(listed("own-99", Some(expiry(99))));
            list.push(listed("k1", None));
            for (n, seconds) in &foreign {
                // Foreign dates have no such microseconds.
                let at = seconds.map(|s| Timestamp::from_second(s).expect("in range"));
                list.push(listed(&format!("foreign-{n}"), at));
            }
            let place = usize::try_from(order % 7).expect("small") % list.len();
            list.rotate_left(place);
            let removed = ledger.replaced(&list, "");
            prop_assert!(removed.iter().all(|id| id.starts_with("own-")));
            let current = format!("own-{rotations}");
            prop_assert!(!removed.contains(&current));
            prop_assert!(pending == 0 || !removed.contains("own-99"));
            for n in 1..rotations {
                prop_assert!(removed.contains(&format!("own-{n}")), "{n}");
            }
        }
    }
}
