//! Service users: gather, plan, act, report.

mod act;
mod gather;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;

pub use act::TIME_TO_WRITE;
pub use gather::{Forced, UnwrittenTokens};

use crate::controller::Context;
use crate::controller::queue::Done;
use crate::controller::write::WriteError;
use crate::domain::facts::{Facts, HeldBack, ObjectRef};
use crate::domain::plan::plan;
use crate::domain::reason::Reason;
use crate::domain::report::{Failed, Report, report};

/// Longest time for the Events of one pass.
const TIME_FOR_EVENTS: Duration = Duration::from_secs(2);

/// One pass over one service user.
pub async fn reconcile(ctx: Arc<Context>, id: ObjectRef, held_back: HeldBack) -> Done {
    let _pass = ctx.metrics.pass("ZitadelServiceUser");
    if gather::awaits_a_look(&ctx, &id) {
        // That look wakes it.
        return Done::broken_off(None);
    }
    let facts = match gather::gather(&ctx, &id, held_back).await {
        Ok(Some(facts)) => facts,
        Ok(None) => return Done::forget(),
        Err(error) => {
            tracing::warn!(object = %id, %error, "the facts could not be gathered");
            return Done::broken_off(Some(Reason::ApiServerUnavailable));
        }
    };
    let plan = plan(&facts, facts.clock.theirs(Timestamp::now()));
    let acted = act::act(&ctx, &id, &facts, plan).await;
    for outcome in &acted.outcomes {
        tracing::debug!(object = %id, token = outcome.token, reason = %outcome.reason, "looked at");
    }
    // What was asked of the server may have shown that its clock is another than assumed.
    let skew = ctx.connections.skew(&facts.user.spec.instance_ref.name);
    let mut report = report(&facts, &acted.outcomes, skew.theirs(Timestamp::now()));
    report.wake.failed.extend(acted.failed);
    let mut written = acted.written;
    // Who leads now, or after the restart, or the next pass tells how it is.
    let ours = !acted.outdated && acted.outcomes.iter().all(|o| o.reason != Reason::NotLeading);
    let published = if ours {
        publish(&ctx, &facts, &mut report).await
    } else {
        Ok(None)
    };
    match published {
        Ok(version) => written.extend(version),
        Err(WriteError::Gone) => {
            tracing::info!(object = %id, "the object is gone");
            ctx.cache.forget_user(&facts.user);
            ctx.unwritten.drop_object(&id);
            ctx.forced.drop_object(&id);
            return Done::forget();
        }
        Err(error) => {
            error.log(&id, "the status");
            report.wake.failed.push(Failed::now("", error.reason_besides_secrets()));
        }
    }
    Done {
        // The queue goes by our own clock.
        wake: report.wake.shifted(-skew.usable()),
        written,
        mints: acted.mints,
        broken_off: acted.outdated,
        ..Done::default()
    }
}

/// Writes the status if it changed, then the Events: on a conflict nothing is told twice.
async fn publish(ctx: &Context, facts: &Facts, report: &mut Report) -> Result<Option<String>, WriteError> {
    if facts.user.status.as_ref() == Some(&report.status) {
        return Ok(None);
    }
    let mut user = (*facts.user).clone();
    user.status = Some(report.status.clone());
    let version = ctx.writer.replace_user_status(&user).await?;
    let tell = async {
        for note in std::mem::take(&mut report.events) {
            ctx.writer.event(&*facts.user, "Mint", note).await;
        }
    };
    // Events tell and decide nothing: slow ones must not hold up renewals.
    let _ = tokio::time::timeout(TIME_FOR_EVENTS, tell).await;
    Ok(Some(version))
}
