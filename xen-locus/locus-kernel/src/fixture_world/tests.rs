//! The small guest is found as a kernel, live and saved, and refused if an anchor is missing.

use super::*;
use crate::tasks::TaskLayout;
use crate::{Error, Kernel};

#[test]
fn the_kernel_is_found_with_four_and_five_levels_and_isolation() {
    let worlds = [
        World::new(GuestType::Pvh),
        World::new(GuestType::Pvh).with_five_levels(),
        World::new(GuestType::Pvh).with_isolation(),
        World::new(GuestType::Pvh)
            .with_five_levels()
            .with_isolation(),
    ];
    for (n, world) in worlds.into_iter().enumerate() {
        let mut no_entry = world.vcpus.clone();
        no_entry.iter_mut().for_each(|v| v.entry = None);
        let live = Kernel::read(&world.memory, GuestType::Pvh, &world.vcpus).unwrap();
        let saved = Kernel::of_saved(&world.memory, GuestType::Hvm, &no_entry).unwrap();
        for kernel in [&live, &saved] {
            assert_eq!(kernel.text_base, TEXT, "{n}");
            assert_eq!(kernel.kind, GuestType::Pvh, "{n}");
            let tasks = TaskLayout::of(kernel).unwrap();
            let tasks = tasks.all(kernel, &kernel.space).unwrap();
            let names: Vec<&str> = tasks.iter().map(|t| t.comm.as_str()).collect();
            assert_eq!(names, ["init", "sleeper", "busy", "swapper/0", "swapper/1"]);
        }
    }
}

#[test]
fn a_live_guest_without_an_entry_point_is_not_guessed_at() {
    let mut world = World::new(GuestType::Pvh);
    world.vcpus.iter_mut().for_each(|v| v.entry = None);
    let error = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap_err();
    assert!(matches!(error, Error::NotReady(_)), "{error}");
}

/// What is made of a saved guest after `change`.
fn saved(change: impl FnOnce(&mut World)) -> Result<(), Error> {
    let mut world = World::new(GuestType::Hvm);
    world.vcpus.iter_mut().for_each(|v| v.entry = None);
    change(&mut world);
    let kernel = Kernel::of_saved(&world.memory, world.kind, &world.vcpus)?;
    assert_eq!(kernel.kind, GuestType::Hvm);
    Ok(())
}

fn no_percpu(world: &mut World) {
    for vcpu in &mut world.vcpus {
        (vcpu.gs_base, vcpu.gs_other) = (Gva(0), Gva(PERCPU[0] + 8));
    }
}

/// `init_top_pgt` is another page than a root.
fn no_root(world: &mut World) {
    let page = world.memory.frame();
    world.memory.map_page(TABLES, page, true, false);
}

#[test]
fn a_saved_kernel_needs_one_more_anchor_than_its_text() {
    saved(|_| ()).unwrap();
    saved(no_percpu).unwrap();
    let error = saved(|world| {
        no_percpu(world);
        no_root(world);
    });
    assert!(matches!(error, Err(Error::NotLinux(_))), "{error:?}");
}

#[test]
fn a_run_without_symbols_before_the_kernel_is_passed_over() {
    saved(|world| {
        let before = Gva(TEXT.0 - (4 << 20));
        world.memory.map_bytes(before, &[0x90; 64], false, true);
        world
            .memory
            .map_bytes(before.plus(4096), &[7; 64], false, false);
    })
    .unwrap();
}
