//! Saved cores, from the headers to what `info` reads in them.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use locus_guest::addr::PAGE_LEN;
use locus_guest::core::Core;
use locus_guest::GuestType;
use locus_kernel::fixture_world::World;
use locus_kernel::Kernel;

use super::look;

/// A file without a name.
fn file() -> File {
    let thread = std::thread::current().id();
    let name = format!("xen-locus-fuzz-{}-{thread:?}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let file = File::create(&path).unwrap();
    fs::remove_file(&path).unwrap();
    file
}

thread_local! {
    static FILE: File = file();
    static WHOLE: Vec<u8> = World::new(GuestType::Pvh).core();
}

/// The core whose file begins with `data`; the rest of the file is that of a good core.
fn open(data: &[u8]) -> Result<Core, locus_guest::Error> {
    FILE.with(|file| {
        file.set_len(data.len() as u64).unwrap();
        file.write_all_at(data, 0).unwrap();
        let rest = |whole: &Vec<u8>| {
            let rest = whole.get(data.len()..).unwrap_or_default();
            file.write_all_at(rest, data.len() as u64)
        };
        WHOLE.with(rest).unwrap();
        Core::open(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())))
    })
}

/// `data` is the beginning of a core's file. With whole files the corpus would grow too big.
pub fn run(data: &[u8]) {
    let Ok(core) = open(data) else {
        return;
    };
    if let Ok(kernel) = Kernel::of_saved(&core, core.kind(), core.vcpus()) {
        look::all(&kernel);
    }
}

/// Cores of a PV and a PVH guest, without their pages.
pub fn seeds() -> Vec<Vec<u8>> {
    [GuestType::Pv, GuestType::Pvh]
        .map(|kind| {
            let world = World::new(kind);
            let mut core = world.core();
            core.truncate(core.len() - world.pages().len() * PAGE_LEN);
            core
        })
        .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_have_kernels() {
        for seed in seeds() {
            let core = open(&seed).unwrap();
            let kernel = Kernel::of_saved(&core, core.kind(), core.vcpus()).unwrap();
            assert!(kernel.btf().is_ok());
        }
    }
}
