//! Metrics of the objects, computed from the cache at each scrape. There is no second copy of their state, and nothing
//! to clean up after a deletion.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use crate::api::ZitadelInstance;
use crate::api::instance::ADMIN_CREDENTIAL_READY;
use crate::api::service_user::KEY_ROTATED;
use crate::controller::cache::Cache;
use crate::controller::instance::Connections;
use crate::controller::metrics::described;
use crate::domain::key_rotation::replaces_in_time;
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::Reason;
use crate::domain::summary::UserSummary;
use crate::domain::token_state::TokenState;
use crate::ops::http::Probe;
use crate::zitadel::Clock;

/// Status and reason of a condition that is missing or that the operator does not know.
const UNKNOWN: &str = "Unknown";

/// Exposes the watched objects as metrics.
pub struct Objects {
    /// The operator's clock.
    pub clock: Clock,
    /// The watched objects.
    pub cache: Arc<Cache>,
    /// Connections of this process to the instances.
    pub connections: Arc<Connections>,
    /// Whether this process is the leader.
    pub leads: Probe,
    /// Whether each object has its own series.
    pub per_object: bool,
    /// Whether an object whose instance is unknown may belong to another operator.
    pub serves_some_instances_only: bool,
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Objects").finish_non_exhaustive()
    }
}

impl Collector for Objects {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let instances = self.cache.all_instances();
        let known: BTreeMap<&str, &ZitadelInstance> = instances
            .iter()
            .map(|i| (text(i.metadata.name.as_ref()), &**i))
            .collect();
        let users: Vec<(ObjectRef, Arc<UserSummary>)> = self
            .cache
            .all_users()
            .into_iter()
            // An object that is being deleted is no longer served.
            .filter(|(_, user)| !user.deleting)
            .filter(|(_, user)| !self.serves_some_instances_only || known.contains_key(&*user.instance))
            .collect();
        if self.per_object {
            each_user(&mut encoder, &users)?;
        }
        self.all_users(&mut encoder, &users, &known)?;
        #[allow(clippy::cast_precision_loss, reason = "counts of namespaces are small")]
        let over = self.cache.over_limit().len() as f64;
        described::NAMESPACES_OVER_LIMIT.encode(&mut encoder, [([], over)])?;
        self.instances(&mut encoder, &known)
    }
}

impl Objects {
    fn all_users(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        users: &[(ObjectRef, Arc<UserSummary>)],
        known: &BTreeMap<&str, &ZitadelInstance>,
    ) -> fmt::Result {
        let now = self.clock.now();
        let mut conditions = BTreeMap::<_, f64>::new();
        let mut tokens = BTreeMap::<_, f64>::new();
        let mut keys = BTreeMap::<&str, Timestamp>::new();
        for (_, user) in users {
            // Tenants choose this name. Unknown names share one label value, so that tenants cannot create series.
            let instance = known.get_key_value(&*user.instance).map_or("", |(name, _)| *name);
            let (ready, reason) = ready(user);
            *conditions.entry([instance, ready, reason]).or_default() += 1.0;
            let now = self.connections.skew(instance).theirs(now);
            for token in &user.tokens {
                let state = TokenState::of(token.status.as_ref(), user.suspended, now);
                *tokens.entry([instance, state.name()]).or_default() += 1.0;
            }
            if let Some(expires) = user.key_expires_at {
                let earliest = keys.entry(instance).or_insert(expires);
                *earliest = expires.min(*earliest);
            }
        }
        described::SERVICE_USERS.encode(encoder, conditions)?;
        described::TOKENS.encode(encoder, tokens)?;
        let keys = keys.into_iter().map(|(instance, at)| ([instance], seconds(at)));
        described::EARLIEST_KEY_EXPIRATION.encode(encoder, keys)
    }

    fn instances(&self, encoder: &mut DescriptorEncoder<'_>, known: &BTreeMap<&str, &ZitadelInstance>) -> fmt::Result {
        let reconciled = known.iter().filter_map(|(name, instance)| {
            let conditions = &instance.status.as_ref()?.conditions;
            let ready = conditions.iter().find(|condition| condition.type_ == "Ready");
            let reason = ready.and_then(|ready| Reason::named(&ready.reason));
            let is_ready = ready.is_some_and(|ready| ready.status == "True");
            Some(([*name, reason.map_or(UNKNOWN, Reason::name)], truth(is_ready)))
        });
        described::INSTANCE_UP.encode(encoder, reconciled)?;
        let admins = known.iter().filter_map(|(name, instance)| {
            let (is_up, reason) = admin_credential(instance)?;
            Some(([*name, reason.map_or(UNKNOWN, Reason::name)], truth(is_up)))
        });
        described::ADMIN_CREDENTIAL_UP.encode(encoder, admins)?;
        // Only the leader sends requests to instances. The values of a former leader are outdated.
        let asked: Vec<_> = known
            .keys()
            .filter(|_| (self.leads)())
            .filter_map(|name| Some((*name, self.connections.opened(name)?)))
            .collect();
        let skews = asked
            .iter()
            .map(|(name, open)| ([*name], open.skew().measured().as_secs_f64()));
        described::INSTANCE_CLOCK_SKEW.encode(encoder, skews)?;
        let breakers = asked
            .iter()
            .map(|(name, open)| ([*name], truth(open.limits().breaker().is_open())));
        described::INSTANCE_CIRCUIT_OPEN.encode(encoder, breakers)
    }
}

/// Whether the admin credential of an instance works and is rotated, and the reason. `None` if the instance has none.
fn admin_credential(instance: &ZitadelInstance) -> Option<(bool, Option<Reason>)> {
    let conditions = &instance.status.as_ref()?.conditions;
    let condition = |kind: &str| conditions.iter().find(|condition| condition.type_ == kind);
    let accepted = condition(ADMIN_CREDENTIAL_READY)?;
    let reason = Reason::named(&accepted.reason);
    if accepted.status != "True" {
        return Some((false, reason));
    }
    let failing = condition(KEY_ROTATED).filter(|rotated| rotated.status == "False");
    let failing = failing.map(|rotated| Reason::named(&rotated.reason));
    match failing.filter(|reason| !reason.is_some_and(replaces_in_time)) {
        Some(why) => Some((false, why)),
        None => Some((true, reason)),
    }
}

/// The series of each service user and of each of its tokens.
fn each_user(encoder: &mut DescriptorEncoder<'_>, users: &[(ObjectRef, Arc<UserSummary>)]) -> fmt::Result {
    // Objects have no series before their first reconcile.
    let reconciled = || users.iter().filter(|(_, user)| user.ready.is_some());
    let tokens = || {
        reconciled().flat_map(|(id, user)| {
            let tokens = user.tokens.iter();
            let tokens = tokens.filter_map(|token| Some((&*token.name, token.status?)));
            tokens.map(move |(token, times)| ([&*id.namespace, &*id.name, token, &*user.instance], user, times))
        })
    };
    let readiness = reconciled().map(|(id, user)| {
        let (ready, reason) = ready(user);
        (
            [&*id.namespace, &*id.name, &*user.instance, reason],
            truth(ready == "True"),
        )
    });
    described::SERVICE_USER_READY.encode(encoder, readiness)?;
    let expirations = tokens().filter_map(|(whose, _, times)| Some((whose, seconds(times.expires_at?))));
    described::TOKEN_EXPIRATION.encode(encoder, expirations)?;
    let renewals = tokens()
        .filter(|(_, user, _)| !user.suspended)
        .filter_map(|(whose, _, times)| Some((whose, seconds(times.renew_at?))));
    described::TOKEN_REFRESH.encode(encoder, renewals)?;
    let failing = tokens().filter_map(|([namespace, name, of, instance], _, times)| {
        let reason = times.reason.map_or(UNKNOWN, Reason::name);
        Some(([namespace, name, of, instance, reason], seconds(times.failing_since?)))
    });
    described::TOKEN_FAILING_SINCE.encode(encoder, failing)?;
    let keys = reconciled().filter_map(|(id, user)| {
        let whose = [&*id.namespace, &*id.name, &*user.instance];
        Some((whose, seconds(user.key_expires_at?)))
    });
    described::KEY_EXPIRATION.encode(encoder, keys)
}

/// Status of the condition `Ready` and reason of the condition `UpToDate`. Unknown values are mapped to [`UNKNOWN`],
/// because others may write the status and label values must be bounded.
fn ready(user: &UserSummary) -> (&'static str, &'static str) {
    let Some((ready, reason)) = user.ready else {
        return (UNKNOWN, UNKNOWN);
    };
    (
        if ready { "True" } else { "False" },
        reason.map_or(UNKNOWN, Reason::name),
    )
}

fn text(name: Option<&String>) -> &str {
    name.map_or("", String::as_str)
}

fn seconds(time: Timestamp) -> f64 {
    time.as_duration().as_secs_f64()
}

fn truth(value: bool) -> f64 {
    f64::from(u8::from(value))
}
