//! `.modinfo`: the `key=value` strings of a module, each ended by a zero byte.

use serde::Serialize;

use super::error::{limit, PayloadErrorKind, Result};

/// Most entries, and most names in the lists of all entries of one key.
const MAX_ENTRIES: u64 = 4096;
/// Longest entry, in bytes.
const MAX_VALUE: u64 = 16 << 10;
/// Longest build-id, in hex digits (`BUILD_ID_SIZE_MAX` of the kernel is 20 bytes).
const MAX_BUILD_ID: usize = 64;
/// Longest module name: `MODULE_NAME_LEN` of 64-bit kernels, less the final zero.
const MAX_MODULE_NAME: usize = 55;

/// What a module says about itself (`MODULE_INFO`, include/linux/module.h of Linux).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Modinfo {
    /// `name`: the module's name; kbuild writes it since Linux 4.13.
    pub name: Option<String>,
    /// `vermagic`: release and build options of the kernel that the module was built for.
    pub vermagic: String,
    /// `license`, such as `GPL`.
    pub license: Option<String>,
    /// `description`: one line for people.
    pub description: Option<String>,
    /// True if there is a `livepatch` entry. The kernel does not read its value, and neither does this.
    pub livepatch: bool,
    /// `depends`: modules that must be loaded first.
    pub depends: Vec<String>,
    /// `cves`: the CVE ids that the payload fixes. An extension of xen-locus.
    pub cves: Vec<String>,
    /// `supersedes`: names of the payloads that it replaces. An extension of xen-locus.
    pub supersedes: Vec<String>,
    /// `target_build_id`: build-id of the one kernel that it was made for. Unlike `vermagic`, it is
    /// different for each build of a kernel. An extension of xen-locus.
    #[serde(skip)]
    pub target_build_id: Option<Vec<u8>>,
    /// `entry_only=Y`: old and new versions of its functions may run at the same time, in different
    /// threads. An extension of xen-locus.
    pub entry_only: bool,
    /// All other entries, in their order.
    pub others: Vec<(String, String)>,
}

impl Modinfo {
    /// The kernel release: the first word of `vermagic`, such as `6.1.0-56-amd64`.
    #[must_use]
    pub fn kernel_release(&self) -> &str {
        self.vermagic.split_whitespace().next().unwrap_or_default()
    }

    /// Reads the contents of a section `.modinfo`.
    pub(super) fn parse(data: &[u8]) -> Result<Self> {
        let mut info = Self::default();
        let mut vermagic = None;
        let mut livepatch = None;
        let mut target = None;
        let mut entry_only = None;
        let mut entries = 0u64;
        for entry in data.split(|b| *b == 0).filter(|entry| !entry.is_empty()) {
            entries = entries.saturating_add(1);
            limit("the number of .modinfo entries", entries, MAX_ENTRIES)?;
            limit(
                "the length of a .modinfo entry",
                entry.len() as u64,
                MAX_VALUE,
            )?;
            let shown = || String::from_utf8_lossy(entry).into_owned();
            let (key, value) = std::str::from_utf8(entry)
                .ok()
                .and_then(|entry| entry.split_once('='))
                .ok_or_else(|| {
                    PayloadErrorKind::modinfo(format!("entry {:?} is not key=value", shown()))
                })?;
            if key.chars().any(char::is_control)
                || value
                    .chars()
                    .any(|c| c.is_control() && c != '\n' && c != '\t')
            {
                return Err(PayloadErrorKind::modinfo(format!(
                    "entry {:?} has control characters",
                    shown()
                )));
            }
            match key {
                "name" => once(&mut info.name, key, value)?,
                "vermagic" => once(&mut vermagic, key, value.trim())?,
                "livepatch" => once(&mut livepatch, key, value)?,
                "entry_only" => once(&mut entry_only, key, value.trim())?,
                "target_build_id" => once(&mut target, key, value.trim())?,
                "license" => once(&mut info.license, key, value)?,
                "description" => once(&mut info.description, key, value)?,
                "depends" => list(&mut info.depends, value)?,
                "cves" => list(&mut info.cves, value)?,
                "supersedes" => list(&mut info.supersedes, value)?,
                _ => info.others.push((key.to_owned(), value.to_owned())),
            }
        }
        info.livepatch = livepatch.is_some();
        info.vermagic = vermagic.filter(|v| !v.is_empty()).ok_or_else(|| {
            PayloadErrorKind::modinfo(
                "no vermagic, which says what kernel it is for (object files, .o, have none)",
            )
        })?;
        if let Some(name) = &info.name {
            check_name(name)?;
        }
        info.entry_only = match entry_only.as_deref() {
            None | Some("N") => false,
            Some("Y") => true,
            Some(other) => {
                return Err(PayloadErrorKind::modinfo(format!(
                    "entry_only is {other:?}, expected Y or N"
                )))
            }
        };
        if let Some(text) = target {
            info.target_build_id = Some(build_id(&text).ok_or_else(|| {
                PayloadErrorKind::modinfo(format!(
                    "target_build_id is {text:?}, expected 2 to {MAX_BUILD_ID} hex digits, two a byte"
                ))
            })?);
        }
        Ok(info)
    }
}

/// The bytes of a build-id that is written as hex digits.
fn build_id(text: &str) -> Option<Vec<u8>> {
    if text.is_empty() || text.len() > MAX_BUILD_ID {
        return None;
    }
    hex::decode(text).ok()
}

/// Stores a value. It may be given again only if it is the same.
fn once(slot: &mut Option<String>, key: &str, value: &str) -> Result<()> {
    match slot {
        Some(first) if first != value => Err(PayloadErrorKind::modinfo(format!(
            "{key} is given twice, as {first:?} and as {value:?}"
        ))),
        _ => {
            *slot = Some(value.to_owned());
            Ok(())
        }
    }
}

/// Adds the items of a list that is separated by commas.
fn list(items: &mut Vec<String>, value: &str) -> Result<()> {
    let found = value.split(',').map(str::trim);
    for item in found.filter(|item| !item.is_empty()) {
        items.push(item.to_owned());
        let count = items.len() as u64;
        limit("the number of names in .modinfo", count, MAX_ENTRIES)?;
    }
    Ok(())
}

/// True for a name that a module may have: 1 to 55 of `A-Z a-z 0-9 _ -`. XenStore paths and file names can
/// hold all of these.
pub fn is_module_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_MODULE_NAME
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// Checks a module's name.
pub(super) fn check_name(name: &str) -> Result<()> {
    if is_module_name(name) {
        return Ok(());
    }
    Err(PayloadErrorKind::modinfo(format!(
        "module name {name:?}, expected 1 to {MAX_MODULE_NAME} of A-Z, a-z, 0-9, _ and -"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Modinfo> {
        Modinfo::parse(text.as_bytes())
    }

    #[test]
    fn a_livepatch_modinfo_is_read() {
        let info = parse(
            "livepatch=Y\0license=GPL\0description=Fix = it\0depends=\0\0\0retpoline=Y\0\
             cves=CVE-2024-1, CVE-2024-2\0supersedes=old_one\0name=fix_it\0\
             target_build_id=0aFf\0entry_only=Y\0\
             vermagic=6.1.0-56-amd64 SMP preempt mod_unload modversions \0",
        )
        .unwrap();
        assert!(info.livepatch);
        assert_eq!(info.name.as_deref(), Some("fix_it"));
        assert_eq!(info.description.as_deref(), Some("Fix = it"));
        assert_eq!(info.kernel_release(), "6.1.0-56-amd64");
        assert!(info.depends.is_empty());
        assert_eq!(info.cves, ["CVE-2024-1", "CVE-2024-2"]);
        assert_eq!(info.supersedes, ["old_one"]);
        assert_eq!(info.target_build_id, Some(vec![0x0a, 0xff]));
        assert!(info.entry_only);
        assert_eq!(info.others, [("retpoline".to_owned(), "Y".to_owned())]);
    }

    #[test]
    fn what_cannot_be_right_is_refused_by_name() {
        let cases = [
            ("name=x\0", "no vermagic"),
            ("vermagic=1\0vermagic=2\0", "given twice"),
            ("vermagic=1\0nonsense\0", "not key=value"),
            ("vermagic=1\0name=a/b\0", "module name"),
            ("vermagic=1\0name=\0", "module name"),
            ("vermagic=1\0description=\x1b[2J\0", "control characters"),
            ("vermagic=1\0target_build_id=\0", "target_build_id"),
            ("vermagic=1\0target_build_id=abc\0", "target_build_id"),
            ("vermagic=1\0target_build_id=zz\0", "target_build_id"),
            ("vermagic=1\0entry_only=yes\0", "expected Y or N"),
        ];
        for (text, expected) in cases {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
        assert!(Modinfo::parse(b"vermagic=1\0x=\xff\0").is_err());
        assert!(Modinfo::parse("vermagic=1\0".repeat(5000).as_bytes()).is_err());
    }

    #[test]
    fn a_module_without_the_livepatch_entry_is_not_one() {
        assert!(!parse("vermagic=1 SMP\0").unwrap().livepatch);
    }
}
