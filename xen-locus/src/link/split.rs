//! Parts of a payload's functions that the compiler put elsewhere because they seldom run.

use std::collections::{HashMap, HashSet};

use locus_kernel::split_functions::{self, PARTS_MAX};
use locus_payload::{ElfSymbol, KlpFunc, Payload, SymSection};

use crate::error::{Error, Result};

/// A part of a new function: where it is in the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Part {
    /// ELF index of its section.
    pub section: usize,
    /// Offset in that section, in bytes.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
}

/// The parts of a payload's new functions that are located elsewhere, found by each name that a function has.
#[derive(Debug)]
pub struct SplitFunctions(HashMap<(usize, u64), Vec<Part>>);

impl SplitFunctions {
    /// Finds them, with one look at each symbol.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): a function has more parts than any compiler makes.
    pub fn of(payload: &Payload) -> Result<SplitFunctions> {
        let funcs = payload.klp.objects.iter().flat_map(|object| &object.funcs);
        let mut found: HashMap<_, Vec<Part>> = funcs.map(|f| (home(f), Vec::new())).collect();
        // A name may be that of several functions.
        let mut named: HashMap<&str, HashSet<(usize, u64)>> = HashMap::new();
        for symbol in &payload.symbols {
            if let Some(at) = place(symbol).filter(|at| found.contains_key(at)) {
                named.entry(&*symbol.name).or_default().insert(at);
            }
        }
        let mut seen = HashSet::new();
        for symbol in payload.symbols.iter().filter(|s| s.size > 0) {
            let Some((section, offset)) = place(symbol) else {
                continue;
            };
            let part = Part {
                section,
                offset,
                size: symbol.size,
            };
            let Some(whole) = split_functions::whole(&symbol.name) else {
                continue;
            };
            // Any number of symbols may be at one place: what they say is heard once.
            let homes = named.get(whole).filter(|_| seen.insert((whole, part)));
            for home in homes.into_iter().flatten() {
                #[cfg(test)]
                LOOKS.set(LOOKS.get() + 1);
                let parts = found.entry(*home).or_default();
                if !parts.contains(&part) {
                    parts.push(part);
                }
                if parts.len() > PARTS_MAX {
                    return Err(Error::not_applicable(format!(
                        "payload {}: the function {} is one of more than {PARTS_MAX} parts of a new \
                         function; no compiler makes so many",
                        payload.name, symbol.name
                    )));
                }
            }
        }
        Ok(SplitFunctions(found))
    }

    /// Those of `func`, in the order of the payload's symbols.
    #[must_use]
    pub fn of_function(&self, func: &KlpFunc) -> &[Part] {
        self.0.get(&home(func)).map_or(&[], Vec::as_slice)
    }
}

#[cfg(test)]
thread_local! {
    /// How often a part was held against a function, for tests of what a file costs.
    static LOOKS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Section and offset of a new function.
fn home(func: &KlpFunc) -> (usize, u64) {
    (func.new_section, func.new_offset)
}

/// Section and offset of a symbol that is defined in the payload.
fn place(symbol: &ElfSymbol) -> Option<(usize, u64)> {
    match symbol.section {
        SymSection::Section(section) => Some((section, symbol.value)),
        _ => None,
    }
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
        let all = SplitFunctions::of(&payload).unwrap();
        let found = all
            .of_function(func)
            .iter()
            .map(|p| (p.section, p.offset, p.size));
        let mut sections = payload.sections.iter();
        let index = sections.position(|s| s.name == ".text.unlikely").unwrap();
        assert_eq!(found.collect::<Vec<_>>(), [(index, 16, 8), (index, 32, 4)]);
    }

    #[test]
    fn symbols_that_say_the_same_are_heard_once() {
        let (mut elf, places) = Spec::default().elf();
        let unlikely = elf.section(".text.unlikely", CODE, &[0xc3; 64]);
        let section = u16::try_from(unlikely).unwrap();
        for n in 0..1000 {
            let name = "new_0_cmdline_proc_show";
            elf.symbol(name, u16::try_from(places.text).unwrap(), 16, 11, 2);
            elf.symbol(&format!("{name}.cold"), section, 16, 8, 2);
            elf.symbol(&format!("{name}.cold.{n}"), section, 16, 8, 2);
        }
        let payload = Payload::parse("locus_test.ko", &elf.build()).unwrap();
        LOOKS.set(0);
        let all = SplitFunctions::of(&payload).unwrap();
        assert_eq!(all.of_function(&payload.klp.objects[0].funcs[0]).len(), 1);
        assert_eq!(LOOKS.get(), 1);
    }

    #[test]
    fn a_function_of_more_parts_than_compilers_make_is_refused() {
        let (mut elf, places) = Spec::default().elf();
        let text = u16::try_from(places.text).unwrap();
        for offset in 0..65 {
            elf.symbol(
                "new_0_cmdline_proc_show.cold",
                text,
                offset % 16,
                1 + offset,
                2,
            );
        }
        let grown = elf.data(places.text).len() + 128;
        elf.data(places.text).resize(grown, 0xc3);
        let payload = Payload::parse("locus_test.ko", &elf.build()).unwrap();
        let error = SplitFunctions::of(&payload).unwrap_err().to_string();
        assert!(error.contains("more than 64 parts"), "{error}");
    }
}
