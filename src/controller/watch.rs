//! Endless watches. Each starts with a list, and starts again with a list after an error.

use std::fmt::Debug;
use std::pin::Pin;
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{Stream, StreamExt, TryStreamExt};
use kube::runtime::watcher::{self, DefaultBackoff, Event, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;

/// The longest delay before a failed watch starts again. The same as kube's limit.
const LONGEST_DELAY: Duration = Duration::from_secs(30);

/// Objects in a page of a list. An object has up to 1.5 MiB (etcd's limit), and a whole page is in memory at once.
const PAGE: u32 = 8;

/// How the first list of a watch is requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// One object at a time if the API server supports it (`WatchList`, on by default since Kubernetes 1.34), otherwise
    /// in pages. The list may be slightly outdated.
    Streaming,
    /// In pages, at the latest version.
    Pages,
}

/// A watch failed. Changes until its next list are not reported as events.
#[derive(Debug)]
pub struct WatchError {
    /// Whether the operator is not allowed to list or watch.
    pub forbidden: bool,
}

/// An endless watch. `relist` is called after each period of `every`. If it returns true, the watch starts again with a
/// list.
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
            |error| tracing::warn!(kind = %K::kind(&()), error = kind(error), "a watch failed and will be retried"),
        )
        .map(|event| {
            event.map_err(|error| WatchError {
                forbidden: is_forbidden(&error),
            })
        })
}

/// Starts a new watch with a list after an error and a growing delay. kube's watcher would continue from its last
/// version and not report when it has caught up.
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
    // kube's own backoff counts the first event of a new watch as a success, so its delay would never grow.
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

/// An API server without streaming lists rejects the parameter `sendInitialEvents` as invalid.
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

/// A description of the error that does not quote the API server.
fn kind(error: &watcher::Error) -> &'static str {
    let code = match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => status.code,
        _ => 0,
    };
    match error {
        _ if code == 404 => "the API server does not know this kind: install its CustomResourceDefinition",
        _ if matches!(code, 401 | 403) => "the operator may not list and watch this kind: check its RBAC rules",
        _ if code == 410 => "the resource version is too old: 410",
        watcher::Error::InitialListFailed(_) => "the list failed",
        watcher::Error::WatchStartFailed(_) => "the watch could not be started",
        watcher::Error::WatchError(_) => "the API server ended the watch with an error",
        watcher::Error::WatchFailed(_) => "the connection of the watch failed",
        watcher::Error::NoResourceVersion => "the list has no resource version",
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

    /// kube's own backoff counts the first event of each new watch as a success, and would stay at its first step.
    #[tokio::test(start_paused = true)]
    async fn delay_grows_while_a_watch_fails_each_time() {
        let begun = tokio::time::Instant::now();
        let fails = |_| stream(vec![Ok(Event::Init), Err(watcher::Error::NoResourceVersion)]);
        let all = retried(fails, List::Pages, NEVER, || false);
        let mut errors = std::pin::pin!(all.filter(|event| std::future::ready(event.is_err())));
        let mut times = Vec::new();
        for _ in 0..8 {
            assert!(errors.next().await.is_some_and(|event| event.is_err()));
            times.push(begun.elapsed().as_secs());
        }
        assert!(times[0] == 0 && times[7] > 60 && times[7] < 300, "{times:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn watch_uses_pages_if_the_server_has_no_streaming_lists() {
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
    async fn watch_lists_again_on_request() {
        static CALLS: AtomicUsize = AtomicUsize::new(0);
        let begun = tokio::time::Instant::now();
        let watch = |_| stream(vec![Ok(Event::Init)]);
        // True from the second call on.
        let relist = || CALLS.fetch_add(1, Ordering::Relaxed) > 0;
        let mut events = std::pin::pin!(retried(watch, List::Pages, Duration::from_mins(10), relist));
        for minutes in [0, 20, 30] {
            assert!(matches!(events.next().await, Some(Ok(Event::Init))));
            assert_eq!(begun.elapsed().as_secs() / 60, minutes);
        }
    }
}
