//! What is known of one service user at one moment: read by the controller, judged by `plan` and `report`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;

use crate::api::service_user::Token;
use crate::api::{ZitadelInstance, ZitadelServiceUser};
use crate::domain::access::AllowedAudiences;
use crate::domain::allow_list::AllowList;
use crate::domain::answer::{Format, Minted};
use crate::domain::clock_skew::Skew;
use crate::domain::hash;
use crate::domain::key::ServiceKey;
use crate::domain::observed_secret::{ObservedSecret, SecretRef};
use crate::domain::reason::Reason;
use crate::domain::record::Record;
use crate::domain::refuser::Refuser;
use crate::domain::retry::PendingRetries;
use crate::domain::schedule::Schedule;

/// A renew request up to this many bytes stands in the record as it is: a time, a name, a UUID.
const LONGEST_REQUEST: usize = 256;

/// Mints and repairs that somebody forced are counted over this time.
pub const CONTEST_WINDOW: Duration = Duration::from_mins(10);

/// Everything that decides about one service user. All times are by the clock of its instance, as far as
/// it is usable (`clock`).
#[derive(Debug)]
pub struct Facts {
    /// The object.
    pub user: Arc<ZitadelServiceUser>,
    /// The labels and annotations that it may set on its Secrets.
    pub allowed_metadata: Arc<AllowList>,
    /// Whether it lies in the operator's own namespace.
    pub in_operator_namespace: bool,
    /// The audiences that policies allow to its namespace, or why they are not known.
    pub allowed_audiences: Result<AllowedAudiences, Reason>,
    /// The instance that it names, or why there is none.
    pub instance: Result<Arc<ZitadelInstance>, Reason>,
    /// The real id behind the `zitadel` audience, once learned.
    pub zitadel_project_id: Option<String>,
    /// What was known of the instance's clock when the facts were gathered.
    pub clock: Skew,
    /// The key, or why there is none. It is read only if a token of the spec is admitted.
    pub key: Result<ServiceKey, Reason>,
    /// The Secrets that exist under the names of the spec, and the leftovers, by name.
    pub secrets: BTreeMap<String, ObservedSecret>,
    /// Tokens that were minted and could not be written, by token name.
    pub unwritten: BTreeMap<String, Arc<UnwrittenToken>>,
    /// Tokens whose last write failed, by name: whether the next would be allowed is asked before a request.
    pub write_failed: BTreeSet<String>,
    /// Secrets of this object that the spec no longer names.
    pub leftovers: Vec<SecretRef>,
    /// Tokens that failed a moment ago.
    pub pending_retries: PendingRetries,
    /// How often each token was minted before it was due, or its Secret repaired, within [`CONTEST_WINDOW`], by name.
    pub unscheduled: BTreeMap<String, usize>,
    /// Inputs and renew time of the last mint of each token in this process, by name: by these a Secret that somebody
    /// put back is recognised.
    pub last_mints: BTreeMap<String, (String, Timestamp)>,
}

/// A token that waits for its write (decision K3).
#[derive(Debug)]
pub struct UnwrittenToken {
    /// The token.
    pub minted: Minted,
    /// Its record.
    pub record: Record,
}

/// A token that is in its Secret.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CurrentToken {
    /// Issued, due, expired.
    pub schedule: Schedule,
    /// JWT or opaque.
    pub format: Format,
}

/// How one token fared in this pass.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Which token, by its place in the spec.
    pub token: usize,
    /// How it ended.
    pub reason: Reason,
    /// A token of the current inputs that is in the Secret now, old or new.
    pub current: Option<CurrentToken>,
    /// The server asked not to come back before.
    pub not_before: Option<Timestamp>,
    /// It was not tried: the back-off of an earlier failure runs.
    pub deferred: bool,
    /// What in the cluster refused the write of the Secret, if it is known.
    pub refused_by: Option<Refuser>,
}

impl Outcome {
    /// An attempt that ended so.
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

    /// The issuer, empty without an instance.
    #[must_use]
    pub fn issuer(&self) -> &str {
        self.instance.as_ref().map_or("", |i| i.spec.issuer.as_str())
    }

    /// The id of the ZITADEL API's project: as the server told it, else as the instance pins it.
    #[must_use]
    pub fn zitadel_project_id(&self) -> Option<&str> {
        let pinned = self
            .instance
            .as_ref()
            .ok()
            .and_then(|i| i.spec.zitadel_project_id.as_deref());
        self.zitadel_project_id.as_deref().or(pinned)
    }

    /// The renew request on the object, if there is one, as a record keeps it: a long one as its hash. A Secret has
    /// room for 256 KiB of annotations, as the object has, and the record is only one of them.
    #[must_use]
    pub fn renew_request(&self) -> Option<String> {
        let annotations = self.user.metadata.annotations.as_ref()?;
        let request = annotations.get(crate::api::metadata::ANNOTATION_RENEW_REQUEST)?;
        if request.len() <= LONGEST_REQUEST {
            return Some(request.clone());
        }
        Some(hash::of([request.as_bytes()]))
    }

    /// What the record in the token's Secret says, whatever the inputs are today; nothing if record or token was edited.
    #[must_use]
    pub fn recorded(&self, token: &Token) -> Option<CurrentToken> {
        let observed = self.secrets.get(&token.secret.name)?;
        observed.owned_by(self.name(), self.uid()).ok()?;
        let (record, value) = (observed.record()?, observed.token()?);
        record.vouches_for(value).then(|| CurrentToken {
            schedule: self.schedule(token, record.issued_at, record.expires_at),
            format: Format::of(value),
        })
    }

    /// The schedule of a token of this object.
    #[must_use]
    pub fn schedule(&self, token: &Token, issued: Timestamp, expires: Timestamp) -> Schedule {
        use crate::domain::schedule::{Renewal, duration};
        let before = token.renew_before.as_deref().and_then(duration);
        let renewal = match (before, token.renew_before_percentage) {
            (Some(before), _) => Renewal::Before(before),
            (None, Some(percentage)) => Renewal::Percentage(percentage),
            (None, None) => Renewal::Default,
        };
        let seed = format!("{}/{}", self.uid(), token.name);
        Schedule::new(issued, expires, renewal, &seed)
    }
}
