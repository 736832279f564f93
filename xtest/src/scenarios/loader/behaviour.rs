//! Behaviours of payload code that is linked and registered.

use super::subject::Subject;
use crate::guest::{Guest, Kind};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Every type of relocation.
pub fn relocations(subject: &Subject<'_>) -> Result<(), Verdict> {
    subject.comes_and_goes("locus_reloc")
}

/// Paravirtual operations, locks, indirect branches.
pub fn sites(subject: &Subject<'_>) -> Result<(), Verdict> {
    subject.comes_and_goes("locus_sites")
}

/// Alternatives that apply to this processor, and others.
pub fn alternatives(subject: &Subject<'_>) -> Result<(), Verdict> {
    subject.comes_and_goes("locus_alt")
}

/// Faults of the payload's own instructions.
pub fn uaccess(subject: &Subject<'_>) -> Result<(), Verdict> {
    subject.comes_and_goes("locus_uaccess")
}

/// Per-CPU variables of the kernel: the payload counts in the same variable that the kernel reads.
pub fn percpu(subject: &Subject<'_>) -> Result<(), Verdict> {
    const NAME: &str = "locus_percpu";
    let count = || -> Result<u64, Verdict> {
        let sum = "awk '/^ *HI:/ {for (i = 2; i <= NF; i++) n += $i; print n}' /proc/softirqs";
        let text = subject.guest.ok(sum)?;
        text.parse()
            .map_err(|_| Verdict::Error(format!("/proc/softirqs: {text:?}")))
    };
    subject.apply(NAME)?;
    let before = count()?;
    for _ in 0..3 {
        subject.all_ok("/proc/cmdline")?;
    }
    let counted = count()?.saturating_sub(before);
    check!(
        (3000..3300).contains(&counted),
        "/proc/softirqs counted {counted} under HI, expected 3000"
    );
    subject.revert(NAME)
}

/// Variables have their initial values, and keep what is written, also while the payload is reverted.
pub fn state(subject: &Subject<'_>) -> Result<(), Verdict> {
    const NAME: &str = "locus_state";
    for before in [0, 3] {
        subject.apply(NAME)?;
        let begin = subject.read("/proc/version")?;
        check_eq!(begin, state_line(before), "before the first call");
        for calls in before + 1..=before + 3 {
            check_eq!(subject.read("/proc/cmdline")?, state_line(calls));
        }
        check_eq!(subject.read("/proc/version")?, state_line(before + 3));
        subject.revert(NAME)?;
    }
    Ok(())
}

fn state_line(calls: usize) -> String {
    let letters = format!("a{}{}", "b".repeat(calls), ".".repeat(15 - calls));
    let last = if calls == 0 { 0 } else { 256 - calls };
    format!(
        "zero={calls} hundred={} mostly={} aligned={} after_init=400 constant=500 calls={calls} \
         letters={letters} room={calls},{last}",
        100 + calls,
        200 + calls,
        300 + calls
    )
}

/// The kernel's log names file and line of a warning, the functions of the payload, and the kernel's callers.
pub fn warnings(subject: &Subject<'_>) -> Result<(), Verdict> {
    const NAME: &str = "locus_warn";
    subject.ctx.expects("at locus_warn_");
    subject.ctx.expects("locus_warn.c:");
    subject.apply(NAME)?;
    for once in [true, false] {
        let text = subject.read("/proc/cmdline")?;
        let line = |what: &str| {
            let found = text.lines().find_map(|l| l.strip_prefix(what));
            found.map(|number| number.trim().to_owned())
        };
        let (Some(warn), Some(warn_once)) = (line("warn "), line("once ")) else {
            return Err(Verdict::failure(format!("/proc/cmdline says {text:?}")));
        };
        let log = subject.log.since(&subject.guest)?;
        let mut expected = vec![(warn, "locus_warn_inner")];
        if once {
            expected.push((warn_once, "locus_warn_once"));
        }
        let count = log.matches("WARNING: ").count();
        check_eq!(count, expected.len(), "warnings in\n{log}");
        for (line, function) in expected {
            let found = log.lines().any(|l| {
                l.contains("WARNING: ")
                    // The compiler may have made a variant, like `.isra.0`.
                    && [format!("{function}+0x"), format!("{function}.")]
                        .iter()
                        .flat_map(|name| [name.clone(), format!("at {name}")])
                        .any(|name| l.contains(&format!("locus_warn.c:{line} {name}")))
                    && l.contains("[locus_warn]")
            });
            check!(found, "no warning of line {line} in {function}:\n{log}");
        }
        check!(log.contains("locus warns"), "no message:\n{log}");
        let trace: Vec<&str> = functions(&log, "Call Trace:").take(20).collect();
        // If a warning with a message traps in a function of its own, the trace begins with the function that warns.
        let mut callers = trace
            .iter()
            .skip_while(|f| f.starts_with("locus_warn_inner"));
        check_eq!(callers.next(), Some(&"locus_warn_show"), "{trace:?}\n{log}");
        check!(trace.contains(&"seq_read_iter"), "{trace:?}\n{log}");
        check!(trace.contains(&"do_syscall_64"), "{trace:?}\n{log}");
        check!(log.contains("---[ end trace"), "{log}");
        subject.log.mark(subject.ctx, &subject.guest)?;
    }
    subject.revert(NAME)
}

/// Functions of the first backtrace after `title`, except those with a question mark.
fn functions<'l>(log: &'l str, title: &str) -> impl Iterator<Item = &'l str> {
    let lines = log.lines().skip_while({
        let title = title.to_owned();
        move |line| !line.contains(&title)
    });
    lines.filter_map(|line| {
        // [   12.345678]  function+0x12/0x34 [module]
        let entry = line.rsplit("] ").find(|part| part.contains("+0x"))?.trim();
        // RIP: 0010:function+0x12/0x34
        let entry = entry.rsplit(':').next()?;
        (!entry.starts_with('?')).then(|| entry.split('+').next())?
    })
}

/// Threads are inside replacement code. All ways to see a stack name its functions, and continue with the callers.
pub fn stacks(subject: &Subject<'_>) -> Result<(), Verdict> {
    const NAME: &str = "locus_stack";
    const PATH: [&str; 2] = ["seq_read_iter", "do_syscall_64"];
    let guest = &subject.guest;
    subject.apply(NAME)?;
    let goes_on = |text: &str, inner: &str, outer: &str| -> Result<(), Verdict> {
        let trace: Vec<&str> = functions(text, "").collect();
        let at = trace.iter().position(|f| *f == inner);
        let rest = at.and_then(|at| trace.get(at..)).unwrap_or_default();
        check_eq!(rest.get(1), Some(&outer), "{text}");
        let mut below = rest.iter();
        for expected in PATH {
            check!(
                below.any(|f| *f == expected),
                "no {expected} below {outer}: {text}"
            );
        }
        check!(
            text.contains(&format!("[{NAME}]")),
            "the payload is not named: {text}"
        );
        Ok(())
    };
    subject.ctx.expects("NMI backtrace for cpu");
    // The thread that spins would keep the CPU from the one that only wakes up now and then.
    guest.ok(
        "rm -f /tmp/pids; taskset 1 cat /proc/cmdline > /tmp/cmdline.out & echo $! > /tmp/pids; \
        taskset 2 cat /proc/version > /tmp/version.out & echo $! >> /tmp/pids; \
        for i in $(seq 100); do cat /proc/$(sed -n 1p /tmp/pids)/stack > /tmp/stack; \
        grep -q locus /tmp/stack && break; usleep 100000; done",
    )?;
    let stack = subject.read("/tmp/stack")?;
    goes_on(&stack, "locus_stack_sleep", "locus_stack_sleeper")?;
    for (what, inner, outer) in [
        ("w", "locus_stack_sleep", "locus_stack_sleeper"),
        ("l", "locus_stack_spin", "locus_stack_spinner"),
        ("t", "locus_stack_sleep", "locus_stack_sleeper"),
    ] {
        // The kernel shows its stacks at once, but the thread may just have been woken, or have lost its CPU to
        // another: then it is asked again.
        let show = format!(
            "for i in $(seq 20); do dmesg -c > /dev/null; \
             taskset 1 sh -c 'echo {what} > /proc/sysrq-trigger'; dmesg > /tmp/log; \
             grep -q {inner}+ /tmp/log && break; usleep 100000; done; \
             grep -B 1 -A 40 {inner}+ /tmp/log"
        );
        let log = guest.ok(&show)?;
        goes_on(&log, inner, outer)?;
    }
    guest.ok(
        "kill $(sed -n 2p /tmp/pids); dmesg -c > /dev/null; for i in $(seq 100); do \
         grep -q woke /tmp/cmdline.out && break; usleep 100000; done",
    )?;
    subject.log.mark(subject.ctx, guest)?;
    check_eq!(subject.read("/tmp/cmdline.out")?, "slept\nwoke up");
    subject.revert(NAME)
}

/// Loads the modules that the guest has.
pub fn load_modules(guest: &Guest) -> Result<(), Verdict> {
    guest
        .ok(
            "while read m; do grep -q ^$(basename $m .ko | tr - _) /proc/modules || \
             insmod /lib/modules/$m || exit 1; done < /lib/modules/order",
        )
        .map(drop)
}

/// A function of a module: refused while the module is not loaded, replaced afterwards.
pub fn module_function(subject: &Subject<'_>) -> Result<(), Verdict> {
    const NAME: &str = "locus_module_function";
    const FEATURE: &str = "/sys/fs/ext4/features/lazy_itable_init";
    let guest = &subject.guest;
    guest.ok("! grep -q ^ext4 /proc/modules || rmmod ext4")?;
    subject.refused(&subject.file(NAME), &["ext4", "not loaded"])?;
    load_modules(guest)?;
    subject.log.mark(subject.ctx, guest)?;
    check_eq!(subject.read(FEATURE)?, "supported");
    subject.apply(NAME)?;
    check_eq!(subject.read(FEATURE)?, "locus lazy_itable_init");
    subject.revert(NAME)?;
    check_eq!(subject.read(FEATURE)?, "supported");
    Ok(())
}

/// Of two functions with the same name, the right one is replaced and the other is not.
pub fn same_names(subject: &Subject<'_>) -> Result<(), Verdict> {
    const NAME: &str = "locus_same_name";
    const OTHER: &str = "/sys/devices/system/cpu/smt/control";
    if !subject.has_namesakes()? {
        return subject.refused(&subject.file(NAME), &["number 2: it has 1"]);
    }
    let find = "find /sys/devices -path '*/power/control' | head -n 1";
    let meant = subject.guest.ok(find)?;
    check!(!meant.is_empty(), "no device has power/control");
    let (other_before, before) = (subject.read(OTHER)?, subject.read(&meant)?);
    subject.apply(NAME)?;
    check_eq!(subject.read(&meant)?, "locus", "{meant}");
    check_eq!(subject.read(OTHER)?, other_before, "{OTHER}");
    subject.revert(NAME)?;
    check_eq!(subject.read(&meant)?, before, "{meant}");
    Ok(())
}

/// 300 functions at once.
pub fn many(subject: &Subject<'_>) -> Result<(), Verdict> {
    const NAME: &str = "locus_many";
    let load = |text: &str| text.split_whitespace().count();
    if let Some(missing) = subject.lacks(NAME)? {
        return subject.refused(&subject.file(NAME), &[&format!("has no symbol {missing}")]);
    }
    let report = subject.apply(NAME)?;
    check_eq!(report["functions"], 300, "{report}");
    for (file, first) in [
        ("cmdline", "first"),
        ("version", "second"),
        ("loadavg", "third"),
    ] {
        let text = subject.read(&format!("/proc/{file}"))?;
        check!(
            text.starts_with(&format!("{first} ")),
            "/proc/{file}: {text}"
        );
    }
    subject.revert(NAME)?;
    check_eq!(
        load(&subject.read("/proc/loadavg")?),
        5,
        "words of /proc/loadavg"
    );
    Ok(())
}

/// One mebibyte of data. It does not fit into any arena, and the refusal states both sizes.
pub fn big(subject: &Subject<'_>) -> Result<(), Verdict> {
    let room = match subject.kind {
        Kind::Pv => "this pv guest has 95",
        Kind::Pvh => "this pvh guest has 239",
        Kind::Hvm => "this hvm guest has 239",
    };
    subject.refused(&subject.file("locus_big"), &["arena pages", room])
}
