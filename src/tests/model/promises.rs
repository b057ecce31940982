//! What the product promises, judged by what ZITADEL and the API server see: their own books, and no record of the
//! operator's.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::kubernetes::{Edit, Outage, Stored};
use super::zitadel::Given;
use super::{ISSUER, State};
use crate::api::service_user::Token;
use crate::domain::schedule::duration;

/// A server or an API server that works again is noticed within this: the longest `Retry-After`, and its request.
const RECOVERY: Duration = Duration::from_mins(16);

/// A token that is forced again and again waits so long at most.
const CONTEST: Duration = Duration::from_mins(25);

/// Requests and writes take less, and clocks are known more exactly.
const SLACK: Duration = Duration::from_secs(4);

/// What is known of an entry of the spec, by its name.
#[derive(Clone, Default)]
pub struct Entry {
    /// The last token that was issued for it.
    last: Option<Given>,
    /// Another token may be requested before that one is due, since somebody did something.
    excused: bool,
    /// When somebody did something to it or its Secret.
    attacks: Vec<Duration>,
    /// Tokens before their time that no change of the inputs explains.
    quarrels: Vec<Duration>,
    /// Writes without a new token that undo an edit.
    repairs: Vec<Duration>,
    /// The server asked to wait.
    retry_after: Option<Duration>,
    /// As it was before the last token was issued.
    before: Option<Box<Entry>>,
}

fn within(times: &[Duration], now: Duration, window: Duration) -> usize {
    times.iter().filter(|at| **at + window > now).count()
}

fn audience(token: &Token) -> BTreeSet<String> {
    token.project_ids.iter().cloned().collect()
}

impl State {
    pub fn tokens(&self) -> Vec<Token> {
        serde_json::from_value(self.store.user["spec"]["tokens"].clone()).expect("tokens")
    }

    fn is_suspended(&self) -> bool {
        self.store.user["spec"]["suspend"] == true
    }

    fn is_refused(&self, token: &Token) -> bool {
        let allowed = |id: &String| self.allowed && (id == "1" || id == "2");
        self.is_suspended() || !self.key_is_there || !token.project_ids.iter().all(allowed)
    }

    pub fn is_faulty(&self) -> bool {
        self.zitadel.fault.is_some() || self.store.outage.is_some() || self.is_clock_off()
    }

    fn is_clock_off(&self) -> bool {
        !self.date_ahead.is_zero() || self.ours_ahead() != 0
    }

    /// The present pass has begun after all that happened, and knows of it.
    fn is_undisturbed(&self) -> bool {
        let delay = self.store.delays[0].max(self.store.delays[1]);
        self.pass_saw == self.events && self.pass_began >= self.last_event + delay
    }

    /// When a moment of the server's clock is or was, by the one that never steps.
    fn elapsed_at(&self, server: Timestamp) -> Duration {
        let ago = self.now().duration_since(server);
        let elapsed = SignedDuration::try_from(self.elapsed()).expect("short");
        Duration::try_from(elapsed - ago).unwrap_or_default()
    }

    /// When a refresh may come at the earliest, and when it must have come (docs/architecture.md, "The schedule").
    fn due(&self, token: &Token, given: &Given) -> (Duration, Duration) {
        let life = given.expires.duration_since(given.issued);
        let wanted = token.renew_before.as_deref().and_then(duration);
        let wanted = wanted.filter(|wanted| *wanted < life).unwrap_or(life / 3);
        let margin = wanted.max(life / 20).max(SignedDuration::from_secs(2));
        let earliest = given.issued + life / 5;
        let latest = (given.expires - margin).max(earliest);
        (
            self.elapsed_at((latest - life / 10).max(earliest))
                .saturating_sub(given.doubt),
            self.elapsed_at(latest) + given.doubt,
        )
    }

    /// The Secret of a token, and what was given of what is in it, if that is of the present inputs.
    fn present(&self, token: &Token) -> Option<(&Stored, &Given)> {
        let secret = self.store.secrets.get(&token.secret.name)?;
        let given = self.zitadel.given(&secret.token()?)?;
        (given.audience == audience(token) && given.key_id == self.key_id).then_some((secret, given))
    }

    /// Whether the token's Secret has what the spec wants around the token.
    fn is_complete(&self, token: &Token, secret: &Stored) -> bool {
        let value = secret.token().expect("a token");
        let metadata = &secret.object["metadata"];
        let has = |section: &str, (key, text): (&String, &String)| metadata[section][key] == **text;
        let rendered = |(key, text): (&String, &String)| secret.data(key) == Some(text.replace("{{ token }}", &value));
        let owner = &metadata["ownerReferences"][0];
        owner["uid"] == self.store.user["metadata"]["uid"]
            && owner["controller"] == true
            && token.secret.labels.iter().all(|label| has("labels", label))
            && token.secret.annotations.iter().all(|note| has("annotations", note))
            && token.secret.template.iter().all(rendered)
            && secret.data("issuer").as_deref() == Some(ISSUER)
    }

    fn is_valid(&self, given: &Given, slack: Duration) -> bool {
        self.elapsed_at(given.expires) + slack + self.unseen.max(given.doubt) > self.elapsed()
    }

    fn entry(&mut self, name: &str) -> &mut Entry {
        self.entries.entry(name.to_owned()).or_default()
    }

    /// Somebody does something to an entry or its Secret, which may make another token necessary.
    pub fn is_attacked(&mut self, name: &str, excused: bool) {
        let now = self.elapsed();
        let entry = self.entry(name);
        entry.excused |= excused;
        entry.attacks.push(now);
    }

    /// A token is requested.
    pub fn token_is_asked_for(&mut self, asked: &BTreeSet<String>) {
        if asked.contains("zitadel") || !self.is_undisturbed() {
            return;
        }
        let tokens = self.tokens().into_iter();
        let meant: Vec<Token> = tokens
            .filter(|token| audience(token) == *asked && !self.is_refused(token))
            .collect();
        let Some(first) = meant.first() else {
            let text = format!("{asked:?} is requested, and the spec asks for no such token, or may not have it");
            return self.violated(text);
        };
        let until = self.entry(&first.name).retry_after;
        if meant.len() == 1 && until.is_some_and(|until| self.elapsed() + Duration::from_secs(1) < until) {
            self.violated(format!("{} is requested before its Retry-After", first.name));
        }
    }

    /// The server asks for patience.
    pub fn is_to_wait(&mut self, asked: &BTreeSet<String>, seconds: u32) {
        let until = self.elapsed() + Duration::from_secs(seconds.min(900).into());
        let meant: Vec<Token> = self.tokens().into_iter().filter(|t| audience(t) == *asked).collect();
        if let [one] = &meant[..] {
            self.entry(&one.name).retry_after = Some(until);
        }
    }

    /// One token for each lifetime, and one more when somebody made it necessary.
    pub fn token_is_given(&mut self, given: Given) {
        let (now, undisturbed) = (self.elapsed(), self.is_undisturbed());
        let tokens = self.tokens().into_iter();
        let meant: Vec<Token> = tokens.filter(|token| audience(token) == given.audience).collect();
        if undisturbed && given.key_id != self.key_id {
            self.violated(format!("a token is requested with key {}", given.key_id));
        }
        let is_due = |state: &Self, token: &Token| {
            let last = state.entries.get(&token.name).and_then(|entry| entry.last.as_ref());
            let there = state.store.secrets.get(&token.secret.name).and_then(Stored::token);
            let there = there.and_then(|value| state.zitadel.given(&value));
            last.into_iter()
                .chain(there)
                .any(|given| state.due(token, given).0 <= now + SLACK.min(Duration::from_secs(2)))
        };
        let reason = |state: &Self, token: &Token| {
            let entry = state.entries.get(&token.name);
            let first = entry.is_none_or(|entry| entry.last.is_none());
            // What is certain goes first, should two entries have the same audience.
            match (is_due(state, token), first, entry.is_some_and(|entry| entry.excused)) {
                (true, _, _) => Some(0),
                (_, true, _) => Some(1),
                (_, _, true) => Some(2),
                _ => None,
            }
        };
        let justified = meant.iter().filter_map(|token| Some((reason(self, token)?, token)));
        let best = justified.min_by_key(|(reason, _)| *reason).map(|(_, token)| token);
        if undisturbed && best.is_none() {
            let last = meant
                .first()
                .and_then(|token| self.entries.get(&token.name)?.last.clone());
            self.violated(format!(
                "{given:?} is requested although nothing asks for it; the last is {last:?}"
            ));
        }
        let token = best.or(meant.first()).cloned();
        self.zitadel.given.push(given.clone());
        let Some(token) = token else { return };
        let due = is_due(self, &token);
        if due && undisturbed {
            self.check_not_late(&token);
        }
        let entry = self.entry(&token.name);
        entry.before = None;
        entry.before = Some(Box::new(entry.clone()));
        let same = |last: &Given| last.audience == given.audience && last.key_id == given.key_id;
        if !due && entry.last.as_ref().is_some_and(same) {
            entry.quarrels.push(now);
        }
        entry.last = Some(given);
        entry.excused &= !undisturbed;
        entry.retry_after = None;
        // The product does not know of the first quarrel after a restart that it is one.
        if within(&entry.quarrels, now, Duration::from_mins(10)) > 5 {
            let text = format!("{} is requested too often: {:?}", token.name, entry.quarrels);
            self.violated(text);
        }
    }

    /// A token that is good and in the Secret is refreshed when it is due, if nothing has happened for long.
    fn check_not_late(&mut self, token: &Token) {
        let Some((_, given)) = self.present(token) else { return };
        let (_, latest) = self.due(token, given);
        let calm = latest > self.last_event + self.grace() && latest > self.healthy_since + RECOVERY;
        if calm && !self.is_faulty() && !self.is_contested(token) && self.elapsed() > latest + SLACK {
            self.violated(format!("{} is refreshed late: it was due at {latest:?}", token.name));
        }
    }

    /// A token was issued, and nobody will know it.
    pub fn answer_is_lost(&mut self, asked: &BTreeSet<String>) {
        for token in self.tokens() {
            let entry = self.entry(&token.name);
            let lost = entry.last.as_ref().is_some_and(|last| last.audience == *asked);
            if lost && let Some(before) = entry.before.take() {
                *entry = *before;
            }
        }
    }

    pub fn secret_was_written(&mut self, name: &str, repairs: bool) {
        let now = self.elapsed();
        let value = self.store.secrets[name].token().unwrap_or_default();
        let Some(given) = self.zitadel.given(&value).cloned() else {
            return self.violated(format!("Secret {name} gets a token that was never issued"));
        };
        let Some(token) = self.tokens().into_iter().find(|token| token.secret.name == name) else {
            return;
        };
        if self.is_undisturbed() && given.audience != audience(&token) {
            self.violated(format!("Secret {name} gets a token for {:?}", given.audience));
        }
        let entry = self.entry(&token.name);
        let is_last = |entry: &Entry| entry.last.as_ref().is_some_and(|last| last.value == value);
        if repairs {
            entry.repairs.push(now);
            let fights = [&entry.quarrels[..], &entry.repairs].concat();
            if within(&fights, now, Duration::from_mins(10)) > 5 {
                self.violated(format!("{name} is fought over: {fights:?}"));
            }
        }
        // Of two entries with one audience the other was taken for the one that asked.
        for (other, entry) in &mut self.entries {
            if *other != token.name
                && is_last(entry)
                && let Some(before) = entry.before.take()
            {
                *entry = *before;
            }
        }
        let entry = self.entry(&token.name);
        if !is_last(entry) {
            entry.last = Some(given);
        }
    }

    /// A Secret that is of use to an entry of the spec goes only when the entry has something as good.
    pub fn secret_was_deleted(&mut self, gone: &Stored) {
        if !self.is_undisturbed() {
            return;
        }
        let name = gone.object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let tokens = self.tokens();
        if tokens.iter().any(|token| token.secret.name == name) {
            self.violated(format!("Secret {name} is deleted, and the spec names it"));
        }
        let given = gone.token().filter(|_| gone.edit != Some(Edit::Token));
        let given = given.and_then(|value| self.zitadel.given(&value).cloned());
        let Some(given) = given.filter(|given| self.elapsed_at(given.expires) > self.elapsed() + SLACK) else {
            return;
        };
        for token in tokens {
            if !self.store.secrets.contains_key(&token.secret.name) {
                self.violated(format!("a valid token goes before {} has a Secret", token.name));
            }
            let wanted = given.audience == audience(&token) && given.key_id == self.key_id && !self.is_refused(&token);
            let alive = self
                .present(&token)
                .is_some_and(|(_, given)| self.is_valid(given, SLACK));
            if wanted && !alive {
                self.violated(format!("the last valid token of {} goes", token.name));
            }
        }
    }

    /// The process ends, and with it what it remembers.
    pub fn process_ends(&mut self) {
        let tokens = self.tokens();
        for (name, entry) in &mut self.entries {
            let secret = tokens.iter().find(|token| token.name == *name);
            let secret = secret.and_then(|token| self.store.secrets.get(&token.secret.name));
            let written = entry.last.as_ref().map(|last| &last.value) == secret.and_then(Stored::token).as_ref();
            entry.excused |= !written;
            entry.quarrels.clear();
            entry.repairs.clear();
            entry.retry_after = None;
        }
    }

    pub fn clocks_change(&mut self) {
        for entry in self.entries.values_mut() {
            entry.retry_after = None;
        }
    }

    fn is_contested(&self, token: &Token) -> bool {
        let told = self.told(token) == "SecretContested";
        let entry = self.entries.get(&token.name);
        let attacks = entry.map_or(0, |entry| within(&entry.attacks, self.elapsed(), CONTEST));
        told && attacks >= 3
    }

    /// The reason that the status gives for a token.
    fn told(&self, token: &Token) -> &str {
        let told = self.store.user["status"]["tokens"].as_array();
        let told = told.and_then(|all| all.iter().find(|told| told["name"] == *token.name));
        told.and_then(|told| told["reason"].as_str()).unwrap_or_default()
    }

    pub fn condition(&self, kind: &str) -> Value {
        let all = self.store.user["status"]["conditions"].as_array();
        let condition = all.and_then(|all| all.iter().find(|condition| condition["type"] == kind));
        condition.cloned().unwrap_or_default()
    }

    /// Whether every token is fresh and said to be so.
    pub fn is_all_good(&self) -> bool {
        let good = |token: &Token| {
            self.told(token) == "Issued"
                && self
                    .present(token)
                    .is_some_and(|(_, given)| self.is_valid(given, Duration::ZERO))
        };
        let ready = self.condition("Ready");
        ready["status"] == "True" && ready["reason"] == "Issued" && self.tokens().iter().all(good)
    }

    /// How long after an event everything has settled: changes in a loop are limited to one a second.
    pub fn grace(&self) -> Duration {
        let many = within(&self.lately, self.elapsed(), Duration::from_mins(1)).saturating_sub(10);
        let delay = self.store.delays[0].max(self.store.delays[1]);
        Duration::from_secs(15 + 2 * many as u64) + delay
    }

    pub fn is_calm(&self) -> bool {
        self.elapsed() >= self.last_event + self.grace()
    }

    /// What holds while nothing happens.
    pub fn check(&mut self) {
        let faulty = self.is_faulty();
        let recovering = faulty || self.elapsed() < self.healthy_since + RECOVERY;
        let (mut all_valid, mut all_good) = (true, true);
        for token in self.tokens() {
            let present = self.present(&token);
            let complete = present.is_some_and(|(secret, _)| self.is_complete(&token, secret));
            let given = present.map(|(_, given)| given.clone());
            let valid = given.as_ref().is_some_and(|given| self.is_valid(given, SLACK));
            let (told, name) = (self.told(&token).to_owned(), &token.name);
            let refused = self.is_refused(&token);
            let good = valid && complete;
            all_valid &= valid && !refused;
            // A record that was edited vouches for nothing, though the token may be good.
            let unedited = self
                .store
                .secrets
                .get(&token.secret.name)
                .is_some_and(|secret| secret.edit != Some(Edit::Token));
            all_good &= good && unedited && !refused;
            let is_told = self.store.outage != Some(Outage::Down) && !self.is_clock_off();
            if told == "Issued" && is_told && (!good || refused) {
                self.violated(format!("{name} is told as issued, and is not"));
            }
            if told == "KeyExpired" && self.ours_ahead() == 0 {
                self.violated("a wrong `Date` ends a key");
            }
            let throttled = told == "RequestsThrottled" && self.zitadel.given.len() > 40;
            if refused || faulty || throttled || self.is_contested(&token) {
                continue;
            }
            if !good && !recovering {
                self.violated(format!("{name} is not good while nothing fails: {told}"));
            }
            if let Some(given) = given {
                let ends = self.elapsed_at(given.expires);
                if !valid && ends > self.healthy_since + SLACK + self.clock_patience {
                    self.violated(format!(
                        "{name} expired at {ends:?} though nothing fails since {:?}",
                        self.healthy_since
                    ));
                }
                if valid {
                    self.check_not_late(&token);
                }
            }
            if good {
                self.entry(&token.name).excused = false;
            }
        }
        self.check_ready(all_valid, all_good);
        let most = 100 + self.elapsed().saturating_sub(self.last_event).as_secs() / 30;
        if faulty && self.requests_since_event as u64 > most {
            self.violated(format!(
                "{} token requests while all of them fail",
                self.requests_since_event
            ));
        }
    }

    fn check_ready(&mut self, all_valid: bool, all_good: bool) {
        if self.store.outage == Some(Outage::Down) || self.is_clock_off() {
            return;
        }
        let ready = self.condition("Ready");
        let is_ready = ready["status"] == "True";
        if self.is_suspended() {
            // Nothing is judged anew: what is there is told as it was.
            let alive = |token: &Token| {
                let value = self.store.secrets.get(&token.secret.name).and_then(Stored::token);
                let given = value.and_then(|value| self.zitadel.given(&value));
                given.is_some_and(|given| self.is_valid(given, SLACK))
            };
            if is_ready && !self.tokens().iter().all(alive) {
                self.violated("suspended and Ready, but expired");
            }
            return;
        }
        if is_ready && !all_valid {
            self.violated(format!("Ready, but {}", self.store.user["status"]["tokens"]));
        }
        if !is_ready && all_good && !self.is_faulty() {
            self.violated(format!("all is good, and Ready is {ready}"));
        }
    }
}
