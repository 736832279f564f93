//! Where the kernel enters a module: what its `struct module` names.

use object::elf;

use super::registers::Target;
use super::state::State;
use super::{Place, Walk};
use crate::role::Role;
use crate::symbol::SymSection;

/// Where the name is in a `struct module`, the only bytes of it that a build fills in.
const NAME: std::ops::Range<usize> = 24..80;
const SUBJECT: &str = "struct module";

impl Walk<'_> {
    /// Goes on where the kernel enters the module. Its `struct module` names `init_module`, and behind that
    /// `cleanup_module` if there is one, which is not followed. That these are the members `init` and `exit` of the
    /// guest's kernel is for the linker to compare.
    pub(super) fn start(&mut self) {
        let payload = self.payload;
        // The reader has seen to it that there is one.
        let module = payload.sections.iter().find(|s| s.role == Role::ThisModule);
        let Some(module) = module else { return };
        let numbered = module.data.iter().enumerate();
        let mut filled = numbered.filter(|(at, byte)| **byte != 0 && !NAME.contains(at));
        if filled.next().is_some() {
            self.name(SUBJECT, "it holds more than the name of the module");
        }
        let (init, exit) = (self.named("init_module"), self.named("cleanup_module"));
        let mut members = self.relocs(module.index, 0, u64::MAX).into_iter();
        let mut expected = [init, exit].into_iter();
        for reloc in members.by_ref() {
            let at = match self.target(&reloc, reloc.offset) {
                Target::Own(place) if reloc.rtype == elf::R_X86_64_64.0 => Some(place),
                _ => None,
            };
            if at.is_none() || expected.next() != Some(at) {
                let name = payload.symbol(reloc.symbol).map_or("?", |s| &*s.name);
                let reason = format!(
                    "at offset {:#x} it refers to {name}; expected init_module, and behind that at \
                     most cleanup_module",
                    reloc.offset
                );
                self.name(SUBJECT, reason);
                return;
            }
            if at == init {
                if let Some(place) = init {
                    self.follow(place, &State::entry(place));
                }
            }
        }
    }

    /// Where the one symbol of this name is in the payload.
    fn named(&mut self, name: &str) -> Option<Place> {
        let here = |s: &&crate::ElfSymbol| s.name == name;
        let mut found = self.payload.symbols.iter().filter(here);
        let symbol = found.next()?;
        if found.next().is_some() {
            self.name(name, "there are several symbols of this name");
            return None;
        }
        match symbol.section {
            SymSection::Section(section) => Some((section, symbol.value)),
            _ => None,
        }
    }
}
