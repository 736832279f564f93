//! Saved cores.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::look;
use crate::guest::core::Core;
use crate::guest::GuestType;
use crate::kernel::fixture_world::World;
use crate::kernel::Kernel;

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
}

/// The core whose file has the content `data`.
fn open(data: &[u8]) -> Result<Core, crate::guest::Error> {
    FILE.with(|file| {
        file.set_len(0).unwrap();
        file.write_all_at(data, 0).unwrap();
        Core::open(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())))
    })
}

/// `data` is a core's file.
pub fn run(data: &[u8]) {
    let Ok(core) = open(data) else {
        return;
    };
    if let Ok(kernel) = Kernel::of_saved(&core, core.kind(), core.vcpus()) {
        look::all(&kernel);
    }
}

/// Cores of a PV and a PVH guest.
pub fn seeds() -> Vec<Vec<u8>> {
    [GuestType::Pv, GuestType::Pvh]
        .map(|kind| World::new(kind).core())
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
