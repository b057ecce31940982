//! The breaker against a simulated host with arbitrary tenants, in virtual time.
//!
//! Users that are refused retry at the assigned time or earlier. Requests take time and overlap. When the breaker
//! closes, the users that it refused retry at once, because the queue wakes them.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::sample::select;

use super::*;

const MINUTES: Duration = Duration::from_mins(5);

/// How a request ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Success,
    Failure(Failure),
    /// 429, with the seconds of its `Retry-After`.
    RateLimited(u64),
    /// Not sent, or inconclusive.
    Nothing,
}

/// The duration of a request in milliseconds, and how it ends.
type Fate = (u64, End);

/// The users of a namespace, the sequence of results of their requests, and the pause in milliseconds between the end
/// of a request and the next request of the same user.
#[derive(Clone, Debug)]
struct Tenant {
    users: usize,
    fates: Vec<Fate>,
    /// Time of the first request of the first user, in milliseconds.
    start: u64,
    pause: u64,
    /// Whether its users retry before the assigned time, as if their objects changed all the time.
    impatient: bool,
}

/// The state of the breaker at one admission.
#[derive(Clone, Copy, Debug)]
struct SeenAdmission {
    at: Duration,
    tenant: usize,
    /// Number of other probes in flight. None if the breaker was closed.
    beside: Option<usize>,
    silent: bool,
    /// Whether the last request of its namespace failed.
    failing: bool,
}

enum Event {
    Ask,
    End(Admission, End),
}

struct World {
    breaker: CircuitBreaker,
    now: Duration,
    tenants: Vec<Tenant>,
    /// The result of discovery, which follows each failure.
    discovery: Result<(), Failure>,
    events: BTreeMap<(Duration, usize), (usize, usize, Event)>,
    count: usize,
    /// The retry event of each refused user.
    refused: BTreeMap<(usize, usize), (Duration, usize)>,
    sent: Vec<usize>,
    /// The time since which each namespace is refused.
    since: Vec<Option<Duration>>,
    /// The longest time for which each namespace was refused.
    longest: Vec<Duration>,
    admissions: Vec<SeenAdmission>,
    /// How long the breaker was open in total.
    open: Duration,
}

impl World {
    fn new(tenants: Vec<Tenant>, discovery: Result<(), Failure>) -> Self {
        let count = tenants.len();
        let mut world = Self {
            breaker: CircuitBreaker::default(),
            now: Duration::ZERO,
            discovery,
            events: BTreeMap::new(),
            count: 0,
            refused: BTreeMap::new(),
            sent: vec![0; count],
            since: vec![None; count],
            longest: vec![Duration::ZERO; count],
            admissions: Vec::new(),
            open: Duration::ZERO,
            tenants,
        };
        for tenant in 0..count {
            let Tenant {
                users, start, pause, ..
            } = world.tenants[tenant];
            for user in 0..users {
                // Users start at different times.
                let later = pause * u64::try_from(user).expect("few") % 20_000;
                world.plan(Duration::from_millis(start + later), tenant, user, Event::Ask);
            }
        }
        world
    }

    fn plan(&mut self, at: Duration, tenant: usize, user: usize, event: Event) -> (Duration, usize) {
        self.count += 1;
        self.events.insert((at, self.count), (tenant, user, event));
        (at, self.count)
    }

    fn user(tenant: usize, user: usize) -> ObjectRef {
        ObjectRef::new(&tenant.to_string(), &user.to_string())
    }

    fn run(&mut self, until: Duration) {
        while let Some(((at, _), (tenant, user, event))) = self.events.pop_first() {
            if at > until {
                break;
            }
            if self.breaker.open.is_some() {
                self.open += at.saturating_sub(self.now);
            }
            self.now = at;
            match event {
                Event::Ask => self.ask(tenant, user),
                Event::End(request, end) => self.end(tenant, user, &request, end),
            }
        }
        self.now = until;
        for tenant in 0..self.tenants.len() {
            self.admitted(tenant);
        }
    }

    fn admitted(&mut self, tenant: usize) {
        if let Some(since) = self.since[tenant].take() {
            self.longest[tenant] = self.longest[tenant].max(self.now.saturating_sub(since));
        }
    }

    fn ask(&mut self, tenant: usize, user: usize) {
        self.refused.remove(&(tenant, user));
        let object = Self::user(tenant, user);
        let namespace = self.breaker.namespaces.get(&object.namespace);
        let admission = SeenAdmission {
            at: self.now,
            tenant,
            beside: self.breaker.open.as_ref().map(|open| open.in_flight),
            silent: self.breaker.silent,
            failing: namespace.is_some_and(|namespace| namespace.failing),
        };
        match self.breaker.admit(self.now, &object) {
            Ok(request) => {
                self.admitted(tenant);
                self.admissions.push(admission);
                let fates = &self.tenants[tenant].fates;
                let (takes, end) = fates[self.sent[tenant] % fates.len()];
                self.sent[tenant] += 1;
                let at = self.now + Duration::from_millis(takes);
                self.plan(at, tenant, user, Event::End(request, end));
            }
            Err(refused) => {
                self.since[tenant].get_or_insert(self.now);
                let pause = Duration::from_millis(self.tenants[tenant].pause);
                let wait = if self.tenants[tenant].impatient {
                    refused.retry_in.min(pause)
                } else {
                    refused.retry_in
                };
                let retry = self.plan(self.now + wait, tenant, user, Event::Ask);
                self.refused.insert((tenant, user), retry);
            }
        }
    }

    fn end(&mut self, tenant: usize, user: usize, request: &Admission, end: End) {
        let now = self.now;
        let mut closed = false;
        let failure = match end {
            End::Success => {
                closed = self.breaker.record_success(now, request);
                None
            }
            End::Failure(failure) => Some((failure, Duration::ZERO)),
            End::RateLimited(seconds) => Some((status(429), Duration::from_secs(seconds))),
            End::Nothing => {
                self.breaker.release(now, request);
                None
            }
        };
        if let Some((failure, retry_after)) = failure {
            self.breaker.record_failure(now, request, failure, retry_after);
            closed |= self.breaker.record_discovery(now, "main", self.discovery);
        }
        let pause = Duration::from_millis(self.tenants[tenant].pause);
        self.plan(now + pause, tenant, user, Event::Ask);
        if closed {
            for ((tenant, user), retry) in std::mem::take(&mut self.refused) {
                self.events.remove(&retry);
                self.plan(now, tenant, user, Event::Ask);
            }
        }
    }
}

fn status(code: u16) -> Failure {
    Failure::Status {
        code,
        error: None,
        retry_after: None,
    }
}

/// The ways in which a tenant can make its own requests fail: all but connection failures.
fn failure() -> impl Strategy<Value = End> + Clone {
    prop_oneof![
        3 => Just(End::Failure(status(503))),
        3 => Just(End::Failure(Failure::Timeout)),
        1 => Just(End::Failure(Failure::Broken)),
        1 => Just(End::Failure(status(404))),
        2 => (0..1_000_u64).prop_map(End::RateLimited),
        1 => Just(End::Nothing),
    ]
}

fn fates(end: impl Strategy<Value = End>) -> impl Strategy<Value = Vec<Fate>> {
    let takes = prop_oneof![0..100_u64, Just(10_000), 0..60_000_u64];
    prop::collection::vec((takes, end), 1..4)
}

fn tenant(fates: impl Strategy<Value = Vec<Fate>>) -> impl Strategy<Value = Tenant> {
    let pause = prop_oneof![200..2_000_u64, 200..20_000_u64];
    (1..6_usize, fates, 0..30_000_u64, pause, any::<bool>()).prop_map(|(users, fates, start, pause, impatient)| {
        Tenant {
            users,
            fates,
            start,
            pause,
            impatient,
        }
    })
}

/// Tenants whose requests end with values of `end`.
fn tenants(end: impl Strategy<Value = End> + Clone + 'static) -> impl Strategy<Value = Vec<Tenant>> {
    prop::collection::vec(tenant(fates(end)), 1..12)
}

/// Tenants whose requests always fail, mostly fail, or fail after the first few successes.
fn attackers() -> impl Strategy<Value = Vec<Tenant>> {
    let succeeds_first = (1..4_usize, fates(failure())).prop_map(|(first, failing)| {
        let failing = failing.into_iter().cycle().take(1_000);
        std::iter::repeat_n((10, End::Success), first)
            .chain(failing)
            .collect::<Vec<Fate>>()
    });
    let mostly_fails = prop_oneof![4 => failure(), 1 => Just(End::Success)];
    prop_oneof![
        tenants(failure()),
        tenants(mostly_fails),
        prop::collection::vec(tenant(succeeds_first), 3..12),
    ]
}

/// A namespace whose requests succeed, frequent or rare.
fn good() -> impl Strategy<Value = Tenant> {
    let pause = prop_oneof![1_000..60_000_u64, 60_000..300_000_u64];
    (1..4_usize, 0..20_000_u64, 0..200_000_u64, pause).prop_map(|(users, takes, start, pause)| Tenant {
        users,
        fates: vec![(takes, End::Success)],
        start,
        pause,
        impatient: false,
    })
}

/// Discovery of a host that serves at least one namespace: it always gets a response, even for a wrong issuer.
fn answers() -> impl Strategy<Value = Result<(), Failure>> {
    prop_oneof![Just(Ok(())), Just(Err(status(404))), Just(Err(status(503)))]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 2))]

    /// P1. Other namespaces may fail, hang, sometimes succeed, get any `Retry-After` and retry too early.
    #[test]
    fn succeeding_namespace_is_refused_for_at_most_30_s(
        others in attackers(), good in good(), discovery in answers(),
    ) {
        let mut world = World::new([vec![good], others].concat(), discovery);
        world.run(MINUTES);
        prop_assert!(world.longest[0] <= LONGEST, "{:?}", world.longest[0]);
    }

    /// P2. A host that answers no request.
    #[test]
    fn silent_host_gets_one_request_at_a_time(
        tenants in tenants(select(vec![Failure::Connect, Failure::Timeout, Failure::Broken]).prop_map(End::Failure)),
    ) {
        let mut world = World::new(tenants, Err(Failure::Timeout));
        world.run(MINUTES);
        let admissions = world.admissions.into_iter();
        let probes: Vec<SeenAdmission> = admissions.filter(|probe| probe.beside.is_some()).collect();
        for (i, probe) in probes.iter().enumerate() {
            prop_assert!(!probe.silent || probe.beside == Some(0), "{probe:?}");
            let first = probes[0].at;
            prop_assert!(probe.at >= first + SPACING * u32::try_from(i).expect("few"), "{probe:?} is number {i}");
        }
        for tenant in 0..world.tenants.len() {
            let own: Vec<Duration> = probes.iter().filter(|probe| probe.tenant == tenant).map(|probe| probe.at).collect();
            // 1, 2, 4, 8 and 16 s, then 30 s.
            let late = own.windows(2).skip(5).map(|pair| pair[1].saturating_sub(pair[0])).min();
            prop_assert!(late.is_none_or(|gap| gap >= LONGEST), "{own:?}");
        }
    }

    /// P2. A host that answers but issues no token: besides the one probe, each namespace may send one request.
    #[test]
    fn failing_host_gets_few_requests_besides_the_probe(
        tenants in tenants(failure().prop_filter("requests that are sent", |end| !matches!(end, End::Nothing))),
        discovery in answers(),
    ) {
        let mut world = World::new(tenants, discovery);
        world.run(MINUTES);
        for tenant in 0..world.tenants.len() {
            let own = world.admissions.iter().filter(|admission| admission.tenant == tenant);
            let is_beside = |admission: &&SeenAdmission| admission.beside.is_some_and(|others| others > 0);
            let beside: Vec<&SeenAdmission> = own.filter(is_beside).collect();
            prop_assert!(beside.iter().all(|admission| !admission.failing), "{beside:?}");
            // A slow request (30 s or more) has not failed yet when the next may be sent.
            let slow = world.tenants[tenant].fates.iter().any(|(takes, _)| Duration::from_millis(*takes) >= LONGEST);
            let mut ends = world.tenants[tenant].fates.iter().map(|(_, end)| end);
            let not_found = ends.any(|end| matches!(end, End::Failure(Failure::Status { code: 404, .. })));
            prop_assert!(beside.len() <= if slow { 2 } else { 1 } || not_found, "{beside:?}");
        }
    }

    /// P3. One namespace.
    #[test]
    fn one_namespace_alone_never_opens_it(
        only in tenant(fates(prop_oneof![4 => failure(), 1 => Just(End::Success)])), discovery in answers(),
    ) {
        let mut world = World::new(vec![only], discovery);
        world.run(MINUTES);
        prop_assert_eq!(world.open, Duration::ZERO);
    }

    /// P3. Discovery fails for all users of the instance, in any way except connection failures: an instance with other
    /// connection settings has its own breaker.
    #[test]
    fn one_instance_with_wrong_settings_never_opens_it(
        failures in prop::collection::vec(
            (0..10_usize, 0..5_000_u64, prop_oneof![
                Just(Failure::Timeout), Just(Failure::Broken), Just(Failure::Malformed),
                Just(Failure::Known(Reason::IssuerMismatch)), (400..600_u16).prop_map(status),
            ]),
            1..200,
        ),
    ) {
        let mut breaker = CircuitBreaker::default();
        let mut now = Duration::ZERO;
        for (tenant, millis, failure) in failures {
            now += Duration::from_millis(millis);
            breaker.record_discovery(now, "mistyped", Err(failure));
            let request = breaker.admit(now, &World::user(tenant, tenant)).expect("admitted");
            breaker.record_no_discovery(now, &request, "mistyped", failure, Duration::ZERO);
            prop_assert!(!breaker.is_open(now));
        }
    }

    /// P4. Some namespaces fail any number of times. Then a request succeeds, and further requests succeed within each
    /// minute. The namespaces that failed before continue to fail and do not open the breaker.
    #[test]
    fn namespaces_that_failed_before_a_success_cannot_open_it_while_others_succeed(
        before in tenants(failure()), until in 0..300_u64,
        gaps in prop::collection::vec((0..59_000_u64, prop::collection::vec((any::<usize>(), 0..5_usize), 0..20)), 1..50),
    ) {
        let count = before.len();
        let mut world = World::new(before, Ok(()));
        world.run(Duration::from_secs(until));
        let breaker = &mut world.breaker;
        let mut now = world.now;
        let known = |tenant: &usize| breaker.namespaces.contains_key(&World::user(*tenant, 0).namespace);
        let failed: Vec<usize> = (0..count).filter(known).collect();
        let good = ObjectRef::new("good", "1");
        let request = breaker.admit(now, &good).or_else(|_| {
            now += LONGEST;
            breaker.admit(now, &good)
        });
        breaker.record_success(now, &request.expect("not refused for longer"));
        for (gap, failures) in gaps {
            let request = breaker.admit(now, &good).expect("closed");
            breaker.record_success(now, &request);
            prop_assert!(breaker.open.is_none());
            let failures = failures.iter().filter(|_| !failed.is_empty());
            // Each namespace fails in every round, so that none is forgotten.
            let all = failed.iter().map(|tenant| (*tenant, 9));
            for (tenant, user) in failures.map(|(i, user)| (failed[i % failed.len()], *user)).chain(all) {
                let request = breaker.admit(now, &World::user(tenant, user)).expect("closed");
                now += Duration::from_millis(gap / 40);
                let failure = [status(503), Failure::Timeout, Failure::Connect][user % 3];
                breaker.record_failure(now, &request, failure, Duration::ZERO);
                prop_assert!(breaker.open.is_none(), "{tenant} {user}: {:?}", breaker.namespaces);
            }
        }
    }

    /// After an outage of the whole host, other namespaces may fail forever.
    #[test]
    fn namespace_that_failed_during_an_outage_is_admitted_after_it(
        others in prop::collection::vec(tenant(fates(prop_oneof![Just(End::Failure(status(503))), Just(End::Nothing)])), 1..12),
        good in good(), failures in 1..10_usize,
    ) {
        let slowest = |tenants: &[Tenant]| tenants.iter().flat_map(|t| &t.fates).map(|(takes, _)| *takes).max();
        let slowest = Duration::from_millis(slowest(&others).max(slowest(std::slice::from_ref(&good))).expect("one"));
        let namespaces = u32::try_from(others.len() + 1).expect("few");
        let [(takes, _)] = good.fates[..] else { unreachable!("one fate") };
        let failing = std::iter::repeat_n((takes, End::Failure(status(503))), failures);
        let fates = failing.chain(std::iter::repeat_n((takes, End::Success), 1_000)).collect();
        let mut world = World::new([vec![Tenant { fates, ..good }], others].concat(), Ok(()));
        world.run(MINUTES * 2);
        let bound = LONGEST + (slowest + SPACING + GRACE) * namespaces;
        prop_assert!(world.longest[0] <= bound, "{:?} of {bound:?}", world.longest[0]);
    }
}

/// Two namespaces whose requests fail immediately, next to a namespace that refreshes 50 tokens every 40 s: the breaker
/// is open for moments only.
#[test]
fn two_failing_namespaces_do_not_keep_it_open() {
    let fails = Tenant {
        users: 60,
        fates: vec![(3, End::Failure(status(503)))],
        start: 0,
        pause: 1_000,
        impatient: false,
    };
    let good = Tenant {
        users: 50,
        fates: vec![(3, End::Success)],
        start: 100,
        pause: 40_000,
        impatient: false,
    };
    let mut world = World::new(vec![good, fails.clone(), fails], Ok(()));
    world.run(MINUTES);
    assert!(world.open < Duration::from_secs(2), "open for {:?}", world.open);
    assert!(world.longest[0] < Duration::from_secs(2), "{:?}", world.longest[0]);
}
