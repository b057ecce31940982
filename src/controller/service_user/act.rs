//! Carries out a plan: one outcome per token, and a token that fails stops no other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use secrecy::ExposeSecret;

use crate::api::ZitadelInstance;
use crate::api::service_user::Token;
use crate::controller::Context;
use crate::controller::instance::connect;
use crate::controller::write::WriteError;
use crate::domain::answer::{Expected, Format, Minted, accept};
use crate::domain::clock_skew::is_news;
use crate::domain::facts::{CurrentToken, Facts, Outcome, UnwrittenToken};
use crate::domain::failure::{Failure, classify};
use crate::domain::object_ref::ObjectRef;
use crate::domain::plan::{self, MintRequest, Plan, Step};
use crate::domain::reason::{Reason, Subject};
use crate::domain::retry::Failed;
use crate::domain::secret_draft::{self, SecretDraft};
use crate::domain::time::shifted;
use crate::zitadel::{Exchanged, Permit, ZitadelClient};

/// A shutdown waits for the request under way and so much longer, for its write.
pub const TIME_TO_WRITE: Duration = Duration::from_secs(5);

/// What came of a plan.
#[derive(Default)]
pub struct Acted {
    /// One per token.
    pub outcomes: Vec<Outcome>,
    /// Versions that were written.
    pub written: Vec<String>,
    /// How many tokens were asked for.
    pub mints: usize,
    /// What failed besides the tokens.
    pub failed: Vec<Failed>,
    /// The object, its namespace or its instance changed meanwhile, so that the rest was left to the next pass.
    pub outdated: bool,
}

/// One token of one object.
struct Job<'a> {
    ctx: &'a Context,
    id: &'a ObjectRef,
    facts: &'a Facts,
    index: usize,
    token: &'a Token,
}

/// Which request failed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    Discovery,
    Token,
}

/// Carries out `plan`, one token after another: an object must not take more of the host's concurrency than another. For
/// the same reason nothing more is asked for after a request that may have taken all of its time.
pub async fn act(ctx: &Context, id: &ObjectRef, facts: &Facts, plan: Plan) -> Acted {
    let mut acted = Acted::default();
    let mut unreachable = false;
    let tokens = facts.user.spec.tokens.iter().enumerate();
    let mut steps: Vec<_> = tokens.zip(plan.steps).collect();
    // What failed last comes last: it might take all of the pass again.
    steps.sort_by_key(|((_, token), _)| facts.pending_retries.get(&token.name).map(|hold| hold.until));
    for ((index, token), step) in steps {
        let job = Job {
            ctx,
            id,
            facts,
            index,
            token,
        };
        let mints = matches!(step, Step::Mint(_));
        if mints && !job.is_as_seen() {
            acted.outdated = true;
            return acted;
        }
        let (outcome, version) = match step {
            Step::Mint(request) if unreachable => (job.not_now(request.fallback), None),
            step => job.carry_out(step).await,
        };
        unreachable |= mints && !outcome.deferred && outcome.reason == Reason::InstanceUnreachable;
        acted.mints += usize::from(mints && !outcome.deferred);
        acted.outcomes.push(outcome);
        acted.written.extend(version);
    }
    acted.outcomes.sort_by_key(|outcome| outcome.token);
    // What was asked of the server may have shown that its clock, or ours, is another than assumed.
    let clock = ctx.connections.skew(&facts.user.spec.instance_ref.name);
    let now = clock.certain(Timestamp::now());
    for leftover in plan::may_go(facts, &plan.deletes, &acted.outcomes, now) {
        if let Err(error) = ctx.writer.delete_secret(&id.namespace, leftover).await {
            error.log(id, &format!("Secret {}", leftover.name));
            acted.failed.push(Failed::now("", error.reason()));
        }
    }
    acted
}

impl Job<'_> {
    /// Whether object, namespace and instance are still those of the facts. A pass may take minutes, and who withdraws a
    /// right, suspends or deletes must not see further mints.
    fn is_as_seen(&self) -> bool {
        let (cache, facts) = (&self.ctx.cache, self.facts);
        let (then, now) = (&facts.user.metadata, cache.user(self.id));
        let same_user = now.is_some_and(|now| {
            // The read may be ahead of the watch.
            let same = Some(&*now.uid) == then.uid.as_deref() && now.generation <= then.generation;
            same && !now.deleting
        });
        let namespace = &self.id.namespace;
        let name = &facts.user.spec.instance_ref.name;
        let same_rights =
            !cache.is_terminating(namespace) && cache.allowed_audiences(name, namespace) == facts.allowed_audiences;
        let instance = cache.instance(name);
        let spec = |instance: &Result<Arc<ZitadelInstance>, Reason>| instance.as_ref().ok().map(|i| i.spec.clone());
        same_user && same_rights && spec(&instance) == spec(&facts.instance)
    }

    /// Left to the next pass, which may follow at once.
    fn not_now(&self, current: Option<CurrentToken>) -> Outcome {
        Outcome {
            not_before: Some(self.facts.clock.theirs(Timestamp::now())),
            deferred: true,
            ..self.ended(Reason::InstanceUnreachable, current)
        }
    }

    /// The outcome, and the version of the Secret if it was written.
    async fn carry_out(&self, step: Step) -> (Outcome, Option<String>) {
        match step {
            Step::Keep { current } => {
                self.ctx.memory.written(self.id, &self.token.name);
                (self.ended(Reason::Issued, Some(current)), None)
            }
            Step::Refuse { reason, current } => {
                let outcome = match self.facts.instance.as_deref() {
                    Ok(instance) => self.refused(instance, reason),
                    Err(_) => self.ended(reason, None),
                };
                (Outcome { current, ..outcome }, None)
            }
            Step::Wait { reason, current } => {
                let deferred = true;
                let outcome = self.ended(reason, current);
                (Outcome { deferred, ..outcome }, None)
            }
            Step::Write {
                draft,
                current,
                fallback,
            } => self.write(&draft, current, fallback).await,
            Step::Mint(request) => {
                match self.mint(&request).await {
                    Ok(minted) => {
                        self.minted(Reason::Issued);
                        self.write_minted(*request, minted).await
                    }
                    Err(refused) => {
                        if !refused.deferred {
                            self.minted(refused.reason);
                        }
                        // A token that is not allowed is not told as good, though it stays to its expiry.
                        let current = request.fallback.filter(|_| refused.reason != Reason::AccessDenied);
                        (Outcome { current, ..refused }, None)
                    }
                }
            }
        }
    }

    fn minted(&self, reason: Reason) {
        let instance = &self.facts.user.spec.instance_ref.name;
        self.ctx.metrics.minted(instance, reason);
    }

    fn ended(&self, reason: Reason, current: Option<CurrentToken>) -> Outcome {
        Outcome::new(self.index, reason, current)
    }

    /// The token, or an outcome that knows nothing of an older one.
    async fn mint(&self, request: &MintRequest) -> Result<Minted, Outcome> {
        let (ctx, facts) = (self.ctx, self.facts);
        let refused = |reason| self.ended(reason, None);
        let instance = facts.instance.as_deref().map_err(|reason| refused(*reason))?;
        let connection = match connect(ctx, instance).await {
            Ok(connection) => connection,
            Err(failure) => return Err(self.refused(instance, classify(failure, false))),
        };
        self.may_begin().map_err(refused)?;
        if request.try_write_first || !ctx.writer.takes_secrets(&self.id.namespace) {
            let draft = secret_draft::placeholder(facts, self.token, &request.request_hash, &request.template_hash);
            let tried = ctx.writer.try_secret(&draft).await;
            tried.map_err(|error| self.write_failed(error, None))?;
        }
        // A retry is not counted: a new object would wait on after an outage.
        let is_retry = facts
            .pending_retries
            .get(&self.token.name)
            .is_some_and(|hold| hold.is_retry);
        let is_free = || request.scheduled && ctx.memory.try_scheduled(self.id, &self.token.name);
        let counts = !is_retry && !is_free();
        let deferred = |reason, wait| Outcome {
            not_before: Some(later(connection.skew().theirs(Timestamp::now()), wait)),
            deferred: true,
            ..refused(reason)
        };
        if counts {
            let claimed = ctx.requests.claim(self.id);
            claimed.map_err(|wait| deferred(Reason::RequestsThrottled, wait))?;
        }
        let permit = connection.limits().breaker().admit(self.id).map_err(|open| {
            if counts {
                ctx.requests.give_back(self.id);
            }
            deferred(open.reason, open.retry_in)
        })?;
        let learned_before = connection.known_project_id().is_some();
        let began = Instant::now();
        let asked = ctx.writer.leadership().while_leading(async {
            let discovered = connection.discovery().await;
            discovered.map_err(|failure| (Asked::Discovery, failure))?;
            let asked = self.ask(&connection, &request.scope).await;
            asked.map_err(|failure| (Asked::Token, failure))
        });
        let Ok(asked) = asked.await else {
            return Err(refused(Reason::NotLeading));
        };
        ctx.metrics
            .asked(&connection.settings().name, began.elapsed(), asked.is_ok());
        let minted = match asked {
            Ok((got, expected)) => {
                self.worked(&connection, permit);
                accept(got.answer, &expected, got.sent).map_err(|reason| self.refused(instance, reason))
            }
            Err((what, failure)) => {
                let reason = self.judge(&connection, permit, what, failure).await;
                Err(Outcome {
                    not_before: failure.retry_after(),
                    ..self.refused(instance, reason)
                })
            }
        };
        let learned = connection.known_project_id().is_some() != learned_before;
        if learned || is_news(facts.clock.usable(), connection.skew().usable()) {
            // Its status shows the one, and by the other all of its service users reckon.
            request_instance_reconcile(ctx, instance);
        }
        minted
    }

    /// Whether there is time for a request and the write of what it brings.
    fn may_begin(&self) -> Result<(), Reason> {
        let may = self.ctx.writer.leadership().may_begin();
        may.then_some(()).ok_or(Reason::NotLeading)
    }

    /// Asks for the token, and says what it must be.
    async fn ask(&self, connection: &ZitadelClient, scope: &str) -> Result<(Exchanged, Expected), Failure> {
        let key = self.facts.key.as_ref().map_err(|reason| *reason)?;
        let project_id = connection.project_id(key).await?;
        let expected = plan::expect(self.facts, self.token, project_id)?;
        // Before this a mint may have taken requests of its own. A shutdown waits for one request and its write.
        connection.discovery().await?;
        self.may_begin()?;
        Ok((connection.exchange(key, scope).await?, expected))
    }

    /// An instance that is called Ready is looked at again, since it is not asked while all goes well.
    fn refused(&self, instance: &ZitadelInstance, reason: Reason) -> Outcome {
        let name = instance.metadata.name.as_deref().unwrap_or_default();
        if reason == Reason::TLSFailure {
            self.ctx.connections.doubt_certificates(name);
        }
        if reason.subject() == Subject::Instance && self.ctx.connections.is_ready(name) {
            request_instance_reconcile(self.ctx, instance);
        }
        self.ended(reason, None)
    }

    /// The reason of a failure. Tells the circuit breaker what it says of the host: up to v4.13 a refused assertion and an
    /// outage are the same 500, and discovery tells them apart.
    async fn judge(&self, connection: &ZitadelClient, permit: Permit, what: Asked, failure: Failure) -> Reason {
        if what == Asked::Discovery {
            permit.record_discovery_failure(&connection.settings().name, failure, connection.retry_in(failure));
            return classify(failure, false);
        }
        let mut discovery_works = false;
        if failure.is_ambiguous() {
            let discovered = connection.discover().await.map(drop);
            discovery_works = discovered.is_ok();
            self.ctx.record_discovery(connection, discovered);
        }
        if discovery_works || matches!(failure, Failure::Known(_)) {
            drop(permit);
        } else if failure.is_refusal() {
            self.worked(connection, permit);
        } else {
            permit.record_failure(failure, connection.retry_in(failure));
        }
        classify(failure, discovery_works)
    }

    /// The token endpoint works. An instance that is not called Ready is looked at again: others wait for it.
    fn worked(&self, connection: &ZitadelClient, permit: Permit) {
        let instance = &connection.settings().name;
        if !self.ctx.connections.is_ready(instance) {
            self.ctx.instances.wake(&ObjectRef::new("", instance));
        }
        if permit.record_success() {
            self.ctx.breaker_closed(connection.limits().breaker());
        }
    }

    async fn write_minted(&self, request: MintRequest, minted: Minted) -> (Outcome, Option<String>) {
        let (ctx, id, facts, name) = (self.ctx, self.id, self.facts, &self.token.name);
        let record = secret_draft::record(facts, &request.request_hash, &request.template_hash, &minted);
        let draft = secret_draft::draft(facts, self.token, &minted.token, &record);
        let current = CurrentToken {
            schedule: facts.schedule(self.token, minted.issued, minted.expires),
            format: Format::of(minted.token.expose_secret()),
        };
        // Kept before the write, so that a reconcile that is cut off there does not lose it.
        let (unwritten, renew) = (UnwrittenToken { minted, record }, current.schedule.renew);
        ctx.memory.requested(id, name, &request, unwritten, renew);
        self.write(&draft, current, request.fallback).await
    }

    /// Writes a Secret; if that fails, `fallback` is what is still there.
    async fn write(
        &self,
        draft: &SecretDraft,
        current: CurrentToken,
        fallback: Option<CurrentToken>,
    ) -> (Outcome, Option<String>) {
        let (ctx, id, name) = (self.ctx, self.id, &self.token.name);
        if draft.is_too_large() {
            return (self.ended(Reason::SecretTooLarge, fallback), None);
        }
        match ctx.writer.apply_secret(draft).await {
            Ok(version) => {
                ctx.memory.written(id, name);
                if draft.repair {
                    ctx.memory.repaired(id, name);
                }
                (self.ended(Reason::Issued, Some(current)), Some(version))
            }
            Err(error) => {
                error.log(id, &format!("Secret {}", draft.name));
                (self.write_failed(error, fallback), None)
            }
        }
    }

    fn write_failed(&self, error: WriteError, current: Option<CurrentToken>) -> Outcome {
        self.ctx.memory.write_failed(self.id, &self.token.name);
        let outcome = self.ended(error.reason(), current);
        Outcome {
            refused_by: error.refused_by(),
            ..outcome
        }
    }
}

/// `time`, this much later.
fn later(time: Timestamp, by: Duration) -> Timestamp {
    shifted(time, SignedDuration::try_from(by).unwrap_or(SignedDuration::MAX))
}

fn request_instance_reconcile(ctx: &Context, instance: &ZitadelInstance) {
    let name = instance.metadata.name.as_deref().unwrap_or_default();
    ctx.instances.wake(&ObjectRef::new("", name));
}
