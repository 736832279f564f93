//! What the read-only commands of `COMMANDS` print of each core in `golden/`, compared with the files there.
//!
//! `UPDATE_GOLDEN=1 cargo test -p xen-locus` writes the files anew: look at the difference before
//! committing it.

#![allow(clippy::unwrap_used)] // a test that cannot run its subject has failed

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use locus_guest::GuestType;
use locus_kernel::fixture_world::World;
use locus_payload::testelf::Spec;

/// The cores: of the fixture's guest, made by the last test here.
const CORES: [&str; 2] = ["mock-pv", "mock-pvh"];

/// Name of the file, and arguments; `CORE` stands for the core.
const COMMANDS: [(&str, &[&str]); 12] = [
    ("list", &["list", "--core", "CORE"]),
    ("info", &["info", "--core", "CORE"]),
    (
        "symbols",
        &["info", "--core", "CORE", "--symbols", "*_task*"],
    ),
    ("tasks", &["info", "--core", "CORE", "--tasks"]),
    ("stacks", &["info", "--core", "CORE", "--stacks"]),
    ("modules", &["info", "--core", "CORE", "--modules"]),
    ("type", &["info", "--core", "CORE", "--type", "task_struct"]),
    ("status", &["status", "--core", "CORE"]),
    ("check", &["check", "--core", "CORE", "payload.ko"]),
    (
        "blocking-v",
        &["-v", "blocking", "--core", "CORE", "./payload.ko"],
    ),
    ("blocking", &["blocking", "--core", "CORE", "./payload.ko"]),
    ("check-core", &["check", "--core", "CORE", "CORE"]),
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The exit code, stdout and stderr of the command, in one text.
fn said(core: &str, args: &[&str], format: &str) -> String {
    let file = format!("{core}.core");
    let args = args.iter().map(|&a| if a == "CORE" { &file } else { a });
    let out = Command::new(env!("CARGO_BIN_EXE_xen-locus"))
        .args(["-o", format])
        .args(args)
        .current_dir(folder())
        .output()
        .unwrap();
    format!(
        "exit code {}\n--- stdout\n{}--- stderr\n{}",
        out.status.code().unwrap(),
        String::from_utf8(out.stdout).unwrap(),
        String::from_utf8(out.stderr).unwrap(),
    )
}

#[test]
fn every_read_only_command_prints_of_every_core_what_it_printed_before() {
    let mut changed = Vec::new();
    for core in CORES {
        for (name, args) in COMMANDS {
            for format in ["table", "json"] {
                let path = folder().join(format!("{core}.{name}.{format}"));
                let now = said(core, args, format);
                if std::env::var_os("UPDATE_GOLDEN").is_some() {
                    fs::write(&path, &now).unwrap();
                }
                let before = fs::read_to_string(&path).unwrap_or_default();
                if before != now {
                    changed.push(format!("{}:\n{now}", path.display()));
                }
            }
        }
    }
    assert!(
        changed.is_empty(),
        "the output changed; if that is meant, run UPDATE_GOLDEN=1 cargo test -p xen-locus:\n{}",
        changed.join("\n")
    );
}

#[test]
fn a_core_is_no_subject_of_commands_that_change_a_guest() {
    for args in [
        &["apply", "--core", "mock-pv.core", "payload.ko"][..],
        &["revert", "--core", "mock-pv.core", "x"],
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_xen-locus"))
            .args(args)
            .current_dir(folder())
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(64), "{args:?}");
    }
}

#[test]
fn the_cores_for_golden_tests_are_what_the_fixture_makes() {
    let folder = folder();
    for (name, bytes) in [
        ("mock-pv.core", World::new(GuestType::Pv).core()),
        ("mock-pvh.core", World::new(GuestType::Pvh).core()),
        ("payload.ko", Spec::default().bytes()),
    ] {
        let path = folder.join(name);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::create_dir_all(&folder).unwrap();
            fs::write(&path, &bytes).unwrap();
        }
        assert!(
            fs::read(&path).unwrap_or_default() == bytes,
            "{} is not what the fixture makes now: UPDATE_GOLDEN=1 cargo test -p xen-locus",
            path.display()
        );
    }
}
