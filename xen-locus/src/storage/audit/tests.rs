mod rotated;

use std::io::Write as _;

use super::*;

/// A log in a folder of its own.
fn log(name: &str) -> Audit {
    let folder = std::env::temp_dir().join(format!("locus-audit-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    let beside = Beside {
        head: folder.join("lib/head.json"),
        kept: folder.join("lib/in-force"),
        lock: folder.join("run/audit.lock"),
    };
    Audit::new(&folder.join("log/audit.jsonl"), Some(beside))
}

/// The file with the end of the log.
fn head(audit: &Audit) -> &Path {
    &audit.beside.as_ref().unwrap().head
}

fn add(audit: &Audit, patch: &str) {
    let action = Action {
        patch: patch.into(),
        message: "said \",\"hash\":\"".into(),
        ..Action::default()
    };
    audit.open("").unwrap().append(action).unwrap();
}

#[test]
fn nothing_in_the_log_ends_a_line_or_commands_a_terminal() {
    let audit = log("printable");
    let odd = "web\n{\"seq\":9}\t\r\x1b[2J\u{7f}\u{9b}2J\u{202e}\u{e4}";
    let action = Action {
        domain: odd.into(),
        message: odd.into(),
        ..Action::default()
    };
    audit.open("").unwrap().append(action).unwrap();
    let text = fs::read_to_string(&audit.log).unwrap();
    assert_eq!(text.lines().count(), 1);
    assert!(!text.trim_end().contains(char::is_control), "{text:?}");
    assert!(!text.contains('\u{202e}'), "{text:?}");
    // It means the same.
    let history = audit.history().unwrap();
    assert_eq!(
        (&*history.lines[0].action.message, history.faults),
        (odd, vec![])
    );
    assert_eq!(history.lines[0].action.domain, odd);
}

fn faults(audit: &Audit) -> Vec<String> {
    audit.history().unwrap().faults
}

/// Three lines, changed as text.
fn changed(name: &str, change: impl FnOnce(&mut Vec<String>)) -> Vec<String> {
    let audit = log(name);
    for patch in ["one", "two", "three"] {
        add(&audit, patch);
    }
    assert_eq!(faults(&audit), Vec::<String>::new());
    let text = fs::read_to_string(&audit.log).unwrap();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    change(&mut lines);
    fs::write(&audit.log, lines.join("\n") + "\n").unwrap();
    faults(&audit)
}

#[test]
fn lines_follow_each_other_and_are_read_back() {
    let audit = log("whole");
    assert!(audit.history().unwrap().lines.is_empty());
    assert_eq!(faults(&audit), Vec::<String>::new());
    for patch in ["one", "two"] {
        add(&audit, patch);
    }
    let history = audit.history().unwrap();
    let seen: Vec<(u64, &str)> = history
        .lines
        .iter()
        .map(|l| (l.seq, &*l.action.patch))
        .collect();
    assert_eq!(seen, [(1, "one"), (2, "two")]);
    assert_eq!(history.lines[0].prev, NONE);
    assert_eq!(history.notes, [""; 0]);
}

#[test]
fn every_change_of_the_log_is_noticed() {
    let one = |faults: Vec<String>, words: &str| {
        assert!(
            faults.iter().any(|f| f.contains(words)),
            "{words:?}: {faults:?}"
        );
    };
    let edit = |lines: &mut Vec<String>| lines[1] = lines[1].replace("two", "2wo");
    one(changed("edited", edit), "entry 2) is not what was written");
    one(changed("removed", |l| drop(l.remove(1))), "does not follow");
    one(changed("cut", |l| l.truncate(2)), "should be entry 3");
    one(changed("emptied", Vec::clear), "should be entry 3");
    let front = "began with entry 1 and now begins with entry";
    one(changed("front", |l| drop(l.remove(0))), front);
    one(changed("front-two", |l| drop(l.drain(..2))), front);
    one(changed("swapped", |l| l.swap(0, 1)), "does not follow");
    one(
        changed("garbage", |l| l.insert(1, "{}".into())),
        "line 2 is no entry",
    );
    one(
        changed("long", |l| l[1].push_str(&"x".repeat(1 << 17))),
        "is no entry",
    );
    // A line that fits what stands before it, but not what comes after.
    let forge = |lines: &mut Vec<String>| {
        let (hashed, _) = lines[1].rsplit_once(OWN).unwrap();
        let hashed = hashed.replace("two", "2wo");
        lines[1] = format!("{hashed}{OWN}{}\"}}", digest(&hashed));
    };
    one(changed("forged", forge), "entry 3) does not follow");
}

#[test]
fn a_run_that_ended_while_it_wrote_breaks_nothing_that_comes_after() {
    let audit = log("torn");
    add(&audit, "one");
    let known = fs::read(head(&audit)).unwrap();
    add(&audit, "two");
    // Between the two files.
    fs::write(head(&audit), known).unwrap();
    assert_eq!(faults(&audit), Vec::<String>::new());
    add(&audit, "three");
    assert_eq!(faults(&audit), Vec::<String>::new());
    // In the middle of a line: that one is told of, and those after it count.
    let mut file = OpenOptions::new().append(true).open(&audit.log).unwrap();
    file.write_all(b"{\"schema\":1,\"seq\":4,").unwrap();
    add(&audit, "four");
    let history = audit.history().unwrap();
    assert_eq!(history.faults, ["line 4 is no entry"]);
    assert_eq!(history.lines.last().unwrap().seq, 4);
}

#[test]
fn of_a_line_that_could_not_be_recorded_nothing_stays() {
    let audit = log("unrecorded");
    add(&audit, "one");
    let before = fs::read(&audit.log).unwrap();
    // Where the last line is known from can't be written.
    let blocked = head(&audit).with_extension("new");
    fs::create_dir(&blocked).unwrap();
    let mut writer = audit.open("").unwrap();
    let error = writer.append(Action::default()).unwrap_err();
    assert!(error.to_string().contains("head.json"), "{error}");
    assert_eq!(fs::read(&audit.log).unwrap(), before);
    fs::remove_dir(&blocked).unwrap();
    add(&audit, "two");
    assert_eq!(faults(&audit), Vec::<String>::new());
    assert_eq!(audit.history().unwrap().lines.len(), 2);
}

#[test]
fn what_is_in_force_in_a_guest_is_told_by_its_last_line_wherever_that_is() {
    let audit = log("in-force");
    assert_eq!(audit.in_force("a").unwrap(), []);
    let action = |uuid: &str, patch: &str, said: &str| Action {
        uuid: uuid.into(),
        op: "apply".into(),
        patch: patch.into(),
        result: "applied".into(),
        message: said.into(),
        ..Action::default()
    };
    let mut writer = audit.open("").unwrap();
    writer.append(action("a", "one", "")).unwrap();
    writer.append(action("b", "two", "")).unwrap();
    writer.append(action("a", "three", "")).unwrap();
    // Lines of others, one of which speaks of it; and one that was cut short.
    writer
        .append(action("b", "four", "\"uuid\":\"a\""))
        .unwrap();
    let mut file = OpenOptions::new().append(true).open(&audit.log).unwrap();
    file.write_all(b"{\"uuid\":\"a\",").unwrap();
    writer.append(action("b", "five", "")).unwrap();
    let names = |all: Vec<InForce>| -> Vec<String> { all.into_iter().map(|p| p.name).collect() };
    let file = File::open(&audit.log).unwrap();
    let len = usize::try_from(file.metadata().unwrap().len()).unwrap();
    for block in 1..=len + 1 {
        let of = |uuid| {
            names(
                last_of(&file, uuid, block)
                    .unwrap()
                    .map_or(vec![], |l| l.in_force),
            )
        };
        assert_eq!(of("a"), ["one", "three"], "{block} bytes at once");
        assert_eq!(of("b"), ["two", "four", "five"], "{block} bytes at once");
        assert_eq!(of("c"), [""; 0], "{block} bytes at once");
    }
    // By the first line that can be read.
    let text = fs::read_to_string(&audit.log).unwrap();
    fs::write(&audit.log, text.replace("three", "\0")).unwrap();
    let found = last_of(&file, "a", 100).unwrap().unwrap();
    assert_eq!(names(found.in_force), ["one"]);
}

#[test]
fn what_can_not_be_recorded_is_refused_before_it_is_begun() {
    let audit = log("refused");
    fs::create_dir_all(&audit.log).unwrap();
    let error = audit.open("").unwrap_err();
    assert_eq!(error.exit_code() as u8, 1, "{error}");
    assert!(error.to_string().contains("audit.jsonl"), "{error}");
    let audit = log("refused-head");
    add(&audit, "one");
    fs::write(head(&audit), "{").unwrap();
    let error = audit.open("").unwrap_err();
    assert_eq!(error.exit_code() as u8, 1, "{error}");
}

#[test]
fn what_is_in_force_is_kept_though_the_log_and_its_head_are_lost() {
    let audit = log("lost");
    let apply = |patch: &str| {
        let action = Action {
            uuid: "a".into(),
            op: "apply".into(),
            patch: patch.into(),
            result: "applied".into(),
            ..Action::default()
        };
        audit.open("").unwrap().append(action).unwrap();
    };
    ["one", "two"].into_iter().for_each(apply);
    fs::remove_file(&audit.log).unwrap();
    fs::remove_file(head(&audit)).unwrap();
    apply("three");
    assert_eq!(audit.history().unwrap().lines[0].seq, 1);
    let all = audit.in_force("a").unwrap();
    let names: Vec<String> = all.into_iter().map(|p| p.name).collect();
    assert_eq!(names, ["one", "two", "three"]);
}

#[test]
fn what_is_kept_of_one_guest_keeps_no_other_from_being_recorded() {
    let audit = log("kept-damaged");
    let act = |uuid: &str, patch: &str| {
        let action = Action {
            uuid: uuid.into(),
            op: "apply".into(),
            result: "applied".into(),
            patch: patch.into(),
            ..Action::default()
        };
        audit.open(uuid).and_then(|mut log| log.append(action))
    };
    let kept = |uuid: &str| audit.beside.as_ref().unwrap().kept.join(uuid);
    let in_force = |uuid| -> Vec<String> {
        let all = audit.in_force(uuid).unwrap();
        all.into_iter().map(|patch| patch.name).collect()
    };
    act("b", "zero").unwrap();
    act("a", "one").unwrap();
    // That of the last line is damaged: its line has what it should say.
    fs::write(kept("a"), "{").unwrap();
    act("b", "two").unwrap();
    assert_eq!(in_force("a"), ["one"]);
    assert_eq!(fs::read(kept("a").with_extension("damaged")).unwrap(), b"{");
    // So has the log, as long as it has a line about that guest.
    fs::write(kept("a"), "cut").unwrap();
    act("a", "three").unwrap();
    assert_eq!(in_force("a"), ["one", "three"]);
    fs::write(kept("c"), "cut").unwrap();
    let error = act("c", "four").unwrap_err();
    assert!(error.to_string().contains("is damaged"), "{error}");
    // A later version's is left as it is, and only its guest is not changed.
    let later = r#"{"schema":2,"all":"else"}"#;
    fs::write(kept("a"), later).unwrap();
    let error = act("a", "four").unwrap_err();
    assert!(
        error.to_string().contains("a later one wrote it"),
        "{error}"
    );
    act("b", "four").unwrap();
    act("b", "five").unwrap();
    assert_eq!(fs::read_to_string(kept("a")).unwrap(), later);
    assert_eq!(in_force("b"), ["zero", "two", "four", "five"]);
    assert_eq!(faults(&audit), [""; 0]);
}

#[test]
fn who_holds_a_lock_of_the_log_itself_keeps_nothing_from_being_recorded() {
    let audit = log("held");
    add(&audit, "one");
    let reader = File::open(&audit.log).unwrap();
    reader.lock_shared().unwrap();
    add(&audit, "two");
    assert_eq!(faults(&audit), [""; 0]);
    // No link is followed to the log, whose folder others could write once.
    let other = audit.log.with_extension("other");
    fs::rename(&audit.log, &other).unwrap();
    std::os::unix::fs::symlink(&other, &audit.log).unwrap();
    assert!(audit.open("").is_err());
}
