//! Reads token Secrets every 100 ms and looks whether what they hold is good, until it is told to stop.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;

use crate::support::world::{World, claims, data};

const SAMPLE: Duration = Duration::from_millis(100);
/// A sampler that slept longer than this has seen nothing.
const GAP: Duration = Duration::from_secs(1);

/// What was seen.
pub struct Seen {
    samples: u32,
    widest: Duration,
    margin: f64,
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

/// Samples these Secrets while `going` says so; fails on one that holds an expired token.
pub async fn sample(world: &World, names: &[String], going: impl Fn() -> bool) -> Seen {
    let mut tokens: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let (mut last, mut widest, mut samples, mut margin) = (Instant::now(), Duration::ZERO, 0, f64::MAX);
    while going() {
        for name in names {
            let secret = data(&world.secrets().get(name).await.expect("there"));
            let now = Timestamp::now();
            let told: Timestamp = secret["expires_at"].parse().expect("a time");
            let real = Timestamp::from_second(claims(&secret["token"])["exp"].as_i64().expect("exp")).expect("a time");
            assert!(told <= real, "{name}: the Secret tells a later end than the token has");
            assert!(now < told, "{name}: an expired token at {now}, it ended at {told}");
            margin = f64::min(margin, told.duration_since(now).as_secs_f64());
            tokens.entry(name).or_default().insert(secret["token"].clone());
            samples += 1;
        }
        widest = widest.max(last.elapsed());
        last = Instant::now();
        tokio::time::sleep(SAMPLE).await;
    }
    assert!(widest < GAP, "not measured: a gap of {widest:?} between samples");
    Seen {
        samples,
        widest,
        margin,
        tokens: tokens.values().map(BTreeSet::len).sum(),
    }
}
