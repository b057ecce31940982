//! What happens in a simulation, and how often.

use k8s_openapi::jiff::SignedDuration;
use proptest::prelude::*;
use secrecy::ExposeSecret;

use super::{NAMES, World, copy};
use crate::api::metadata::ANNOTATION_RECORD;
use crate::api::service_user::Token;
use crate::domain::fixtures::{self, ask, edit, user};
use crate::domain::observed_secret::ObservedSecret;
use crate::domain::reason::Reason;

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
    /// Mints fail, for now or for good.
    MintsFail(Option<bool>),
    WritesFail(bool),
    /// The estimate of the server's clock changes, in seconds.
    Clock(i64),
    /// The server's `Date` is so many years ahead of its clock.
    Date(i64),
    /// Our own clock is set so many years ahead.
    OurClock(i64),
    /// Percent of a lifetime pass.
    Time(u32),
    Restart,
}

/// Events, how often each comes in a row, and whether there is a pass after each.
pub fn events() -> impl Strategy<Value = Vec<(Event, usize, bool)>> {
    use Event::{
        Allowed, Ask, Audience, Clock, Date, Entries, KeyReplaced, KeyThere, Label, MetadataEdited, MintsFail,
        OurClock, PutBack, RecordEdited, Rename, RenewBefore, Restart, SecretDeleted, Suspend, Template, Time,
        TokenEdited, WritesFail,
    };
    let of = 0..2_usize;
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
        3 => proptest::option::of(any::<bool>()).prop_map(MintsFail),
        3 => any::<bool>().prop_map(WritesFail),
        1 => (-120..120_i64).prop_map(Clock),
        2 => (-1..2_i64).prop_map(|n| Date(10 * n)),
        1 => (-1..2_i64).prop_map(|n| OurClock(10 * n)),
        6 => (0..30_u32).prop_map(Time),
        4 => (0..150_u32).prop_map(Time),
        2 => Just(Restart),
    ];
    let times = prop_oneof![4 => Just(1_usize), 1 => 2..8_usize];
    proptest::collection::vec((event, times, prop::bool::weighted(0.8)), 1..60)
}

impl World {
    /// A token of the spec by number, if the spec has so many.
    fn spec(&mut self, index: usize) -> Option<&mut Token> {
        let spec = user(&mut self.facts);
        spec.metadata.generation = spec.metadata.generation.map(|generation| generation + 1);
        spec.spec.tokens.get_mut(index)
    }

    /// A token's Secret, if both are there.
    fn secret(&mut self, index: usize) -> Option<&mut ObservedSecret> {
        let name = &self.facts.user.spec.tokens.get(index)?.secret.name;
        let secret = self.secrets.get_mut(name)?;
        secret.resource_version.push('x');
        Some(secret)
    }

    fn excuse(&mut self, index: usize) {
        self.excuses.extend(NAMES.get(index).map(ToString::to_string));
    }

    pub fn happens(&mut self, event: Event) {
        match event {
            Event::KeyReplaced(n) => {
                self.key_id = format!("k{n}");
                (0..2).for_each(|index| self.excuse(index));
            }
            Event::KeyThere(there) => self.key_is_there = there,
            Event::Allowed(on) => {
                let ids: &[&str] = if on { &["1", "2"] } else { &[] };
                self.facts.allowed_audiences = Ok(fixtures::allowed(ids, false));
            }
            Event::MintsFail(how) => {
                self.mints_fail = how.map(|for_good| {
                    if for_good {
                        Reason::KeyRejected
                    } else {
                        Reason::ServerError
                    }
                });
                self.healthy_since = self.now;
                return;
            }
            Event::WritesFail(on) => {
                self.writes_fail = on;
                self.healthy_since = self.now;
                return;
            }
            Event::Clock(seconds) => {
                self.now += SignedDuration::from_secs(seconds);
                self.healthy_since = self.now;
            }
            // One at a time: two that are wrong alike agree.
            Event::Date(years) => {
                self.date_ahead = SignedDuration::from_hours(years * 365 * 24);
                self.ours_ahead = SignedDuration::ZERO;
                self.healthy_since = self.now;
            }
            Event::OurClock(years) => {
                self.ours_ahead = SignedDuration::from_hours(years * 365 * 24);
                self.date_ahead = SignedDuration::ZERO;
                self.skew = self.skew.unproven();
                self.healthy_since = self.now;
            }
            Event::Time(_) => {}
            Event::Restart => {
                self.excuses.extend(self.facts.unwritten.keys().cloned());
                self.facts.unwritten.clear();
                self.facts.last_mints.clear();
                self.unscheduled.clear();
                self.quarrels.clear();
            }
            _ => {
                self.spec_changes(event);
                self.secret_changes(event);
            }
        }
        // What the watches see wakes the object, and a change begins the back-off anew.
        self.backoffs.clear();
        self.dirty = true;
    }

    fn spec_changes(&mut self, event: Event) {
        match event {
            Event::Audience(index, ids) => {
                let ids: &[&str] = [&["1"][..], &["2"], &["1", "2"], &["1", "3"]][usize::from(ids)];
                if let Some(token) = self.spec(index) {
                    token.project_ids = ids.iter().map(ToString::to_string).collect();
                }
                self.excuse(index);
            }
            Event::Rename(index, n) => {
                if let Some(token) = self.spec(index) {
                    token.secret.name = format!("{}-{n}", token.name);
                }
                self.excuse(index);
            }
            Event::Label(index, n) => {
                if let Some(token) = self.spec(index) {
                    token.secret.labels = (0..n).map(|i| (format!("example.com/l{i}"), n.to_string())).collect();
                }
            }
            Event::Template(index, n) => {
                if let Some(token) = self.spec(index) {
                    token.secret.template = (0..n)
                        .map(|i| (format!("t{i}"), format!("{n} {{{{ token }}}}")))
                        .collect();
                }
            }
            Event::RenewBefore(index, n) => {
                let seconds = self.lifetime.as_secs();
                if let Some(token) = self.spec(index) {
                    token.renew_before =
                        [None, Some(seconds / 2), Some(seconds * 2)][usize::from(n)].map(|s| format!("{s}s"));
                }
            }
            Event::Entries(count) => {
                let whole = fixtures::facts(&NAMES);
                self.spec(0);
                let tokens = &mut user(&mut self.facts).spec.tokens;
                let had = tokens.len();
                tokens.truncate(count);
                tokens.extend(whole.user.spec.tokens[tokens.len()..count].iter().cloned());
                (had..count).for_each(|index| self.excuse(index));
            }
            Event::Suspend(on) => {
                self.spec(0);
                user(&mut self.facts).spec.suspend = Some(on);
            }
            Event::Ask(n) => {
                ask(&mut self.facts, [None, Some("a"), Some("b")][usize::from(n)]);
                (0..2).for_each(|index| self.excuse(index));
            }
            _ => {}
        }
    }

    fn secret_changes(&mut self, event: Event) {
        match event {
            Event::TokenEdited(index, n) => {
                let other = self.secret(1 - index).and_then(|s| s.token().map(str::to_owned));
                if let Some(secret) = self.secret(index) {
                    edit(secret, |data| match (n, other) {
                        (0, _) => drop(data.remove("token")),
                        (1, Some(other)) => drop(data.insert("token".into(), other.into())),
                        _ => drop(data.insert("token".into(), b"x".into())),
                    });
                }
                self.excuse(index);
            }
            Event::RecordEdited(index) => {
                if let Some(record) = self
                    .secret(index)
                    .and_then(|s| s.annotations.get_mut(ANNOTATION_RECORD))
                {
                    let edited = record
                        .expose_secret()
                        .replace("\"expiresAt\":\"20", "\"expiresAt\":\"21");
                    *record = edited.into();
                }
                self.excuse(index);
            }
            Event::MetadataEdited(index, n) => {
                if let Some(secret) = self.secret(index) {
                    match n {
                        0 => secret.labels.clear(),
                        1 => edit(secret, |data| data.retain(|key, _| key == "token")),
                        _ => drop(secret.annotations.insert("note".into(), "x".into())),
                    }
                }
            }
            Event::SecretDeleted(index) => {
                if let Some(token) = self.facts.user.spec.tokens.get(index) {
                    self.secrets.remove(&token.secret.name);
                }
                self.excuse(index);
            }
            Event::PutBack(index, n) => {
                let name = self.facts.user.spec.tokens.get(index).map(|t| t.secret.name.clone());
                let earlier = self.backups.iter().filter(|(of, _)| Some(of) == name.as_ref());
                let earlier = earlier
                    .take(n + 1)
                    .last()
                    .map(|(of, secret)| (of.clone(), copy(secret)));
                self.secrets.extend(earlier);
                // Under a new version, as any write.
                self.secret(index);
                self.excuse(index);
            }
            _ => {}
        }
    }
}
