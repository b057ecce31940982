//! Carries out a plan: one outcome per token, and a token that fails stops no other.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};

use crate::api::service_user::Token;
use crate::controller::Context;
use crate::controller::instance::connect;
use crate::controller::write::WriteError;
use crate::domain::answer::{Format, Minted, accept};
use crate::domain::facts::{Facts, Held, ObjectRef, Outcome, Unwritten};
use crate::domain::failure::{Failure, OAuthError, classify, concerns_the_instance};
use crate::domain::plan::{self, MintRequest, Plan, Step};
use crate::domain::reason::Reason;
use crate::domain::report::Failed;
use crate::domain::secret::{self, SecretDraft};
use crate::zitadel::Instance;

/// A mint starts only if we lead for the time of the exchange and this: the write must still be ours.
const TIME_TO_WRITE: Duration = Duration::from_secs(5);

/// What came of a plan.
#[derive(Default)]
pub struct Acted {
    /// One per token.
    pub outcomes: Vec<Outcome>,
    /// Versions that were written.
    pub written: Vec<String>,
    /// What failed besides the tokens.
    pub failed: Vec<Failed>,
}

/// Carries out `plan`, one token after another: an object must not take more of the host's concurrency than another.
pub async fn act(ctx: &Context, id: &ObjectRef, facts: &Facts, plan: Plan) -> Acted {
    let mut outcomes = Vec::with_capacity(plan.steps.len());
    let mut written = Vec::new();
    for (index, (token, step)) in facts.user.spec.tokens.iter().zip(plan.steps).enumerate() {
        let (ended, version) = carry_out(ctx, id, facts, token, step).await;
        outcomes.push(Outcome {
            token: index,
            reason: ended.reason,
            held: ended.held,
            not_before: ended.not_before,
            held_back: ended.held_back,
        });
        written.extend(version);
    }
    // What a renamed entry leaves goes only when its successor is there.
    let tokens = facts.user.spec.tokens.iter().zip(&outcomes);
    let all_there = tokens
        .into_iter()
        .all(|(t, o)| o.held.is_some() || facts.secrets.contains_key(&t.secret.name));
    let mut failed = Vec::new();
    for leftover in plan.deletes.iter().filter(|_| all_there) {
        if let Err(error) = ctx.writer.delete_secret(&id.namespace, leftover).await {
            tracing::warn!(object = %id, secret = leftover.name, %error, "a Secret that is no longer asked for could not be deleted");
            failed.push(Failed::now("", Reason::SecretWriteFailed));
        }
    }
    Acted {
        outcomes,
        written,
        failed,
    }
}

struct Ended {
    reason: Reason,
    held: Option<Held>,
    not_before: Option<Timestamp>,
    held_back: bool,
}

impl Ended {
    fn with(reason: Reason, held: Option<Held>) -> Self {
        Self {
            reason,
            held,
            not_before: None,
            held_back: false,
        }
    }
}

async fn carry_out(ctx: &Context, id: &ObjectRef, facts: &Facts, token: &Token, step: Step) -> (Ended, Option<String>) {
    match step {
        Step::Keep(held) => {
            ctx.unwritten.drop_token(id, &token.name);
            (Ended::with(Reason::Issued, Some(held)), None)
        }
        Step::Refuse(reason, held) => (Ended::with(reason, held), None),
        Step::Wait(reason, held) => {
            let held_back = true;
            let ended = Ended::with(reason, held);
            (Ended { held_back, ..ended }, None)
        }
        Step::Write(draft, held, fallback) => write(ctx, id, token, &draft, held, fallback).await,
        Step::Mint(request) => match mint(ctx, facts, token, &request).await {
            Ok(minted) => {
                ctx.metrics.minted(Reason::Issued.name());
                write_minted(ctx, id, facts, token, *request, minted).await
            }
            Err((reason, not_before)) => {
                ctx.metrics.minted(reason.name());
                if concerns_the_instance(reason) {
                    doubt(ctx, facts, reason);
                }
                // A token that is not allowed is not told as good, though it stays to its expiry.
                let held = request.fallback.filter(|_| reason != Reason::AccessDenied);
                let ended = Ended::with(reason, held);
                (Ended { not_before, ..ended }, None)
            }
        },
    }
}

async fn mint(
    ctx: &Context,
    facts: &Facts,
    token: &Token,
    request: &MintRequest,
) -> Result<Minted, (Reason, Option<Timestamp>)> {
    let known = |reason| (reason, None);
    let instance = facts.instance.as_deref().ok_or(known(Reason::InstanceMissing))?;
    let connection = connect(ctx, instance).await.map_err(|f| known(classify(f, false)))?;
    let key = facts.key.as_ref().map_err(|reason| known(*reason))?;
    let needed = connection.settings().timeout + TIME_TO_WRITE;
    if !ctx.writer.remaining().is_ok_and(|remaining| remaining >= needed) {
        return Err(known(Reason::NotLeading));
    }
    if request.try_write_first {
        would_be_written(ctx, facts, token, request)
            .await
            .map_err(|e| known(e.reason()))?;
    }
    let learned_before = connection.known_project_id().is_some();
    let project_id = match connection.project_id(key).await {
        Ok(id) => id,
        Err(failure) => return Err(judge(&connection, failure).await),
    };
    if !learned_before {
        // Its status shows the id.
        ctx.instances
            .wake(&ObjectRef::new("", &facts.user.spec.instance_ref.name), None);
    }
    let expected = plan::expect(facts, token, project_id).map_err(known)?;
    match connection.exchange(key, &request.scope).await {
        Ok(exchanged) => accept(exchanged.answer, &expected, exchanged.sent).map_err(known),
        Err(failure) => Err(judge(&connection, failure).await),
    }
}

/// An instance that is called Ready is looked at again, since it is not asked while all goes well.
fn doubt(ctx: &Context, facts: &Facts, reason: Reason) {
    let Some(instance) = facts.instance.as_deref() else {
        return;
    };
    let name = instance.metadata.name.as_deref().unwrap_or_default();
    if reason == Reason::TlsFailure {
        ctx.connections.doubt_certificates(name);
    }
    let conditions = instance.status.iter().flat_map(|s| &s.conditions);
    if conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True") {
        ctx.instances.wake(&ObjectRef::new("", name), None);
    }
}

/// The reason of a failure. Up to v4.13 a refused assertion and an outage are the same 500: discovery tells them apart.
async fn judge(connection: &Instance, failure: Failure) -> (Reason, Option<Timestamp>) {
    let (ambiguous, not_before) = match failure {
        Failure::Status { error, retry_after, .. } => (error == Some(OAuthError::InternalError), retry_after),
        _ => (false, None),
    };
    let discovery_works = ambiguous && connection.discover().await.is_ok();
    (classify(failure, discovery_works), not_before)
}

/// Whether the Secret would be taken, asked with something of a token's shape in it.
async fn would_be_written(
    ctx: &Context,
    facts: &Facts,
    token: &Token,
    request: &MintRequest,
) -> Result<(), WriteError> {
    let (placeholder, now) = (SecretString::from("placeholder"), Timestamp::now());
    let issuer = facts.instance.as_deref().map_or("", |i| i.spec.issuer.as_str());
    let record = secret::record(
        facts,
        request.inputs.clone(),
        request.shape.clone(),
        now,
        now,
        &placeholder,
    );
    let draft = secret::draft(facts, token, issuer, &placeholder, &record);
    ctx.writer.try_secret(&draft).await
}

async fn write_minted(
    ctx: &Context,
    id: &ObjectRef,
    facts: &Facts,
    token: &Token,
    request: MintRequest,
    minted: Minted,
) -> (Ended, Option<String>) {
    let issuer = facts.instance.as_deref().map_or("", |i| i.spec.issuer.as_str());
    let record = secret::record(
        facts,
        request.inputs.clone(),
        request.shape.clone(),
        minted.issued,
        minted.expires,
        &minted.token,
    );
    let draft = secret::draft(facts, token, issuer, &minted.token, &record);
    let held = Held {
        schedule: facts.schedule(token, minted.issued, minted.expires),
        format: Format::of(minted.token.expose_secret()),
    };
    ctx.forced
        .minted(id, &token.name, &request, held.schedule.renew, Timestamp::now());
    // Kept before the write, so that a pass that is cut off there does not lose it.
    ctx.unwritten.keep(id, &token.name, Unwritten { minted, record });
    write(ctx, id, token, &draft, held, request.fallback).await
}

/// Writes a Secret; if that fails, `fallback` is what is still there.
async fn write(
    ctx: &Context,
    id: &ObjectRef,
    token: &Token,
    draft: &SecretDraft,
    held: Held,
    fallback: Option<Held>,
) -> (Ended, Option<String>) {
    if draft.is_too_large() {
        return (Ended::with(Reason::SecretTooLarge, fallback), None);
    }
    match ctx.writer.apply_secret(draft).await {
        Ok(version) => {
            ctx.unwritten.drop_token(id, &token.name);
            if draft.repair {
                ctx.forced.repaired(id, &token.name, Timestamp::now());
            }
            (Ended::with(Reason::Issued, Some(held)), Some(version))
        }
        Err(error) => {
            error.log(id, &format!("Secret {}", draft.name));
            (Ended::with(error.reason(), fallback), None)
        }
    }
}
