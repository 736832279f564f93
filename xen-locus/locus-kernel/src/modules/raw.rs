//! A `struct module` as it is in memory.

use locus_guest::addr::{Gva, Range};
use locus_guest::fetch;

use super::layout::{ModuleLayout, PartsLayout};
use super::ModulePart;
use crate::Error;

/// A `struct module`, copied.
pub(super) struct RawModule {
    pub addr: Gva,
    pub bytes: Vec<u8>,
}

impl RawModule {
    fn short(&self) -> Error {
        let addr = self.addr;
        Error::Odd(format!(
            "struct module at {addr} is shorter than its members"
        ))
    }

    /// The 64-bit word at offset `at`.
    pub fn word(&self, at: usize) -> Result<u64, Error> {
        fetch::u64(&self.bytes, at).ok_or_else(|| self.short())
    }

    /// The 32-bit word at offset `at`.
    pub fn half(&self, at: usize) -> Result<u32, Error> {
        fetch::u32(&self.bytes, at).ok_or_else(|| self.short())
    }

    pub fn name(&self, layout: &ModuleLayout) -> String {
        // A member behind the end is an empty name.
        let bytes = self.bytes.get(layout.name..).unwrap_or_default();
        super::text(bytes, layout.name_len)
    }

    /// All parts of its memory, empty ones too.
    pub fn parts(&self, layout: &PartsLayout) -> Result<Vec<ModulePart>, Error> {
        let part = |kind: &str, base: usize, size: usize| {
            Ok(ModulePart {
                kind: kind.to_owned(),
                range: Range::new(Gva(self.word(base)?), self.half(size)?.into()),
            })
        };
        match layout {
            PartsLayout::Layouts(all) => {
                let all = all.iter().map(|&(kind, base, size)| part(kind, base, size));
                all.collect()
            }
            PartsLayout::Memory {
                at,
                stride,
                base,
                size,
                kinds,
            } => {
                let all = kinds.iter().enumerate().map(|(i, kind)| {
                    let at = at + i * stride;
                    part(kind, at + base, at + size)
                });
                all.collect()
            }
        }
    }
}
