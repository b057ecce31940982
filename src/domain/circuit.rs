//! The circuit toward one ZITADEL host: whether requests may be made at all, as a pure state machine (design §3.5).
//!
//! A host that is dead costs each request its timeout, and a host in trouble is not helped by more of them. But up to
//! v4.13 ZITADEL answers a bad key with a 500, and the slow actions of one organization are no outage: one tenant must
//! not stop the others. So what may be one user's fault counts only if several see it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::domain::facts::ObjectRef;
use crate::domain::failure::Failure;
use crate::domain::reason::Reason;

/// Faults of the host in a row that open the circuit: one refused connection may be a restart behind a balancer.
const HOST_FAULTS: usize = 3;

/// So many users, in so many namespaces, make a fault of what may be each one's own (design §3.5).
const USERS: usize = 3;
const NAMESPACES: usize = 2;

/// Older faults prove nothing: few users with bad keys that are retried slowly are no outage.
const WINDOW: Duration = Duration::from_mins(1);

/// The longest time without an attempt; the first is a second, and each is twice as long as the last.
const LONGEST: Duration = Duration::from_secs(30);

/// So many namespaces, and so many users of each, come back when the next attempt is due, so that there is one who makes
/// it.
const CANDIDATES: usize = 3;

/// Candidates who have not come so long after the attempt was due are gone.
const GRACE: Duration = Duration::from_secs(5);

/// The others are woken when the circuit closes; should that fail, they come back after this.
const PATIENCE: Duration = Duration::from_mins(5);

/// An attempt that has not ended after this was lost with its pass.
const LOST: Duration = Duration::from_mins(2);

/// What a failed request says of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The host itself: no connection, no trusted certificate, or discovery failed, which concerns no user.
    Host,
    /// A timeout, a connection that ends before the answer, 429, 500, 502, 503 or 504: maybe the host's, maybe this
    /// user's, whose slow actions a balancer may cut off in either way.
    Served(ObjectRef),
}

impl Fault {
    /// What the failure of a token request of this user says. None: nothing against the host, which
    /// answered, whatever it thinks of the request; or it was not asked.
    #[must_use]
    pub fn of(failure: Failure, user: &ObjectRef) -> Option<Self> {
        let served = || Self::Served(user.clone());
        match failure {
            Failure::Connect | Failure::Tls => Some(Self::Host),
            Failure::Timeout | Failure::Broken => Some(served()),
            Failure::Status { code, .. } => matches!(code, 429 | 500 | 502..=504).then(served),
            Failure::Malformed | Failure::Known(_) => None,
        }
    }
}

/// A request that must not be made now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Why the circuit opened.
    pub reason: Reason,
    /// After this one may ask again.
    pub retry_in: Duration,
}

/// Time is the caller's monotonic clock, as a duration since any fixed moment.
#[derive(Debug, Default)]
pub struct Circuit {
    faults: Vec<(Duration, Fault)>,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    reason: Reason,
    /// How often in a row.
    times: u32,
    until: Duration,
    /// Whose attempt is under way, and since when.
    attempt: Option<(Duration, ObjectRef)>,
    /// Namespaces whose attempt failed through what may be their own fault. One that has not tried goes first: else a
    /// tenant who comes each time that an attempt is due could keep the circuit open for all.
    tried: BTreeSet<Arc<str>>,
    /// Who was told to come back for the next attempt, by namespace.
    candidates: BTreeMap<Arc<str>, BTreeSet<ObjectRef>>,
}

impl Circuit {
    /// A user asks to make a request. While the circuit is open, one at a time may, after a while.
    pub fn admit(&mut self, now: Duration, user: &ObjectRef) -> Result<(), Refused> {
        let Some(open) = &mut self.open else { return Ok(()) };
        let under_way = open.attempt.as_ref().is_some_and(|(since, _)| now < *since + LOST);
        if now >= open.until + GRACE && !under_way {
            open.candidates.clear();
        }
        let after_others =
            open.tried.contains(&user.namespace) && open.candidates.keys().any(|n| !open.tried.contains(n));
        if now >= open.until && !under_way && !after_others {
            open.attempt = Some((now, user.clone()));
            open.candidates.remove(&user.namespace);
            return Ok(());
        }
        let soon = open.until.saturating_sub(now).max(Duration::from_secs(1));
        let retry_in = if open.is_candidate(user) { soon } else { PATIENCE };
        let reason = open.reason;
        Err(Refused { reason, retry_in })
    }

    /// Whether requests are refused.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// A request was answered as it should be. True if the circuit was open: those who were refused may come.
    pub fn worked(&mut self) -> bool {
        self.faults.clear();
        self.open.take().is_some()
    }

    /// What this user was admitted for was not sent, or told nothing.
    pub fn gave_up(&mut self, user: &ObjectRef) {
        if let Some(open) = &mut self.open {
            open.attempt.take_if(|(_, who)| who == user);
        }
    }

    /// A request failed for this reason.
    pub fn failed(&mut self, now: Duration, reason: Reason, fault: Fault) {
        if let Some(open) = &mut self.open {
            // Those that began before it opened say nothing new.
            let ended = open.attempt.take_if(|(_, who)| match &fault {
                Fault::Host => true,
                Fault::Served(user) => who == user,
            });
            if ended.is_some() {
                if let Fault::Served(user) = fault {
                    open.tried.insert(user.namespace);
                }
                open.reason = reason;
                open.times = open.times.saturating_add(1);
                open.until = now + wait(open.times);
            }
            return;
        }
        self.faults.retain(|(at, _)| now < *at + WINDOW);
        self.faults.push((now, fault));
        if self.is_down() {
            self.faults.clear();
            self.open = Some(Open::new(now, reason));
        }
    }

    fn is_down(&self) -> bool {
        let (mut hosts, mut users, mut namespaces) = (0, BTreeSet::new(), BTreeSet::new());
        for (_, fault) in &self.faults {
            match fault {
                Fault::Host => hosts += 1,
                Fault::Served(user) => {
                    users.insert(user);
                    namespaces.insert(&user.namespace);
                }
            }
        }
        let many = users.len() >= USERS && namespaces.len() >= NAMESPACES;
        hosts >= HOST_FAULTS || many || (hosts > 0 && !users.is_empty())
    }
}

impl Open {
    fn new(now: Duration, reason: Reason) -> Self {
        Self {
            reason,
            times: 0,
            until: now + wait(0),
            attempt: None,
            tried: BTreeSet::new(),
            candidates: BTreeMap::new(),
        }
    }

    /// Whether this user is, or becomes, one of the few who come back soon.
    fn is_candidate(&mut self, user: &ObjectRef) -> bool {
        if !self.candidates.contains_key(&user.namespace) {
            // Those who tried must not take the places of those who did not.
            let tried = self.tried.contains(&user.namespace);
            let like = self.candidates.keys().filter(|n| self.tried.contains(*n) == tried);
            if like.count() >= CANDIDATES {
                return false;
            }
        }
        let users = self.candidates.entry(user.namespace.clone()).or_default();
        users.contains(user) || users.len() < CANDIDATES && users.insert(user.clone())
    }
}

/// Each time twice as long.
fn wait(times: u32) -> Duration {
    Duration::from_secs(1 << times.min(10)).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn user(namespace: &str, name: &str) -> ObjectRef {
        ObjectRef::new(namespace, name)
    }

    fn served(namespace: &str, name: &str) -> Fault {
        Fault::Served(user(namespace, name))
    }

    fn after(faults: &[(u64, Fault)]) -> Circuit {
        let mut circuit = Circuit::default();
        for (second, fault) in faults {
            circuit.failed(at(*second), Reason::ServerError, fault.clone());
        }
        circuit
    }

    #[test]
    fn one_tenant_does_not_open_it_and_a_dead_host_does() {
        let one_tenant: Vec<_> = (0..50).map(|i| (i, served("noisy", &i.to_string()))).collect();
        let table = [
            ("nothing", vec![], true),
            ("one tenant's users", one_tenant, true),
            (
                "two users of two",
                vec![(0, served("a", "1")), (1, served("b", "2"))],
                true,
            ),
            (
                "the same user thrice",
                vec![(0, served("a", "1")), (1, served("b", "2")), (2, served("b", "2"))],
                true,
            ),
            (
                "three users of two",
                vec![(0, served("a", "1")), (1, served("b", "2")), (2, served("b", "3"))],
                false,
            ),
            (
                "too long ago",
                vec![(0, served("a", "1")), (1, served("b", "2")), (61, served("b", "3"))],
                true,
            ),
            ("a restart", vec![(0, Fault::Host), (1, Fault::Host)], true),
            (
                "no connection",
                vec![(0, Fault::Host), (1, Fault::Host), (2, Fault::Host)],
                false,
            ),
            (
                "discovery fails too",
                vec![(0, served("a", "1")), (1, Fault::Host)],
                false,
            ),
        ];
        for (name, faults, closed) in table {
            let last = faults.last().map_or(0, |(second, _)| *second);
            assert_eq!(
                after(&faults).admit(at(last), &user("c", "9")).is_ok(),
                closed,
                "{name}"
            );
        }
        let mut circuit = after(&[(0, Fault::Host), (1, Fault::Host)]);
        assert!(!circuit.worked());
        circuit.failed(at(2), Reason::ServerError, Fault::Host);
        assert!(circuit.admit(at(2), &user("c", "9")).is_ok(), "a success in between");
    }

    #[test]
    fn one_at_a_time_tries_ever_more_seldom_until_one_succeeds() {
        let mut circuit = after(&[(0, Fault::Host), (0, Fault::Host), (0, Fault::Host)]);
        let mut now = 0;
        for wait in [1, 2, 4, 8, 16, 30, 30] {
            let refused = circuit.admit(at(now), &user("a", "1")).expect_err("open");
            assert_eq!((refused.reason, refused.retry_in), (Reason::ServerError, at(wait)));
            now += wait;
            assert!(circuit.admit(at(now), &user("a", "1")).is_ok());
            assert!(circuit.admit(at(now), &user("a", "1")).is_err(), "one at a time");
            circuit.failed(at(now), Reason::ServerError, Fault::Host);
        }
        // A few come back for the next attempt, the rest wait to be woken. Whoever asks again is still one of them.
        for _ in 0..2 {
            let soon = (0..1_000).filter(|i| {
                let refused = circuit.admit(at(now), &user("a", &i.to_string())).expect_err("open");
                refused.retry_in < PATIENCE
            });
            assert_eq!(soon.count(), 3);
        }
        now += 30;
        assert!(circuit.admit(at(now), &user("a", "1")).is_ok());
        // Its pass died: another one tries.
        assert!(circuit.admit(at(now + 119), &user("a", "1")).is_err());
        assert!(circuit.admit(at(now + 120), &user("a", "1")).is_ok());
        assert!(circuit.worked());
        assert!(circuit.admit(at(now), &user("a", "1")).is_ok() && circuit.admit(at(now), &user("a", "2")).is_ok());
    }

    #[test]
    fn what_began_before_it_opened_is_no_attempt() {
        let mut circuit = after(&[(0, served("a", "1")), (0, served("a", "2")), (0, served("b", "3"))]);
        assert!(circuit.admit(at(1), &user("a", "1")).is_ok());
        circuit.failed(at(1), Reason::ServerError, served("b", "3"));
        circuit.gave_up(&user("b", "3"));
        assert!(
            circuit.admit(at(60), &user("c", "1")).is_err(),
            "that of a/1 is under way"
        );
        circuit.gave_up(&user("a", "1"));
        assert!(circuit.admit(at(60), &user("c", "1")).is_ok());
    }

    #[test]
    fn whose_attempt_failed_lets_others_try_first() {
        let kept_open = || {
            let mut circuit = after(&[(0, served("a", "1")), (0, served("a", "2")), (0, served("b", "3"))]);
            for (second, namespace) in [(1, "a"), (3, "b"), (7, "c")] {
                assert!(circuit.admit(at(second), &user(namespace, "1")).is_ok());
                // With as many users as it likes.
                for i in 0..100 {
                    assert!(circuit.admit(at(second), &user(namespace, &i.to_string())).is_err());
                }
                circuit.failed(at(second), Reason::ServerError, served(namespace, "1"));
            }
            let refused = circuit.admit(at(7), &user("good", "1")).expect_err("open");
            assert_eq!(refused.retry_in, at(8));
            for namespace in ["a", "b", "c"] {
                let refused = circuit
                    .admit(at(15), &user(namespace, "1"))
                    .expect_err("others go first");
                assert!(refused.retry_in < PATIENCE);
            }
            circuit
        };
        assert!(kept_open().admit(at(15), &user("good", "1")).is_ok());
        assert!(kept_open().admit(at(19), &user("a", "1")).is_err());
        assert!(kept_open().admit(at(20), &user("a", "1")).is_ok(), "nobody else comes");
    }
}
