//! The operator as a child process.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::cgroup::MemoryCgroup;
use super::child::Running;
use super::clock::Clock;
use super::{SOON, cluster::Cluster};

pub struct Operator {
    running: Running,
    pub pid: u32,
    stdout: Option<JoinHandle<String>>,
    /// Dropped after `running`, because the cgroup must be empty then.
    cgroup: Option<MemoryCgroup>,
}

/// The binary under test: the one that cargo names, or the one next to this executable. Cargo does not name it for
/// examples such as the demo.
pub fn binary() -> PathBuf {
    if let Some(path) = option_env!("CARGO_BIN_EXE_zitadel-tokens") {
        return path.into();
    }
    let here = std::env::current_exe().expect("a path");
    let folder = here.ancestors().nth(2).expect("target/PROFILE/examples/demo");
    folder.join("zitadel-tokens")
}

impl Operator {
    /// Starts an operator that serves the instances with this label selector, and waits until it watches.
    pub async fn start(cluster: &Cluster, selector: &str) -> Self {
        Self::start_with(&cluster.kubeconfig, selector, &[]).await
    }

    pub async fn start_with(kubeconfig: &Path, selector: &str, flags: &[&str]) -> Self {
        Self::start_in(kubeconfig, selector, flags, &[]).await
    }

    /// Starts an operator whose wall clock can be set.
    pub async fn start_on_clock(cluster: &Cluster, selector: &str, clock: &Clock) -> Self {
        Self::start_in(&cluster.kubeconfig, selector, &[], &clock.environment()).await
    }

    /// Starts an operator with the limits of a small container, and waits until it watches. The limits are this many
    /// bytes of memory and 1,024 file descriptors. If the machine cannot limit memory by a cgroup, compare
    /// [`Operator::peak_memory`] with `bytes`.
    pub async fn start_limited(cluster: &Cluster, selector: &str, bytes: u64) -> Self {
        let cgroup = MemoryCgroup::new(bytes);
        let mut prefix: Vec<OsString> = cgroup.iter().flat_map(MemoryCgroup::prefix).collect();
        prefix.extend(["prlimit".into(), "--nofile=1024:1024".into()]);
        let mut operator = Self::spawn_behind(&prefix, &cluster.kubeconfig, selector, &[], &[]);
        operator.cgroup = cgroup;
        operator.await_line("watching").await;
        operator
    }

    /// Starts an operator with these flags, in this environment, and waits until it watches.
    pub async fn start_in(kubeconfig: &Path, selector: &str, flags: &[&str], environment: &[(&str, &OsStr)]) -> Self {
        let mut operator = Self::spawn(kubeconfig, selector, flags, environment);
        operator.await_line("watching").await;
        operator
    }

    /// Starts an operator that is configured only by this environment, and waits until it watches.
    pub async fn start_as_told(kubeconfig: &Path, environment: &[(&str, &OsStr)]) -> Self {
        let mut operator = Self::launch(&[], kubeconfig, &[], environment);
        operator.await_line("watching").await;
        operator
    }

    /// Starts an operator without waiting until it watches.
    pub fn spawn(kubeconfig: &Path, selector: &str, flags: &[&str], environment: &[(&str, &OsStr)]) -> Self {
        Self::spawn_behind(&[], kubeconfig, selector, flags, environment)
    }

    /// Starts an operator with `prefix` before its command line.
    fn spawn_behind(
        prefix: &[OsString],
        kubeconfig: &Path,
        selector: &str,
        flags: &[&str],
        environment: &[(&str, &OsStr)],
    ) -> Self {
        let flags = [&["--instance-selector", selector], flags].concat();
        let environment = [&[("RUST_LOG", OsStr::new("debug"))], environment].concat();
        Self::launch(prefix, kubeconfig, &flags, &environment)
    }

    fn launch(prefix: &[OsString], kubeconfig: &Path, flags: &[&str], environment: &[(&str, &OsStr)]) -> Self {
        // With `--pdeathsig`, the operator is killed if the test is killed.
        let (running, mut stdout) = Running::start(
            "operator",
            Command::new("setpriv")
                .args(["--pdeathsig", "KILL"])
                .args(prefix)
                .arg(binary())
                .args(["run", "--listen", "127.0.0.1:0"])
                .args(flags)
                .env("KUBECONFIG", kubeconfig)
                .env_remove("POD_NAMESPACE")
                .envs(environment.iter().copied()),
        );
        let pid = running.child.id();
        let stdout = std::thread::spawn(move || {
            let mut text = Vec::new();
            // After an error, the text so far is kept.
            let _ = stdout.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Self {
            running,
            pid,
            stdout: Some(stdout),
            cgroup: None,
        }
    }

    /// Waits for a log line that contains `text`.
    pub async fn await_line(&mut self, text: &str) -> String {
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(line) = self.log().into_iter().find(|l| l.contains(text)) {
                return line;
            }
            let ended = self.running.child.try_wait().expect("a child");
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "no {text:?} in the operator's log ({ended:?})"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn log(&self) -> Vec<String> {
        self.running.log()
    }

    /// The address of the operator's HTTP port.
    pub fn address(&self) -> String {
        let log = self.log();
        let line = log
            .iter()
            .find(|l| l.contains("address="))
            .expect("a line with the address");
        line.split("address=")
            .nth(1)
            .expect("an address")
            .split_whitespace()
            .next()
            .expect("an address")
            .to_owned()
    }

    /// Sends a GET request to the operator's HTTP port.
    pub async fn get(&self, path: &str) -> (u16, String) {
        let answer = reqwest::get(format!("http://{}{path}", self.address()))
            .await
            .expect("an answer");
        (answer.status().as_u16(), answer.text().await.expect("a body"))
    }

    /// The number of reconciles, by the operator's own metric.
    pub async fn passes(&self) -> u64 {
        let metrics = self.get("/metrics").await.1;
        let counts = metrics
            .lines()
            .filter(|l| l.starts_with("zitadel_tokens_reconcile_duration_seconds_count{"));
        counts
            .filter_map(|l| l.rsplit(' ').next())
            .map(|count| count.parse::<u64>().expect("a count"))
            .sum()
    }

    /// The peak memory of the operator in bytes: that of its cgroup or, without a cgroup, its resident memory.
    pub fn peak_memory(&self) -> u64 {
        if let Some(peak) = self.cgroup.as_ref().and_then(MemoryCgroup::peak) {
            return peak;
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).expect("it runs");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = peak.expect("a peak").trim().trim_end_matches(" kB");
        kilobytes.parse::<u64>().expect("a number") * 1024
    }

    /// Whether the operator has exited, for instance because it exceeded its memory limit.
    pub fn has_ended(&mut self) -> bool {
        self.running.child.try_wait().expect("a child").is_some()
    }

    /// Sends SIGKILL, and waits until the operator has exited.
    pub fn kill(mut self) {
        self.running.child.kill().expect("killed");
        self.running.child.wait().expect("waited for");
    }

    /// Sends a signal to the operator.
    pub fn signal(&self, name: &str) {
        let mut kill = Command::new("kill");
        let sent = kill.args(["-s", name, &self.pid.to_string()]).status();
        assert!(sent.expect("kill runs").success());
    }

    /// Sends SIGTERM, waits until the operator exits with success, and returns its log.
    pub async fn terminate(self) -> Vec<String> {
        self.terminate_whole().await.0
    }

    /// Sends SIGTERM, waits until the operator exits with success, and returns its log and its stdout.
    pub async fn terminate_whole(mut self) -> (Vec<String>, String) {
        self.signal("TERM");
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(status) = self.running.child.try_wait().expect("a child") {
                assert!(status.success(), "the operator exited with {status}");
                let stdout = self.stdout.take().expect("kept").join().expect("read");
                return (self.running.whole_log(), stdout);
            }
            assert!(Instant::now() < deadline, "the operator did not exit after SIGTERM");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Operator {
    /// In every test, the operator must log no key, no assertion and no token that is a JWT.
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        for line in self.log() {
            assert!(!holds_a_secret(&line), "the log contains a secret: {line}");
        }
    }
}

/// Whether a line contains a PEM, the DER of a private key or a JWT, complete or truncated.
fn holds_a_secret(line: &str) -> bool {
    let is_base64 = |b: u8| b.is_ascii_alphanumeric() || b"+/-_=".contains(&b);
    let begins = |start: &str, length: usize| {
        line.match_indices(start)
            .any(|(at, _)| line.as_bytes()[at..].iter().take_while(|b| is_base64(**b)).count() >= length)
    };
    line.contains("-----BEGIN") || begins("MII", 32) || begins("eyJ", 24)
}
