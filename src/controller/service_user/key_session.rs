//! Requests about the keys of one ZITADEL user, with a token for ZITADEL's own API. The token lives as long as the
//! session, at most one reconcile, and is written nowhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;

use crate::api::ZitadelInstance;
use crate::controller::Context;
use crate::controller::instance::connect;
use crate::controller::service_user::mint::{Evidence, judge, later, record_evidence};
use crate::domain::failure::classify;
use crate::domain::key::ServiceKey;
use crate::domain::key_ledger::ListedKey;
use crate::domain::key_rotation::Outcome;
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::Reason;
use crate::zitadel::{APIToken, KeyError, ZitadelClient};

/// Why a step could not be done.
pub(super) struct Stop(pub(super) Outcome);

impl From<Reason> for Stop {
    fn from(reason: Reason) -> Self {
        Self(Outcome::new(reason))
    }
}

impl From<KeyError> for Stop {
    fn from(error: KeyError) -> Self {
        let not_before = match error {
            KeyError::Failed(failure) => failure.retry_after(),
            _ => None,
        };
        let outcome = Outcome::new(error.reason());
        Self(Outcome { not_before, ..outcome })
    }
}

/// A session at ZITADEL's API.
pub(super) struct Session<'a> {
    ctx: &'a Context,
    id: &'a ObjectRef,
    open: Option<(Arc<ZitadelClient>, APIToken)>,
    requests: AtomicUsize,
}

impl<'a> Session<'a> {
    pub(super) fn new(ctx: &'a Context, id: &'a ObjectRef) -> Self {
        Self {
            ctx,
            id,
            open: None,
            requests: AtomicUsize::new(0),
        }
    }

    /// Number of requests so far.
    pub(super) fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    /// The key that the session was opened with.
    pub(super) fn key_id(&self) -> Option<&str> {
        self.open.as_ref().map(|(_, token)| &*token.key_id)
    }

    /// Drops the token.
    pub(super) fn close(&mut self) {
        self.open = None;
    }

    /// Requests a token with `key`, unless the session has one.
    pub(super) async fn open(&mut self, instance: &Arc<ZitadelInstance>, key: &ServiceKey) -> Result<(), Stop> {
        let ctx = self.ctx;
        let client = connect(ctx, instance).await;
        let client = client.map_err(|failure| Stop::from(classify(failure, false)))?;
        let is_open = |(open, token): &(Arc<ZitadelClient>, APIToken)| {
            Arc::ptr_eq(open, &client) && token.key_id == key.key_id && token.user_id() == key.user_id
        };
        if self.open.as_ref().is_some_and(is_open) {
            return Ok(());
        }
        self.open = None;
        let defer = |reason, wait: Duration| {
            let now = client.skew().theirs(ctx.clock.now());
            Stop(Outcome {
                not_before: Some(later(now, wait)),
                ..Outcome::deferred(reason)
            })
        };
        let claimed = ctx.requests.claim(self.id);
        claimed.map_err(|wait| defer(Reason::RequestsThrottled, wait))?;
        let permit = client.limits().breaker().admit(self.id).map_err(|open| {
            ctx.requests.give_back(self.id);
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
                self.open = Some((client, token));
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
        let outcome = Outcome::new(reason);
        Err(Stop(Outcome {
            not_before: failure.retry_after(),
            ..outcome
        }))
    }

    /// All keys of the user. The list counts only if it has the key of the session: otherwise it may be cut short.
    pub(super) async fn list(&self) -> Result<Vec<ListedKey>, Stop> {
        let (client, token) = self.begin()?;
        let listed = self.while_leading(client.list_keys(token)).await?;
        let is_complete = listed.iter().any(|key| key.key_id == token.key_id);
        is_complete.then_some(listed).ok_or(Reason::KeyListIncomplete.into())
    }

    /// Adds a public key (PEM). Returns its id.
    pub(super) async fn add(&self, public: &str, expires: Timestamp) -> Result<String, Stop> {
        let (client, token) = self.begin()?;
        self.while_leading(client.add_key(token, public, expires)).await
    }

    /// Removes a key.
    pub(super) async fn remove(&self, key_id: &str) -> Result<(), Stop> {
        let (client, token) = self.begin()?;
        self.while_leading(client.remove_key(token, key_id)).await
    }

    /// The number of the user's personal access tokens.
    pub(super) async fn count_personal_tokens(&self) -> Result<usize, Stop> {
        let (client, token) = self.begin()?;
        self.while_leading(client.count_personal_tokens(token)).await
    }

    fn begin(&self) -> Result<(&ZitadelClient, &APIToken), Stop> {
        self.may_begin()?;
        let (client, token) = self.open.as_ref().ok_or(Reason::Internal)?;
        Ok((client, token))
    }

    /// Counts a request, if there is time for it and for the write that follows.
    fn may_begin(&self) -> Result<(), Stop> {
        if !self.ctx.writer.leadership().may_begin() {
            return Err(Reason::NotLeading.into());
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn while_leading<T>(&self, request: impl Future<Output = Result<T, KeyError>>) -> Result<T, Stop> {
        match self.ctx.writer.leadership().while_leading(request).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(Reason::NotLeading.into()),
        }
    }
}

/// Counts a rejection of a key, unless the server may be out of order.
pub(super) async fn note_rejection(
    ctx: &Context,
    client: &ZitadelClient,
    id: &ObjectRef,
    key_id: &str,
    reason: Reason,
) {
    if reason != Reason::KeyRejected {
        return;
    }
    let discovered = client.discover().await.map(drop);
    if discovered.is_ok() {
        ctx.keys.rejected(id, key_id);
    }
    ctx.record_discovery(client, discovered);
}
