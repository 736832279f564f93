//! The guest's kprobes: where they stand, what must not change for that to stay true, and the code that they run.
//!
//! A kprobe copies the instruction that it stands on, and its first byte, when it is registered, also while it is disabled.
//! If these bytes are changed later, enabling it runs the old instruction, and disabling it writes the old byte over the
//! new ones (kernel/kprobes.c: `register_kprobe`; arch/x86/kernel/kprobes/core.c: `arch_disarm_kprobe`). So nothing is
//! written where one is registered, and the kprobes must still be those that were looked at when something is written.

use locus_guest::addr::{Gva, Range, PAGE_SIZE};
use locus_guest::space::Space;
use locus_kernel::{list, Kernel};

use super::kernel_locks;
use crate::error::{Error, Result};
use crate::quiesce::Watched;
use crate::write::{About, Lock, Write, WRITE_MAX};

/// The hash table of all registered kprobes.
const TABLE: &str = "kprobe_table";
/// Lists of [`TABLE`] (`KPROBE_TABLE_SIZE`).
const LISTS: usize = 64;
/// Most kprobes believed.
const KPROBES_MAX: usize = 1 << 16;
/// Elements at the front of each list that are compared in the pause. A kprobe is always added at the front
/// (`hlist_add_head_rcu`), so what came since the look is among them. Only if the guest removed all of them meanwhile and added
/// them again, in the same order and in the same memory, it would not be seen.
const FRONT: usize = 8;
/// Times the table is read before a failure is believed. An element may be freed while it is read.
const TRIES: u32 = 3;
/// The pages of copied instructions, which threads run in place of those in the function: without a breakpoint behind
/// them, and the detours of optimised kprobes. A symbol is missing if the kernel has no such pages.
const SLOTS: [&str; 2] = ["kprobe_insn_slots", "kprobe_optinsn_slots"];
/// Most pages of one kind believed.
const PAGES_MAX: usize = 1 << 12;
/// The function that checks the place of a kprobe before it takes the lock. Who is in it may go by bytes that are about to
/// change.
const REGISTERS: &str = "register_kprobe";

/// The kprobes of a guest, registered and disabled ones, at one moment.
#[derive(Debug, Default)]
pub struct Kprobes {
    /// Their addresses, sorted.
    places: Vec<Gva>,
    /// Words from which a change of them would be seen.
    words: Vec<Write>,
}

/// Offsets in `struct kprobe`, in bytes.
struct KprobeLayout {
    link: u64,
    addr: u64,
}

/// Checks that the guest's kernel has no kprobes, or a table of them that can be found.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): it has kprobes and no symbol of the table.
pub fn check_table(kernel: &Kernel<'_>) -> Result<()> {
    match (kernel.symbols.addr(TABLE), kernel.symbols.addr(REGISTERS)) {
        // A linker that optimises may have renamed it, because it is static.
        (None, Some(at)) => Err(Error::not_applicable(format!(
            "the guest's kernel has kprobes ({REGISTERS} at {at}), and no symbol {TABLE}; expected the table of this name. \
             So it can't be known where its kprobes are, and nothing was changed"
        ))),
        _ => Ok(()),
    }
}

impl Kprobes {
    /// Reads them; none in a kernel without such a table. Nothing is put into a kernel whose table can't be found
    /// ([`check_table`]); what is in force there can be taken out.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): the table is not as this tool knows it. Or it can't be
    /// read.
    pub fn read(kernel: &Kernel<'_>) -> Result<Kprobes> {
        let Some(table) = kernel.symbols.addr(TABLE) else {
            return Ok(Kprobes::default());
        };
        check_size(kernel, table)?;
        let btf = kernel.btf()?;
        let layout = KprobeLayout {
            link: btf.offset_of("kprobe", "hlist")? as u64,
            addr: btf.offset_of_sized("kprobe", "addr", 8)? as u64,
        };
        let mut tries = 1;
        loop {
            match Kprobes::walk(&kernel.space.fresh(), table, &layout) {
                Err(_) if tries < TRIES => tries += 1,
                read => return read,
            }
        }
    }

    fn walk(space: &Space<'_>, table: Gva, layout: &KprobeLayout) -> Result<Kprobes> {
        let mut found = Kprobes::default();
        let heads = space.read_vec(table, 8 * LISTS)?;
        let mut at = table;
        for part in heads.chunks(WRITE_MAX) {
            found.words.push(condition(at, part.to_vec()));
            at = at.plus(part.len() as u64);
        }
        for head in heads.chunks_exact(8) {
            found.chain(space, word(head), layout)?;
        }
        found.places.sort_unstable();
        Ok(found)
    }

    /// Reads a list. `struct hlist_head` and `struct hlist_node` begin with a pointer, which is null at the end.
    fn chain(&mut self, space: &Space<'_>, mut node: u64, layout: &KprobeLayout) -> Result<()> {
        let mut nth = 0;
        while node != 0 {
            if self.places.len() == KPROBES_MAX {
                return Err(Error::not_applicable(format!(
                    "the guest's table of kprobes ({TABLE}) has no end within {KPROBES_MAX} kprobes, so it can't be known \
                     where they are; expected fewer"
                )));
            }
            let place = Gva(node.wrapping_sub(layout.link)).plus(layout.addr);
            let (at, next) = (space.read_u64(place)?, space.read_u64(Gva(node))?);
            if nth < FRONT {
                self.words.push(condition(place, at.to_le_bytes().to_vec()));
                let link = next.to_le_bytes().to_vec();
                self.words.push(condition(Gva(node), link));
            }
            self.places.push(Gva(at));
            node = next;
            nth += 1;
        }
        Ok(())
    }

    /// The place of the first of them in `range`.
    #[must_use]
    pub fn in_range(&self, range: Range) -> Option<Gva> {
        let first = self.places.partition_point(|&at| at < range.start);
        let first = self.places.get(first).copied();
        first.filter(|&at| range.contains(at))
    }

    /// Conditions that hold as long as the kprobes are these, and that nobody is about to change them. The last ones are
    /// about the pages of copied instructions, so that [`copies`] are all.
    ///
    /// # Errors
    /// As [`kernel_locks::is_free`] and [`copies`].
    pub fn conditions(self, kernel: &Kernel<'_>) -> Result<Vec<Write>> {
        if self.words.is_empty() {
            return Ok(Vec::new());
        }
        let mut all = vec![kernel_locks::is_free(kernel, Lock::Kprobes)?];
        all.extend(self.words);
        let space = kernel.space.fresh();
        for name in SLOTS {
            if let Some((head, insns)) = slots(kernel, name)? {
                // A page is added at the front of its list (`__get_insn_slot`). Where it is, a page that was freed may
                // have been: so what the elements say is compared too.
                let first = space.read_u64(head)?;
                all.push(condition(head, first.to_le_bytes().to_vec()));
                for page in list(&space, head, PAGES_MAX)?.into_iter().take(FRONT) {
                    for at in [page, page.plus(insns)] {
                        let found = space.read_u64(at)?;
                        all.push(condition(at, found.to_le_bytes().to_vec()));
                    }
                }
            }
        }
        Ok(all)
    }
}

/// Refuses a `table` that has not [`LISTS`] lists (`KPROBE_HASH_BITS`, kernel/kprobes.c). Up to the next symbol there may be
/// a gap, but no second half. The last symbol has no next one.
fn check_size(kernel: &Kernel<'_>, table: Gva) -> Result<()> {
    let expected = 8 * LISTS as u64;
    match kernel.symbols.room(table) {
        Some(room) if !(expected..2 * expected).contains(&room) => {
            Err(Error::not_applicable(format!(
                "the guest's table of kprobes, {TABLE} at {table}, has {room} bytes up to the next symbol; expected \
                 {expected}, for {LISTS} lists. So it can't be known where its kprobes are, and nothing was changed"
            )))
        }
        _ => Ok(()),
    }
}

/// Code of kprobes that runs in place of a function's own. A thread that is in it goes on in the function, and nothing on
/// its stack says so. The kprobe itself may be gone already.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): the lists are not as this tool knows them. Or they can't be
/// read.
pub fn copies(kernel: &Kernel<'_>) -> Result<Vec<Watched>> {
    let mut found = Vec::new();
    let space = kernel.space.fresh();
    for name in SLOTS {
        let Some((head, insns)) = slots(kernel, name)? else {
            continue;
        };
        for page in list(&space, head, PAGES_MAX)? {
            let at = Gva(space.read_u64(page.plus(insns))?);
            // Unlike that of a function, the first byte of a page is in the middle of something.
            let name = format!("{name} (code that a kprobe copied)");
            found.push(Watched::whole(Range::new(at, PAGE_SIZE), name));
        }
    }
    if let Some(at) = kernel.symbols.addr(REGISTERS) {
        found.push(Watched::new(
            Range::new(at, kernel.symbols.room(at).unwrap_or_default()),
            REGISTERS,
        ));
    }
    Ok(found)
}

/// The list of pages of the `struct kprobe_insn_cache` called `name`, and from an element the distance to the address of its
/// page, in bytes.
fn slots(kernel: &Kernel<'_>, name: &str) -> Result<Option<(Gva, u64)>> {
    let Some(cache) = kernel.symbols.addr(name) else {
        return Ok(None);
    };
    let btf = kernel.btf()?;
    let pages = btf.offset_of("kprobe_insn_cache", "pages")? as u64;
    let link = btf.offset_of("kprobe_insn_page", "list")? as u64;
    let insns = btf.offset_of_sized("kprobe_insn_page", "insns", 8)? as u64;
    Ok(Some((cache.plus(pages), insns.wrapping_sub(link))))
}

fn condition(at: Gva, bytes: Vec<u8>) -> Write {
    Write::condition(at, bytes, About::Kprobes)
}

fn word(bytes: &[u8]) -> u64 {
    locus_guest::fetch::u64(bytes, 0).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use locus_kernel::fixture::{vcpus, Fixture, KIND, TEXT};

    use super::*;
    use crate::error::ExitCode;

    #[test]
    fn a_kernel_with_kprobes_and_without_their_table_is_refused_by_name() {
        for name in ["register_kprobe", "unregister_kprobe"] {
            let mut fixture = Fixture::new();
            fixture.function(TEXT.0 + 0x1000, name, &[0xc3]);
            let memory = fixture.build();
            let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
            // What is in force can be taken out all the same.
            assert!(Kprobes::read(&kernel).unwrap().places.is_empty());
            let checked = check_table(&kernel);
            if name != REGISTERS {
                checked.unwrap();
                continue;
            }
            let error = checked.unwrap_err();
            assert_eq!(error.exit_code(), ExitCode::NotApplicable, "{error}");
            assert!(
                error.to_string().contains("no symbol kprobe_table"),
                "{error}"
            );
        }
    }
}
