//! The random events of the model test: edits, faults, clock steps and restarts.

use std::time::Duration;

use k8s_openapi::jiff::SignedDuration;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::kubernetes::{Edit, Outage};
use super::zitadel::Fault;
use super::{KEY_SECRET, NAMES, World, key_data, lock};
use crate::api::metadata::{ANNOTATION_RECORD, ANNOTATION_RENEW_REQUEST};

/// One event. A `usize` selects the token or an older version of its Secret; a `u8` selects the new value.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// Sets the projects of a token: 1, 2, or both, or one set with project 3, which the policy never allows.
    Audience(usize, u8),
    RenameSecret(usize, u8),
    Labels(usize, u8),
    Template(usize, u8),
    RenewBefore(usize, u8),
    /// Sets the number of tokens in the spec.
    TokenCount(usize),
    Suspend(bool),
    RenewRequest(u8),
    TokenEdited(usize, u8),
    RecordEdited(usize),
    MetadataEdited(usize, u8),
    SecretDeleted(usize),
    /// An earlier version of a Secret is restored, as from a backup.
    SecretRestored(usize, usize),
    KeyReplaced(u8),
    KeyExists(bool),
    PolicyAllows(bool),
    /// Starts a fault of ZITADEL, or ends it with `None`.
    ZitadelFault(Option<Fault>),
    /// Starts an outage of the API server, or ends it with `None`.
    ApiServerOutage(Option<Outage>),
    /// Sets ZITADEL's clock this many seconds ahead of the true time.
    ServerClock(i64),
    /// Sets ZITADEL's `Date` header this many years ahead of its clock.
    ServerDate(i64),
    /// Sets the operator's clock this many years ahead of the true time.
    LocalClock(i64),
    /// Advances the time by this percentage of a token lifetime.
    TimePasses(u32),
    /// Restarts the operator.
    Restart,
}

/// Random events. Each has a number of repetitions and a pause in milliseconds after each repetition; without a pause,
/// the test waits until the operator has settled.
pub fn events() -> impl Strategy<Value = Vec<(Event, usize, Option<u64>)>> {
    use Event::{
        ApiServerOutage, Audience, KeyExists, KeyReplaced, Labels, LocalClock, MetadataEdited, PolicyAllows,
        RecordEdited, RenameSecret, RenewBefore, RenewRequest, Restart, SecretDeleted, SecretRestored, ServerClock,
        ServerDate, Suspend, Template, TimePasses, TokenCount, TokenEdited, ZitadelFault,
    };
    let index = 0..2_usize;
    let fault = prop_oneof![
        Just(Fault::Unreachable),
        Just(Fault::Hangs),
        Just(Fault::Unavailable),
        (1..1_200_u32).prop_map(Fault::Throttled),
        Just(Fault::RejectsKey),
        Just(Fault::RejectsKeyLegacy),
        Just(Fault::MalformedResponse),
        Just(Fault::ResponseLost),
    ];
    let outage = prop_oneof![
        Just(Outage::QuotaExceeded),
        Just(Outage::SecretResponseLost),
        Just(Outage::SecretWritesHang),
        Just(Outage::Down),
    ];
    let event = prop_oneof![
        2 => (index.clone(), 0..4_u8).prop_map(|(t, n)| Audience(t, n)),
        1 => (index.clone(), 0..3_u8).prop_map(|(t, n)| RenameSecret(t, n)),
        1 => (index.clone(), 0..3_u8).prop_map(|(t, n)| Labels(t, n)),
        1 => (index.clone(), 0..3_u8).prop_map(|(t, n)| Template(t, n)),
        1 => (index.clone(), 0..3_u8).prop_map(|(t, n)| RenewBefore(t, n)),
        1 => (1..3_usize).prop_map(TokenCount),
        1 => any::<bool>().prop_map(Suspend),
        1 => (0..3_u8).prop_map(RenewRequest),
        1 => (index.clone(), 0..3_u8).prop_map(|(t, n)| TokenEdited(t, n)),
        1 => index.clone().prop_map(RecordEdited),
        2 => (index.clone(), 0..3_u8).prop_map(|(t, n)| MetadataEdited(t, n)),
        2 => index.clone().prop_map(SecretDeleted),
        2 => (index, 0..9_usize).prop_map(|(t, n)| SecretRestored(t, n)),
        1 => (0..3_u8).prop_map(KeyReplaced),
        1 => any::<bool>().prop_map(KeyExists),
        1 => any::<bool>().prop_map(PolicyAllows),
        3 => proptest::option::of(fault).prop_map(ZitadelFault),
        3 => proptest::option::of(outage).prop_map(ApiServerOutage),
        1 => (-120..120_i64).prop_map(ServerClock),
        2 => (-1..2_i64).prop_map(|n| ServerDate(10 * n)),
        1 => (-1..2_i64).prop_map(|n| LocalClock(10 * n)),
        6 => (0..30_u32).prop_map(TimePasses),
        4 => (0..150_u32).prop_map(TimePasses),
        2 => Just(Restart),
    ];
    let times = prop_oneof![4 => Just(1_usize), 1 => 2..8_usize];
    let pause = prop_oneof![4 => Just(None), 1 => (0..3_000_u64).prop_map(Some)];
    proptest::collection::vec((event, times, pause), 1..60)
}

const YEAR: i64 = 365 * 24 * 3_600;

impl World {
    /// Changes a token of the spec, if the spec has that token.
    fn change_token(&mut self, index: usize, change: impl FnOnce(&mut Value)) {
        lock(&self.shared).store.change_user(|user| {
            if let Some(token) = user["spec"]["tokens"].get_mut(index) {
                change(token);
            }
        });
    }

    /// Returns the name of a token's Secret, if the spec has that token.
    fn secret_name(&self, index: usize) -> Option<String> {
        let tokens = lock(&self.shared).tokens();
        tokens.get(index).map(|token| token.secret.name.clone())
    }

    /// Records that an event may require a new token for this entry.
    fn expect_new_token(&mut self, index: usize) {
        lock(&self.shared).entry_edited(NAMES[index], true);
    }

    fn expect_new_tokens(&mut self) {
        (0..NAMES.len()).for_each(|index| self.expect_new_token(index));
    }

    pub fn apply(&mut self, event: Event) {
        lock(&self.shared).record_event();
        match event {
            Event::TimePasses(_) => {}
            Event::Restart => self.restart(),
            Event::ZitadelFault(fault) => {
                let mut state = lock(&self.shared);
                state.zitadel.fault = fault;
                state.health_changed();
            }
            Event::ApiServerOutage(outage) => {
                let mut state = lock(&self.shared);
                state.store.outage = outage;
                state.health_changed();
            }
            Event::ServerClock(seconds) => {
                lock(&self.shared).set_server_clock(seconds);
                self.expect_new_tokens();
            }
            // Only one of `Date` and the local clock is wrong at a time: two equal errors would cancel out.
            Event::ServerDate(years) => {
                lock(&self.shared).date_ahead = SignedDuration::from_secs(years * YEAR);
                self.step_local_clock(0);
            }
            Event::LocalClock(years) => {
                lock(&self.shared).date_ahead = SignedDuration::ZERO;
                self.step_local_clock(years * YEAR);
            }
            Event::KeyReplaced(n) => {
                let key_id = format!("k{n}");
                let mut state = lock(&self.shared);
                let data = key_data(&key_id);
                state.key_id = key_id;
                state
                    .store
                    .change_secret(KEY_SECRET, None, |secret| secret.object["data"] = data);
                drop(state);
                self.expect_new_tokens();
            }
            Event::KeyExists(exists) => {
                let mut state = lock(&self.shared);
                let key_id = state.key_id.clone();
                if exists && !state.key_exists {
                    state.store.put_new(KEY_SECRET, &key_data(&key_id));
                } else if !exists {
                    state.store.delete(KEY_SECRET);
                }
                state.key_exists = exists;
            }
            Event::PolicyAllows(on) => {
                let mut state = lock(&self.shared);
                state.allowed = on;
                let ids: &[&str] = if on { &["1", "2"] } else { &["7"] };
                state
                    .store
                    .change_policy(|policy| policy["spec"]["audiences"]["projectIDs"] = json!(ids));
            }
            _ => {
                self.apply_spec_event(event);
                self.apply_secret_event(event);
            }
        }
    }

    fn apply_spec_event(&mut self, event: Event) {
        match event {
            Event::Audience(index, ids) => {
                let ids: &[&str] = [&["1"][..], &["2"], &["1", "2"], &["1", "3"]][usize::from(ids)];
                self.change_token(index, |token| token["projectIDs"] = json!(ids));
                self.expect_new_token(index);
            }
            Event::RenameSecret(index, n) => {
                self.change_token(index, |token| {
                    let name = format!("{}-{n}", token["name"].as_str().expect("name is a string"));
                    token["secret"]["name"] = name.into();
                });
                self.expect_new_token(index);
            }
            Event::Labels(index, n) => {
                let labels: Value = (0..n)
                    .map(|i| (format!("example.com/l{i}"), json!(n.to_string())))
                    .collect();
                self.change_token(index, |token| token["secret"]["labels"] = labels);
            }
            Event::Template(index, n) => {
                let text = format!("{n} {{{{ token }}}}");
                let template: Value = (0..n).map(|i| (format!("t{i}"), json!(text))).collect();
                self.change_token(index, |token| token["secret"]["template"] = template);
            }
            Event::RenewBefore(index, n) => {
                let seconds = lock(&self.shared).zitadel.lifetime.as_secs();
                let before = [None, Some(seconds / 2), Some(seconds * 2)][usize::from(n)];
                self.change_token(index, |token| {
                    token["renewBefore"] = json!(before.map(|s| format!("{s}s")));
                });
            }
            Event::TokenCount(count) => {
                let all_tokens = self.all_tokens.clone();
                let mut old_count = 0;
                lock(&self.shared).store.change_user(|user| {
                    let tokens = user["spec"]["tokens"].as_array_mut().expect("tokens is an array");
                    old_count = tokens.len();
                    tokens.truncate(count);
                    tokens.extend(all_tokens[tokens.len()..count].iter().cloned());
                });
                (old_count..count).for_each(|index| self.expect_new_token(index));
            }
            Event::Suspend(on) => {
                lock(&self.shared)
                    .store
                    .change_user(|user| user["spec"]["suspend"] = on.into());
            }
            Event::RenewRequest(n) => {
                let request = [None, Some("a"), Some("b")][usize::from(n)];
                lock(&self.shared).store.change_user(|user| {
                    user["metadata"]["annotations"] =
                        request.map_or(json!({}), |request| json!({ANNOTATION_RENEW_REQUEST: request}));
                });
                self.expect_new_tokens();
            }
            _ => {}
        }
    }

    fn apply_secret_event(&mut self, event: Event) {
        let (Event::TokenEdited(index, _)
        | Event::RecordEdited(index)
        | Event::MetadataEdited(index, _)
        | Event::SecretDeleted(index)
        | Event::SecretRestored(index, _)) = event
        else {
            return;
        };
        lock(&self.shared).entry_edited(NAMES[index], !matches!(event, Event::MetadataEdited(..)));
        let Some(name) = self.secret_name(index) else { return };
        let other = self.secret_name(1 - index);
        let mut state = lock(&self.shared);
        match event {
            Event::TokenEdited(_, n) => {
                let other = other.and_then(|other| state.store.secrets.get(&other)?.token());
                state
                    .store
                    .change_secret(&name, Some(Edit::Token), |secret| match (n, other) {
                        (0, _) => drop(
                            secret.object["data"]
                                .as_object_mut()
                                .and_then(|data| data.remove("token")),
                        ),
                        (1, Some(other)) => secret.set_data("token", &other),
                        _ => secret.set_data("token", "x"),
                    });
            }
            Event::RecordEdited(_) => state.store.change_secret(&name, Some(Edit::Token), |secret| {
                let record = &mut secret.object["metadata"]["annotations"][ANNOTATION_RECORD];
                if let Some(text) = record.as_str() {
                    *record = text.replace("\"expiresAt\":\"20", "\"expiresAt\":\"21").into();
                }
            }),
            Event::MetadataEdited(_, n) => {
                state
                    .store
                    .change_secret(&name, Some(Edit::Metadata), |secret| match n {
                        0 => secret.object["metadata"]["labels"] = json!({}),
                        1 => {
                            let data = secret.object["data"].as_object_mut().expect("data is an object");
                            data.retain(|key, _| key == "token");
                        }
                        _ => secret.object["metadata"]["annotations"]["note"] = "x".into(),
                    });
            }
            Event::SecretDeleted(_) => state.store.delete(&name),
            Event::SecretRestored(_, n) => state.store.restore(&name, n),
            _ => {}
        }
    }

    /// Sets the operator's clock. The operator detects the jump within a second.
    fn step_local_clock(&mut self, seconds: i64) {
        let changed = {
            let mut state = lock(&self.shared);
            state.health_changed();
            state.clear_retry_after();
            state.set_local_clock(seconds)
        };
        if changed {
            self.process.clock_jumped(Duration::from_millis(700));
        }
    }
}
