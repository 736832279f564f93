//! Targets of the fuzzer. Each takes bytes as one thing that xen-locus reads and that an attacker may have
//! written, and uses it as the tool does. Whatever the bytes, no target may panic, hang, or take more memory
//! than the budget allows.
//!
//! ```
//! // What libFuzzer and the tests do with each input of the target `payload`.
//! locus_fuzz::run("payload", b"\x7fELF and so on");
//! ```
//!
//! Files, in the order of the data:
//!
//! | file | subject |
//! |---|---|
//! | `lib.rs` | [`TARGETS`]: name, function and seeds of each target |
//! | `payload.rs`, `core.rs`, `cache.rs` | files: payloads, saved cores, cached kernels |
//! | `pages.rs` | page tables |
//! | `kallsyms.rs`, `btf.rs`, `orc.rs`, `vmcoreinfo.rs`, `cpu.rs`, `modules.rs`, `guest.rs` (tasks) | what a kernel's memory says |
//! | `stacks.rs` | stacks and registers of threads |
//! | `arena.rs` | the pages that xen-locus has put into a guest |
//! | `stage.rs`, `look.rs` | for several targets: a guest whose pages are the input, and what `info` reads |
//! | `mutate.rs`, `hostile.rs` | tests on stable Rust: mutated seeds, and guests that lie in one way each |
//!
//! `fuzz/` runs the targets under libFuzzer (`make fuzz`). `cargo test` runs a short and deterministic
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

/// One target of the fuzzer.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Name of the target, and of its file in `fuzz/fuzz_targets/`.
    pub name: &'static str,
    /// Reads an input as the tool does. Panics if what was read contradicts itself.
    pub run: fn(&[u8]),
    /// Makes the first inputs, which are well-formed.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets.
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

/// Runs the target `name` on the input `data`. Does nothing if there is no such target.
pub fn run(name: &str, data: &[u8]) {
    for target in TARGETS.iter().filter(|t| t.name == name) {
        (target.run)(data);
    }
}
