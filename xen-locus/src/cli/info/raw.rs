//! `info --raw WHAT`: bytes of the guest's kernel as they are, for other tools.

use locus_kernel::modules::ModuleReader;
use locus_kernel::vmcoreinfo::VmcoreInfo;
use locus_kernel::{self as kernel, Kernel};

use super::super::out;
use crate::error::Error;

/// What can be asked for.
const KNOWN: &str = "btf, btf:MODULE, notes, text, vmcoreinfo";

/// Writes the bytes of `what` to stdout.
///
/// # Errors
/// It is not known or not there, or can't be read.
pub fn show(kernel: &Kernel<'_>, what: &str) -> Result<(), Error> {
    match what.split_once(':') {
        None if what == "btf" => out::bytes(kernel.btf()?.bytes()),
        None if what == "notes" => out::bytes(&kernel.notes()?),
        None if what == "text" => {
            for region in kernel.regions.iter().filter(|r| r.executable) {
                out::bytes(&kernel.space.read_vec(
                    region.range.start,
                    usize::try_from(region.range.len()).unwrap_or(0),
                )?);
            }
        }
        None if what == "vmcoreinfo" => match VmcoreInfo::read(kernel)? {
            Some(info) => out::bytes(info.text().as_bytes()),
            None => return Err(kernel::Error::Missing("VMCOREINFO".into()).into()),
        },
        Some(("btf", module)) => out::bytes(&module_btf(kernel, module)?),
        _ => {
            return Err(Error::usage(format!(
                "--raw {what}: expected one of {KNOWN}"
            )))
        }
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
