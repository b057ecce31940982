//! A real Prometheus that scrapes one operator, and promtool, both from Debian's package `prometheus`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::child::Running;
use super::{SOON, eventually};

/// The root of the repository.
pub const ROOT: &str = env!("CARGO_MANIFEST_DIR");

const PACKAGE: &str = "the Debian package prometheus must be installed";

pub struct Prometheus {
    running: Running,
    folder: PathBuf,
    http: reqwest::Client,
}

/// One series of a query result: its labels, and its value as text.
pub type Sample = (BTreeMap<String, String>, String);

impl Prometheus {
    /// Starts a Prometheus that scrapes `operator` as the chart's `ServiceMonitor` would: with `honor_labels`, so the
    /// operator's `namespace` label takes precedence over that of the target.
    pub async fn start(operator: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("prometheus-{}", operator.replace(':', "-")));
        std::fs::create_dir_all(&folder).expect("a folder");
        let config = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s}}\n\
             scrape_configs:\n\
             - job_name: zitadel-tokens\n  honor_labels: true\n  static_configs:\n  \
             - {{targets: ['{operator}'], labels: {{namespace: operators, pod: zitadel-tokens-0}}}}\n"
        );
        std::fs::write(folder.join("config.yaml"), config).expect("written");
        let (running, _) = Running::start(
            "prometheus",
            Command::new("setpriv")
                .args(["--pdeathsig", "KILL", "prometheus"])
                .arg(format!("--config.file={}", folder.join("config.yaml").display()))
                .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
                .arg("--web.listen-address=127.0.0.1:0"),
        );
        let mut prometheus = Self {
            running,
            folder,
            http: reqwest::Client::builder().no_proxy().build().expect("a client"),
        };
        let running = &mut prometheus.running;
        let deadline = Instant::now() + SOON;
        while listening(&running.log()).is_none() {
            let ended = running.child.try_wait().expect("a child");
            assert!(ended.is_none(), "{PACKAGE}: {:?}", running.log());
            assert!(Instant::now() < deadline, "not ready in {SOON:?}: {:?}", running.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        prometheus
    }

    /// Evaluates an expression now.
    pub async fn query(&self, expression: &str) -> Result<Vec<Sample>, String> {
        let answer = self.ask("query", &[("query", expression)]).await?;
        let samples = answer["result"].as_array().cloned().unwrap_or_default();
        Ok(samples
            .iter()
            .map(|s| {
                let value = s["value"][1].as_str().unwrap_or_default().to_owned();
                (labels(&s["metric"]), value)
            })
            .collect())
    }

    /// The labels of all series of the last minutes that match.
    pub async fn series(&self, matching: &str) -> Vec<BTreeMap<String, String>> {
        let answer = self.ask("series", &[("match[]", matching)]).await.expect("series");
        answer.as_array().expect("a list").iter().map(labels).collect()
    }

    /// Waits until an expression has a result.
    pub async fn until(&self, expression: &str) {
        eventually(expression, async || {
            !self.query(expression).await.expect("a query").is_empty()
        })
        .await;
    }

    async fn ask(&self, what: &str, form: &[(&str, &str)]) -> Result<Value, String> {
        let address = listening(&self.running.log()).expect("it listens");
        let request = self.http.post(format!("http://{address}/api/v1/{what}")).form(form);
        let mut answer: Value = request.send().await.expect("an answer").json().await.expect("JSON");
        match answer["error"].as_str() {
            Some(error) => Err(error.to_owned()),
            None => Ok(answer["data"].take()),
        }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.running.child.kill();
        let _ = self.running.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn labels(metric: &Value) -> BTreeMap<String, String> {
    serde_json::from_value(metric.clone()).expect("labels")
}

fn listening(log: &[String]) -> Option<String> {
    // Prometheus listens before it can answer.
    log.iter().find(|line| line.contains("Server is ready"))?;
    let line = log.iter().find(|line| line.contains("msg=\"Listening on\""))?;
    Some(line.split("address=").nth(1)?.trim().to_owned())
}

/// Runs promtool in the root of the repository. Returns whether it succeeded, and its output.
pub fn promtool(arguments: &[&str], input: &str) -> (bool, String) {
    let mut child = Command::new("promtool")
        .args(arguments)
        .current_dir(ROOT)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect(PACKAGE);
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(input.as_bytes()).expect("promtool reads");
    drop(stdin);
    let output = child.wait_with_output().expect("promtool ends");
    let printed = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&printed).into_owned())
}
