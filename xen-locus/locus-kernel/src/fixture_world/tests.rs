//! The small guest is found as a kernel, live and saved, and refused if an anchor is missing.

use locus_guest as guest;
use locus_guest::space::Region;

use super::*;
use crate::tasks::{self, TaskLayout};
use crate::unwind::stack::CpuStacks;
use crate::{locate, Error, Kernel};

/// Its kernel is found, live and saved, and its tasks are read.
fn is_found(world: &World, what: &str) {
    let mut no_entry = world.vcpus.clone();
    no_entry.iter_mut().for_each(|v| v.entry = None);
    let live = Kernel::read(&world.memory, GuestType::Pvh, &world.vcpus).unwrap();
    let saved = Kernel::of_saved(&world.memory, GuestType::Hvm, &no_entry).unwrap();
    for kernel in [&live, &saved] {
        assert_eq!(kernel.text_base, TEXT, "{what}");
        assert_eq!(kernel.kind, GuestType::Pvh, "{what}");
        let variables = |r: &Region| r.writable && r.range.contains(DATA);
        assert!(kernel.regions.iter().any(variables), "{what}");
        let tasks = TaskLayout::of(kernel).unwrap();
        let tasks = tasks.all(kernel, &kernel.space).unwrap();
        let names: Vec<&str> = tasks.iter().map(|t| t.comm.as_str()).collect();
        assert_eq!(names, ["init", "sleeper", "busy", "swapper/0", "swapper/1"]);
    }
}

#[test]
fn the_kernel_is_found_with_four_and_five_levels() {
    let world = || World::new(GuestType::Pvh);
    is_found(&world(), "four");
    is_found(&world().with_five_levels(), "five");
}

#[test]
fn with_isolation_the_kernel_is_found_whatever_the_user_half_has_of_it() {
    for cloned in [Cloned::EntryCode, Cloned::CodeAndConstants] {
        let world = || World::new(GuestType::Pvh);
        is_found(&world().with_isolation(cloned), "four");
        is_found(&world().with_five_levels().with_isolation(cloned), "five");
        // One vCPU is idle, or in entry code, which is in kernel mode and still on the user half.
        for root_of_idle in [-1, 0] {
            let mut mixed = world().with_isolation(cloned);
            let user_half = mixed.vcpus[0].root.0;
            mixed.vcpus[0].root = Frame(user_half.wrapping_add_signed(root_of_idle));
            mixed.vcpus[0].user = false;
            is_found(&mixed, "mixed");
        }
    }
}

#[test]
fn an_image_with_holes_is_found_without_isolation_too() {
    let world = World::new(GuestType::Pvh);
    world.unmap(Gva(RODATA.0 - PAGE_SIZE));
    is_found(&world, "four");
}

/// The guest with isolation, and another kernel's text in its kernel half.
fn with_a_strange_kernel_half() -> World {
    let world = World::new(GuestType::Pvh).with_isolation(Cloned::EntryCode);
    let own = world.memory.frame();
    let kernel_half = Space::new(&world.memory, Frame(world.vcpus[0].root.0 - 1), 4);
    let (table, slot, entry) = kernel_half.entry_slot(ENTRY, 1).unwrap();
    // The user half has a table of its own, so it goes on mapping the old page.
    let strange = (own.0 << 12) | entry & !PTE_FRAME;
    world.memory.set_entry(table, slot, strange);
    world
}

#[test]
fn a_kernel_half_with_other_code_than_the_user_half_is_refused() {
    let mut world = with_a_strange_kernel_half();
    let error = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap_err();
    assert!(error.to_string().contains("another page"), "{error}");
    world.vcpus.iter_mut().for_each(|v| v.entry = None);
    let saved = Kernel::of_saved(&world.memory, world.kind, &world.vcpus);
    assert!(matches!(saved, Err(Error::NotLinux(_))));
}

#[test]
fn the_page_before_a_root_that_has_the_kernel_is_not_looked_at() {
    // A root with an odd number. Before it is what leads to the same code, but elsewhere for `init_top_pgt`.
    let world = World::new(GuestType::Pvh).with_isolation(Cloned::EntryCode);
    let root = world.vcpus[0].root;
    let before = Frame(root.0 - 1);
    world.copy_table(before, root);
    world.memory.map_page(TABLES, root, true, false);
    let (table, slot) = world.own_tables(before, TABLES);
    let forged = world.memory.frame();
    world.memory.set_entry(table, slot, forged.0 << 12 | 3);
    is_found(&world, "odd");
    // Nor is the page before the root of a PV guest, which has no isolation.
    let world = World::new(GuestType::Pvh).with_isolation(Cloned::EntryCode);
    let error = Kernel::read(&world.memory, GuestType::Pv, &world.vcpus).unwrap_err();
    assert!(matches!(error, Error::NotLinux(_)), "{error}");
}

#[test]
fn modules_behind_the_image_are_none_of_it() {
    // A kernel without KASLR has modules from 512 MiB on, and the first piece may be variables.
    let module = Gva(locate::KERNEL_MAP.0 + (512 << 20));
    let end = TABLES.plus(PAGE_SIZE);
    let world = World::with(GuestType::Pvh, |f| {
        f.symbols.push((end.0, 'B', "_end".to_owned()));
    });
    world.memory.map_bytes(module, &[1; 64], true, false);
    let code = module.plus(4 * PAGE_SIZE);
    world.memory.map_bytes(code, &[0x90; 64], false, true);
    is_found(&world, "modules");
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let last = kernel.regions.last().unwrap();
    assert!(last.range.contains(TABLES), "{last:?}");
}

#[test]
fn a_vcpu_that_runs_a_guest_of_the_guest_does_not_hide_its_kernel() {
    let error_of =
        |world: &World| Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap_err();
    // Another Linux, or another system.
    for entry in [TEXT.0 + (512 << 20), 0xffff_f800_0000_1000] {
        let nested = |world: &mut World, nth: usize| {
            world.vcpus[nth].entry = Some(Gva(entry));
            world.vcpus[nth].root = world.memory.frame();
        };
        let mut world = World::new(GuestType::Pvh);
        nested(&mut world, 0);
        let found = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
        assert_eq!(found.text_base, TEXT, "{entry:#x}");
        // All of them do so.
        nested(&mut world, 1);
        let error = error_of(&world);
        assert!(matches!(error, Error::NotLinux(_)), "{error}");
        assert!(error.to_string().contains("try again"), "{error}");
    }
    // Its entry point is inside of the guest's own kernel, where no function begins.
    let mut world = World::new(GuestType::Pvh);
    world.vcpus[0].entry = world.vcpus[0].entry.map(|own| own.plus(1));
    let found = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    assert_eq!(found.text_base, TEXT);
    // Neither kernel is found: that passes.
    let mut world = World::new(GuestType::Pvh);
    world.vcpus[0].entry = Some(TEXT.plus(512 << 20));
    for vcpu in 0..2 {
        world.vcpus[vcpu].root = world.memory.frame();
    }
    let error = error_of(&world);
    assert!(matches!(error, Error::NotReady(_)), "{error}");
    assert!(error.to_string().contains("several kernels"), "{error}");
}

#[test]
fn a_live_guest_without_an_entry_point_is_not_guessed_at() {
    let mut world = World::new(GuestType::Pvh);
    world.vcpus.iter_mut().for_each(|v| v.entry = None);
    let error = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap_err();
    assert!(matches!(error, Error::NotReady(_)), "{error}");
}

/// Gives the pages of the image that `which` chooses these rights.
fn set_rights(world: &World, which: impl Fn(&Region) -> bool, writable: bool, executable: bool) {
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    for region in kernel.regions.iter().filter(|r| which(r)) {
        for at in (region.range.start.0..region.range.end.0).step_by(PAGE_LEN) {
            let frame = kernel.space.walk(Gva(at)).unwrap().frame;
            world.memory.map_page(Gva(at), frame, writable, executable);
        }
    }
}

#[test]
fn a_kernel_that_has_not_protected_its_memory_yet_still_boots() {
    let error = |world: &World| {
        let error = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap_err();
        assert!(error.to_string().contains("still booting"), "{error}");
        error
    };
    // Before it begins: all of it can be written and executed.
    let world = World::new(GuestType::Pvh);
    set_rights(&world, |_| true, true, true);
    assert!(matches!(error(&world), Error::NotReady(_)));
    // After a crash, another CPU may still be where the last kernel left it.
    let mut world = World::new(GuestType::Pvh);
    set_rights(&world, |_| true, true, true);
    world.vcpus[0].entry = Some(TEXT.plus(512 << 20));
    assert!(matches!(error(&world), Error::NotReady(_)));
    // So it is in a PV guest, but for page tables, which the guest may not write.
    let world = World::new(GuestType::Pv);
    set_rights(&world, |r| r.range.contains(RODATA), true, true);
    let table = world.memory.frame();
    world
        .memory
        .map_page(RODATA.plus(1 << 20), table, false, false);
    assert!(matches!(error(&world), Error::NotReady(_)));
    // Code and constants are read-only already, and only the variables can be executed still.
    let world = World::new(GuestType::Pvh);
    set_rights(&world, |r| !r.writable, false, true);
    let variables = world.memory.frame();
    world
        .memory
        .map_page(Gva(RODATA.0 - PAGE_SIZE), variables, true, true);
    assert!(matches!(error(&world), Error::NotReady(_)));
    // What has no such memory may be another system. It is said what to do if it is not.
    let world = World::new(GuestType::Pvh);
    set_rights(&world, |r| !r.writable, false, true);
    assert!(matches!(error(&world), Error::NotLinux(_)));
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
        let memory = &world.memory;
        memory.map_bytes(before, &[0x90; 64], false, true);
        memory.map_bytes(before.plus(PAGE_SIZE), &[7; 64], false, false);
        memory.map_bytes(before.plus(2 * PAGE_SIZE), &[7; 64], true, false);
    })
    .unwrap();
}

#[test]
fn a_guest_in_a_pv_shim_is_told_by_name() {
    let mut world = World::new(GuestType::Pvh);
    let entry = Gva(0xffff_82d0_4020_1000);
    world.vcpus.iter_mut().for_each(|v| v.entry = Some(entry));
    let error = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap_err();
    assert!(
        matches!(&error, Error::NotLinux(why) if why.contains("pvshim=1")),
        "{error}"
    );
}

#[test]
fn what_many_symbols_of_one_name_cost_is_paid() {
    let world = World::with(GuestType::Pvh, |f| {
        let one = (TEXT.0 + 0x1000, 't', "twin".to_owned());
        f.symbols.extend(std::iter::repeat_n(one, 20_000));
    });
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let spent = |look: &dyn Fn()| {
        let before = kernel.space.budget().spent();
        look();
        kernel.space.budget().spent() - before
    };
    let found = || assert_eq!(kernel.symbols.addr("twin"), Some(Gva(TEXT.0 + 0x1000)));
    assert_eq!(spent(&found), 5000);
    assert_eq!(
        spent(&|| assert!(kernel.function("twin", 0).is_err())),
        25_000
    );
    // The rest of the kernel's names cost nothing.
    let layout = || assert!(TaskLayout::of(&kernel).is_ok());
    assert!(spent(&layout) < 10);
    kernel.space.budget().spend(u64::MAX).unwrap_err();
    found();
    let error = kernel.function("twin", 1).unwrap_err();
    assert!(matches!(error, Error::Memory(guest::Error::Exhausted)));
}

#[test]
fn what_the_stacks_of_cpus_have_in_common_is_looked_up_once() {
    let world = World::with(GuestType::Pvh, |f| {
        let one = (TEXT.0 + 0x1000, 't', "cea_exception_stacks".to_owned());
        f.symbols.extend(std::iter::repeat_n(one, 20_000));
    });
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let space = kernel.space.fresh();
    let stacks = CpuStacks::new(&kernel).unwrap();
    let before = space.budget().spent();
    for base in PERCPU.into_iter().cycle().take(100) {
        stacks.of_cpu(&space, base).unwrap();
    }
    assert!(space.budget().spent() - before < 1000);
}

#[test]
fn no_more_cpus_are_believed_than_there_can_be() {
    let world = World::new(GuestType::Pvh);
    let mut kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let bases = |kernel: &Kernel<'_>| tasks::percpu_bases(kernel, &kernel.space).unwrap();
    assert_eq!(bases(&kernel), PERCPU);
    kernel.cpus_max = 1;
    assert_eq!(bases(&kernel), PERCPU[..1]);
}
