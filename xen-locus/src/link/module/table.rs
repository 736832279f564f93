//! Tables of a payload that the kernel reads through its `struct module`: exception fixups, `BUG` and
//! `WARN` sites, unwind data. Rows for code that is never placed (`__init`, `__exit`) are left out.

use locus_payload::{Payload, Reloc, Role, Section, SymSection};

use crate::error::{Error, Result};

/// A row, and its relocations with offsets from its start.
#[derive(Clone, Debug)]
pub struct Row {
    /// As the file has it.
    pub bytes: Vec<u8>,
    /// By rising offset.
    pub relocs: Vec<Reloc>,
}

/// Reads the rows of `stride` bytes of the payload's one section of this role; `None` for one whose
/// first word refers to what is never placed.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): there are several such sections, the size is no multiple of `stride`, or
/// a row does not begin with an address.
pub fn rows(payload: &Payload, role: &Role, stride: usize) -> Result<Vec<Option<Row>>> {
    let no = |why: String| Error::not_applicable(format!("payload {}: {why}", payload.name));
    let mut sections = payload
        .sections
        .iter()
        .filter(|s| s.role == *role && s.size > 0 && !s.name.ends_with("_header"));
    let Some(section) = sections.next() else {
        return Ok(Vec::new());
    };
    if let Some(second) = sections.next() {
        return Err(no(format!(
            "sections {} and {} serve the same purpose; expected one, as ld -r with the kernel's \
             module.lds makes it",
            section.name, second.name
        )));
    }
    if stride == 0 || !section.data.len().is_multiple_of(stride) {
        return Err(no(format!(
            "section {} has {} bytes, not a multiple of the guest's {stride} for a row: built for \
             another kernel?",
            section.name, section.size
        )));
    }
    let relocs = relocs_of(payload, section);
    let mut left = relocs.iter().peekable();
    let mut found = Vec::new();
    for (i, bytes) in section.data.chunks_exact(stride).enumerate() {
        let start = (i * stride) as u64;
        let end = start + stride as u64;
        let mut own = Vec::new();
        while let Some(reloc) = left.next_if(|r| r.offset < end) {
            let offset = reloc.offset.saturating_sub(start);
            own.push(Reloc { offset, ..**reloc });
        }
        let placed = match own.first() {
            Some(first) if first.offset == 0 => is_placed(payload, first),
            // rows of unwind data hold no addresses
            _ if own.is_empty() && *role == Role::OrcUnwind => true,
            _ => {
                return Err(no(format!(
                    "row {i} of section {} does not begin with an address",
                    section.name
                )))
            }
        };
        found.push(placed.then(|| Row {
            bytes: bytes.to_vec(),
            relocs: own,
        }));
    }
    Ok(found)
}

/// The rows of `stride` bytes at the places that they have in their section, with zeroes for those left
/// out: for a table that code refers to by place.
#[must_use]
pub fn in_place(rows: Vec<Option<Row>>, stride: usize) -> Vec<Row> {
    let none = || Row {
        bytes: vec![0; stride],
        relocs: Vec::new(),
    };
    rows.into_iter().map(|r| r.unwrap_or_else(none)).collect()
}

/// All relocations of a section, livepatch relocations too, by rising offset.
fn relocs_of<'p>(payload: &'p Payload, section: &'p Section) -> Vec<&'p Reloc> {
    let of_klp = payload
        .sections
        .iter()
        .filter(|s| matches!(s.role, Role::KlpRela { target, .. } if target == section.index));
    let mut all: Vec<&Reloc> = of_klp
        .flat_map(|s| s.relocs.iter())
        .chain(&section.relocs)
        .collect();
    all.sort_by_key(|r| r.offset);
    all
}

fn is_placed(payload: &Payload, reloc: &Reloc) -> bool {
    match payload.symbol(reloc.symbol).map(|s| s.section) {
        Some(SymSection::Section(index)) => {
            payload.section(index).is_some_and(|s| s.role.is_placed())
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use locus_payload::testelf::{Spec, ALLOC, CODE, R_PC32, VARS};

    #[test]
    fn fixups_lead_to_code_of_their_own_section_which_is_placed() {
        let (mut elf, places) = Spec::default().elf();
        let table = elf.section("__ex_table", ALLOC, &[0; 12]);
        // mov $-14, %eax; jmp
        let fixup = elf.section(
            ".fixup",
            CODE,
            &[0xb8, 0xf2, 0xff, 0xff, 0xff, 0xe9, 0, 0, 0, 0],
        );
        let (text, after) = (elf.section_symbol(places.text), elf.section_symbol(fixup));
        elf.reloc(table, 0, R_PC32, text, 0);
        elf.reloc(table, 4, R_PC32, after, 0);
        elf.reloc(fixup, 6, R_PC32, text, -4);
        let payload = Payload::parse("test.ko", &elf.build()).unwrap();
        let rows = rows(&payload, &Role::ExTable, 12).unwrap();
        assert_eq!(rows.iter().flatten().count(), 1);
        assert!(payload.section(fixup).unwrap().role.is_placed());
        assert!(payload.concerns().is_empty(), "{:?}", payload.concerns());
    }

    #[test]
    fn rows_that_are_left_out_move_no_others() {
        let (mut elf, places) = Spec::default().elf();
        let table = elf.section("__bug_table", VARS, &[7; 24]);
        let init = elf.section(".init.text", CODE, &[0xc3; 4]);
        let (text, init) = (elf.section_symbol(places.text), elf.section_symbol(init));
        elf.reloc(table, 0, R_PC32, init, 0);
        elf.reloc(table, 12, R_PC32, text, 0);
        let payload = Payload::parse("test.ko", &elf.build()).unwrap();
        let rows = in_place(rows(&payload, &Role::BugTable, 12).unwrap(), 12);
        let bytes: Vec<&[u8]> = rows.iter().map(|r| r.bytes.as_slice()).collect();
        assert_eq!(bytes, [[0; 12], [7; 12]]);
        assert!(rows[0].relocs.is_empty() && rows[1].relocs.len() == 1);
    }
}
