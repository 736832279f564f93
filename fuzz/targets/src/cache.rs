//! Cache files, which hold symbols and types of a kernel.

use locus_guest::GuestType;
use locus_kernel::fixture::with_kept;
use locus_kernel::fixture_world::World;
use locus_kernel::CachedKernel;
use locus_kernel::Kernel;
use xen_locus::storage::kernel_cache::{format, parse, with_header};

use super::look;

thread_local! {
    static WORLD: World = World::new(GuestType::Pvh);
}

/// `data` is a cache file. Its magic number and checksum are corrected, and the guest is read with what the
/// file holds.
pub fn run(data: &[u8]) {
    let Some(kept) = parse(&with_header(data.to_vec())) else {
        return;
    };
    WORLD.with(|world| {
        let kernel = with_kept(&world.memory, &world.vcpus, kept);
        kernel.iter().for_each(look::all);
    });
}

/// Cache files of the fixture guest, with its types and without.
pub fn seeds() -> Vec<Vec<u8>> {
    WORLD.with(|world| {
        let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
        [kernel.btf().unwrap().bytes().to_vec(), Vec::new()]
            .map(|btf| {
                let kept = CachedKernel {
                    text_base: kernel.text_base.0,
                    release: kernel.release.clone(),
                    build_id: kernel.build_id.clone().unwrap(),
                    symbols: kernel.symbols.clone(),
                    btf,
                };
                format(&kept).unwrap()
            })
            .to_vec()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_seeds_keep_is_believed() {
        for seed in seeds() {
            let kept = parse(&seed).unwrap();
            WORLD.with(|world| {
                let kernel = with_kept(&world.memory, &world.vcpus, kept).unwrap();
                assert_eq!(kernel.release, "6.1.0-test");
            });
        }
    }
}
