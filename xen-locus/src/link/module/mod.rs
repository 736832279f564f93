//! A payload as a module of the guest: so that the guest's own code finds its exception fixups, its
//! `BUG` and `WARN` sites, its unwind data, its symbols and its static keys.
//!
//! The payload gets a `struct module` and the tables behind it, in the arena beside its code, and the
//! guest's lists and trees get links to it, in the same pause and with the same checks as the
//! redirects ([`enter`]). From then on the guest treats the payload's code as that of any module:
//! back-traces name it, a bad user pointer is fixed up, static keys that change are written into it.
//!
//! Like its code the entry stays when the payload is undone: a thread or timer it left behind must
//! find both. It can't be unloaded, for it counts as used by itself.

mod keys;
pub mod links;
mod structure;
mod symtab;
mod table;
#[cfg(test)]
mod tests;
mod tree;
mod words;

use std::cell::Cell;

use locus_guest::addr::{Gva, Range};
use locus_kernel::orc::{self, FrameKind};
use locus_kernel::Kernel;
use locus_payload::{Payload, Reloc, Role};

use self::structure::{Part, Structure};
use self::symtab::{Symtab, SYM_LEN};
use self::table::Row;
use super::fixups::JumpSite;
use super::reloc;
use crate::arena::record::MODULE;
use crate::error::{Error, Result};

/// Alignment of each part of the entry, in bytes.
const ALIGN: u64 = 64;
/// Bytes of a `struct jump_entry` (include/linux/jump_label.h, relative form).
const JUMP_LEN: usize = 16;

/// What an entry is made of, sized before the payload has an address.
#[derive(Debug)]
pub struct Entry<'p> {
    payload: &'p Payload,
    fixups: Vec<Row>,
    bugs: Vec<Row>,
    unwind: Vec<Unwind>,
    symbols: Symtab,
    sizes: Sizes,
    ro: ReadOnly,
    rw: Writable,
}

/// A row of unwind data.
#[derive(Debug)]
struct Unwind {
    ip: Row,
    row: Row,
    /// It only says that a section's code ends there.
    end: bool,
}

/// The room that an entry takes.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Length of the read-only part, in bytes.
    pub ro: u64,
    /// Length of the writable part, in bytes.
    pub rw: u64,
    /// Offset in the writable part of the table of `BUG` and `WARN` sites, whose rows stand in it as
    /// they do in the payload's section: code refers to them ([`super::image`]).
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

/// Hands out room, each piece aligned.
#[derive(Default)]
struct Room(Cell<u64>);

impl Room {
    fn take(&self, len: usize) -> u64 {
        let at = self.0.get().next_multiple_of(ALIGN);
        self.0.set(at.saturating_add(len as u64));
        at
    }
}

/// The most jump labels that `payload` can have.
#[must_use]
pub fn jump_labels(payload: &Payload) -> u64 {
    let tables = payload.sections.iter();
    let tables = tables.filter(|s| s.role == Role::JumpTable);
    tables.map(|s| s.size / JUMP_LEN as u64).sum()
}

/// Where a payload and its entry stand.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Pages of code.
    pub text: Range,
    /// Pages of constants.
    pub rodata: Range,
    /// Pages of variables, the entry's included.
    pub data: Range,
    /// First byte of the read-only part of the entry.
    pub ro: Gva,
    /// First byte of the writable part of the entry.
    pub rw: Gva,
}

impl Place {
    /// Address of the `struct module`.
    #[must_use]
    pub fn module(&self) -> Gva {
        self.rw.plus(MODULE)
    }
}

/// An entry for its place, with no links yet.
#[derive(Debug)]
pub struct Built {
    /// Bytes of its read-only part.
    pub ro: Vec<u8>,
    /// Bytes of its writable part.
    pub rw: Vec<u8>,
    /// Where it stands.
    pub place: Place,
    /// The nodes for the tree of module addresses, and their keys.
    tree: Vec<(Gva, u64)>,
    /// First `jump_entry` of each static key, in order of address; and whether the key is the
    /// payload's own.
    keys: Vec<(Gva, Gva, bool)>,
    /// Of the payload's own static keys: address of the word that names their branches, and the first.
    pub own_keys: Vec<(Gva, Gva)>,
    /// Room for the nodes that link static keys, and for those that name users.
    nodes: Gva,
    users: Gva,
}

impl<'p> Entry<'p> {
    /// Reads what of the payload the guest's `struct module` has to point at. `users` is for how many
    /// modules it says that it uses them.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): a table is not as this guest's kernel has it.
    pub fn of(payload: &'p Payload, kernel: &Kernel<'_>, users: usize) -> Result<Entry<'p>> {
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
        table::check_own_module(payload, stride("module")?)?;
        let jumps = usize::try_from(jump_labels(payload)).unwrap_or(usize::MAX);
        let mut entry = Entry {
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
        let room = Room(Cell::new(MODULE));
        room.take(module);
        self.rw = Writable {
            kallsyms: room.take(kallsyms),
            bugs: room.take(bytes(&self.bugs)),
            // a key that nobody but the kernel used so far needs two
            nodes: room.take(jumps.saturating_mul(2 * self.sizes.node)),
            users: room.take(users.saturating_mul(self.sizes.user)),
            len: room.take(0),
        };
    }

    /// The room it takes.
    #[must_use]
    pub fn size(&self) -> Size {
        Size {
            ro: self.ro.len,
            rw: self.rw.len,
            bugs: self.rw.bugs,
        }
    }

    /// Fills the entry in for its place. `resolve` gives the value of a relocation's symbol, `start_of`
    /// the place of a section; `jumps` are the payload's static-key branches in the kernel's order.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): an address is out of reach, or the guest's types lack something.
    pub fn build(
        &self,
        kernel: &Kernel<'_>,
        place: Place,
        resolve: &dyn Fn(&Reloc) -> Result<Gva>,
        start_of: &dyn Fn(usize) -> Option<u64>,
        jumps: &[JumpSite],
    ) -> Result<Built> {
        let btf = kernel.btf()?;
        let mut ro = Buffer::new(place.ro, self.ro.len);
        let mut rw = Buffer::new(place.rw, self.rw.len);
        ro.put(self.ro.symtab, &self.symbols.encode(start_of))?;
        ro.put(self.ro.strings, &self.symbols.strings)?;
        ro.put(self.ro.types, &self.symbols.types)?;

        let mut fixups = Vec::new();
        for row in &self.fixups {
            fixups.push((target(row, resolve)?, row));
        }
        fixups.sort_by_key(|(at, _)| *at);
        let rows: Vec<&Row> = fixups.into_iter().map(|(_, row)| row).collect();
        self.rows(&mut ro, self.ro.fixups, &rows, resolve)?;
        let rows: Vec<&Row> = self.bugs.iter().collect();
        self.rows(&mut rw, self.rw.bugs, &rows, resolve)?;

        let mut unwind = Vec::new();
        for one in &self.unwind {
            // where one section ends as another begins, the beginning counts (orc_sort_cmp)
            unwind.push(((target(&one.ip, resolve)?, !one.end), one));
        }
        unwind.sort_by_key(|(key, _)| *key);
        let ips: Vec<&Row> = unwind.iter().map(|(_, one)| &one.ip).collect();
        let rows: Vec<&Row> = unwind.iter().map(|(_, one)| &one.row).collect();
        self.rows(&mut ro, self.ro.unwind_ips, &ips, resolve)?;
        self.rows(&mut ro, self.ro.unwind, &rows, resolve)?;

        let keys = keys::entries(&mut ro, self.ro.jumps, jumps)?;

        let mut module = Structure::new(kernel, place.module())?;
        let live = btf
            .enum_value("module_state", "MODULE_STATE_LIVE")
            .and_then(|n| u32::try_from(n).ok())
            .ok_or_else(|| Error::not_applicable("the guest has no MODULE_STATE_LIVE"))?;
        module.set("state", &live.to_le_bytes())?;
        module.set("name", self.payload.name.as_bytes())?;
        // one reference is the module's own (MODULE_REF_BASE), the other says: in use
        module.set("refcnt", &2u32.to_le_bytes())?;
        module.empty_list("source_list")?;
        module.empty_list("target_list")?;
        let tree = module.memory(&parts(&place))?;
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
        if !jumps.is_empty() {
            module.table(
                "jump_entries",
                "num_jump_entries",
                at(self.ro.jumps),
                jumps.len(),
            )?;
        }
        let kallsyms = place.rw.plus(self.rw.kallsyms);
        module.set("kallsyms", &kallsyms.0.to_le_bytes())?;
        rw.put(MODULE, &module.bytes)?;
        let count = u32::try_from(self.symbols.len()).unwrap_or(u32::MAX);
        let member = |path| Ok::<u64, Error>(btf.offset_of("mod_kallsyms", path)? as u64);
        for (path, value) in [
            ("symtab", at(self.ro.symtab)),
            ("strtab", at(self.ro.strings)),
            ("typetab", at(self.ro.types)),
        ] {
            rw.put(self.rw.kallsyms + member(path)?, &value.0.to_le_bytes())?;
        }
        let at = self.rw.kallsyms + member("num_symtab")?;
        rw.put(at, &count.to_le_bytes())?;
        let links = match keys.iter().any(|(.., own)| *own) {
            true => btf.offset_of("static_key", "type")? as u64,
            false => 0,
        };
        let own = keys.iter().filter(|(.., own)| *own);
        let own_keys = own.map(|(key, at, _)| (key.plus(links), *at)).collect();
        Ok(Built {
            ro: ro.bytes,
            rw: rw.bytes,
            place,
            tree,
            keys,
            own_keys,
            nodes: place.rw.plus(self.rw.nodes),
            users: place.rw.plus(self.rw.users),
        })
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
                let start = usize::try_from(reloc.offset).unwrap_or(usize::MAX);
                let no = |why: &str| {
                    Error::not_applicable(format!("payload {}: a table: {why}", self.payload.name))
                };
                let (word, len) =
                    reloc::value(reloc.rtype, symbol, reloc.addend, at).map_err(|why| no(&why))?;
                let room = bytes
                    .get_mut(start..start.saturating_add(len))
                    .ok_or_else(|| no("a relocation leaves its row"))?;
                room.copy_from_slice(word.get(..len).unwrap_or_default());
            }
            buffer.put(offset, &bytes)?;
            offset += bytes.len() as u64;
        }
        Ok(())
    }
}

/// What a row's first word refers to.
fn target(row: &Row, resolve: &dyn Fn(&Reloc) -> Result<Gva>) -> Result<u64> {
    match row.relocs.first() {
        Some(reloc) => Ok(resolve(reloc)?.0.wrapping_add_signed(reloc.addend)),
        None => Ok(0),
    }
}

/// Rows of unwind data for code that is placed.
fn unwind(payload: &Payload, kernel: &Kernel<'_>) -> Result<Vec<Unwind>> {
    let no = |why: String| Error::not_applicable(format!("payload {}: {why}", payload.name));
    let ips = table::rows(payload, &Role::OrcUnwindIp, 4)?;
    if ips.is_empty() {
        return Ok(Vec::new());
    }
    let table = orc::OrcTable::of(kernel)?;
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
        found.push(Unwind { ip, row, end });
    }
    Ok(found)
}

fn parts(place: &Place) -> Vec<Part> {
    let all = [
        ("MOD_TEXT", place.text),
        ("MOD_RODATA", place.rodata),
        ("MOD_DATA", place.data),
    ];
    all.into_iter().filter(|(_, r)| r.len() > 0).collect()
}

/// Bytes that are to stand at an address.
#[derive(Debug)]
struct Buffer {
    at: Gva,
    bytes: Vec<u8>,
}

impl Buffer {
    fn new(at: Gva, len: u64) -> Buffer {
        let len = usize::try_from(len).unwrap_or(0);
        Buffer {
            at,
            bytes: vec![0; len],
        }
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let room = start
            .checked_add(bytes.len())
            .and_then(|end| self.bytes.get_mut(start..end));
        match room {
            Some(room) => {
                room.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(Error::failed(
                "a part of the payload's module entry does not fit its room",
            )),
        }
    }
}
