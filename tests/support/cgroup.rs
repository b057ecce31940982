//! A memory limit for one child process, by its own cgroup (v1 or v2), like that of a container. Needs root, and on v2
//! a root cgroup that delegates the memory controller. A test that is killed leaves an empty cgroup behind.

use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub struct MemoryCgroup {
    folder: PathBuf,
    files: &'static Files,
}

/// The files of a cgroup version. A limit of zero is written to `swap` if the kernel accounts swap.
struct Files {
    root: &'static str,
    limit: &'static str,
    peak: &'static str,
    swap: &'static str,
}

const VERSIONS: [Files; 2] = [
    Files {
        root: "/sys/fs/cgroup",
        limit: "memory.max",
        peak: "memory.peak",
        swap: "memory.swap.max",
    },
    Files {
        root: "/sys/fs/cgroup/memory",
        limit: "memory.limit_in_bytes",
        peak: "memory.max_usage_in_bytes",
        swap: "memory.swappiness",
    },
];

impl MemoryCgroup {
    /// A new cgroup with this limit, or `None` if this machine does not allow it.
    pub fn new(bytes: u64) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("zitadel-tokens-tests-{}-{count}", std::process::id());
        VERSIONS.iter().find_map(|files| {
            let folder = Path::new(files.root).join(&name);
            std::fs::create_dir(&folder).ok()?;
            let cgroup = Self { folder, files };
            cgroup.set(files.limit, bytes).ok()?;
            let _ = cgroup.set(files.swap, 0);
            Some(cgroup)
        })
    }

    /// Does not create the file: it is missing if the folder is not a memory cgroup.
    fn set(&self, file: &str, value: u64) -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).open(self.folder.join(file))?;
        file.write_all(value.to_string().as_bytes())
    }

    /// A command line prefix that runs a command in this cgroup under the same process id.
    pub fn prefix(&self) -> [OsString; 4] {
        let enter = r#"echo $$ > "$0" && exec "$@""#;
        let processes = self.folder.join("cgroup.procs");
        [
            OsStr::new("sh").into(),
            OsStr::new("-c").into(),
            enter.into(),
            processes.into(),
        ]
    }

    /// The highest number of bytes charged to the cgroup: memory of the process, the kernel's memory for it, and cached
    /// files. `None` if the kernel does not record it (v2 before Linux 5.19).
    pub fn peak(&self) -> Option<u64> {
        let peak = std::fs::read_to_string(self.folder.join(self.files.peak)).ok()?;
        peak.trim().parse().ok()
    }
}

impl Drop for MemoryCgroup {
    /// The process must have exited. The kernel may need a moment to release the cgroup.
    fn drop(&mut self) {
        for _ in 0..50 {
            if std::fs::remove_dir(&self.folder).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{} could not be removed", self.folder.display());
    }
}
