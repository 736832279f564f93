//! `info` reports the same about a guest as the guest itself, in full, for kernels of four releases of Debian. A
//! payload that was built for each kernel is applied and reverted.
//!
//! Both sides are compared by digests, because a guest's console is slow. Only what differs is transferred.

mod lists;

use super::steps::kernels::{self, kernel_scenarios};
use super::steps::patches::{cmdline_is_live, CMDLINE};
use super::steps::tool;
use super::steps::wait::GATHERING;
use crate::guest::{Guest, Kind};
use crate::scenario::{Ctx, Scenario};
use crate::suites::{Suite, BOOKWORM};
use crate::verdict::Verdict;
use crate::{check, check_eq};

const SUMMARY: &str =
    "info agrees with the guest in everything, and a patch is applied and reverted";

/// Scenarios that are short enough for a usual run: Debian 12's kernel, an older and a newer one.
pub const SCENARIOS: &[Scenario] = kernel_scenarios!(
    know,
    SUMMARY,
    [
        ("know-bookworm-pv", BOOKWORM, Pv, PV1),
        ("know-bullseye-pv", BULLSEYE, Pv, PV1),
        ("know-trixie-pv", TRIXIE, Pv, PV1),
        ("know-bookworm-pvh", BOOKWORM, Pvh, PVH),
    ]
);

/// The rest of the matrix of kernels and types.
pub const MATRIX: &[Scenario] = kernel_scenarios!(
    know,
    SUMMARY,
    [
        ("know-bullseye-pvh", BULLSEYE, Pvh, PVH),
        ("know-testing-pv", TESTING, Pv, PV1),
        ("know-trixie-pvh", TRIXIE, Pvh, PVH),
        ("know-testing-pvh", TESTING, Pvh, PVH),
        ("know-bookworm-hvm", BOOKWORM, Hvm, HVM),
    ]
);

/// One comparison.
type Check = fn(&Ctx, &Guest) -> Result<(), Verdict>;

fn know(ctx: &mut Ctx, suite: &'static Suite, kind: Kind) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(kernels::spec(suite, kind))?;
    load_modules(&guest)?;

    let checks: [(&str, Check); 9] = [
        ("summary", summary),
        ("kernel symbols", kernel_symbols),
        ("module symbols", module_symbols),
        ("--modules", lists::modules),
        ("--tasks", lists::tasks),
        ("cpu", lists::cpu),
        ("--raw btf", raw_btf),
        ("--raw notes", raw_notes),
        ("patch", patch),
    ];
    // All of them, so that one run reports everything that is wrong.
    let mut wrong = Vec::new();
    for (what, check) in checks {
        ctx.dom0.note(&format!("--- {}: {what}", guest.name));
        match check(ctx, &guest) {
            Err(Verdict::Failure(why)) => wrong.push(format!("{what}: {why}")),
            other => other?,
        }
    }
    check!(wrong.is_empty(), "{}", wrong.join("\n"));
    if *suite == BOOKWORM {
        guest.ok("rm /tmp/kallsyms")?;
    } else {
        ctx.destroy_guest(&guest.name)?;
    }
    Ok(())
}

/// Loads the modules in the guest's initramfs, unless that was done before.
fn load_modules(guest: &Guest) -> Result<(), Verdict> {
    guest.ok(
        "grep -q ^dummy /proc/modules || while read m; do insmod /lib/modules/$m || exit 1; done \
         < /lib/modules/order",
    )?;
    let count = guest.ok("wc -l < /proc/modules")?;
    check!(count != "0", "no module was loaded");
    // A copy, because the kernel takes seconds to make this list.
    guest.ok("cat /proc/kallsyms > /tmp/kallsyms")?;
    Ok(())
}

fn summary(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let tasks = || -> Result<u64, Verdict> { number(guest, "ls -d /proc/[0-9]*/task/* | wc -l") };
    let before = tasks()?;
    let info = tool::info(ctx, &guest.name, "")?;
    let after = tasks()?;
    check_eq!(info["kernel"], guest.ok("uname -r")?, "{info}");
    check_eq!(info["domid"], guest.domid, "{info}");
    let kind = guest.ok("tr A-Z a-z < /sys/hypervisor/guest_type")?;
    check_eq!(info["type"], kind, "{info}");
    let notes = guest.sh("cat /sys/kernel/notes")?.stdout;
    let build_id = build_id(&notes).ok_or_else(|| Verdict::Error("no build-id".to_owned()))?;
    check_eq!(info["build_id"], build_id, "{info}");
    let text = guest.ok("grep ' T _text$' /tmp/kallsyms | cut -d' ' -f1")?;
    check_eq!(info["text_base"], format!("0x{text}"), "{info}");
    let symbols = number(guest, "grep -vc '\\[' /tmp/kallsyms")?;
    check_eq!(info["symbols"], symbols, "{info}");
    let modules = number(guest, "wc -l < /proc/modules")?;
    check_eq!(info["modules"], modules, "{info}");
    let vcpus = number(guest, "nproc")?;
    check_eq!(info["vcpus"], vcpus, "{info}");
    // /proc has no folders of idle tasks, and kernel threads start and end.
    let seen = info["tasks"].as_u64().unwrap_or_default();
    let (low, high) = (before.min(after), before.max(after) + vcpus);
    check!(
        (low.saturating_sub(4)..=high + 4).contains(&seen),
        "{seen} tasks; /proc had {before} before and {after} after, and there are {vcpus} vCPUs"
    );
    Ok(())
}

fn number(guest: &Guest, cmd: &str) -> Result<u64, Verdict> {
    let text = guest.ok(cmd)?;
    text.parse()
        .map_err(|_| Verdict::Error(format!("`{cmd}` gave {text:?}")))
}

/// The build-id in ELF notes, as hexadecimal digits.
fn build_id(notes: &[u8]) -> Option<String> {
    const GNU_BUILD_ID: u32 = 3;
    let mut rest = notes;
    loop {
        let word = |i: usize| -> Option<u32> {
            Some(u32::from_le_bytes(
                rest.get(4 * i..4 * i + 4)?.try_into().ok()?,
            ))
        };
        let (name, desc, kind) = (word(0)?, word(1)?, word(2)?);
        let (name, desc) = (usize::try_from(name).ok()?, usize::try_from(desc).ok()?);
        let at = 12 + name.next_multiple_of(4);
        let body = rest.get(at..at + desc)?;
        if kind == GNU_BUILD_ID && rest.get(12..12 + name)? == b"GNU\0" {
            return Some(body.iter().map(|b| format!("{b:02x}")).collect());
        }
        rest = rest.get(at + desc.next_multiple_of(4)..)?;
    }
}

fn kernel_symbols(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let only = "grep -v '\\['";
    let theirs = format!("{only} /tmp/kallsyms");
    same(ctx, guest, "--symbols '*'", only, &theirs)
}

/// Symbols of modules, except those that the kernel generates for BPF programs, kprobes and ftrace.
fn module_symbols(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let only = "grep '\\[' | grep -v -e '\\[bpf\\]' -e '\\[__builtin__'";
    let theirs = format!("cat /tmp/kallsyms | {only}");
    same(ctx, guest, "--symbols '*'", only, &theirs)
}

fn raw_btf(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    for name in guest.ok("ls /sys/kernel/btf")?.split_whitespace() {
        let what = match name {
            "vmlinux" => "--raw btf".to_owned(),
            module => format!("--raw btf:{module}"),
        };
        same(
            ctx,
            guest,
            &what,
            "cat",
            &format!("cat /sys/kernel/btf/{name}"),
        )?;
    }
    Ok(())
}

fn raw_notes(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    same(ctx, guest, "--raw notes", "cat", "cat /sys/kernel/notes")
}

/// Checks that `info OPTIONS`, through a filter, prints the same as a command in the guest.
fn same(
    ctx: &Ctx,
    guest: &Guest,
    options: &str,
    filter: &str,
    theirs: &str,
) -> Result<(), Verdict> {
    ctx.dom0.ok(&format!(
        "xen-locus info {} {options} > /tmp/info.out && cat /tmp/info.out | {filter} > /tmp/info.cmp",
        guest.name
    ))?;
    let ours = ctx.dom0.ok("sha256sum < /tmp/info.cmp")?;
    let digest = guest.sh_timeout(&format!("{theirs} | sha256sum"), GATHERING)?;
    if digest.rc == 0 && digest.text() == ours {
        return Ok(());
    }
    let ours = ctx.dom0.get("/tmp/info.cmp")?;
    let theirs = guest.sh_timeout(theirs, GATHERING)?;
    let why = match difference(&ours, &theirs.stdout) {
        Some(what) => format!("info {options}: {what}"),
        None => "digests differed, but a second look found no difference".to_owned(),
    };
    Err(Verdict::failure(why))
}

/// Where two files differ: the first lines that differ, or the first byte if a file is not text.
fn difference(ours: &[u8], theirs: &[u8]) -> Option<String> {
    if ours == theirs {
        return None;
    }
    let (Ok(a), Ok(b)) = (std::str::from_utf8(ours), std::str::from_utf8(theirs)) else {
        let at = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
        return Some(format!(
            "{} bytes, the guest has {}; the first to differ is at {at}",
            ours.len(),
            theirs.len()
        ));
    };
    let (a, b): (Vec<&str>, Vec<&str>) = (a.lines().collect(), b.lines().collect());
    let at = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
    let some = |lines: &[&str]| {
        lines
            .iter()
            .skip(at)
            .take(4)
            .copied()
            .collect::<Vec<_>>()
            .join("\n")
    };
    Some(format!(
        "{} lines, the guest has {}; they differ from line {}:\n{}\nin the guest:\n{}",
        a.len(),
        b.len(),
        at + 1,
        some(&a),
        some(&b)
    ))
}

/// The simplest payload, built for this kernel, takes effect and is reverted.
fn patch(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let release = guest.ok("uname -r")?;
    let dir = if release == ctx.release {
        "/payloads".to_owned()
    } else {
        // Its name begins with the release of Debian, like that of the guest.
        let suite = guest.name.split('-').next().unwrap_or_default();
        format!("/payloads/{suite}")
    };
    let shows = |marked: bool| -> Result<(), Verdict> {
        check_eq!(cmdline_is_live(guest)?, marked, "/proc/cmdline is live");
        Ok(())
    };
    shows(false)?;
    tool::apply_json(ctx, guest, &format!("{dir}/{CMDLINE}.ko"), "applied")?;
    shows(true)?;
    tool::revert_json(ctx, guest, CMDLINE)?;
    shows(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_build_id_is_found_behind_other_notes() {
        let mut notes = Vec::new();
        for (name, kind, body) in [
            (&b"Linux\0"[..], 3u32, &b"abcde"[..]),
            (b"GNU\0", 3, &[0xab, 1]),
        ] {
            let [name_len, body_len] = [name, body].map(|part| u32::try_from(part.len()).unwrap());
            for word in [name_len, body_len, kind] {
                notes.extend(word.to_le_bytes());
            }
            for part in [name, body] {
                notes.extend(part);
                notes.resize(notes.len().next_multiple_of(4), 0);
            }
        }
        assert_eq!(build_id(&notes).as_deref(), Some("ab01"));
        assert_eq!(build_id(&notes[..30]), None);
    }

    #[test]
    fn the_first_lines_that_differ_are_shown() {
        assert_eq!(difference(b"a\nb\n", b"a\nb\n"), None);
        let text = difference(b"a\nb\n", b"a\nc\nd\n").unwrap();
        assert!(text.starts_with("2 lines, the guest has 3"), "{text}");
        assert!(text.contains("line 2:\nb\nin the guest:\nc\nd"), "{text}");
        let bytes = difference(&[1, 0xff], &[1, 0xfe, 3]).unwrap();
        assert!(bytes.contains("differ is at 1"), "{bytes}");
    }
}
