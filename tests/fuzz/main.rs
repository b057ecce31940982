//! Fuzz tests for all external inputs: every seed unchanged, then random bytes and mutations of seeds until the time is
//! up (`FUZZ_SECONDS` for each target, 200 ms by default). They need only stable Rust, so they are part of every test
//! run. libFuzzer, which is guided by code coverage, runs the same targets by hand (fuzz/README.md).
#![allow(missing_docs, clippy::expect_used, reason = "tests fail by panicking")]

#[path = "../../fuzz/targets.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use rustix::time::{ClockId, clock_gettime};
use targets::TARGETS;

/// Maximum CPU time of one input in a debug build: a reconcile must not hang on an input. CPU time, because the load of
/// other processes does not count.
const SLOW: Duration = Duration::from_secs(2);

/// Maximum size of a mutated input.
const LARGEST: usize = 80 * 1024;

/// Words that mutations insert: tokens of JSON and templates, and numbers at limits.
const WORDS: &[&str] = &[
    "null",
    "true",
    "{}",
    "[]",
    "\"\"",
    "\"",
    "\\",
    "\\u0000",
    "\\ud800",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "{{",
    "}}",
    "{{ token }}",
    "{{ issuer }}",
    "\0",
    "\u{e9}",
    "-1",
    "0",
    "1e400",
    "-0.0",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551616",
    "253402300799",
    "9999-12-31T23:59:59Z",
    "-009999-01-02T01:59:59Z",
    "Bearer",
    ".",
    "..",
    "=",
    "/",
    "@",
    "#",
    "?",
    "%2e",
    "-----BEGIN ",
    "-----END ",
    "\n",
    "\r\n",
    "\u{30}\u{2}\u{1}",
    "999999999h",
    "0.000000001s",
    "ms",
];

/// `SplitMix64`. The same seed produces the same inputs.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, or 0 if `end` is 0.
    fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).expect("fits").max(1);
        usize::try_from(self.next() % end).expect("fits")
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        (0..self.below(most)).map(|_| self.byte()).collect()
    }

    /// A random range of `of`.
    fn part(&mut self, of: &[u8]) -> std::ops::Range<usize> {
        let start = self.below(of.len());
        start..start + self.below((of.len() - start).min(1 + of.len() / 4))
    }

    fn input(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        if seeds.is_empty() || self.below(10) == 0 {
            return self.bytes(200);
        }
        let mut input = seeds[self.below(seeds.len())].clone();
        for _ in 0..=self.below(6) {
            self.mutate(&mut input, seeds);
        }
        input.truncate(LARGEST);
        input
    }

    fn mutate(&mut self, input: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        let at = self.below(input.len());
        let part = self.part(input);
        match self.below(9) {
            0 => input
                .iter_mut()
                .skip(at)
                .take(1)
                .for_each(|b| *b ^= 1 << (self.next() % 8)),
            1 => input.iter_mut().skip(at).take(1).for_each(|b| *b = self.byte()),
            2 => drop(input.drain(part)),
            3 => input.truncate(at),
            4 => drop(input.splice(at..at, self.bytes(8))),
            5 | 6 => {
                let word = WORDS[self.below(WORDS.len())].bytes();
                drop(input.splice(if self.below(2) == 0 { at..at } else { part }, word));
            }
            7 => {
                let other = &seeds[self.below(seeds.len())];
                let theirs = self.part(other);
                drop(input.splice(part, other[theirs].iter().copied()));
            }
            _ => {
                let most = (LARGEST / part.len().max(1)).min(1 << self.below(16));
                let repeated = input[part].repeat(self.below(most));
                drop(input.splice(at..at, repeated));
            }
        }
    }
}

fn folder(name: &str, target: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz")
        .join(name)
        .join(target)
}

/// All seeds of a target, sorted by file name.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let files = std::fs::read_dir(folder("seeds", target)).expect("seeds");
    let mut paths: Vec<_> = files.map(|file| file.expect("readable").path()).collect();
    paths.sort();
    paths
        .iter()
        .map(|path| std::fs::read(path).expect("readable"))
        .collect()
}

/// CPU time of this thread.
fn worked() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).expect("not negative")
}

/// Calls a target. An input that fails or is too slow is saved, for libFuzzer and as a candidate for a seed.
fn call(name: &str, target: fn(&[u8]), input: &[u8]) {
    let before = worked();
    let ended = catch_unwind(AssertUnwindSafe(|| target(input)));
    let took = worked().saturating_sub(before);
    let slow = took > SLOW;
    if slow || ended.is_err() {
        let folder = folder("artifacts", name);
        std::fs::create_dir_all(&folder).expect("a folder");
        let file = folder.join(if slow { "slow" } else { "crash" });
        std::fs::write(&file, input).expect("written");
        eprintln!("{name}: the input is saved in {}", file.display());
    }
    ended.unwrap_or_else(|panic| resume_unwind(panic));
    assert!(!slow, "{name}: the input took {took:?} of CPU time, more than {SLOW:?}");
}

#[test]
fn no_external_input_violates_an_invariant() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let budget = number("FUZZ_SECONDS").map_or(Duration::from_millis(200), Duration::from_secs);
    let clock = || {
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .expect("after 1970")
            .as_secs()
    };
    let seed = number("FUZZ_SEED").unwrap_or_else(clock);
    println!("FUZZ_SEED={seed}");
    let only = std::env::var("FUZZ_TARGET").ok();
    for (name, target) in TARGETS
        .iter()
        .filter(|(name, _)| only.as_ref().is_none_or(|only| only == name))
    {
        let (seeds, start, mut random) = (seeds(name), Instant::now(), Random(seed));
        for seed in &seeds {
            call(name, *target, seed);
        }
        let mut calls = 0_u32;
        while start.elapsed() < budget {
            call(name, *target, &random.input(&seeds));
            calls += 1;
        }
        println!(
            "{name:<10} {} seeds, {calls} inputs, {:.0} per second",
            seeds.len(),
            f64::from(calls) / start.elapsed().as_secs_f64()
        );
    }
}
