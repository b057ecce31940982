//! Reads token Secrets every 100 ms and looks whether what they hold is good, until it is told to stop.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;

use crate::support::world::{World, claims, data};

const SAMPLE: Duration = Duration::from_millis(100);

/// What was seen.
pub struct Seen {
    samples: usize,
    widest: Duration,
    /// Least time, in seconds, that a token had left when its Secret was looked at.
    pub margin: f64,
    /// Different tokens.
    pub tokens: usize,
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            samples,
            widest,
            margin,
            tokens,
        } = self;
        write!(
            f,
            "{samples} samples, widest gap {widest:?}, least time left {margin:.1} s, {tokens} tokens"
        )
    }
}

/// Samples these Secrets while `going` says so; fails on one that holds an expired token. None may hide between two looks
/// either, however long they are apart: a token that went between them counts as good only if the second look ended
/// before the token did.
pub async fn sample(world: &World, names: &[String], going: impl Fn() -> bool) -> Seen {
    let mut tokens: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let mut held: BTreeMap<&str, (String, Timestamp)> = BTreeMap::new();
    let (mut last, mut widest, mut samples, mut margin) = (Instant::now(), Duration::ZERO, 0, f64::MAX);
    while going() {
        // What the list shows was there at a moment between these two.
        let asked = Timestamp::now();
        // One request for all, so that a round takes no longer with more names.
        let all = world.secrets().list(&ListParams::default()).await.expect("listed");
        let answered = Timestamp::now();
        for name in names {
            let secret = all.items.iter().find(|s| s.metadata.name.as_ref() == Some(name));
            let secret = data(secret.expect("there"));
            let told: Timestamp = secret["expires_at"].parse().expect("a time");
            let real = Timestamp::from_second(claims(&secret["token"])["exp"].as_i64().expect("exp")).expect("a time");
            assert!(told <= real, "{name}: the Secret tells a later end than the token has");
            assert!(asked < told, "{name}: an expired token at {asked}, it ended at {told}");
            margin = f64::min(margin, told.duration_since(asked).as_secs_f64());
            let before = held.insert(name, (secret["token"].clone(), told));
            if let Some((token, end)) = before.filter(|(token, _)| *token != secret["token"]) {
                assert!(
                    answered < end,
                    "{name}: not measured, since a token that ended at {end} was replaced before {answered}, after a \
                     gap of {:?}",
                    last.elapsed()
                );
                tokens.entry(name).or_default().insert(token);
            }
        }
        samples += names.len();
        widest = widest.max(last.elapsed());
        last = Instant::now();
        tokio::time::sleep(SAMPLE).await;
    }
    for (name, (token, _)) in held {
        tokens.entry(name).or_default().insert(token);
    }
    Seen {
        samples,
        widest,
        margin,
        tokens: tokens.values().map(BTreeSet::len).sum(),
    }
}
