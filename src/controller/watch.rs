//! Watches that go on for ever: each begins with a list, and with a list again after an error.

use std::fmt::Debug;
use std::pin::Pin;
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{Stream, StreamExt, TryStreamExt};
use kube::runtime::watcher::{self, DefaultBackoff, Event, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;

/// Between two tries of a watch; kube's own limit.
const LONGEST_DELAY: Duration = Duration::from_secs(30);

/// Objects in a page of a list. An object has up to 1.5 MiB (etcd's limit), and a page is in memory as a whole.
const PAGE: u32 = 8;

/// How a watch lists first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// One object at a time, where the API server can (`WatchList`, on by default since Kubernetes 1.34), else in pages.
    /// What comes first may be some moments old.
    Streaming,
    /// In pages, as of now.
    Pages,
}

/// A watch broke off. What happens until its next list is not seen.
#[derive(Debug)]
pub struct WatchError {
    /// The operator may not list.
    pub forbidden: bool,
}

/// Watches for ever. `relist` is asked each `every`: if it says so, the watch begins with a list again.
pub fn endless<K>(
    api: Api<K>,
    config: watcher::Config,
    list: List,
    every: Duration,
    relist: impl Fn() -> bool + Send + 'static,
) -> impl Stream<Item = Result<Event<K>, WatchError>> + Send
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let watch = move |list: List| {
        let config = config.clone().page_size(PAGE);
        let config = match list {
            List::Streaming => config.streaming_lists(),
            List::Pages => config,
        };
        watcher(api.clone(), config).boxed()
    };
    retried(watch, list, every, relist)
        .inspect_err(
            |error| tracing::warn!(kind = %K::kind(&()), error = kind(error), "a watch failed and is tried again"),
        )
        .map(|event| {
            event.map_err(|error| WatchError {
                forbidden: is_forbidden(&error),
            })
        })
}

/// kube's watcher goes on after an error from where it was and does not tell when it has caught up. So after an error
/// this begins another watch with a list, after a growing delay.
fn retried<'a, K: 'a>(
    watch: impl Fn(List) -> Events<'a, K> + Send + 'a,
    list: List,
    every: Duration,
    relist: impl Fn() -> bool + Send + 'a,
) -> impl Stream<Item = Result<Event<K>, watcher::Error>> + Send {
    let first = Watch {
        begin: watch,
        wants_relist: relist,
        every,
        list,
        running: None,
        delay: Duration::ZERO,
        backoff: DefaultBackoff::default(),
        relist: Box::pin(tokio::time::sleep(every)),
    };
    futures::stream::unfold(first, async |mut watch| Some((watch.next().await?, watch)))
}

type Events<'a, K> = BoxStream<'a, Result<Event<K>, watcher::Error>>;

struct Watch<'a, K, B, R> {
    begin: B,
    wants_relist: R,
    every: Duration,
    list: List,
    running: Option<Events<'a, K>>,
    delay: Duration,
    // A delay of our own: kube's counts the first event of a new watch as a success, and would never grow.
    backoff: DefaultBackoff,
    relist: Pin<Box<tokio::time::Sleep>>,
}

impl<'a, K, B: Fn(List) -> Events<'a, K>, R: Fn() -> bool> Watch<'a, K, B, R> {
    async fn next(&mut self) -> Option<Result<Event<K>, watcher::Error>> {
        tokio::time::sleep(std::mem::take(&mut self.delay)).await;
        loop {
            let mut events = self.running.take().unwrap_or_else(|| (self.begin)(self.list));
            let event = tokio::select! {
                event = events.next() => event?,
                () = &mut self.relist => {
                    self.relist = Box::pin(tokio::time::sleep(self.every));
                    self.running = (!(self.wants_relist)()).then_some(events);
                    continue;
                }
            };
            match &event {
                Ok(_) => self.running = Some(events),
                Err(error) if self.list == List::Streaming && is_unsupported(error) => {
                    self.list = List::Pages;
                    continue;
                }
                Err(_) => self.delay = self.backoff.next().unwrap_or(LONGEST_DELAY),
            }
            return Some(event);
        }
    }
}

/// An API server without streaming lists refuses the field `sendInitialEvents` as invalid.
fn is_unsupported(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if matches!(status.code, 400 | 422))
}

fn is_forbidden(error: &watcher::Error) -> bool {
    matches!(
        error,
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.is_forbidden()
    )
}

/// What failed, without the server's words.
fn kind(error: &watcher::Error) -> &'static str {
    let code = match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => status.code,
        _ => 0,
    };
    match error {
        _ if code == 404 => "the API server does not know this kind: is its CustomResourceDefinition installed?",
        _ if matches!(code, 401 | 403) => "the operator may not list and watch this kind: does its role allow it?",
        _ if code == 410 => "the history is gone: 410",
        watcher::Error::InitialListFailed(_) => "list failed",
        watcher::Error::WatchStartFailed(_) => "watch could not start",
        watcher::Error::WatchError(_) => "the server ended the watch",
        watcher::Error::WatchFailed(_) => "the watch broke off",
        watcher::Error::NoResourceVersion => "the list had no version",
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::api::ZitadelInstance;

    type Events = BoxStream<'static, Result<Event<ZitadelInstance>, watcher::Error>>;

    const NEVER: Duration = Duration::from_hours(1_000);

    fn stream(events: Vec<Result<Event<ZitadelInstance>, watcher::Error>>) -> Events {
        futures::stream::iter(events).chain(futures::stream::pending()).boxed()
    }

    /// kube's own back-off counts the first event of each new watch as a success, and would stay at its first step.
    #[tokio::test(start_paused = true)]
    async fn a_watch_that_fails_each_time_is_tried_ever_more_seldom() {
        let begun = tokio::time::Instant::now();
        let fails = |_| stream(vec![Ok(Event::Init), Err(watcher::Error::NoResourceVersion)]);
        let all = retried(fails, List::Pages, NEVER, || false);
        let mut tries = std::pin::pin!(all.filter(|event| std::future::ready(event.is_err())));
        let mut times = Vec::new();
        for _ in 0..8 {
            assert!(tries.next().await.is_some_and(|tried| tried.is_err()));
            times.push(begun.elapsed().as_secs());
        }
        assert!(times[0] == 0 && times[7] > 60 && times[7] < 300, "{times:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_without_streaming_lists_is_asked_for_pages() {
        let watch = |list| {
            let status = kube::core::Status::failure("", "Invalid").with_code(422);
            match list {
                List::Streaming => stream(vec![Err(watcher::Error::WatchStartFailed(kube::Error::Api(
                    status.boxed(),
                )))]),
                List::Pages => stream(vec![Ok(Event::Init)]),
            }
        };
        let mut events = std::pin::pin!(retried(watch, List::Streaming, NEVER, || false));
        assert!(matches!(events.next().await, Some(Ok(Event::Init))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_lists_again_when_it_is_asked_to() {
        static ASKED: AtomicUsize = AtomicUsize::new(0);
        let begun = tokio::time::Instant::now();
        let watch = |_| stream(vec![Ok(Event::Init)]);
        // At the second time, and at each after it.
        let relist = || ASKED.fetch_add(1, Ordering::Relaxed) > 0;
        let mut events = std::pin::pin!(retried(watch, List::Pages, Duration::from_mins(10), relist));
        for minutes in [0, 20, 30] {
            assert!(matches!(events.next().await, Some(Ok(Event::Init))));
            assert_eq!(begun.elapsed().as_secs() / 60, minutes);
        }
    }
}
