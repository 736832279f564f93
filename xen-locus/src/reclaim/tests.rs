//! Parked payloads of the mock guest, and what still leads into them.

use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use locus_guest::addr::Gva;
use locus_kernel::modules::ModuleReader;

use super::*;
use crate::apply::mock::options;
use crate::arena::record::MODULE;
use crate::error::ExitCode;
use crate::machine::mock::{payload, using, Guest, A, B, C, RAM, RAM_LEN};
use crate::plan::Mode;
use crate::recover::{self, Finding};

fn patient(dry_run: bool) -> Options {
    Options {
        timeout: Duration::from_secs(20),
        ..options(dry_run)
    }
}

impl Guest {
    fn reclaim(&self, name: &str) -> Result<Report> {
        self.reclaim_with(name, &patient(false))
    }

    fn reclaim_with(&self, name: &str, options: &Options) -> Result<Report> {
        let mut results = Vec::new();
        let kernel = self.kernel();
        reclaim(self, &kernel, &[name.to_owned()], options, |_, result| {
            results.push(result);
            true
        })?;
        assert!(results.len() == 1);
        results.pop().unwrap()
    }

    /// What becomes of all that is parked: names, and whether the memory is given back.
    fn reclaim_all(&self) -> Vec<(String, bool)> {
        let kernel = self.kernel();
        let mut results = Vec::new();
        let names = parked(&kernel).unwrap();
        reclaim(self, &kernel, &names, &patient(false), |name, result| {
            results.push((name.to_owned(), result.is_ok()));
            true
        })
        .unwrap();
        results.sort();
        results
    }

    fn reclaimed(&self, name: &str) {
        assert_eq!(self.reclaim(name).unwrap().result, Outcome::Reclaimed);
        assert!(self.intent.borrow().is_none());
        self.is_as_recorded();
    }

    /// Names of the guest's modules, the newest first.
    fn modules(&self) -> Vec<String> {
        let kernel = self.kernel();
        let modules = ModuleReader::new(&kernel).unwrap().all().unwrap();
        modules.into_iter().map(|m| m.name).collect()
    }

    fn parked(&self, name: &str) -> Resident {
        let residents = self.residents().unwrap();
        let mut named = residents.into_iter().filter(|r| r.record.name == name);
        let found = named.next().unwrap();
        assert_eq!(found.slot.state, State::Parked);
        found
    }
}

/// A guest with payloads on all functions, which are reverted, the last one first.
fn with_parked() -> Guest {
    let guest = Guest::new();
    let all = [("one", A), ("two", B), ("three", C)];
    for (name, function) in all {
        guest.applied(&payload(name, &[function]));
    }
    for (name, _) in all.iter().rev() {
        guest.revert(name).unwrap();
    }
    guest
}

#[test]
fn what_is_reclaimed_is_no_module_any_more_and_its_pages_are_taken_again() {
    for order in [
        ["one", "two", "three"],
        ["two", "three", "one"],
        ["three", "one", "two"],
    ] {
        let guest = with_parked();
        let pages = guest.pages();
        let mut left = guest.modules();
        assert_eq!(left, ["three", "two", "one"]);
        for name in order {
            guest.reclaimed(name);
            left.retain(|n| n != name);
            assert_eq!(guest.modules(), left);
        }
        assert_eq!(guest.pages(), 0);
        let error = guest.reclaim("one").unwrap_err();
        assert!(
            error.to_string().contains("no payload \"one\" is parked"),
            "{error}"
        );
        // With other sizes, so that pages get other rights.
        guest.applied(&payload("all", &[A, B, C]));
        guest.applied(&payload("one", &[A]));
        assert_eq!(guest.modules(), ["one", "all"]);
        assert_eq!(guest.runs(), ["one", "all", "all"]);
        assert!(guest.pages() <= pages);
        guest.is_as_recorded();
    }
}

#[test]
fn a_word_that_leads_into_a_payload_is_named_before_anything_is_done() {
    let guest = with_parked();
    let one = guest.parked("one");
    let own = pages_of(&one);
    let at = RAM.plus(RAM_LEN - 8);
    for word in [own.start.0, own.end.0 - 1, one.record.functions[0].new.0] {
        guest.poke(at.0, &word.to_le_bytes());
        for dry_run in [true, false] {
            let error = guest.reclaim_with("one", &patient(dry_run)).unwrap_err();
            assert_eq!(error.exit_code(), ExitCode::TryAgain, "{error}");
            let said = error.to_string();
            assert!(
                said.contains("payload one stays parked") && said.contains(&at.to_string()),
                "{said}"
            );
            // What uses it needs it whole.
            assert_eq!(guest.modules(), ["three", "two", "one"]);
            assert_eq!(guest.parked("one").slot, one.slot);
            guest.is_as_recorded();
        }
    }
    // Beside it is not in it. Another payload's words count too.
    guest.poke(at.0, &own.end.0.to_le_bytes());
    let two = pages_of(&guest.parked("two"));
    let last = guest.peek::<8>(two.end.0 - 8);
    guest.poke(two.end.0 - 8, &own.start.0.to_le_bytes());
    let said = guest.reclaim("one").unwrap_err().to_string();
    assert!(said.contains("in another payload"), "{said}");
    guest.poke(two.end.0 - 8, &last);
    guest.reclaimed("one");
}

#[test]
fn what_comes_after_the_first_search_is_found_by_the_next_and_another_run_goes_on() {
    let guest = with_parked();
    let one = guest.parked("one");
    let word = pages_of(&one).start.0;
    guest.meanwhile(move |guest| guest.poke(RAM.0, &word.to_le_bytes()));
    let said = guest.reclaim("one").unwrap_err().to_string();
    assert!(said.contains(&RAM.to_string()), "{said}");
    assert_eq!(guest.modules(), ["three", "two"]);
    assert_eq!(guest.parked("one").slot, one.slot);
    guest.is_as_recorded();
    guest.poke(RAM.0, &[0; 8]);
    // It is not applied in these pages again meanwhile.
    guest.applied(&payload("one", &[A]));
    assert_eq!(guest.modules(), ["one", "three", "two"]);
    guest.reclaimed("one");
    assert_eq!(guest.runs(), ["one", "", ""]);
}

#[test]
fn all_are_searched_for_together_and_what_stays_may_hold_another() {
    let said = |stays: &[&str]| {
        let all = ["one", "three", "two"].map(|name| (name.to_owned(), !stays.contains(&name)));
        all.to_vec()
    };
    let guest = with_parked();
    let [one, two] = ["one", "two"].map(|name| pages_of(&guest.parked(name)));
    // A pointer from one to the other goes with it, unless that has to stay.
    let variable = guest.parked("two").record.module.0 - 0x48;
    guest.poke(variable, &one.start.0.to_le_bytes());
    guest.poke(RAM.0, &two.start.0.to_le_bytes());
    assert_eq!(guest.reclaim_all(), said(&["one", "two"]));
    assert_eq!(guest.modules(), ["two", "one"]);
    guest.poke(RAM.0, &[0; 8]);
    let both = said(&[]).into_iter().filter(|(name, _)| name != "three");
    assert_eq!(guest.reclaim_all(), both.collect::<Vec<_>>());
    assert_eq!((guest.pages(), guest.reclaim_all()), (0, Vec::new()));
    // Whatever the order, who uses another goes before it.
    let guest = with_one_used_by_two();
    let both = [("one".to_owned(), true), ("two".to_owned(), true)];
    assert_eq!(guest.reclaim_all(), both);
}

/// Both are parked. The one that is used was applied last.
fn with_one_used_by_two() -> Guest {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    guest.applied(&using("two", &[B], "new_0_a_show"));
    guest.revert("two").unwrap();
    guest.revert("one").unwrap();
    guest.applied(&payload("one", &[A]));
    guest.revert("one").unwrap();
    guest
}

#[test]
fn what_a_payload_that_stays_calls_stays_although_no_word_leads_there() {
    for is_late in [false, true] {
        let guest = with_one_used_by_two();
        // As if it were called: the distance in a call is no address.
        let two = guest.parked("two").record;
        let [start, end] = [two.module.0 - MODULE, pages_of(&guest.parked("two")).end.0];
        let one = pages_of(&guest.parked("one"));
        let variables = (start & !0xfff..end).step_by(8);
        let words = variables.filter(|&at| {
            let is_link = at >= two.module.0;
            !is_link && one.contains(Gva(u64::from_le_bytes(guest.peek(at))))
        });
        words
            .collect::<Vec<_>>()
            .into_iter()
            .for_each(|at| guest.poke(at, &[0; 8]));
        let word = two.module.0.to_le_bytes();
        match is_late {
            false => guest.poke(RAM.0, &word),
            true => guest.meanwhile(move |guest| guest.poke(RAM.0, &word)),
        }
        let neither = [("one".to_owned(), false), ("two".to_owned(), false)];
        assert_eq!(guest.reclaim_all(), neither);
        let said = guest.reclaim("one").unwrap_err().to_string();
        assert!(said.contains("two uses it and stays"), "{said}");
        guest.poke(RAM.0, &[0; 8]);
        guest.reclaimed("two");
        guest.reclaimed("one");
    }
}

#[test]
fn a_thread_in_it_and_a_pointer_on_a_stack_are_in_the_way() {
    let guest = with_parked();
    let one = guest.parked("one");
    let (code, data) = (one.record.functions[0].new.0, pages_of(&one).end.0 - 0x20);
    for word in [code, data] {
        guest.sleep_at(word);
        let error = guest.reclaim("one").unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::TryAgain, "{error}");
        let words = "a word on the stack of sleeper";
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(guest.modules(), ["three", "two", "one"]);
    }
    // A return address: who is there sees it to the end as a module of the guest.
    let found = guest.peek::<1>(code);
    guest.poke(code, &[0xe8]);
    guest.sleep_at(code + 5);
    let error = guest.reclaim_with("one", &options(false)).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::TryAgain, "{error}");
    assert!(error.to_string().contains("blocked after"), "{error}");
    assert_eq!(guest.modules(), ["three", "two", "one"]);
    guest.poke(code, &found);
    guest.sleep_at(0);
    guest.reclaimed("one");
}

#[test]
fn a_kprobe_in_it_is_in_the_way() {
    let guest = with_parked();
    let code = guest.parked("one").record.functions[0].new.0;
    guest.add_kprobe(1, code + 5);
    let error = guest.reclaim("one").unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::TryAgain, "{error}");
    assert_eq!(guest.modules(), ["three", "two", "one"]);
    guest.remove_kprobe(1);
    // One that comes right before the pause.
    guest.meanwhile(move |guest| guest.add_kprobe(2, code + 5));
    let error = guest.reclaim("one").unwrap_err();
    assert!(error.to_string().contains("kprobe"), "{error}");
    assert_eq!(guest.modules(), ["three", "two", "one"]);
    guest.remove_kprobe(2);
}

#[test]
fn memory_that_is_populated_by_a_look_at_it_is_not_looked_at() {
    let guest = with_parked();
    guest.on_demand.set(true);
    for dry_run in [true, false] {
        let error = guest.reclaim_with("one", &patient(dry_run)).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::TryAgain, "{error}");
        assert!(error.to_string().contains("on demand"), "{error}");
    }
    assert_eq!(guest.modules(), ["three", "two", "one"]);
}

#[test]
fn a_run_that_is_interrupted_says_what_is_changed() {
    let guest = with_parked();
    let one = guest.parked("one");
    let options = patient(false);
    let flag = Arc::clone(&options.interrupted);
    // In the pause: what comes next is the second look at all memory.
    guest.meanwhile(move |_| flag.store(true, Ordering::SeqCst));
    let said = guest.reclaim_with("one", &options).unwrap_err().to_string();
    assert!(
        said.contains("interrupted") && said.contains("no module of the guest any more"),
        "{said}"
    );
    assert!(!said.contains("nothing was changed"), "{said}");
    assert_eq!(guest.parked("one").slot, one.slot);
    guest.reclaimed("one");
}

#[test]
fn whom_a_payload_of_an_earlier_build_uses_is_not_known_once_it_is_out_of_the_lists() {
    let guest = with_parked();
    let word = pages_of(&guest.parked("two")).start.0;
    guest.meanwhile(move |guest| guest.poke(RAM.0, &word.to_le_bytes()));
    guest.reclaim("two").unwrap_err();
    let kernel = guest.kernel();
    let mut residents = guest.residents().unwrap();
    let one = residents
        .iter()
        .position(|r| r.record.name == "one")
        .unwrap();
    let users = |residents: &[Resident]| {
        let all: Vec<&Resident> = residents.iter().collect();
        patch_stack::users(&kernel, &residents[one], &all)
            .unwrap()
            .len()
    };
    assert_eq!(users(&residents), 0);
    residents.iter_mut().for_each(|r| r.record.uses = None);
    assert_eq!(users(&residents), 1);
}

#[test]
fn that_one_is_gone_is_told_before_the_next_one_goes() {
    let guest = with_parked();
    let kernel = guest.kernel();
    let names = parked(&kernel).unwrap();
    let mut left = Vec::new();
    reclaim(&guest, &kernel, &names, &patient(false), |_, result| {
        left.push((result.is_ok(), guest.residents().unwrap().len()));
        // It could not be logged.
        false
    })
    .unwrap();
    assert_eq!(left, [(true, 2), (false, 2), (false, 2)]);
}

#[test]
fn a_cpu_that_may_look_at_the_lists_is_waited_for() {
    let mut guest = with_parked();
    guest.world.vcpus[1].user = false;
    let waited = |guest: &Guest| {
        let limit = Instant::now();
        readers::wait(guest, &guest.kernel(), limit, &options(false))
    };
    let error = waited(&guest).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::TryAgain);
    let words = "vCPU 1 was not seen in user mode or idle";
    assert!(error.to_string().contains(words), "{error}");
    guest.world.vcpus[1].user = true;
    waited(&guest).unwrap();
    // In an interrupt the idle task's CPU is not idle.
    guest.world.vcpus[0].rip = Gva(guest.world.vcpus[0].rip.0 + 0x400);
    waited(&guest).unwrap_err();
}

#[test]
fn what_is_in_force_or_used_stays() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    let error = guest.reclaim("one").unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::Failed);
    assert!(
        error
            .to_string()
            .contains("reverted before it is reclaimed"),
        "{error}"
    );
    guest.applied(&using("two", &[B], "new_0_a_show"));
    guest.revert("two").unwrap();
    guest.revert("one").unwrap();
    let error = guest.reclaim("one").unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::Failed);
    assert!(error.to_string().contains("two uses it"), "{error}");
    guest.left.set(0);
    let dry = guest.reclaim_with("two", &patient(true)).unwrap();
    assert_eq!(dry.result, Outcome::WouldReclaim);
    guest.left.set(u32::MAX);
    guest.reclaimed("two");
    guest.reclaimed("one");
    assert_eq!(guest.pages(), 0);
}

#[test]
fn a_run_that_is_ended_at_any_write_leaves_each_parked_or_gone() {
    let (mut torn, mut undone, mut finished) = (0, 0, 0);
    for writes in 0.. {
        let guest = with_parked();
        guest.left.set(writes);
        let done = guest.reclaim_all();
        let whole = guest.left.replace(u32::MAX) > 0;
        // Nothing begins after one whose end is not known: the journal is about that one.
        let tried = done.iter().filter(|(_, done)| !done).count();
        let kernel = guest.kernel();
        let intent = guest.intent.take();
        let found = recover::of_guest(&guest, &kernel, intent.as_ref(), &patient(false)).unwrap();
        torn += u32::from(intent.is_some());
        let left = guest.residents().unwrap();
        let name = found.patch.clone().unwrap_or_default();
        let is_there = left.iter().any(|r| r.record.name == name);
        match found.result {
            Finding::Finished => assert!(!is_there),
            Finding::Undone => assert!(is_there),
            _ => assert!(intent.is_none(), "{found}"),
        }
        assert!(left.len() <= tried, "{done:?} and {} are left", left.len());
        undone += u32::from(!left.is_empty());
        finished += u32::from(left.len() < 3);
        guest.is_as_recorded();
        let again = guest.apply(&payload("more", &[B]), Mode::Apply).unwrap();
        assert_eq!(again.result, Outcome::Applied);
        guest.revert("more").unwrap();
        assert!(guest.reclaim_all().iter().all(|(_, done)| *done));
        assert_eq!((guest.pages(), guest.modules()), (0, Vec::new()));
        if whole {
            break;
        }
    }
    assert!(
        torn > 8 && undone > 8 && finished > 0,
        "{torn} {undone} {finished}"
    );
}

#[test]
fn more_memory_than_there_are_addresses_is_refused() {
    let guest = with_parked();
    let at = guest.kernel().symbols.addr("max_pfn").unwrap();
    for end in [u64::MAX, (1 << 40) + 1] {
        guest.poke(at.0, &end.to_le_bytes());
        let error = guest.reclaim("one").unwrap_err();
        assert!(error.to_string().contains("max_pfn"), "{error}");
        assert_eq!(guest.modules(), ["three", "two", "one"]);
    }
}
