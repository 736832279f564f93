//! ELF notes, as the kernel and its modules carry them in memory.

use object::elf::{FileHeader64, ELF_NOTE_GNU, NT_GNU_BUILD_ID};
use object::read::elf::NoteIterator;
use object::LittleEndian;

/// Alignment of names and descriptions, in bytes: that of `.notes`
/// (include/asm-generic/vmlinux.lds.h: `NOTES`).
const ALIGN: u64 = 4;
/// Longest build-id believed, in bytes. Linkers make 8, 16 or 20.
const BUILD_ID_MAX: usize = 64;

/// The description of the first GNU build-id note in `notes`.
///
/// `None` if there is none before the end, or before the first note that is cut short.
pub(crate) fn build_id_note(notes: &[u8]) -> Option<Vec<u8>> {
    NoteIterator::<FileHeader64<LittleEndian>>::new(LittleEndian, ALIGN, notes)
        .ok()?
        .map_while(Result::ok)
        .filter(|note| note.name() == ELF_NOTE_GNU)
        .filter(|note| note.n_type(LittleEndian) == NT_GNU_BUILD_ID)
        .map(|note| note.desc())
        .find(|id| id.len() <= BUILD_ID_MAX)
        .map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
        let lengths = [name.len(), description.len()].map(|len| u32::try_from(len).unwrap());
        let mut out = [lengths[0], lengths[1], kind]
            .map(u32::to_le_bytes)
            .concat();
        for part in [name, description] {
            out.extend(part);
            out.resize(out.len().next_multiple_of(4), 0);
        }
        out
    }

    #[test]
    fn the_build_id_is_found_among_other_notes() {
        let notes = [
            note(b"Xen\0", 6, b"linux\0"),
            note(b"GNU\0", 1, &[1; 16]),
            note(b"Other\0", 3, &[2; 20]),
            note(b"GNU\0", 3, &[3; 65]),
            note(b"GNU\0", 3, &[4; 20]),
            note(b"GNU\0", 3, &[5; 20]),
        ]
        .concat();
        assert_eq!(build_id_note(&notes), Some(vec![4; 20]));
        // The padding of the last note may be missing.
        assert_eq!(
            build_id_note(&note(b"GNU\0", 3, b"odd")[..19]),
            Some(b"odd".to_vec())
        );
    }

    #[test]
    fn any_byte_and_any_end_is_harmless() {
        let good = [note(b"Xen\0", 6, b"linux\0"), note(b"GNU\0", 3, &[4; 20])].concat();
        assert!(build_id_note(&[]).is_none());
        for end in 0..good.len() {
            assert_eq!(build_id_note(&good[..end]), None, "{end}");
        }
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = build_id_note(&bad);
            }
        }
        for word in (0..good.len()).step_by(4) {
            let mut bad = good.clone();
            bad[word..word + 4].fill(0xff);
            let _ = build_id_note(&bad);
        }
    }
}
