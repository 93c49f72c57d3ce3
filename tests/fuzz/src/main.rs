//! `weft-fuzz`: libFuzzer over the target that `WEFT_FUZZ_TARGET` names. Built and run by `cargo xtask fuzz`.
#![no_main]

use std::sync::OnceLock;

use weft_tests_fuzz::{Target, find};

fn target() -> &'static Target {
    static TARGET: OnceLock<&'static Target> = OnceLock::new();
    TARGET.get_or_init(|| {
        let name = std::env::var("WEFT_FUZZ_TARGET").unwrap_or_default();
        find(&name).unwrap_or_else(|| panic!("WEFT_FUZZ_TARGET={name:?} is no target"))
    })
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| (target().run)(bytes));
