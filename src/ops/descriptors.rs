//! The limit of open file descriptors.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit to the hard limit. The usual soft limit of 1,024 exists for programs that use `select(2)`,
/// which supports no higher descriptors. This program uses `epoll`.
pub fn raise_limit() -> std::io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    Ok(setrlimit(Resource::Nofile, raised)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_limit_is_raised_to_the_hard_one() {
        let before = getrlimit(Resource::Nofile);
        // Enough descriptors for the tests that run at the same time.
        let lowered = Rlimit {
            current: before.maximum.map(|most| most.min(1_000)).or(Some(1_000)),
            ..before
        };
        setrlimit(Resource::Nofile, lowered).expect("lowered");
        raise_limit().expect("raised");
        assert_eq!(getrlimit(Resource::Nofile).current, before.maximum);
    }
}
