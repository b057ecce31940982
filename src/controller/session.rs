//! Requests about one ZITADEL user and its keys, with a token for ZITADEL's own API. The token lives as long as the session,
//! at most one reconcile, and is written nowhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;

use crate::api::ZitadelInstance;
use crate::controller::evidence::{Evidence, judge, record_evidence};
use crate::controller::instance::admin::Admin;
use crate::controller::instance::connect;
use crate::controller::refused::{self, Refused};
use crate::controller::service_user::confirm;
use crate::controller::{Context, Requests};
use crate::domain::failure::classify;
use crate::domain::key::ServiceKey;
use crate::domain::key_ledger::{KeyLedger, ListedKey};
use crate::domain::object_ref::ObjectRef;
use crate::domain::progress::Progress;
use crate::domain::reason::Reason;
use crate::domain::time::later;
use crate::zitadel::{APIError, APIToken, ZitadelClient};

/// How long the administrator sends nothing to a host whose circuit breaker is open.
const WHILE_OPEN: Duration = Duration::from_secs(10);

/// Longest time for the keys, or for the roles, of an object in one reconcile. The status of its tokens waits for it.
const TIMEOUT: Duration = Duration::from_mins(2);

/// Why a step could not be done.
pub struct Stop(pub Progress);

impl Stop {
    /// The step was not attempted. It is due at this time.
    #[must_use]
    pub fn deferred(reason: Reason, at: Timestamp) -> Self {
        Self(Progress {
            not_before: Some(at),
            ..Progress::deferred(reason)
        })
    }
}

impl From<Reason> for Stop {
    fn from(reason: Reason) -> Self {
        Self(Progress::new(reason))
    }
}

impl From<Refused> for Stop {
    fn from(refused: Refused) -> Self {
        let outcome = Progress::new(refused.reason);
        Self(Progress {
            not_before: refused.not_before,
            ..outcome
        })
    }
}

impl From<APIError> for Stop {
    fn from(error: APIError) -> Self {
        let outcome = Progress::new(refused::about_keys(error));
        Self(Progress {
            not_before: error.retry_after(),
            ..outcome
        })
    }
}

/// A session at ZITADEL's API.
pub struct Session<'a> {
    ctx: &'a Context,
    id: &'a ObjectRef,
    limit: &'a Requests,
    open: Option<Open>,
    requests: AtomicUsize,
}

/// What a session is open with.
struct Open {
    client: Arc<ZitadelClient>,
    token: APIToken,
    user_id: String,
    /// `None` for the token of an administrator.
    key_id: Option<String>,
}

/// The signer of requests about the keys of a user.
#[derive(Clone)]
pub enum Signer {
    /// The user itself, with this key.
    Key(ServiceKey),
    /// The administrator of the instance: the user has no key that works.
    Admin,
}

impl Signer {
    /// The id of the key, or an empty one.
    #[must_use]
    pub fn key_id(&self) -> &str {
        match self {
            Self::Key(key) => &key.key_id,
            Self::Admin => "",
        }
    }
}

impl<'a> Session<'a> {
    /// A session that is not open yet. The object may open sessions within `limit`.
    pub fn new(ctx: &'a Context, id: &'a ObjectRef, limit: &'a Requests) -> Self {
        Self {
            ctx,
            id,
            limit,
            open: None,
            requests: AtomicUsize::new(0),
        }
    }

    /// Number of requests so far.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    /// The key that the session was opened with.
    pub fn key_id(&self) -> Option<&str> {
        self.open.as_ref()?.key_id.as_deref()
    }

    /// Drops the token.
    pub fn close(&mut self) {
        self.open = None;
    }

    /// Requests a token with `key`, unless the session has one.
    pub async fn open(&mut self, instance: &Arc<ZitadelInstance>, key: &ServiceKey) -> Result<(), Stop> {
        self.request(instance, key, true).await
    }

    /// The same after [`Self::administrator`], which has claimed the requests of this reconcile. An object that is throttled
    /// would otherwise never get both.
    pub async fn open_too(&mut self, instance: &Arc<ZitadelInstance>, key: &ServiceKey) -> Result<(), Stop> {
        self.request(instance, key, false).await
    }

    async fn request(&mut self, instance: &Arc<ZitadelInstance>, key: &ServiceKey, claims: bool) -> Result<(), Stop> {
        let ctx = self.ctx;
        let client = connect(ctx, instance).await;
        let client = client.map_err(|failure| Stop::from(classify(failure, false)))?;
        let is_open = |open: &Open| {
            Arc::ptr_eq(&open.client, &client)
                && open.key_id.as_ref() == Some(&key.key_id)
                && open.user_id == key.user_id
        };
        if self.open.as_ref().is_some_and(is_open) {
            return Ok(());
        }
        self.open = None;
        let defer = |reason, wait| Stop::deferred(reason, later(client.skew().theirs(ctx.clock.now()), wait));
        if claims {
            let claimed = self.limit.claim(self.id);
            claimed.map_err(|wait| defer(Reason::RequestsThrottled, wait))?;
        }
        let permit = client.limits().breaker().admit(self.id).map_err(|open| {
            if claims {
                self.limit.give_back(self.id);
            }
            defer(open.reason, open.retry_in)
        })?;
        self.may_begin()?;
        let requested = ctx.writer.leadership().while_leading(async {
            client.discovery().await.map_err(|failure| (failure, true))?;
            client.api_token(key).await.map_err(|failure| (failure, false))
        });
        let (reason, evidence, failure) = match requested.await {
            Err(_) => return Err(Reason::NotLeading.into()),
            Ok(Ok(token)) => {
                record_evidence(ctx, &client, permit, Evidence::Healthy);
                ctx.keys.accepted(self.id, &key.key_id);
                self.open = Some(Open {
                    client,
                    token,
                    user_id: key.user_id.clone(),
                    key_id: Some(key.key_id.clone()),
                });
                return Ok(());
            }
            Ok(Err((failure, true))) => (classify(failure, false), Evidence::DiscoveryFailure(failure), failure),
            Ok(Err((failure, false))) => {
                let (reason, evidence) = judge(ctx, &client, failure).await;
                (reason, evidence, failure)
            }
        };
        record_evidence(ctx, &client, permit, evidence);
        note_rejection(ctx, &client, self.id, &key.key_id, reason).await;
        let outcome = Progress::new(reason);
        Err(Stop(Progress {
            not_before: failure.retry_after(),
            ..outcome
        }))
    }

    /// Opens the session as the administrator, for the keys of the user that the ledger names.
    pub async fn open_admin(
        &mut self,
        instance: &Arc<ZitadelInstance>,
        ledger: &KeyLedger,
        now: Timestamp,
    ) -> Result<(), Stop> {
        let user_id = &ledger.user_id;
        let is_open = |open: &Open| open.key_id.is_none() && open.user_id == *user_id;
        if self.open.as_ref().is_some_and(is_open) {
            return Ok(());
        }
        self.open = None;
        let managed = ledger.managed.as_ref().ok_or(Reason::Internal)?;
        let admin = self.administrator(instance, true).await?;
        // An administrator that may see the user may also see its keys.
        self.leading(confirm(&admin, user_id, managed, now)).await?;
        let Admin { client, token, .. } = admin;
        self.open = Some(Open {
            client,
            token,
            user_id: user_id.clone(),
            key_id: None,
        });
        Ok(())
    }

    /// Begins a session of the administrator. If it `claims`, it counts like a token request of the object, so that changes in
    /// a loop do not cost the server more.
    pub async fn administrator(&self, instance: &Arc<ZitadelInstance>, claims: bool) -> Result<Admin, Stop> {
        let ctx = self.ctx;
        let now = ctx.connections.skew(&instance.name_any()).theirs(ctx.clock.now());
        let defer = |reason, wait| Stop::deferred(reason, later(now, wait));
        let opened = ctx.connections.opened(&instance.name_any());
        if opened.is_some_and(|client| client.limits().breaker().is_open()) {
            return Err(defer(Reason::InstanceUnreachable, WHILE_OPEN));
        }
        if claims {
            let claimed = self.limit.claim(self.id);
            claimed.map_err(|wait| defer(Reason::RequestsThrottled, wait))?;
        }
        self.ask(Admin::of(ctx, instance)).await
    }

    /// Counts a request and waits for it, as long as this process is the leader and has time for it.
    pub async fn ask<T, E>(&self, request: impl Future<Output = Result<T, E>>) -> Result<T, Stop>
    where
        Stop: From<E>,
    {
        self.may_begin()?;
        self.leading(request).await
    }

    /// Waits for requests, as long as this process is the leader.
    pub async fn leading<T, E>(&self, requests: impl Future<Output = Result<T, E>>) -> Result<T, Stop>
    where
        Stop: From<E>,
    {
        match self.ctx.writer.leadership().while_leading(requests).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(Reason::NotLeading.into()),
        }
    }

    /// All keys of the user. The list counts only if it has the key of the session: otherwise it may be cut short.
    pub async fn list(&self) -> Result<Vec<ListedKey>, Stop> {
        let open = self.begin()?;
        let listed = self.leading(open.client.list_keys(&open.token, &open.user_id)).await?;
        let has_signer = |id: &String| listed.iter().any(|key| key.key_id == *id);
        if open.key_id.as_ref().is_none_or(has_signer) {
            Ok(listed)
        } else {
            Err(Reason::KeyListIncomplete.into())
        }
    }

    /// Adds a public key (PEM). Returns its id.
    pub async fn add(&self, public: &str, expires: Timestamp) -> Result<String, Stop> {
        let open = self.begin()?;
        let added = open.client.add_key(&open.token, &open.user_id, public, expires);
        self.leading(added).await
    }

    /// Removes a key.
    pub async fn remove(&self, key_id: &str) -> Result<(), Stop> {
        let open = self.begin()?;
        let removed = open.client.remove_key(&open.token, &open.user_id, key_id);
        self.leading(removed).await
    }

    /// The number of the user's personal access tokens.
    pub async fn count_personal_tokens(&self) -> Result<usize, Stop> {
        let open = self.begin()?;
        let counted = open.client.count_personal_tokens(&open.token, &open.user_id);
        self.leading(counted).await
    }

    /// The id of the user that the token of the session belongs to.
    pub async fn who_am_i(&self) -> Result<String, Stop> {
        let open = self.begin()?;
        self.leading(open.client.who_am_i(&open.token)).await
    }

    fn begin(&self) -> Result<&Open, Stop> {
        self.may_begin()?;
        Ok(self.open.as_ref().ok_or(Reason::Internal)?)
    }

    /// Counts a request, if there is time for it and for the write that follows.
    fn may_begin(&self) -> Result<(), Stop> {
        if !self.ctx.writer.leadership().may_begin() {
            return Err(Reason::NotLeading.into());
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Ends steps that take too long. Every step can be repeated. Boxed, because most objects have neither keys nor roles of the
/// operator and need no room for this.
pub fn in_time<T, E: From<Reason>>(steps: impl Future<Output = Result<T, E>>) -> impl Future<Output = Result<T, E>> {
    let steps = tokio::time::timeout(TIMEOUT, Box::pin(steps));
    async { steps.await.unwrap_or_else(|_| Err(Reason::InstanceUnreachable.into())) }
}

/// Counts a rejection of a key, unless the server may be out of order.
pub async fn note_rejection(ctx: &Context, client: &ZitadelClient, id: &ObjectRef, key_id: &str, reason: Reason) {
    if reason != Reason::KeyRejected {
        return;
    }
    let discovered = client.discover().await.map(drop);
    if discovered.is_ok() {
        ctx.keys.rejected(id, key_id);
    }
    ctx.record_discovery(client, discovered);
}
