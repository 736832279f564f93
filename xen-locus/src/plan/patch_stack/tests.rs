use locus_guest::GuestType;
use locus_kernel::fixture_world::World;

use super::*;
use crate::arena::digests::CodeDigests;
use crate::arena::record::{Slot, SCHEMA};

const A: Gva = Gva(0xffff_ffff_8100_0000);
const B: Gva = Gva(0xffff_ffff_8100_0100);

/// A patch called `name`, number `index` in the directory, on the functions at `on`. `below` gives the bytes that it found.
fn patch(index: usize, name: &str, on: &[Gva], below: [u8; JUMP]) -> Resident {
    let byte = u8::try_from(index).unwrap();
    let function = |at: &Gva| Function {
        name: format!("f{:x}", at.0 & 0xfff),
        object: "vmlinux".into(),
        old: *at,
        old_size: 0x40,
        old_cold: vec![(at.plus(0x1000), 8)],
        new: at.plus(0x10_0000 * (index as u64 + 1)),
        new_size: 0x20,
        new_cold: Vec::new(),
        site: at.plus(5),
        found: below,
        old_bytes: below,
        new_bytes: [byte + 1; JUMP],
    };
    Resident {
        index,
        slot: Slot {
            state: State::Applied,
            first: 1,
            pages: 1,
            applied_at: 0,
            record_offset: 0,
            record_len: 0,
            record_sha256: [0; 32],
        },
        record: Record {
            schema: SCHEMA,
            name: name.into(),
            sha256: String::new(),
            description: String::new(),
            cves: Vec::new(),
            functions: on.iter().map(function).collect(),
            text: (A.plus(0x10_0000 * (index as u64 + 1)), 0x1000),
            code: CodeDigests::default(),
            rodata_len: 0,
            rodata_sha256: String::new(),
            module: A.plus(0x100_0000 * (index as u64 + 1)),
            objects: Vec::new(),
            entry_only: false,
            record_room: None,
            uses: Some(Vec::new()),
            nudge: None,
        },
    }
}

/// `one` on `A`, and `two` on it, on both.
fn two() -> Vec<Resident> {
    vec![
        patch(0, "one", &[A], [0; JUMP]),
        patch(1, "two", &[A, B], [1; JUMP]),
    ]
}

fn names(patches: &[&Resident]) -> Vec<String> {
    patches.iter().map(|r| r.record.name.clone()).collect()
}

/// Whether a thread at `at` is in the way.
fn is_watched(all: &[Watched], at: Gva) -> bool {
    all.iter().any(|w| w.range.contains(at))
}

#[test]
fn the_topmost_patch_owns_a_function_and_the_undermost_knows_the_kernels_bytes() {
    let residents = two();
    let stack = PatchStack::new(&residents);
    let installed = stack.layers(A).unwrap().installed();
    assert_eq!(installed.patch, "two");
    assert_eq!((installed.jump, installed.original), ([2; JUMP], [0; JUMP]));
    assert_eq!(stack.layers(B).unwrap().installed().original, [1; JUMP]);
    assert!(stack.layers(A.plus(1)).is_none());
    let covered = &residents[0].record.functions[0];
    assert_eq!(stack.covering(&residents[0], covered), Some("two"));
    let top = &residents[1].record.functions[0];
    assert_eq!(stack.covering(&residents[1], top), None);
}

#[test]
fn only_applied_patches_are_in_the_stack_and_others_are_known_by_name() {
    let mut residents = two();
    residents[1].slot.state = State::Parked;
    let stack = PatchStack::new(&residents);
    assert_eq!(names(stack.applied()), ["one"]);
    assert!(stack.named(&residents, "one").unwrap().is_some());
    assert!(stack.named(&residents, "two").unwrap().is_none());
    for name in ["one.ko", "/payloads/one.ko", "./one"] {
        let error = stack.named(&residents, name).unwrap_err().to_string();
        assert!(
            error.ends_with("applied: one. Give the name of the patch, not a file: one"),
            "{error}"
        );
    }
    let error = stack.named(&residents, "three").unwrap_err();
    assert!(error.to_string().ends_with("applied: one"), "{error}");
}

#[test]
fn what_lies_on_a_patch_is_named_from_the_top() {
    let mut residents = two();
    residents.push(patch(2, "elsewhere", &[A.plus(0x800)], [0; JUMP]));
    residents.push(patch(3, "three", &[B], [2; JUMP]));
    residents.push(patch(4, "user", &[A.plus(0x900)], [0; JUMP]));
    residents[4].record.uses = Some(vec![residents[2].record.module]);
    let world = World::new(GuestType::Pvh);
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let stack = PatchStack::new(&residents);
    for (below, words) in [
        (
            0,
            "replaces f0 too, and was applied later; revert three, then two first",
        ),
        (2, "user refers to its symbols; revert user first"),
    ] {
        let error = stack.check_on_top(&kernel, &residents[below]).unwrap_err();
        assert!(error.to_string().ends_with(words), "{error}");
    }
    for top in [3, 4] {
        stack.check_on_top(&kernel, &residents[top]).unwrap();
    }
}

#[test]
fn a_patch_that_supersedes_gives_back_what_it_does_not_replace() {
    let residents = two();
    let stack = PatchStack::new(&residents);
    let new = patch(2, "all", &[A], [2; JUMP]);
    let own = stack.writes(&new.record.functions, false);
    assert_eq!(own.len(), 1);
    assert_eq!((own[0].at, &*own[0].new), (A.plus(5), &[3; JUMP][..]));
    let all = stack.writes(&new.record.functions, true);
    assert_eq!(all[..1], own);
    assert_eq!(all.len(), 2);
    assert_eq!(all[1].at, B.plus(5));
    assert_eq!(
        (&*all[1].expect, &*all[1].new),
        (&[2; JUMP][..], &[1; JUMP][..])
    );
}

#[test]
fn threads_may_be_below_the_version_that_runs_but_not_in_it() {
    let residents = two();
    let stack = PatchStack::new(&residents);
    let on_a = patch(2, "three", &[A], [2; JUMP]).record.functions;
    let watched = stack.watched(&on_a, false);
    let version = |of: usize| residents[of].record.functions[0].new.plus(4);
    assert!(is_watched(&watched, version(1)));
    assert!(is_watched(&watched, A.plus(7)), "the redirect");
    assert!(!is_watched(&watched, version(0)));
    assert!(!is_watched(&watched, A.plus(0x20)), "the kernel's own");
    // Nothing lies on this one: the kernel's own version, and its part elsewhere.
    let free = A.plus(0x800);
    let watched = stack.watched(
        &patch(2, "four", &[free], [0; JUMP]).record.functions,
        false,
    );
    assert!(is_watched(&watched, free.plus(0x20)));
    assert!(is_watched(&watched, free.plus(0x1004)));
    // Where all are superseded, all their code counts.
    let watched = stack.watched(&on_a, true);
    assert!(is_watched(&watched, version(0)) && is_watched(&watched, version(1)));
}

#[test]
fn versions_that_were_taken_back_around_threads_are_watched_still() {
    let mut residents = two();
    residents[1].slot.state = State::Parked;
    let on_b = patch(2, "three", &[B], [0; JUMP]).record.functions;
    let left = residents[1].record.functions[1].new.plus(4);
    assert!(!is_watched(
        &PatchStack::new(&residents).watched(&on_b, false),
        left
    ));
    residents[1].record.entry_only = true;
    assert!(is_watched(
        &PatchStack::new(&residents).watched(&on_b, false),
        left
    ));
}
