//! A payload as a module of the guest: so that the guest's own code finds its exception fixups, its
//! `BUG` and `WARN` sites, its unwind data, its symbols and its static keys.
//!
//! The payload gets a `struct module` and the tables that it points to: together they are the *module's
//! tables*, in the arena beside the payload's code. They are put into the guest's lists and trees, in the same
//! pause and with the same checks as the redirects ([`lists`]). From then on the guest treats the payload's
//! code as that of any module: back-traces name it, a bad user pointer is fixed up, static keys that change
//! are written into it.
//!
//! A payload's module goes through three types: [`ModuleDraft`] (what it is made of, and its size),
//! [`BuiltModule`] (its bytes for their addresses), [`lists::ListChange`] (the writes to the guest's lists).
//!
//! The tables stay when the payload is reverted, as its code does: a thread or timer that it left behind must
//! find both. It can't be unloaded, because it counts as used by itself.

mod buffer;
mod keys;
pub mod lists;
mod orc_format;
mod structure;
mod symtab;
mod table;
#[cfg(test)]
mod tests;
mod tree;
mod unlocked;
mod words;

use locus_guest::addr::{Gva, Range};
use locus_kernel::btf::Btf;
use locus_kernel::orc::{self, FrameKind};
use locus_kernel::Kernel;
use locus_payload::{Payload, Reloc, Role};

use self::buffer::{Buffer, Room};
use self::keys::KeyBranches;
use self::structure::{ModuleMemory, Structure, TreeNode};
use self::symtab::{Symtab, SYM_LEN};
use self::table::Row;
use super::fixups::JumpLabel;
use super::reloc;
use crate::arena::record::MODULE;
use crate::error::{Error, Result};

/// Bytes of a `struct jump_entry` (include/linux/jump_label.h, relative form).
const JUMP_LEN: usize = 16;

/// What a payload's module is made of, sized before the payload has an address.
#[derive(Debug)]
pub struct ModuleDraft<'p> {
    payload: &'p Payload,
    fixups: Vec<Row>,
    bugs: Vec<Row>,
    unwind: Vec<UnwindRow>,
    symbols: Symtab,
    sizes: Sizes,
    ro: ReadOnly,
    rw: Writable,
}

/// A row of unwind data.
#[derive(Debug)]
struct UnwindRow {
    ip: Row,
    row: Row,
    /// The row says only that a section's code ends there.
    end: bool,
}

/// The room that the module's tables take.
#[derive(Clone, Copy, Debug)]
pub struct ModuleSize {
    /// Length of the read-only part, in bytes.
    pub ro: u64,
    /// Length of the writable part, in bytes.
    pub rw: u64,
    /// Offset in the writable part of the table of `BUG` and `WARN` sites, in bytes. Its rows are in the order of
    /// the payload's section, because code refers to them ([`super::image`]).
    pub bugs: u64,
}

/// Sizes of the guest's structures, in bytes.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    node: usize,
    user: usize,
}

/// Offsets of the read-only parts.
#[derive(Clone, Copy, Debug, Default)]
struct ReadOnly {
    symtab: u64,
    strings: u64,
    types: u64,
    fixups: u64,
    unwind_ips: u64,
    unwind: u64,
    jumps: u64,
    len: u64,
}

/// Offsets of the writable parts behind the `struct module`.
#[derive(Clone, Copy, Debug, Default)]
struct Writable {
    kallsyms: u64,
    bugs: u64,
    nodes: u64,
    users: u64,
    len: u64,
}

/// The most jump labels that `payload` can have.
#[must_use]
pub fn jump_labels(payload: &Payload) -> u64 {
    let tables = payload.sections.iter();
    let tables = tables.filter(|s| s.role == Role::JumpTable);
    tables.map(|s| s.size / JUMP_LEN as u64).sum()
}

/// The addresses of a payload and of its module's tables.
#[derive(Clone, Copy, Debug)]
pub struct PayloadAddresses {
    /// Pages of code.
    pub text: Range,
    /// Pages of constants.
    pub rodata: Range,
    /// Pages of variables, those of the module's tables included.
    pub data: Range,
    /// First byte of the read-only part of the module's tables.
    pub ro: Gva,
    /// First byte of the writable part of the module's tables.
    pub rw: Gva,
}

impl PayloadAddresses {
    /// Address of the `struct module`.
    #[must_use]
    pub fn module(&self) -> Gva {
        self.rw.plus(MODULE)
    }
}

/// The module's tables for their addresses, in none of the guest's lists yet.
#[derive(Debug)]
pub struct BuiltModule {
    /// Bytes of its read-only part.
    pub ro: Vec<u8>,
    /// Bytes of its writable part.
    pub rw: Vec<u8>,
    /// The addresses of the payload.
    pub place: PayloadAddresses,
    /// The nodes for the tree of module addresses.
    tree: Vec<TreeNode>,
    /// The static keys that the payload's branches follow, in order of address.
    keys: Vec<KeyBranches>,
    /// The words of the payload's own static keys that name their branches.
    pub own_keys: Vec<OwnKeyWord>,
    /// Address of the room for the nodes in the lists of static keys.
    nodes: Gva,
    /// Address of the room for the nodes that name users.
    users: Gva,
}

/// The word of one of the payload's own static keys that names its branches (`static_key.entries`).
#[derive(Clone, Copy, Debug)]
pub struct OwnKeyWord {
    /// Address of the word.
    pub at: Gva,
    /// Its value: address of the first `jump_entry`. The lowest bit of the word stays as it is.
    pub value: Gva,
}

impl<'p> ModuleDraft<'p> {
    /// Reads what of the payload the guest's `struct module` has to point at. `users` is for how many
    /// modules it says that it uses them.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): a table is not as this guest's kernel has it.
    pub fn of(payload: &'p Payload, kernel: &Kernel<'_>, users: usize) -> Result<ModuleDraft<'p>> {
        let btf = kernel.btf()?;
        let stride = |name| structure::size_of(btf, name);
        let fixups = match payload.sections.iter().any(|s| s.role == Role::ExTable) {
            true => table::rows(payload, &Role::ExTable, stride("exception_table_entry")?)?,
            false => Vec::new(),
        };
        let bugs = match payload.sections.iter().any(|s| s.role == Role::BugTable) {
            true => {
                let size = stride("bug_entry")?;
                // A row of zeroes is for no code: the kernel looks for its own place in it.
                table::in_place(table::rows(payload, &Role::BugTable, size)?, size)
            }
            false => Vec::new(),
        };
        let unwind = unwind(payload, kernel)?;
        let symbols = Symtab::of(payload)?;
        // The table's bytes are in memory, so their number fits.
        let jumps = usize::try_from(jump_labels(payload)).unwrap_or(usize::MAX);
        let mut entry = ModuleDraft {
            payload,
            fixups: fixups.into_iter().flatten().collect(),
            bugs,
            unwind,
            symbols,
            sizes: Sizes {
                node: if jumps == 0 {
                    0
                } else {
                    stride("static_key_mod")?
                },
                user: stride("module_use")?,
            },
            ro: ReadOnly::default(),
            rw: Writable::default(),
        };
        entry.lay_out(stride("module")?, stride("mod_kallsyms")?, jumps, users + 1);
        Ok(entry)
    }

    fn lay_out(&mut self, module: usize, kallsyms: usize, jumps: usize, users: usize) {
        let bytes = |rows: &[Row]| rows.iter().map(|r| r.bytes.len()).sum::<usize>();
        let ips = self.unwind.iter().map(|u| u.ip.bytes.len()).sum();
        let unwind = self.unwind.iter().map(|u| u.row.bytes.len()).sum();
        let room = Room::default();
        self.ro = ReadOnly {
            symtab: room.take(self.symbols.len() * SYM_LEN),
            strings: room.take(self.symbols.strings.len()),
            types: room.take(self.symbols.types.len()),
            fixups: room.take(bytes(&self.fixups)),
            unwind_ips: room.take(ips),
            unwind: room.take(unwind),
            jumps: room.take(jumps.saturating_mul(JUMP_LEN)),
            len: room.take(0),
        };
        let room = Room::from(MODULE);
        room.take(module);
        self.rw = Writable {
            kallsyms: room.take(kallsyms),
            bugs: room.take(bytes(&self.bugs)),
            // a key that only the kernel used so far needs two
            nodes: room.take(jumps.saturating_mul(2 * self.sizes.node)),
            users: room.take(users.saturating_mul(self.sizes.user)),
            len: room.take(0),
        };
    }

    /// The room it takes.
    #[must_use]
    pub fn size(&self) -> ModuleSize {
        ModuleSize {
            ro: self.ro.len,
            rw: self.rw.len,
            bugs: self.rw.bugs,
        }
    }

    /// Makes the bytes for the addresses in `place`. `resolve` gives the address of a relocation's symbol,
    /// `start_of` that of a section; `jumps` are the payload's jump labels in the kernel's order.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): an address is out of reach, or the guest's types lack something.
    pub fn build(
        &self,
        kernel: &Kernel<'_>,
        place: PayloadAddresses,
        resolve: &dyn Fn(&Reloc) -> Result<Gva>,
        start_of: &dyn Fn(usize) -> Option<u64>,
        jumps: &[JumpLabel],
    ) -> Result<BuiltModule> {
        let btf = kernel.btf()?;
        let mut ro = Buffer::new(place.ro, self.ro.len)?;
        let mut rw = Buffer::new(place.rw, self.rw.len)?;
        ro.put(self.ro.symtab, &self.symbols.encode(start_of))?;
        ro.put(self.ro.strings, &self.symbols.strings)?;
        ro.put(self.ro.types, &self.symbols.types)?;
        self.put_rows(&mut ro, &mut rw, resolve)?;
        let keys = keys::entries(&mut ro, self.ro.jumps, jumps)?;
        let mut module = Structure::new(kernel, place.module())?;
        let tree = self.fill_in(&mut module, btf, &place, jumps.len())?;
        rw.put(MODULE, &module.bytes)?;
        self.put_kallsyms(&mut rw, btf, place.ro)?;
        // Offset of the word that names a key's branches.
        let branches_at = match keys.iter().any(|k| k.is_own) {
            true => btf.offset_of_sized("static_key", "type", 8)? as u64,
            false => 0,
        };
        let own = keys.iter().filter(|k| k.is_own);
        let own_keys = own.map(|k| OwnKeyWord {
            at: k.key.plus(branches_at),
            value: k.first,
        });
        Ok(BuiltModule {
            own_keys: own_keys.collect(),
            ro: ro.bytes,
            rw: rw.bytes,
            place,
            tree,
            keys,
            nodes: place.rw.plus(self.rw.nodes),
            users: place.rw.plus(self.rw.users),
        })
    }

    /// The tables of fixups, of `BUG` and `WARN` sites and of unwind data, sorted as the kernel sorts them.
    fn put_rows(
        &self,
        ro: &mut Buffer,
        rw: &mut Buffer,
        resolve: &dyn Fn(&Reloc) -> Result<Gva>,
    ) -> Result<()> {
        let mut fixups = Vec::new();
        for row in &self.fixups {
            fixups.push((target(row, resolve)?, row));
        }
        fixups.sort_by_key(|(at, _)| *at);
        let rows: Vec<&Row> = fixups.into_iter().map(|(_, row)| row).collect();
        self.rows(ro, self.ro.fixups, &rows, resolve)?;
        let rows: Vec<&Row> = self.bugs.iter().collect();
        self.rows(rw, self.rw.bugs, &rows, resolve)?;

        let mut unwind = Vec::new();
        for one in &self.unwind {
            // where one section ends as another begins, the beginning counts (orc_sort_cmp)
            unwind.push(((target(&one.ip, resolve)?, !one.end), one));
        }
        unwind.sort_by_key(|(key, _)| *key);
        let ips: Vec<&Row> = unwind.iter().map(|(_, one)| &one.ip).collect();
        let rows: Vec<&Row> = unwind.iter().map(|(_, one)| &one.row).collect();
        self.rows(ro, self.ro.unwind_ips, &ips, resolve)?;
        self.rows(ro, self.ro.unwind, &rows, resolve)
    }

    /// Fills in the `struct module` of a payload with so many jump labels; returns the nodes for the tree of
    /// module addresses.
    fn fill_in(
        &self,
        module: &mut Structure<'_>,
        btf: &Btf,
        place: &PayloadAddresses,
        jumps: usize,
    ) -> Result<Vec<TreeNode>> {
        let live = btf
            .enum_value("module_state", "MODULE_STATE_LIVE")
            .and_then(|n| u32::try_from(n).ok())
            .ok_or_else(|| Error::not_applicable("the guest has no MODULE_STATE_LIVE"))?;
        module.set("state", &live.to_le_bytes())?;
        module.begin("name", self.payload.name.as_bytes())?;
        // one reference is the module's own (MODULE_REF_BASE), the other says: in use
        module.set("refcnt", &2u32.to_le_bytes())?;
        module.empty_list("source_list")?;
        module.empty_list("target_list")?;
        let tree = module.memory(&memory(place))?;
        let at = |offset| place.ro.plus(offset);
        module.table(
            "extable",
            "num_exentries",
            at(self.ro.fixups),
            self.fixups.len(),
        )?;
        if !self.unwind.is_empty() {
            let ips = at(self.ro.unwind_ips).0.to_le_bytes();
            module.set("arch.orc_unwind_ip", &ips)?;
            let (rows, count) = (at(self.ro.unwind), self.unwind.len());
            module.table("arch.orc_unwind", "arch.num_orcs", rows, count)?;
        }
        let bugs = place.rw.plus(self.rw.bugs);
        module.table("bug_table", "num_bugs", bugs, self.bugs.len())?;
        module.table("jump_entries", "num_jump_entries", at(self.ro.jumps), jumps)?;
        let kallsyms = place.rw.plus(self.rw.kallsyms);
        module.set("kallsyms", &kallsyms.0.to_le_bytes())?;
        Ok(tree)
    }

    /// The `struct mod_kallsyms`; `ro` is the address of the read-only part, which has the symbols.
    fn put_kallsyms(&self, rw: &mut Buffer, btf: &Btf, ro: Gva) -> Result<()> {
        let member = |path, bytes| {
            Ok::<u64, Error>(btf.offset_of_sized("mod_kallsyms", path, bytes)? as u64)
        };
        for (path, offset) in [
            ("symtab", self.ro.symtab),
            ("strtab", self.ro.strings),
            ("typetab", self.ro.types),
        ] {
            let value = ro.plus(offset).0.to_le_bytes();
            rw.put(self.rw.kallsyms + member(path, 8)?, &value)?;
        }
        let count = u32::try_from(self.symbols.len())
            .map_err(|_| Error::not_applicable("the payload has more than 2^32 symbols"))?;
        let at = self.rw.kallsyms + member("num_symtab", 4)?;
        rw.put(at, &count.to_le_bytes())
    }

    fn rows(
        &self,
        buffer: &mut Buffer,
        mut offset: u64,
        rows: &[&Row],
        resolve: &dyn Fn(&Reloc) -> Result<Gva>,
    ) -> Result<()> {
        for row in rows {
            let mut bytes = row.bytes.clone();
            for reloc in &row.relocs {
                let symbol = resolve(reloc)?;
                let at = buffer.at.plus(offset).plus(reloc.offset);
                let no = |why: &str| {
                    Error::not_applicable(format!("payload {}: a table: {why}", self.payload.name))
                };
                let value =
                    reloc::value(reloc.rtype, symbol, reloc.addend, at).map_err(|why| no(&why))?;
                let start = usize::try_from(reloc.offset).ok();
                let room = start.and_then(|start| {
                    let end = start.checked_add(value.bytes().len())?;
                    bytes.get_mut(start..end)
                });
                room.ok_or_else(|| no("a relocation leaves its row"))?
                    .copy_from_slice(value.bytes());
            }
            buffer.put(offset, &bytes)?;
            offset += bytes.len() as u64;
        }
        Ok(())
    }
}

/// The address that a row's first word refers to; 0 for a row of zeroes.
fn target(row: &Row, resolve: &dyn Fn(&Reloc) -> Result<Gva>) -> Result<u64> {
    match row.relocs.first() {
        Some(reloc) => Ok(resolve(reloc)?.0.wrapping_add_signed(reloc.addend)),
        None => Ok(0),
    }
}

/// Rows of unwind data for code that is placed.
fn unwind(payload: &Payload, kernel: &Kernel<'_>) -> Result<Vec<UnwindRow>> {
    let no = |why: String| Error::not_applicable(format!("payload {}: {why}", payload.name));
    let ips = table::rows(payload, &Role::OrcUnwindIp, 4)?;
    if ips.is_empty() {
        return Ok(Vec::new());
    }
    let table = orc::OrcTable::of(kernel)?;
    let has_header = kernel.symbols.addr("__start_orc_header").is_some();
    orc_format::check(payload, table.format(), has_header)?;
    let rows = table::rows(payload, &Role::OrcUnwind, table.row_len())?;
    if rows.len() != ips.len() {
        return Err(no(format!(
            "it has {} rows of unwind data for {} addresses; the guest's rows are {} bytes long",
            rows.len(),
            ips.len(),
            table.row_len()
        )));
    }
    let mut found = Vec::new();
    for pair in ips.into_iter().zip(rows) {
        let (Some(ip), Some(row)) = pair else {
            continue;
        };
        let kind = table.row(&row.bytes).map(|r| r.kind).ok_or_else(|| {
            no(format!(
                "its unwind data {:02x?} means nothing in the guest's format {}",
                row.bytes,
                table.format()
            ))
        })?;
        let end = kind == FrameKind::Undefined;
        found.push(UnwindRow { ip, row, end });
    }
    Ok(found)
}

fn memory(place: &PayloadAddresses) -> Vec<ModuleMemory> {
    let all = [
        ("MOD_TEXT", place.text),
        ("MOD_RODATA", place.rodata),
        ("MOD_DATA", place.data),
    ];
    all.into_iter()
        .filter(|(_, range)| range.len() > 0)
        .map(|(kind, range)| ModuleMemory { kind, range })
        .collect()
}
