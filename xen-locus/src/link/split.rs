//! Parts of a payload's functions that the compiler put elsewhere because they seldom run.

use locus_kernel::split_functions;
use locus_payload::{ElfSymbol, KlpFunc, Payload, SymSection};

/// A part of a new function: where it is in the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// ELF index of its section.
    pub section: usize,
    /// Offset in that section, in bytes.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
}

/// The parts of a new function that are located elsewhere, found by each name that the function has.
pub fn parts<'a>(payload: &'a Payload, func: &KlpFunc) -> impl Iterator<Item = Part> + 'a {
    let place = |s: &ElfSymbol| match s.section {
        SymSection::Section(section) => Some((section, s.value)),
        _ => None,
    };
    let own = Some((func.new_section, func.new_offset));
    let names = payload.symbols.iter().filter(move |s| place(s) == own);
    let names: Vec<&str> = names.map(|s| &*s.name).collect();
    let is_part = move |s: &&ElfSymbol| {
        s.size > 0
            && names
                .iter()
                .any(|name| split_functions::is_part(&s.name, name))
    };
    let parts = payload.symbols.iter().filter(is_part);
    parts.filter_map(move |s| {
        place(s).map(|(section, offset)| Part {
            section,
            offset,
            size: s.size,
        })
    })
}

#[cfg(test)]
mod tests {
    use locus_payload::testelf::{Spec, CODE};

    use super::*;

    #[test]
    fn parts_of_a_new_function_that_are_located_elsewhere_are_found() {
        let parse = |bytes: &[u8]| Payload::parse("locus_test.ko", bytes).unwrap();
        let (mut elf, places) = Spec::default().elf();
        let unlikely = elf.section(".text.unlikely", CODE, &[0xc3; 64]);
        let section = u16::try_from(unlikely).unwrap();
        let own = parse(&Spec::default().bytes()).klp.objects[0].funcs[0].clone();
        let text = u16::try_from(places.text).unwrap();
        // By another name of the function, and by none.
        elf.symbol("again", text, own.new_offset, 11, 2);
        elf.symbol("new_0_cmdline_proc_show.cold", section, 16, 8, 2);
        elf.symbol("again.cold", section, 32, 4, 2);
        elf.symbol("other.cold", section, 40, 4, 2);
        let payload = parse(&elf.build());
        let func = &payload.klp.objects[0].funcs[0];
        let found = parts(&payload, func).map(|p| (p.section, p.offset, p.size));
        let mut sections = payload.sections.iter();
        let index = sections.position(|s| s.name == ".text.unlikely").unwrap();
        assert_eq!(found.collect::<Vec<_>>(), [(index, 16, 8), (index, 32, 4)]);
    }
}
