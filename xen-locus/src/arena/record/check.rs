//! What a record can say. A guest can make a whole record, with a digest that fits. So the limits are checked when a record
//! is made and when it is read: what is written can be read, and what is read is no more than a tool can have written.

use std::collections::HashSet;

use locus_guest::addr::Gva;
use locus_kernel::split_functions::PARTS_MAX;
use locus_payload::is_module_name;

use super::{Function, Record};

/// Longest name of a function or of a module, in bytes (`KSYM_NAME_LEN`, include/linux/kallsyms.h).
pub const NAME_MAX: usize = 512;
/// A redirect is at most so many bytes behind the entry of its function.
pub const HEAD_MAX: u64 = 64;

impl Record {
    /// Whether a payload can have this record.
    ///
    /// # Errors
    /// A sentence that says what no payload has.
    pub(super) fn check(&self) -> Result<(), String> {
        self.check_words()?;
        check_range("its code", self.text)?;
        let mut replaced = HashSet::new();
        for function in &self.functions {
            let of = |why| format!("function {}: {why}", function.name);
            function.check().map_err(of)?;
            if !replaced.insert(function.old) {
                return Err(of(format!(
                    "expected one entry for {}, found several",
                    function.old
                )));
            }
        }
        Ok(())
    }

    /// What is shown to people and becomes part of paths in XenStore must be what a payload can have.
    fn check_words(&self) -> Result<(), String> {
        if !is_module_name(&self.name) {
            return Err(format!("its name is {:?}, which no module has", self.name));
        }
        if let Some(patch) = self.nudge.as_ref().filter(|name| !is_module_name(name)) {
            return Err(format!(
                "it is of a nudge of {patch:?}, which is the name of no module"
            ));
        }
        let functions = self.functions.iter().flat_map(|f| [&f.name, &f.object]);
        let names = || {
            functions
                .clone()
                .chain(self.objects.iter().map(|m| &m.name))
        };
        if let Some(long) = names().find(|name| name.len() > NAME_MAX) {
            return Err(format!(
                "expected names of at most {NAME_MAX} bytes, found one of {}",
                long.len()
            ));
        }
        let mut words = names().chain([&self.sha256]).chain(&self.cves);
        match words.find(|w| w.contains(char::is_control)) {
            Some(odd) => Err(format!("it has control characters: {odd:?}")),
            None => Ok(()),
        }
    }
}

impl Function {
    fn check(&self) -> Result<(), String> {
        check_range("the old function", (self.old, self.old_size))?;
        check_range("the new function", (self.new, self.new_size))?;
        for (what, parts) in [("old", &self.old_cold), ("new", &self.new_cold)] {
            if parts.len() > PARTS_MAX {
                return Err(format!(
                    "expected at most {PARTS_MAX} parts of the {what} function, found {}",
                    parts.len()
                ));
            }
            parts
                .iter()
                .try_for_each(|&part| check_range("a part", part))?;
        }
        let head = self.site.0.checked_sub(self.old.0);
        if head.is_none_or(|len| len >= HEAD_MAX) {
            return Err(format!(
                "expected its redirect less than {HEAD_MAX} bytes behind {}, found it at {}",
                self.old, self.site
            ));
        }
        Ok(())
    }
}

/// Refuses a range that goes beyond the end of the addresses.
fn check_range(what: &str, (at, len): (Gva, u64)) -> Result<(), String> {
    match at.0.checked_add(len) {
        Some(_) => Ok(()),
        None => Err(format!(
            "{what} is {len} bytes long at {at}; expected fewer"
        )),
    }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::super::{Slot, State, Unread};
    use super::*;

    const OLD: Gva = Gva(0xffff_ffff_8100_0000);

    fn function(n: u64) -> Function {
        Function {
            name: format!("f{n}"),
            object: "vmlinux".into(),
            old: OLD.plus(n * 0x100),
            old_size: 0x80,
            old_cold: vec![(OLD.plus(0x10_0000), 8); PARTS_MAX],
            new: Gva(0xffff_ffff_ff60_2000),
            new_size: 0x40,
            new_cold: vec![(Gva(0xffff_ffff_ff60_3000), 8); PARTS_MAX],
            site: OLD.plus(n * 0x100 + 9),
            found: [0; 5],
            old_bytes: [0; 5],
            new_bytes: [0; 5],
        }
    }

    fn record() -> Record {
        let json = r#"{"schema":3,"name":"p","sha256":"","description":"","cves":[],"functions":[],
            "text":[0,0],"code":{"sha256":"","blocks":"","labels":[]},"rodata_len":0,
            "rodata_sha256":"","module":0}"#;
        Record {
            functions: vec![function(0), function(1)],
            ..serde_json::from_str(json).unwrap()
        }
    }

    /// What is said to a record that a guest made like this.
    fn read(change: impl FnOnce(&mut Record)) -> Result<Record, String> {
        let mut record = record();
        change(&mut record);
        let json = record.encode().unwrap();
        let slot = Slot {
            state: State::Applied,
            first: 1,
            pages: 1,
            applied_at: 0,
            record_offset: 0,
            record_len: 0,
            record_sha256: Sha256::digest(&json).into(),
        };
        Record::decode(&json, &slot).map_err(|unread| match unread {
            Unread::Damaged(why) => why,
            Unread::Newer(head) => format!("{head:?}"),
        })
    }

    #[test]
    fn records_that_no_run_can_have_written_are_refused() {
        assert_eq!(read(|_| ()).unwrap(), record());
        // As far as it goes.
        read(|r| r.functions[0].name = "x".repeat(NAME_MAX)).unwrap();
        read(|r| r.text = (Gva(1), u64::MAX - 1)).unwrap();
        let part = (OLD, 1);
        type Change = Box<dyn FnOnce(&mut Record)>;
        let of_first = |change: fn(&mut Function)| -> Change {
            Box::new(move |r| change(&mut r.functions[0]))
        };
        let cases: [(Change, &str); 11] = [
            (
                of_first(|f| f.old = OLD.plus(0x100)),
                "f0: expected its redirect less than 64 bytes behind",
            ),
            (
                Box::new(|r| r.functions[0] = r.functions[1].clone()),
                "f1: expected one entry for 0xffffffff81000100, found several",
            ),
            (
                Box::new(move |r| r.functions[1].old_cold.push(part)),
                "f1: expected at most 64 parts of the old function, found 65",
            ),
            (
                Box::new(move |r| r.functions[1].new_cold.push(part)),
                "f1: expected at most 64 parts of the new function, found 65",
            ),
            (
                of_first(|f| f.name.push_str(&"x".repeat(NAME_MAX))),
                "at most 512 bytes, found one of 514",
            ),
            (
                of_first(|f| f.object = "x".repeat(NAME_MAX + 1)),
                "at most 512 bytes, found one of 513",
            ),
            (of_first(|f| f.old_size = 1 << 63), "f0: the old function"),
            (of_first(|f| f.new_size = 1 << 63), "f0: the new function"),
            (of_first(|f| f.old_cold[3].1 = 1 << 63), "f0: a part"),
            (
                of_first(|f| f.site = OLD.plus(64)),
                "f0: expected its redirect",
            ),
            (Box::new(|r| r.text = (OLD, 1 << 63)), "its code is"),
        ];
        for (change, words) in cases {
            let error = read(change).unwrap_err();
            assert!(error.contains(words), "{error}");
            assert!(error.contains("the guest's memory was changed"), "{error}");
        }
    }
}
