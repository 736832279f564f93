//! The command as a user meets it on a machine without Xen.

#![allow(clippy::unwrap_used)] // a test that cannot run its subject has failed

use std::process::{Command, Output};

fn xen_locus(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xen-locus"))
        .args(args)
        .output()
        .unwrap()
}

fn said(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn without_xen_a_command_that_needs_it_says_so_in_one_sentence() {
    if std::fs::read_to_string("/sys/hypervisor/type").is_ok_and(|t| t.trim() == "xen") {
        return; // under Xen this is shown by the scenario `environment`
    }
    for args in [
        &["list"][..],
        &["info", "web"],
        &["status"],
        &["apply", "web", "x.ko"],
        &["daemon"],
    ] {
        let out = xen_locus(args);
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        assert!(out.stdout.is_empty(), "{args:?}");
        let text = said(&out.stderr);
        assert_eq!(text.lines().count(), 1, "{args:?}: {text}");
        assert!(text.contains("does not run under Xen"), "{args:?}: {text}");
    }
}

/// Waits until a process has its limit of memory.
fn wait_for_limit(process: u32) {
    let limits = format!("/proc/{process}/limits");
    let began = std::time::Instant::now();
    let is_limited = || {
        let limits = std::fs::read_to_string(&limits).unwrap_or_default();
        let limit = limits.lines().find(|l| l.starts_with("Max data size"));
        limit.is_some_and(|l| l.split_whitespace().nth(3) == Some("1073741824"))
    };
    while !is_limited() {
        assert!(began.elapsed().as_secs() < 60, "{limits}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// A command that waits for a file's other end.
#[test]
fn a_command_that_only_reads_has_a_limit_of_memory_and_ends_at_the_first_signal() {
    use std::os::unix::process::ExitStatusExt as _;
    let folder = std::env::temp_dir().join(format!("locus-cli-waits-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let pipe = folder.join("core");
    let _ = std::fs::remove_file(&pipe);
    let made = Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    // One that reads no guest has it too.
    let started = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xen-locus"));
        command.args(args).arg(&pipe).spawn().unwrap()
    };
    let mut history = started(&["history", "--log"]);
    wait_for_limit(history.id());
    history.kill().unwrap();
    history.wait().unwrap();
    let mut child = started(&["info", "--core"]);
    wait_for_limit(child.id());
    let began = std::time::Instant::now();
    let patience = std::time::Duration::from_secs(60);
    // What it does about signals comes soon after that. A shell's job in the background ignores SIGINT, and so would its
    // children.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let killed = Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status();
    assert!(killed.unwrap().success());
    let ended = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if began.elapsed() > patience {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(
        ended.and_then(|status| status.signal()),
        Some(15),
        "{ended:?}"
    );
}

/// A signal's bit in a mask of /proc/PID/status.
fn has(status: &str, mask: &str, signal: u32) -> bool {
    let line = status.lines().find_map(|l| l.strip_prefix(mask));
    let bits = line.and_then(|l| u64::from_str_radix(l.trim(), 16).ok());
    bits.is_some_and(|bits| bits >> (signal - 1) & 1 == 1)
}

#[test]
fn a_signal_that_was_ignored_when_a_command_began_stays_ignored() {
    let (hup, int, term) = (1, 2, 15);
    let folder = std::env::temp_dir().join(format!("locus-cli-ignores-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let pipe = folder.join("core");
    let _ = std::fs::remove_file(&pipe);
    let made = Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    let script = "trap '' HUP INT; exec \"$@\"";
    let me = env!("CARGO_BIN_EXE_xen-locus");
    let mut child = Command::new("sh")
        .args(["-c", script, "sh", me, "status", "--core"])
        .arg(&pipe)
        .spawn()
        .unwrap();
    let began = std::time::Instant::now();
    let status = loop {
        let file = format!("/proc/{}/status", child.id());
        let status = std::fs::read_to_string(file).unwrap();
        // The last of those for which there is a handler.
        if has(&status, "SigCgt:", term) || began.elapsed().as_secs() > 60 {
            break status;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    child.kill().unwrap();
    child.wait().unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(has(&status, "SigCgt:", term), "{status}");
    for signal in [hup, int] {
        let is_caught = has(&status, "SigCgt:", signal);
        assert!(has(&status, "SigIgn:", signal) && !is_caught, "{status}");
    }
}

#[test]
fn a_domain_whose_name_begins_with_a_dash_is_given_after_two_dashes() {
    for args in [
        &["apply", "--", "-web", "x.ko"][..],
        &["replace", "--", "-web", "x.ko"],
        &["revert", "--", "-web", "fix"],
        &["revert", "--all", "--", "-web"],
        &["check", "--", "-web", "x.ko"],
        &["check", "--core", "c", "--", "-x.ko"],
        &["blocking", "--", "-web", "fix"],
        &["nudge", "--", "-web", "fix"],
        &["info", "--tasks", "--", "-web"],
        &["status", "--", "-web"],
        &["verify", "--", "-web"],
        &["recover", "--", "-web"],
    ] {
        // There is no such file, or no Xen.
        let out = xen_locus(args);
        assert!(
            matches!(out.status.code(), Some(1 | 3)),
            "{args:?}: {}",
            said(&out.stderr)
        );
    }
    assert_eq!(
        xen_locus(&["check", "-web", "x.ko"]).status.code(),
        Some(64)
    );
}

#[test]
fn a_message_is_one_line_whatever_it_quotes() {
    let out = xen_locus(&["show", "/none\nxen-locus: all is well\t.ko"]);
    let text = said(&out.stderr);
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("/none\\u000axen-locus"), "{text}");
}

#[test]
fn wrong_usage_has_an_exit_code_of_its_own() {
    for args in [
        &[][..],
        &["frobnicate"],
        &["apply"],
        &["revert", "web"],
        &["apply", "a", "b", "--timeout", "7"],
        &["apply", "web"],
        &["apply", "--all", "web", "x.ko"],
        &["replace", "web", "/payloads/a.ko", "/payloads/b.ko"],
        &["apply", "web", "a.ko", "b.ko"],
        &["info", "web", "--raw", "foo"],
        &["recover", "-N"],
        &["daemon", "-N"],
    ] {
        assert_eq!(xen_locus(args).status.code(), Some(64), "{args:?}");
    }
    assert_eq!(xen_locus(&["--help"]).status.code(), Some(0));
    assert_eq!(xen_locus(&["--version"]).status.code(), Some(0));
}

#[test]
fn help_shows_output_as_it_is_and_all_names_of_an_item() {
    let help = |command| {
        let out = xen_locus(&[command, "--help"]);
        let text = said(&out.stdout);
        assert!(!text.contains('\u{a0}'), "{text}");
        text
    };
    for (command, line) in [
        ("verify", "0xffffffff814105a5  e9861a1f7e  b801000000  unknown\n"),
        ("revert", "xen-locus: pv: patch locus_cmdline can't be reverted while another lies on it: locus_stack_two replaces"),
        ("info", "  kernel, build_id: release and build-id of the guest's kernel\n"),
        ("history", "  /var/log/xen-locus/audit.jsonl.1: what was rotated"),
    ] {
        let text = help(command);
        assert!(text.contains(line), "{command}: {text}");
    }
}

#[test]
fn show_needs_no_xen_and_refuses_what_is_no_payload() {
    let out = xen_locus(&["show", "/bin/sh"]);
    assert_eq!(out.status.code(), Some(3), "{}", said(&out.stderr));
    assert!(
        said(&out.stderr).contains("not a relocatable object"),
        "{}",
        said(&out.stderr)
    );
    assert_eq!(xen_locus(&["show", "/dev/null"]).status.code(), Some(1));
    let out = xen_locus(&["show", "Cargo.toml"]);
    assert_eq!(out.status.code(), Some(1));
    let text = said(&out.stderr);
    assert!(
        text.contains("expected 7f 45 4c 46 at its beginning, found 5b 70 61 63"),
        "{text}"
    );
    assert_eq!(
        xen_locus(&["show", "/nonexistent.ko"]).status.code(),
        Some(1)
    );
}

#[test]
fn a_log_that_is_not_there_is_not_an_intact_one() {
    let nowhere = "/nonexistent/audit.jsonl";
    for format in ["table", "json"] {
        let out = xen_locus(&["-o", format, "history", "--log", nowhere]);
        assert_eq!(out.status.code(), Some(1), "{format}");
        assert!(out.stdout.is_empty(), "{}", said(&out.stdout));
        let text = said(&out.stderr);
        assert!(
            text.contains(nowhere) && text.contains("No such file"),
            "{text}"
        );
    }
    // An empty one has nothing of any guest, and a name that was mistyped is shown.
    let out = xen_locus(&["history", "wbe", "--log", "/dev/null"]);
    assert_eq!(out.status.code(), Some(0), "{}", said(&out.stderr));
    assert_eq!(said(&out.stdout), "no actions are logged of \"wbe\"\n");
}

/// A stdout that can't be written.
fn full() -> std::fs::File {
    std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .unwrap()
}

#[test]
fn what_could_not_be_printed_is_told() {
    let core = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/mock-pv.core");
    for args in [
        &["--help"][..],
        &["apply", "--help"],
        &["--version"],
        &["list", "--core", core],
        &["-o", "json", "status", "--core", core],
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xen-locus"));
        let out = command.args(args).stdout(full()).output().unwrap();
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        let text = said(&out.stderr);
        assert!(
            text.starts_with("xen-locus: stdout can't be written: No space left"),
            "{args:?}: {text}"
        );
        // A reader that has gone misses nothing.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let out = command.stdout(writer).output().unwrap();
        assert_eq!(out.status.code(), Some(0), "{args:?}");
        assert_eq!(said(&out.stderr), "", "{args:?}");
    }
}
