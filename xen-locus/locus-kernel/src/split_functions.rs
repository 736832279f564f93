//! Functions that the compiler has split: code that seldom runs is placed elsewhere, under a symbol
//! of its own (GCC's `-freorder-blocks-and-partition`).
//!
//! A thread in such a part is in the function, because it goes on in the main part.
//!
//! Which symbols there are is the guest's choice. So a function has a bounded number of names and parts here.

use std::collections::{BTreeSet, HashSet};

use locus_guest::addr::Gva;

use crate::Error;

/// What GCC appends to the function's name to name the part.
pub const SUFFIX: &str = ".cold";

/// Most parts believed of one function. Compilers make one, or two.
pub const PARTS_MAX: usize = 64;

/// Most names believed of one function: aliases of it, and marks of the linker at its address.
pub const NAMES_MAX: usize = 256;

/// The name of the function of which the symbol `part` names a part: `NAME.cold`, or `NAME.cold.N` as GCC 8 has it.
/// `None` if it names no part.
#[must_use]
pub fn whole(part: &str) -> Option<&str> {
    let (name, rest) = part.rsplit_once(SUFFIX)?;
    (rest.is_empty() || rest.starts_with('.')).then_some(name)
}

/// What is found of one function: its names, and its parts that are located elsewhere.
#[derive(Debug)]
pub struct OneFunction {
    entry: Gva,
    names: HashSet<String>,
    /// Guest virtual addresses of the parts.
    pub parts: BTreeSet<Gva>,
}

impl OneFunction {
    /// The function at `entry`. Nothing is found yet.
    #[must_use]
    pub fn new(entry: Gva) -> OneFunction {
        OneFunction {
            entry,
            names: HashSet::new(),
            parts: BTreeSet::new(),
        }
    }

    /// Adds a name of the function.
    ///
    /// # Errors
    /// [`Error::Odd`] if it has more than [`NAMES_MAX`].
    pub fn named(&mut self, name: &str) -> Result<(), Error> {
        if !self.names.contains(name) {
            self.names.insert(name.to_owned());
        }
        self.believable("names", self.names.len(), NAMES_MAX)
    }

    /// Adds the symbol `name` at `at` if it is a part of the function, all of whose names are known by now.
    ///
    /// # Errors
    /// [`Error::Odd`] if it has more than [`PARTS_MAX`].
    pub fn part(&mut self, name: &str, at: Gva) -> Result<(), Error> {
        if whole(name).is_some_and(|whole| self.names.contains(whole)) {
            self.parts.insert(at);
        }
        self.believable("parts elsewhere", self.parts.len(), PARTS_MAX)
    }

    fn believable(&self, what: &str, count: usize, most: usize) -> Result<(), Error> {
        if count > most {
            return Err(Error::Odd(format!(
                "the guest's symbols give the function at {} more than {most} {what}; expected at most {most}",
                self.entry
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_told_from_another_function_and_its_parts() {
        for (part, name) in [
            ("f.cold", "f"),
            ("f.cold.12", "f"),
            ("f.isra.0.cold", "f.isra.0"),
            ("f.isra.0.cold.12", "f.isra.0"),
            ("f.cold.cold", "f.cold"),
            (".cold", ""),
        ] {
            assert_eq!(whole(part), Some(name), "{part}");
        }
        for other in ["", "f", "f.coldest", "cold", "f.cold.coldest"] {
            assert_eq!(whole(other), None, "{other}");
        }
    }
}
