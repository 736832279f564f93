#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| xen_locus::fuzz::run("stacks", data));
