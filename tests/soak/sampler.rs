//! Reads token Secrets every 100 ms and checks that they hold unexpired tokens, until the test stops it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;

use crate::support::world::{World, claims, data};

const SAMPLE: Duration = Duration::from_millis(100);

/// What the sampler observed.
pub struct Seen {
    samples: usize,
    widest: Duration,
    /// Shortest remaining lifetime of a token at a sample, in seconds.
    pub margin: f64,
    /// Number of distinct tokens.
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

/// Samples these Secrets while `going` returns true, and fails if one holds an expired token. A token that expired
/// between two samples is not missed: if a token was replaced between two samples, the second sample must have ended
/// before the replaced token expired.
pub async fn sample(world: &World, names: &[String], going: impl Fn() -> bool) -> Seen {
    let mut tokens: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let mut held: BTreeMap<&str, (String, Timestamp)> = BTreeMap::new();
    let (mut last, mut widest, mut samples, mut margin) = (Instant::now(), Duration::ZERO, 0, f64::MAX);
    while going() {
        // The list shows the state at a moment between `asked` and `answered`.
        let asked = Timestamp::now();
        // One request for all Secrets, so that a sample takes no longer with more names.
        let all = world.secrets().list(&ListParams::default()).await.expect("listed");
        let answered = Timestamp::now();
        for name in names {
            let secret = all.items.iter().find(|s| s.metadata.name.as_ref() == Some(name));
            let secret = data(secret.expect("the Secret exists"));
            let stated: Timestamp = secret["expires_at"].parse().expect("a time");
            let exp = Timestamp::from_second(claims(&secret["token"])["exp"].as_i64().expect("exp")).expect("a time");
            assert!(
                stated <= exp,
                "{name}: expires_at of the Secret is later than exp of the token"
            );
            assert!(
                asked < stated,
                "{name}: expired token at {asked}, it expired at {stated}"
            );
            margin = f64::min(margin, stated.duration_since(asked).as_secs_f64());
            let before = held.insert(name, (secret["token"].clone(), stated));
            if let Some((token, end)) = before.filter(|(token, _)| *token != secret["token"]) {
                assert!(
                    answered < end,
                    "{name}: not measured: a token that expired at {end} was replaced before {answered}, and the gap \
                     between the samples was {:?}",
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
