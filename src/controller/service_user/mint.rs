//! One token request, in four steps: admit, send, classify, record.

use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;

use crate::api::ZitadelInstance;
use crate::controller::evidence::{Evidence, judge, record_evidence};
use crate::controller::instance::connect;
use crate::controller::service_user::act::Job;
use crate::controller::session::note_rejection;
use crate::domain::answer::{Expected, Minted, accept};
use crate::domain::clock_skew::is_news;
use crate::domain::facts::TokenOutcome;
use crate::domain::failure::{Failure, classify};
use crate::domain::object_ref::ObjectRef;
use crate::domain::plan::{self, MintRequest};
use crate::domain::reason::Reason;
use crate::domain::secret_draft;
use crate::domain::time::later;
use crate::zitadel::{Exchanged, Permit, ZitadelClient};

/// A request that may be sent.
struct Admitted {
    client: Arc<ZitadelClient>,
    permit: Permit,
    /// Whether the id of the ZITADEL API's project was known before.
    project_id_known: bool,
}

/// Why no token came.
enum SendError {
    /// Another replica leads.
    NotLeading,
    /// Discovery failed, so that no token was requested.
    Discovery(Failure),
    /// The token request failed, or a prerequisite: the key, the project id, a policy.
    Request(Failure),
}

/// A response, judged.
struct Classified {
    result: Result<Minted, Reason>,
    evidence: Evidence,
    /// `Retry-After`, as a time.
    not_before: Option<Timestamp>,
}

impl Job<'_> {
    /// Requests the token. An error is an outcome without a current token.
    pub(super) async fn mint(&self, request: &MintRequest) -> Result<Minted, TokenOutcome> {
        let instance = self.facts.instance.as_deref();
        let instance = instance.map_err(|reason| self.outcome(*reason, None))?;
        let admitted = self.admit(instance, request).await?;
        let sent = self.send(&admitted.client, &request.scope).await;
        let classified = self.classify(&admitted.client, sent).await;
        self.note_key(&admitted.client, &classified).await;
        self.record(admitted, classified.evidence);
        classified.result.map_err(|reason| TokenOutcome {
            not_before: classified.not_before,
            ..self.refused(instance, reason)
        })
    }

    /// Checks everything that may forbid the request: leadership, the write of the Secret, the token buckets, and the
    /// circuit breaker.
    async fn admit(&self, instance: &ZitadelInstance, request: &MintRequest) -> Result<Admitted, TokenOutcome> {
        let (ctx, facts, name) = (self.ctx, self.facts, &self.token.name);
        let client = connect(ctx, instance).await;
        let client = client.map_err(|failure| self.refused(instance, classify(failure, false)))?;
        self.may_begin().map_err(|reason| self.outcome(reason, None))?;
        if request.try_write_first || !ctx.writer.accepts_secrets(&self.id.namespace) {
            let draft = secret_draft::placeholder(facts, self.token, &request.request_hash, &request.template_hash);
            let tried = ctx.writer.try_secret(&draft).await;
            tried.map_err(|error| self.write_failed(error, None))?;
        }
        let defer = |reason, wait| TokenOutcome {
            not_before: Some(later(client.skew().theirs(ctx.clock.now()), wait)),
            deferred: true,
            ..self.outcome(reason, None)
        };
        // Retries are not counted. Otherwise an object whose first request failed in an outage would wait a second time.
        let is_retry = facts.pending_retries.get(name).is_some_and(|retry| retry.is_retry);
        let is_free = is_retry || request.scheduled && ctx.memory.try_scheduled(self.id, name);
        if !is_free {
            let claimed = ctx.requests.claim(self.id);
            claimed.map_err(|wait| defer(Reason::RequestsThrottled, wait))?;
        }
        let permit = client.limits().breaker().admit(self.id).map_err(|open| {
            if !is_free {
                ctx.requests.give_back(self.id);
            }
            defer(open.reason, open.retry_in)
        })?;
        Ok(Admitted {
            project_id_known: client.known_project_id().is_some(),
            client,
            permit,
        })
    }

    /// Sends the request while this process leads. Returns the answer and what the token must be.
    async fn send(&self, client: &ZitadelClient, scope: &str) -> Result<(Exchanged, Expected), SendError> {
        let began = Instant::now();
        let sent = self.ctx.writer.leadership().while_leading(async {
            client.discovery().await.map_err(SendError::Discovery)?;
            self.exchange(client, scope).await.map_err(SendError::Request)
        });
        let sent = sent.await.map_err(|_| SendError::NotLeading)?;
        let name = &client.settings().name;
        self.ctx.metrics.asked(name, began.elapsed(), sent.is_ok());
        sent
    }

    async fn exchange(&self, client: &ZitadelClient, scope: &str) -> Result<(Exchanged, Expected), Failure> {
        let key = self.facts.key.as_ref().map_err(|reason| *reason)?;
        let project_id = client.project_id(key).await?;
        let expected = plan::expect(self.facts, self.token, project_id)?;
        // Learning the project id may have taken requests of its own. A shutdown waits for one request and its write.
        client.discovery().await?;
        self.may_begin()?;
        // The object or its policies may have changed since the plan: the next reconcile, within seconds, decides anew.
        if !self.is_current() {
            return Err(Reason::APIServerUnavailable.into());
        }
        Ok((client.exchange(key, scope).await?, expected))
    }

    /// Judges the response. Up to v4.13 ZITADEL answers a refused assertion with the same 500 as an outage, so the
    /// operator requests discovery to tell them apart (`docs/reference/zitadel-protocol.md#errors-of-the-token-endpoint`).
    async fn classify(&self, client: &ZitadelClient, sent: Result<(Exchanged, Expected), SendError>) -> Classified {
        let failed = |reason, evidence, failure: Option<Failure>| Classified {
            result: Err(reason),
            evidence,
            not_before: failure.and_then(Failure::retry_after),
        };
        let failure = match sent {
            Ok((exchanged, expected)) => {
                return Classified {
                    result: accept(exchanged.answer, &expected, exchanged.sent),
                    evidence: Evidence::Healthy,
                    not_before: None,
                };
            }
            Err(SendError::NotLeading) => return failed(Reason::NotLeading, Evidence::Nothing, None),
            Err(SendError::Discovery(failure)) => {
                let evidence = Evidence::DiscoveryFailure(failure);
                return failed(classify(failure, false), evidence, Some(failure));
            }
            Err(SendError::Request(failure)) => failure,
        };
        let (reason, evidence) = judge(self.ctx, client, failure).await;
        failed(reason, evidence, Some(failure))
    }

    /// Tells the circuit breaker what the response says about the host, and has the instance reconciled if its status
    /// may be outdated.
    fn record(&self, admitted: Admitted, evidence: Evidence) {
        let (ctx, client, permit) = (self.ctx, &admitted.client, admitted.permit);
        let name = &client.settings().name;
        let mut outdated = record_evidence(ctx, client, permit, evidence);
        // The status of the instance shows the project id. All its service users depend on the clock skew.
        outdated |= client.known_project_id().is_some() != admitted.project_id_known;
        outdated |= is_news(self.facts.clock.usable(), client.skew().usable());
        if outdated {
            ctx.instances.wake(&ObjectRef::new("", name));
        }
    }

    /// With a key ledger, the operator may have another key to sign with.
    async fn note_key(&self, client: &ZitadelClient, classified: &Classified) {
        if let (Ok(key), Ok(Some(_))) = (&self.facts.key, &self.facts.keys.ledger) {
            match classified.result.as_ref().map(drop) {
                Ok(()) => self.ctx.keys.accepted(self.id, &key.key_id),
                Err(reason) => note_rejection(self.ctx, client, self.id, &key.key_id, *reason).await,
            }
        }
    }

    /// Whether there is time for a request and for the write of its token.
    fn may_begin(&self) -> Result<(), Reason> {
        let may = self.ctx.writer.leadership().may_begin();
        may.then_some(()).ok_or(Reason::NotLeading)
    }
}
