//! A log that is rotated, emptied or cut; and runs that end in the middle.

use super::*;

/// What was done to a patch of a guest.
fn done(uuid: &str, op: &str, patch: &str) -> Action {
    Action {
        uuid: uuid.into(),
        op: op.into(),
        patch: patch.into(),
        result: if op == "apply" { "applied" } else { "reverted" }.into(),
        ..Action::default()
    }
}

fn names(audit: &Audit, uuid: &str) -> Vec<String> {
    let all = audit.in_force(uuid).unwrap();
    all.into_iter().map(|p| p.name).collect()
}

/// Rotates the log, and returns the file with what was in it.
fn rotate(audit: &Audit, name: &str) -> Audit {
    let to = audit.log.with_file_name(format!("audit.jsonl{name}"));
    fs::rename(&audit.log, &to).unwrap();
    Audit::copy(&to)
}

#[test]
fn a_log_that_was_rotated_goes_on_and_what_guests_had_is_known() {
    for copied in [false, true] {
        let audit = log("rotated");
        for action in [done("a", "apply", "one"), done("b", "apply", "two")] {
            audit.open("").unwrap().append(action).unwrap();
        }
        let mut old = rotate(&audit, ".1");
        if copied {
            fs::write(&audit.log, "").unwrap();
        }
        // Nothing was logged since.
        let history = audit.history().unwrap();
        assert_eq!((history.lines.len(), history.faults.len()), (0, 0));
        assert!(
            history.notes[0].contains("entry 2 is in"),
            "{:?}",
            history.notes
        );
        assert_eq!(
            (names(&audit, "a"), names(&audit, "b")),
            (vec!["one".into()], vec!["two".into()])
        );
        for round in 2..5 {
            let action = done("b", "apply", "three");
            audit.open("").unwrap().append(action).unwrap();
            let history = audit.history().unwrap();
            assert_eq!(history.faults, [""; 0]);
            assert!(history.notes[0].contains(&format!("begins with entry {}", 1 + round)));
            assert_eq!(history.lines.len(), 1);
            assert_eq!(
                (history.lines[0].seq, &*history.lines[0].begins),
                (1 + round, ROTATED)
            );
            let last = old.history().unwrap();
            assert_eq!(last.faults, [""; 0]);
            assert_eq!(names(&audit, "a"), ["one"]);
            assert_eq!(names(&audit, "b"), ["two", "three"]);
            fs::remove_file(&old.log).unwrap();
            old = rotate(&audit, "-20260101");
        }
        // A copy that was cut at its front is found out too.
        let text = fs::read_to_string(&old.log).unwrap();
        let cut = text.replace("\"first\":5", "\"first\":4");
        fs::write(&old.log, cut).unwrap();
        assert!(faults(&old).iter().any(|f| f.contains("cut at its front")));
    }
}

#[test]
fn a_log_that_was_emptied_or_removed_is_told_from_one_that_was_rotated() {
    for removed in [false, true] {
        let audit = log("emptied");
        audit
            .open("")
            .unwrap()
            .append(done("a", "apply", "one"))
            .unwrap();
        // Files that are no rotated log.
        fs::write(audit.log.with_file_name("audit.jsonl.1"), "{}\n").unwrap();
        fs::create_dir(audit.log.with_file_name("audit.jsonl.2")).unwrap();
        fs::copy(&audit.log, audit.log.with_file_name("audit.copy")).unwrap();
        match removed {
            true => fs::remove_file(&audit.log).unwrap(),
            false => fs::write(&audit.log, "").unwrap(),
        }
        assert!(faults(&audit)[0].contains("emptied or removed"));
        for _ in 0..2 {
            audit
                .open("")
                .unwrap()
                .append(done("a", "apply", "two"))
                .unwrap();
            let all = faults(&audit);
            assert_eq!(all.len(), 1, "{all:?}");
            assert!(all[0].contains("before that are lost"), "{all:?}");
        }
        assert_eq!(names(&audit, "a"), ["one", "two"]);
        // It is told until that file is rotated itself.
        rotate(&audit, ".3");
        add(&audit, "three");
        assert_eq!(faults(&audit), [""; 0]);
    }
}

#[test]
fn what_a_run_did_while_the_log_was_rotated_is_in_the_new_file() {
    let audit = log("mid-run");
    add(&audit, "one");
    let (mut early, mut late) = (audit.open("").unwrap(), audit.open("").unwrap());
    rotate(&audit, ".1");
    early.append(done("a", "apply", "two")).unwrap();
    late.append(done("a", "apply", "three")).unwrap();
    early.append(done("a", "apply", "four")).unwrap();
    let history = audit.history().unwrap();
    let seqs: Vec<u64> = history.lines.iter().map(|l| l.seq).collect();
    assert_eq!((seqs, history.faults.len()), (vec![2, 3, 4], 0));
    assert!(history.notes[0].contains("begins with entry 2"));
    assert_eq!(names(&audit, "a"), ["two", "three", "four"]);
}

#[test]
fn what_earlier_versions_wrote_is_read_and_goes_on() {
    let audit = log("earlier");
    // Their lines have no number of the first line.
    let mut prev = NONE.to_owned();
    let mut text = String::new();
    let mut in_force = Vec::new();
    for (seq, action) in [done("a", "apply", "one"), done("b", "apply", "two")]
        .into_iter()
        .enumerate()
    {
        in_force = in_force::after(std::mem::take(&mut in_force), &action);
        let line = Line {
            schema: 1,
            seq: seq as u64 + 7,
            first: 0,
            begins: String::new(),
            in_force: std::mem::take(&mut in_force),
            action,
            prev,
        };
        let line = serde_json::to_string(&line).unwrap();
        assert!(
            !line.contains("first") && !line.contains("begins"),
            "{line}"
        );
        let hashed = line.strip_suffix('}').unwrap();
        prev = digest(hashed);
        text.push_str(&format!("{hashed}{OWN}{prev}\"}}\n"));
    }
    fs::create_dir_all(audit.log.parent().unwrap()).unwrap();
    fs::create_dir_all(head(&audit).parent().unwrap()).unwrap();
    fs::write(&audit.log, text).unwrap();
    fs::write(head(&audit), format!("{{\"seq\":8,\"hash\":\"{prev}\"}}")).unwrap();
    let check = |lines| {
        let history = audit.history().unwrap();
        assert_eq!((history.lines.len(), history.faults), (lines, vec![]));
        assert!(
            history.notes[0].contains("earlier version"),
            "{:?}",
            history.notes
        );
        assert_eq!(
            (names(&audit, "a"), names(&audit, "b")),
            (vec!["one".into()], vec!["two".into()])
        );
    };
    check(2);
    add(&audit, "three");
    check(3);
    // An earlier version goes on with it, then this one.
    let bytes = fs::read_to_string(head(&audit)).unwrap();
    fs::write(head(&audit), bytes.replace(",\"first\":7", "")).unwrap();
    check(3);
    add(&audit, "four");
    check(4);
    rotate(&audit, ".1");
    add(&audit, "five");
    assert_eq!(faults(&audit), [""; 0]);
    assert_eq!(
        (names(&audit, "a"), names(&audit, "b")),
        (vec!["one".into()], vec!["two".into()])
    );
}

#[test]
fn a_line_is_never_too_long_to_be_read() {
    let audit = log("line");
    let long = || "\u{1}\"\n\u{20ac}".repeat(20_000);
    let action = Action {
        message: long(),
        domain: long(),
        who: long(),
        superseded: (0..100)
            .map(|n| format!("a_patch_whose_name_is_long_{n}"))
            .collect(),
        ..done("a", "apply", "one")
    };
    audit.open("").unwrap().append(action.clone()).unwrap();
    add(&audit, "two");
    let history = audit.history().unwrap();
    assert_eq!((history.lines.len(), history.faults), (2, vec![]));
    assert_eq!(history.lines[0].action.superseded.len(), 100);
    assert!(history.lines[0].action.domain.len() > 1000);
    assert_eq!(names(&audit, "a"), ["one"]);
    // Nothing stays of one that can't be made to fit.
    let superseded = vec!["x".repeat(1 << 16)];
    let error = audit
        .open("")
        .unwrap()
        .append(Action {
            superseded,
            ..action
        })
        .unwrap_err();
    assert!(error.to_string().contains("are the most"), "{error}");
    assert_eq!(faults(&audit), [""; 0]);
}

#[test]
fn a_run_that_is_ended_at_any_step_leaves_a_log_that_goes_on() {
    // When the log is rotated: before the run that is ended, or after it.
    for (before, after) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut ended = 0;
        for left in 0.. {
            let audit = log("ended");
            for action in [done("a", "apply", "one"), done("b", "apply", "two")] {
                audit.open("").unwrap().append(action).unwrap();
            }
            let mut old = Vec::new();
            if before {
                old.push(rotate(&audit, ".2"));
            }
            audit.left.set(left);
            let revert = || audit.open("")?.append(done("a", "revert", "one"));
            let is_done = revert().is_ok();
            let is_whole = audit.left.replace(u32::MAX) > 0;
            if after && audit.log.exists() {
                old.push(rotate(&audit, ".1"));
            }
            let what = format!("{left} steps, rotated before: {before}, after: {after}");
            for audit in old.iter().chain([&audit]) {
                assert_eq!(faults(audit), [""; 0], "{what}");
            }
            // By the lines, wherever they are.
            let by_lines = |old: &[Audit], uuid: &str| -> Vec<String> {
                let all = old.iter().chain([&audit]);
                let all = all.flat_map(|audit| audit.history().unwrap().lines);
                let mut own = all.filter(|line| line.action.uuid == uuid);
                let last = own.by_ref().last();
                last.map_or(vec![], |l| l.in_force.into_iter().map(|p| p.name).collect())
            };
            assert!(!is_done || by_lines(&old, "a").is_empty(), "{what}");
            for uuid in ["a", "b"] {
                assert_eq!(names(&audit, uuid), by_lines(&old, uuid), "{what}");
            }
            audit
                .open("")
                .unwrap()
                .append(done("b", "apply", "three"))
                .unwrap();
            assert_eq!(faults(&audit), [""; 0], "{what}");
            assert_eq!(names(&audit, "a"), by_lines(&old, "a"), "{what}");
            assert_eq!(names(&audit, "b"), ["two", "three"], "{what}");
            if is_whole {
                break;
            }
            ended += 1;
        }
        assert!(ended > 5, "{ended}");
    }
}

#[test]
fn a_first_line_that_was_cut_short_is_told_and_nothing_else_is_lost() {
    let audit = log("torn-first");
    audit
        .open("")
        .unwrap()
        .append(done("a", "apply", "one"))
        .unwrap();
    rotate(&audit, ".1");
    let known = fs::read(head(&audit)).unwrap();
    let mut writer = audit.open("").unwrap();
    writer.append(done("b", "apply", "two")).unwrap();
    let whole = fs::read(&audit.log).unwrap();
    let kept = audit.beside.as_ref().unwrap().kept.join("b");
    for cut in 1..whole.len() {
        fs::write(&audit.log, &whole[..cut]).unwrap();
        fs::write(head(&audit), &known).unwrap();
        fs::remove_file(&kept).unwrap();
        writer.append(done("b", "apply", "three")).unwrap();
        let history = audit.history().unwrap();
        let last = history.lines.last().unwrap();
        // Without its line break it is whole.
        let (seq, lines) = if cut == whole.len() - 1 {
            (3, 2)
        } else {
            (2, 1)
        };
        assert_eq!(
            (last.seq, history.lines.len()),
            (seq, lines),
            "cut to {cut}"
        );
        assert_eq!(history.faults.len(), 2 - lines, "{:?}", history.faults);
        assert_eq!(history.lines[0].begins, ROTATED);
        assert_eq!(names(&audit, "a"), ["one"], "cut to {cut}");
    }
}

#[test]
fn the_lines_since_an_entry_are_told_over_rotations_or_not_at_all() {
    let audit = log("since");
    let since = |entry| {
        let lines = audit.lines_since(entry, &|_| true).unwrap();
        lines.map(|all| all.iter().map(|l| &*l.action.patch).collect::<String>())
    };
    assert_eq!(
        (audit.last_entry().unwrap(), since(0).as_deref()),
        (0, Some(""))
    );
    let mut old = Vec::new();
    for (rotated, patch) in [("", "a"), ("", "b"), (".1", "c"), (".2", "d"), ("", "e")] {
        if !rotated.is_empty() {
            old.push(rotate(&audit, rotated).log);
        }
        add(&audit, patch);
    }
    let told = |last| {
        assert_eq!(audit.last_entry().unwrap(), last);
        for (entry, expected) in [
            (0, "abcde"),
            (1, "bcde"),
            (2, "cde"),
            (4, "e"),
            (5, ""),
            (9, ""),
        ] {
            assert_eq!(since(entry).as_deref(), Some(expected), "since {entry}");
        }
    };
    told(5);
    // Nothing was logged since.
    rotate(&audit, ".3");
    told(5);
    fs::remove_file(&old[0]).unwrap();
    assert_eq!((since(2).as_deref(), since(1)), (Some("cde"), None));
    fs::remove_file(audit.log.with_file_name("audit.jsonl.3")).unwrap();
    assert_eq!((since(4), since(5).as_deref()), (None, Some("")));
    assert_eq!(audit.last_entry().unwrap(), 5);
}
