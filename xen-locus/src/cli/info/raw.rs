//! `info --raw WHAT`: bytes of the guest's kernel as they are, for other tools.

use std::str::FromStr;

use locus_kernel::modules::ModuleReader;
use locus_kernel::vmcoreinfo::VmcoreInfo;
use locus_kernel::{self as kernel, Kernel};

use super::super::out;
use crate::error::Error;

/// What can be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Raw {
    /// `btf`: the kernel's types.
    Btf,
    /// `btf:MODULE`: the types of a module.
    ModuleBtf(String),
    /// `notes`: the ELF notes.
    Notes,
    /// `text`: the code.
    Text,
    /// `vmcoreinfo`: the lines of VMCOREINFO.
    VmcoreInfo,
}

impl FromStr for Raw {
    type Err = String;

    fn from_str(what: &str) -> Result<Raw, String> {
        Ok(match (what, what.split_once(':')) {
            ("btf", _) => Raw::Btf,
            (_, Some(("btf", module))) => Raw::ModuleBtf(module.to_owned()),
            ("notes", _) => Raw::Notes,
            ("text", _) => Raw::Text,
            ("vmcoreinfo", _) => Raw::VmcoreInfo,
            _ => return Err("expected btf, btf:MODULE, notes, text or vmcoreinfo".to_owned()),
        })
    }
}

/// Writes the bytes of `what` to stdout.
///
/// # Errors
/// It is not there, or can't be read.
pub fn show(kernel: &Kernel<'_>, what: &Raw) -> Result<(), Error> {
    match what {
        Raw::Btf => out::bytes(kernel.btf()?.bytes()),
        Raw::Notes => out::bytes(&kernel.notes()?),
        Raw::Text => {
            for region in kernel.regions.iter().filter(|r| r.executable) {
                out::bytes(&kernel.space.read_vec(
                    region.range.start,
                    usize::try_from(region.range.len()).unwrap_or(0),
                )?);
            }
        }
        Raw::VmcoreInfo => match VmcoreInfo::read(kernel)? {
            Some(info) => out::bytes(info.text().as_bytes()),
            None => return Err(kernel::Error::Missing("VMCOREINFO".into()).into()),
        },
        Raw::ModuleBtf(module) => out::bytes(&module_btf(kernel, module)?),
    }
    Ok(())
}

fn module_btf(kernel: &Kernel<'_>, wanted: &str) -> Result<Vec<u8>, Error> {
    let mut found = false;
    let blobs = ModuleReader::new(kernel)?.each(|reader, module| {
        Ok(match module.name == wanted {
            true => Some(reader.btf_bytes(module)?),
            false => None,
        })
    })?;
    for blob in blobs.into_iter().flatten() {
        found = true;
        if let Some(bytes) = blob {
            return Ok(bytes);
        }
    }
    Err(Error::failed(match found {
        true => format!("the guest's kernel keeps no BTF of its module {wanted}"),
        false => {
            format!("the guest has no module {wanted} loaded; `info --modules` shows those it has")
        }
    }))
}
