//! Instances: their connections, and the status that tells whether they answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;

use crate::api::ZitadelInstance;
use crate::controller::Context;
use crate::controller::queue::Done;
use crate::domain::facts::ObjectRef;
use crate::domain::failure::{Failure, classify};
use crate::domain::instance::status;
use crate::domain::reason::Reason;
use crate::domain::report::{Failed, Wake};
use crate::domain::schedule::duration;
use crate::domain::validate;
use crate::zitadel::{Hosts, Instance, Rate, Settings};

/// Connections by instance. State in memory: discovery, the learned project id, limits by host.
#[derive(Default)]
pub struct Connections {
    hosts: Hosts,
    open: Mutex<HashMap<String, Arc<Instance>>>,
}

impl Connections {
    /// The connection of `instance`; a new one when the way to it changed.
    pub fn of(&self, instance: &ZitadelInstance) -> Result<Arc<Instance>, Failure> {
        let name = instance.metadata.name.clone().unwrap_or_default();
        let settings = settings(instance);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = open.get(&name)
            && *known.settings() == settings
        {
            return Ok(known.clone());
        }
        let new = Arc::new(Instance::new(settings, &self.hosts)?);
        open.insert(name, new.clone());
        Ok(new)
    }

    /// The real id behind the `zitadel` audience, if this process learned it.
    #[must_use]
    pub fn known_project_id(&self, instance: &ZitadelInstance) -> Option<String> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let known = open.get(instance.metadata.name.as_deref()?)?;
        known.known_project_id().map(str::to_owned)
    }

    /// The instance is gone.
    pub fn close(&self, name: &str) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        self.hosts.hang_up(name);
    }
}

fn settings(instance: &ZitadelInstance) -> Settings {
    let connection = instance.connection();
    let timeout = connection
        .timeout
        .as_deref()
        .and_then(duration)
        .and_then(|d| Duration::try_from(d).ok());
    let positive = |value: Option<i32>, default: u32| value.and_then(|v| u32::try_from(v).ok()).unwrap_or(default);
    Settings {
        name: instance.metadata.name.clone().unwrap_or_default(),
        issuer: instance.spec.issuer.clone(),
        endpoint: connection.endpoint,
        timeout: timeout
            .unwrap_or(Duration::from_secs(10))
            .clamp(Duration::from_secs(1), Duration::from_mins(1)),
        allow_insecure_http: connection.allow_insecure_http == Some(true),
        rate: Rate {
            per_second: positive(connection.requests_per_second, 30),
            burst: positive(connection.burst, 300),
            concurrent: positive(connection.max_concurrent_requests, 8) as usize,
        },
    }
}

/// One look at an instance: does it answer, and as whom.
pub async fn reconcile(ctx: Arc<Context>, id: ObjectRef) -> Done {
    let Some(instance) = ctx.cache.instance(&id.name) else {
        ctx.connections.close(&id.name);
        return Done::default();
    };
    ctx.metrics.passed("ZitadelInstance");
    let connection = match validate::instance(&id.name, &instance.spec) {
        Ok(()) => ctx.connections.of(&instance),
        Err(_) => Err(Reason::InvalidSpec.into()),
    };
    let discovered = match connection {
        Ok(connection) => connection.discover().await,
        Err(failure) => Err(failure),
    };
    let discovered = discovered
        .map(|d| d.token_path)
        .map_err(|failure| classify(failure, false));
    let project_id = ctx.connections.known_project_id(&instance);
    let status = status(&instance, &discovered, project_id.as_deref(), Timestamp::now());
    let failed = discovered.err().map(|reason| Failed::now("", reason));
    let mut done = Done {
        wake: Wake {
            at: None,
            failed: failed.into_iter().collect(),
        },
        written: Vec::new(),
    };
    if instance.status.as_ref() != Some(&status) {
        let mut wanted = (*instance).clone();
        wanted.status = Some(status);
        match ctx.writer.replace_instance_status(&wanted).await {
            Ok(version) => done.written.push(version),
            Err(error) => {
                tracing::warn!(instance = %id, %error, "the status could not be written");
                done.wake.failed.push(Failed::now("", Reason::Internal));
            }
        }
    }
    done
}
