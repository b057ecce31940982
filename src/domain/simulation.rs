//! A service user's life in a model: random edits, faults, steps of the clock and restarts against the pure parts, as
//! the controller puts them together. After each pass it is asked what the product promises: no expired token while
//! all goes well, one mint for each lifetime, `Ready` that is true, a wake in time, and nothing to do twice.
//!
//! The model knows what was minted, by itself and not from records, and why another mint may be: its `excuses`.

mod events;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;
use secrecy::ExposeSecret;
use serde_json::json;

use crate::api::service_user::Token;
use crate::domain::answer::{self, Format, TokenAnswer};
use crate::domain::backoff::Backoff;
use crate::domain::clock_skew::{Sample, Skew, is_past};
use crate::domain::facts::{CONTEST_WINDOW, CurrentToken, Facts, Outcome, UnwrittenToken};
use crate::domain::fixtures::{self, at, jwt, user};
use crate::domain::key::ServiceKey;
use crate::domain::observed_secret::{ObservedSecret, SecretRef};
use crate::domain::plan::{self, MintRequest, Step, plan};
use crate::domain::reason::Reason;
use crate::domain::report::{Report, report};
use crate::domain::retry::PendingRetry;
use crate::domain::schedule::Schedule;
use crate::domain::secret_draft::{self, SecretDraft};
use crate::domain::time::shifted;
use crate::domain::time::whole_seconds;
use events::{Event, events};

/// The entries that the spec may have.
const NAMES: [&str; 2] = ["invoices", "reports"];

/// A token that the server gave, as the server knows it.
#[derive(Clone, Debug)]
struct Given {
    audience: BTreeSet<String>,
    key_id: String,
    issued: Timestamp,
    expires: Timestamp,
}

#[allow(clippy::struct_excessive_bools, reason = "a world has many switches")]
struct World {
    lifetime: SignedDuration,
    opaque: bool,
    /// By the server's clock as it is thought to be; steps with `Clock`.
    now: Timestamp,
    /// By a clock that never steps.
    elapsed: SignedDuration,
    /// By how much the server's `Date` lies.
    date_ahead: SignedDuration,
    /// By how much our own clock is wrong.
    ours_ahead: SignedDuration,
    /// What is known of the server's clock.
    skew: Skew,
    /// Object, instance, key, and what is kept in memory.
    facts: Facts,
    /// All Secrets of the namespace.
    secrets: BTreeMap<String, ObservedSecret>,
    backups: Vec<(String, ObservedSecret)>,
    key: ServiceKey,
    key_id: String,
    key_is_there: bool,
    mints_fail: Option<Reason>,
    writes_fail: bool,
    /// Since when neither fails, and the clock did not step.
    healthy_since: Timestamp,
    timer: Option<Timestamp>,
    dirty: bool,
    backoffs: BTreeMap<String, Backoff>,
    unscheduled: Vec<(String, SignedDuration)>,
    given: BTreeMap<String, Given>,
    /// The last one given, by name of the entry.
    last: BTreeMap<String, Given>,
    /// Entries that may be minted once before they are due, since somebody did something.
    excuses: BTreeSet<String>,
    writes: usize,
    /// Mints before their time that no change of the inputs explains.
    quarrels: Vec<(String, SignedDuration)>,
}

fn window() -> SignedDuration {
    SignedDuration::try_from(CONTEST_WINDOW).expect("short")
}

fn copy(of: &ObservedSecret) -> ObservedSecret {
    ObservedSecret {
        uid: of.uid.clone(),
        resource_version: of.resource_version.clone(),
        controller: of.controller.clone(),
        labels: of.labels.clone(),
        annotations: of.annotations.clone(),
        data: of.data.clone(),
        opaque: of.opaque,
        immutable: of.immutable,
    }
}

impl World {
    fn new(lifetime: i64, opaque: bool) -> Self {
        let facts = fixtures::facts(&NAMES);
        let mut key = facts.key.clone().expect("a key");
        // Longer than a simulation, and not as long as a clock is wrong.
        key.expires = Some(at(0) + SignedDuration::from_hours(365 * 24));
        Self {
            lifetime: SignedDuration::from_secs(lifetime),
            opaque,
            now: at(0) + SignedDuration::from_millis(300),
            elapsed: SignedDuration::ZERO,
            date_ahead: SignedDuration::ZERO,
            ours_ahead: SignedDuration::ZERO,
            skew: Skew::default(),
            facts,
            secrets: BTreeMap::new(),
            backups: Vec::new(),
            key_id: key.key_id.clone(),
            key,
            key_is_there: true,
            mints_fail: None,
            writes_fail: false,
            healthy_since: at(0),
            timer: None,
            dirty: true,
            backoffs: BTreeMap::new(),
            unscheduled: Vec::new(),
            given: BTreeMap::new(),
            last: BTreeMap::new(),
            excuses: BTreeSet::new(),
            writes: 0,
            quarrels: Vec::new(),
        }
    }

    /// Our own clock.
    fn ours(&self) -> Timestamp {
        shifted(self.now, self.ours_ahead)
    }

    /// The server's clock as it is thought to be.
    fn theirs(&self) -> Timestamp {
        self.skew.theirs(self.ours())
    }

    /// What theirs is wrong by.
    fn error(&self) -> SignedDuration {
        self.theirs().duration_since(self.now)
    }

    fn is_clock_off(&self) -> bool {
        self.skew.check().is_err() || self.ours_ahead != SignedDuration::ZERO
    }

    /// Learns the server's clock from two answers, if it answers, as discovery does.
    fn measure(&mut self) {
        if self.mints_fail.is_none() {
            let date = whole_seconds(shifted(self.now, self.date_ahead));
            let sample = Sample::new(date, self.ours(), self.ours()).expect("time goes on");
            self.skew.observe(sample);
            self.skew.observe(sample);
        }
    }

    /// Reads what decides, as `gather` does.
    fn gather(&mut self) {
        let error = self.error();
        let facts = &mut self.facts;
        facts.clock = self.skew;
        let tokens = &facts.user.spec.tokens;
        let (asked_for, rest): (Vec<_>, Vec<_>) = self
            .secrets
            .iter()
            .partition(|(name, _)| tokens.iter().any(|t| t.secret.name == **name));
        facts.secrets = asked_for
            .into_iter()
            .map(|(name, secret)| (name.clone(), copy(secret)))
            .collect();
        let leftover = |(name, secret): (&String, &ObservedSecret)| SecretRef {
            name: name.clone(),
            uid: secret.uid.clone(),
            resource_version: secret.resource_version.clone(),
        };
        let left = rest.iter().map(|(name, secret)| ((*name).clone(), copy(secret)));
        facts.secrets.extend(left);
        facts.leftovers = rest.into_iter().map(leftover).collect();
        facts.unwritten.retain(|name, _| tokens.iter().any(|t| t.name == *name));
        facts.key = if self.key_is_there {
            Ok(ServiceKey {
                key_id: self.key_id.clone(),
                ..self.key.clone()
            })
        } else {
            Err(Reason::KeySecretMissing)
        };
        facts.pending_retries = self
            .backoffs
            .iter()
            .map(|(what, backoff)| {
                let hold = backoff.hold;
                let until = shifted(hold.until, error);
                (what.clone(), PendingRetry { until, ..hold })
            })
            .collect();
        self.unscheduled.retain(|(_, when)| *when + window() > self.elapsed);
        facts.unscheduled.clear();
        for (name, _) in &self.unscheduled {
            *facts.unscheduled.entry(name.clone()).or_default() += 1;
        }
    }

    /// One pass, and what must hold after it.
    fn pass(&mut self) {
        self.dirty = false;
        self.measure();
        self.gather();
        let decided = plan(&self.facts, self.theirs());
        let steps = decided.steps.into_iter().enumerate();
        let outcomes: Vec<Outcome> = steps.map(|(index, step)| self.act(index, step)).collect();
        let certain = self.skew.certain(self.ours());
        for leftover in plan::may_go(&self.facts, &decided.deletes, &outcomes, certain) {
            let gone = self.secrets.remove(&leftover.name).expect("a Secret");
            self.check_no_valid_token_is_lost(&gone);
        }
        let mut told = report(&self.facts, &outcomes, self.theirs());
        told.wake = told.wake.shifted(-self.error());
        user(&mut self.facts).status = Some(told.status.clone());
        self.wait(&told);
        self.check(&outcomes, &told);
        self.check_nothing_is_left();
    }

    /// One step, as `act` does it.
    fn act(&mut self, index: usize, step: Step) -> Outcome {
        let name = self.facts.user.spec.tokens[index].name.clone();
        match step {
            Step::Keep { current } => {
                self.facts.unwritten.remove(&name);
                Outcome::new(index, Reason::Issued, Some(current))
            }
            Step::Refuse { reason, current } => Outcome::new(index, reason, current),
            Step::Wait { reason, current } => Outcome {
                deferred: true,
                ..Outcome::new(index, reason, current)
            },
            Step::Write {
                draft,
                current,
                fallback,
            } => self.write(index, &draft, current, fallback),
            Step::Mint(request) => match self.mint(index, &request) {
                Err(reason) => Outcome::new(index, reason, request.fallback),
                Ok((draft, current)) => self.write(index, &draft, current, request.fallback),
            },
        }
    }

    fn mint(&mut self, index: usize, request: &MintRequest) -> Result<(SecretDraft, CurrentToken), Reason> {
        if request.try_write_first && self.writes_fail {
            return Err(Reason::SecretWriteFailed);
        }
        let token = &self.facts.user.spec.tokens[index];
        let expected = plan::expect(&self.facts, token, "")?;
        if let Some(reason) = self.mints_fail {
            return Err(reason);
        }
        self.skew.check()?;
        let given = Given {
            audience: expected.audience.clone(),
            key_id: self.key_id.clone(),
            issued: self.now,
            expires: self.now + self.lifetime,
        };
        let due = self.check_it_is_time(token, &given);
        let number = self.given.len();
        let claims = json!({"iss": expected.issuer, "sub": expected.user_id, "aud": expected.audience,
            "exp": given.expires.as_second(), "jti": number});
        let value = if self.opaque {
            format!("opaque-{number}")
        } else {
            jwt(&claims)
        };
        let answer = TokenAnswer {
            access_token: value.clone().into(),
            token_type: "Bearer".into(),
            expires_in: Some(self.lifetime.as_secs()),
        };
        let minted = answer::accept(answer, &expected, self.now)?;
        let record = secret_draft::record(&self.facts, &request.request_hash, &request.template_hash, &minted);
        let draft = secret_draft::draft(&self.facts, token, &minted.token, &record);
        let current = CurrentToken {
            schedule: self.facts.schedule(token, minted.issued, minted.expires),
            format: Format::of(&value),
        };
        let name = token.name.clone();
        self.facts
            .last_mints
            .insert(name.clone(), (request.request_hash.clone(), current.schedule.renew));
        if request.unscheduled {
            self.unscheduled.push((name.clone(), self.elapsed));
        }
        self.facts
            .unwritten
            .insert(name.clone(), Arc::new(UnwrittenToken { minted, record }));
        self.excuses.remove(&name);
        let same = |last: &Given| last.audience == given.audience && last.key_id == given.key_id;
        if !due && self.last.get(&name).is_some_and(same) {
            self.quarrels.push((name.clone(), self.elapsed));
        }
        self.last.insert(name, given.clone());
        self.given.insert(value, given);
        Ok((draft, current))
    }

    /// A token is minted once for each lifetime, and once more when somebody made it necessary. Returns whether it is
    /// due.
    fn check_it_is_time(&self, token: &Token, given: &Given) -> bool {
        let renew = |given: &Given| self.renewal(token, given);
        let there = self
            .secrets
            .get(&token.secret.name)
            .and_then(ObservedSecret::token)
            .and_then(|value| self.given.get(value));
        let due = [self.last.get(&token.name), there]
            .into_iter()
            .flatten()
            // A token that was issued when both clocks were ahead is not valid yet.
            .any(|last| renew(last) <= self.now || !is_past(last.issued, self.now));
        let first = !self.last.contains_key(&token.name);
        assert!(
            due || first || self.excuses.contains(&token.name),
            "{} is minted at {} although nothing asks for it; the last is due at {:?}",
            token.name,
            given.issued,
            self.last.get(&token.name).map(renew)
        );
        due
    }

    fn renewal(&self, token: &Token, given: &Given) -> Timestamp {
        // A JWT's `exp` has whole seconds.
        let expires = Timestamp::from_second(given.expires.as_second()).expect("in range");
        let Schedule { renew, .. } = self.facts.schedule(token, given.issued, expires.min(given.expires));
        renew
    }

    fn write(
        &mut self,
        index: usize,
        draft: &SecretDraft,
        current: CurrentToken,
        fallback: Option<CurrentToken>,
    ) -> Outcome {
        if self.writes_fail {
            return Outcome::new(index, Reason::SecretWriteFailed, fallback);
        }
        let name = self.facts.user.spec.tokens[index].name.clone();
        self.facts.unwritten.remove(&name);
        if draft.repair {
            self.unscheduled.push((name, self.elapsed));
        }
        fixtures::apply(&mut self.facts, draft);
        let written = &self.facts.secrets[&draft.name];
        self.secrets.insert(draft.name.clone(), copy(written));
        self.backups.push((draft.name.clone(), copy(written)));
        self.writes += 1;
        Outcome::new(index, Reason::Issued, Some(current))
    }

    /// Sets timer and back-offs, as the queue does.
    fn wait(&mut self, told: &Report) {
        let before = std::mem::take(&mut self.backoffs);
        for failed in &told.wake.failed {
            let backoff = Backoff::after(failed, before.get(&failed.what), &failed.what, self.now);
            self.backoffs.insert(failed.what.clone(), backoff);
        }
        let retries = self.backoffs.values().map(|backoff| backoff.hold.until);
        self.timer = retries.chain(told.wake.at).min();
    }

    /// What was given of what is in the token's Secret, if that is of the present inputs.
    fn present(&self, token: &Token) -> Option<&Given> {
        let given = self.given.get(self.secrets.get(&token.secret.name)?.token()?)?;
        let audience: BTreeSet<String> = token.project_ids.iter().cloned().collect();
        (given.audience == audience && given.key_id == self.key_id).then_some(given)
    }

    /// Whether the token's Secret has what the spec wants around the token.
    fn is_complete(&self, token: &Token) -> bool {
        let secret = &self.secrets[&token.secret.name];
        let value = secret.token().expect("a token");
        let text = |key: &str| std::str::from_utf8(secret.data.get(key)?.expose_secret()).ok();
        let rendered =
            |(key, template): (&String, &String)| text(key) == Some(template.replace("{{ token }}", value).as_str());
        secret.controller.is_some()
            && token
                .secret
                .labels
                .iter()
                .all(|(key, label)| secret.labels.get(key) == Some(label))
            && token
                .secret
                .annotations
                .iter()
                .all(|(key, note)| secret.annotations.get(key).is_some_and(|n| n.expose_secret() == note))
            && token.secret.template.iter().all(rendered)
            && text("issuer") == Some("https://auth.example.com")
    }

    fn is_contested(&self, token: &Token) -> bool {
        self.unscheduled.iter().filter(|(name, _)| *name == token.name).count() > 3
    }

    fn is_refused(&self, token: &Token) -> bool {
        let allowed = self.facts.allowed_audiences.as_ref().expect("known");
        !self.key_is_there || self.is_suspended() || allowed.check(token, None).is_err()
    }

    fn is_suspended(&self) -> bool {
        self.facts.user.spec.suspend == Some(true)
    }

    fn check(&mut self, outcomes: &[Outcome], told: &Report) {
        let mut all_good = true;
        for name in NAMES {
            let recent = |(of, when): &&(String, SignedDuration)| *of == name && *when + window() > self.elapsed;
            // The product does not know of the first quarrel after a restart that it is one.
            for (fight, most) in [(&self.unscheduled, 4), (&self.quarrels, 5)] {
                assert!(
                    fight.iter().filter(recent).count() <= most,
                    "{name}: {fight:?} at {:?}",
                    self.elapsed
                );
            }
        }
        for outcome in outcomes {
            let token = &self.facts.user.spec.tokens[outcome.token];
            let good = self.present(token).is_some_and(|given| given.expires > self.now);
            let refused = self.is_refused(token);
            all_good &= good && !refused;
            if outcome.reason == Reason::Issued {
                assert!(good, "{} is told as issued, and is not", token.name);
                assert!(
                    self.is_complete(token),
                    "{} is told as issued, and what is around it is not",
                    token.name
                );
                let renew = outcome.current.expect("held").schedule.renew;
                assert!(
                    self.timer.is_some_and(|timer| timer <= renew),
                    "the wake comes after {renew}"
                );
                self.excuses.remove(&token.name);
                continue;
            }
            let ends = outcome
                .current
                .map(|current| current.schedule.expires)
                .filter(|expires| *expires > self.now)
                // By a wrong clock of ours it may have ended; all is looked at again when that clock is set.
                .filter(|_| self.ours_ahead == SignedDuration::ZERO);
            assert!(
                ends.is_none_or(|ends| self.timer.is_some_and(|timer| timer <= ends)),
                "its end is told late"
            );
            let hold = self.backoffs.get(&token.name).map(|backoff| backoff.hold.until);
            let last_try = ends.map(|ends| ends.max(self.now + SignedDuration::from_secs(1)));
            assert!(
                last_try.is_none() || hold.is_none() || hold <= last_try,
                "it is not tried again before it ends"
            );
            assert!(
                outcome.reason == Reason::Suspended || self.timer.is_some(),
                "{outcome:?} is never tried again"
            );
            // After a fight it waits longer than the fight counts.
            if refused || self.is_contested(token) || outcome.reason == Reason::SecretContested {
                continue;
            }
            assert!(
                outcome.reason != Reason::KeyExpired || self.ours_ahead != SignedDuration::ZERO,
                "the server's `Date` ends a key"
            );
            let faults = self.mints_fail.is_some() || self.writes_fail || self.is_clock_off();
            assert!(faults || outcome.deferred, "{outcome:?} while nothing fails");
            if let Some(given) = self.present(token).filter(|_| !faults && !good) {
                let slack = SignedDuration::from_secs(3);
                assert!(
                    given.expires < self.healthy_since + slack,
                    "{} expired at {} though nothing fails since {}",
                    token.name,
                    given.expires,
                    self.healthy_since
                );
            }
        }
        assert!(
            self.timer.is_none_or(|timer| timer > self.now),
            "it looks again at once: {:?}",
            told.wake
        );
        let ready = told
            .status
            .conditions
            .iter()
            .any(|c| c.type_ == "Ready" && c.status == "True");
        let tokens = &self.facts.user.spec.tokens;
        if self.is_suspended() {
            // Nothing is judged anew: what is there is told as it was.
            let alive = |t: &Token| {
                let value = self.secrets.get(&t.secret.name).and_then(ObservedSecret::token);
                value
                    .and_then(|value| self.given.get(value))
                    .is_some_and(|given| given.expires > self.now)
            };
            assert!(!ready || tokens.iter().all(alive), "suspended and Ready, but expired");
        } else {
            assert!(!ready || all_good, "Ready, but {:?}", told.status.tokens);
            assert!(
                ready || outcomes.iter().any(|o| o.reason != Reason::Issued),
                "not Ready, but all are issued"
            );
        }
    }

    /// What still is of use to an entry of the spec goes only when the entry has something as good.
    fn check_no_valid_token_is_lost(&self, gone: &ObservedSecret) {
        // What somebody edited goes when its record says so.
        let unedited = |value: &&str| gone.record().is_some_and(|record| record.vouches_for(value));
        let given = gone.token().filter(unedited).and_then(|value| self.given.get(value));
        let Some(given) = given.filter(|given| whole_seconds(given.expires) > self.now) else {
            return;
        };
        for token in &self.facts.user.spec.tokens {
            assert!(
                self.secrets.contains_key(&token.secret.name),
                "a valid token goes before {} has a Secret",
                token.name
            );
            let audience: BTreeSet<String> = token.project_ids.iter().cloned().collect();
            let wanted = given.audience == audience && given.key_id == self.key_id && !self.is_refused(token);
            let alive = self.present(token).is_some_and(|given| given.expires > self.now);
            assert!(alive || !wanted, "the last valid token of {} goes", token.name);
        }
    }

    /// A second pass at once does nothing and tells nothing.
    fn check_nothing_is_left(&mut self) {
        self.gather();
        let steps = plan(&self.facts, self.theirs()).steps.into_iter().enumerate();
        let outcomes = steps.map(|(index, step)| match step {
            Step::Keep { current } => Outcome::new(index, Reason::Issued, Some(current)),
            Step::Refuse { reason, current } | Step::Wait { reason, current } => Outcome::new(index, reason, current),
            Step::Mint(_) | Step::Write { .. } => panic!("there is more to do: {step:?}"),
        });
        let told = report(&self.facts, &outcomes.collect::<Vec<_>>(), self.theirs());
        assert_eq!(
            Some(&told.status),
            self.facts.user.status.as_ref(),
            "the same state, the same status"
        );
        assert_eq!(told.events, [], "nothing new is told");
    }

    /// Time goes by, with a pass whenever one is due.
    fn passes(&mut self, by: SignedDuration) {
        let end = self.now + by;
        let mut passes = 0;
        if self.dirty {
            self.pass();
        }
        while let Some(timer) = self.timer.filter(|timer| *timer <= end) {
            self.elapsed += timer.duration_since(self.now);
            self.now = timer;
            self.pass();
            passes += 1;
            assert!(passes < 1_000, "it never rests");
        }
        self.elapsed += end.duration_since(self.now);
        self.now = end;
    }

    fn live(&mut self, events: &[(Event, usize, bool)]) {
        let each = events
            .iter()
            .flat_map(|(event, times, at_once)| std::iter::repeat_n((event, at_once), *times));
        for (event, at_once) in each {
            self.happens(*event);
            match event {
                Event::Time(percent) => self.passes(self.lifetime * i32::try_from(*percent).expect("small") / 100),
                _ if *at_once && self.dirty => self.pass(),
                _ => {}
            }
        }
    }

    /// All is mended; after the longest back-off every token is fresh, and stays so at one mint for each lifetime.
    fn recovers(&mut self) {
        let mended = [
            Event::Suspend(false),
            Event::Allowed(true),
            Event::KeyThere(true),
            Event::MintsFail(None),
            Event::Date(0),
            Event::OurClock(0),
            Event::WritesFail(false),
            Event::Audience(0, 0),
            Event::Audience(1, 1),
        ];
        self.live(&mended.map(|event| (event, 1, false)));
        self.passes(SignedDuration::from_mins(25));
        let tokens = self.facts.user.spec.tokens.clone();
        let good = |world: &Self| {
            let status = world.facts.user.status.as_ref().expect("a status");
            tokens
                .iter()
                .all(|t| world.present(t).is_some_and(|given| given.expires > world.now))
                && status
                    .conditions
                    .iter()
                    .any(|c| c.type_ == "Ready" && c.status == "True" && c.reason == "Issued")
        };
        assert!(good(self), "{:?}", self.facts.user.status);
        let (minted, written) = (self.given.len(), self.writes);
        self.passes(self.lifetime * 4);
        assert!(good(self), "{:?}", self.facts.user.status);
        let (minted, written) = (self.given.len() - minted, self.writes - written);
        // Each lives at least as long as `renewBefore` of a half with the jitter lets it.
        assert!(
            minted <= tokens.len() * 11 && minted >= tokens.len() * 4,
            "{minted} mints in four lifetimes"
        );
        assert_eq!(minted, written, "one write for each");
    }
}

proptest! {
    // Each is a hundred passes, five seconds in all. PROPTEST_CASES raises it.
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 5))]
    #[test]
    fn whatever_happens_what_is_promised_holds(lifetime in prop_oneof![60..900_i64, 900..9_000_i64], opaque: bool, events in events()) {
        let mut world = World::new(lifetime, opaque);
        world.live(&events);
        world.recovers();
    }
}
