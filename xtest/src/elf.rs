//! What an ELF file needs: shared libraries of a program, other modules of a kernel module.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use object::read::elf::{Dyn, ElfFile64, FileHeader};
use object::{elf, Endianness, Object, ObjectSection};

use crate::host::piped;

/// Where the dynamic linker of the images looks for libraries.
const LIBRARY_DIRS: &[&str] = &[
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/xen-4.17/lib/x86_64-linux-gnu",
];

/// The names in `DT_NEEDED`; none if the file is a static program or not an ELF file.
pub fn needed(data: &[u8]) -> Result<Vec<String>> {
    let Ok(file) = ElfFile64::<Endianness>::parse(data) else {
        return Ok(Vec::new());
    };
    let endian = file.endian();
    let sections = file.elf_header().sections(endian, data)?;
    let Some((entries, strings)) = sections.dynamic(endian, data)? else {
        return Ok(Vec::new());
    };
    let strings = sections.strings(endian, data, strings)?;
    let mut names = Vec::new();
    for entry in entries.iter().filter(|d| d.tag(endian) == elf::DT_NEEDED) {
        let name = entry.string(endian, strings)?;
        names.push(String::from_utf8_lossy(name).into_owned());
    }
    Ok(names)
}

/// The libraries that these files need, and those that the libraries need, within an unpacked tree.
/// `dlopened` are the names of more libraries, which programs open at run time.
pub fn libraries(root: &Path, files: &[PathBuf], dlopened: &[&str]) -> Result<Libraries> {
    let mut found = BTreeMap::new();
    let mut queue: VecDeque<String> = dlopened.iter().map(|&n| n.to_owned()).collect();
    for file in files {
        let data = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
        queue.extend(needed(&data).with_context(|| format!("in {}", file.display()))?);
    }
    let mut seen = BTreeSet::new();
    while let Some(name) = queue.pop_front() {
        if !seen.insert(name.clone()) {
            continue;
        }
        let (dir, file) = LIBRARY_DIRS
            .iter()
            .map(|dir| (dir, root.join(dir).join(&name)))
            .find(|(_, file)| file.is_file())
            .with_context(|| format!("no {name} in {}", root.display()))?;
        let data = std::fs::read(&file)?;
        queue.extend(needed(&data)?);
        found.insert(format!("{dir}/{name}"), file);
    }
    Ok(found)
}

/// Libraries by their path in the image: the files of the host to copy there.
pub type Libraries = BTreeMap<String, PathBuf>;

/// A kernel module.
#[derive(Debug)]
pub struct Module {
    /// Name of its file, with `.ko`.
    pub name: String,
    /// The ELF file, unpacked.
    pub data: Vec<u8>,
}

/// Kernel modules in the order to load them, dependencies first.
pub fn modules(tree: &Path, names: &[&str]) -> Result<Vec<Module>> {
    let mut index = BTreeMap::new();
    index_modules(tree, &mut index)?;
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for name in names {
        add_module(&index, name, &mut seen, &mut order)?;
    }
    Ok(order)
}

fn add_module(
    index: &BTreeMap<String, PathBuf>,
    name: &str,
    seen: &mut BTreeSet<String>,
    order: &mut Vec<Module>,
) -> Result<()> {
    let key = name.replace('-', "_");
    if !seen.insert(key.clone()) {
        return Ok(());
    }
    // A built-in driver has no file.
    let Some(path) = index.get(&key) else {
        return Ok(());
    };
    let mut data = std::fs::read(path)?;
    if path.extension().is_some_and(|e| e == "xz") {
        data = piped("xz", &["-dc"], data)?;
    }
    for other in depends(&data).with_context(|| format!("in {}", path.display()))? {
        add_module(index, &other, seen, order)?;
    }
    let name = format!("{key}.ko");
    order.push(Module { name, data });
    Ok(())
}

fn depends(module: &[u8]) -> Result<Vec<String>> {
    let file = ElfFile64::<Endianness>::parse(module)?;
    let info = file
        .section_by_name(".modinfo")
        .context("no .modinfo: not a kernel module")?;
    let text = String::from_utf8_lossy(info.data()?).into_owned();
    let list = text
        .split('\0')
        .find_map(|f| f.strip_prefix("depends="))
        .unwrap_or_default();
    Ok(list
        .split(',')
        .filter(|d| !d.is_empty())
        .map(str::to_owned)
        .collect())
}

fn index_modules(dir: &Path, index: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            index_modules(&path, index)?;
        } else {
            let name = entry.file_name().to_string_lossy().into_owned();
            let stem = [".ko", ".ko.xz"].iter().find_map(|e| name.strip_suffix(e));
            if let Some(stem) = stem {
                index.insert(stem.replace('-', "_"), path);
            }
        }
    }
    Ok(())
}
