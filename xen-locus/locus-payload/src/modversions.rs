//! CRCs of the exported symbols that a payload was built against (`CONFIG_MODVERSIONS`).
//!
//! `__versions` is an array of `struct modversion_info` (include/linux/module.h): 64 bytes each, a CRC of
//! 8 bytes and then a name. `__version_ext_crcs` has CRCs of 32 bits, and `__version_ext_names` their names
//! of any length. Where these two are, the kernel reads nothing else (`check_version`,
//! kernel/module/version.c).

use std::collections::HashMap;

use super::{Payload, Role, Section};

/// Size of a `struct modversion_info`, and of the CRC at its start, in bytes.
const ENTRY: usize = 64;
const CRC: usize = 8;

impl Payload {
    /// The CRCs of exported symbols that the payload was built against, by name. If a name occurs twice,
    /// its first CRC counts. Empty if the payload has no such sections; entries that are cut short are
    /// left out. Source: `check_version`, kernel/module/version.c of Linux.
    #[must_use]
    pub fn versions(&self) -> HashMap<&[u8], u64> {
        let section = |name: &str| {
            let mut all = self.sections.iter();
            all.find(|s| s.role == Role::Versions && s.name == name)
                .map(|s: &Section| s.data.as_slice())
        };
        let mut found = HashMap::new();
        match section("__version_ext_crcs") {
            Some(crcs) => {
                let names = section("__version_ext_names").unwrap_or_default();
                let crcs = crcs.chunks_exact(4).map(number);
                for (name, crc) in names.split(|&b| b == 0).zip(crcs) {
                    found.entry(name).or_insert(crc);
                }
            }
            None => {
                let table = section("__versions").unwrap_or_default();
                for entry in table.chunks_exact(ENTRY) {
                    let (crc, name) = entry.split_at(CRC);
                    let name = name.split(|&b| b == 0).next().unwrap_or_default();
                    found.entry(name).or_insert(number(crc));
                }
            }
        }
        found
    }
}

/// The little-endian number in `bytes`.
fn number(bytes: &[u8]) -> u64 {
    let digits = bytes.iter().rev();
    digits.fold(0, |n, &b| n << 8 | u64::from(b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testelf::{Spec, ALLOC};

    fn entry(crc: u64, name: &[u8]) -> Vec<u8> {
        let mut bytes = crc.to_le_bytes().to_vec();
        bytes.extend(name);
        bytes.resize(ENTRY, 0);
        bytes
    }

    fn payload(sections: &[(&str, &[u8])]) -> Payload {
        let (mut elf, _) = Spec::default().elf();
        for (name, data) in sections {
            elf.section(name, ALLOC, data);
        }
        Payload::parse("test.ko", &elf.build()).unwrap()
    }

    #[test]
    fn the_extended_table_counts_where_there_is_one_and_the_first_of_a_name() {
        assert!(payload(&[]).versions().is_empty());
        let full = entry(3, &[b'x'; 56]);
        let old = [
            entry(0xdead_beef, b"module_layout"),
            entry(1, b"module_layout"),
            full,
        ];
        let old = [old.concat(), vec![9; 63]].concat();
        let found = payload(&[("__versions", &old)]);
        let found = found.versions();
        assert_eq!(found.get(&b"module_layout"[..]), Some(&0xdead_beef));
        assert_eq!(found.get(&[b'x'; 56][..]), Some(&3));
        assert_eq!(found.len(), 2);
        let crcs = [7u32, 8, 9].map(u32::to_le_bytes).concat();
        let long = [b'y'; 99];
        let names = [b"module_layout\0", &long[..], b"\0"].concat();
        let new = payload(&[
            ("__versions", &old),
            ("__version_ext_crcs", &crcs),
            ("__version_ext_names", &names),
        ]);
        let new = new.versions();
        assert_eq!(new.get(&b"module_layout"[..]), Some(&7));
        assert_eq!(new.get(&long[..]), Some(&8));
        // Without its half it says nothing, as in the kernel.
        let half = payload(&[("__versions", &old), ("__version_ext_crcs", &crcs)]);
        assert!(!half.versions().contains_key(&b"module_layout"[..]));
    }
}
