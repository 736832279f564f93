//! The bench of xen-locus: nested Xen under QEMU, without KVM and without root.
//!
//! `fetch` gets Debian packages, `image` makes boot images of them, `qemu` boots them, `dom0` and
//! `guest` run commands there through the `agent`, `scenario` is what tests are written against,
//! and `runner` runs them.

pub mod agent;
pub mod bench;
pub mod cpio;
pub mod demo;
pub mod dom0;
pub mod elf;
pub mod fetch;
pub mod guest;
pub mod headers;
pub mod host;
pub mod image;
pub mod kernels;
pub mod limits;
pub mod measure;
pub mod paths;
pub mod payloads;
pub mod proto;
pub mod qemu;
pub mod runner;
pub mod scenario;
pub mod scenarios;
pub mod shell;
pub mod source;
pub mod toolchain;
pub mod verdict;
