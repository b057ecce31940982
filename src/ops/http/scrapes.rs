//! The text of `/metrics`. One scrape at a time encodes it, and concurrent requests share it.

use std::sync::{Arc, Weak};
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::ops::exposition::expose;

/// A text is shared for at least `SHARED_FOR`, and for `SHARED_TIMES` as long as its encoding took. Scrapes therefore
/// use at most a fifth of one processor.
const SHARED_FOR: Duration = Duration::from_millis(500);
const SHARED_TIMES: u32 = 4;

pub struct Scrapes {
    registry: Arc<Registry>,
    texts: Arc<Mutex<Texts>>,
}

/// At most two texts are in memory: the current one, and the previous one while a client still reads it. Until that
/// client is done, no new text is encoded, so the current text can get as old as a connection.
#[derive(Default)]
struct Texts {
    current: Option<Current>,
    previous: Weak<String>,
}

struct Current {
    text: Arc<String>,
    until: Instant,
}

impl Scrapes {
    pub fn new(registry: Arc<Registry>) -> Self {
        Self {
            registry,
            texts: Arc::default(),
        }
    }

    /// The text of the metrics, which may be slightly old. `None` if encoding fails.
    pub async fn text(&self) -> Option<Arc<String>> {
        let mut texts = self.texts.clone().lock_owned().await;
        if let Some(text) = texts.shareable() {
            return Some(text);
        }
        let registry = self.registry.clone();
        // Encode outside the threads that renew the lease. The task owns the lock, because it continues even if the
        // client disconnects.
        let made = tokio::task::spawn_blocking(move || texts.renew(&registry)).await;
        made.ok().flatten()
    }
}

impl Texts {
    fn shareable(&self) -> Option<Arc<String>> {
        let current = self.current.as_ref()?;
        let fresh = Instant::now() < current.until;
        (fresh || self.previous.strong_count() > 0).then(|| current.text.clone())
    }

    fn renew(&mut self, registry: &Registry) -> Option<Arc<String>> {
        // There is no current text, because the last attempt failed.
        if self.previous.strong_count() > 0 {
            return None;
        }
        // This drops the current text before the next one is encoded, unless a client still reads it.
        self.previous = self.current.take().map_or_else(Weak::new, |c| Arc::downgrade(&c.text));
        let began = Instant::now();
        let text = Arc::new(expose(registry).ok()?);
        let shared_for = SHARED_FOR.max(began.elapsed() * SHARED_TIMES);
        self.current = Some(Current {
            text: text.clone(),
            until: Instant::now() + shared_for,
        });
        Some(text)
    }
}
