//! Protects the memory of the process, which holds keys and tokens, from core dumps and from other processes of the
//! same user.

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Disables core dumps, and access to the memory by processes of the same user: ptrace is denied, and `/proc/PID/mem`
/// and `/proc/PID/environ` belong to root (prctl(2), proc(5)). The resource limit alone is not enough: if
/// `core_pattern` is a pipe, as with systemd-coredump, the kernel ignores the limit (core(5)).
pub fn protect() -> std::io::Result<()> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}
