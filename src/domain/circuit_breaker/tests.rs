//! Examples. `model` checks the bounds that hold in all cases.

use super::*;
use crate::domain::failure::OAuthError;

const NO_WAIT: Duration = Duration::ZERO;

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn user(namespace: &str, name: &str) -> ObjectRef {
    ObjectRef::new(namespace, name)
}

fn status(code: u16) -> Failure {
    Failure::Status {
        code,
        error: None,
        retry_after: None,
    }
}

/// One request or discovery: the time, the namespace and name (discovery of an instance has no namespace), and the
/// result.
#[derive(Clone, Copy)]
struct Step(u64, &'static str, &'static str, Result<(), Failure>);

/// Sends a request that ends at once. Returns whether it closed the breaker.
fn step(breaker: &mut CircuitBreaker, Step(second, namespace, name, ended): Step) -> bool {
    let now = at(second);
    if namespace.is_empty() {
        return breaker.record_discovery(now, name, ended);
    }
    let request = breaker.admit(now, &user(namespace, name)).expect("admitted");
    match ended {
        Ok(()) => return breaker.record_success(now, &request),
        Err(failure) => breaker.record_failure(now, &request, failure, NO_WAIT),
    }
    false
}

fn after(steps: &[Step]) -> CircuitBreaker {
    let mut breaker = CircuitBreaker::default();
    for one in steps {
        step(&mut breaker, *one);
    }
    breaker
}

fn failing(second: u64, namespace: &'static str, name: &'static str) -> Step {
    Step(second, namespace, name, Err(status(503)))
}

/// A breaker that users of the namespaces `a` and `b` opened.
fn opened() -> CircuitBreaker {
    after(&[failing(0, "a", "1"), failing(0, "a", "2"), failing(0, "b", "3")])
}

fn retry_in(breaker: &mut CircuitBreaker, second: u64, user: &ObjectRef) -> u64 {
    let refused = breaker.admit(at(second), user).expect_err("refused");
    refused.retry_in.as_secs()
}

fn check(table: &[(&str, Vec<Step>, bool)]) {
    for (name, steps, open) in table {
        let last = steps.last().map_or(0, |step| step.0);
        assert_eq!(after(steps).is_open(at(last)), *open, "{name}");
    }
}

fn hung(second: u64, namespace: &'static str, name: &'static str) -> Step {
    Step(second, namespace, name, Err(Failure::Timeout))
}

fn good(second: u64) -> Step {
    Step(second, "good", "1", Ok(()))
}

#[test]
fn three_failing_users_of_two_namespaces_open_it_without_a_success() {
    let two = [failing(0, "a", "1"), failing(1, "b", "2")];
    let and = |steps: &[Step]| [&two[..], steps].concat();
    let many = ["1", "2", "3"].repeat(20).into_iter().zip(0..);
    let refused = Failure::Status {
        code: 400,
        error: Some(OAuthError::InvalidGrant),
        retry_after: None,
    };
    check(&[
        ("nothing", vec![], false),
        (
            "one namespace",
            many.map(|(name, second)| failing(second, "a", name)).collect(),
            false,
        ),
        ("two users", and(&[]), false),
        ("one of two users twice", and(&[failing(2, "b", "2")]), false),
        ("three users", and(&[failing(2, "b", "3")]), true),
        ("one of three users hangs", and(&[hung(2, "b", "3")]), true),
        ("first failure a minute ago", and(&[failing(60, "b", "3")]), false),
        ("success in between", and(&[good(2), failing(3, "d", "3")]), false),
        (
            "responses that are no fault of the host",
            and(&[
                Step(2, "c", "1", Err(status(404))),
                Step(2, "d", "1", Err(Failure::Malformed)),
                Step(2, "e", "1", Err(refused)),
            ]),
            false,
        ),
    ]);
}

#[test]
fn connection_failures_open_it_and_an_error_status_of_discovery_never_does() {
    let cut = |second, namespace, name| Step(second, namespace, name, Err(Failure::Connect));
    let two = [cut(0, "a", "1"), cut(1, "a", "1")];
    let and = |steps: &[Step]| [&two[..], steps].concat();
    let answered = |second, ended| Step(second, "", "main", ended);
    check(&[
        ("two failures", and(&[]), false),
        ("one user", and(&[cut(2, "a", "1")]), true),
        (
            "discovery",
            [0, 1, 2].map(|second| cut(second, "", "main")).into(),
            true,
        ),
        (
            "response in between",
            and(&[failing(1, "a", "1"), cut(2, "a", "1")]),
            false,
        ),
        (
            "response to discovery in between",
            and(&[answered(1, Err(status(404))), cut(2, "a", "1")]),
            false,
        ),
        (
            "discovery of many instances hangs",
            ["one", "two", "three"].map(|instance| hung(0, "", instance)).into(),
            false,
        ),
        (
            "discovery and requests of one namespace hang",
            vec![hung(0, "", "one"), hung(1, "a", "1"), hung(2, "a", "2")],
            true,
        ),
        (
            "discovery returns errors",
            vec![
                answered(0, Err(status(503))),
                failing(1, "a", "1"),
                failing(2, "a", "2"),
            ],
            false,
        ),
    ]);
}

#[test]
fn namespaces_that_failed_while_others_succeeded_cannot_open_it() {
    let failures = |second| {
        [
            failing(second, "a", "1"),
            failing(second, "a", "2"),
            failing(second, "b", "3"),
        ]
    };
    let closed = || {
        let mut breaker = opened();
        assert!(step(&mut breaker, good(2)), "the breaker was open");
        breaker
    };
    let run = |mut breaker: CircuitBreaker, steps: &[Step]| {
        for one in steps {
            step(&mut breaker, *one);
        }
        breaker.is_open(at(steps.last().expect("a step").0))
    };
    assert!(!run(closed(), &failures(3)));
    assert!(
        !run(closed(), &failures(61)),
        "the last success is less than a minute ago"
    );
    assert!(run(closed(), &failures(62)), "no success for a minute");
    // Each failure is remembered for ten minutes.
    let later = [&failures(500)[..], &[good(1_000)], &failures(1_001)].concat();
    assert!(!run(closed(), &later));
    let forgotten = [&[good(601)][..], &failures(602)].concat();
    assert!(run(closed(), &forgotten));
    // Other namespaces can open the breaker.
    assert!(run(
        closed(),
        &[failing(3, "d", "1"), failing(3, "d", "2"), failing(3, "e", "3")]
    ));

    // Requests that hang while others succeed are no evidence against the host, nor are later failures of these
    // namespaces.
    let mut breaker = CircuitBreaker::default();
    let hanging = [("a", "1"), ("a", "2"), ("b", "3")];
    let hanging = hanging.map(|(namespace, name)| breaker.admit(at(0), &user(namespace, name)).expect("admitted"));
    step(&mut breaker, good(5));
    for request in &hanging {
        breaker.record_failure(at(10), request, Failure::Timeout, NO_WAIT);
    }
    assert!(!run(breaker, &failures(11)));
}

#[test]
fn one_probe_at_a_time_with_growing_delay_until_one_succeeds() {
    let mut breaker = opened();
    let mut now = 1;
    for wait in [1, 2, 4, 8, 16, 30, 30] {
        let a = user("a", "1");
        let probe = breaker.admit(at(now), &a).expect("a probe");
        breaker.admit(at(now), &a).expect_err("one at a time");
        breaker.record_failure(at(now), &probe, status(503), NO_WAIT);
        assert_eq!(retry_in(&mut breaker, now, &a), wait);
        now += wait;
    }
    // One user of a namespace retries soon for the next probe. The others retry later, unless they are woken earlier.
    let now = at(now);
    let results: Vec<_> = (0..1_000)
        .map(|i| {
            breaker
                .admit(now, &user("z", &i.to_string()))
                .map_err(|refused| refused.retry_in)
        })
        .collect();
    assert!(results[0].is_ok(), "its last request did not fail");
    let soon = results
        .iter()
        .filter(|result| matches!(result, Err(wait) if *wait < LONGEST));
    assert_eq!(soon.count(), 1);
    assert!(
        results
            .iter()
            .skip(1)
            .all(|result| matches!(result, Err(wait) if *wait <= PATIENCE))
    );
    let probe = results.into_iter().next().expect("the first").expect("a probe");
    assert!(breaker.record_success(now, &probe));
    assert!(breaker.admit(now, &user("a", "1")).is_ok() && breaker.admit(now, &user("a", "2")).is_ok());
}

#[test]
fn released_probe_makes_room_and_older_requests_do_not() {
    let mut breaker = CircuitBreaker::default();
    let before = [("a", "1"), ("a", "2"), ("b", "3"), ("b", "4")];
    let before = before.map(|(namespace, name)| breaker.admit(at(0), &user(namespace, name)).expect("admitted"));
    for request in &before[..3] {
        breaker.record_failure(at(0), request, status(503), NO_WAIT);
    }
    let probe = breaker.admit(at(1), &user("c", "1")).expect("a probe");
    breaker.record_failure(at(2), &before[3], status(503), NO_WAIT);
    breaker
        .admit(at(3), &user("d", "1"))
        .expect_err("the probe of c is in flight");
    breaker.release(at(3), &probe);
    breaker.admit(at(3), &user("d", "1")).expect("a probe");
}

#[test]
fn namespaces_without_failure_probe_first_then_the_oldest_failure() {
    let mut breaker = opened();
    for (second, namespace) in [(1, "a"), (2, "b")] {
        let probe = breaker.admit(at(second), &user(namespace, "1")).expect("a probe");
        breaker.record_failure(at(second), &probe, status(503), NO_WAIT);
    }
    // A probe is in flight until all namespaces may probe.
    let busy = breaker.admit(at(3), &user("c", "1")).expect("a probe");
    for namespace in ["b", "good", "a"] {
        breaker.admit(at(4), &user(namespace, "1")).expect_err("busy");
    }
    breaker.record_failure(at(5), &busy, status(503), NO_WAIT);
    let mut order = Vec::new();
    for second in 5..8 {
        for namespace in ["c", "b", "a", "good"] {
            if let Ok(probe) = breaker.admit(at(second), &user(namespace, "1")) {
                breaker.record_failure(at(second), &probe, status(503), NO_WAIT);
                order.push(namespace);
            }
        }
    }
    assert_eq!(order, ["good", "a", "b"]);
    // A namespace that does not retry in time loses its place.
    let busy = breaker.admit(at(20), &user("new", "1")).expect("a probe");
    breaker.admit(at(20), &user("gone", "1")).expect_err("busy");
    breaker.release(at(20), &busy);
    breaker.admit(at(25), &user("a", "1")).expect_err("its place is kept");
    breaker.admit(at(26), &user("a", "1")).expect("its place is lost");
}

#[test]
fn retry_after_delays_other_namespaces_for_at_most_30_s() {
    let retry_after = Duration::from_mins(15);
    let mut breaker = CircuitBreaker::default();
    for (namespace, name) in [("a", "1"), ("a", "2"), ("b", "3")] {
        let request = breaker.admit(at(0), &user(namespace, name)).expect("admitted");
        breaker.record_failure(at(0), &request, status(429), retry_after);
    }
    assert_eq!(retry_in(&mut breaker, 10, &user("good", "1")), 20);
    assert_eq!(retry_in(&mut breaker, 10, &user("a", "4")), 890);
    let probe = breaker.admit(at(30), &user("good", "1")).expect("a probe");
    breaker.record_failure(at(30), &probe, status(429), retry_after);
    assert_eq!(retry_in(&mut breaker, 30, &user("good", "2")), 900);
    for second in [60, 899] {
        breaker
            .admit(at(second), &user("b", "5"))
            .expect_err("retry-after has not passed");
    }
    breaker.admit(at(900), &user("a", "4")).expect("a probe");
}

#[test]
fn discovery_closes_it_only_if_the_host_was_silent() {
    let silent = || after(&[0, 1, 2].map(|second| Step(second, "a", "1", Err(Failure::Connect))));
    let discovered = |mut breaker: CircuitBreaker, ended| breaker.record_discovery(at(4), "main", ended);
    assert!(discovered(silent(), Ok(())));
    assert!(
        !discovered(silent(), Err(status(404))),
        "an error status proves nothing"
    );
    assert!(!discovered(opened(), Ok(())), "the host was not silent");
    // A host that hangs for every request.
    let hangs = after(&[hung(0, "a", "1"), hung(1, "a", "2"), hung(2, "", "main")]);
    assert!(hangs.is_open(at(2)));
    assert!(discovered(hangs, Ok(())));
    // The host was silent and now responds to token requests with errors.
    let mut breaker = silent();
    let probe = breaker.admit(at(3), &user("b", "1")).expect("a probe");
    breaker.record_failure(at(3), &probe, status(503), NO_WAIT);
    assert!(!discovered(breaker, Ok(())));
}

#[test]
fn failed_discovery_delays_the_next_probe_and_is_no_evidence_against_users() {
    let mut breaker = opened();
    let probe = breaker.admit(at(1), &user("c", "1")).expect("a probe");
    breaker.record_no_discovery(at(1), &probe, "main", Failure::Connect, NO_WAIT);
    let probe = breaker.admit(at(2), &user("c", "1")).expect("a probe");
    breaker.record_no_discovery(at(2), &probe, "main", status(503), at(40));
    assert_eq!(retry_in(&mut breaker, 2, &user("c", "1")), 40);

    let mut closed = CircuitBreaker::default();
    for name in ["a", "b", "c", "d"] {
        let request = closed.admit(at(0), &user(name, name)).expect("admitted");
        closed.record_no_discovery(at(0), &request, "mistyped", Failure::Timeout, NO_WAIT);
    }
    assert!(!closed.is_open(at(0)));
}

#[test]
fn success_resets_its_namespace_and_the_probe_delays_of_all() {
    let mut breaker = opened();
    for second in [1, 2, 4, 8] {
        let probe = breaker.admit(at(second), &user("a", "1")).expect("a probe");
        breaker.record_failure(at(second), &probe, status(503), NO_WAIT);
    }
    let probe = breaker.admit(at(9), &user("b", "1")).expect("a probe");
    assert!(breaker.record_success(at(9), &probe));
    for Step(_, namespace, name, _) in [failing(0, "d", "1"), failing(0, "d", "2"), failing(0, "e", "1")] {
        step(&mut breaker, failing(100, namespace, name));
    }
    let busy = breaker.admit(at(101), &user("new", "1")).expect("a probe");
    for namespace in ["a", "b"] {
        breaker.admit(at(101), &user(namespace, "1")).expect_err("busy");
    }
    breaker.release(at(101), &busy);
    breaker
        .admit(at(102), &user("a", "1"))
        .expect_err("its last request failed");
    let probe = breaker
        .admit(at(102), &user("b", "1"))
        .expect("its last request succeeded");
    breaker.release(at(102), &probe);
    let probe = breaker.admit(at(103), &user("a", "1")).expect("a probe");
    breaker.record_failure(at(103), &probe, status(503), NO_WAIT);
    assert_eq!(retry_in(&mut breaker, 103, &user("a", "1")), 1);
}

#[test]
fn it_is_half_open_once_no_requests_arrive() {
    let mut breaker = opened();
    assert!(breaker.is_open(at(0)) && breaker.is_open(at(419)));
    assert!(!breaker.is_open(at(420)));
    let probe = breaker.admit(at(1_000), &user("a", "1")).expect("a probe");
    assert!(breaker.is_open(at(1_000)));
    breaker.record_failure(at(1_000), &probe, status(503), NO_WAIT);
    assert!(breaker.is_open(at(1_300)));
    breaker.admit(at(1_000), &user("b", "1")).expect_err("one per second");
    assert!(breaker.is_open(at(1_419)));
}

#[test]
fn memory_is_bounded_by_the_namespaces_that_failed_recently() {
    let mut breaker = CircuitBreaker::default();
    for i in 0..10_000_u64 {
        let name = i.to_string();
        let request = breaker.admit(at(i), &user("a", &name)).expect("admitted");
        breaker.record_failure(at(i), &request, status(503), NO_WAIT);
        let request = breaker.admit(at(i), &user(&name, &name)).expect("admitted");
        breaker.record_success(at(i), &request);
    }
    assert!(breaker.evidence.len() <= USERS);
    assert_eq!(breaker.namespaces.len(), 1);
    for i in 0..10_000_u64 {
        let second = 10_000 + 60 * i;
        let Ok(request) = breaker.admit(at(second), &user(&i.to_string(), "1")) else {
            continue;
        };
        // Refused once the breaker is open.
        let _ = breaker.admit(at(second), &user(&format!("{i}-refused"), "1"));
        breaker.record_failure(at(second), &request, status(503), NO_WAIT);
    }
    assert!(breaker.namespaces.len() <= 12, "{}", breaker.namespaces.len());
    let waiting = breaker.open.map_or(0, |open| open.waiting.len());
    assert!(waiting <= 12, "{waiting}");
}
