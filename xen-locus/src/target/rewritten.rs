//! Tables of the places that the kernel rewrites while it runs: in its own image, and lock prefixes of modules.

use locus_guest::addr::{Gva, Range};
use locus_kernel::btf::Btf;
use locus_kernel::modules::{Rewritten, JUMP_LABEL, MODULES_MAX};
use locus_kernel::{self as kernel, Kernel};

use crate::error::{Error, Result};

/// What the kernel rewrites when a guest of one CPU gets more.
pub const LOCK_PREFIX: &str = "lock prefix";
/// Calls that the kernel makes lead elsewhere.
const STATIC_CALL: &str = "static call";
/// The list of the lock prefixes that are rewritten when a guest of one CPU gets more (arch/x86/kernel/alternative.c).
const LOCKS: &str = "smp_alt_modules";

/// How a structure is read whose layout is not asked for: it is the same in all kernels with relative entries.
#[derive(Debug)]
pub struct EntryForm {
    name: &'static str,
    /// In bytes.
    size: usize,
    /// Name, offset and length of each member that is read, in bytes.
    members: &'static [(&'static str, usize, usize)],
}

/// `struct jump_entry` (include/linux/jump_label.h).
pub const JUMP_ENTRY: EntryForm = EntryForm {
    name: "jump_entry",
    size: 16,
    members: &[("code", 0, 4), ("target", 4, 4), ("key", 8, 8)],
};
/// `struct static_call_site` (include/linux/static_call_types.h).
pub const STATIC_CALL_SITE: EntryForm = EntryForm {
    name: "static_call_site",
    size: 8,
    members: &[("addr", 0, 4)],
};

impl EntryForm {
    /// Refuses a kernel whose structure has another form.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): its size is another, or a member is missing, elsewhere or
    /// of another length.
    pub fn check(&self, btf: &Btf) -> Result<()> {
        let differs = |what: &str, found: usize, expected: usize| {
            Err(Error::not_applicable(format!(
                "{what} struct {} is {found} bytes in the guest's kernel; expected {expected}. This xen-locus does not know \
                 such a kernel",
                self.name
            )))
        };
        let size = btf.size_of(self.name)?;
        if size != self.size {
            return differs("the size of", size, self.size);
        }
        for &(member, expected, bytes) in self.members {
            let found = btf.offset_of_sized(self.name, member, bytes)?;
            if found != expected {
                return differs(&format!("the place of {member} in"), found, expected);
            }
        }
        Ok(())
    }
}

/// Refuses tables whose entries can't be what they are read as.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): as [`EntryForm::check`], or the length of a table is no
/// multiple of that of an entry. Or the kernel has no types.
pub fn check_forms(kernel: &Kernel<'_>, tables: &[Rewritten]) -> Result<()> {
    for Rewritten { what, table, entry } in tables.iter().filter(|t| t.table.len() != 0) {
        match *what {
            JUMP_LABEL => JUMP_ENTRY.check(kernel.btf()?)?,
            STATIC_CALL => STATIC_CALL_SITE.check(kernel.btf()?)?,
            _ => {}
        }
        if table.len() % *entry as u64 != 0 {
            return Err(Error::not_applicable(format!(
                "the guest's table of places of a {what} at {} is {} bytes long; expected a multiple of {entry}. So it can't be \
                 known which bytes its kernel rewrites",
                table.start,
                table.len()
            )));
        }
    }
    Ok(())
}

/// The lock prefixes of the module at `module`, or of the kernel if that is 0, which the kernel
/// rewrites when a guest of one CPU gets more. `None` for a kernel that never does.
///
/// # Errors
/// The list can't be read, or its elements are not as they are known.
pub fn lock_prefixes(kernel: &Kernel<'_>, module: Gva) -> Result<Option<Vec<Rewritten>>> {
    let Some(head) = kernel.symbols.addr(LOCKS) else {
        return Ok(None);
    };
    let btf = kernel.btf()?;
    let member = |name| btf.offset_of_sized("smp_alt_module", name, 8);
    let (owner, locks, end) = (member("mod")?, member("locks")?, member("locks_end")?);
    let next = btf.offset_of("smp_alt_module", "next")?;
    let space = &kernel.space;
    let mut found = Vec::new();
    for at in kernel::list(space, head, MODULES_MAX)? {
        let word =
            |offset: usize| space.read_u64(Gva(at.0.wrapping_sub(next as u64)).plus(offset as u64));
        if Gva(word(owner)?) == module {
            let start = Gva(word(locks)?);
            found.push(Rewritten {
                what: LOCK_PREFIX,
                table: Range::new(start, word(end)?.saturating_sub(start.0)),
                entry: 4,
            });
        }
    }
    Ok(Some(found))
}

/// A table of the kernel's image.
struct ImageTable {
    what: &'static str,
    /// Symbols at its start and end.
    bounds: [&'static str; 2],
    /// Size of an entry in bytes.
    entry: usize,
    /// A member of `struct module` that names such a table, and the function that rewrites the places: a kernel with both
    /// has the table.
    proof: Option<[&'static str; 2]>,
}

const IMAGE: [ImageTable; 3] = [
    ImageTable {
        what: JUMP_LABEL,
        bounds: ["__start___jump_table", "__stop___jump_table"],
        entry: JUMP_ENTRY.size,
        proof: Some(["jump_entries", "arch_jump_label_transform"]),
    },
    ImageTable {
        what: STATIC_CALL,
        bounds: ["__start_static_call_sites", "__stop_static_call_sites"],
        entry: STATIC_CALL_SITE.size,
        proof: Some(["static_call_sites", "arch_static_call_transform"]),
    },
    ImageTable {
        what: LOCK_PREFIX,
        bounds: ["__smp_locks", "__smp_locks_end"],
        entry: 4,
        proof: None,
    },
];

/// The tables of the kernel's image.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): the kernel must have one, and has no symbols for it.
pub fn rewritten(kernel: &Kernel<'_>) -> Result<Vec<Rewritten>> {
    let mut all = Vec::new();
    for ImageTable {
        what,
        bounds,
        entry,
        proof,
    } in IMAGE
    {
        if let [Some(start), Some(stop)] = bounds.map(|name| kernel.symbols.addr(name)) {
            let table = Range::new(start, stop.0.saturating_sub(start.0));
            all.push(Rewritten { what, table, entry });
            continue;
        }
        let Some([member, function]) = proof else {
            continue;
        };
        if kernel.symbols.addr(function).is_some() && kernel.btf()?.has("module", member) {
            let [start, stop] = bounds;
            return Err(Error::not_applicable(format!(
                "the guest's kernel has {function}(), which rewrites places of a {what}, and not both of the symbols {start} \
                 and {stop}, between which it lists them. So it can't be known which bytes it rewrites"
            )));
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ExitCode;
    use crate::target::symbols::Object;
    use locus_kernel::btf::blob::Blob;
    use locus_kernel::fixture::{vcpus, Fixture, KIND, TEXT};

    /// Where the fixture's tables stand.
    const AT: u64 = TEXT.0 + (8 << 20);

    /// Types with a `struct jump_entry` of these members.
    fn types(size: usize, target: usize) -> Blob {
        let mut b = Blob::with_integers();
        let members = [("code", 3, 0), ("target", 3, target), ("key", 4, 8)];
        b.structure("jump_entry", size, &members);
        b.structure("static_call_site", 8, &[("addr", 3, 0), ("key", 3, 4)]);
        b.structure(
            "module",
            16,
            &[("jump_entries", 4, 0), ("static_call_sites", 4, 8)],
        );
        b
    }

    /// What is said to a kernel with these types, and symbols so far behind `AT`.
    fn said(types: &Blob, symbols: &[(u64, &str)]) -> Result<Vec<Rewritten>> {
        let mut fixture = Fixture::new();
        fixture.constants.push(("__start_BTF", types.bytes()));
        fixture.constants.push(("__stop_BTF", Vec::new()));
        for (offset, name) in symbols {
            fixture.symbols.push((AT + offset, 'd', (*name).to_owned()));
        }
        let memory = fixture.build();
        let mut bytes = [0; 4096];
        // The head of an empty list.
        bytes[0x200..0x208].copy_from_slice(&(AT + 0x200).to_le_bytes());
        memory.map_bytes(Gva(AT), &bytes, true, false);
        Object::Kernel.rewritten(&Kernel::read(&memory, KIND, &vcpus()).unwrap())
    }

    fn refused(types: &Blob, symbols: &[(u64, &str)], words: &str) {
        let error = said(types, symbols).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::NotApplicable, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }

    const JUMPS: [(u64, &str); 2] = [(0, "__start___jump_table"), (32, "__stop___jump_table")];

    #[test]
    fn tables_are_read_only_in_the_form_that_the_guests_types_have() {
        assert_eq!(said(&types(16, 4), &JUMPS).unwrap().len(), 1);
        refused(
            &types(24, 4),
            &JUMPS,
            "the size of struct jump_entry is 24 bytes",
        );
        refused(
            &types(16, 12),
            &JUMPS,
            "the place of target in struct jump_entry is 12",
        );
        // A rest behind the last whole entry.
        let cut = [JUMPS[0], (40, "__stop___jump_table")];
        refused(
            &types(16, 4),
            &cut,
            "40 bytes long; expected a multiple of 16",
        );
    }

    #[test]
    fn a_kernel_that_rewrites_places_must_have_symbols_for_their_table() {
        for (function, start) in [
            ("arch_jump_label_transform", "__start___jump_table"),
            ("arch_static_call_transform", "__start_static_call_sites"),
        ] {
            refused(&types(16, 4), &[(0x100, function)], start);
            refused(&types(16, 4), &[(0, start), (0x100, function)], start);
            // A kernel without such places in modules has no table either.
            assert!(said(&Blob::new(), &[(0x100, function)]).unwrap().is_empty());
        }
    }

    #[test]
    fn a_list_of_lock_prefixes_that_is_not_known_is_not_taken_for_none() {
        let mut types = types(16, 4);
        refused(&types, &[(0x200, LOCKS)], "smp_alt_module");
        let members = [
            ("mod", 4, 0),
            ("locks", 4, 16),
            ("locks_end", 4, 24),
            ("next", 4, 48),
        ];
        types.structure("smp_alt_module", 64, &members);
        assert!(said(&types, &[(0x200, LOCKS)]).unwrap().is_empty());
    }
}
