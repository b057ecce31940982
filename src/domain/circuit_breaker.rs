//! The circuit breaker of one way to one ZITADEL host: whether a token request may be sent now, as a pure state machine.
//!
//! A tenant can make its own requests fail: by slow or broken Actions, or by a refused key, which ZITADEL up to v4.13
//! answers with a 500. The breaker must tell that from a host that is down. The rule:
//!
//! 1. The breaker opens after three connection failures without any answer in between, or when requests of three users in
//!    two namespaces fail within a minute and no token request has succeeded meanwhile.
//! 2. A successful token request closes the breaker. Every namespace that failed before, or while that request succeeded,
//!    is then a suspect until ten minutes after its last failure: its failures count only if no request at all has
//!    succeeded for a minute.
//! 3. While the breaker is open, it admits one probe at a time, at most one per second, but for rule 4. Namespaces whose
//!    last request did not fail go first, then those whose last failure is oldest. A namespace whose probe failed or said
//!    nothing waits 1, 2, 4 .. 30 s, or for its `Retry-After`, which holds up the others for 30 s at most.
//! 4. As long as the host answers, a namespace whose last request did not fail is refused for 30 s at most.
//! 5. A host is silent if no connection is made, or discovery gets no answer. Successful discovery closes the breaker of a
//!    silent host; of any other host discovery proves only that it answers.
//!
//! `model` checks the bounds that follow.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::domain::failure::{Failure, classify};
use crate::domain::object_ref::ObjectRef;
use crate::domain::reason::Reason;

/// Connection failures in a row that open the breaker: one may be a restart behind a balancer.
const CONNECTION_FAILURES: u32 = 3;

/// Users whose requests fail that open the breaker, and how many of them may be of one namespace: a tenant owns all users
/// of its own.
const USERS: usize = 3;
const OF_ONE_NAMESPACE: usize = 2;

/// Failures count together, and a success speaks for the host, for this long.
const WINDOW: Duration = Duration::from_mins(1);

/// A namespace is remembered for this long after its last failure.
const MEMORY: Duration = Duration::from_mins(10);

/// Between the starts of two probes.
const SPACING: Duration = Duration::from_secs(1);

/// The longest time that a namespace waits because of its own failed probes, or because of other namespaces.
const LONGEST: Duration = Duration::from_secs(30);

/// A namespace loses its place in the line if its user comes so much later than it was told.
const GRACE: Duration = Duration::from_secs(5);

/// Users beyond the first of their namespace are woken when the breaker closes. Should that fail, they come back
/// after this.
const PATIENCE: Duration = Duration::from_mins(5);

/// Longer than any back-off with its jitter, and a request. If nothing is asked for so long, nobody needs the host.
const QUIET: Duration = Duration::from_mins(7);

/// What one failed request says against the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// No connection, or no trusted one. No tenant can cause that.
    Connection,
    /// A timeout, or a connection that ends before the answer.
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

/// A request that must not be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Why the last request failed.
    pub reason: Reason,
    /// The user may ask again after this.
    pub retry_in: Duration,
}

/// A token request that may be sent. Its outcome is recorded once, or it is released.
#[derive(Debug)]
pub struct Admission {
    user: ObjectRef,
    began: Duration,
    /// Which opening of the breaker it probes; none if the breaker was closed.
    probe: Option<u64>,
}

/// Time is the caller's monotonic clock, as a duration since any fixed moment.
#[derive(Debug, Default)]
pub struct CircuitBreaker {
    /// The last successful token request.
    succeeded: Option<Duration>,
    /// Who failed since then, within the window: of each user the last failure, of each namespace two users.
    evidence: Vec<(Duration, ObjectRef)>,
    /// Connection failures since the last answer.
    unreachable: u32,
    /// No connection was made, or discovery got no answer, and nothing was answered since.
    silent: bool,
    /// No probe before this.
    next: Duration,
    /// Namespaces that failed lately. The empty one stands for discovery.
    namespaces: BTreeMap<Arc<str>, Namespace>,
    open: Option<Open>,
    /// How often it opened.
    openings: u64,
}

#[derive(Debug, Default)]
struct Namespace {
    last_failure: Duration,
    /// Its last request failed.
    failing: bool,
    /// It failed while others succeeded.
    suspect: bool,
    /// Failed probes since the breaker opened.
    probes: u32,
    /// No probe of this namespace before.
    not_before: Duration,
}

#[derive(Debug)]
struct Open {
    id: u64,
    reason: Reason,
    /// Probes that have not ended.
    in_flight: usize,
    waiting: BTreeMap<Arc<str>, Waiting>,
    /// After this nobody is expected any more.
    until: Duration,
}

/// A namespace in the line for a probe.
#[derive(Debug)]
struct Waiting {
    /// When it was refused first.
    since: Duration,
    /// The user who comes for the next probe.
    user: Arc<str>,
    /// When.
    told: Duration,
    /// When the last of its other users comes.
    last: Duration,
}

impl CircuitBreaker {
    /// A user asks to send a token request.
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

    /// The request succeeded, or its refusal shows that the host works. True if the breaker was open: those that it
    /// refused may come.
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

    /// The request failed. The server asked to wait for `retry_after` from now on.
    pub fn record_failure(&mut self, now: Duration, request: &Admission, failure: Failure, retry_after: Duration) {
        let probe = self.end(request);
        if matches!(failure, Failure::Status { .. } | Failure::Malformed) {
            self.hear();
        }
        let Some(fault) = Fault::of(failure) else { return };
        let contradicted = self.succeeded.is_some_and(|at| request.began <= at);
        let counts = self.blame(now, &request.user.namespace, contradicted);
        self.postpone(now, &request.user.namespace, probe, retry_after);
        self.silent |= fault == Fault::Connection && !contradicted;
        self.note(now, &request.user, failure, counts);
    }

    /// No token was asked for, because discovery failed.
    pub fn record_no_discovery(
        &mut self,
        now: Duration,
        request: &Admission,
        instance: &str,
        failure: Failure,
        retry_after: Duration,
    ) {
        if self.end(request) {
            self.blame(now, &request.user.namespace, false);
            self.postpone(now, &request.user.namespace, true, retry_after);
        }
        self.record_discovery(now, instance, Err(failure));
    }

    /// How discovery of an instance ended. True if that closed the breaker: those that it refused may come. A status is
    /// no evidence, since a wrong issuer may be the cause.
    pub fn record_discovery(&mut self, now: Duration, instance: &str, ended: Result<(), Failure>) -> bool {
        let fault = ended.err().and_then(Fault::of);
        if let (Err(failure), Some(Fault::Connection | Fault::NoAnswer)) = (ended, fault) {
            let instance = ObjectRef::new("", instance);
            let counts = self.blame(now, &instance.namespace, false);
            self.silent = true;
            self.note(now, &instance, failure, counts);
            return false;
        }
        let recovered = self.silent && ended.is_ok();
        self.hear();
        recovered && self.close()
    }

    /// The request was not sent, or its outcome says nothing. The namespace waits as after a failed probe, else one whose
    /// probes never say anything would keep its place at the head of the line.
    pub fn release(&mut self, now: Duration, request: &Admission) {
        if self.end(request) {
            self.blame(now, &request.user.namespace, false);
            self.postpone(now, &request.user.namespace, true, Duration::ZERO);
        }
    }

    /// Whether it refuses requests, or would if somebody asked. If nobody asks any more, it is half-open.
    #[must_use]
    pub fn is_open(&self, now: Duration) -> bool {
        let open = self.open.as_ref();
        open.is_some_and(|open| open.in_flight > 0 || now < open.until)
    }

    /// Whether the request was a probe of the present opening.
    fn end(&mut self, request: &Admission) -> bool {
        let open = self.open.as_mut().filter(|open| request.probe == Some(open.id));
        open.map(|open| open.in_flight -= 1).is_some()
    }

    fn hear(&mut self) {
        self.unreachable = 0;
        self.silent = false;
    }

    fn close(&mut self) -> bool {
        self.hear();
        self.evidence.clear();
        self.next = Duration::ZERO;
        for namespace in self.namespaces.values_mut() {
            namespace.probes = 0;
        }
        self.open.take().is_some()
    }

    /// Remembers a failure of the namespace. Returns whether it counts against the host: a success since the request
    /// began contradicts it.
    fn blame(&mut self, now: Duration, namespace: &Arc<str>, contradicted: bool) -> bool {
        self.prune(now);
        let lately = self.succeeded.is_some_and(|at| now < at + WINDOW);
        let namespace = self.namespaces.entry(namespace.clone()).or_default();
        namespace.suspect |= contradicted;
        namespace.last_failure = now;
        namespace.failing = true;
        !(contradicted || namespace.suspect && lately)
    }

    /// Lets the namespace wait for its next probe, and the others a little.
    fn postpone(&mut self, now: Duration, namespace: &Arc<str>, probe: bool, retry_after: Duration) {
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
    /// When the user may ask again. One user of its namespace comes for the next probe, when it was told; the others
    /// come after it, in case that it does not.
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

/// The wait after so many failed probes and one more.
fn wait(probes: u32) -> Duration {
    Duration::from_secs(1 << probes.min(10)).min(LONGEST)
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
