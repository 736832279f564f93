//! The testbed tests itself: guests come up, take commands, and a hung guest is noticed.

use std::time::{Duration, Instant};

use super::steps::patches::CMDLINE_FILE;
use crate::dom0::Trouble;
use crate::guest::{GuestSpec, Kind};
use crate::profile::{HVM, PV, PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "testbed-pv",
        summary: "a PV guest comes up and takes commands",
        profile: &PV,
        run: |ctx| guest_works(ctx, Kind::Pv),
    },
    Scenario {
        name: "testbed-hung-guest",
        summary: "a guest that no longer runs is reported as hung, within the limit",
        profile: &PV1,
        run: hung_guest,
    },
    Scenario {
        name: "pauses-pv",
        summary:
            "what measures pauses for `make bench` makes changes of a PV guest, and they succeed",
        profile: &PV,
        run: |ctx| pauses(ctx, Kind::Pv),
    },
    Scenario {
        name: "testbed-pvh",
        summary: "a PVH guest comes up and takes commands",
        profile: &PVH,
        run: |ctx| guest_works(ctx, Kind::Pvh),
    },
    Scenario {
        name: "testbed-hvm",
        summary: "an HVM guest with KASLR comes up and takes commands",
        profile: &HVM,
        run: |ctx| guest_works(ctx, Kind::Hvm),
    },
];

fn pauses(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    const ROUNDS: usize = 3;
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    let said = ctx.json(&format!(
        "locus-pauses {} {CMDLINE_FILE} --rounds {ROUNDS}",
        guest.name
    ))?;
    for pauses in ["empty_us", "contexts_us", "write_us"] {
        let some = said[pauses].as_array().map_or(0, Vec::len);
        check_eq!(some, ROUNDS, "{pauses}: {said}");
    }
    let changes = said["changes"].as_array().cloned().unwrap_or_default();
    let results: Vec<&str> = changes
        .iter()
        .map(|c| c["result"].as_str().unwrap_or("failed"))
        .collect();
    check_eq!(results, ["applied", "reverted"].repeat(ROUNDS), "{said}");
    Ok(())
}

fn guest_works(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    check_eq!(guest.ok("uname -r")?, ctx.release, "the guest's kernel");
    let guest_type = guest.ok("cat /sys/hypervisor/guest_type")?;
    check_eq!(guest_type, kind.name().to_uppercase(), "the guest's type");

    let out = guest.sh("echo out; echo err >&2; exit 7")?;
    check_eq!(
        (out.rc, out.text(), out.err_text()),
        (7, "out".into(), "err".into())
    );
    let out = guest.sh_timeout("sleep 60", Duration::from_secs(2))?;
    check!(
        out.timed_out,
        "a command that takes too long was not killed: {out:?}"
    );

    // Text that can be compressed, and random bytes that can't.
    for make in [
        "head -c 1000000 /proc/kallsyms > /tmp/big",
        "head -c 200000 /dev/urandom > /tmp/big",
    ] {
        guest.ok(make)?;
        let began = Instant::now();
        let got = guest.sh("cat /tmp/big")?.stdout;
        let (size, seconds) = (got.len(), began.elapsed().as_secs_f64());
        ctx.dom0
            .note(&format!("{}: {size} bytes in {seconds:.1} s", kind.name()));
        let sum = guest.ok("sha256sum < /tmp/big")?;
        ctx.dom0.put("/tmp/big", 0o644, &got)?;
        check_eq!(
            ctx.dom0.ok("sha256sum < /tmp/big")?,
            sum,
            "{size} bytes from the guest"
        );
        check_eq!(
            ctx.dom0.get("/tmp/big")?,
            got,
            "{size} bytes to dom0 and back"
        );
    }
    guest.put("/tmp/small", 0o644, &[0, 10, 13, 255, b'~'])?;
    check_eq!(guest.sh("cat /tmp/small")?.stdout, [0, 10, 13, 255, b'~']);

    guest.start_workload()?;
    let before = guest.rounds()?;
    guest.ok("sleep 2")?;
    guest.went_on(before)?;
    guest.ok("killall spin-workload; true")?;
    Ok(())
}

fn hung_guest(ctx: &mut Ctx) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new("hung", Kind::Pv).vcpus(1))?;
    ctx.expects_long_pauses();
    ctx.dom0.ok("xl pause hung")?;
    let silence = Duration::from_secs(8);
    let began = Instant::now();
    let got = guest.try_sh("true", Duration::from_secs(5), silence);
    let took = began.elapsed();
    check!(
        matches!(got, Err(Trouble::Hung(_))),
        "a paused guest was reported as {got:?}"
    );
    check!(took < silence * 3, "that took {took:?}");

    // A paused guest is not lost. It answers again afterwards.
    ctx.dom0.ok("xl unpause hung")?;
    check_eq!(guest.ok("echo back")?, "back");

    ctx.expects("Kernel panic - not syncing: sysrq triggered crash");
    // A guest that panics is told from a silent one, without waiting for the time limit.
    let began = Instant::now();
    let got = guest.try_sh("echo c > /proc/sysrq-trigger", silence, silence * 4);
    check!(
        matches!(got, Err(Trouble::Gone(_))),
        "a guest that panicked was reported as {got:?}"
    );
    check!(
        began.elapsed() < silence * 3,
        "that took {:?}",
        began.elapsed()
    );
    let log = ctx.dom0.ok("cat /var/log/guest-hung.log")?;
    check!(
        log.contains("Kernel panic"),
        "the panic is not in the guest's log: {log}"
    );

    ctx.destroy_guest("hung")?;
    let got = guest.try_sh("true", Duration::from_secs(5), silence);
    check!(
        matches!(got, Err(Trouble::Gone(_))),
        "a destroyed guest was reported as {got:?}"
    );
    Ok(())
}
