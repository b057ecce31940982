//! The circuit breaker for one ZITADEL host and one set of connection settings: a pure state machine that decides
//! whether a token request may be sent now (docs/adr/0012-circuit-breaker-evidence.md).
//!
//! A tenant can make its own requests fail: by slow or broken Actions, or by a refused key, to which ZITADEL up to
//! v4.13 responds with a 500. The breaker must distinguish these failures from a host that is down. The rules:
//!
//! 1. The breaker opens after three connection failures without any answer in between, or when requests of three users
//!    in two namespaces fail within a minute and no token request has succeeded meanwhile.
//! 2. A successful token request closes the breaker. Every namespace that failed before, or while that request
//!    succeeded, is then a suspect until ten minutes after its last failure. The failures of a suspect count only if no
//!    request has succeeded for a minute.
//! 3. While the breaker is open, it admits one probe at a time and at most one per second, except by rule 4. Namespaces
//!    whose last request did not fail go first, then those whose last failure is oldest. A namespace whose probe failed
//!    or was inconclusive waits 1, 2, 4 .. 30 s, or for its `Retry-After`. A `Retry-After` delays other namespaces for
//!    at most 30 s.
//! 4. As long as the host answers, a namespace whose last request did not fail is refused for at most 30 s.
//! 5. A host is silent if connections fail or discovery gets no answer. Successful discovery closes the breaker of a
//!    silent host. For any other host, discovery proves only that the host answers.
//!
//! The tests in `model` check the bounds that follow from these rules.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::domain::failure::{Failure, classify};
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::Reason;

/// Consecutive connection failures that open the breaker. A single one may be a restart behind a load balancer.
const CONNECTION_FAILURES: u32 = 3;

/// Failing users that open the breaker, and how many of them may be in one namespace. A tenant controls all users of
/// its namespace.
const USERS: usize = 3;
const OF_ONE_NAMESPACE: usize = 2;

/// How long a failure counts against the host, and how long a success counts for it.
const WINDOW: Duration = Duration::from_mins(1);

/// How long a namespace is remembered after its last failure.
const MEMORY: Duration = Duration::from_mins(10);

/// Minimum time between the starts of two probes.
const SPACING: Duration = Duration::from_secs(1);

/// The longest time that a namespace waits because of its own failed probes, or because of other namespaces.
const LONGEST: Duration = Duration::from_secs(30);

/// A namespace loses its place in the queue if its user retries this much later than its assigned time.
const GRACE: Duration = Duration::from_secs(5);

/// The longest retry time for further users of a namespace that already waits for a probe. They are normally woken when
/// the breaker closes.
const PATIENCE: Duration = Duration::from_mins(5);

/// Longer than any backoff with its jitter plus a request. If there is no request for this long, no user needs the
/// host.
const QUIET: Duration = Duration::from_mins(7);

/// The kind of failure that one request is evidence of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// No connection, or no trusted TLS connection. A tenant cannot cause this.
    Connection,
    /// A timeout, or a connection that ends before the response.
    NoAnswer,
    /// 429, 500, 502, 503 or 504.
    ErrorAnswer,
}

impl Fault {
    fn of(failure: Failure) -> Option<Self> {
        match failure {
            Failure::Connect | Failure::Tls => Some(Self::Connection),
            Failure::Timeout | Failure::Broken => Some(Self::NoAnswer),
            Failure::Status { code, .. } => matches!(code, 429 | 500 | 502..=504).then_some(Self::ErrorAnswer),
            Failure::Malformed | Failure::Known(_) => None,
        }
    }
}

/// The refusal of a request that must not be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Why the last request to the host failed.
    pub reason: Reason,
    /// The user may retry after this time.
    pub retry_in: Duration,
}

/// Permission to send one token request. The caller records its outcome once, or releases it.
#[derive(Debug)]
pub struct Admission {
    user: ObjectRef,
    began: Duration,
    /// The opening of the breaker that the request probes. None if the breaker was closed.
    probe: Option<u64>,
}

/// The circuit breaker. Times are the caller's monotonic clock, as durations since any fixed moment.
#[derive(Debug, Default)]
pub struct CircuitBreaker {
    /// Time of the last successful token request.
    succeeded: Option<Duration>,
    /// Users that failed since then and within [`WINDOW`], with the time of their last failure: at most
    /// [`OF_ONE_NAMESPACE`] users of one namespace.
    evidence: Vec<(Duration, ObjectRef)>,
    /// Connection failures since the last response.
    unreachable: u32,
    /// Whether a connection failed or discovery got no answer, without any response since.
    silent: bool,
    /// The earliest time of the next probe.
    next: Duration,
    /// Namespaces that failed within [`MEMORY`]. The empty name stands for discovery.
    namespaces: BTreeMap<Arc<str>, Namespace>,
    open: Option<Open>,
    /// How often the breaker has opened.
    openings: u64,
}

#[derive(Debug, Default)]
struct Namespace {
    last_failure: Duration,
    /// Whether the last request of the namespace failed.
    failing: bool,
    /// Whether the namespace failed before or while a request of any namespace succeeded (rule 2).
    suspect: bool,
    /// Failed probes since the breaker opened.
    probes: u32,
    /// The earliest time of the next probe of this namespace.
    not_before: Duration,
}

#[derive(Debug)]
struct Open {
    id: u64,
    reason: Reason,
    /// Probes in flight.
    in_flight: usize,
    waiting: BTreeMap<Arc<str>, Waiting>,
    /// After this time no further request is expected.
    until: Duration,
}

/// A namespace in the queue for a probe.
#[derive(Debug)]
struct Waiting {
    /// When it was first refused.
    since: Duration,
    /// The user that is to send the next probe.
    user: Arc<str>,
    /// The time at which that user is to retry.
    told: Duration,
    /// The latest retry time assigned to its other users.
    last: Duration,
}

impl CircuitBreaker {
    /// Asks for permission to send a token request for `user`.
    pub fn admit(&mut self, now: Duration, user: &ObjectRef) -> Result<Admission, Refused> {
        Ok(Admission {
            user: user.clone(),
            began: now,
            probe: self.probe(now, user)?,
        })
    }

    fn probe(&mut self, now: Duration, user: &ObjectRef) -> Result<Option<u64>, Refused> {
        let Some(open) = &mut self.open else { return Ok(None) };
        let (namespaces, next) = (&self.namespaces, self.next);
        let due = |name| {
            namespaces
                .get(name)
                .map_or(next, |n: &Namespace| n.not_before.max(next))
        };
        let failed = |name| namespaces.get(name).filter(|n| n.failing).map(|n| n.last_failure);
        let name = &user.namespace;
        let since = open.waiting.get(name).map_or(now, |waiting| waiting.since);
        let (own_due, place) = (due(name), (failed(name), since));
        let ahead = open.waiting.iter().filter(|(other, waiting)| {
            let expected = due(other) <= now && now < waiting.told + GRACE;
            *other != name && expected && (failed(other), waiting.since) < place
        });
        let ahead = u32::try_from(ahead.count()).unwrap_or(u32::MAX);
        let latest = (place.0.is_none() && !self.silent).then(|| since + LONGEST);
        let first = open.in_flight == 0 && own_due <= now && ahead == 0;
        if first || latest.is_some_and(|latest| latest <= now) {
            open.waiting.remove(name);
            open.in_flight += 1;
            self.next = next.max(now + SPACING);
            return Ok(Some(open.id));
        }
        let in_line = (SPACING * ahead.saturating_add(1)).min(PATIENCE);
        let told = own_due.max(now + in_line);
        let told = latest.map_or(told, |latest| told.min(latest));
        let retry_at = open.refuse(now, user, told);
        Err(Refused {
            reason: open.reason,
            retry_in: retry_at.saturating_sub(now),
        })
    }

    /// Records that the request succeeded, or was refused in a way that shows that the host works. Returns whether this
    /// closed the breaker: then the caller wakes the users that it refused.
    pub fn record_success(&mut self, now: Duration, request: &Admission) -> bool {
        if let Some(namespace) = self.namespaces.get_mut(&request.user.namespace) {
            namespace.failing = false;
            namespace.not_before = Duration::ZERO;
        }
        for namespace in self.namespaces.values_mut() {
            namespace.suspect = true;
        }
        self.succeeded = Some(now);
        self.prune(now);
        self.close()
    }

    /// Records that the request failed. `retry_after` is the delay that the server asked for, from now on.
    pub fn record_failure(&mut self, now: Duration, request: &Admission, failure: Failure, retry_after: Duration) {
        let probe = self.end(request);
        if matches!(failure, Failure::Status { .. } | Failure::Malformed) {
            self.host_responded();
        }
        let Some(fault) = Fault::of(failure) else { return };
        let contradicted = self.succeeded.is_some_and(|at| request.began <= at);
        let counts = self.record_namespace_failure(now, &request.user.namespace, contradicted);
        self.delay_probes(now, &request.user.namespace, probe, retry_after);
        self.silent |= fault == Fault::Connection && !contradicted;
        self.note(now, &request.user, failure, counts);
    }

    /// Records that no token was requested because discovery failed.
    pub fn record_no_discovery(
        &mut self,
        now: Duration,
        request: &Admission,
        instance: &str,
        failure: Failure,
        retry_after: Duration,
    ) {
        if self.end(request) {
            self.record_namespace_failure(now, &request.user.namespace, false);
            self.delay_probes(now, &request.user.namespace, true, retry_after);
        }
        self.record_discovery(now, instance, Err(failure));
    }

    /// Records the result of discovery of an instance. Returns whether this closed the breaker: then the caller wakes
    /// the users that it refused. An error status is no evidence against the host, because a wrong issuer may be the
    /// cause.
    pub fn record_discovery(&mut self, now: Duration, instance: &str, ended: Result<(), Failure>) -> bool {
        let fault = ended.err().and_then(Fault::of);
        if let (Err(failure), Some(Fault::Connection | Fault::NoAnswer)) = (ended, fault) {
            let instance = ObjectRef::new("", instance);
            let counts = self.record_namespace_failure(now, &instance.namespace, false);
            self.silent = true;
            self.note(now, &instance, failure, counts);
            return false;
        }
        let recovered = self.silent && ended.is_ok();
        self.host_responded();
        recovered && self.close()
    }

    /// Records that the request was not sent, or that its outcome is inconclusive. The namespace waits as after a
    /// failed probe. Otherwise a namespace whose probes are always inconclusive would stay at the head of the queue.
    pub fn release(&mut self, now: Duration, request: &Admission) {
        if self.end(request) {
            self.record_namespace_failure(now, &request.user.namespace, false);
            self.delay_probes(now, &request.user.namespace, true, Duration::ZERO);
        }
    }

    /// Whether the breaker refuses requests. It counts as closed once no request was made for [`QUIET`].
    #[must_use]
    pub fn is_open(&self, now: Duration) -> bool {
        let open = self.open.as_ref();
        open.is_some_and(|open| open.in_flight > 0 || now < open.until)
    }

    /// Ends the request. Returns whether it was a probe of the current opening.
    fn end(&mut self, request: &Admission) -> bool {
        let open = self.open.as_mut().filter(|open| request.probe == Some(open.id));
        open.map(|open| open.in_flight -= 1).is_some()
    }

    fn host_responded(&mut self) {
        self.unreachable = 0;
        self.silent = false;
    }

    fn close(&mut self) -> bool {
        self.host_responded();
        self.evidence.clear();
        self.next = Duration::ZERO;
        for namespace in self.namespaces.values_mut() {
            namespace.probes = 0;
        }
        self.open.take().is_some()
    }

    /// Remembers a failure of the namespace. Returns whether it counts against the host. It does not if a success since
    /// the start of the request contradicts it, or if the namespace is a suspect and a request has succeeded within
    /// [`WINDOW`].
    fn record_namespace_failure(&mut self, now: Duration, namespace: &Arc<str>, contradicted: bool) -> bool {
        self.prune(now);
        let lately = self.succeeded.is_some_and(|at| now < at + WINDOW);
        let namespace = self.namespaces.entry(namespace.clone()).or_default();
        namespace.suspect |= contradicted;
        namespace.last_failure = now;
        namespace.failing = true;
        !(contradicted || namespace.suspect && lately)
    }

    /// Delays the next probe of the namespace, and those of other namespaces by at most [`LONGEST`].
    fn delay_probes(&mut self, now: Duration, namespace: &Arc<str>, probe: bool, retry_after: Duration) {
        let namespace = self.namespaces.entry(namespace.clone()).or_default();
        namespace.not_before = namespace.not_before.max(now + retry_after);
        if probe {
            namespace.not_before = namespace.not_before.max(now + wait(namespace.probes));
            namespace.probes = namespace.probes.saturating_add(1);
        }
        self.next = self.next.max(now + retry_after.min(LONGEST));
    }

    fn note(&mut self, now: Duration, who: &ObjectRef, failure: Failure, counts: bool) {
        let reason = classify(failure, false);
        if let Some(open) = &mut self.open {
            open.reason = reason;
            open.until = open.until.max(now + QUIET);
            open.waiting.retain(|_, waiting| now < waiting.told + PATIENCE);
            return;
        }
        if !counts {
            return;
        }
        if Fault::of(failure) == Some(Fault::Connection) {
            self.unreachable = self.unreachable.saturating_add(1);
        }
        self.evidence.retain(|(at, user)| now < *at + WINDOW && user != who);
        self.evidence.push((now, who.clone()));
        let same = |(_, user): &(Duration, ObjectRef)| user.namespace == who.namespace;
        if self.evidence.iter().filter(|entry| same(entry)).count() > OF_ONE_NAMESPACE {
            let oldest = self.evidence.iter().position(same);
            oldest.map(|oldest| self.evidence.remove(oldest));
        }
        if self.evidence.len() >= USERS || self.unreachable >= CONNECTION_FAILURES {
            self.openings += 1;
            self.next = self.next.max(now + SPACING);
            self.open = Some(Open {
                id: self.openings,
                reason,
                in_flight: 0,
                waiting: BTreeMap::new(),
                until: now + QUIET,
            });
        }
    }

    fn prune(&mut self, now: Duration) {
        self.namespaces
            .retain(|_, namespace| now < namespace.last_failure + MEMORY || now < namespace.not_before);
    }
}

impl Open {
    /// Returns when the user may retry. One user of each namespace retries for the next probe. The others get later
    /// times, in case that user does not retry.
    fn refuse(&mut self, now: Duration, user: &ObjectRef, told: Duration) -> Duration {
        let waiting = self.waiting.entry(user.namespace.clone()).or_insert_with(|| Waiting {
            since: now,
            user: user.name.clone(),
            told,
            last: told,
        });
        if waiting.user != user.name && now < waiting.told + GRACE {
            let last = waiting.last.max(waiting.told) + LONGEST;
            waiting.last = last.min(waiting.told.max(now + PATIENCE));
            return waiting.last;
        }
        waiting.user = user.name.clone();
        waiting.told = told;
        self.until = self.until.max(told + LONGEST);
        told
    }
}

/// The wait after a failed probe that follows `probes` other failed probes.
fn wait(probes: u32) -> Duration {
    Duration::from_secs(1 << probes.min(10)).min(LONGEST)
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
