use super::*;

const ME: &str = "pod-a_1";
const OTHER: &str = "pod-b_1";

fn at(seconds: u64) -> Duration {
    Duration::from_secs(1_000 + seconds)
}

fn clock(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_764_000_000 + seconds).expect("a time")
}

/// The Lease as the API server returns it.
fn stored(mut lease: Lease, version: &str) -> Lease {
    lease.metadata.resource_version = Some(version.into());
    lease
}

/// A Lease that `holder` acquired at `by_its_clock` by its own clock, first seen at `since`.
fn held(holder: &str, by_its_clock: i64, since: Duration) -> ObservedLease {
    let lease = stored(claimed(None, "l", holder, clock(by_its_clock)), "1");
    ObservedLease::next(None, Some(lease), since).expect("a Lease")
}

fn change(mut observed: ObservedLease, change: impl FnOnce(&mut LeaseSpec)) -> ObservedLease {
    change(observed.lease.spec.as_mut().expect("a spec"));
    observed
}

#[test]
fn candidate_acquires_renews_or_waits() {
    let fresh = || held(OTHER, 0, at(0));
    let left = |seconds| Step::Wait(Duration::from_secs(seconds));
    let later = |observed, lease, seconds| ObservedLease::next(Some(observed), lease, at(seconds));
    let labelled = |observed: &ObservedLease| {
        let mut lease = stored(observed.lease.clone(), "2");
        lease.metadata.labels = Some([("a".to_owned(), "b".to_owned())].into());
        lease
    };
    let renewed = |observed: &ObservedLease| stored(claimed(Some(observed), "l", OTHER, clock(5)), "2");
    #[rustfmt::skip]
    let table = [
        ("no Lease", None, 0, Step::Acquire),
        ("own lease", Some(held(ME, 0, at(0))), 1, Step::Renew),
        ("own lease, long expired", Some(held(ME, 0, at(0))), 900, Step::Renew),
        ("own lease, deleted", later(held(ME, 0, at(0)), None, 1), 1, Step::Renew),
        ("own lease, deleted, and not the leader", later(held(ME, 0, at(0)), None, 1).map(|observed| observed.disowned(ME, at(1))), 2, left(13)),
        ("own lease, and not the leader", Some(held(ME, 0, at(0)).disowned(ME, at(1))), 2, Step::Renew),
        ("lease of another", Some(fresh()), 0, left(14)),
        ("lease of another, almost expired", Some(fresh()), 13, left(1)),
        ("lease of another, expired", Some(fresh()), 14, Step::Acquire),
        ("holder's clock a day ahead", Some(held(OTHER, 86_400, at(0))), 14, Step::Acquire),
        ("holder's clock a day behind", Some(held(OTHER, -86_400, at(0))), 13, left(1)),
        ("renewed", later(fresh(), Some(renewed(&fresh())), 10), 14, left(10)),
        ("read again and not renewed", later(fresh(), Some(fresh().lease), 10), 14, Step::Acquire),
        ("only a label changed", later(fresh(), Some(labelled(&fresh())), 10), 14, Step::Acquire),
        ("deleted, not yet expired", later(fresh(), None, 1), 13, left(1)),
        ("deleted, expired", later(fresh(), None, 1), 14, Step::Acquire),
        ("released", later(fresh(), Some(stored(fresh().released(), "2")), 1), 1, Step::Acquire),
        ("empty holder", Some(change(fresh(), |s| s.holder_identity = Some(String::new()))), 0, Step::Acquire),
        ("longer term", Some(change(fresh(), |s| s.lease_duration_seconds = Some(30))), 14, left(16)),
        ("term that never ends", Some(change(fresh(), |s| s.lease_duration_seconds = Some(i32::MAX))), 14, left(46)),
        ("no term", Some(change(fresh(), |s| s.lease_duration_seconds = None)), 13, left(1)),
        ("negative term", Some(change(fresh(), |s| s.lease_duration_seconds = Some(-1))), 13, left(1)),
        ("no spec", Some(ObservedLease { lease: Lease::default(), since: at(0), }), 0, Step::Acquire),
    ];
    for (name, observed, seconds, expected) in table {
        assert_eq!(evaluate(observed.as_ref(), ME, at(seconds)), expected, "{name}");
    }
}

#[test]
fn claims_replace_the_observed_version() {
    let spec = |lease: &Lease| lease.spec.clone().expect("a spec");
    let seen = held(OTHER, 0, at(0));
    let first = claimed(None, "l", OTHER, clock(0));
    assert_eq!(
        (first.metadata.name.as_deref(), first.metadata.resource_version),
        (Some("l"), None)
    );
    assert_eq!(spec(&seen.lease).lease_transitions, Some(0));

    let renewed = claimed(Some(&seen), "l", OTHER, clock(3));
    assert_eq!(renewed.metadata.resource_version.as_deref(), Some("1"));
    assert_eq!(spec(&renewed).acquire_time, Some(MicroTime(clock(0))));
    assert_eq!(spec(&renewed).renew_time, Some(MicroTime(clock(3))));
    assert_eq!(spec(&renewed).lease_transitions, Some(0));

    let taken = claimed(Some(&seen), "l", ME, clock(20));
    assert_eq!(taken.metadata.resource_version.as_deref(), Some("1"));
    assert_eq!(spec(&taken).holder_identity.as_deref(), Some(ME));
    assert_eq!(spec(&taken).acquire_time, Some(MicroTime(clock(20))));
    assert_eq!(spec(&taken).lease_transitions, Some(1));

    let released = seen.released();
    assert_eq!(released.metadata.resource_version.as_deref(), Some("1"));
    assert_eq!(spec(&released).holder_identity, None);
    let again = ObservedLease::next(None, Some(stored(released, "2")), at(1));
    assert_eq!(
        spec(&claimed(again.as_ref(), "l", ME, clock(1))).lease_transitions,
        Some(1)
    );

    // A deleted Lease is created again.
    let deleted = ObservedLease::next(Some(seen), None, at(1)).expect("remembered");
    assert!(!deleted.exists());
    let anew = claimed(Some(&deleted), "l", OTHER, clock(4));
    assert_eq!(
        (anew.metadata.name.as_deref(), anew.metadata.resource_version),
        (Some("l"), None)
    );
}

#[tokio::test]
async fn guard_expires_before_another_replica_may_begin() {
    let shutdown = Shutdown::on_signal().expect("signals");
    let (leadership, guard) = LeadershipGuard::new(shutdown.clone());
    assert!(!guard.is_leading() && !guard.may_begin());

    let sent = now();
    leadership.renewed(sent);
    let left = guard.remaining().expect("leading");
    assert!(
        left <= WRITE_TERM && left + now().saturating_sub(sent) >= WRITE_TERM,
        "{left:?}"
    );
    assert!(guard.may_begin());
    // One renewal is late, then two.
    let ago = |millis| now().saturating_sub(Duration::from_millis(millis));
    leadership.renewed(ago(6_000));
    assert!(guard.may_begin());
    leadership.renewed(ago(7_500));
    assert!(guard.is_leading() && !guard.may_begin());

    leadership.renewed(sent.saturating_sub(WRITE_TERM));
    assert!(!guard.is_leading() && !guard.may_begin());
    leadership.renewed(now());
    leadership.close();
    assert_eq!(guard.remaining(), Err(NotLeading));
    assert!(LeadershipGuard::always(shutdown).may_begin());
}

#[tokio::test]
async fn work_continues_across_renewals_and_ends_with_the_lease() {
    let (leadership, guard) = LeadershipGuard::new(Shutdown::on_signal().expect("signals"));
    let short = |millis| now().saturating_sub(WRITE_TERM) + Duration::from_millis(millis);
    let never = std::future::pending::<()>;
    assert_eq!(guard.while_leading(std::future::ready(7)).await, Err(NotLeading));

    leadership.renewed(now());
    guard.leading().await;
    assert_eq!(guard.while_leading(std::future::ready(7)).await, Ok(7));
    // Leadership ends because another holder was seen, or because the lease expires.
    let closing = async {
        tokio::task::yield_now().await;
        leadership.close();
    };
    assert_eq!(tokio::join!(guard.while_leading(never()), closing).0, Err(NotLeading));
    leadership.renewed(short(30));
    assert_eq!(guard.while_leading(never()).await, Err(NotLeading));

    // Work runs longer than the lease lasted when the work began. The times are in seconds, because a busy machine may
    // pause for one.
    leadership.renewed(short(2_000));
    let renewing = async {
        tokio::task::yield_now().await;
        leadership.renewed(now());
    };
    let work = tokio::time::sleep(Duration::from_millis(2_100));
    assert_eq!(tokio::join!(guard.while_leading(work), renewing).0, Ok(()));

    // A process that was stopped until after the deadline polls no further, even if no timer has fired yet.
    leadership.renewed(short(1_000));
    let mut steps = 0;
    let stopped = std::future::poll_fn(|cx| {
        steps += 1;
        std::thread::sleep(Duration::from_millis(1_050));
        cx.waker().wake_by_ref();
        Poll::<()>::Pending
    });
    assert_eq!(guard.while_leading(stopped).await, Err(NotLeading));
    assert_eq!(steps, 1);

    // `leading` completes after a renewal.
    let opening = async {
        tokio::task::yield_now().await;
        leadership.renewed(now());
    };
    tokio::join!(guard.leading(), opening);
    assert!(guard.is_leading());
}
