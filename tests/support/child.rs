//! A child process, with its log.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// A running child process. Its stdin stays open as long as this value lives. The testbed's parts exit when it closes.
pub struct Running {
    pub child: Child,
    name: &'static str,
    stdin: Option<ChildStdin>,
    log: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
}

/// The folder of a part of the testbed. Builds the part if necessary.
pub fn part(name: &str) -> PathBuf {
    static KNOWN: Mutex<BTreeMap<String, PathBuf>> = Mutex::new(BTreeMap::new());
    let build = || {
        let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/testbed/build"))
            .arg(name)
            .stderr(Stdio::inherit())
            .output()
            .expect("tests/testbed/build runs");
        assert!(output.status.success(), "tests/testbed/build failed; see above");
        let folders: BTreeMap<String, PathBuf> =
            serde_json::from_slice(&output.stdout).expect("tests/testbed/build prints JSON");
        folders[name].clone()
    };
    let mut known = KNOWN.lock().expect("not poisoned");
    known.entry(name.to_owned()).or_insert_with(build).clone()
}

impl Running {
    /// Starts `command` and keeps its stderr.
    pub fn start(name: &'static str, command: &mut Command) -> (Self, impl Read + use<>) {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{name} does not start: {e}"));
        let log = Arc::new(Mutex::new(Vec::new()));
        let (stderr, kept) = (child.stderr.take().expect("piped"), log.clone());
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                kept.lock().expect("not poisoned").push(line);
            }
        });
        let stdout = child.stdout.take().expect("piped");
        let stdin = child.stdin.take();
        (
            Self {
                child,
                name,
                stdin,
                log,
                reader: Some(reader),
            },
            stdout,
        )
    }

    /// Starts a part of the testbed and reads the one JSON line that it prints when it is ready.
    pub fn announced(name: &'static str, command: &mut Command) -> (Self, serde_json::Value) {
        let (running, stdout) = Self::start(name, command);
        let mut line = String::new();
        // Without a line, the child has exited, and its log says why.
        BufReader::new(stdout).read_line(&mut line).expect("readable");
        let ready = serde_json::from_str(&line).unwrap_or_else(|_| {
            panic!("{name} did not become ready:\n{}", running.log().join("\n"));
        });
        (running, ready)
    }

    /// What the child has written to stderr so far.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().expect("not poisoned").clone()
    }
}

impl Running {
    /// All that the child writes to stderr until it exits. Blocks until then.
    pub fn whole_log(&mut self) -> Vec<String> {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("read");
        }
        self.log()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stdin.take());
        // The child may have exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let tail = &log[log.len().saturating_sub(40)..];
            eprintln!("--- {}, last lines ---\n{}", self.name, tail.join("\n"));
        }
    }
}
