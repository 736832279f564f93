//! The testbed of xen-locus: nested Xen under QEMU, without KVM and without root.
//!
//! `fetch` downloads Debian packages, `image` makes boot images of them, `qemu` boots them. `dom0` and
//! `guest` run commands in a booted machine through the `agent`. Tests are written against `scenario`,
//! and `runner` runs them.
//!
//! # Order of rooms
//!
//! A file imports only from its own room and from rooms above it in this list, and never in a circle.
//!
//! 1. Ground: `limits`, `paths`, `profile`, `proto`, `verdict`, `host` (programs and files of the host),
//!    `cpio`, `headers`, `suites` (releases of Debian), `toolchain`, `consoles` (what a console's text says),
//!    `inputs` (what results depend on), `results` (what became of scenarios).
//! 2. In dom0: `agent`, the other end of `proto`.
//! 3. What is booted: `fetch` (Debian packages), then `elf`, `payloads`, `source`, then `image`, then
//!    `debian` (a dom0 on a disk) and `kernels`; `previous` (an earlier build of xen-locus).
//! 4. A machine: `dom0`, `watched` (its consoles), `guest`, `qemu`, `qemu_faults`, `late` (a scenario that takes
//!    too long).
//! 5. `scenario`: what a test is, and the machine that it gets.
//! 6. `scenarios`: the tests, a file per subject. Steps that several of them take are in `steps`.
//! 7. `testbed`: everything ready to boot, and one booted machine.
//! 8. What the command line starts: `queue` and `runner`, `report`, `measure`, `demo`, `shell`.

#![forbid(unsafe_code)]

pub mod agent;
pub mod consoles;
pub mod cpio;
pub mod debian;
pub mod demo;
pub mod dom0;
pub mod elf;
pub mod fetch;
pub mod guest;
pub mod headers;
pub mod host;
pub mod image;
pub mod inputs;
pub mod kernels;
pub mod late;
pub mod limits;
pub mod measure;
pub mod paths;
pub mod payloads;
pub mod previous;
pub mod profile;
pub mod proto;
pub mod qemu;
pub mod qemu_faults;
pub mod queue;
pub mod report;
pub mod results;
pub mod room;
pub mod runner;
pub mod scenario;
pub mod scenarios;
pub mod shell;
pub mod source;
pub mod suites;
pub mod testbed;
pub mod toolchain;
pub mod verdict;
pub mod watched;
