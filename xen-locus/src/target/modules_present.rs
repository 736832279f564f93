//! The modules whose functions a payload replaces: are they still there, and will they be when the
//! guest is changed?
//!
//! A module that is unloaded takes its text along, redirects included, and its memory is given to others.
//! So a payload's record says where each module was, and nothing is written once that is not so.
//!
//! A module that is on its way out is not gone yet: its text and the redirects in it are still there, and
//! [`gone`] does not report it. But nothing is written into it either: [`conditions`] is an error then.

use std::collections::{HashMap, HashSet};

use locus_guest::addr::Gva;
use locus_kernel::modules::{Module, ModuleReader, ModuleState};
use locus_kernel::Kernel;

use crate::arena::record::{ModuleAt, Record};
use crate::error::{Error, Result};
use crate::write::{About, Write};

/// Why the functions that a payload replaced aren't there any more; `None` while they are.
///
/// # Errors
/// The guest's modules can't be read.
pub fn gone(kernel: &Kernel<'_>, record: &Record) -> Result<Option<String>> {
    if record.objects.is_empty() {
        return Ok(None);
    }
    let all = ModuleReader::new(kernel)?.all()?;
    // The first of a name counts. There may be many of both.
    let by_name: HashMap<&str, &Module> = all.iter().rev().map(|m| (&*m.name, m)).collect();
    Ok(record.objects.iter().find_map(|was| {
        let Some(is) = by_name.get(&*was.name) else {
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

/// Conditions for a change of the guest, as writes that change nothing: the `struct module` of each of
/// `modules` must say that it is live, its name and its place. They are compared in the pause, before
/// anything is written.
///
/// # Errors
/// [`Cause::Passing`](crate::error::Cause::Passing): one of `modules` is not in the guest's list at its place, or is not live.
/// It was there when the change was planned, so the guest loads or unloads it right now; the next attempt
/// finds how that ended. Or the guest's modules can't be read.
pub fn conditions(kernel: &Kernel<'_>, modules: &[ModuleAt]) -> Result<Vec<Write>> {
    if modules.is_empty() {
        return Ok(Vec::new());
    }
    let mut reader = ModuleReader::new(kernel)?;
    let all = reader.all()?;
    let by_addr: HashMap<Gva, &Module> = all.iter().rev().map(|m| (m.addr, m)).collect();
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    for wanted in modules {
        let module = by_addr.get(&wanted.at);
        let Some(module) = module.filter(|m| m.base == wanted.base && m.name == wanted.name) else {
            return Err(Error::passing(format!(
                "module {} was at {} in the guest, and is not there any more",
                wanted.name, wanted.base
            )));
        };
        if module.state != ModuleState::Live {
            return Err(Error::passing(format!(
                "module {} is {} in the guest right now, expected it to be live",
                wanted.name,
                module.state.name().to_lowercase()
            )));
        }
        // Several payloads may replace functions of one module.
        if !seen.insert(wanted.at) {
            continue;
        }
        for (at, bytes) in reader.identity(module) {
            let about = About::Module(wanted.name.clone());
            found.push(Write::condition(at, bytes, about));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use locus_kernel::fixture::{vcpus, KIND};
    use locus_kernel::modules::sample::{data, guest, Age, Data, DATA, STEP};

    use super::*;
    use crate::error::Class;

    /// Where the sample's two modules have their text.
    const TEXT: [u64; 2] = [0xffff_ffff_c100_0000, 0xffff_ffff_c101_0000];

    /// Where the sample's modules are: `first`, which is live, and `second`, which is loading.
    fn recorded(n: usize) -> ModuleAt {
        ModuleAt {
            name: ["first", "second"][n].into(),
            at: Gva(DATA + n as u64 * STEP),
            base: Gva(TEXT[n]),
        }
    }

    fn record(objects: Vec<ModuleAt>) -> Record {
        let json = r#"{"schema":3,"name":"p","sha256":"","description":"","cves":[],"functions":[],
            "text":[0,0],"code":{"sha256":"","blocks":"","labels":[]},"rodata_len":0,
            "rodata_sha256":"","module":0}"#;
        Record {
            objects,
            ..serde_json::from_str(json).unwrap()
        }
    }

    /// What `then` makes of the sample guest with `d` for the memory of its modules.
    fn with<T>(d: &Data, then: impl FnOnce(&Kernel<'_>) -> T) -> T {
        let memory = guest(Age::New, d);
        then(&Kernel::read(&memory, KIND, &vcpus()).unwrap())
    }

    /// The sample guest with both of its modules in this state of `enum module_state`.
    fn in_state(state: u32) -> Data {
        let mut d = data(Age::New);
        for n in 0..2 {
            d.set(DATA + n * STEP, &state.to_le_bytes());
        }
        d
    }

    fn refused(d: &Data, modules: &[ModuleAt]) -> String {
        let error = with(d, |kernel| conditions(kernel, modules).unwrap_err());
        assert_eq!(error.class(), Class::TryAgain, "{error}");
        error.to_string()
    }

    #[test]
    fn modules_that_are_live_must_stay_as_they_are() {
        let d = in_state(0);
        let both = [recorded(0), recorded(1), recorded(0)];
        let writes = with(&d, |kernel| conditions(kernel, &both).unwrap());
        // ModuleState, name and address of the text of each, once.
        assert_eq!(writes.len(), 6);
        for write in &writes {
            assert_eq!(write.expect, write.new);
            let at = usize::try_from(write.at.0 - DATA).unwrap();
            assert_eq!(d.0[at..at + write.expect.len()], write.expect);
        }
        let states = writes
            .iter()
            .filter(|w| (w.at.0 - DATA).is_multiple_of(STEP));
        assert_eq!(states.count(), 2);
        assert!(with(&d, |kernel| conditions(kernel, &[]).unwrap()).is_empty());
    }

    #[test]
    fn a_module_that_is_not_live_is_to_be_tried_again() {
        for (state, words) in [(1, "is loading"), (2, "is unloading")] {
            let said = refused(&in_state(state), &[recorded(0)]);
            assert!(
                said.contains("module first") && said.contains(words),
                "{said}"
            );
        }
        // One of several is enough.
        let said = refused(&data(Age::New), &[recorded(0), recorded(1)]);
        assert!(said.contains("module second is loading"), "{said}");
    }

    #[test]
    fn a_module_that_is_not_listed_at_its_place_is_to_be_tried_again() {
        let elsewhere = ModuleAt {
            base: Gva(TEXT[0] + 0x1000),
            ..recorded(0)
        };
        let moved = ModuleAt {
            at: Gva(DATA + STEP),
            ..recorded(0)
        };
        let renamed = ModuleAt {
            name: "other".into(),
            ..recorded(0)
        };
        for wanted in [elsewhere, moved, renamed] {
            let said = refused(&in_state(0), &[recorded(1), wanted]);
            assert!(said.contains("not there any more"), "{said}");
        }
        // Not formed yet, or not any more: the kernel itself does not count it.
        let said = refused(&in_state(3), &[recorded(0)]);
        assert!(said.contains("module first was at"), "{said}");
    }

    #[test]
    fn gone_is_what_is_not_listed_or_listed_elsewhere() {
        let gone = |d: &Data, objects| with(d, |kernel| gone(kernel, &record(objects)).unwrap());
        assert_eq!(gone(&in_state(0), vec![]), None);
        assert_eq!(gone(&in_state(0), vec![recorded(0), recorded(1)]), None);
        // On its way out it is still there.
        assert_eq!(gone(&in_state(2), vec![recorded(0)]), None);
        let other = ModuleAt {
            name: "other".into(),
            ..recorded(0)
        };
        let why = gone(&in_state(0), vec![recorded(1), other]).unwrap();
        assert!(
            why.contains("module other") && why.contains("not loaded"),
            "{why}"
        );
        let elsewhere = ModuleAt {
            base: Gva(TEXT[0] + 0x1000),
            ..recorded(0)
        };
        let why = gone(&in_state(0), vec![elsewhere]).unwrap();
        assert!(why.contains("was loaded again"), "{why}");
    }
}
