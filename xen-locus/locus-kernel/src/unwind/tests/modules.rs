//! A frame in a module, whose rows are read at first use.

use super::*;
use crate::Kernel;

/// Where a module is: its text, its table, and its `struct module`.
const MODULE: u64 = 0xffff_ffff_c000_0000;

/// Loads a module into the world: one function that calls at its first byte, and rows for it and for
/// init code that is gone.
fn load(world: &World, kernel: &Kernel<'_>) {
    let row = |format| crate::orc::sample::frame(format, 0xd0);
    let format = crate::fixture_world::frames::FORMAT;
    let mut table = Vec::new();
    let (ips, rows) = (MODULE + 0x1000, MODULE + 0x1100);
    for (n, ip) in (0..).zip([MODULE + 0x100, MODULE + 0x8000]) {
        table.extend((ip.wrapping_sub(ips + 4 * n) as u32).to_le_bytes());
    }
    table.resize(0x100, 0);
    table.extend([row(format), row(format)].concat());
    let mut text = vec![0xcc; 0x200];
    text[0x100..0x105].copy_from_slice(&[0xe8, 0, 0, 0, 0]);
    let modules = kernel.symbols.addr("modules").unwrap();
    let mut module = vec![0; 0x1000];
    let btf = kernel.btf().unwrap();
    let list = btf.offset_of("module", "list").unwrap() as u64;
    let mut put = |member: &str, value: u64| {
        let at = btf.offset_of("module", member).unwrap();
        module[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    let sources = MODULE + 0x2000 + btf.offset_of("module", "source_list").unwrap() as u64;
    put("list", modules.0);
    put("source_list", sources);
    put("core_layout.base", MODULE);
    put("core_layout.size", 0x200);
    put("arch.num_orcs", 2);
    put("arch.orc_unwind_ip", ips);
    put("arch.orc_unwind", rows);
    for (at, bytes) in [(0, text), (0x1000, table), (0x2000, module)] {
        world.memory.map_bytes(Gva(MODULE + at), &bytes, true, true);
    }
    let head = kernel.space.walk(modules).unwrap().frame;
    let node = (MODULE + 0x2000 + list).to_le_bytes();
    world.memory.fill(head, modules.offset(), &node);
}

#[test]
fn a_modules_rows_are_read_when_they_are_wanted() {
    let world = World::new(GuestType::Pvh);
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let mut walker = Walker::new(&kernel).unwrap();
    let stacks = Stacks::asleep().words(&[(TOP - 0xd0 - 8, MODULE + 0x105)]);
    let walk = |walker: &Walker<'_, '_>| walker.sleeping(Gva(ASLEEP), stacks.all()[0], false);
    assert_eq!(walk(&walker).end, Err(Unreliable::NoRow));
    load(&world, &kernel);
    walker.refresh().unwrap();
    let found = walk(&walker);
    assert_eq!(found.end, Ok(WalkEnd::User));
    let names = frame_names::FrameNames::read(&kernel).unwrap();
    let words: Vec<String> = found.frames.iter().map(|&f| names.of(f)).collect();
    // It has no symbols.
    assert_eq!(
        words,
        [
            "__schedule+0x5/0x100",
            "0xffffffffc0000105",
            "entry_SYSCALL_64_after_hwframe+0x5/0x100"
        ]
    );
}
