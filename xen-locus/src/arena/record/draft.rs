//! A record as far as it is known before its payload has a place in the guest, and the room that it can need.
//!
//! The room is part of the layout of the payload's image, so it is fixed before any address is known. It depends on the
//! payload alone, not on the guest's state: a payload that is applied again must fit the pages that it had before. So
//! each number that depends on the place or on the state is counted with the most digits that its type can have. (How many
//! payloads it uses is no such number: if that changes, its code does.)

use locus_guest::addr::{Gva, Range};

use super::{Function, ModuleAt, Record, RECORD_MAX, SCHEMA};
use crate::arena::digests::{self, CodeDigests};
use crate::error::{Error, Result};
use crate::x86::{self, JUMP};

/// An address with as many digits as any.
const LONGEST: Gva = Gva(u64::MAX);
/// Bytes with as many digits as any.
const LONGEST_BYTES: [u8; JUMP] = [u8::MAX; JUMP];

/// What is known of a payload before it has a place.
#[derive(Clone, Debug)]
pub struct Draft {
    /// Name of the payload.
    pub name: String,
    /// SHA-256 of its file, in hex.
    pub sha256: String,
    /// What it says it is.
    pub description: String,
    /// What it says it mends.
    pub cves: Vec<String>,
    /// Functions it replaces.
    pub functions: Vec<DraftFunction>,
    /// Modules whose functions it replaces.
    pub objects: Vec<ModuleAt>,
    /// It says that old and new versions of its functions may run at the same time.
    pub entry_only: bool,
    /// The payloads whose symbols it uses: addresses of their `struct module`.
    pub uses: Vec<Gva>,
}

/// A function that is to be replaced, before the address of the new one is known.
#[derive(Clone, Debug)]
pub struct DraftFunction {
    /// Its name in the kernel or module.
    pub name: String,
    /// `vmlinux`, or the module's name.
    pub object: String,
    /// The old function: from its symbol to the next one.
    pub old: Range,
    /// Parts of the old function that are located elsewhere.
    pub old_cold: Vec<Range>,
    /// Size of the new function, in bytes.
    pub new_size: u64,
    /// Sizes of the parts of the new function that are located elsewhere, in bytes.
    pub new_cold: Vec<u64>,
    /// Address of the redirect.
    pub site: Gva,
    /// The bytes there: the kernel's own, or the redirect of the patch below.
    pub found: [u8; JUMP],
    /// The bytes that are put back when the payload is reverted.
    pub old_bytes: [u8; JUMP],
}

/// The addresses of a new function.
#[derive(Clone, Debug)]
pub struct NewFunction {
    /// Address of its entry.
    pub at: Gva,
    /// Addresses of the parts of it that the compiler put elsewhere (`NAME.cold`).
    pub cold: Vec<Gva>,
}

/// What is known once the payload is linked for its place.
#[derive(Clone, Debug)]
pub struct Placement<'a> {
    /// Addresses of the new functions and of their parts that are located elsewhere, in the order of
    /// [`Draft::functions`].
    pub functions: &'a [NewFunction],
    /// The code: address and length in bytes.
    pub text: (Gva, u64),
    /// Digests of the code.
    pub code: CodeDigests,
    /// Length of the pages behind the code that are read only, in bytes.
    pub rodata_len: u64,
    /// SHA-256 of these pages, in hex, with zeroes for the record.
    pub rodata_sha256: String,
    /// Address of the `struct module`.
    pub module: Gva,
    /// The room of two records: offset from the first page, and length, in bytes.
    pub record_room: (u64, u64),
}

impl Draft {
    /// The room that one record can need, in bytes, for code of `text_len` bytes with at most `labels` jump labels.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): it would be longer than a record that is read.
    /// [`Class::Failed`](crate::error::Class::Failed): the record can't be encoded.
    pub fn room(&self, text_len: u64, labels: u64) -> Result<usize> {
        let longest = Record {
            functions: self.functions.iter().map(DraftFunction::longest).collect(),
            text: (LONGEST, u64::MAX),
            code: CodeDigests::longest(text_len, labels),
            rodata_len: u64::MAX,
            rodata_sha256: digests::digest(&[]),
            module: LONGEST,
            record_room: Some((u64::MAX, u64::MAX)),
            uses: Some(vec![LONGEST; self.uses.len()]),
            ..self.head()
        };
        let len = longest.encode()?.len();
        if len > RECORD_MAX {
            return Err(Error::not_applicable(format!(
                "payload {}: what has to be recorded of it may take {len} bytes; expected at most {RECORD_MAX}: make several \
                 payloads of it",
                self.name
            )));
        }
        Ok(len)
    }

    /// The record of the payload at its place.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): a new function is out of reach of a jump from the
    /// old one, or the record is one that would not be read. [`Class::Failed`](crate::error::Class::Failed): `placed` is not of this payload.
    pub fn complete(&self, placed: Placement<'_>) -> Result<Record> {
        if placed.functions.len() != self.functions.len() {
            return Err(not_of_payload(self.functions.len(), placed.functions.len()));
        }
        let functions = self.functions.iter().zip(placed.functions);
        let functions = functions.map(|(function, new)| function.complete(new.at, &new.cold));
        let record = Record {
            functions: functions.collect::<Result<_>>()?,
            text: placed.text,
            code: placed.code,
            rodata_len: placed.rodata_len,
            rodata_sha256: placed.rodata_sha256,
            module: placed.module,
            record_room: Some(placed.record_room),
            ..self.head()
        };
        let unreadable = |why| {
            Error::not_applicable(format!(
                "payload {}: its record would not be believed: {why}",
                self.name
            ))
        };
        record.check().map_err(unreadable)?;
        Ok(record)
    }

    /// What does not depend on the place; the rest is empty.
    fn head(&self) -> Record {
        Record {
            schema: SCHEMA,
            name: self.name.clone(),
            sha256: self.sha256.clone(),
            description: self.description.clone(),
            cves: self.cves.clone(),
            functions: Vec::new(),
            text: (Gva(0), 0),
            code: CodeDigests::default(),
            rodata_len: 0,
            rodata_sha256: String::new(),
            module: Gva(0),
            objects: self.objects.clone(),
            entry_only: self.entry_only,
            record_room: None,
            uses: Some(self.uses.clone()),
            nudge: None,
        }
    }
}

impl DraftFunction {
    fn with(&self, new: Gva, new_cold: Vec<(Gva, u64)>, new_bytes: [u8; JUMP]) -> Function {
        Function {
            name: self.name.clone(),
            object: self.object.clone(),
            old: self.old.start,
            old_size: self.old.len(),
            old_cold: self.old_cold.iter().map(|r| (r.start, r.len())).collect(),
            new,
            new_size: self.new_size,
            new_cold,
            site: self.site,
            found: self.found,
            old_bytes: self.old_bytes,
            new_bytes,
        }
    }

    /// The bytes at the site depend on the patches below, so they are counted with the most digits too.
    fn longest(&self) -> Function {
        let cold = self.new_cold.iter().map(|&len| (LONGEST, len)).collect();
        Function {
            found: LONGEST_BYTES,
            old_bytes: LONGEST_BYTES,
            ..self.with(LONGEST, cold, LONGEST_BYTES)
        }
    }

    fn complete(&self, new: Gva, cold: &[Gva]) -> Result<Function> {
        if cold.len() != self.new_cold.len() {
            return Err(not_of_payload(self.new_cold.len(), cold.len()));
        }
        let jump = x86::jump(self.site, new).ok_or_else(|| {
            let name = &self.name;
            Error::not_applicable(format!("{new} is out of reach of a jump from {name}"))
        })?;
        let sizes = self.new_cold.iter().copied();
        Ok(self.with(new, cold.iter().copied().zip(sizes).collect(), jump))
    }
}

fn not_of_payload(expected: usize, found: usize) -> Error {
    Error::failed(format!(
        "a payload of {expected} functions or parts of them was linked as one of {found}: this is a defect of xen-locus"
    ))
}

#[cfg(test)]
mod tests {
    use locus_kernel::split_functions::PARTS_MAX;

    use super::*;

    const SITE: Gva = Gva(0xffff_ffff_8100_0005);

    fn function(name: &str, cold: usize) -> DraftFunction {
        let site = SITE.plus(0x40 * u64::from(name.as_bytes()[0]));
        DraftFunction {
            name: name.into(),
            object: "vmlinux".into(),
            old: Range::new(Gva(site.0 - 5), 0x40),
            old_cold: vec![Range::new(SITE.plus(0x1000), 7); cold],
            new_size: 11,
            new_cold: vec![9; cold],
            site,
            found: [0; JUMP],
            old_bytes: [1; JUMP],
        }
    }

    fn drafts() -> [Draft; 2] {
        let module = ModuleAt {
            name: "ext4".into(),
            at: Gva(0xffff_ffff_c000_0040),
            base: Gva(0xffff_ffff_c000_1000),
        };
        let plain = Draft {
            name: "one".into(),
            sha256: "6f".repeat(32),
            description: String::new(),
            cves: Vec::new(),
            functions: vec![function("a_show", 0)],
            objects: Vec::new(),
            entry_only: false,
            uses: Vec::new(),
        };
        let rich = Draft {
            description: "mends \"it\"\n\u{1}\u{e9}".into(),
            cves: vec!["CVE-2000-0001".into(), "CVE-2000-0002".into()],
            functions: vec![function("a_show", 2), function("b_show", 0)],
            objects: vec![module.clone(), module],
            entry_only: true,
            uses: vec![Gva(0xffff_ffff_ff60_8040); 2],
            ..plain.clone()
        };
        [plain, rich]
    }

    fn placement(functions: &[NewFunction]) -> Placement<'_> {
        Placement {
            functions,
            text: (Gva(0xffff_ffff_ff60_2000), 600),
            code: CodeDigests::of(vec![0x90; 600], Vec::new()),
            rodata_len: 4096,
            rodata_sha256: digests::digest(&[1]),
            module: Gva(0xffff_ffff_ff60_4040),
            record_room: (4096, 2048),
        }
    }

    #[test]
    fn a_completed_record_fits_its_room_and_says_where_all_is() {
        let at = Gva(0xffff_ffff_ff60_2000);
        for draft in drafts() {
            let parts = draft.functions.iter().map(|f| f.new_cold.len());
            let functions = parts.map(|n| NewFunction {
                at,
                cold: vec![at.plus(64); n],
            });
            let functions: Vec<_> = functions.collect();
            let record = draft.complete(placement(&functions)).unwrap();
            assert!(record.encode().unwrap().len() <= draft.room(600, 0).unwrap());
            for (function, draft) in record.functions.iter().zip(&draft.functions) {
                assert_eq!(function.new, at);
                assert_eq!(Some(function.new_bytes), x86::jump(function.site, at));
                let cold = vec![(at.plus(64), 9); draft.new_cold.len()];
                assert_eq!(function.new_cold, cold);
            }
        }
    }

    #[test]
    fn what_can_t_be_placed_or_would_not_be_read_is_refused() {
        let [plain, _] = drafts();
        let new = |at, cold| [NewFunction { at, cold }];
        let far = new(Gva(0xffff_8880_0000_0000), Vec::new());
        let error = plain.complete(placement(&far)).unwrap_err();
        assert!(error.to_string().contains("out of reach"), "{error}");
        let many = Draft {
            functions: vec![function("a_show", PARTS_MAX + 1)],
            ..plain.clone()
        };
        let near = Gva(0xffff_ffff_ff60_2000);
        let placed = new(near, vec![near; PARTS_MAX + 1]);
        let error = many.complete(placement(&placed)).unwrap_err().to_string();
        assert!(
            error.contains("payload one: ") && error.contains("at most 64 parts"),
            "{error}"
        );
        plain.room(600, 10_000).unwrap();
        let error = plain.room(600, 30_000).unwrap_err().to_string();
        assert!(error.contains("expected at most 1048576"), "{error}");
        let part = new(SITE, vec![SITE]);
        for functions in [&[][..], &part] {
            plain.complete(placement(functions)).unwrap_err();
        }
    }
}
