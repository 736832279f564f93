//! Entry points of the fuzzer: each takes bytes as one thing that xen-locus reads and that someone
//! hostile may have written, and uses it as the tool does. None may panic, hang, or take memory
//! beyond the budget, whatever the bytes.
//!
//! `fuzz/` runs them under libFuzzer (`make fuzz`); the tests here run a short deterministic
//! mutation of the seeds.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // part of tests only
#![allow(clippy::cast_possible_truncation)] // small tables

mod arena;
mod btf;
mod cache;
mod core;
mod cpu;
mod guest;
#[cfg(test)]
mod hostile;
mod kallsyms;
mod look;
mod modules;
#[cfg(test)]
mod mutate;
mod orc;
mod pages;
mod payload;
mod stacks;
mod stage;
mod vmcoreinfo;

/// One thing to be fuzzed.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name: that of its file in `fuzz/fuzz_targets/`.
    pub name: &'static str,
    /// Reads the bytes as the tool does.
    pub run: fn(&[u8]),
    /// Well-formed bytes to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target {
        name: "kallsyms",
        run: kallsyms::run,
        seeds: kallsyms::seeds,
    },
    Target {
        name: "btf",
        run: btf::run,
        seeds: btf::seeds,
    },
    Target {
        name: "types",
        run: btf::text,
        seeds: btf::seeds,
    },
    Target {
        name: "tasks",
        run: guest::tasks,
        seeds: guest::seeds,
    },
    Target {
        name: "modules",
        run: modules::run,
        seeds: modules::seeds,
    },
    Target {
        name: "cpu",
        run: cpu::run,
        seeds: cpu::seeds,
    },
    Target {
        name: "orc",
        run: orc::run,
        seeds: orc::seeds,
    },
    Target {
        name: "stacks",
        run: stacks::run,
        seeds: stacks::seeds,
    },
    Target {
        name: "vmcoreinfo",
        run: vmcoreinfo::run,
        seeds: vmcoreinfo::seeds,
    },
    Target {
        name: "core",
        run: core::run,
        seeds: core::seeds,
    },
    Target {
        name: "cache",
        run: cache::run,
        seeds: cache::seeds,
    },
    Target {
        name: "pages",
        run: pages::run,
        seeds: pages::seeds,
    },
    Target {
        name: "directory",
        run: arena::directory,
        seeds: arena::directory_seeds,
    },
    Target {
        name: "record",
        run: arena::record,
        seeds: arena::record_seeds,
    },
    Target {
        name: "arena",
        run: arena::arena,
        seeds: arena::arena_seeds,
    },
    Target {
        name: "payload",
        run: payload::run,
        seeds: payload::seeds,
    },
];

/// Runs the target `name` on `data`; nothing when there is none of that name.
pub fn run(name: &str, data: &[u8]) {
    for target in TARGETS.iter().filter(|t| t.name == name) {
        (target.run)(data);
    }
}
