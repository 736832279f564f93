//! The modules whose functions a payload replaces: are they still there, and will they be when the
//! guest is changed?
//!
//! A module that goes takes its text along, redirects included, and its memory is given to others.
//! So a payload's record says where each module was, and nothing is written once that is not so.

use locus_kernel::modules::{ModuleReader, ModuleState};
use locus_kernel::Kernel;

use crate::arena::record::{ModuleAt, Record};
use crate::error::Result;
use crate::write::Write;

/// Why the functions that a payload replaced aren't there any more; `None` while they are.
///
/// # Errors
/// The guest's modules can't be read.
pub fn gone(kernel: &Kernel<'_>, record: &Record) -> Result<Option<String>> {
    if record.objects.is_empty() {
        return Ok(None);
    }
    let all = ModuleReader::new(kernel)?.all()?;
    Ok(record.objects.iter().find_map(|was| {
        let Some(is) = all.iter().find(|m| m.name == was.name) else {
            return Some(format!(
                "module {}, some of whose functions payload {} replaced, is not loaded any more",
                was.name, record.name
            ));
        };
        (is.addr != was.at || is.base != was.base).then(|| {
            format!(
                "module {}, some of whose functions payload {} replaced at {}, was loaded again \
                 since, at {}",
                was.name, record.name, was.base, is.base
            )
        })
    }))
}

/// What must stand in the `struct module` of each while the guest is changed: that it is live, its
/// name and its place.
///
/// # Errors
/// The guest's modules can't be read.
pub fn conditions(kernel: &Kernel<'_>, modules: &[ModuleAt]) -> Result<Vec<Write>> {
    if modules.is_empty() {
        return Ok(Vec::new());
    }
    let mut reader = ModuleReader::new(kernel)?;
    let mut found = Vec::new();
    for module in reader.all()? {
        let listed = |m: &&ModuleAt| m.at == module.addr && m.base == module.base;
        if module.state == ModuleState::Live && modules.iter().any(|m| listed(&m)) {
            found.extend(
                reader
                    .identity(&module)
                    .into_iter()
                    .map(|(at, bytes)| Write {
                        at,
                        expect: bytes.clone(),
                        new: bytes,
                    }),
            );
        }
    }
    Ok(found)
}
