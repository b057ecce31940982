//! The API server's audit log: which client made which requests.

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
    pub user: String,
    pub verb: String,
    /// API group, empty for the core group.
    pub group: String,
    pub resource: String,
    pub namespace: String,
    pub name: String,
    pub agent: String,
    pub code: u16,
    /// When the API server received the request.
    pub at: Timestamp,
}

impl Request {
    /// Whether the request is a write.
    pub fn writes(&self) -> bool {
        !["get", "list", "watch"].contains(&&*self.verb)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    user: User,
    verb: String,
    request_received_timestamp: Timestamp,
    #[serde(default)]
    user_agent: String,
    object_ref: Option<Object>,
    response_status: Option<Status>,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    username: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Object {
    api_group: String,
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
        let mut all = self.read(namespace);
        all.retain(|request| request.namespace == namespace);
        all
    }

    /// All requests of a user.
    pub fn requests_of(&self, user: &str) -> Vec<Request> {
        let mut all = self.read(user);
        all.retain(|request| request.user == user);
        all
    }

    /// The requests whose line contains `text`.
    fn read(&self, text: &str) -> Vec<Request> {
        let file = std::fs::File::open(&self.path).expect("an audit log");
        BufReader::new(file)
            .lines()
            .map_while(Result::ok)
            .filter(|line| line.contains(text))
            .filter_map(|line| serde_json::from_str::<Line>(&line).ok())
            .filter_map(|line| {
                let object = line.object_ref?;
                Some(Request {
                    user: line.user.username,
                    verb: line.verb,
                    group: object.api_group,
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
