//! Metrics of the objects: looked up in the cache when somebody scrapes. There is no second copy of what they are, and
//! nothing to clean up when they go.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use crate::api::{ZitadelInstance, ZitadelServiceUser};
use crate::controller::instance::Connections;
use crate::controller::metrics::described;
use crate::controller::triggers::Cache;
use crate::domain::freshness::Freshness;
use crate::domain::reason::Reason;
use crate::ops::http::Probe;

/// Status and reason of a condition that is not there, or not one of ours.
const UNKNOWN: &str = "Unknown";

/// What the watches say, as metrics.
pub struct Objects {
    /// What exists.
    pub cache: Arc<Cache>,
    /// What this process knows of the instances.
    pub connections: Arc<Connections>,
    /// Whether this process leads.
    pub leads: Probe,
    /// Whether each object has series of its own.
    pub per_object: bool,
    /// Whether an object whose instance is not there may be another operator's.
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
        let users = self.cache.all_users();
        // One that goes is not served any more.
        let users = users.iter().filter(|u| u.metadata.deletion_timestamp.is_none());
        let users: Vec<&ZitadelServiceUser> = users
            .map(|user| &**user)
            .filter(|u| !self.serves_some_instances_only || known.contains_key(&*u.spec.instance_ref.name))
            .collect();
        if self.per_object {
            each_user(&mut encoder, &users)?;
        }
        self.all_users(&mut encoder, &users, &known)?;
        self.instances(&mut encoder, &known)
    }
}

impl Objects {
    fn all_users(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        users: &[&ZitadelServiceUser],
        known: &BTreeMap<&str, &ZitadelInstance>,
    ) -> fmt::Result {
        let now = Timestamp::now();
        let mut conditions = BTreeMap::<_, f64>::new();
        let mut tokens = BTreeMap::<_, f64>::new();
        let mut keys = BTreeMap::<&str, &Time>::new();
        for user in users {
            // Tenants choose what they write here, and must not make series by it.
            let wanted = &*user.spec.instance_ref.name;
            let instance = known.get_key_value(wanted).map_or("", |(name, _)| *name);
            let (ready, reason) = ready(user.status.iter().flat_map(|s| &s.conditions));
            *conditions.entry([instance, ready, reason]).or_default() += 1.0;
            let now = self.connections.skew(instance).theirs(now);
            for token in &user.spec.tokens {
                let status = user
                    .status
                    .iter()
                    .flat_map(|s| &s.tokens)
                    .find(|t| t.name == token.name);
                let state = Freshness::of(status, user.spec.suspend == Some(true), now);
                *tokens.entry([instance, state.name()]).or_default() += 1.0;
            }
            if let Some(expires) = user.status.as_ref().and_then(|s| s.key_expires_at.as_ref()) {
                let earliest = keys.entry(instance).or_insert(expires);
                *earliest = (*earliest).min(expires);
            }
        }
        described::SERVICE_USERS.encode(encoder, conditions)?;
        described::TOKENS.encode(encoder, tokens)?;
        let keys = keys.into_iter().map(|(instance, at)| ([instance], seconds(at)));
        described::EARLIEST_KEY_EXPIRATION.encode(encoder, keys)
    }

    fn instances(&self, encoder: &mut DescriptorEncoder<'_>, known: &BTreeMap<&str, &ZitadelInstance>) -> fmt::Result {
        let looked_at = known.iter().filter_map(|(name, instance)| {
            let (ready, reason) = ready(&instance.status.as_ref()?.conditions);
            Some(([*name, reason], truth(ready == "True")))
        });
        described::INSTANCE_UP.encode(encoder, looked_at)?;
        // Only who leads asks them; what a former leader knows is old.
        let asked: Vec<_> = known
            .keys()
            .filter(|_| (self.leads)())
            .filter_map(|name| Some((*name, self.connections.opened(name)?)))
            .collect();
        let skews = asked
            .iter()
            .map(|(name, open)| ([*name], open.skew().measured().as_secs_f64()));
        described::INSTANCE_CLOCK_SKEW.encode(encoder, skews)?;
        let circuits = asked
            .iter()
            .map(|(name, open)| ([*name], truth(open.limits().is_open())));
        described::INSTANCE_CIRCUIT_OPEN.encode(encoder, circuits)
    }
}

/// The series of each service user and of each of its tokens.
fn each_user(encoder: &mut DescriptorEncoder<'_>, users: &[&ZitadelServiceUser]) -> fmt::Result {
    let statuses = || {
        users.iter().filter_map(|user| {
            let whose = [
                text(user.metadata.namespace.as_ref()),
                text(user.metadata.name.as_ref()),
                &*user.spec.instance_ref.name,
            ];
            Some((whose, *user, user.status.as_ref()?))
        })
    };
    let tokens = || {
        statuses().flat_map(|([namespace, name, instance], user, status)| {
            let tokens = status.tokens.iter();
            tokens.map(move |token| ([namespace, name, &*token.name, instance], user, token))
        })
    };
    let readiness = statuses().map(|([namespace, name, instance], _, status)| {
        let (ready, reason) = ready(&status.conditions);
        ([namespace, name, instance, reason], truth(ready == "True"))
    });
    described::SERVICE_USER_READY.encode(encoder, readiness)?;
    let expirations = tokens().filter_map(|(whose, _, token)| Some((whose, seconds(token.expires_at.as_ref()?))));
    described::TOKEN_EXPIRATION.encode(encoder, expirations)?;
    let renewals = tokens()
        .filter(|(_, user, _)| user.spec.suspend != Some(true))
        .filter_map(|(whose, _, token)| Some((whose, seconds(token.renew_at.as_ref()?))));
    described::TOKEN_RENEWAL.encode(encoder, renewals)?;
    let failing = tokens().filter_map(|([namespace, name, of, instance], _, token)| {
        let reason = known_reason(token.reason.as_deref());
        Some((
            [namespace, name, of, instance, reason],
            seconds(token.failing_since.as_ref()?),
        ))
    });
    described::TOKEN_FAILING_SINCE.encode(encoder, failing)?;
    let keys = statuses().filter_map(|(whose, _, status)| Some((whose, seconds(status.key_expires_at.as_ref()?))));
    described::KEY_EXPIRATION.encode(encoder, keys)
}

/// Status and reason of the condition Ready.
fn ready<'a>(conditions: impl IntoIterator<Item = &'a Condition>) -> (&'static str, &'static str) {
    let Some(ready) = conditions.into_iter().find(|c| c.type_ == "Ready") else {
        return (UNKNOWN, UNKNOWN);
    };
    let status = ["True", "False"].into_iter().find(|s| *s == ready.status);
    (status.unwrap_or(UNKNOWN), known_reason(Some(&ready.reason)))
}

/// A status can be written by anybody with the right to, and labels are bounded.
fn known_reason(reason: Option<&str>) -> &'static str {
    let known = Reason::ALL.iter().map(|r| r.name());
    known.into_iter().find(|name| Some(*name) == reason).unwrap_or(UNKNOWN)
}

fn text(name: Option<&String>) -> &str {
    name.map_or("", String::as_str)
}

fn seconds(time: &Time) -> f64 {
    time.0.as_duration().as_secs_f64()
}

fn truth(value: bool) -> f64 {
    f64::from(u8::from(value))
}
