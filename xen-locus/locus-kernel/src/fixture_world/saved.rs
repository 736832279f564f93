//! The fixture's guest, saved and read back.

use locus_guest::core::Core;
use locus_guest::GuestType;

use super::World;
use crate::Kernel;

fn core(world: &World) -> Core {
    let name = format!(
        "locus-kernel-saved-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    );
    let path = std::env::temp_dir().join(name);
    std::fs::write(&path, world.core()).unwrap();
    let core = Core::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    core
}

#[test]
fn registers_are_read_back() {
    for kind in [GuestType::Pv, GuestType::Hvm] {
        let world = World::new(kind);
        let core = core(&world);
        for (before, after) in world.vcpus.iter().zip(core.vcpus()) {
            let mut expected = before.clone();
            if kind == GuestType::Hvm {
                expected.entry = None;
            }
            assert_eq!(format!("{expected:?}"), format!("{after:?}"));
        }
    }
}

#[test]
fn the_kernel_in_a_core_is_the_kernel_that_was_saved() {
    for kind in [GuestType::Pv, GuestType::Pvh, GuestType::Hvm] {
        let world = World::new(kind);
        let core = core(&world);
        let kernel = Kernel::of_saved(&core, core.kind(), core.vcpus()).unwrap();
        let live = Kernel::read(&world.memory, kind, &world.vcpus).unwrap();
        assert_eq!(kernel.kind, kind);
        assert_eq!(kernel.build_id, live.build_id);
        assert!(kernel.symbols.iter().eq(live.symbols.iter()));
    }
}
