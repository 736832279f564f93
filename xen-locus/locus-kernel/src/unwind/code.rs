//! What a walk needs to know of code: the ORC rows for it, where calls end, and the places that
//! hide a caller or move the stack pointer.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;

use iced_x86::{Decoder, DecoderOptions, Mnemonic};
use locus_guest as guest;
use locus_guest::addr::{Gva, Range};
use locus_guest::space::{if_mapped, Space};

use crate::modules::{Module, ModuleReader};
use crate::orc::{OrcRow, OrcRows};
use crate::{Error, Kernel};

/// Longest `call`, in bytes: prefix, REX, opcode, ModRM, SIB, displacement, and one to spare.
const CALL_MAX: usize = 9;
/// Shortest `call`, in bytes.
const CALL_MIN: usize = 2;
/// Bytes of one entry of `hypercall_page`.
const HYPERCALL: usize = 32;
/// Bytes of the whole page.
const HYPERCALLS: u64 = 4096;
/// Most return addresses whose code is remembered.
const KNOWN_MAX: usize = 1 << 16;

/// Most rows kept of all modules together: four times what Debian's kernels have themselves, and 40
/// MiB of the largest rows that are believed.
const ROWS_MAX: usize = 1 << 21;

/// Trampolines that a return address may have been exchanged for. The real address is only in lists
/// of the kernel (`unwind_recover_ret_addr`, arch/x86/include/asm/unwind.h).
const HIDING: [&str; 4] = [
    "arch_rethook_trampoline",
    "__kretprobe_trampoline",
    "kretprobe_trampoline",
    "return_to_handler",
];

/// Functions by which the kernel begins to exchange return addresses, each with the trampolines of which it then has one
/// (kernel/kprobes.c, kernel/trace/rethook.c, kernel/trace/fgraph.c).
const HIDERS: [(&str, &[&str]); 3] = [
    (
        "register_kretprobe",
        &[
            "arch_rethook_trampoline",
            "__kretprobe_trampoline",
            "kretprobe_trampoline",
        ],
    ),
    ("rethook_hook", &["arch_rethook_trampoline"]),
    ("register_ftrace_graph", &["return_to_handler"]),
];

/// A function by which `kernel` begins to exchange return addresses for a trampoline that has none of the names here, and
/// these names: then [`hiding`] does not know all. `None` if there is no such function.
#[must_use]
pub fn unknown_hider(kernel: &Kernel<'_>) -> Option<(&'static str, Gva, &'static [&'static str])> {
    HIDERS.iter().find_map(|&(function, trampolines)| {
        let at = kernel.symbols.addr(function)?;
        let mut known = trampolines.iter();
        let has_one = known.any(|name| kernel.symbols.addr(name).is_some());
        (!has_one).then_some((function, at, trampolines))
    })
}

/// The trampolines that `kernel` may have exchanged return addresses for, by name, each with its
/// range of guest virtual addresses. A stack with such an address hides a caller (kretprobes,
/// function graph tracing).
pub fn hiding<'k>(kernel: &'k Kernel<'_>) -> impl Iterator<Item = (&'static str, Range)> + 'k {
    HIDING.iter().filter_map(|&name| {
        let at = kernel.symbols.addr(name)?;
        // On a stack there is the address of its first byte. Behind the last symbol, that byte is
        // all that is known.
        let room = kernel.symbols.room(at).unwrap_or(1);
        Some((name, Range::new(at, room)))
    })
}

/// Code of the kernel and of its modules.
pub struct CodeMap<'k, 'm> {
    kernel: &'k Kernel<'m>,
    space: Space<'m>,
    orc: OrcRows,
    modules: Vec<ModuleRows>,
    room: RowBudget,
    hiding: Vec<(&'static str, Range)>,
    /// Where a new task begins: `ret_from_fork`, or in later kernels `ret_from_fork_asm`.
    first: Vec<Gva>,
    hypercalls: Option<Range>,
    known: RefCell<HashMap<Gva, bool>>,
}

/// Room for rows of modules.
struct RowBudget(Cell<usize>);

impl RowBudget {
    fn new() -> RowBudget {
        RowBudget(Cell::new(ROWS_MAX))
    }

    /// Takes room for `rows`; `None` when there is not so much left.
    fn take(&self, rows: usize) -> Option<()> {
        self.0.set(self.0.get().checked_sub(rows)?);
        Some(())
    }
}

/// A module whose ORC table is read when it is wanted.
struct ModuleRows {
    text: Vec<Range>,
    tables: (Gva, Gva, usize),
    orc: OnceCell<Option<OrcRows>>,
}

impl<'k, 'm> CodeMap<'k, 'm> {
    /// Reads the kernel's ORC table, and where the tables of the modules are.
    ///
    /// # Errors
    /// As [`OrcRows::read`], and if the list of modules can't be read.
    pub fn read(kernel: &'k Kernel<'m>) -> Result<CodeMap<'k, 'm>, Error> {
        let symbol = |name| kernel.symbols.addr(name);
        let first = ["ret_from_fork", "ret_from_fork_asm"];
        let mut code = CodeMap {
            kernel,
            space: kernel.space.fresh(),
            orc: OrcRows::read(kernel)?,
            modules: Vec::new(),
            room: RowBudget::new(),
            hiding: hiding(kernel).collect(),
            first: first.iter().filter_map(|name| symbol(name)).collect(),
            hypercalls: symbol("hypercall_page").map(|at| Range::new(at, HYPERCALLS)),
            known: RefCell::default(),
        };
        code.refresh()?;
        Ok(code)
    }

    /// Lists the modules again, and forgets what was known of code.
    ///
    /// # Errors
    /// The list can't be read.
    pub fn refresh(&mut self) -> Result<(), Error> {
        self.space = self.kernel.space.fresh();
        self.known.borrow_mut().clear();
        let btf = self.kernel.btf()?;
        let member = |path, bytes| btf.offset_of_sized("module", path, bytes);
        let (ips, rows, count) = (
            member("arch.orc_unwind_ip", 8)?,
            member("arch.orc_unwind", 8)?,
            member("arch.num_orcs", 4)?,
        );
        let space = &self.space;
        let loaded = |module: &Module| {
            let at = |offset: usize| module.addr.plus(offset as u64);
            let text = |kind: &str| ["core", "init", "text", "init_text"].contains(&kind);
            let parts = module.parts.iter().filter(|p| text(&p.kind));
            Ok(ModuleRows {
                text: parts.map(|p| p.range).collect(),
                tables: (
                    Gva(space.read_u64(at(ips))?),
                    Gva(space.read_u64(at(rows))?),
                    space.read_u32(at(count))? as usize,
                ),
                orc: OnceCell::new(),
            })
        };
        self.modules = ModuleReader::new(self.kernel)?.each(|_, module| loaded(module))?;
        self.room = RowBudget::new();
        Ok(())
    }

    /// What one frame costs, in units of the guest's budget: each module is asked whether the frame is in it.
    pub fn frame_units(&self) -> u64 {
        2 + self.modules.len() as u64 / 32
    }

    /// The row that applies at `ip`. Code of a module has none if the module's table can't be read,
    /// or if the tables of other modules have used up the room.
    pub fn row(&self, ip: Gva) -> Option<OrcRow> {
        if let Some(row) = self.orc.row(ip) {
            return Some(row);
        }
        let holds = |m: &&ModuleRows| m.text.iter().any(|range| range.contains(ip));
        let module = self.modules.iter().find(holds)?;
        let read = || {
            self.room.take(module.tables.2)?;
            let text = module.text.clone();
            OrcRows::of_module(self.kernel, &self.space, module.tables, text).ok()
        };
        module.orc.get_or_init(read).as_ref()?.row(ip)
    }

    /// The row for `ip` in code that the kernel has discarded since it booted.
    pub fn row_discarded(&self, ip: Gva) -> Option<OrcRow> {
        self.orc.row_discarded(ip)
    }

    /// Whether a `call` ends right before `at`.
    pub fn is_after_call(&self, at: Gva) -> bool {
        if let Some(&known) = self.known.borrow().get(&at) {
            return known;
        }
        // A walk through code that can't be read is not reliable.
        let is = ends_call(&self.space, at).unwrap_or(false);
        let mut known = self.known.borrow_mut();
        if known.len() >= KNOWN_MAX {
            known.clear();
        }
        known.insert(at, is);
        is
    }

    /// The name of the trampoline that `ip` is in, if it is one that hides the caller.
    pub fn hiding(&self, ip: Gva) -> Option<&'static str> {
        let holds = |(_, range): &&(&str, Range)| range.contains(ip);
        self.hiding.iter().find(holds).map(|&(name, _)| name)
    }

    /// Whether a task that never ran begins at `ip`.
    pub fn is_first(&self, ip: Gva) -> bool {
        self.first.contains(&ip)
    }

    /// Bytes that the hypervisor's code in `hypercall_page` has pushed before `ip`; 0 for all other
    /// code, `None` in the middle of an instruction.
    ///
    /// The kernel has rows for that page as if nothing was pushed. But Xen saves two registers of a
    /// PV guest around its `syscall` (xen/arch/x86/pv/hypercall.c: `pv_ring3_init_hypercall_page`).
    pub fn pushed(&self, ip: Gva) -> Option<u64> {
        if !self.hypercalls.is_some_and(|page| page.contains(ip)) {
            return Some(0);
        }
        let start = Gva(ip.0 & !(HYPERCALL as u64 - 1));
        let mut bytes = [0; HYPERCALL];
        self.space.read(start, &mut bytes).ok()?;
        let mut decoder = Decoder::with_ip(64, &bytes, start.0, DecoderOptions::NONE);
        let mut pushed = 0u64;
        while decoder.ip() < ip.0 {
            match decoder.decode().mnemonic() {
                Mnemonic::INVALID => return None,
                Mnemonic::Push => pushed += 8,
                Mnemonic::Pop => pushed = pushed.checked_sub(8)?,
                _ => {}
            }
        }
        (decoder.ip() == ip.0).then_some(pushed)
    }
}

/// Whether the instruction that ends right before the guest virtual address `at` can be a near
/// `call`, so that `at` can be a return address. False where no code is mapped.
///
/// # Errors
/// The code is mapped and can't be read.
pub fn ends_call(space: &Space<'_>, at: Gva) -> Result<bool, guest::Error> {
    let mut bytes = [0; CALL_MAX];
    // Less than the longest, if the call is among the first bytes of what is mapped.
    for len in (CALL_MIN..=CALL_MAX).rev() {
        let start = Gva(at.0.wrapping_sub(len as u64));
        let part = bytes.get_mut(CALL_MAX - len..).unwrap_or_default();
        if if_mapped(space.read(start, part))?.is_some() {
            let ends = |len: usize| bytes.get(CALL_MAX - len..).is_some_and(is_call);
            return Ok((CALL_MIN..=len).any(ends));
        }
    }
    Ok(false)
}

/// Whether all of `code` is one near `call`.
fn is_call(code: &[u8]) -> bool {
    let found = Decoder::new(64, code, DecoderOptions::NONE).decode();
    found.len() == code.len() && (found.is_call_near() || found.is_call_near_indirect())
}

impl std::fmt::Debug for CodeMap<'_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CodeMap")
            .field("orc", &self.orc)
            .field("modules", &self.modules.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::{is_call, RowBudget, ROWS_MAX};

    #[test]
    fn tables_of_modules_are_kept_as_long_as_there_is_room_for_their_rows() {
        let room = RowBudget::new();
        assert!(room.take(ROWS_MAX / 2).is_some());
        assert!(room.take(usize::MAX).is_none());
        assert!(room.take(ROWS_MAX / 2 + 1).is_none());
        assert!(room.take(ROWS_MAX / 2).is_some());
        assert!(room.take(1).is_none());
    }

    #[test]
    fn calls_of_all_forms_are_told_from_other_code() {
        for call in [
            &[0xe8, 1, 2, 3, 4][..],
            // call *%rax, call *%r11
            &[0xff, 0xd0],
            &[0x41, 0xff, 0xd3],
            // call *8(%rax), call *0x100(,%rax,8), call *0x100(%rip)
            &[0xff, 0x50, 8],
            &[0xff, 0x14, 0xc5, 0, 1, 0, 0],
            &[0xff, 0x15, 0, 1, 0, 0],
            // A call with a prefix that pads it.
            &[0x2e, 0xe8, 1, 2, 3, 4],
        ] {
            assert!(is_call(call), "{call:x?}");
        }
        for other in [
            &[0x0f, 5][..],
            &[0xff, 0xe0],
            &[0xe9, 1, 2, 3, 4],
            &[0x90, 0xe8, 1, 2, 3],
            &[0xff, 0x18],
            &[0xff, 0xd0, 0x90],
            &[],
        ] {
            assert!(!is_call(other), "{other:x?}");
        }
    }
}
