use std::cell::Cell;
use std::fs::File;

use locus_guest::addr::Frame;
use locus_guest::mock::MockMemory;
use locus_guest::MemoryMut as _;

use super::*;
use crate::guard::Spot;

const UUID: [u8; 16] = [7; 16];
const OLD: [u8; 5] = [1; 5];
const NEW: [u8; 5] = [2; 5];

/// Xen's pause counter of one domain, and the time that the domain has run.
struct Count(Cell<u32>, u64);

impl Counter for Count {
    fn pause_state(&self) -> std::result::Result<Option<PauseState>, xen::Error> {
        Ok(Some(PauseState {
            uuid: UUID,
            paused: self.0.get() > 0,
            cpu_time_ns: self.1,
            shutdown: false,
        }))
    }

    fn unpause(&self) -> std::result::Result<(), xen::Error> {
        self.0.set(self.0.get().checked_sub(1).expect("not paused"));
        Ok(())
    }
}

fn page(name: &str) -> SharedPage {
    let path = std::env::temp_dir().join(format!("xen-locus-finish-{}-{name}", std::process::id()));
    std::fs::write(&path, [0; 4096]).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    SharedPage::create(&file).unwrap()
}

#[test]
fn a_pause_of_a_run_that_died_is_given_back_and_no_other() {
    // what the run had marked, what others held before, what is held now; what is left
    let cases = [
        (PauseStep::Idle, 0, 0, 0, TakeOver::Running),
        (PauseStep::Idle, 1, 1, 1, TakeOver::Running),
        // before and after the call that takes the count
        (PauseStep::Pausing, 0, 0, 0, TakeOver::Running),
        (PauseStep::Pausing, 0, 1, 0, TakeOver::Running),
        (PauseStep::Paused, 0, 1, 0, TakeOver::Running),
        (PauseStep::Paused, 1, 2, 1, TakeOver::Running),
        (PauseStep::Writing, 1, 2, 1, TakeOver::Undone),
        // before and after the call that gives it back
        (PauseStep::Unpausing, 0, 1, 0, TakeOver::Running),
        (PauseStep::Unpausing, 0, 0, 0, TakeOver::Running),
        (PauseStep::Unpausing, 1, 1, 1, TakeOver::PausedByOthers),
        (PauseStep::Pausing, 1, 1, 1, TakeOver::PausedByOthers),
    ];
    for (i, (step, others, now, left, outcome)) in cases.into_iter().enumerate() {
        let page = page(&format!("count{i}"));
        page.set_paused_by_others(others > 0);
        page.set_step(step);
        let memory = MockMemory::new();
        let frame = memory.frame();
        memory.fill(frame, 8, &OLD);
        let spots = Spot::split(&[frame], 8, &OLD, &NEW);
        let places = Places::map(&memory, &spots).unwrap();
        let count = Count(Cell::new(now), 100);
        assert_eq!(
            take_over(&page, &count, UUID, &places, Since::Now),
            outcome,
            "{i}"
        );
        assert_eq!(count.0.get(), left, "{i}");
        assert_eq!(page.step(), Some(PauseStep::Idle), "{i}");
    }
}

#[test]
fn long_after_a_run_died_a_pause_that_may_be_another_tools_is_left() {
    // what the run had marked, the guest's time at its pause; what is left of one pause
    for (step, then, left, outcome) in [
        (PauseStep::Pausing, None, 1, TakeOver::PausedByOthers),
        (PauseStep::Unpausing, None, 1, TakeOver::PausedByOthers),
        // The guest has not run since: the pause is the run's.
        (PauseStep::Pausing, Some(100), 0, TakeOver::Running),
        (PauseStep::Unpausing, Some(100), 0, TakeOver::Running),
        (PauseStep::Unpausing, Some(99), 1, TakeOver::Running),
        // The run had its pause.
        (PauseStep::Paused, None, 0, TakeOver::Running),
    ] {
        let page = page(&format!("late{step:?}{then:?}"));
        page.set_cpu_time_ns(then);
        page.set_step(step);
        let memory = MockMemory::new();
        let places = Places::map(&memory, &[]).unwrap();
        let count = Count(Cell::new(1), 100);
        let found = take_over(&page, &count, UUID, &places, Since::Earlier);
        assert_eq!((found, count.0.get()), (outcome, left), "{step:?} {then:?}");
        let noted = TakeOver::of(page.outcome());
        assert_eq!(noted, Some(outcome), "{step:?} {then:?}");
        assert_eq!(page.step(), Some(PauseStep::Idle));
    }
}

#[test]
fn a_guest_that_somebody_let_run_is_not_written_and_its_other_pauses_are_left() {
    // How many of the change's bytes are written, whether somebody paused the guest again after it ran.
    for (step, written, again, outcome) in [
        (PauseStep::Writing, 3, false, TakeOver::LetRun),
        (PauseStep::Writing, 3, true, TakeOver::LetRun),
        (PauseStep::Writing, 0, true, TakeOver::Undone),
        (PauseStep::Writing, 5, false, TakeOver::Finished),
        (PauseStep::Paused, 0, false, TakeOver::Running),
        (PauseStep::Paused, 0, true, TakeOver::Running),
        (PauseStep::Unpausing, 5, true, TakeOver::Running),
    ] {
        let page = page(&format!("ran{step:?}{written}{again}"));
        page.set_cpu_time_ns(Some(99));
        page.set_step(step);
        let memory = MockMemory::new();
        let frame = memory.frame();
        memory.fill(frame, 8, &OLD);
        memory.fill(frame, 8, &NEW[..written]);
        let spots = Spot::split(&[frame], 8, &OLD, &NEW);
        let places = Places::map(&memory, &spots).unwrap();
        let count = Count(Cell::new(again.into()), 100);
        let found = take_over(&page, &count, UUID, &places, Since::Now);
        assert_eq!(found, outcome, "{step:?} {written} {again}");
        assert_eq!(count.0.get(), u32::from(again));
        assert!(places.holds(8, &[&NEW[..written], &OLD[written..]].concat()));
        assert_eq!(page.step(), Some(PauseStep::Idle));
    }
}

#[test]
fn a_page_that_is_gone_keeps_nobody_from_giving_a_pause_back() {
    // what the run had marked, the guest's time at its pause; what is left of one pause; `None`: it is tried again later
    for (step, then, left, outcome) in [
        (PauseStep::Pausing, 100, 0, Some(TakeOver::Running)),
        (PauseStep::Paused, 100, 0, Some(TakeOver::Running)),
        (PauseStep::Unpausing, 100, 0, Some(TakeOver::Running)),
        // The change is there in part, perhaps.
        (PauseStep::Writing, 100, 1, None),
        (PauseStep::Writing, 99, 1, Some(TakeOver::LetRun)),
    ] {
        let page = page(&format!("gone{step:?}{then}"));
        page.set_cpu_time_ns(Some(then));
        page.set_step(step);
        let memory = MockMemory::new();
        let frame = memory.frame();
        let spots = Spot::split(&[frame], 8, &OLD, &NEW);
        memory.take(frame);
        let count = Count(Cell::new(1), 100);
        let places = Places::unmapped(&memory, &spots);
        let found = take_over_later(&page, &count, UUID, places).ok();
        assert_eq!((found, count.0.get()), (outcome, left), "{step:?} {then}");
        let marked = outcome.map_or(step, |_| PauseStep::Idle);
        assert_eq!(page.step(), Some(marked));
    }
    // One that is there is mapped, and what was written in part is undone.
    let page = page("there");
    page.set_step(PauseStep::Writing);
    let memory = MockMemory::new();
    let frame = memory.frame();
    memory.fill(frame, 8, &[2, 2, 1, 1, 1]);
    let spots = Spot::split(&[frame], 8, &OLD, &NEW);
    let count = Count(Cell::new(1), 100);
    let places = Places::unmapped(&memory, &spots);
    let found = take_over_later(&page, &count, UUID, places).unwrap();
    assert_eq!((found, count.0.get()), (TakeOver::Undone, 0));
}

#[test]
fn a_guest_that_was_held_all_the_time_gets_the_pause_back_though_others_paused_it_too() {
    for step in [PauseStep::Paused, PauseStep::Writing] {
        let page = page(&format!("held{step:?}"));
        page.set_cpu_time_ns(Some(100));
        page.set_step(step);
        let memory = MockMemory::new();
        let places = Places::map(&memory, &[]).unwrap();
        let count = Count(Cell::new(2), 100);
        take_over(&page, &count, UUID, &places, Since::Now);
        assert_eq!(count.0.get(), 1);
    }
}

#[test]
fn when_xen_does_not_say_whether_the_guest_is_paused_nothing_is_done_and_the_step_stays() {
    struct Mute;
    impl Counter for Mute {
        fn pause_state(&self) -> std::result::Result<Option<PauseState>, xen::Error> {
            Err(xen::Error::Environment("mute".into()))
        }

        fn unpause(&self) -> std::result::Result<(), xen::Error> {
            panic!("not paused by this run")
        }
    }
    let page = page("mute");
    page.set_step(PauseStep::Writing);
    let memory = MockMemory::new();
    let frame = memory.frame();
    memory.fill(frame, 8, &[2, 2, 1, 1, 1]);
    let spots = Spot::split(&[frame], 8, &OLD, &NEW);
    let places = Places::map(&memory, &spots).unwrap();
    assert_eq!(
        take_over(&page, &Mute, UUID, &places, Since::Now),
        TakeOver::Stuck
    );
    assert!(places.holds(8, &[2, 2, 1, 1, 1]));
    assert_eq!(page.step(), Some(PauseStep::Writing));
}

#[test]
fn a_domain_that_took_the_id_of_the_one_meant_is_left_alone() {
    let page = page("reused");
    page.set_step(PauseStep::Paused);
    let memory = MockMemory::new();
    let places = Places::map(&memory, &[]).unwrap();
    let count = Count(Cell::new(1), 100);
    assert_eq!(
        take_over(&page, &count, [8; 16], &places, Since::Now),
        TakeOver::Gone
    );
    assert_eq!(count.0.get(), 1);
}

/// Ends a run after `bytes` of its bytes are written; says what came of it and what then stands there.
fn torn(bytes: usize, all_writable: bool) -> (TakeOver, Vec<[u8; 5]>) {
    let memory = MockMemory::new();
    // not in the order of the writes, and one twice
    let frames: Vec<Frame> = (0..2).map(|_| memory.frame()).collect();
    let at = [(frames[1], 8), (frames[0], 100), (frames[1], 200)];
    let mut spots = Vec::new();
    let mut left = bytes;
    for &(frame, offset) in &at {
        memory.fill(frame, offset, &OLD);
        spots.extend(Spot::split(&[frame], offset, &OLD, &NEW));
        let n = left.min(5);
        memory.fill(frame, offset, &NEW[..n]);
        left -= n;
    }
    let mut places = Places::map(&memory, &spots).unwrap();
    if !all_writable {
        places.window = None;
    }
    let page = page(&format!("torn{bytes}{all_writable}"));
    page.set_step(PauseStep::Writing);
    let count = Count(Cell::new(1), 100);
    let outcome = take_over(&page, &count, UUID, &places, Since::Now);
    assert_eq!(count.0.get(), 0);
    let stands = at.map(|(frame, offset)| {
        let mut found = [0; 5];
        let window = memory.map_mut(&[frame]).unwrap();
        window.read(offset, &mut found).unwrap();
        found
    });
    (outcome, stands.to_vec())
}

#[test]
fn a_change_is_undone_wherever_it_was_ended_and_finished_when_all_was_written() {
    for bytes in 0..15 {
        let undone = (TakeOver::Undone, vec![OLD; 3]);
        assert_eq!(torn(bytes, true), undone, "{bytes} bytes written");
    }
    assert_eq!(torn(15, true), (TakeOver::Finished, vec![NEW; 3]));
}

#[test]
fn bytes_that_the_change_never_had_are_left_alone() {
    let memory = MockMemory::new();
    let frame = memory.frame();
    let spots = [8, 100].map(|at| Spot::split(&[frame], at, &OLD, &NEW).remove(0));
    memory.fill(frame, 8, &NEW);
    memory.fill(frame, 100, &[9; 5]);
    let places = Places::map(&memory, &spots).unwrap();
    let page = page("foreign");
    page.set_step(PauseStep::Writing);
    let count = Count(Cell::new(1), 100);
    assert_eq!(
        take_over(&page, &count, UUID, &places, Since::Now),
        TakeOver::Torn
    );
    let stands = [8, 100].map(|at| {
        let mut found = [0; 5];
        memory
            .map_mut(&[frame])
            .unwrap()
            .read(at, &mut found)
            .unwrap();
        found
    });
    assert_eq!(stands, [OLD, [9; 5]]);
}

#[test]
fn a_change_that_can_not_be_undone_is_called_torn() {
    assert_eq!(torn(7, false).0, TakeOver::Torn);
}

#[test]
fn no_words_say_that_the_guest_runs_because_others_may_have_paused_it_since() {
    let all: Vec<TakeOver> = (1..=8).filter_map(TakeOver::of).collect();
    assert_eq!(all.len(), 8);
    for outcome in all {
        let said = outcome.to_string();
        assert!(
            !said.contains("runs") && !said.contains("guest is paused"),
            "{said}"
        );
        let is_let_go = matches!(
            outcome,
            TakeOver::Running | TakeOver::Finished | TakeOver::Undone | TakeOver::Torn
        );
        let words = "that run does not hold the guest any more";
        assert_eq!(said.contains(words), is_let_go, "{said}");
    }
}

#[test]
fn outcomes_are_told_apart_by_number() {
    for outcome in [
        TakeOver::Running,
        TakeOver::Torn,
        TakeOver::Stuck,
        TakeOver::LetRun,
    ] {
        assert_eq!(TakeOver::of(outcome as u32), Some(outcome));
    }
    assert_eq!(TakeOver::of(0), None);
}
