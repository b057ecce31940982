//! Leadership, as whoever writes must see it: a deadline by our own clock.

use std::time::Duration;

use crate::ops::shutdown::Shutdown;

/// Whether, and how long at least, this process may write.
#[derive(Clone, Debug)]
pub struct Fence {
    always: Duration,
    shutdown: Shutdown,
}

/// Another replica leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotLeading;

impl Fence {
    /// The fence of a process that runs alone.
    #[must_use]
    pub fn always_ours(shutdown: Shutdown) -> Self {
        Self {
            always: Duration::from_hours(1),
            shutdown,
        }
    }

    /// How long this process may still write.
    pub fn remaining(&self) -> Result<Duration, NotLeading> {
        Ok(self.always)
    }

    /// Whether something may begin that needs so long until its last write: not once the process was asked to end.
    #[must_use]
    pub fn may_begin(&self, needed: Duration) -> bool {
        !self.shutdown.is_requested() && self.remaining().is_ok_and(|remaining| remaining >= needed)
    }
}
