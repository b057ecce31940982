//! When and how the operator replaces a key: the schedule, the next step, and the key that signs
//! (`docs/adr/0020-keys-rotate-by-a-ledger.md`). Each step depends only on the ledger, so that a rotation continues after
//! a crash.

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::api::service_user::{KeyRotation, ZitadelServiceUserSpec};
use crate::domain::hash;
use crate::domain::key::ServiceKey;
use crate::domain::key_ledger::{BootstrapKey, KeyLedger, OwnKey, StoredKeys};
use crate::domain::reason::{Reason, Subject};
use crate::domain::schedule::duration;
use crate::domain::time::shifted;

/// Name of the rotation among the backoffs of an object. No token can have this name.
pub const BACKOFF: &str = "keyRotation";

/// Replaced keys that may remain at ZITADEL. With more, they are removed before the next rotation, also before their
/// overlap has passed: otherwise a request in a loop would fill the user's list of keys.
const MOST_REPLACED: usize = 4;

/// Interval of a user that the operator created, if its spec has none.
const INTERVAL: SignedDuration = SignedDuration::from_hours(30 * 24);

/// Default overlap. It is half of the interval if that is shorter.
const OVERLAP: SignedDuration = SignedDuration::from_hours(1);

/// ZITADEL may not show yet what a request has changed. The operator waits this long before it adds a key again, or takes
/// a user for absent: changes took up to 750 ms, measured on one server
/// (`docs/reference/zitadel-protocol.md#eventual-consistency`).
const SHOWN_AFTER: SignedDuration = SignedDuration::from_secs(30);

/// A time this far in the future was written by a wrong clock.
const CLOCK_ERROR: SignedDuration = SignedDuration::from_mins(10);

/// A new key that ZITADEL still rejects after this time is given up.
const PROVEN_WITHIN: SignedDuration = SignedDuration::from_mins(10);

/// The operator gives up a key after this many rejections in a row...
pub const REJECTIONS: u32 = 3;

/// ... over at least this time. On newer servers a rejection can also be a failure of ZITADEL's database
/// (`docs/reference/zitadel-protocol.md#errors-of-the-token-endpoint`).
pub const REJECTED_FOR: SignedDuration = SignedDuration::from_mins(10);

/// The schedule of `spec.keyRotation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Time between two rotations.
    pub interval: SignedDuration,
    /// How long a replaced key stays at ZITADEL.
    pub overlap: SignedDuration,
    /// Lifetime of a key.
    pub lifetime: SignedDuration,
    /// Whether to remove the bootstrap key at ZITADEL.
    pub delete_bootstrap_key: bool,
}

/// The keys of an object as the operator read them.
#[derive(Clone, Debug)]
pub struct KeyState {
    /// The key in the Secret of the spec.
    pub bootstrap: Result<ServiceKey, Reason>,
    /// The ledger, if the operator has one for the object.
    pub ledger: Result<Option<StoredKeys>, Reason>,
}

impl KeyState {
    /// No key, for this reason.
    #[must_use]
    pub fn none(reason: Reason) -> Self {
        Self {
            bootstrap: Err(reason),
            ledger: Ok(None),
        }
    }

    /// The ledger, if there is one that can be read.
    #[must_use]
    pub fn stored(&self) -> Option<&StoredKeys> {
        self.ledger.as_ref().ok()?.as_ref()
    }

    /// Whether the operator knows which keys there are.
    #[must_use]
    pub fn are_read(&self) -> bool {
        let absent = |reason: &Reason| reason.subject() == Subject::Key;
        self.ledger.is_ok() && self.bootstrap.as_ref().err().is_none_or(absent)
    }

    /// The ids of the keys that the operator made.
    pub fn made_key_ids(&self) -> impl Iterator<Item = &str> {
        let ledger = self.ledger.iter().flatten();
        ledger.flat_map(|stored| stored.ledger.made_key_ids())
    }

    /// The key in the Secret, and the one that the rotation began with.
    pub fn bootstrap_keys(&self) -> impl Iterator<Item = BootstrapKey> {
        let in_secret = self.bootstrap.iter().map(BootstrapKey::of);
        let ledger = self.ledger.iter().flatten();
        in_secret.chain(ledger.filter_map(|stored| stored.ledger.bootstrap.clone()))
    }

    /// The ids of all keys.
    pub fn key_ids(&self) -> impl Iterator<Item = &str> {
        let bootstrap = self.bootstrap.iter().map(|key| &*key.key_id);
        let ledger = self.ledger.iter().flatten();
        bootstrap.chain(ledger.flat_map(|stored| stored.ledger.key_ids()))
    }
}

/// The next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing to do before this time.
    Wait(Option<Timestamp>),
    /// Generate a key and store it as pending.
    Begin,
    /// Find out whether ZITADEL has the pending key, and add it otherwise.
    Register,
    /// Request a token with the pending key.
    Prove,
    /// Remove at ZITADEL what the last rotation replaced.
    Settle,
    /// Remove all keys of the ledger at ZITADEL, then the ledger: they belong to another user or issuer.
    RemoveFormer,
    /// The same, because the object no longer rotates its key. The bootstrap key takes over.
    HandBack,
    /// Nothing to do before a person acts.
    Blocked(Reason),
}

impl Schedule {
    /// The schedule of an object: that of its spec, or the default one of a user that the operator created. `None` if the
    /// object does not rotate its key.
    #[must_use]
    pub fn of_spec(spec: &ZitadelServiceUserSpec) -> Option<Option<Self>> {
        match (&spec.key_rotation, &spec.user) {
            (Some(rotation), _) => Some(Self::of(rotation)),
            (None, Some(_)) => Some(Some(Self {
                interval: INTERVAL,
                overlap: OVERLAP,
                lifetime: INTERVAL * 3,
                delete_bootstrap_key: false,
            })),
            (None, None) => None,
        }
    }

    /// The schedule in the spec. `None` if it breaks a rule of the schema that keeps a key from expiring unreplaced.
    #[must_use]
    pub fn of(spec: &KeyRotation) -> Option<Self> {
        let interval = duration(&spec.interval)?;
        let overlap = match &spec.overlap {
            Some(overlap) => duration(overlap)?,
            None => OVERLAP.min(interval / 2),
        };
        let lifetime = match &spec.key_lifetime {
            Some(lifetime) => duration(lifetime)?,
            None => interval * 3,
        };
        let fits = interval > SignedDuration::ZERO && overlap < interval && lifetime > interval + overlap;
        fits.then_some(Self {
            interval,
            overlap,
            lifetime,
            delete_bootstrap_key: spec.delete_bootstrap_key == Some(true),
        })
    }

    /// When the current key is due for replacement: after the interval, up to a tenth earlier by a hash of `seed`, and
    /// in any case before the key expires.
    #[must_use]
    pub fn due(&self, current: &OwnKey, seed: &str) -> Timestamp {
        let jitter = self.interval.as_secs_f64() * 0.1 * hash::fraction(seed);
        let jitter = SignedDuration::try_from_secs_f64(jitter).unwrap_or_default();
        let on_schedule = shifted(current.since, self.interval - jitter);
        on_schedule.min(shifted(current.expires_at, -self.overlap))
    }

    /// When the keys that the last rotation replaced are to be removed.
    #[must_use]
    fn settles(&self, ledger: &KeyLedger) -> Option<Timestamp> {
        let overlapped = |since| shifted(since, self.overlap);
        if !ledger.settled {
            // An overdue bootstrap key waits too: it must not cut the overlap of the others short.
            let current = ledger.current.as_ref();
            return Some(current.map_or(Timestamp::MIN, |key| overlapped(key.since)));
        }
        let bootstrap = ledger.bootstrap.as_ref().filter(|key| !key.removed);
        let replaced = bootstrap.and_then(|key| key.replaced_at);
        replaced.filter(|_| self.delete_bootstrap_key).map(overlapped)
    }

    /// Whether the bootstrap key is to be removed at ZITADEL.
    #[must_use]
    pub fn removes_bootstrap(&self, ledger: &KeyLedger, now: Timestamp) -> bool {
        let bootstrap = ledger.bootstrap.as_ref().filter(|key| !key.removed);
        let replaced = bootstrap.and_then(|key| key.replaced_at);
        let overlapped = replaced.is_some_and(|at| shifted(at, self.overlap) <= now);
        self.delete_bootstrap_key && ledger.current.is_some() && overlapped
    }
}

/// The next step of the rotation. `request` is the object's rotate request, `seed` its UID.
#[must_use]
pub fn next(
    schedule: Option<&Schedule>,
    keys: &KeyState,
    issuer: &str,
    signer: &str,
    (request, seed): (Option<&str>, &str),
    now: Timestamp,
) -> Step {
    let ledger = match &keys.ledger {
        Err(reason) => return Step::Blocked(*reason),
        Ok(None) if schedule.is_some() => return Step::Begin,
        Ok(None) => return Step::Wait(None),
        Ok(Some(stored)) => &stored.ledger,
    };
    let bootstrap = keys.bootstrap.as_ref().ok();
    let user_id = bootstrap.map_or(&ledger.user_id, |key| &key.user_id);
    if !ledger.is_of(issuer, user_id) {
        return Step::RemoveFormer;
    }
    let Some(schedule) = schedule else {
        let is_own = |key: &ServiceKey| ledger.made_key_ids().any(|made| made == key.key_id);
        let usable = bootstrap.is_some_and(|key| !ledger.is_retired(&key.key_id) && !is_own(key));
        return if usable {
            Step::HandBack
        } else {
            Step::Blocked(Reason::BootstrapKeyNeeded)
        };
    };
    if let Some(pending) = &ledger.pending {
        return match pending.key_id {
            Some(_) => Step::Prove,
            None => Step::Register,
        };
    }
    let settles = schedule.settles(ledger);
    let current = ledger.current.as_ref();
    if ledger.replaced_keys(now) >= MOST_REPLACED {
        return Step::Settle;
    }
    let Some(current) = current else {
        // The first key was given up. It is removed before the next attempt.
        return if settles.is_some() { Step::Settle } else { Step::Begin };
    };
    let requested = request.is_some() && request != ledger.request.as_deref();
    // A key that ZITADEL rejects for long, or that has expired, is replaced with the help of another one. So is a key
    // from the future: the clock was wrong when it was made.
    let replaced = current.key_id.as_deref() != Some(signer) || current.since > shifted(now, CLOCK_ERROR);
    let due = if requested || replaced {
        now
    } else {
        schedule.due(current, seed)
    };
    if due <= now {
        return Step::Begin;
    }
    match settles {
        Some(at) if at <= now => Step::Settle,
        _ => Step::Wait(settles.into_iter().chain([due]).min()),
    }
}

/// Until when ZITADEL may not show what the operator made at `since`. `None` if that time has passed.
#[must_use]
pub fn lags_until(since: Timestamp, now: Timestamp) -> Option<Timestamp> {
    let at = shifted(since, SHOWN_AFTER);
    // A wrong clock may have written any time.
    (at > now && since <= now).then_some(at)
}

/// Whether the operator gives up the pending key: ZITADEL rejects it for too long, or it would expire before the next
/// rotation.
#[must_use]
pub fn is_hopeless(pending: &OwnKey, schedule: &Schedule, now: Timestamp) -> bool {
    match pending.key_id {
        Some(_) => shifted(pending.since, PROVEN_WITHIN) <= now || pending.since > shifted(now, CLOCK_ERROR),
        None => pending.expires_at <= shifted(now, schedule.interval + schedule.overlap),
    }
}

/// The key that signs: the current key of the operator, or else the bootstrap key. The operator goes back to an older
/// key only if `is_unusable` says that ZITADEL rejects the current one for long or that it has expired, and never to a
/// bootstrap key that it has retired. A bootstrap key of another user or issuer wins at once.
pub fn signer(keys: &KeyState, issuer: &str, is_unusable: impl Fn(&ServiceKey) -> bool) -> Result<ServiceKey, Reason> {
    let Ok(Some(StoredKeys { ledger, .. })) = &keys.ledger else {
        return keys.bootstrap.clone();
    };
    let bootstrap = keys.bootstrap.as_ref().ok();
    let user_id = bootstrap.map_or(&ledger.user_id, |key| &key.user_id);
    if !ledger.is_of(issuer, user_id) {
        return keys.bootstrap.clone();
    }
    let Some(current) = ledger.current_key() else {
        return keys.bootstrap.clone();
    };
    if !is_unusable(&current) {
        return Ok(current);
    }
    let previous = ledger.previous.as_ref().and_then(|own| ledger.service_key(own));
    let is_own = |key: &ServiceKey| ledger.made_key_ids().any(|made| made == key.key_id);
    let bootstrap = bootstrap.filter(|key| !ledger.is_retired(&key.key_id) && !is_own(key));
    let bootstrap = bootstrap.cloned();
    let mut others = previous.into_iter().chain(bootstrap);
    Ok(others.find(|key| !is_unusable(key)).unwrap_or(current))
}

/// Whether the operator replaces the key in time while the condition `KeyRotated` has this reason.
#[must_use]
pub fn replaces_in_time(reason: Reason) -> bool {
    use Reason::{BootstrapKeyInUse, KeyRotationInProgress, KeyRotationOnSchedule};
    matches!(
        reason,
        KeyRotationOnSchedule | KeyRotationInProgress | BootstrapKeyInUse
    )
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::domain::fixtures::{at, facts};
    use crate::domain::key::{self, PrivateKey};
    use crate::domain::key_ledger::marked_expiry;

    const ISSUER: &str = "https://auth.example.com";
    const HOUR: i64 = 3_600;

    static PRIVATE: LazyLock<PrivateKey> = LazyLock::new(|| key::generate().expect("a key"));

    fn schedule(spec: serde_json::Value) -> Option<Schedule> {
        Schedule::of(&serde_json::from_value(spec).expect("a rotation"))
    }

    fn hourly() -> Schedule {
        schedule(json!({"interval": "1h", "overlap": "10m"})).expect("a schedule")
    }

    fn bootstrap() -> ServiceKey {
        facts(&["a"]).key.expect("a key")
    }

    /// The keys after `change` of a ledger whose current key `own-1` was proven at 0.
    fn keys(change: impl FnOnce(&mut KeyLedger)) -> KeyState {
        let mut ledger = KeyLedger::new("shop/billing".into(), "main", ISSUER, &bootstrap());
        add(&mut ledger, "own-1", 0);
        ledger.promote(at(0));
        change(&mut ledger);
        KeyState {
            bootstrap: Ok(bootstrap()),
            ledger: Ok(Some(StoredKeys {
                ledger,
                uid: "u".into(),
                resource_version: "1".into(),
            })),
        }
    }

    fn add(ledger: &mut KeyLedger, key_id: &str, second: i64) {
        let expires = marked_expiry(at(second), SignedDuration::from_hours(3), 7);
        ledger.begin(PRIVATE.clone(), expires, None, at(second));
        if !key_id.is_empty() {
            ledger.register(key_id, at(second));
        }
    }

    fn step(schedule: Option<&Schedule>, keys: &KeyState, second: i64) -> Step {
        let signer = signer(keys, ISSUER, |_| false).map_or(String::new(), |key| key.key_id);
        next(schedule, keys, ISSUER, &signer, (None, "uid"), at(second))
    }

    #[test]
    fn schedule_needs_a_key_that_outlives_interval_and_overlap() {
        let hours = SignedDuration::from_hours;
        let default = schedule(json!({"interval": "720h"})).expect("a schedule");
        assert_eq!((default.overlap, default.lifetime), (hours(1), hours(2_160)));
        assert!(!default.delete_bootstrap_key);
        assert_eq!(hourly().lifetime, hours(3));
        assert_eq!(
            schedule(json!({"interval": "1h"})).map(|s| s.overlap),
            Some(SignedDuration::from_mins(30))
        );
        for invalid in [
            json!({"interval": "1h", "overlap": "1h"}),
            json!({"interval": "1h", "overlap": "30m", "keyLifetime": "90m"}),
            json!({"interval": "0s"}),
            json!({"interval": "x"}),
            json!({"interval": "1h", "keyLifetime": "1h"}),
        ] {
            assert_eq!(schedule(invalid.clone()), None, "{invalid}");
        }
        // The key of a created user has a bounded lifetime, also without keyRotation.
        let spec = |user: serde_json::Value| {
            let spec = json!({"instanceRef": {"name": "main"}, "tokens": [], "user": user});
            serde_json::from_value(spec).expect("a spec")
        };
        let created = Schedule::of_spec(&spec(json!({"organizationID": "1"}))).flatten();
        assert_eq!(
            created.map(|s| (s.interval, s.lifetime)),
            Some((hours(720), hours(2_160)))
        );
        assert_eq!(Schedule::of_spec(&spec(json!(null))), None);
    }

    proptest! {
        #[test]
        fn rotations_spread_and_precede_the_expiry(seed: u64, interval in 3_600..31_536_000_i64, lifetime in 1..4_i64) {
            let schedule = schedule(json!({"interval": format!("{interval}s"), "overlap": "10s"})).expect("a schedule");
            let mut ledger = KeyLedger::new(String::new(), "main", ISSUER, &bootstrap());
            let expires = marked_expiry(at(0), SignedDuration::from_secs(interval * lifetime / 2 + 20), 7);
            ledger.begin(PRIVATE.clone(), expires, None, at(0));
            let key = ledger.pending.expect("a key");
            let due = schedule.due(&key, &seed.to_string());
            prop_assert!(due <= at(interval) && due <= shifted(expires, -schedule.overlap));
            let earliest = at(interval * 9 / 10 - 1).min(shifted(expires, -schedule.overlap));
            prop_assert!(due >= earliest, "{due} {earliest}");
        }
    }

    #[test]
    fn steps_follow_from_the_ledger_alone() {
        let rotation = hourly();
        let rotates = Some(&rotation);
        let none = KeyState {
            bootstrap: Ok(bootstrap()),
            ledger: Ok(None),
        };
        assert_eq!(step(rotates, &none, 0), Step::Begin);
        assert_eq!(step(None, &none, 0), Step::Wait(None));
        let invalid = KeyState {
            ledger: Err(Reason::KeyLedgerInvalid),
            ..none
        };
        assert_eq!(step(rotates, &invalid, 0), Step::Blocked(Reason::KeyLedgerInvalid));

        // A crash after the key was stored, and one after ZITADEL had it.
        assert_eq!(step(rotates, &keys(|l| add(l, "", 9)), 9), Step::Register);
        assert_eq!(step(rotates, &keys(|l| add(l, "own-2", 9)), 9), Step::Prove);

        // What the rotation replaced is removed after the overlap, then the next rotation is due.
        assert_eq!(step(rotates, &keys(|_| ()), 9), Step::Wait(Some(at(600))));
        assert_eq!(step(rotates, &keys(|_| ()), 600), Step::Settle);
        let settled = keys(|l| l.settle(""));
        let Step::Wait(Some(due)) = step(rotates, &settled, 600) else {
            panic!("waits")
        };
        assert!(due > at(HOUR * 9 / 10 - 1) && due <= at(HOUR));
        assert_eq!(step(rotates, &settled, HOUR), Step::Begin);
        assert_eq!(step(rotates, &keys(|_| ()), HOUR), Step::Begin);

        // The bootstrap key is removed also if that is asked for later.
        let deletes = Schedule {
            delete_bootstrap_key: true,
            ..rotation
        };
        assert_eq!(step(Some(&deletes), &settled, 600), Step::Settle);
        assert!(!deletes.removes_bootstrap(
            &settled.ledger.as_ref().expect("a ledger").as_ref().expect("one").ledger,
            at(599)
        ));
        assert!(matches!(
            step(
                Some(&deletes),
                &keys(|l| {
                    l.settle("");
                    l.bootstrap.as_mut().expect("a key").removed = true;
                }),
                600
            ),
            Step::Wait(_)
        ));

        // Without keyRotation, the bootstrap key takes over, unless it is gone.
        assert_eq!(step(None, &settled, 600), Step::HandBack);
        let removed = keys(|l| l.bootstrap.as_mut().expect("a key").removed = true);
        assert_eq!(step(None, &removed, 600), Step::Blocked(Reason::BootstrapKeyNeeded));
    }

    #[test]
    fn overdue_bootstrap_key_does_not_shorten_the_overlap() {
        let deletes = Schedule {
            delete_bootstrap_key: true,
            ..hourly()
        };
        // The bootstrap key was replaced at 0, and is still in use elsewhere.
        let rotated = keys(|l| {
            l.settle("");
            add(l, "own-2", HOUR);
            l.promote(at(HOUR));
        });
        assert_eq!(step(Some(&deletes), &rotated, HOUR), Step::Wait(Some(at(HOUR + 600))));
        assert_eq!(step(Some(&deletes), &rotated, HOUR + 600), Step::Settle);
    }

    #[test]
    fn own_key_in_the_secret_cannot_take_over() {
        let mut copied = keys(|l| l.settle(""));
        copied.bootstrap = Ok(ServiceKey {
            key_id: "own-1".into(),
            ..bootstrap()
        });
        assert_eq!(step(None, &copied, 600), Step::Blocked(Reason::BootstrapKeyNeeded));
    }

    #[test]
    fn request_is_served_by_a_key_that_is_newer_than_it() {
        let rotation = hourly();
        let keys = keys(|l| {
            let expires = marked_expiry(at(1), SignedDuration::from_hours(3), 7);
            l.begin(PRIVATE.clone(), expires, None, at(1));
            l.register("own-2", at(1));
            // The request comes while the key is pending.
            l.promote(at(2));
            l.settle("");
        });
        let next = next(Some(&rotation), &keys, ISSUER, "own-2", (Some("1"), "uid"), at(9));
        assert_eq!(next, Step::Begin);
    }

    #[test]
    fn request_rotates_once() {
        let rotation = hourly();
        let keys = keys(|l| {
            l.settle("");
            l.request = Some("1".into());
        });
        let asked = |request| next(Some(&rotation), &keys, ISSUER, "own-1", (request, "uid"), at(9));
        assert_eq!(asked(Some("2")), Step::Begin);
        assert!(matches!(asked(Some("1")), Step::Wait(_)));
        assert!(matches!(asked(None), Step::Wait(_)));
    }

    #[test]
    fn keys_of_another_user_or_issuer_are_left() {
        let rotation = hourly();
        let mut other = keys(|_| ());
        other.bootstrap = Ok(ServiceKey {
            user_id: "8".into(),
            ..bootstrap()
        });
        assert_eq!(step(Some(&rotation), &other, 9), Step::RemoveFormer);
        assert_eq!(
            signer(&other, ISSUER, |_| false).map(|key| key.user_id),
            Ok("8".to_owned())
        );
        let moved = next(
            Some(&rotation),
            &keys(|_| ()),
            "https://other.example.com",
            "k1",
            (None, "uid"),
            at(9),
        );
        assert_eq!(moved, Step::RemoveFormer);
        assert_eq!(
            signer(&keys(|_| ()), "https://other.example.com", |_| false).map(|key| key.key_id),
            Ok("k1".to_owned())
        );
        // A missing Secret says nothing about the user.
        let missing = KeyState {
            bootstrap: Err(Reason::KeySecretMissing),
            ..keys(|_| ())
        };
        assert_eq!(
            signer(&missing, ISSUER, |_| false).map(|key| key.key_id),
            Ok("own-1".to_owned())
        );
    }

    #[test]
    fn operator_goes_back_only_from_a_key_that_is_given_up_and_never_to_a_retired_one() {
        let two = keys(|l| {
            add(l, "own-2", 9);
            l.promote(at(9));
        });
        let signs = |keys: &KeyState, given_up: &[&str]| {
            signer(keys, ISSUER, |key| given_up.contains(&&*key.key_id)).map(|key| key.key_id)
        };
        for (given_up, expected) in [
            (&[][..], "own-2"),
            (&["own-2"], "own-1"),
            (&["own-2", "own-1"], "k1"),
            (&["own-2", "own-1", "k1"], "own-2"),
        ] {
            assert_eq!(signs(&two, given_up), Ok(expected.to_owned()), "{given_up:?}");
        }
        let removed = keys(|l| l.bootstrap.as_mut().expect("a key").removed = true);
        assert_eq!(signs(&removed, &["own-1"]), Ok("own-1".to_owned()));
        // A new bootstrap key waits its turn.
        let mut new = keys(|l| l.bootstrap.as_mut().expect("a key").removed = true);
        new.bootstrap = Ok(ServiceKey {
            key_id: "k2".into(),
            ..bootstrap()
        });
        assert_eq!(signs(&new, &[]), Ok("own-1".to_owned()));
        assert_eq!(signs(&new, &["own-1"]), Ok("k2".to_owned()));
        assert_eq!(
            next(Some(&hourly()), &new, ISSUER, "k2", (None, "uid"), at(9)),
            Step::Begin
        );
        // An old key that somebody stored in the Secret is not used.
        new.bootstrap = Ok(ServiceKey {
            key_id: "own-1".into(),
            ..bootstrap()
        });
        let ledger = new.ledger.as_mut().expect("a ledger").as_mut().expect("one");
        add(&mut ledger.ledger, "own-2", 9);
        ledger.ledger.promote(at(9));
        ledger.ledger.settle("");
        assert_eq!(signs(&new, &["own-2"]), Ok("own-2".to_owned()));
    }

    #[test]
    fn pending_key_is_given_up_when_it_is_rejected_for_long_or_too_old() {
        let rotation = hourly();
        let pending = |key_id| {
            let mut ledger = KeyLedger::new(String::new(), "main", ISSUER, &bootstrap());
            add(&mut ledger, key_id, 0);
            ledger.pending.expect("a key")
        };
        for (key_id, second, hopeless) in [
            ("own-2", 599, false),
            ("own-2", 600, true),
            ("", 6_600, false),
            ("", 6_601, true),
        ] {
            assert_eq!(
                is_hopeless(&pending(key_id), &rotation, at(second)),
                hopeless,
                "{key_id} {second}"
            );
        }
        assert_eq!(lags_until(pending("").since, at(29)), Some(at(30)));
        assert_eq!(lags_until(pending("").since, at(30)), None);
    }
}
