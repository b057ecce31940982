//! Leadership, as whoever writes must see it: a deadline by our own clock.

use std::time::Duration;

/// Whether, and how long at least, this process may write.
#[derive(Clone, Debug)]
pub struct Fence {
    always: Duration,
}

/// Another replica leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotLeading;

impl Fence {
    /// The fence of a process that runs alone.
    #[must_use]
    pub fn always_ours() -> Self {
        Self {
            always: Duration::from_hours(1),
        }
    }

    /// How long this process may still write.
    pub fn remaining(&self) -> Result<Duration, NotLeading> {
        Ok(self.always)
    }
}
