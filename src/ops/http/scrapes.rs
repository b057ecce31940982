//! The text of `/metrics`, made at most once at a time and shared.

use std::sync::{Arc, Weak};
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::ops::exposition::expose;

/// For how long a text is shared: at least this long, and this many times as long as it took to make. So scrapes take a
/// fifth of one processor at most.
const SHARED_FOR: Duration = Duration::from_millis(500);
const SHARED_TIMES: u32 = 4;

pub struct Scrapes {
    registry: Arc<Registry>,
    texts: Arc<Mutex<Texts>>,
}

/// At most two texts are in memory: the current one, and the one before while a client still reads it. Meanwhile no other
/// is made, so the current one may get as old as a connection.
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

    /// The metrics of now or of a moment ago; `None` if they cannot be written.
    pub async fn text(&self) -> Option<Arc<String>> {
        let mut texts = self.texts.clone().lock_owned().await;
        if let Some(text) = texts.shareable() {
            return Some(text);
        }
        let registry = self.registry.clone();
        // Away from the threads that renew the lease. The lock goes along, because the work does not end when the client
        // that asked for it goes.
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
        // There is no current text, since the last attempt failed.
        if self.previous.strong_count() > 0 {
            return None;
        }
        // Unless a client reads it, this drops the current text before the next is made.
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
