//! The invariants of the operator. The checks use only the history of the fake ZITADEL and the objects of the fake API
//! server. They do not use the record that the operator keeps in a Secret.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::kubernetes::{Edit, Outage, StoredSecret};
use super::zitadel::IssuedToken;
use super::{ISSUER, State};
use crate::api::service_user::Token;
use crate::domain::schedule::duration;

/// The operator detects within this time that ZITADEL or the API server works again: the longest `Retry-After` plus the
/// request itself.
const RECOVERY: Duration = Duration::from_mins(16);

/// The longest wait after repeated unscheduled refreshes of one token.
const CONFLICT_BACKOFF: Duration = Duration::from_mins(25);

/// Upper bound of the duration of a request or write, and of the error of the estimated clock.
const SLACK: Duration = Duration::from_secs(4);

/// The history of a token of the spec.
#[derive(Clone, Default)]
pub struct Entry {
    /// The last token issued for it.
    last: Option<IssuedToken>,
    /// An event may require a new token before `last` is due.
    expected: bool,
    /// Times of the edits of this entry or its Secret.
    edits: Vec<Duration>,
    /// Times of early token requests with unchanged audience and key.
    conflicts: Vec<Duration>,
    /// Times of the writes that revert an edit without a new token.
    repairs: Vec<Duration>,
    /// End of the `Retry-After` that ZITADEL sent.
    retry_after: Option<Duration>,
    /// This entry before the last token was issued.
    previous: Option<Box<Entry>>,
}

impl Entry {
    /// Undoes the record of the last token. What happened since then stays.
    fn undo(&mut self) {
        let Some(previous) = self.previous.take() else { return };
        self.last = previous.last;
        self.conflicts.truncate(previous.conflicts.len());
        self.expected |= previous.expected;
        self.retry_after = self.retry_after.or(previous.retry_after);
    }
}

fn within(times: &[Duration], now: Duration, window: Duration) -> usize {
    times.iter().filter(|at| **at + window > now).count()
}

fn audience(token: &Token) -> BTreeSet<String> {
    token.project_ids.iter().cloned().collect()
}

impl State {
    pub fn tokens(&self) -> Vec<Token> {
        serde_json::from_value(self.store.user["spec"]["tokens"].clone()).expect("valid tokens")
    }

    fn tokens_with_audience(&self, projects: &BTreeSet<String>) -> Vec<Token> {
        let tokens = self.tokens().into_iter();
        tokens.filter(|token| audience(token) == *projects).collect()
    }

    fn is_suspended(&self) -> bool {
        self.store.user["spec"]["suspend"] == true
    }

    fn is_denied(&self, token: &Token) -> bool {
        let allowed = |id: &String| self.allowed && (id == "1" || id == "2");
        self.is_suspended() || !self.key_exists || !token.project_ids.iter().all(allowed)
    }

    pub fn is_faulty(&self) -> bool {
        self.zitadel.fault.is_some() || self.store.outage.is_some() || self.is_clock_off()
    }

    /// Whether ZITADEL's `Date` header or the operator's clock is wrong.
    pub fn is_clock_off(&self) -> bool {
        !self.date_ahead.is_zero() || self.local_ahead() != 0
    }

    /// Whether the current reconcile started after the watches delivered all events.
    fn is_undisturbed(&self) -> bool {
        self.events_at_reconcile == self.events && self.reconcile_began >= self.last_event + self.store.longest_delay()
    }

    /// Converts a time of ZITADEL's clock to the monotonic clock of the test.
    fn elapsed_at(&self, server: Timestamp) -> Duration {
        let ago = self.now().duration_since(server);
        let elapsed = SignedDuration::try_from(self.elapsed()).expect("the test is short");
        Duration::try_from(elapsed - ago).unwrap_or_default()
    }

    /// Returns the earliest and the latest time of a refresh (docs/architecture.md, "The schedule").
    fn due(&self, token: &Token, issued: &IssuedToken) -> (Duration, Duration) {
        let life = issued.expires_at.duration_since(issued.issued_at);
        let wanted = token.renew_before.as_deref().and_then(duration);
        let wanted = wanted.filter(|wanted| *wanted < life).unwrap_or(life / 3);
        let margin = wanted.max(life / 20).max(SignedDuration::from_secs(2));
        let earliest = issued.issued_at + life / 5;
        let latest = (issued.expires_at - margin).max(earliest);
        (
            self.elapsed_at((latest - life / 10).max(earliest))
                .saturating_sub(issued.clock_uncertainty),
            self.elapsed_at(latest) + issued.clock_uncertainty,
        )
    }

    /// Returns the issued token in the Secret of a token.
    fn stored_token(&self, token: &Token) -> Option<&IssuedToken> {
        let secret = self.store.secrets.get(&token.secret.name)?;
        self.zitadel.find(&secret.token()?)
    }

    /// Returns the Secret of a token and the issued token in it, if that has the audience and key of the spec.
    fn current_token(&self, token: &Token) -> Option<(&StoredSecret, &IssuedToken)> {
        let secret = self.store.secrets.get(&token.secret.name)?;
        let issued = self.stored_token(token)?;
        (issued.audience == audience(token) && issued.key_id == self.key_id).then_some((secret, issued))
    }

    /// Whether the Secret has the metadata, template and owner that the spec requires.
    fn is_complete(&self, token: &Token, secret: &StoredSecret) -> bool {
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

    /// Whether a token is valid. Tolerates `slack`, and the operator's error about ZITADEL's clock, after the expiry.
    fn is_valid(&self, issued: &IssuedToken, slack: Duration) -> bool {
        self.elapsed_at(issued.expires_at) + slack + self.undetected_clock_step.max(issued.clock_uncertainty)
            > self.elapsed()
    }

    /// Whether a token is valid, and the operator must know that.
    fn is_fresh(&self, issued: &IssuedToken) -> bool {
        let error = self.undetected_clock_step.max(issued.clock_uncertainty);
        self.elapsed_at(issued.expires_at) > self.elapsed() + SLACK + error
    }

    fn entry(&mut self, name: &str) -> &mut Entry {
        self.entries.entry(name.to_owned()).or_default()
    }

    /// Records an edit of an entry or its Secret. `expected`: the edit may require a new token.
    pub fn entry_edited(&mut self, name: &str, expected: bool) {
        let now = self.elapsed();
        let entry = self.entry(name);
        entry.expected |= expected;
        entry.edits.push(now);
    }

    /// Checks a token request.
    pub fn on_token_requested(&mut self, requested: &BTreeSet<String>) {
        if requested.contains("zitadel") || !self.is_undisturbed() {
            return;
        }
        let mut candidates = self.tokens_with_audience(requested);
        candidates.retain(|token| !self.is_denied(token));
        let Some(first) = candidates.first() else {
            let text = format!(
                "a token for {requested:?} is requested, but the spec does not contain it or it is not allowed"
            );
            return self.violation(text);
        };
        let until = self.entry(&first.name).retry_after;
        if candidates.len() == 1 && until.is_some_and(|until| self.elapsed() + Duration::from_secs(1) < until) {
            self.violation(format!("{} is requested before the end of its Retry-After", first.name));
        }
    }

    /// Records a `Retry-After`.
    pub fn on_throttled(&mut self, requested: &BTreeSet<String>, seconds: u32) {
        let until = self.elapsed() + Duration::from_secs(seconds.min(900).into());
        self.throttled_until = self.throttled_until.max(until);
        // A request by an earlier spec may have been for another token.
        if self.is_undisturbed()
            && let [one] = &self.tokens_with_audience(requested)[..]
        {
            self.entry(&one.name).retry_after = Some(until);
        }
    }

    /// Records an issued token. Checks that the operator requests one token per lifetime, and more only if an event
    /// requires it.
    pub fn on_token_issued(&mut self, issued: IssuedToken) {
        let (now, undisturbed) = (self.elapsed(), self.is_undisturbed());
        let candidates = self.tokens_with_audience(&issued.audience);
        if undisturbed && issued.key_id != self.key_id {
            self.violation(format!("a token is requested with the old key {}", issued.key_id));
        }
        // The operator goes by its estimate of the server's clock, which is wrong while a step is undetected.
        let clock_step = self.undetected_clock_step.max(self.clock_step_at_reconcile);
        let latest = now + SLACK.min(Duration::from_secs(2)) + clock_step;
        let is_due = |state: &Self, token: &Token| {
            let last = state.entries.get(&token.name).and_then(|entry| entry.last.as_ref());
            last.into_iter()
                .chain(state.stored_token(token))
                .any(|issued| state.due(token, issued).0 <= latest)
        };
        // Lower is more certain. This matters if two entries have the same audience.
        let reason = |state: &Self, token: &Token| {
            let entry = state.entries.get(&token.name);
            let first = entry.is_none_or(|entry| entry.last.is_none());
            match (is_due(state, token), first, entry.is_some_and(|entry| entry.expected)) {
                (true, _, _) => Some(0),
                (_, true, _) => Some(1),
                (_, _, true) => Some(2),
                _ => None,
            }
        };
        let justified = candidates
            .iter()
            .filter_map(|token| Some((reason(self, token)?, token)));
        let best = justified.min_by_key(|(reason, _)| *reason).map(|(_, token)| token);
        if undisturbed && best.is_none() {
            let last = candidates
                .first()
                .and_then(|token| self.entries.get(&token.name)?.last.clone());
            self.violation(format!(
                "{issued:?} is requested without a reason; the last token is {last:?}"
            ));
        }
        let token = best.or(candidates.first()).cloned();
        self.zitadel.issued.push(issued.clone());
        let Some(token) = token else { return };
        let due = is_due(self, &token);
        if due && undisturbed {
            self.check_refreshed_in_time(&token);
        }
        // With a wrong `Date`, the operator cannot tell whether the token is valid, and drops it.
        let served = undisturbed && !self.is_clock_off();
        let entry = self.entry(&token.name);
        // Keeps one previous state only.
        entry.previous = None;
        entry.previous = Some(Box::new(entry.clone()));
        let same = |last: &IssuedToken| last.audience == issued.audience && last.key_id == issued.key_id;
        if !due && entry.last.as_ref().is_some_and(same) {
            entry.conflicts.push(now);
        }
        entry.last = Some(issued);
        entry.expected &= !served;
        entry.retry_after = None;
        // After a restart the operator cannot recognize the first conflict.
        if within(&entry.conflicts, now, Duration::from_mins(10)) > 5 {
            let text = format!(
                "{} is requested too often in a conflict: {:?}",
                token.name, entry.conflicts
            );
            self.violation(text);
        }
    }

    /// Checks that the operator refreshes a current token in time, if the last event is long enough ago.
    fn check_refreshed_in_time(&mut self, token: &Token) {
        let Some((_, issued)) = self.current_token(token) else {
            return;
        };
        let (_, latest) = self.due(token, issued);
        let stable = latest > self.last_event + self.grace() && latest > self.healthy_since + RECOVERY;
        if stable && !self.is_faulty() && !self.is_contested(token) && self.elapsed() > latest + SLACK {
            self.violation(format!("{} is refreshed late; it was due at {latest:?}", token.name));
        }
    }

    /// Undoes the record of an issued token that the operator never received.
    pub fn on_response_lost(&mut self, requested: &BTreeSet<String>) {
        for token in self.tokens() {
            let entry = self.entry(&token.name);
            let lost = entry.last.as_ref().is_some_and(|last| last.audience == *requested);
            if lost {
                entry.undo();
            }
        }
    }

    /// Checks a write of a token Secret. `repairs`: the write reverts an edit and keeps the token.
    pub fn on_secret_written(&mut self, name: &str, repairs: bool) {
        let now = self.elapsed();
        let value = self.store.secrets[name].token().unwrap_or_default();
        let Some(issued) = self.zitadel.find(&value).cloned() else {
            return self.violation(format!(
                "the operator wrote a token to Secret {name} that ZITADEL never issued"
            ));
        };
        let Some(token) = self.tokens().into_iter().find(|token| token.secret.name == name) else {
            return;
        };
        if self.is_undisturbed() && issued.audience != audience(&token) {
            self.violation(format!(
                "the operator wrote a token with the wrong audience {:?} to Secret {name}",
                issued.audience
            ));
        }
        let response_is_lost = self.store.outage == Some(Outage::SecretResponseLost);
        let entry = self.entry(&token.name);
        let is_last = |entry: &Entry| entry.last.as_ref().is_some_and(|last| last.value == value);
        // The operator does not know that it repaired a Secret if the response is lost.
        if repairs && !response_is_lost {
            entry.repairs.push(now);
            let conflicts = [&entry.conflicts[..], &entry.repairs].concat();
            if within(&conflicts, now, Duration::from_mins(10)) > 5 {
                self.violation(format!(
                    "the operator writes Secret {name} too often in a conflict: {conflicts:?}"
                ));
            }
        }
        // If two entries have the same audience, `on_token_issued` may have recorded the token for the other one.
        for (other, entry) in &mut self.entries {
            if *other != token.name && is_last(entry) {
                entry.undo();
            }
        }
        let entry = self.entry(&token.name);
        if !is_last(entry) {
            entry.last = Some(issued);
        }
    }

    /// Checks that the operator deletes a usable token only after each entry of the spec has a valid one.
    pub fn on_secret_deleted(&mut self, deleted: &StoredSecret) {
        if !self.is_undisturbed() {
            return;
        }
        let name = deleted.object["metadata"]["name"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let tokens = self.tokens();
        if tokens.iter().any(|token| token.secret.name == name) {
            self.violation(format!("the operator deleted Secret {name}, which the spec names"));
        }
        let issued = deleted.token().filter(|_| deleted.edit != Some(Edit::Token));
        let issued = issued.and_then(|value| self.zitadel.find(&value).cloned());
        let Some(issued) = issued.filter(|issued| self.is_fresh(issued)) else {
            return;
        };
        for token in tokens {
            if !self.store.secrets.contains_key(&token.secret.name) {
                self.violation(format!(
                    "the operator deleted a valid token before {} has a Secret",
                    token.name
                ));
            }
            let wanted = issued.audience == audience(&token) && issued.key_id == self.key_id && !self.is_denied(&token);
            let valid = self
                .current_token(&token)
                .is_some_and(|(_, issued)| self.is_valid(issued, SLACK));
            if wanted && !valid {
                self.violation(format!("the operator deleted the last valid token of {}", token.name));
            }
        }
    }

    /// Clears the history that the operator loses at a restart. A token that it did not write is lost, so the checks
    /// expect another one. How far ZITADEL's clock is ahead is lost too.
    pub fn on_process_stopped(&mut self) {
        self.undetected_clock_step += self.server_ahead.unsigned_abs();
        self.dates_sent = 0;
        let tokens = self.tokens();
        for (name, entry) in &mut self.entries {
            let secret = tokens.iter().find(|token| token.name == *name);
            let secret = secret.and_then(|token| self.store.secrets.get(&token.secret.name));
            let written = entry.last.as_ref().map(|last| &last.value) == secret.and_then(StoredSecret::token).as_ref();
            entry.expected |= !written;
            entry.conflicts.clear();
            entry.repairs.clear();
            entry.retry_after = None;
        }
    }

    /// Discards the `Retry-After` deadlines at a clock step.
    pub fn clear_retry_after(&mut self) {
        for entry in self.entries.values_mut() {
            entry.retry_after = None;
        }
    }

    fn is_contested(&self, token: &Token) -> bool {
        let reported = self.reported_reason(token) == "SecretContested";
        let entry = self.entries.get(&token.name);
        let edits = entry.map_or(0, |entry| within(&entry.edits, self.elapsed(), CONFLICT_BACKOFF));
        reported && edits >= 3
    }

    /// Returns the reason of a token in the status.
    fn reported_reason(&self, token: &Token) -> &str {
        let all = self.store.user["status"]["tokens"].as_array();
        let status = all.and_then(|all| all.iter().find(|status| status["name"] == *token.name));
        status.and_then(|status| status["reason"].as_str()).unwrap_or_default()
    }

    fn ready_condition(&self) -> Value {
        let all = self.store.user["status"]["conditions"].as_array();
        let condition = all.and_then(|all| all.iter().find(|condition| condition["type"] == "Ready"));
        condition.cloned().unwrap_or_default()
    }

    /// Whether every token is valid and reported as issued, and the service user is ready.
    pub fn all_recovered(&self) -> bool {
        let good = |token: &Token| {
            self.reported_reason(token) == "Issued"
                && self
                    .current_token(token)
                    .is_some_and(|(_, issued)| self.is_valid(issued, Duration::ZERO))
        };
        let ready = self.ready_condition();
        ready["status"] == "True" && ready["reason"] == "Issued" && self.tokens().iter().all(good)
    }

    /// How long after an event the operator has settled. The operator limits repeated changes to one per second.
    pub fn grace(&self) -> Duration {
        let excess = within(&self.recent_events, self.elapsed(), Duration::from_mins(1)).saturating_sub(10);
        Duration::from_secs(15 + 2 * excess as u64) + self.store.longest_delay()
    }

    pub fn is_settled(&self) -> bool {
        self.elapsed() >= self.last_event + self.grace()
    }

    /// Checks the invariants that hold once the operator has settled.
    pub fn check(&mut self) {
        let faulty = self.is_faulty();
        let recovering = faulty || self.elapsed() < self.healthy_since + RECOVERY;
        let (mut all_valid, mut all_good) = (true, true);
        for token in self.tokens() {
            let current = self.current_token(&token);
            let complete = current.is_some_and(|(secret, _)| self.is_complete(&token, secret));
            let issued = current.map(|(_, issued)| issued.clone());
            let valid = issued.as_ref().is_some_and(|issued| self.is_valid(issued, SLACK));
            let (reported, name) = (self.reported_reason(&token).to_owned(), &token.name);
            let denied = self.is_denied(&token);
            let good = valid && complete;
            // The operator may find a token expired before the tolerance has passed.
            let fresh = issued.as_ref().is_some_and(|issued| self.is_fresh(issued));
            all_valid &= valid && !denied;
            // The operator does not trust an edited record, even if the token is valid.
            let unedited = self
                .store
                .secrets
                .get(&token.secret.name)
                .is_some_and(|secret| secret.edit != Some(Edit::Token));
            all_good &= good && fresh && unedited && !denied;
            let status_is_written = self.store.outage != Some(Outage::Down);
            if reported == "Issued" && status_is_written && !self.is_clock_off() && (!good || denied) {
                self.violation(format!("{name} is reported as issued, but is not"));
            }
            if reported == "KeyExpired" && status_is_written && self.local_ahead() == 0 {
                self.violation("the key is reported as expired because of a wrong `Date`");
            }
            let throttled = reported == "RequestsThrottled" && self.zitadel.issued.len() > 40;
            if denied || faulty || throttled || self.is_contested(&token) {
                continue;
            }
            if !good && !recovering {
                self.violation(format!(
                    "{name} is invalid or incomplete although nothing fails: {reported}"
                ));
            }
            if let Some(issued) = issued {
                let ends = self.elapsed_at(issued.expires_at);
                // The operator waits as long as ZITADEL says, also if a token expires meanwhile.
                let healthy_since = self.healthy_since.max(self.throttled_until);
                if !valid && ends > healthy_since + SLACK + self.clock_recovery {
                    self.violation(format!(
                        "{name} expired at {ends:?} although nothing fails since {:?}",
                        self.healthy_since
                    ));
                }
                if valid {
                    self.check_refreshed_in_time(&token);
                }
            }
            if good {
                self.entry(&token.name).expected = false;
            }
        }
        self.check_ready(all_valid, all_good);
        let limit = 100 + self.elapsed().saturating_sub(self.last_event).as_secs() / 30;
        if faulty && self.requests_since_event as u64 > limit {
            self.violation(format!(
                "{} token requests since the last event, although all of them fail",
                self.requests_since_event
            ));
        }
    }

    fn check_ready(&mut self, all_valid: bool, all_good: bool) {
        if self.store.outage == Some(Outage::Down) || self.is_clock_off() {
            return;
        }
        let ready = self.ready_condition();
        let is_ready = ready["status"] == "True";
        if self.is_suspended() {
            // While suspended, the operator only reports whether the existing tokens are valid.
            let valid = |token: &Token| {
                self.stored_token(token)
                    .is_some_and(|issued| self.is_valid(issued, SLACK))
            };
            if is_ready && !self.tokens().iter().all(valid) {
                self.violation("Ready is True while suspended, but a token is expired");
            }
            return;
        }
        if is_ready && !all_valid {
            self.violation(format!("Ready is True, but {}", self.store.user["status"]["tokens"]));
        }
        if !is_ready && all_good && !self.is_faulty() {
            self.violation(format!("all tokens are valid, but Ready is {ready}"));
        }
    }
}
