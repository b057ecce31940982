//! One program for all targets, because each program links the whole operator. `FUZZ_TARGET` selects the target.
#![no_main]

#[path = "../targets.rs"]
mod targets;

use std::sync::LazyLock;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").expect("FUZZ_TARGET must name a target of targets.rs");
    targets::TARGETS
        .iter()
        .find(|(known, _)| *known == name)
        .expect("FUZZ_TARGET must name a target of targets.rs")
        .1
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET(data));
