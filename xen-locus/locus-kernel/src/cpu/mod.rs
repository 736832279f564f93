//! The processor as the kernel sees it, and what the kernel does against the processor's bugs.
//!
//! Code for a running kernel must fit the kernel's alternatives, return thunks and page-table
//! isolation. The kernel chose them when it booted. The bits are in `boot_cpu_data.x86_capability`,
//! which also decides alternatives: first the words of features, then those of bugs. Their names
//! come from the kernel's own tables `x86_cap_flags` and `x86_bug_flags`
//! (arch/x86/kernel/cpu/mkcapflags.sh), so no bit is known beforehand.

use std::collections::BTreeMap;

use locus_guest::addr::{Gva, Range};

use crate::btf::TypeKind;
use crate::{to_usize, Error, Kernel};

/// Most words of bits believed; Linux has about 24.
const WORDS_MAX: usize = 64;
/// Most words of bugs believed.
const BUG_WORDS_MAX: usize = 4;
/// Bytes of names for one word: 32 pointers.
const NAMES_LEN: u64 = 32 * 8;
/// Longest believed name, in bytes.
const NAME_MAX: usize = 64;
/// Most variables for mitigations believed: Debian's 6.1 has 20.
const MITIGATIONS_MAX: usize = 64;

/// Variables that hold a choice and whose enumeration isn't called like them
/// (arch/x86/kernel/cpu/bugs.c).
const OTHER_NAMES: [(&str, &str); 5] = [
    ("spectre_v2_enabled", "spectre_v2_mitigation"),
    ("spectre_v2_user_stibp", "spectre_v2_user_mitigation"),
    ("spectre_v2_user_ibpb", "spectre_v2_user_mitigation"),
    ("ssb_mode", "ssb_mitigation"),
    ("cfi_mode", "cfi_mode"),
];

/// The processor that the kernel booted on, and the kernel's choices for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    words: Vec<u32>,
    feature_words: usize,
    names: Vec<Option<String>>,
    mitigations: BTreeMap<String, String>,
    return_thunk: Option<Gva>,
}

impl Cpu {
    /// Reads bits, names and choices from the guest's memory.
    ///
    /// # Errors
    /// [`Error::Missing`] if a symbol or type is; [`Error::Odd`] if sizes don't agree or a name is
    /// none; [`Error::Memory`].
    pub fn read(kernel: &Kernel<'_>) -> Result<Cpu, Error> {
        let btf = kernel.btf()?;
        let count = btf.array_len("cpuinfo_x86", "x86_capability")?;
        let at = btf.offset_of("cpuinfo_x86", "x86_capability")? as u64;
        let features_at = kernel.symbols.need("x86_cap_flags")?;
        let bugs_at = kernel.symbols.need("x86_bug_flags")?;
        let room = |at| {
            // Behind the last symbol no size is known, so there is room for nothing.
            to_usize(kernel.symbols.room(at).unwrap_or(0) / NAMES_LEN)
        };
        let (feature_words, bug_room) = (room(features_at)?, room(bugs_at)?);
        let bug_words = count.saturating_sub(feature_words);
        if count > WORDS_MAX || !(1..=BUG_WORDS_MAX.min(bug_room)).contains(&bug_words) {
            return Err(Error::Odd(format!(
                "x86_capability has {count} words, x86_cap_flags names for {feature_words} and \
                 x86_bug_flags for at most {bug_room}; expected the latter two to make up the first"
            )));
        }
        let bytes = kernel
            .space
            .read_vec(kernel.symbols.need("boot_cpu_data")?.plus(at), 4 * count)?;
        let (words, _) = bytes.as_chunks::<4>();
        let words = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let mut names = read_names(kernel, features_at, feature_words)?;
        names.extend(read_names(kernel, bugs_at, bug_words)?);
        let return_thunk = match kernel.variable_if_any("x86_return_thunk", 8)? {
            Some(at) => Some(Gva(kernel.space.read_u64(at)?)),
            None => None,
        };
        Ok(Cpu {
            words,
            feature_words,
            names,
            mitigations: read_mitigations(kernel)?,
            return_thunk,
        })
    }

    /// All words of `x86_capability`, of features and then of bugs.
    #[must_use]
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Whether a bit is set, by its number: 32 times the word plus the bit in it, as in
    /// arch/x86/include/asm/cpufeatures.h. False behind the last word.
    #[must_use]
    pub fn has(&self, bit: usize) -> bool {
        self.words
            .get(bit / 32)
            .is_some_and(|w| w >> (bit % 32) & 1 == 1)
    }

    /// Whether the processor has the feature or bug `name`; `None` if the kernel has no bit of that name.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<bool> {
        let bit = self.names.iter().position(|n| n.as_deref() == Some(name))?;
        Some(self.has(bit))
    }

    /// Names of the features that it has, in the order of `flags` in /proc/cpuinfo. Bits without a
    /// name are only in [`Cpu::words`].
    #[must_use]
    pub fn features(&self) -> Vec<&str> {
        self.set_names(0, 32 * self.feature_words)
    }

    /// Names of the bugs that it has, in the order of `bugs` in /proc/cpuinfo.
    #[must_use]
    pub fn bugs(&self) -> Vec<&str> {
        self.set_names(32 * self.feature_words, self.names.len())
    }

    fn set_names(&self, from: usize, to: usize) -> Vec<&str> {
        let name = |bit: usize| self.names.get(bit)?.as_deref();
        (from..to)
            .filter(|&bit| self.has(bit))
            .filter_map(name)
            .collect()
    }

    /// What the kernel chose against each bug: the variable's name, and the name of its value in
    /// its enumeration. A choice against a bug that the processor does not have ([`Cpu::bugs`]) may
    /// be a default without meaning.
    #[must_use]
    pub fn mitigations(&self) -> &BTreeMap<String, String> {
        &self.mitigations
    }

    /// Whether page-table isolation is on.
    #[must_use]
    pub fn pti(&self) -> bool {
        self.named("pti") == Some(true)
    }

    /// Guest virtual address of the code that functions return through (`x86_return_thunk`); `None`
    /// if the kernel has no return thunks.
    #[must_use]
    pub fn return_thunk(&self) -> Option<Gva> {
        self.return_thunk
    }
}

/// The names at `at`, 32 for each of `words` words.
fn read_names(kernel: &Kernel<'_>, at: Gva, words: usize) -> Result<Vec<Option<String>>, Error> {
    let bytes = kernel.space.read_vec(at, 32 * 8 * words)?;
    let mut names = Vec::with_capacity(32 * words);
    let (pointers, _) = bytes.as_chunks::<8>();
    for pointer in pointers {
        let pointer = u64::from_le_bytes(*pointer);
        names.push(if pointer == 0 {
            None
        } else {
            let name = kernel.space.read_cstr(Gva(pointer), NAME_MAX)?;
            if name.is_empty() || !name.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(Error::Odd(format!(
                    "a CPU feature at {} is named {name:?}; expected a word",
                    Gva(pointer)
                )));
            }
            Some(name)
        });
    }
    Ok(names)
}

/// The choices in every variable `…_mitigation` whose enumeration has the same name, or the same
/// with an `s`, and in the [`OTHER_NAMES`]. Variables that the kernel discarded after it booted are
/// passed over.
fn read_mitigations(kernel: &Kernel<'_>) -> Result<BTreeMap<String, String>, Error> {
    let btf = kernel.btf()?;
    let symbol = |name| kernel.symbols.addr(name);
    let discarded = match (symbol("__init_begin"), symbol("__init_end")) {
        (Some(start), Some(end)) => Range { start, end },
        _ => Range::new(Gva(0), 0),
    };
    let is_enum = |name: &&String| {
        btf.find(&[TypeKind::Enum, TypeKind::Enum64], name)
            .is_some()
    };
    let mut found = BTreeMap::new();
    let mut looked_at = 0;
    let like = kernel.symbols.ending("_mitigation").map(|s| (s, None));
    let others = OTHER_NAMES.iter().flat_map(|(name, ty)| {
        let symbols = kernel.symbols.all(name);
        symbols.map(move |s| (s, Some(*ty)))
    });
    for (s, known) in like.chain(others) {
        if !matches!(s.kind, 'd' | 'D' | 'b' | 'B' | 'r' | 'R') || discarded.contains(s.addr) {
            continue;
        }
        // Each costs a search of all types.
        looked_at += 1;
        if looked_at > MITIGATIONS_MAX {
            return Err(Error::Odd(format!(
                "more than {MITIGATIONS_MAX} variables for mitigations"
            )));
        }
        let candidates = match known {
            Some(ty) => vec![ty.to_owned()],
            None => vec![s.name.clone(), format!("{}s", s.name)],
        };
        let Some(ty) = candidates.iter().find(is_enum) else {
            continue;
        };
        let value = kernel.space.read_u32(s.addr)?.cast_signed();
        let name = btf
            .enum_name(ty, value.into())
            .unwrap_or_else(|| format!("{value}, which {ty} has no name for"));
        let plain = |text: &str| text.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
        if !plain(&s.name) || !plain(&name) {
            return Err(Error::Odd(format!(
                "the mitigation {:?} is {name:?}; expected plain names",
                s.name
            )));
        }
        found.insert(s.name, name);
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
