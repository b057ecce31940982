//! A wall clock for one process that a test can set while the process runs, by Debian's libfaketime. The monotonic
//! clock stays real, as when an administrator or NTP sets the time.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

pub struct Clock {
    file: PathBuf,
    library: PathBuf,
}

impl Clock {
    /// A clock with the correct time.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let places = ["x86_64-linux-gnu", "aarch64-linux-gnu"].map(|arch| format!("/usr/lib/{arch}/faketime"));
        let libraries = places.iter().map(|folder| Path::new(folder).join("libfaketimeMT.so.1"));
        let clock = Self {
            file: std::env::temp_dir().join(format!("clock-{}-{count}", std::process::id())),
            library: libraries
                .into_iter()
                .find(|l| l.exists())
                .expect("the Debian package faketime"),
        };
        clock.set(0);
        clock
    }

    /// Sets the clock this many seconds ahead of the real time.
    pub fn set(&self, seconds: i64) {
        std::fs::write(&self.file, format!("{seconds:+}")).expect("written");
    }

    /// The environment variables that make a process use this clock.
    pub fn environment(&self) -> [(&'static str, &OsStr); 5] {
        [
            ("LD_PRELOAD", self.library.as_os_str()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.as_os_str()),
            ("FAKETIME_CACHE_DURATION", OsStr::new("1")),
            ("FAKETIME_DONT_FAKE_MONOTONIC", OsStr::new("1")),
            // The name of the same option in versions before 0.9.10.
            ("DONT_FAKE_MONOTONIC", OsStr::new("1")),
        ]
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}
