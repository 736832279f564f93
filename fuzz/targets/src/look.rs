//! What `info` reads of a kernel, by subject. Errors are ignored.

use locus_kernel::cpu::Cpu;
use locus_kernel::modules::ModuleReader;
use locus_kernel::orc::OrcRows;
use locus_kernel::tasks::{DetailLayout, TaskLayout};
use locus_kernel::vmcoreinfo::VmcoreInfo;
use locus_kernel::Kernel;

/// Reads all subjects.
pub fn all(kernel: &Kernel<'_>) {
    symbols(kernel);
    tasks(kernel);
    modules(kernel);
    cpu(kernel);
    orc(kernel);
    let _ = kernel.notes();
    if let Ok(Some(info)) = VmcoreInfo::read(kernel) {
        let _ = info.check(kernel);
    }
}

/// Finds every symbol by its name and by its address.
pub fn symbols(kernel: &Kernel<'_>) {
    for symbol in kernel.symbols.iter() {
        assert!(kernel.symbols.addr(&symbol.name).is_some());
        let _ = kernel.symbols.covering(symbol.addr);
        let _ = kernel.symbols.room(symbol.addr);
    }
}

/// Reads all tasks, with what `info --tasks` adds.
pub fn tasks(kernel: &Kernel<'_>) {
    let space = kernel.space.fresh();
    let tasks = TaskLayout::of(kernel).and_then(|layout| layout.all(kernel, &space));
    let details = DetailLayout::of(kernel);
    for task in tasks.unwrap_or_default() {
        plain(&task.comm);
        if let Ok(details) = &details {
            let _ = details.read(&space, task.addr);
        }
    }
}

/// Reads all modules, with their symbols and types.
pub fn modules(kernel: &Kernel<'_>) {
    let _ = kernel.module_count();
    let Ok(mut reader) = ModuleReader::new(kernel) else {
        return;
    };
    let _ = reader.each(|reader, module| {
        plain(&module.name);
        plain(&module.taints);
        module.used_by.iter().for_each(|name| plain(name));
        for symbol in reader.symbols(module)? {
            plain(&symbol.name);
        }
        if let Some(btf) = reader.btf(module)? {
            let _ = btf.describe("only_here", kernel.space.budget());
        }
        Ok(())
    });
}

/// Reads the processor's features, bugs and mitigations.
pub fn cpu(kernel: &Kernel<'_>) {
    if let Ok(cpu) = Cpu::read(kernel) {
        let names = cpu.features().into_iter().chain(cpu.bugs());
        for name in names {
            plain(name);
            assert!(cpu.named(name).is_some());
        }
        for (name, choice) in cpu.mitigations() {
            plain(name);
            plain(choice);
        }
        let _ = (cpu.pti(), cpu.return_thunk());
    }
}

/// Reads the kernel's ORC table.
pub fn orc(kernel: &Kernel<'_>) {
    if let Ok(orc) = OrcRows::read(kernel) {
        rows(&orc);
    }
}

/// Looks up every address that `orc` has a row for, and the addresses beside it.
pub fn rows(orc: &OrcRows) {
    let mut all = orc.iter().peekable();
    while let Some((ip, row)) = all.next() {
        let last = all.peek().is_none_or(|next| next.0 != ip);
        if let (Some(found), true) = (orc.row(ip), last) {
            assert_eq!(found, row, "{ip}");
        }
        for near in [ip.0.wrapping_sub(1), ip.0.wrapping_add(1)] {
            let _ = orc.row(locus_guest::addr::Gva(near));
        }
    }
}

/// Checks that `text` has no control characters, which a terminal would obey.
pub fn plain(text: &str) {
    assert!(!text.chars().any(char::is_control), "{text:?}");
}
