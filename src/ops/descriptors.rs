//! How many files and connections the process may have open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit as far as this process may. The usual 1,024 is for programs that use `select(2)`, which cannot name
/// more descriptors; this one uses `epoll`.
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
        // Enough for the tests that run beside this one.
        let lowered = Rlimit {
            current: before.maximum.map(|most| most.min(1_000)).or(Some(1_000)),
            ..before
        };
        setrlimit(Resource::Nofile, lowered).expect("lowered");
        raise_limit().expect("raised");
        assert_eq!(getrlimit(Resource::Nofile).current, before.maximum);
    }
}
