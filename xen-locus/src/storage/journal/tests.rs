use locus_guest::addr::Gva;

use super::*;
use crate::error::ExitCode;

const UUID: &str = "01234567-89ab-cdef-0123-456789abcdef";

fn journal(name: &str) -> Journal {
    let dir = std::env::temp_dir().join(format!("xen-locus-{}-{name}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    Journal::within(&dir, UUID)
}

fn intent() -> Intent {
    Intent {
        uuid: UUID.into(),
        domid: 3,
        started_at: 12,
        pid: 34,
        change: Change {
            build_id: "abcd".into(),
            text_base: 0xffff_ffff_8100_0000,
            patch: "fix".into(),
            sha256: "00".into(),
            record: "11".into(),
            op: Operation::Apply,
            writes: vec![Write {
                at: Gva(0xffff_ffff_8100_0005),
                expect: vec![1; 5],
                new: vec![2; 5],
                about: Default::default(),
            }],
            watched: vec![Range {
                start: 0xffff_ffff_8100_0000,
                len: 64,
                name: "f".into(),
            }],
            generation: Some(7),
        },
        is_done: false,
    }
}

fn read(journal: &Journal) -> Intent {
    match journal.read().unwrap() {
        Noted::Intent(intent) => *intent,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_about_to_be_done_is_read_back_until_it_is_known_how_it_ended() {
    let journal = journal("round");
    assert_eq!(journal.read().unwrap(), Noted::Nothing);
    journal.begin(&intent()).unwrap();
    assert_eq!(read(&journal), intent());
    let mut second = intent();
    second.change.op = Operation::Revert;
    journal.begin(&second).unwrap();
    assert_eq!(read(&journal), second);
    journal.end().unwrap();
    assert_eq!(journal.read().unwrap(), Noted::Nothing);
    journal.end().unwrap();
}

#[test]
fn that_a_change_is_done_is_noted_for_that_change_only() {
    let journal = journal("done");
    journal.begin(&intent()).unwrap();
    journal.note_done().unwrap();
    assert!(read(&journal).is_done);
    // The next run may die at once.
    journal.begin(&intent()).unwrap();
    assert!(!read(&journal).is_done);
    journal.note_done().unwrap();
    journal.end().unwrap();
    assert_eq!(fs::read_dir(&journal.dir).unwrap().count(), 0);
}

#[test]
fn journals_of_builds_that_note_no_generation_are_read_and_they_read_this_ones() {
    let journal = journal("earlier");
    let content = postcard::to_stdvec(&intent()).unwrap();
    journal.write(&content).unwrap();
    let mut earlier = intent();
    earlier.change.generation = None;
    assert_eq!(read(&journal), earlier);
    let content = postcard::to_stdvec(&(intent(), Some(7u64))).unwrap();
    assert_eq!(postcard::from_bytes::<Intent>(&content), Ok(earlier));
}

#[test]
fn a_journal_that_is_torn_or_changed_anywhere_is_not_believed() {
    let journal = journal("torn");
    journal.begin(&intent()).unwrap();
    let whole = fs::read(journal.path()).unwrap();
    for cut in 0..whole.len() {
        fs::write(journal.path(), &whole[..cut]).unwrap();
        let noted = journal.read().unwrap();
        assert!(matches!(noted, Noted::Damaged(_)), "cut to {cut}");
    }
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        fs::write(journal.path(), &bytes).unwrap();
        let noted = journal.read().unwrap();
        assert!(matches!(noted, Noted::Damaged(_)), "byte {at} changed");
    }
    fs::write(journal.path(), &whole).unwrap();
    read(&journal);
}

#[test]
fn a_journal_of_another_guest_is_not_believed() {
    let journal = journal("foreign");
    journal.begin(&intent()).unwrap();
    let other = Journal::within(&journal.dir, "00000000-0000-0000-0000-000000000000");
    fs::rename(journal.path(), other.path()).unwrap();
    assert!(matches!(other.read().unwrap(), Noted::Damaged(_)));
}

#[test]
fn a_journal_that_can_not_be_believed_is_kept_beside_the_others() {
    let journal = journal("kept");
    for content in [&b"XEN-LOCUS-JRNL3\nodd"[..], b"", b"else"] {
        journal.begin(&intent()).unwrap();
        fs::write(journal.path(), content).unwrap();
        let aside = journal.aside();
        journal.retire().unwrap();
        assert!(!journal.exists());
        assert_eq!(fs::read(&aside).unwrap(), content);
        let name = aside.file_name().unwrap().to_str().unwrap();
        assert!(
            !uuid::is_text(name),
            "{name} is taken for a guest's journal"
        );
    }
    // One that is believed is removed.
    journal.begin(&intent()).unwrap();
    let aside = journal.aside();
    let _ = fs::remove_file(&aside);
    journal.retire().unwrap();
    assert!(!journal.exists() && !aside.exists());
    journal.retire().unwrap();
}

#[test]
fn a_journal_of_another_version_is_refused_by_name_and_stays() {
    let journal = journal("newer");
    let refused = |words: &str| {
        let before = fs::read(journal.path()).unwrap();
        for error in [journal.read().unwrap_err(), journal.retire().unwrap_err()] {
            assert_eq!(error.exit_code(), ExitCode::NotApplicable);
            let said = error.to_string();
            assert!(said.contains(words), "{said}");
            assert!(said.contains("expected format 3"), "{said}");
        }
        assert_eq!(fs::read(journal.path()).unwrap(), before);
    };
    journal.begin(&intent()).unwrap();
    for (format, words) in [
        ("4\n", "format 4"),
        ("2\n", "format 2"),
        ("12", "format 12"),
    ] {
        fs::write(journal.path(), format!("XEN-LOCUS-JRNL{format}and more")).unwrap();
        refused(words);
    }
    let write = |content: &[u8]| {
        let whole = [&MAGIC[..], &Sha256::digest(content), content].concat();
        fs::write(journal.path(), whole).unwrap();
    };
    // An operation that this version does not know, or of which it makes no journal.
    let mut content = postcard::to_stdvec(&intent()).unwrap();
    let change = postcard::to_stdvec(&intent().change).unwrap();
    let change_at = content.len() - change.len();
    let op_at = change_at + change.iter().rposition(|&b| b == 1 + b'0').unwrap() + 1;
    assert_eq!(content[op_at], Operation::Apply as u8);
    content[op_at] = 9;
    write(&content);
    refused("its content");
    content[op_at] = Operation::Recover as u8;
    write(&content);
    refused("about recover");
}

#[test]
fn a_journal_that_can_not_be_read_now_is_no_damaged_one() {
    let journal = journal("unread");
    fs::create_dir_all(journal.path()).unwrap();
    let error = journal.read().unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::Failed);
    assert!(error.to_string().contains("nothing was done"), "{error}");
}

#[test]
fn a_file_that_a_run_left_half_made_is_in_nobodys_way() {
    let journal = journal("half");
    fs::create_dir_all(&journal.dir).unwrap();
    fs::write(journal.dir.join(format!("{UUID}.new")), "half").unwrap();
    assert_eq!(journal.read().unwrap(), Noted::Nothing);
    journal.begin(&intent()).unwrap();
    assert_eq!(read(&journal), intent());
}

#[test]
fn where_no_journal_can_be_written_nothing_may_be_done() {
    let journal = journal("denied");
    fs::write(&journal.dir, "a file, no folder").unwrap();
    let error = journal.begin(&intent()).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::Failed);
    assert!(error.to_string().contains("nothing was changed"), "{error}");
}

#[test]
fn a_change_whose_journal_could_not_be_read_is_not_begun() {
    let journal = journal("long");
    let of = |len: u64| {
        let mut intent = intent();
        let bytes = vec![7; usize::try_from(len).unwrap() / 2];
        (intent.change.writes[0].expect, intent.change.writes[0].new) = (bytes.clone(), bytes);
        intent
    };
    let error = journal.begin(&of(LEN_MAX)).unwrap_err().to_string();
    assert!(error.contains("nothing was changed"), "{error}");
    assert!(!journal.exists());
    // What is a little shorter is written, and read again.
    let fits = of(LEN_MAX - 4096);
    journal.begin(&fits).unwrap();
    assert_eq!(read(&journal), fits);
}

#[test]
fn what_is_looked_at_anew_when_a_change_is_undone_is_not_noted() {
    use crate::machine::mock::Guest;
    use crate::write::{About, Lock};
    let guest = Guest::new();
    let redirect = intent().change.writes.remove(0);
    let about = |about| Write::condition(Gva(8), vec![0; 8], about);
    let module = about(About::Module("ext4".into()));
    let all = [
        about(About::Lock(Lock::Kprobes)),
        about(About::Kprobes),
        module.clone(),
        about(About::StaticKey),
        about(About::ModuleLists),
        redirect.clone(),
    ];
    let none = std::iter::empty();
    let change = Change::of(&guest.kernel(), Operation::Apply, "fix", &all, none);
    assert_eq!(change.writes, [module, redirect]);
    // Journals of earlier versions have no tags.
    let bytes = postcard::to_stdvec(&change.writes).unwrap();
    let read: Vec<Write> = postcard::from_bytes(&bytes).unwrap();
    assert!(read.iter().all(|w| w.about == About::Text && w.lasts()));
}
