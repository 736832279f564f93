//! VMCOREINFO: what the kernel writes about itself for programs that read its memory.
//!
//! It is text of lines `KEY=VALUE` (Documentation/admin-guide/kdump/vmcoreinfo.rst), among them
//! `SYMBOL(name)`, `OFFSET(struct.member)`, `SIZE(struct)`, `LENGTH(array)` and `NUMBER(name)`.
//! `vmcoreinfo_data` points to it, and `vmcoreinfo_size` is its length in bytes
//! (kernel/crash_core.c, later kernel/vmcore_info.c).
//!
//! This crate uses it as a cross-check only: what it says must agree with what was found otherwise.
//! A kernel without it is read equally well.

use std::collections::BTreeMap;

use locus_guest::addr::Gva;

use crate::locate::KERNEL_MAP;
use crate::{to_usize, Error, Kernel};

/// Longest believed text, in bytes: the kernel gives it a page.
const TEXT_MAX: u64 = 64 << 10;
/// The least alignment of a kernel image, in bytes (`CONFIG_PHYSICAL_ALIGN`).
const IMAGE_ALIGN: u64 = 2 << 20;

/// The kernel's text about itself, and its values by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmcoreInfo {
    text: String,
    values: BTreeMap<String, String>,
}

impl VmcoreInfo {
    /// Reads the text; `None` if the kernel has none, or has not written it yet.
    ///
    /// # Errors
    /// [`Error::Odd`] if it is longer than 64 KiB or not printable, [`Error::Memory`].
    pub fn read(kernel: &Kernel<'_>) -> Result<Option<VmcoreInfo>, Error> {
        let symbol = |name| kernel.symbols.addr(name);
        let (Some(data), Some(size)) = (symbol("vmcoreinfo_data"), symbol("vmcoreinfo_size"))
        else {
            return Ok(None);
        };
        let at = Gva(kernel.space.read_u64(data)?);
        let size = kernel.space.read_u64(size)?;
        if at.0 == 0 || size == 0 {
            return Ok(None);
        }
        if size > TEXT_MAX {
            return Err(Error::Odd(format!(
                "vmcoreinfo_size is {size}; expected at most {TEXT_MAX} bytes"
            )));
        }
        VmcoreInfo::parse(kernel.space.read_vec(at, to_usize(size)?)?).map(Some)
    }

    /// Splits the text into its lines. Of two lines with the same key the last counts, because the
    /// kernel appends. A line without `=` has no value.
    ///
    /// # Errors
    /// [`Error::Odd`] if it is not printable text.
    pub fn parse(bytes: Vec<u8>) -> Result<VmcoreInfo, Error> {
        let printable = |b: &u8| b.is_ascii_graphic() || matches!(b, b' ' | b'\n' | b'\t');
        if let Some((at, byte)) = bytes.iter().enumerate().find(|(_, b)| !printable(b)) {
            return Err(Error::Odd(format!(
                "VMCOREINFO has byte {byte:#04x} at offset {at} of {}; expected printable text",
                bytes.len()
            )));
        }
        let text = String::from_utf8(bytes)
            .map_err(|e| Error::Odd(format!("VMCOREINFO is no text: {e}")))?;
        let values = text
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        Ok(VmcoreInfo { text, values })
    }

    /// The text as the kernel wrote it.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// All keys with their values, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.values.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    /// The text behind `key=`; `None` if there is no such line.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }

    fn of(&self, what: &str, name: &str) -> Option<&str> {
        self.get(&format!("{what}({name})"))
    }

    /// `SYMBOL(name)`: a guest virtual address.
    #[must_use]
    pub fn symbol(&self, name: &str) -> Option<Gva> {
        hexadecimal(self.of("SYMBOL", name)?).map(Gva)
    }

    /// `OFFSET(path)`, with a path such as `page.flags`: the offset of a member, in bytes.
    #[must_use]
    pub fn offset(&self, path: &str) -> Option<u64> {
        self.of("OFFSET", path)?.parse().ok()
    }

    /// `SIZE(name)`: the size of a type or variable, in bytes.
    #[must_use]
    pub fn size(&self, name: &str) -> Option<u64> {
        self.of("SIZE", name)?.parse().ok()
    }

    /// `LENGTH(name)`: how many elements an array has.
    #[must_use]
    pub fn length(&self, name: &str) -> Option<u64> {
        self.of("LENGTH", name)?.parse().ok()
    }

    /// `NUMBER(name)`: a constant or variable of the kernel.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<i64> {
        self.of("NUMBER", name)?.parse().ok()
    }

    /// `KERNELOFFSET`: how far the image is from where it was linked (KASLR), in bytes.
    #[must_use]
    pub fn kernel_offset(&self) -> Option<u64> {
        u64::from_str_radix(self.get("KERNELOFFSET")?, 16).ok()
    }

    /// Compares the text with `kernel`, and returns how many values agreed. Compared are release,
    /// build-id, KASLR offset, levels of page tables, `phys_base`, and the addresses of symbols and
    /// of the symbol tables themselves. What either side does not know is not compared.
    ///
    /// # Errors
    /// [`Error::Odd`] with both values at the first difference, [`Error::Memory`].
    pub fn check(&self, kernel: &Kernel<'_>) -> Result<usize, Error> {
        let mut agreed = 0;
        let mut same = |key: String, found: Option<String>| {
            let (Some(said), Some(found)) = (self.get(&key), found) else {
                return Ok(());
            };
            if said != found {
                return Err(Error::Odd(format!(
                    "its VMCOREINFO says {key} is {said}, but in its memory it is {found}"
                )));
            }
            agreed += 1;
            Ok(())
        };
        same("OSRELEASE".into(), Some(kernel.release.clone()))?;
        same(
            "BUILD-ID".into(),
            kernel.build_id.as_deref().map(hex::encode),
        )?;
        let five = i32::from(kernel.space.levels() == 5);
        same("NUMBER(pgtable_l5_enabled)".into(), Some(five.to_string()))?;
        let phys_base = match kernel.variable_if_any("phys_base", 8)? {
            Some(at) => Some(kernel.space.read_u64(at)?.cast_signed().to_string()),
            None => None,
        };
        same("NUMBER(phys_base)".into(), phys_base)?;
        let symbols = [
            ("_stext", "_stext"),
            ("init_uts_ns", "init_uts_ns"),
            // arch/x86/include/asm/pgtable_64.h: swapper_pg_dir is another name for it.
            ("swapper_pg_dir", "init_top_pgt"),
        ]
        .map(|(said, symbol)| (said, kernel.symbols.addr(symbol)));
        let places = kernel
            .symbols
            .places
            .iter()
            .map(|(n, at)| (n.as_str(), Some(*at)));
        for (name, at) in symbols.into_iter().chain(places) {
            let found = at.map(|at| format!("{:x}", at.0));
            same(format!("SYMBOL({name})"), found)?;
        }
        if let Some(offset) = self.get("KERNELOFFSET") {
            // Where the kernel was linked (CONFIG_PHYSICAL_START) is not in the guest. But without
            // the offset, the text must be at a place for a kernel.
            let linked = self
                .kernel_offset()
                .and_then(|offset| kernel.text_base.0.checked_sub(offset))
                .filter(|at| *at >= KERNEL_MAP.0 && at.is_multiple_of(IMAGE_ALIGN));
            if linked.is_none() {
                return Err(Error::Odd(format!(
                    "VMCOREINFO has KERNELOFFSET={offset}, but the kernel's text is at {}",
                    kernel.text_base
                )));
            }
            agreed += 1;
        }
        Ok(agreed)
    }
}

fn hexadecimal(text: &str) -> Option<u64> {
    // `from_str_radix` would take a sign.
    text.starts_with(|c: char| c.is_ascii_hexdigit())
        .then(|| u64::from_str_radix(text, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{vcpus, Fixture, KIND, RODATA, TABLES, TEXT};

    const DATA: Gva = Gva(0xffff_8880_0000_0000);

    /// The fixture's kernel with VMCOREINFO `text`, whose `vmcoreinfo_size` is `size`.
    fn kernel_with<T>(text: &str, size: u64, look: impl FnOnce(&Kernel<'_>) -> T) -> T {
        let mut fixture = Fixture::new();
        let data = ("vmcoreinfo_data", DATA.0.to_le_bytes().to_vec());
        let size = ("vmcoreinfo_size", size.to_le_bytes().to_vec());
        fixture.constants.extend([data, size]);
        let memory = fixture.build();
        memory.map_bytes(DATA, text.as_bytes(), true, false);
        // The kernel's space begins at a page that holds the root.
        look(&Kernel::read(&memory, KIND, &vcpus()).unwrap())
    }

    fn check(text: &str) -> Result<usize, Error> {
        kernel_with(text, text.len() as u64, |kernel| {
            VmcoreInfo::read(kernel).unwrap().unwrap().check(kernel)
        })
    }

    #[test]
    fn every_kind_of_line_is_read() {
        let text =
            "OSRELEASE=6.1.0-test\nBUILD-ID=00ff\nPAGESIZE=4096\nSYMBOL(_stext)=ffffffff81000000\n\
                    OFFSET(page.flags)=0\nSIZE(page)=64\nLENGTH(mem_section)=2048\n\
                    NUMBER(PG_lru)=-129\nCRASHTIME=1\nCRASHTIME=2\nno key\n";
        let info = VmcoreInfo::parse(text.into()).unwrap();
        assert_eq!(info.text(), text);
        assert_eq!(info.get("OSRELEASE"), Some("6.1.0-test"));
        assert_eq!(info.symbol("_stext"), Some(TEXT));
        assert_eq!(info.offset("page.flags"), Some(0));
        assert_eq!(info.size("page"), Some(64));
        assert_eq!(info.length("mem_section"), Some(2048));
        assert_eq!(info.number("PG_lru"), Some(-129));
        assert_eq!(info.get("CRASHTIME"), Some("2"));
        assert_eq!(info.iter().count(), 9);
        assert_eq!(info.symbol("page"), None);
    }

    #[test]
    fn numbers_that_are_none_are_not_taken() {
        let text =
            "SYMBOL(a)=+1\nSYMBOL(b)=\nSYMBOL(c)=11112222333344445\nSIZE(d)=-1\nNUMBER(e)=x\n";
        let info = VmcoreInfo::parse(text.into()).unwrap();
        assert_eq!(info.symbol("a"), None);
        assert_eq!(info.symbol("b"), None);
        assert_eq!(info.symbol("c"), None);
        assert_eq!(info.size("d"), None);
        assert_eq!(info.number("e"), None);
    }

    #[test]
    fn what_agrees_is_counted() {
        let text = format!(
            "OSRELEASE=6.1.0-test\nKERNELOFFSET=0\nNUMBER(pgtable_l5_enabled)=0\n\
             SYMBOL(swapper_pg_dir)={:x}\nSYMBOL(node_online_map)=1234\n",
            TABLES.0
        );
        assert_eq!(check(&text).unwrap(), 4);
    }

    #[test]
    fn a_disagreement_names_both_values() {
        for (line, found) in [
            ("OSRELEASE=6.1.0-other", "6.1.0-test".to_owned()),
            ("KERNELOFFSET=200100", format!("{TEXT}")),
            ("KERNELOFFSET=80000000", format!("{TEXT}")),
            ("NUMBER(pgtable_l5_enabled)=1", "0".into()),
            ("SYMBOL(swapper_pg_dir)=1", format!("{:x}", TABLES.0)),
        ] {
            let error = check(&format!("{line}\n")).unwrap_err().to_string();
            let said = line.split('=').nth(1).unwrap();
            assert!(error.contains(said) && error.contains(&found), "{error}");
        }
    }

    #[test]
    fn the_symbol_tables_must_stand_where_they_were_found() {
        let names = kernel_with("A=1\n", 4, |kernel| {
            let places: Vec<&str> = kernel.symbols.places.iter().map(|p| p.0.as_str()).collect();
            assert_eq!(places.len(), 6, "{places:?}");
            for (name, at) in &kernel.symbols.places {
                assert!(at.0 > RODATA.0, "{name} at {at}");
            }
            kernel.symbols.places.clone()
        });
        let lines = |shift: u64| -> String {
            let line = |(name, at): &(String, Gva)| format!("SYMBOL({name})={:x}\n", at.0 + shift);
            names.iter().map(line).collect()
        };
        assert_eq!(check(&lines(0)).unwrap(), 6);
        assert!(check(&lines(8)).is_err());
    }

    #[test]
    fn a_kernel_without_it_or_before_it_is_fine() {
        let memory = Fixture::new().build();
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        assert_eq!(VmcoreInfo::read(&kernel).unwrap(), None);
        kernel_with("", 0, |kernel| {
            assert_eq!(VmcoreInfo::read(kernel).unwrap(), None);
        });
    }

    #[test]
    fn a_size_beyond_belief_or_beyond_memory_is_refused() {
        for size in [u64::MAX, TEXT_MAX + 1, 8192] {
            kernel_with("A=1\n", size, |kernel| {
                assert!(VmcoreInfo::read(kernel).is_err(), "{size}");
            });
        }
    }

    #[test]
    fn any_byte_is_refused_or_harmless() {
        let good = b"OSRELEASE=6.1\nSYMBOL(_stext)=ffffffff81000000\nNUMBER(x)=-1\n";
        for at in 0..good.len() {
            for value in 0..=255 {
                let mut bad = good.to_vec();
                bad[at] = value;
                let printable = value.is_ascii_graphic() || b" \n\t".contains(&value);
                let parsed = VmcoreInfo::parse(bad);
                assert_eq!(parsed.is_ok(), printable);
                if let Ok(info) = parsed {
                    let _ = (info.symbol("_stext"), info.number("x"));
                }
            }
        }
    }
}
