//! Carries out a plan: one outcome for each token. A token that fails does not stop the others.

use std::sync::Arc;
use std::time::Duration;

use secrecy::ExposeSecret;

use crate::api::ZitadelInstance;
use crate::api::service_user::Token;
use crate::controller::Context;
use crate::controller::write::WriteError;
use crate::domain::answer::{Format, Minted};
use crate::domain::facts::{CurrentToken, Facts, TokenOutcome, UnwrittenToken};
use crate::domain::object_ref::ObjectRef;
use crate::domain::plan::{self, MintRequest, Plan, Step};
use crate::domain::reason::{Reason, Subject};
use crate::domain::retry::Failed;
use crate::domain::secret_draft::{self, SecretDraft};

/// A shutdown waits for the request in flight and for this long after it, for the write of the token.
pub const TIME_TO_WRITE: Duration = Duration::from_secs(5);

/// What came of a plan.
#[derive(Default)]
pub struct Acted {
    /// One for each token.
    pub outcomes: Vec<TokenOutcome>,
    /// Resource versions of the Secrets that were written.
    pub written: Vec<String>,
    /// Number of token requests.
    pub mints: usize,
    /// Failures that concern no token.
    pub failed: Vec<Failed>,
    /// The object, its namespace or its instance changed meanwhile. The rest is left to the next reconcile.
    pub outdated: bool,
}

/// One token of one object.
pub(super) struct Job<'a> {
    pub(super) ctx: &'a Context,
    pub(super) id: &'a ObjectRef,
    pub(super) facts: &'a Facts,
    pub(super) index: usize,
    pub(super) token: &'a Token,
}

/// Carries out `plan`, one token after another, so that an object takes no more of the host's concurrency than another.
/// After a request that may have used up its timeout, this reconcile sends no further request.
pub async fn act(ctx: &Context, id: &ObjectRef, facts: &Facts, plan: Plan) -> Acted {
    let mut acted = Acted::default();
    let mut unreachable = false;
    let tokens = facts.user.spec.tokens.iter().enumerate();
    let mut steps: Vec<_> = tokens.zip(plan.steps).collect();
    // A token that failed lately comes last, since it may use up the timeout again.
    steps.sort_by_key(|((_, token), _)| facts.pending_retries.get(&token.name).map(|retry| retry.until));
    for ((index, token), step) in steps {
        let job = Job {
            ctx,
            id,
            facts,
            index,
            token,
        };
        let mints = matches!(step, Step::Mint(_));
        if mints && !job.is_current() {
            acted.outdated = true;
            return acted;
        }
        let (outcome, version) = match step {
            Step::Mint(request) if unreachable => (job.defer(request.fallback), None),
            step => job.carry_out(step).await,
        };
        unreachable |= mints && !outcome.deferred && outcome.reason == Reason::InstanceUnreachable;
        acted.mints += usize::from(mints && !outcome.deferred);
        acted.outcomes.push(outcome);
        acted.written.extend(version);
    }
    acted.outcomes.sort_by_key(|outcome| outcome.token);
    // The answers may have changed what is known of the server's clock.
    let clock = ctx.connections.skew(&facts.user.spec.instance_ref.name);
    let now = clock.certain(ctx.clock.now());
    for leftover in plan::deletable(facts, &plan.deletes, &acted.outcomes, now) {
        if let Err(error) = ctx.writer.delete_secret(&id.namespace, leftover).await {
            error.log(id, &format!("Secret {}", leftover.name));
            acted.failed.push(Failed::now("", error.reason()));
        }
    }
    acted
}

/// Whether object, policies and instance are still those of the facts. A reconcile may take minutes, and no token may be
/// requested after a policy was withdrawn, or the object was suspended or deleted.
pub(super) fn is_current(ctx: &Context, id: &ObjectRef, facts: &Facts) -> bool {
    let cache = &ctx.cache;
    let (then, now) = (&facts.user.metadata, cache.user(id));
    let same_user = now.is_some_and(|now| {
        // The read of the object may be ahead of the watch.
        let same = Some(&*now.uid) == then.uid.as_deref() && now.generation <= then.generation;
        same && !now.deleting
    });
    let namespace = &id.namespace;
    let name = &facts.user.spec.instance_ref.name;
    let same_access = !cache.is_terminating(namespace) && cache.allowed(name, namespace) == facts.allowed;
    let instance = cache.instance(name);
    let spec = |instance: &Result<Arc<ZitadelInstance>, Reason>| instance.as_ref().ok().map(|i| i.spec.clone());
    same_user && same_access && spec(&instance) == spec(&facts.instance)
}

impl Job<'_> {
    /// Whether the facts still hold.
    pub(super) fn is_current(&self) -> bool {
        is_current(self.ctx, self.id, self.facts)
    }

    /// Leaves the token to the next reconcile, which may follow at once.
    fn defer(&self, current: Option<CurrentToken>) -> TokenOutcome {
        TokenOutcome {
            not_before: Some(self.facts.clock.theirs(self.ctx.clock.now())),
            deferred: true,
            ..self.outcome(Reason::InstanceUnreachable, current)
        }
    }

    /// The outcome, and the resource version of the Secret if it was written.
    async fn carry_out(&self, step: Step) -> (TokenOutcome, Option<String>) {
        match step {
            Step::Keep { current } => {
                self.ctx.memory.written(self.id, &self.token.name);
                (self.outcome(Reason::Issued, Some(current)), None)
            }
            Step::Refuse { reason, current } => {
                let outcome = match self.facts.instance.as_deref() {
                    Ok(instance) => self.refused(instance, reason),
                    Err(_) => self.outcome(reason, None),
                };
                (TokenOutcome { current, ..outcome }, None)
            }
            Step::Wait { reason, current } => {
                let deferred = true;
                let outcome = self.outcome(reason, current);
                (TokenOutcome { deferred, ..outcome }, None)
            }
            Step::Write {
                draft,
                current,
                fallback,
            } => self.write(&draft, current, fallback).await,
            Step::Mint(request) => {
                let minted = self.mint(&request).await;
                if minted.as_ref().err().is_none_or(|refused| !refused.deferred) {
                    let reason = minted.as_ref().err().map_or(Reason::Issued, |refused| refused.reason);
                    let instance = &self.facts.user.spec.instance_ref.name;
                    self.ctx.metrics.minted(instance, reason);
                }
                match minted {
                    Ok(minted) => self.write_minted(*request, minted).await,
                    Err(refused) => {
                        // A token that is no longer allowed does not count as ready, though it stays until it expires.
                        let current = request.fallback.filter(|_| refused.reason != Reason::AccessDenied);
                        (TokenOutcome { current, ..refused }, None)
                    }
                }
            }
        }
    }

    pub(super) fn outcome(&self, reason: Reason, current: Option<CurrentToken>) -> TokenOutcome {
        TokenOutcome::new(self.index, reason, current)
    }

    /// The outcome of a refusal. An instance that is Ready is reconciled again if the reason concerns it, since the operator
    /// does not poll it.
    pub(super) fn refused(&self, instance: &ZitadelInstance, reason: Reason) -> TokenOutcome {
        let name = instance.metadata.name.as_deref().unwrap_or_default();
        if reason == Reason::TLSFailure {
            self.ctx.connections.reload_certificates(name);
        }
        if reason.subject() == Subject::Instance && self.ctx.connections.is_ready(name) {
            self.ctx.instances.wake(&ObjectRef::new("", name));
        }
        self.outcome(reason, None)
    }

    async fn write_minted(&self, request: MintRequest, minted: Minted) -> (TokenOutcome, Option<String>) {
        let (ctx, id, facts, name) = (self.ctx, self.id, self.facts, &self.token.name);
        let record = secret_draft::record(facts, &request.request_hash, &request.template_hash, &minted);
        let draft = secret_draft::draft(facts, self.token, &minted.token, &record);
        let current = CurrentToken {
            schedule: facts.schedule(self.token, minted.issued, minted.expires),
            format: Format::of(minted.token.expose_secret()),
        };
        // Remembered before the write, so that a reconcile that is cut off there does not lose the token.
        let (unwritten, renew) = (UnwrittenToken { minted, record }, current.schedule.renew);
        ctx.memory.requested(id, name, &request, unwritten, renew);
        self.write(&draft, current, request.fallback).await
    }

    /// Writes a Secret. If that fails, `fallback` is the token that is still in it.
    async fn write(
        &self,
        draft: &SecretDraft,
        current: CurrentToken,
        fallback: Option<CurrentToken>,
    ) -> (TokenOutcome, Option<String>) {
        let (ctx, id, name) = (self.ctx, self.id, &self.token.name);
        if draft.is_too_large() {
            return (self.outcome(Reason::SecretTooLarge, fallback), None);
        }
        match ctx.writer.apply_secret(draft).await {
            Ok(version) => {
                ctx.memory.written(id, name);
                if draft.repair {
                    ctx.memory.repaired(id, name);
                }
                (self.outcome(Reason::Issued, Some(current)), Some(version))
            }
            Err(error) => {
                error.log(id, &format!("Secret {}", draft.name));
                (self.write_failed(error, fallback), None)
            }
        }
    }

    pub(super) fn write_failed(&self, error: WriteError, current: Option<CurrentToken>) -> TokenOutcome {
        self.ctx.memory.write_failed(self.id, &self.token.name);
        let outcome = self.outcome(error.reason(), current);
        TokenOutcome {
            refused_by: error.refused_by(),
            ..outcome
        }
    }
}
