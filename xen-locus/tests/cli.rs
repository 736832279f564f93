//! The command as a user meets it on a machine without Xen.

#![allow(clippy::unwrap_used)] // a test that cannot run its subject has failed

use std::process::{Command, Output};

use locus_payload::testelf::{Spec, ALLOC, R_64, VARS};

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

/// What `show` says of a payload, with 256 MiB of address space and a minute of the processor. It takes less than half of the
/// memory, and seconds.
fn shown_within_limits(name: &str, payload: &[u8]) -> Output {
    let file = std::env::temp_dir().join(format!("locus-cli-{name}-{}.ko", std::process::id()));
    std::fs::write(&file, payload).unwrap();
    let script = "ulimit -v 262144 && ulimit -t 60 && exec \"$@\"";
    let out = Command::new("sh")
        .args(["-c", script, "sh", env!("CARGO_BIN_EXE_xen-locus"), "show"])
        .arg(&file)
        .output()
        .unwrap();
    std::fs::remove_file(&file).unwrap();
    out
}

/// The payload of the golden tests, with thousands of sections that are the same 1.3 MB of its file: 5.2 GB if each were
/// copied.
#[test]
fn sections_that_share_bytes_of_a_file_take_no_more_memory_than_it_has() {
    const COUNT: usize = 4000;
    for (name, flags, words) in [
        (".modinfo", 0, "there are several such sections"),
        (".rodata.more", ALLOC, "some share bytes of the file"),
    ] {
        let (mut elf, _) = Spec::default().elf();
        let large = elf.section(".rodata.large", ALLOC, &[0; 1_300_000]);
        for _ in 0..COUNT {
            elf.section(name, flags, &[]);
        }
        let mut bytes = elf.build();
        let table = u64::from_le_bytes(bytes[40..48].try_into().unwrap());
        let place_of = |index: usize| usize::try_from(table).unwrap() + 64 * index + 24;
        // sh_offset and sh_size
        let place = bytes[place_of(large)..place_of(large) + 16].to_vec();
        for at in (large + 1..=large + COUNT).map(place_of) {
            bytes[at..at + 16].copy_from_slice(&place);
        }
        let out = shown_within_limits("sections", &bytes);
        let text = said(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{name}: {text}");
        assert!(text.contains(words), "{name}: {text}");
    }
}

/// The payload of the golden tests, with many structures that begin as a patch does, and many relocations without effect at
/// the place that each of them leads to: to step over these for each structure takes minutes.
#[test]
fn relocations_of_no_effect_cost_as_much_as_they_are_many() {
    const STRUCTURES: u64 = 200_000;
    const NONES: usize = 500_000;
    let (mut elf, at) = Spec::default().elf();
    let end = 16 * STRUCTURES;
    let size = usize::try_from(end).unwrap() + 24;
    let home = elf.section(".data.many", VARS, &vec![0; size]);
    let module = elf.section_symbol(at.this_module);
    let own = elf.section_symbol(home);
    for offset in (0..end).step_by(16) {
        elf.reloc(home, offset, R_64, module, 0);
        elf.reloc(home, offset + 8, R_64, own, i64::try_from(end).unwrap());
    }
    for _ in 0..NONES {
        // R_X86_64_NONE, at what would be the functions of an object.
        elf.reloc(home, end + 8, 0, 0, 0);
    }
    let out = shown_within_limits("relocations", &elf.build());
    let text = said(&out.stdout);
    let why = said(&out.stderr);
    assert_eq!(out.status.code(), Some(0), "{:?} {why}", out.status);
    assert!(text.contains("cmdline_proc_show in vmlinux"), "{text}");
}
