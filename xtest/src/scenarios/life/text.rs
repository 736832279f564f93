//! Compares the kernel text of a guest at two moments.

use crate::guest::Kind;
use crate::scenario::Ctx;
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// The guest's whole kernel text at one moment.
pub struct Text {
    sum: String,
    bytes: Vec<u8>,
}

impl Text {
    /// Reads it with `info --raw text`.
    pub fn of(ctx: &Ctx, name: &str) -> Result<Self, Verdict> {
        let file = "/tmp/text";
        let sum = ctx.dom0.ok(&format!(
            "xen-locus info {name} --raw text >{file} && sha256sum <{file} | cut -c1-64"
        ))?;
        let bytes = ctx.dom0.get(file)?;
        ctx.dom0.ok(&format!("rm {file}"))?;
        check!(bytes.len() > 8_000_000, "{} bytes of text", bytes.len());
        Ok(Self { sum, bytes })
    }

    /// Checks that the guest's text is still the same, byte for byte. An HVM guest switches static keys of its
    /// own when it is restored: differences that look like a switched jump label are counted and accepted.
    pub fn check(&self, ctx: &Ctx, name: &str, kind: Kind) -> Result<(), Verdict> {
        let now = Self::of(ctx, name)?;
        check_eq!(now.bytes.len(), self.bytes.len(), "bytes of text");
        let labels = match kind {
            Kind::Hvm => jump_labels(&self.bytes, &now.bytes)?,
            Kind::Pv | Kind::Pvh => 0,
        };
        if labels == 0 {
            let at = self.bytes.iter().zip(&now.bytes).position(|(a, b)| a != b);
            check_eq!(
                now.sum,
                self.sum,
                "SHA-256 of the kernel's text (differs at {at:x?})"
            );
        }
        eprintln!(
            "xtest: {name}: SHA-256 of the kernel's text: before {}, after {}, jump labels switched by the \
             guest: {labels}",
            self.sum, now.sum
        );
        Ok(())
    }
}

/// Counts the jump labels (`arch/x86/kernel/jump_label.c`) that were switched between two versions of the text.
/// The jump of a label ends within the text; a jump to a patch does not.
///
/// # Errors
///
/// There is another difference.
fn jump_labels(old: &[u8], new: &[u8]) -> Result<usize, Verdict> {
    const NOP2: [u8; 2] = [0x66, 0x90];
    const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];
    let switched = |at: usize| {
        let pair = |len| Some((old.get(at..at + len)?, new.get(at..at + len)?));
        let either = |len: usize, is: &dyn Fn(&[u8], &[u8]) -> bool| {
            pair(len).is_some_and(|(a, b)| is(a, b) || is(b, a))
        };
        let within = |jump: &[u8]| {
            let by = i32::from_le_bytes([jump[1], jump[2], jump[3], jump[4]]);
            jump[0] == 0xe9
                && i64::try_from(at + 5)
                    .ok()
                    .and_then(|end| usize::try_from(end + i64::from(by)).ok())
                    .is_some_and(|target| target < old.len())
        };
        if either(2, &|nop, jump| nop == NOP2 && jump[0] == 0xeb) {
            Some(2)
        } else if either(5, &|nop, jump| nop == NOP5 && within(jump)) {
            Some(5)
        } else {
            None
        }
    };
    let (mut at, mut count) = (0, 0);
    while at < old.len() {
        if old[at] == new[at] {
            at += 1;
            continue;
        }
        let len = switched(at).ok_or_else(|| {
            let bytes = at.saturating_sub(8)..(at + 8).min(old.len());
            Verdict::failure(format!(
                "the kernel's text differs at {at:#x}: {:x?} was {:x?}",
                &new[bytes.clone()],
                &old[bytes]
            ))
        })?;
        (at, count) = (at + len, count + 1);
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::jump_labels;

    const NOP: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

    fn text(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut text = vec![0xcc; 64];
        text[at..at + bytes.len()].copy_from_slice(bytes);
        text
    }

    #[test]
    fn switched_labels_are_counted_either_way() {
        let nop = text(8, &NOP);
        let jump = text(8, &[0xe9, 0x10, 0x00, 0x00, 0x00]);
        assert_eq!(jump_labels(&nop, &jump).ok(), Some(1));
        assert_eq!(jump_labels(&jump, &nop).ok(), Some(1));
        let short = (text(63 - 1, &[0x66, 0x90]), text(63 - 1, &[0xeb, 0x07]));
        assert_eq!(jump_labels(&short.0, &short.1).ok(), Some(1));
        assert_eq!(jump_labels(&nop, &nop).ok(), Some(0));
    }

    #[test]
    fn a_redirect_or_another_byte_is_no_label() {
        let nop = text(8, &NOP);
        let away = text(8, &[0xe9, 0x00, 0x00, 0x10, 0x7f]);
        assert!(jump_labels(&nop, &away).is_err());
        assert!(jump_labels(&nop, &text(8, &[0xcc])).is_err());
        assert!(jump_labels(&text(63, &[0x90]), &text(63, &[0xcc])).is_err());
    }
}
