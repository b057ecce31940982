//! What happens in a model, and how often.

use std::time::Duration;

use k8s_openapi::jiff::SignedDuration;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::kubernetes::{Edit, Outage};
use super::zitadel::Fault;
use super::{KEY_SECRET, NAMES, World, key_data, lock};
use crate::api::metadata::{ANNOTATION_RECORD, ANNOTATION_RENEW_REQUEST};

/// Something that happens; a number picks the token, the value, or the variant.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// Projects of a token: 1, 2 or both; 3 is not allowed.
    Audience(usize, u8),
    Rename(usize, u8),
    Label(usize, u8),
    Template(usize, u8),
    RenewBefore(usize, u8),
    /// How many entries the spec has.
    Entries(usize),
    Suspend(bool),
    Ask(u8),
    TokenEdited(usize, u8),
    RecordEdited(usize),
    MetadataEdited(usize, u8),
    SecretDeleted(usize),
    /// An earlier version of a Secret comes back, as from a backup.
    PutBack(usize, usize),
    KeyReplaced(u8),
    KeyThere(bool),
    Allowed(bool),
    /// ZITADEL fails in this way.
    Server(Option<Fault>),
    /// The API server fails in this way.
    Cluster(Option<Outage>),
    /// The server's clock is set so many seconds ahead of the true time.
    Clock(i64),
    /// The server's `Date` is so many years ahead of its clock.
    Date(i64),
    /// Our own clock is set so many years ahead.
    OurClock(i64),
    /// Percent of a lifetime pass.
    Time(u32),
    /// The process ends and begins anew.
    Restart,
}

/// Events, how often each comes in a row, and for how many milliseconds nothing happens after each; without a number
/// until all has settled.
pub fn events() -> impl Strategy<Value = Vec<(Event, usize, Option<u64>)>> {
    use Event::{
        Allowed, Ask, Audience, Clock, Cluster, Date, Entries, KeyReplaced, KeyThere, Label, MetadataEdited, OurClock,
        PutBack, RecordEdited, Rename, RenewBefore, Restart, SecretDeleted, Server, Suspend, Template, Time,
        TokenEdited,
    };
    let of = 0..2_usize;
    let fault = prop_oneof![
        Just(Fault::Away),
        Just(Fault::Hangs),
        Just(Fault::Errors),
        (1..1_200_u32).prop_map(Fault::Throttles),
        Just(Fault::Refuses),
        Just(Fault::RefusesAsBefore),
        Just(Fault::Babbles),
        Just(Fault::LosesAnswers),
    ];
    let outage = prop_oneof![
        Just(Outage::SecretsRefused),
        Just(Outage::AnswersLost),
        Just(Outage::SecretsHang),
        Just(Outage::Down),
    ];
    let event = prop_oneof![
        2 => (of.clone(), 0..4_u8).prop_map(|(t, n)| Audience(t, n)),
        1 => (of.clone(), 0..3_u8).prop_map(|(t, n)| Rename(t, n)),
        1 => (of.clone(), 0..3_u8).prop_map(|(t, n)| Label(t, n)),
        1 => (of.clone(), 0..3_u8).prop_map(|(t, n)| Template(t, n)),
        1 => (of.clone(), 0..3_u8).prop_map(|(t, n)| RenewBefore(t, n)),
        1 => (1..3_usize).prop_map(Entries),
        1 => any::<bool>().prop_map(Suspend),
        1 => (0..3_u8).prop_map(Ask),
        1 => (of.clone(), 0..3_u8).prop_map(|(t, n)| TokenEdited(t, n)),
        1 => of.clone().prop_map(RecordEdited),
        2 => (of.clone(), 0..3_u8).prop_map(|(t, n)| MetadataEdited(t, n)),
        2 => of.clone().prop_map(SecretDeleted),
        2 => (of, 0..9_usize).prop_map(|(t, n)| PutBack(t, n)),
        1 => (0..3_u8).prop_map(KeyReplaced),
        1 => any::<bool>().prop_map(KeyThere),
        1 => any::<bool>().prop_map(Allowed),
        3 => proptest::option::of(fault).prop_map(Server),
        3 => proptest::option::of(outage).prop_map(Cluster),
        1 => (-120..120_i64).prop_map(Clock),
        2 => (-1..2_i64).prop_map(|n| Date(10 * n)),
        1 => (-1..2_i64).prop_map(|n| OurClock(10 * n)),
        6 => (0..30_u32).prop_map(Time),
        4 => (0..150_u32).prop_map(Time),
        2 => Just(Restart),
    ];
    let times = prop_oneof![4 => Just(1_usize), 1 => 2..8_usize];
    let pause = prop_oneof![4 => Just(None), 1 => (0..3_000_u64).prop_map(Some)];
    proptest::collection::vec((event, times, pause), 1..60)
}

const YEAR: i64 = 365 * 24 * 3_600;

impl World {
    /// Changes a token of the spec, if the spec has so many.
    fn spec(&mut self, index: usize, change: impl FnOnce(&mut Value)) {
        lock(&self.shared).store.change_user(|user| {
            if let Some(token) = user["spec"]["tokens"].get_mut(index) {
                change(token);
            }
        });
    }

    /// Name of a token's Secret, if the spec has so many.
    fn secret(&self, index: usize) -> Option<String> {
        let tokens = lock(&self.shared).tokens();
        tokens.get(index).map(|token| token.secret.name.clone())
    }

    fn excuse(&mut self, index: usize) {
        lock(&self.shared).is_attacked(NAMES[index], true);
    }

    fn excuse_all(&mut self) {
        (0..NAMES.len()).for_each(|index| self.excuse(index));
    }

    pub fn happens(&mut self, event: Event) {
        lock(&self.shared).something_happens();
        match event {
            Event::Time(_) => {}
            Event::Restart => self.restart(),
            Event::Server(fault) => {
                let mut state = lock(&self.shared);
                state.zitadel.fault = fault;
                state.health_changes();
            }
            Event::Cluster(outage) => {
                let mut state = lock(&self.shared);
                state.store.outage = outage;
                state.health_changes();
            }
            Event::Clock(seconds) => {
                lock(&self.shared).set_server_clock(seconds);
                self.excuse_all();
            }
            // One at a time: two that are wrong alike agree.
            Event::Date(years) => {
                lock(&self.shared).date_ahead = SignedDuration::from_secs(years * YEAR);
                self.set_our_clock(0);
            }
            Event::OurClock(years) => {
                lock(&self.shared).date_ahead = SignedDuration::ZERO;
                self.set_our_clock(years * YEAR);
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
                self.excuse_all();
            }
            Event::KeyThere(there) => {
                let mut state = lock(&self.shared);
                let key_id = state.key_id.clone();
                if there && !state.key_is_there {
                    state.store.put_new(KEY_SECRET, &key_data(&key_id));
                } else if !there {
                    state.store.delete(KEY_SECRET);
                }
                state.key_is_there = there;
            }
            Event::Allowed(on) => {
                let mut state = lock(&self.shared);
                state.allowed = on;
                let ids: &[&str] = if on { &["1", "2"] } else { &["7"] };
                state
                    .store
                    .change_policy(|policy| policy["spec"]["audiences"]["projectIDs"] = json!(ids));
            }
            _ => {
                self.spec_changes(event);
                self.secret_changes(event);
            }
        }
    }

    fn spec_changes(&mut self, event: Event) {
        match event {
            Event::Audience(index, ids) => {
                let ids: &[&str] = [&["1"][..], &["2"], &["1", "2"], &["1", "3"]][usize::from(ids)];
                self.spec(index, |token| token["projectIDs"] = json!(ids));
                self.excuse(index);
            }
            Event::Rename(index, n) => {
                self.spec(index, |token| {
                    let name = format!("{}-{n}", token["name"].as_str().expect("a name"));
                    token["secret"]["name"] = name.into();
                });
                self.excuse(index);
            }
            Event::Label(index, n) => {
                let labels: Value = (0..n)
                    .map(|i| (format!("example.com/l{i}"), json!(n.to_string())))
                    .collect();
                self.spec(index, |token| token["secret"]["labels"] = labels);
            }
            Event::Template(index, n) => {
                let text = format!("{n} {{{{ token }}}}");
                let template: Value = (0..n).map(|i| (format!("t{i}"), json!(text))).collect();
                self.spec(index, |token| token["secret"]["template"] = template);
            }
            Event::RenewBefore(index, n) => {
                let seconds = lock(&self.shared).zitadel.lifetime.as_secs();
                let before = [None, Some(seconds / 2), Some(seconds * 2)][usize::from(n)];
                self.spec(index, |token| {
                    token["renewBefore"] = json!(before.map(|s| format!("{s}s")));
                });
            }
            Event::Entries(count) => {
                let whole = self.whole.clone();
                let mut had = 0;
                lock(&self.shared).store.change_user(|user| {
                    let tokens = user["spec"]["tokens"].as_array_mut().expect("tokens");
                    had = tokens.len();
                    tokens.truncate(count);
                    tokens.extend(whole[tokens.len()..count].iter().cloned());
                });
                (had..count).for_each(|index| self.excuse(index));
            }
            Event::Suspend(on) => {
                lock(&self.shared)
                    .store
                    .change_user(|user| user["spec"]["suspend"] = on.into());
            }
            Event::Ask(n) => {
                let ask = [None, Some("a"), Some("b")][usize::from(n)];
                lock(&self.shared).store.change_user(|user| {
                    user["metadata"]["annotations"] =
                        ask.map_or(json!({}), |ask| json!({ANNOTATION_RENEW_REQUEST: ask}));
                });
                self.excuse_all();
            }
            _ => {}
        }
    }

    fn secret_changes(&mut self, event: Event) {
        let (Event::TokenEdited(index, _)
        | Event::RecordEdited(index)
        | Event::MetadataEdited(index, _)
        | Event::SecretDeleted(index)
        | Event::PutBack(index, _)) = event
        else {
            return;
        };
        lock(&self.shared).is_attacked(NAMES[index], !matches!(event, Event::MetadataEdited(..)));
        let Some(name) = self.secret(index) else { return };
        let other = self.secret(1 - index);
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
                            let data = secret.object["data"].as_object_mut().expect("a map");
                            data.retain(|key, _| key == "token");
                        }
                        _ => secret.object["metadata"]["annotations"]["note"] = "x".into(),
                    });
            }
            Event::SecretDeleted(_) => drop(state.store.delete(&name)),
            Event::PutBack(_, n) => state.store.put_back(&name, n),
            _ => {}
        }
    }

    /// The process notices within a second that our clock was set.
    fn set_our_clock(&mut self, seconds: i64) {
        let changed = {
            let mut state = lock(&self.shared);
            state.health_changes();
            state.clocks_change();
            state.set_ours(seconds)
        };
        if changed {
            self.process.clock_jumped(Duration::from_millis(700));
        }
    }
}
