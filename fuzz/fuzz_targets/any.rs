//! One program for all targets, since each would link the whole operator: `FUZZ_TARGET` names the one that is run.
#![no_main]

#[path = "../targets.rs"]
mod targets;

use std::sync::LazyLock;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").expect("FUZZ_TARGET names a target of targets.rs");
    targets::TARGETS
        .iter()
        .find(|(known, _)| *known == name)
        .expect("a target of targets.rs")
        .1
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET(data));
