//! What the status of an object and its Events say about the key rotation.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

use crate::api::ZitadelServiceUser;
use crate::api::metadata::{ANNOTATION_ABANDON, ROLE_LEDGER_PREFIX};
use crate::api::service_user::{
    FOREIGN_CREDENTIALS, KEY_ROTATED, KeyRotationStatus, READY, USER_READY, ZitadelServiceUserStatus,
};
use crate::domain::facts::Facts;
use crate::domain::key_ledger::{KeyLedger, ListedKey, OwnKey};
use crate::domain::key_rotation::Schedule;
use crate::domain::progress::Progress;
use crate::domain::reason::Reason;
use crate::domain::report::EventDraft;
use crate::domain::retry::Retry;
use crate::domain::time::whole_seconds;

/// The part of the status of an object that has a ledger. `seed` is its UID.
#[must_use]
pub fn status(ledger: &KeyLedger, schedule: Option<&Schedule>, seed: &str) -> KeyRotationStatus {
    let time = |at| Time(whole_seconds(at));
    let current = ledger.current.as_ref();
    let due = schedule
        .zip(current)
        .map(|(schedule, current)| schedule.due(current, seed));
    KeyRotationStatus {
        rotated_at: current.map(|current| time(current.since)),
        rotate_at: due.map(time),
        last_handled_rotate_request: ledger.request.clone(),
        foreign_credentials: ledger.foreign.and_then(|count| i32::try_from(count.now).ok()),
    }
}

/// The part of the status of a service user. `None` without a ledger.
#[must_use]
pub fn user_status(facts: &Facts) -> Option<KeyRotationStatus> {
    let schedule = Schedule::of_spec(&facts.user.spec).flatten();
    Some(status(ledger(facts)?, schedule.as_ref(), facts.uid()))
}

/// Kind, status and reason of a condition.
pub type KeyCondition = (&'static str, &'static str, Reason);

/// The conditions of an object that rotates its key.
///
/// | condition | status | reason |
/// |---|---|---|
/// | `KeyRotated` | whether the key is rotated on schedule; `Unknown` while suspended | `KeyRotationOnSchedule`, or why not |
/// | `ForeignCredentials` | whether the number of foreign credentials grew at the last count | `ForeignCredentials`, `NoForeignCredentials` |
#[must_use]
pub fn conditions(ledger: Option<&KeyLedger>, rotation: &Progress) -> Vec<KeyCondition> {
    let value = match rotation.reason {
        Reason::Suspended => "Unknown",
        reason if reason.retry() == Retry::No => "True",
        _ => "False",
    };
    let mut all = vec![(KEY_ROTATED, value, rotation.reason)];
    if let Some(count) = ledger.and_then(|ledger| ledger.foreign) {
        all.push(if count.now > count.before {
            (FOREIGN_CREDENTIALS, "True", Reason::ForeignCredentials)
        } else {
            (FOREIGN_CREDENTIALS, "False", Reason::NoForeignCredentials)
        });
    }
    all
}

/// The conditions of a service user: [`conditions`], and with `spec.user` the condition `UserReady`, whether the user exists
/// as the spec describes it and can get tokens. Its reason is `UserReady`, or why not. `is_inactive`: ZITADEL refuses a token
/// because of the state of the user.
#[must_use]
pub fn user_conditions(facts: &Facts, rotation: &Progress, is_inactive: bool) -> Vec<KeyCondition> {
    let mut all = conditions(ledger(facts), rotation);
    if facts.user.spec.user.is_some() {
        let exists = ledger(facts).and_then(|ledger| ledger.managed.as_ref());
        let is_ready = exists.is_some_and(|user| user.confirmed) && facts.key.is_ok();
        let user = if is_inactive || rotation.reason == Reason::UserInactive {
            (USER_READY, "False", Reason::UserInactive)
        } else if is_ready && !is_about_user(rotation.reason) {
            (USER_READY, "True", Reason::UserReady)
        } else {
            (USER_READY, "False", rotation.reason)
        };
        // After `KeyRotated`.
        all.insert(1, user);
    }
    all
}

/// Whether a reason says why the user in `spec.user` is not as the spec describes it.
#[must_use]
pub fn is_about_user(reason: Reason) -> bool {
    use Reason::{
        AdminForbidden, ClusterUnnamed, CredentialInvalid, CredentialMissing, CredentialNotBound, CredentialRejected,
        NotSupportedByServer, UserConflict, UserDenied, UserMissing, UserNotAdoptable, UserNotReady, UserRejected,
    };
    matches!(
        reason,
        AdminForbidden
            | ClusterUnnamed
            | CredentialInvalid
            | CredentialMissing
            | CredentialNotBound
            | CredentialRejected
            | NotSupportedByServer
            | UserConflict
            | UserDenied
            | UserMissing
            | UserNotAdoptable
            | UserNotReady
            | UserRejected
    )
}

/// An Event for each key that was replaced, for each reason why a rotation fails, and for foreign credentials.
#[must_use]
pub fn events(
    rotation: &Progress,
    status: &ZitadelServiceUserStatus,
    before: &ZitadelServiceUserStatus,
) -> Vec<EventDraft> {
    let mut events = Vec::new();
    if rotation.rotated {
        let key = status.key_id.as_deref().unwrap_or_default();
        events.push(EventDraft {
            warning: false,
            reason: Reason::KeyRotationOnSchedule,
            text: format!("The operator now uses the new key {key}."),
        });
    }
    let reason = |status: &ZitadelServiceUserStatus, kind: &str| {
        let condition = |condition: &&Condition| condition.type_ == kind;
        status
            .conditions
            .iter()
            .find(condition)
            .map(|condition| condition.reason.clone())
    };
    let is_news = |kind| reason(status, kind) != reason(before, kind);
    if rotation.reason.is_permanent() && is_news(KEY_ROTATED) {
        events.push(warning(rotation.reason));
    }
    let count = |status: &ZitadelServiceUserStatus| status.key_rotation.as_ref()?.foreign_credentials;
    let grew = reason(status, FOREIGN_CREDENTIALS).as_deref() == Some(Reason::ForeignCredentials.name());
    if grew && (is_news(FOREIGN_CREDENTIALS) || count(status) != count(before)) {
        events.push(warning(Reason::ForeignCredentials));
    }
    events
}

/// What became of a key that ZITADEL no longer accepts, as far as its list of the user's keys tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its time has passed.
    Expired,
    /// ZITADEL no longer lists it.
    Removed,
    /// ZITADEL lists it and it is unexpired.
    Listed,
}

impl Fate {
    /// The fate of a key.
    #[must_use]
    pub fn of(key: &OwnKey, listed: &[ListedKey], now: Timestamp) -> Self {
        let is_listed = listed.iter().any(|listed| Some(&listed.key_id) == key.key_id.as_ref());
        match is_listed {
            _ if key.expires_at <= now => Self::Expired,
            true => Self::Listed,
            false => Self::Removed,
        }
    }

    /// The text of the Event about the key.
    #[must_use]
    pub fn text(self, key_id: &str) -> String {
        let what = match self {
            Self::Expired => "It expired.",
            Self::Removed => "It was removed at ZITADEL.",
            Self::Listed => "It is unexpired, and ZITADEL still lists it.",
        };
        format!("{} Key {key_id}: {what}", Reason::KeyLost.advice())
    }
}

/// Why the deletion of an object waits: a merge patch of its status, and the sentence. `roles` says which manager roles it
/// waits for, if it does.
#[must_use]
pub fn deletion_waits(
    user: &ZitadelServiceUser,
    reason: Reason,
    roles: Option<&str>,
    now: Timestamp,
) -> (serde_json::Value, String) {
    let uid = user.metadata.uid.as_deref().unwrap_or_default();
    let why = match reason {
        Reason::KeyRejected => {
            "ZITADEL rejects every key. If that lasts, the operator finishes the deletion within about half an hour."
                .to_owned()
        }
        _ => reason.advice(),
    };
    let begins = "The deletion waits until the operator has removed what it made at ZITADEL.";
    let text = match roles {
        Some(place) => format!(
            "{begins} {place}: {why} To delete the object and leave the roles, the platform team can delete the Secret {ROLE_LEDGER_PREFIX}{uid} in the operator's namespace."
        ),
        None => {
            format!("{begins} {why} To delete the object and leave that, annotate it with {ANNOTATION_ABANDON}: {uid}")
        }
    };
    let generation = user.metadata.generation;
    let condition = Condition {
        type_: READY.to_owned(),
        status: "False".to_owned(),
        reason: reason.name().to_owned(),
        message: text.clone(),
        observed_generation: generation,
        last_transition_time: Time(whole_seconds(now)),
    };
    let patch = serde_json::json!({"status": {"observedGeneration": generation, "conditions": [condition]}});
    (patch, text)
}

fn warning(reason: Reason) -> EventDraft {
    EventDraft {
        warning: true,
        reason,
        text: reason.advice(),
    }
}

fn ledger(facts: &Facts) -> Option<&KeyLedger> {
    facts.keys.stored().map(|stored| &stored.ledger)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::fixtures::at;
    use crate::domain::key;

    #[test]
    fn lost_key_is_expired_removed_or_still_listed() {
        let key = OwnKey {
            key_id: Some("own-1".into()),
            expires_at: at(100),
            since: at(0),
            private: key::generate().expect("a key"),
        };
        let listed = [ListedKey {
            key_id: "own-1".into(),
            expires_at: Some(at(100)),
        }];
        for (list, second, expected) in [
            (&listed[..], 100, Fate::Expired),
            (&[], 100, Fate::Expired),
            (&listed, 99, Fate::Listed),
            (&[], 99, Fate::Removed),
        ] {
            assert_eq!(Fate::of(&key, list, at(second)), expected);
        }
    }
}
