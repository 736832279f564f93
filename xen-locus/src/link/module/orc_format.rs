//! Whether a payload's unwind data is in the format of the guest's kernel.

use locus_kernel::orc::{self, OrcFormat};
use locus_payload::Payload;

use crate::error::{Error, Result};

/// The section that names the format.
const ORC_HEADER: &str = ".orc_header";

/// Compares the format that the payload's `.orc_header` names with that of the guest's kernel. Many rows mean
/// something in two formats. A kernel that names its format (`guest_names`) builds modules that do, too: its
/// build system adds the section (`ORC_HEADER` in scripts/mod/modpost.c, later in scripts/module-common.c).
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable) if they differ.
pub fn check(payload: &Payload, format: OrcFormat, guest_names: bool) -> Result<()> {
    let mut hashes = orc::FORMAT_HASHES.iter().filter(|(f, _)| *f == format);
    let theirs = hashes.next().map(|(_, hash)| hash.as_slice());
    let headers = payload.sections.iter().filter(|s| s.name == ORC_HEADER);
    let mut headers = headers.map(|s| s.data.as_slice()).peekable();
    let none = headers.peek().is_none();
    let other = headers.find(|ours| Some(*ours) != theirs);
    let found = match other {
        None if !(none && guest_names) => return Ok(()),
        None => format!("it has no {ORC_HEADER} that names the format of its unwind data"),
        Some(ours) => format!("its {ORC_HEADER} names the format {}", hex::encode(ours)),
    };
    Err(Error::not_applicable(format!(
        "payload {}: {found}, expected {} ({format}), the guest's; build it against the guest's kernel",
        payload.name,
        theirs.map_or_else(|| "none".into(), hex::encode)
    )))
}

#[cfg(test)]
mod tests {
    use locus_payload::testelf::{Spec, ALLOC};

    use super::*;

    #[test]
    fn unwind_data_of_another_format_is_refused_though_its_rows_could_be_read() {
        let said = |header: Option<&[u8]>, format, guest_names| {
            let (mut elf, _) = Spec::default().elf();
            if let Some(hash) = header {
                elf.section(".orc_header", ALLOC, hash);
            }
            let payload = Payload::parse("test.ko", &elf.build()).unwrap();
            check(&payload, format, guest_names).map_err(|e| e.to_string())
        };
        let formats = orc::FORMAT_HASHES;
        for (ours, hash) in &formats {
            for (theirs, _) in &formats {
                let said = said(Some(hash), *theirs, true);
                assert_eq!(said.is_ok(), ours == theirs, "{said:?}");
            }
        }
        let (typed, hash) = &formats[1];
        assert!(said(Some(hash), OrcFormat::End, false).is_err());
        assert!(said(Some(&hash[..19]), *typed, false).is_err());
        // Kernels of before the header built modules without.
        assert!(said(None, *typed, false).is_ok());
        let error = said(None, *typed, true).unwrap_err();
        assert!(error.contains("no .orc_header"), "{error}");
    }
}
