//! A typical workload: it reads the token from a file whenever it needs one. This pod reads it every second and logs
//! each reading with its time, so that the test sees every token the pod read.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{LogParams, PostParams};
use serde_json::json;

use crate::support::world::{World, claims, until};

/// Maximum time between two readings, in seconds. A longer gap could hide a token.
const GAP: i64 = 5;

pub struct Consumer {
    pods: Api<Pod>,
    /// Maximum time for the node to start a pod or to update its files.
    patience: Duration,
}

pub struct Reading {
    at: i64,
    token: String,
}

impl Consumer {
    /// Starts a pod that mounts this Secret and waits until it runs.
    pub async fn start(world: &World, image: &str, secret: &str, patience: Duration) -> Self {
        let script = r#"while :; do echo "$(date +%s) $(cat /token/token)"; sleep 1; done"#;
        let pod = json!({
            "metadata": {"name": "consumer"},
            "spec": {
                "terminationGracePeriodSeconds": 0,
                "containers": [{
                    "name": "consumer", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", script],
                    "volumeMounts": [{"name": "token", "mountPath": "/token", "readOnly": true}],
                }],
                "volumes": [{"name": "token", "secret": {"secretName": secret}}],
            },
        });
        let pods: Api<Pod> = Api::namespaced(world.client.clone(), &world.name);
        let pod = serde_json::from_value(pod).expect("a pod");
        pods.create(&PostParams::default(), &pod).await.expect("created");
        until(pods.clone(), "consumer", patience, |pod: &Pod| {
            let status = pod.status.as_ref().and_then(|s| s.phase.as_deref());
            status == Some("Running")
        })
        .await;
        Self { pods, patience }
    }

    /// All readings so far.
    pub async fn readings(&self) -> Vec<Reading> {
        let log = self.pods.logs("consumer", &LogParams::default()).await.expect("a log");
        // The last line may be incomplete.
        let whole = log.rfind('\n').map_or("", |end| &log[..end]);
        whole.lines().map(Reading::parse).collect()
    }

    /// Waits until the pod has read this token or a later one.
    pub async fn reads(&self, token: &str) {
        let issued = |token: &str| claims(token)["iat"].as_i64().expect("iat");
        let deadline = Instant::now() + self.patience;
        let late_enough = |r: &Reading| r.token == token || issued(&r.token) > issued(token);
        while !self.readings().await.iter().any(late_enough) {
            assert!(
                Instant::now() < deadline,
                "the file did not get the new token within {:?}",
                self.patience
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Summarizes the readings. Fails if the pod ever read an expired token.
    pub async fn seen(&self) -> Seen {
        let readings = self.readings().await;
        let (mut margin, mut widest, mut tokens) = (i64::MAX, 0, BTreeSet::new());
        let mut last = readings.first().expect("a reading").at;
        for reading in &readings {
            let left = claims(&reading.token)["exp"].as_i64().expect("exp") - reading.at;
            let at = Timestamp::from_second(reading.at).expect("a time");
            assert!(
                left > 0,
                "at {at} the file held a token that had expired {} s earlier",
                -left
            );
            margin = margin.min(left);
            widest = widest.max(reading.at - last);
            last = reading.at;
            tokens.insert(&reading.token);
        }
        assert!(widest <= GAP, "not measured: a gap of {widest} s between two readings");
        Seen {
            readings: readings.len(),
            widest,
            margin,
            tokens: tokens.len(),
        }
    }
}

/// What the pod read.
pub struct Seen {
    readings: usize,
    widest: i64,
    margin: i64,
    /// Number of distinct tokens.
    pub tokens: usize,
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            readings,
            widest,
            margin,
            tokens,
        } = self;
        write!(
            f,
            "{readings} readings, widest gap {widest} s, least time left {margin} s, {tokens} tokens"
        )
    }
}

impl Reading {
    fn parse(line: &str) -> Self {
        let (at, token) = line
            .split_once(' ')
            .unwrap_or_else(|| panic!("not a reading: {line:?}"));
        Self {
            at: at.parse().expect("seconds"),
            token: token.to_owned(),
        }
    }
}
