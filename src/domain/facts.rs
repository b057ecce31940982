//! What the operator knows about one service user at one moment. The controller gathers it; `plan` and `report` decide
//! by it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;

use crate::api::metadata::{ANNOTATION_RENEW_REQUEST, ANNOTATION_ROTATE_REQUEST};
use crate::api::service_user::Token;
use crate::api::{ZitadelInstance, ZitadelServiceUser};
use crate::domain::access::Allowed;
use crate::domain::allow_list::AllowList;
use crate::domain::answer::{Format, Minted};
use crate::domain::clock_skew::Skew;
use crate::domain::hash;
use crate::domain::key::ServiceKey;
use crate::domain::key_rotation::KeyState;
use crate::domain::observed_secret::{ObservedSecret, SecretRef};
use crate::domain::reason::Reason;
use crate::domain::record::Record;
use crate::domain::refuser::Refuser;
use crate::domain::retry::PendingRetries;
use crate::domain::role_ledger::StoredRoles;
use crate::domain::schedule::Schedule;

/// Maximum length in bytes of a renew request that the record keeps verbatim: enough for a time, a name or a UUID.
const LONGEST_REQUEST: usize = 256;

/// The operator counts unscheduled refreshes and repairs of a token over this time
/// (`docs/adr/0009-unwritten-tokens-are-kept.md`).
pub const CONTEST_WINDOW: Duration = Duration::from_mins(10);

/// The input of all decisions about one service user. All times are by the clock of its instance, as far as it is
/// usable (see [`Facts::clock`]).
#[derive(Debug)]
pub struct Facts {
    /// The object.
    pub user: Arc<ZitadelServiceUser>,
    /// The labels and annotations that the object may set on its Secrets.
    pub allowed_metadata: Arc<AllowList>,
    /// Whether the object is in the operator's own namespace.
    pub in_operator_namespace: bool,
    /// What access policies allow in its namespace, or why that is unknown.
    pub allowed: Result<Allowed, Reason>,
    /// The instance that the spec names, or why it is unavailable.
    pub instance: Result<Arc<ZitadelInstance>, Reason>,
    /// The project id of the ZITADEL API, which replaces the alias `zitadel`, once the server has returned it.
    pub zitadel_project_id: Option<String>,
    /// The skew of the instance's clock at the time of gathering.
    pub clock: Skew,
    /// The key that signs, or why there is none. The operator reads keys only if at least one token of the spec is
    /// admitted.
    pub key: Result<ServiceKey, Reason>,
    /// All keys of the object.
    pub keys: KeyState,
    /// The role ledger of the object, if the operator has granted roles for it.
    pub roles: Result<Option<StoredRoles>, Reason>,
    /// The existing Secrets that the spec names, and the leftovers, by name.
    pub secrets: BTreeMap<String, ObservedSecret>,
    /// Tokens that were issued and not yet written, by token name.
    pub unwritten: BTreeMap<String, Arc<UnwrittenToken>>,
    /// Names of tokens whose last write failed. Before it requests the next token, the operator asks the API server by
    /// a dry run whether the write would succeed.
    pub write_failed: BTreeSet<String>,
    /// Secrets of this object that the spec no longer names.
    pub leftovers: Vec<SecretRef>,
    /// Tokens whose backoff is running, by token name.
    pub pending_retries: PendingRetries,
    /// Number of unscheduled refreshes and repairs of each token within [`CONTEST_WINDOW`], by token name.
    pub unscheduled: BTreeMap<String, usize>,
    /// Request hash and refresh time of the last token that this process requested, by token name. With these the
    /// operator recognises that another writer restored an older version of the Secret.
    pub last_mints: BTreeMap<String, (String, Timestamp)>,
}

/// A token that is not yet written to its Secret (`docs/adr/0009-unwritten-tokens-are-kept.md`).
#[derive(Debug)]
pub struct UnwrittenToken {
    /// The token.
    pub minted: Minted,
    /// Its record.
    pub record: Record,
}

/// A token in its Secret.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CurrentToken {
    /// When the token was issued, is due and expires.
    pub schedule: Schedule,
    /// JWT or opaque.
    pub format: Format,
}

/// The result for one token in this reconcile.
#[derive(Clone, Debug)]
pub struct TokenOutcome {
    /// Index of the token in the spec.
    pub token: usize,
    /// The reason to report.
    pub reason: Reason,
    /// The token in the Secret now, old or new, if it matches the current request.
    pub current: Option<CurrentToken>,
    /// The earliest time of the next attempt, for example from `Retry-After`.
    pub not_before: Option<Timestamp>,
    /// Not attempted in this reconcile.
    pub deferred: bool,
    /// The policy, webhook or quota that refused the write of the Secret, if known.
    pub refused_by: Option<Refuser>,
}

impl TokenOutcome {
    /// The outcome of an attempt with this reason.
    #[must_use]
    pub fn new(token: usize, reason: Reason, current: Option<CurrentToken>) -> Self {
        Self {
            token,
            reason,
            current,
            not_before: None,
            deferred: false,
            refused_by: None,
        }
    }
}

impl Facts {
    /// UID of the object.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.user.metadata.uid.as_deref().unwrap_or_default()
    }

    /// Name of the object.
    #[must_use]
    pub fn name(&self) -> &str {
        self.user.metadata.name.as_deref().unwrap_or_default()
    }

    /// Namespace of the object.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.user.metadata.namespace.as_deref().unwrap_or_default()
    }

    /// Whether the object or its instance is suspended.
    #[must_use]
    pub fn is_suspended(&self) -> bool {
        let instance = self
            .instance
            .as_ref()
            .is_ok_and(|instance| instance.spec.suspend == Some(true));
        instance || self.user.spec.suspend == Some(true)
    }

    /// The issuer. Empty without an instance.
    #[must_use]
    pub fn issuer(&self) -> &str {
        self.instance.as_ref().map_or("", |i| i.spec.issuer.as_str())
    }

    /// The project id of the ZITADEL API: the id that the server returned, or else the id that the instance pins.
    #[must_use]
    pub fn zitadel_project_id(&self) -> Option<&str> {
        let pinned = self
            .instance
            .as_ref()
            .ok()
            .and_then(|i| i.spec.zitadel_project_id.as_deref());
        self.zitadel_project_id.as_deref().or(pinned)
    }

    /// The renew request of the object in the form that a record keeps. A long request is replaced by its hash: all
    /// annotations of a Secret together are limited to 256 KiB, as on the object, and the record is only one of them.
    #[must_use]
    pub fn renew_request(&self) -> Option<String> {
        request(&self.user.metadata, ANNOTATION_RENEW_REQUEST)
    }

    /// The token that the record in the Secret describes, whether or not it matches the current request. `None` if the
    /// record or the token was edited.
    #[must_use]
    pub fn recorded(&self, token: &Token) -> Option<CurrentToken> {
        let observed = self.secrets.get(&token.secret.name)?;
        observed.may_be_written_by(self.name(), self.uid()).ok()?;
        let (record, value) = (observed.record()?, observed.token()?);
        record.vouches_for(value).then(|| CurrentToken {
            schedule: self.schedule(token, record.issued_at, record.expires_at),
            format: Format::of(value),
        })
    }

    /// The schedule of a token of this object.
    #[must_use]
    pub fn schedule(&self, token: &Token, issued: Timestamp, expires: Timestamp) -> Schedule {
        use crate::domain::schedule::{RefreshAt, duration};
        let before = token.renew_before.as_deref().and_then(duration);
        let refresh_at = match (before, token.renew_before_percentage) {
            (Some(before), _) => RefreshAt::Before(before),
            (None, Some(percentage)) => RefreshAt::Percentage(percentage),
            (None, None) => RefreshAt::Default,
        };
        let seed = format!("{}/{}", self.uid(), token.name);
        Schedule::new(issued, expires, refresh_at, &seed)
    }
}

/// The rotate request of an object, in the form of [`Facts::renew_request`].
#[must_use]
pub fn rotate_request(metadata: &ObjectMeta) -> Option<String> {
    request(metadata, ANNOTATION_ROTATE_REQUEST)
}

fn request(metadata: &ObjectMeta, annotation: &str) -> Option<String> {
    let request = metadata.annotations.as_ref()?.get(annotation)?;
    if request.len() <= LONGEST_REQUEST {
        return Some(request.clone());
    }
    Some(hash::of([request.as_bytes()]))
}
