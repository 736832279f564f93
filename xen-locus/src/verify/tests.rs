//! What `verify` says of the mock guest after something in it was changed.

use locus_guest::space::{PTE_NX, PTE_USER, PTE_WRITE};
use locus_guest::MemoryMut as _;
use locus_payload::testelf::Spec;
use locus_payload::Payload;

use super::*;
use crate::arena;
use crate::error::ExitCode;
use crate::machine::mock::{code, payload, Guest, A, B, C, FUNCTIONS};
use crate::storage::audit::in_force::{self, InForce};
use crate::storage::audit::{Action, Line};
use crate::x86;

impl Guest {
    /// Nothing differs from the records.
    pub(crate) fn is_as_recorded(&self) {
        let outcome = verify(&self.kernel(), None).unwrap();
        assert_eq!(outcome.drift, []);
    }

    /// Writes `bytes` at `at`, and puts back what stood there once it was said what differs: whose it
    /// is, what, where, what is there, by whom.
    fn differs(&self, at: u64, bytes: &[u8]) -> Vec<(String, DriftKind, u64, String, DriftCause)> {
        let frames = self.kernel().space.frames(Gva(at), bytes.len() as u64);
        let window = self.map_mut(&frames.unwrap()).unwrap();
        let mut old = vec![0; bytes.len()];
        window.read(Gva(at).offset(), &mut old).unwrap();
        self.poke(at, bytes);
        let drift = verify(&self.kernel(), None).unwrap().drift;
        self.poke(at, &old);
        self.is_as_recorded();
        let told = |d: crate::verify::Drift| (d.patch, d.what, d.at.0, d.found, d.by);
        drift.into_iter().map(told).collect()
    }
}

fn site(n: usize) -> u64 {
    FUNCTIONS[n].1 + 5
}

#[test]
fn redirects_and_what_stands_before_them_are_told_by_their_bytes() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    guest.applied(&payload("two", &[A, B]));
    let outcome = verify(&guest.kernel(), None).unwrap();
    assert_eq!(
        (outcome.patches, outcome.parked, outcome.redirects),
        (2, 0, 2)
    );
    let one =
        |patch: &str, what, at, found: &str, by| vec![(patch.into(), what, at, found.into(), by)];
    let own: [u8; 5] = code(0)[5..10].try_into().unwrap();
    assert_eq!(
        guest.differs(site(A), &own),
        one(
            "two",
            DriftKind::Redirect,
            site(A),
            "b800000000, the kernel's own",
            DriftCause::Unknown
        )
    );
    let elsewhere = x86::jump(Gva(site(B)), Gva(FUNCTIONS[C].1 + 2)).unwrap();
    let told = guest.differs(site(B), &elsewhere);
    assert!(told[0].3.ends_with("a jump to c_show+0x2"), "{told:?}");
    assert_eq!(
        guest.differs(FUNCTIONS[B].1, &[0x90]),
        one(
            "two",
            DriftKind::Entry,
            FUNCTIONS[B].1,
            &told_bytes(&guest, B),
            DriftCause::Unknown
        )
    );
    let call = [0xe8, 0, 0, 0, 0];
    let told = guest.differs(FUNCTIONS[B].1, &call);
    assert_eq!(
        (told[0].1, told[0].4),
        (DriftKind::Entry, DriftCause::Ftrace),
        "{told:?}"
    );
}

/// The bytes of function `n` with a nop of one byte for its first.
fn told_bytes(guest: &Guest, n: usize) -> String {
    let mut bytes: [u8; 10] = guest.peek(FUNCTIONS[n].1);
    bytes[0] = 0x90;
    let bytes: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    bytes.join(" ")
}

#[test]
fn a_sealed_function_that_is_a_tail_call_is_patched_compared_and_put_back() {
    const AT: u64 = FUNCTIONS[A].1 + 0x20;
    for endbr in x86::ENDBRS {
        let site = AT + 9;
        let own = x86::jump(Gva(site), Gva(FUNCTIONS[C].1)).unwrap();
        let code = [endbr.as_slice(), &x86::NOP5, &own].concat();
        let guest = Guest::with(|fixture| fixture.function(AT, "tail", &code));
        let spec = Spec {
            objects: vec![(None, vec![("tail", 0)])],
            ..Spec::default()
        };
        let mut payload = Payload::parse("one", &spec.bytes()).unwrap();
        payload.name = "one".into();
        guest.applied(&payload);
        assert_ne!(guest.peek::<5>(site), own);
        guest.is_as_recorded();
        let told = guest.differs(site, &own);
        assert!(told[0].3.ends_with(", the kernel's own"), "{told:?}");
        let told = guest.differs(AT + 4, &[0xe8, 0, 0, 0, 0]);
        assert_eq!(told[0].4, DriftCause::Ftrace, "{told:?}");
        guest.revert("one").unwrap();
        assert_eq!(guest.peek::<5>(site), own);
        guest.is_as_recorded();
    }
}

#[test]
fn a_function_that_was_put_back_is_looked_at_too() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    let jump: [u8; 5] = guest.peek(site(A));
    guest.applied(&payload("two", &[A]));
    guest.revert("two").unwrap();
    guest.revert("one").unwrap();
    let outcome = verify(&guest.kernel(), None).unwrap();
    assert_eq!((outcome.parked, outcome.redirects), (2, 1));
    let told = guest.differs(site(A), &jump);
    assert_eq!(
        (told.len(), told[0].1),
        (1, DriftKind::Redirect),
        "{told:?}"
    );
    // The guest may trace what is its own again.
    assert_eq!(guest.differs(FUNCTIONS[A].1, &[0xe8, 0, 0, 0, 0]), []);
}

#[test]
fn every_page_of_a_payload_is_looked_at() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    let kernel = guest.kernel();
    let arena = Arena::read(&kernel).unwrap();
    let resident = &arena.residents(&kernel).unwrap()[0];
    let record = &resident.record;
    let first = usize::from(resident.slot.first);
    let code = record.functions[0].new.0;
    let told = guest.differs(code, &[0xcc]);
    assert_eq!(
        (told[0].1, told[0].2, told.len()),
        (DriftKind::Code, record.text.0 .0, 1)
    );
    let constants = arena::page_address(first).0 + record.text.1.next_multiple_of(4096);
    let last = constants + record.rodata_len - 1;
    let told = guest.differs(last, &[guest.peek::<1>(last)[0] ^ 1]);
    assert_eq!(
        (told[0].1, told[0].2, told.len()),
        (DriftKind::Constants, constants, 1)
    );
    // Its variables are its own.
    let variables = constants + record.rodata_len;
    assert_eq!(guest.differs(variables, &[0xff]), []);

    let page = |n: usize| {
        let (table, slot, entry) = kernel
            .space
            .fresh()
            .entry_slot(arena::page_address(first + n), 1)
            .unwrap();
        (table, slot, entry)
    };
    for n in 0..usize::from(resident.slot.pages) {
        let (table, slot, entry) = page(n);
        let (_, _, other) = page((n + 1) % usize::from(resident.slot.pages));
        let frame = locus_guest::space::PTE_FRAME;
        for changed in [
            entry ^ PTE_WRITE,
            entry ^ PTE_NX,
            entry | PTE_USER,
            entry & !frame | (other & frame),
        ] {
            guest.world.memory.set_entry(table, slot, changed);
            match verify(&guest.kernel(), None) {
                Ok(outcome) => {
                    let pages = outcome.drift.iter().filter(|d| d.what == DriftKind::Page);
                    assert!(pages.count() > 0, "page {n}, {changed:#x}");
                }
                // the record is no longer where it was, or the module
                Err(error) => assert_eq!(error.exit_code(), ExitCode::Uncertain, "{error}"),
            }
            guest.world.memory.set_entry(table, slot, entry);
        }
    }
    guest.is_as_recorded();
}

#[test]
fn records_are_held_against_the_audit_log() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    let kernel = guest.kernel();
    let residents = Arena::read(&kernel).unwrap().residents(&kernel).unwrap();
    let placed = hex::encode(residents[0].slot.record_sha256);
    // A log of what was applied: to which guest, which patch, with which record.
    let log = |applied: &[(&str, &str, &str)]| -> Vec<Line> {
        let mut in_force = std::collections::HashMap::<String, Vec<InForce>>::new();
        let line = |&(uuid, patch, record): &(&str, &str, &str)| {
            let sha256 = match patch {
                "one" => &residents[0].record.sha256,
                _ => "another file",
            };
            let action = Action {
                op: "apply".into(),
                result: "applied".into(),
                uuid: uuid.into(),
                patch: patch.into(),
                record: record.into(),
                sha256: sha256.into(),
                ..Action::default()
            };
            let own = in_force.entry(uuid.into()).or_default();
            *own = in_force::after(std::mem::take(own), &action);
            Line {
                schema: 1,
                seq: 1,
                first: 1,
                begins: String::new(),
                in_force: own.clone(),
                action,
                prev: String::new(),
            }
        };
        applied.iter().map(line).collect()
    };
    let told = |applied: &[(&str, &str, &str)]| {
        let known = HostRecords {
            log: &log(applied),
            uuid: "u",
            in_force: Vec::new(),
        };
        let outcome = verify(&guest.kernel(), Some(&known)).unwrap();
        let drift = outcome.drift.into_iter().map(|d| (d.patch, d.what));
        (outcome.unconfirmed, drift.collect::<Vec<_>>())
    };
    let one = || vec!["one".to_owned()];
    assert_eq!(told(&[("u", "one", &placed)]), (vec![], vec![]));
    let forged = ("u", "one", "00");
    let drift = vec![("one".into(), DriftKind::Record)];
    assert_eq!(told(&[forged]), (vec![], drift));
    // What was placed earlier may be there again: the guest was restored.
    assert_eq!(told(&[("u", "one", &placed), forged]), (vec![], vec![]));
    assert_eq!(told(&[("v", "one", &placed)]), (one(), vec![]));
    assert_eq!(told(&[("u", "one", "")]), (one(), vec![]));
    let lost = vec![("two".into(), DriftKind::Record)];
    let both = [("u", "one", &*placed), ("u", "two", "11"), ("v", "one", "")];
    assert_eq!(told(&both), (vec![], lost));
}

#[test]
fn a_kprobe_on_a_redirect_is_named_even_while_it_is_disabled() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    let site = FUNCTIONS[A].1 + 5;
    guest.add_kprobe(1, FUNCTIONS[A].1);
    guest.is_as_recorded();
    guest.add_kprobe(2, site);
    let drift = verify(&guest.kernel(), None).unwrap().drift;
    let [one] = &drift[..] else {
        panic!("{drift:?}");
    };
    assert_eq!(
        (one.what, one.by, one.at),
        (DriftKind::Redirect, DriftCause::Kprobe, Gva(site))
    );
    assert!(one.found.contains("a disabled kprobe at"), "{}", one.found);
    // A function that is the kernel's own is the guest's to probe.
    guest.remove_kprobe(2);
    guest.revert("one").unwrap();
    guest.add_kprobe(2, site);
    guest.is_as_recorded();
}
