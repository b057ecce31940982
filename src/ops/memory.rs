//! Keeps the process's memory, in which keys and tokens are, from whoever finds a dump of it or shares its user id.

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// No core dumps, and no look into our memory by a process of the same user: no ptrace, `/proc/PID/mem` and
/// `/proc/PID/environ` belong to root (prctl(2), proc(5)). The limit alone is not enough: where `core_pattern` is a
/// pipe, as with systemd-coredump, the kernel does not heed it (core(5)).
pub fn protect() -> std::io::Result<()> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}
