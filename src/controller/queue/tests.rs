use super::*;

fn queue() -> Arc<Queue> {
    let rank = Box::new(|_: &ObjectRef| (Priority::FirstToken, "main".into()));
    Arc::new(Queue::new(16, rank, Clock::default()))
}

fn id(name: &str) -> ObjectRef {
    ObjectRef::new("ns", name)
}

fn nothing(queue: &Arc<Queue>) -> bool {
    queue.next().now_or_never().is_none()
}

fn failed(failed: Failed) -> Done {
    Done {
        wake: Wake {
            at: None,
            failed: vec![failed],
        },
        ..Done::default()
    }
}

fn wrote(versions: &[&str]) -> Done {
    Done {
        written: versions.iter().map(ToString::to_string).collect(),
        ..Done::default()
    }
}

#[tokio::test]
async fn own_writes_start_no_reconcile() {
    let queue = queue();
    queue.changed(&id("a"), Some("1"));
    let reconcile = queue.next().await;
    // One event arrives before the response to the write, the other after it.
    queue.changed(&id("a"), Some("7"));
    reconcile.finish(wrote(&["7", "8"]));
    assert!(nothing(&queue));
    queue.changed(&id("a"), Some("8"));
    assert!(nothing(&queue));
    // The same version again counts as a change: a relist may repeat it.
    queue.changed(&id("a"), Some("9"));
    assert_eq!(queue.next().await.id, id("a"));
}

#[tokio::test]
async fn one_reconcile_at_a_time_and_changes_meanwhile_are_kept() {
    let queue = queue();
    queue.changed(&id("a"), Some("1"));
    let reconcile = queue.next().await;
    queue.changed(&id("a"), Some("2"));
    assert!(nothing(&queue));
    reconcile.finish(Done::default());
    let reconcile = queue.next().await;
    reconcile.finish(Done::default());
    assert!(nothing(&queue));
}

#[tokio::test]
async fn panicking_or_hanging_reconcile_affects_no_other() {
    let queue = queue();
    let (sender, mut ended) = tokio::sync::mpsc::unbounded_channel();
    let shutdown = Shutdown::on_signal().expect("signals");
    let limit = Duration::from_millis(50);
    for name in ["panics", "hangs", "works"] {
        queue.wake(&id(name));
    }
    let pass = move |id: ObjectRef, _| {
        let sender = sender.clone();
        async move {
            match &*id.name {
                "panics" => panic!("as it should"),
                "hangs" => std::future::pending().await,
                _ => sender.send(()).expect("received"),
            }
            Done::default()
        }
    };
    let leadership = LeadershipGuard::always(shutdown.clone());
    let work = tokio::spawn(queue.clone().work(limit, leadership, shutdown, Duration::default, pass));
    ended.recv().await.expect("the one that works");
    while queue.load().running > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    queue.wake(&id("works"));
    ended.recv().await.expect("once more");
    let failed = |name: &str| queue.lock().entries[&id(name)].backoffs[""].failures;
    assert_eq!((failed("panics"), failed("hangs")), (1, 1));
    work.abort();
}

#[tokio::test]
async fn load_reports_the_longest_wait() {
    let queue = queue();
    assert_eq!(queue.load().oldest, Duration::ZERO);
    for name in ["a", "b", "c", "d"] {
        queue.wake(&id(name));
    }
    // One namespace takes three of the four slots of its instance.
    let reconcile = queue.next().await;
    let busy = [queue.next().await, queue.next().await];
    tokio::time::sleep(Duration::from_millis(30)).await;
    let load = queue.load();
    assert_eq!((load.waiting, load.running), (1, 3));
    assert!(load.oldest >= Duration::from_millis(30));
    // A change during a reconcile is due from its end.
    queue.wake(&reconcile.id.clone());
    reconcile.finish(Done::default());
    for reconcile in busy {
        reconcile.finish(Done::default());
    }
    let load = queue.load();
    assert_eq!((load.waiting, load.running), (2, 0));
    for _ in 0..2 {
        queue.next().await.finish(Done::default());
    }
    assert_eq!(queue.load().oldest, Duration::ZERO);
    // A timer that is not processed.
    queue.wake(&id("a"));
    let mut done = Done::default();
    done.wake.at = Some(Timestamp::now() - SignedDuration::from_secs(7));
    queue.next().await.finish(done);
    assert!(queue.load().oldest >= Duration::from_secs(7));
}

#[tokio::test]
async fn changes_in_a_loop_are_limited_and_the_last_one_is_reconciled() {
    let queue = queue();
    let mut reconciles = 0;
    for _ in 0..100 {
        queue.changed(&id("a"), Some("7"));
        if let Ok((id, pending_retries)) = queue.take(Timestamp::now()) {
            let reconcile = RunningReconcile {
                id,
                pending_retries,
                queue: queue.clone(),
                ended: false,
            };
            // Another change arrives meanwhile.
            queue.changed(&reconcile.id.clone(), Some("8"));
            reconcile.finish(failed(Failed::now("t", Reason::KeyRejected)));
            reconciles += 1;
        }
    }
    assert!((30..35).contains(&reconciles), "{reconciles}");
    {
        let state = queue.lock();
        assert!(state.entries[&id("a")].throttled);
        // The rate limit ends soon, although the backoff is ten minutes.
        let (at, _) = state.timers.first().expect("a timer");
        assert!(*at < Timestamp::now() + SignedDuration::from_secs(3));
    }
    // Other objects are not limited, and neither are wake-ups, which no tenant can cause in a loop.
    queue.changed(&id("b"), None);
    assert_eq!(queue.next().await.id, id("b"));
    queue.wake(&id("a"));
    assert_eq!(queue.next().await.id, id("a"));
}

#[tokio::test]
async fn standby_forgets_deleted_objects() {
    let queue = queue();
    for name in ["a", "b"] {
        queue.wake(&id(name));
    }
    queue.lock().is_standby = true;
    queue.gone(&id("a"));
    queue.gone(&id("never seen"));
    assert_eq!(queue.lock().entries.len(), 1);
    queue.lock().is_standby = false;
    assert_eq!(queue.next().await.id, id("b"));
    assert!(nothing(&queue));
}

#[tokio::test]
async fn dropped_reconcile_is_retried_and_forgotten_object_is_not() {
    let queue = queue();
    queue.wake(&id("a"));
    queue.wake(&id("b"));
    queue.wake(&id("c"));
    let (a, b, c) = (queue.next().await, queue.next().await, queue.next().await);
    drop(a);
    b.finish(Done::forget());
    // It was created again while its deletion was handled.
    queue.wake(&id("c"));
    c.finish(Done::forget());
    let c = queue.next().await;
    assert_eq!(c.id, id("c"));
    c.finish(Done::default());
    let state = queue.lock();
    assert_eq!(state.timers.len(), 1);
    assert!(!state.entries.contains_key(&id("b")));
    assert_eq!(state.entries[&id("a")].backoffs[""].failures, 1);
}

#[tokio::test]
async fn aborted_reconcile_is_not_repeated_at_once() {
    let queue = queue();
    queue.wake(&id("a"));
    let past = Failed {
        not_after: Some(Timestamp::now()),
        ..Failed::now("t", Reason::ServerError)
    };
    queue.next().await.finish(failed(past));
    let again = queue.next().await;
    assert!(again.pending_retries.contains_key("t"));
    again.finish(Done::aborted(Some(Reason::APIServerUnavailable)));
    assert!(nothing(&queue), "in a second or so");
    // It will be woken.
    queue.wake(&id("a"));
    queue.next().await.finish(Done::aborted(None));
    assert!(nothing(&queue));
}

#[tokio::test]
async fn recovery_wakes_failed_and_running_objects() {
    let queue = queue();
    for name in ["well", "failed", "running"] {
        queue.wake(&id(name));
    }
    let turns = [queue.next().await, queue.next().await, queue.next().await];
    let [well, fails, running] = turns;
    well.finish(Done::default());
    fails.finish(failed(Failed::now("t", Reason::InstanceUnreachable)));
    queue.wake_failing(
        ["well", "failed", "running", "unknown"].map(id).into(),
        Recovery::Instance,
    );
    let again = queue.next().await;
    assert_eq!(again.id, id("failed"));
    assert!(again.pending_retries.is_empty() && nothing(&queue));
    // It was refused while the breaker was open, and reports it only now.
    running.finish(failed(Failed::now("t", Reason::InstanceUnreachable)));
    assert_eq!(queue.next().await.id, id("running"));
    assert!(nothing(&queue));
}

#[tokio::test]
async fn closing_breaker_wakes_only_refused_objects() {
    let queue = queue();
    let names = ["failed", "refused", "running"];
    for name in names {
        queue.wake(&id(name));
    }
    let failing = Failed::now("failing", Reason::ServerError);
    let refused = Failed {
        what: "refused".to_owned(),
        not_before: Some(Timestamp::now() + SignedDuration::from_mins(5)),
        deferred: true,
        ..failing.clone()
    };
    let mut both = failed(failing.clone());
    both.wake.failed.push(refused.clone());
    let (one, two, running) = (queue.next().await, queue.next().await, queue.next().await);
    one.finish(failed(failing.clone()));
    two.finish(both);
    queue.wake_failing(names.map(id).into(), Recovery::Breaker);
    let again = queue.next().await;
    assert_eq!(again.id, id("refused"));
    assert!(again.pending_retries["refused"].until <= Timestamp::now());
    assert!(again.pending_retries["failing"].until > Timestamp::now());
    assert!(nothing(&queue));
    // It was refused before the breaker closed, and reports it only now.
    running.finish(failed(refused));
    assert_eq!(queue.next().await.id, id("running"));
    again.finish(failed(failing));
    assert!(nothing(&queue));
}

#[tokio::test]
async fn backoff_respects_not_after_and_not_before() {
    let queue = queue();
    let failing = |not_after: Option<i64>, not_before: Option<i64>| {
        let later = |seconds| Timestamp::now() + SignedDuration::from_secs(seconds);
        Failed {
            not_after: not_after.map(later),
            not_before: not_before.map(later),
            ..Failed::now("t", Reason::RequestRejected)
        }
    };
    // The reason alone means a backoff of about ten minutes.
    for (not_after, not_before, seconds) in [(Some(3), None, 3), (Some(3), Some(60), 60), (Some(7_200), None, 600)] {
        queue.wake(&id("a"));
        let reconcile = queue.next().await;
        reconcile.finish(failed(failing(not_after, not_before)));
        let until = queue.lock().entries[&id("a")].backoffs["t"].hold.until;
        let wait = until.duration_since(Timestamp::now()).as_secs();
        assert!(
            (seconds * 4 / 5 - 1..=seconds * 6 / 5).contains(&wait),
            "{wait} for {seconds}"
        );
    }
    // `Retry-After` outlasts an edit; the operator's own backoff does not.
    for (not_before, kept) in [(Some(60), true), (None, false)] {
        queue.wake(&id("d"));
        let reconcile = queue.next().await;
        reconcile.finish(failed(failing(None, not_before)));
        queue.wake(&id("d"));
        let reconcile = queue.next().await;
        assert_eq!(reconcile.pending_retries.contains_key("t"), kept, "{not_before:?}");
        reconcile.finish(Done::default());
    }
    // The attempts before an expiry do not lengthen the backoff after it: the second one is 2 s.
    queue.wake(&id("c"));
    let mut reconcile = queue.next().await;
    for not_after in [Some(0), Some(0), Some(0), Some(0), None] {
        reconcile.finish(failed(Failed {
            reason: Reason::ServerError,
            ..failing(not_after, None)
        }));
        let wait = queue.lock().entries[&id("c")].backoffs["t"].hold.until;
        assert!(wait.duration_since(Timestamp::now()) < SignedDuration::from_secs(3));
        reconcile = queue.next().await;
    }
    reconcile.finish(Done::default());
    // An aborted reconcile keeps the backoffs of earlier failures.
    let reconcile = {
        queue.wake(&id("b"));
        queue.next().await
    };
    reconcile.finish(failed(failing(None, Some(1))));
    {
        let mut state = queue.lock();
        let state = &mut *state;
        state.waiting.push(&id("b"), Priority::Retry, &"main".into());
    }
    drop(queue.next().await);
    let state = queue.lock();
    let names: Vec<&String> = state.entries[&id("b")].backoffs.keys().collect();
    assert_eq!(names, ["", "t"]);
}
