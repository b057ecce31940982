//! The API server's audit log: who did what, counted.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;

use k8s_openapi::jiff::Timestamp;
use serde::Deserialize;

pub struct Audit {
    path: PathBuf,
}

/// One request, completed.
#[derive(Debug, Clone)]
pub struct Request {
    pub verb: String,
    pub resource: String,
    pub namespace: String,
    pub name: String,
    pub agent: String,
    pub code: u16,
    /// When it came to the API server.
    pub at: Timestamp,
}

impl Request {
    /// Whether it came to change something.
    pub fn writes(&self) -> bool {
        !["get", "list", "watch"].contains(&&*self.verb)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    verb: String,
    request_received_timestamp: Timestamp,
    #[serde(default)]
    user_agent: String,
    object_ref: Option<Object>,
    response_status: Option<Status>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Object {
    resource: String,
    subresource: String,
    namespace: String,
    name: String,
}

#[derive(Deserialize)]
struct Status {
    code: u16,
}

impl Audit {
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// All requests that concern `namespace`, with `resource/subresource` as resource.
    pub fn requests(&self, namespace: &str) -> Vec<Request> {
        let file = std::fs::File::open(&self.path).expect("an audit log");
        BufReader::new(file)
            .lines()
            .map_while(Result::ok)
            .filter(|line| line.contains(namespace))
            .filter_map(|line| serde_json::from_str::<Line>(&line).ok())
            .filter_map(|line| {
                let object = line.object_ref?;
                (object.namespace == namespace).then(|| Request {
                    verb: line.verb,
                    resource: if object.subresource.is_empty() {
                        object.resource
                    } else {
                        format!("{}/{}", object.resource, object.subresource)
                    },
                    namespace: object.namespace,
                    name: object.name,
                    agent: line.user_agent,
                    code: line.response_status.map_or(0, |s| s.code),
                    at: line.request_received_timestamp,
                })
            })
            .collect()
    }

    /// How often `verb` on `resource` succeeded in `namespace`.
    pub fn count(&self, namespace: &str, verb: &str, resource: &str) -> usize {
        let all = self.requests(namespace);
        all.iter()
            .filter(|r| r.verb == verb && r.resource == resource && r.code < 300)
            .count()
    }
}
