//! The installed unit on a dom0 that is a real Debian, with systemd: it serves requests in its sandbox, is killed, is out of
//! memory, is stopped and started. No guest is lost.

use std::time::Duration;

use super::steps::patches::{self, CMDLINE, PAIR};
use super::steps::{daemon, tool, wait};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::DEBIAN;
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that take too long for a usual run: the machine alone takes minutes to boot.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "real-dom0-pv",
        summary: "on a real Debian dom0 the unit runs after boot, serves requests in its sandbox, is stopped and started",
        profile: &DEBIAN,
        run: serves,
    },
    Scenario {
        name: "real-dom0-killed-pv",
        summary: "on a real Debian dom0 daemon and worker are killed in a pause: systemd starts the daemon, the guest runs",
        profile: &DEBIAN,
        run: killed,
    },
    Scenario {
        name: "real-dom0-memory-pv",
        summary: "on a real Debian dom0 the unit is out of memory in a pause: the guardian lets the guest run",
        profile: &DEBIAN,
        run: memory,
    },
];

const UNIT: &str = "xen-locus.service";
/// What `systemd-analyze security` may say at most. It says 9 and more of a unit without a sandbox.
const EXPOSURE: f64 = 4.0;
/// Until a dom0 has begun all that it begins at its boot.
const BOOTED: Duration = Duration::from_secs(600);
/// Until a request is answered, or a unit is up: systemd takes seconds on an emulated processor.
const PATIENCE: Duration = Duration::from_secs(180);
/// Makes one run of the unit have this fault, by a file that systemd reads no more when the daemon is started the next time.
const FAULT: &str = r#"
dir=/run/systemd/system/xen-locus.service.d
systemctl stop xen-locus
mkdir -p $dir
printf '[Service]\nEnvironment="XEN_LOCUS_FAULT=%s"\nExecStart=\nExecStart=/usr/sbin/xen-locus-faults daemon\n' "$1" >$dir/fault.conf
systemctl daemon-reload && systemctl start xen-locus || exit 1
rm -r $dir
systemctl daemon-reload
"#;
/// Holds a run in its guest's pause: stops its guardian when that is prepared, and waits until the run is stopped at its fault.
/// Prints the ids of the daemon, of the run and of the guardian. It starts no process meanwhile: that would take too long.
const HOLD: &str = r#"
child() {
	for f in /proc/$1/task/*/children; do
		read -r found _ <$f || [ -n "$found" ] && [ -n "$found" ] && return 0
	done 2>/dev/null
	return 1
}
daemon=$(systemctl show -P MainPID xen-locus)
sh -c "$1"
until child $daemon && run=$found && child $run && guardian=$found; do :; done
# One that waits (in futex, system call 202) is prepared.
until read -r call _ </proc/$guardian/syscall && [ "$call" = 202 ]; do :; done 2>/dev/null
kill -STOP $guardian
until read -r _ _ state _ </proc/$run/stat && [ "$state" = T ]; do [ -e /proc/$run ] || exit 1; done
echo $daemon $run $guardian
"#;

/// A property of the unit, as systemd shows it.
fn property(ctx: &Ctx, name: &str) -> Result<String, Verdict> {
    ctx.dom0.ok(&format!("systemctl show -P {name} {UNIT}"))
}

/// Waits until the unit is active, which it says itself; fails with what it logged.
fn is_up(ctx: &Ctx) -> Result<(), Verdict> {
    becomes(ctx, "active")
}

/// Waits until the unit is `wanted`.
fn becomes(ctx: &Ctx, wanted: &str) -> Result<(), Verdict> {
    let done = wait::until(PATIENCE, || {
        let state = property(ctx, "ActiveState")?;
        Ok(match state == wanted {
            true => Ok(()),
            false => Err(format!("the unit is {state}")),
        })
    });
    done.map_err(|verdict| with_log(ctx, &verdict))
}

/// A failure, with what the unit logged.
fn with_log(ctx: &Ctx, verdict: &Verdict) -> Verdict {
    let log = ctx
        .dom0
        .sh(&format!("journalctl -n 40 --no-pager -o cat -u {UNIT}"));
    Verdict::failure(format!(
        "{verdict}\nthe unit's log:\n{}",
        log.map_or_else(|e| e.to_string(), |out| out.text())
    ))
}

/// Waits until dom0 has booted. Nothing of it may have failed.
fn booted(ctx: &Ctx) -> Result<(), Verdict> {
    let state = ctx
        .dom0
        .sh_timeout("systemctl is-system-running --wait", BOOTED)?;
    let failed = ctx.dom0.ok("systemctl --failed --plain --no-legend")?;
    check!(failed.is_empty(), "{}: {failed}", state.text());
    is_up(ctx)?;
    ctx.dom0.ok(
        "cp /payloads/locus_cmdline.ko /payloads/locus_proc_pair.ko /var/lib/xen-locus/payloads/",
    )?;
    daemon::put_ask(ctx)
}

/// The guest of these scenarios, under load, without patches.
fn guest(ctx: &mut Ctx) -> Result<Guest, Verdict> {
    booted(ctx)?;
    let guest = ctx.ensure_guest(GuestSpec::new("real", Kind::Pv))?;
    patches::put_check(&guest, PAIR)?;
    guest.start_workload()?;
    Ok(guest)
}

/// Waits for the answer, which must be 0.
fn answered(ctx: &Ctx, id: &str) -> Result<(), Verdict> {
    daemon::answered(ctx, id, PATIENCE).map_err(|verdict| with_log(ctx, &verdict))
}

fn serves(ctx: &mut Ctx) -> Result<(), Verdict> {
    let guest = guest(ctx)?;
    let since = ctx.dom0.ok("cut -d' ' -f1 /proc/uptime")?;
    let began = property(ctx, "ActiveEnterTimestampMonotonic")?;
    eprintln!("real-dom0-pv: the unit was active {began} us after the boot; now it is {since} s");
    check_eq!(property(ctx, "Type")?, "notify");
    exposure(ctx)?;
    sandboxed(ctx)?;
    let ask = |request: &str, words: &str| {
        daemon::ask(
            ctx,
            &format!("{request} domain=real patch={PAIR}"),
            "0",
            words,
        )
    };
    ask("a1 op=apply", "applied")?;
    patches::check(&guest, PAIR, "after")?;
    ask("a2 op=revert", "reverted")?;
    patches::check(&guest, PAIR, "before")?;
    // A patch stays in force when the service is started again, and a request waits for it.
    ask("a3 op=apply", "applied")?;
    ctx.dom0.ok("systemctl restart xen-locus")?;
    is_up(ctx)?;
    ask("a4 op=apply", "already")?;
    ctx.dom0.ok("systemctl stop xen-locus")?;
    let before = tool::actions(ctx, "real")?.len();
    daemon::submit(ctx, "a5", "revert", "real", PAIR)?;
    ctx.dom0.ok("systemctl start xen-locus")?;
    answered(ctx, "a5")?;
    daemon::was_carried_out_once(ctx, "real", before, "a5")?;
    stopped_at_work(ctx)?;
    tool::no_patches(ctx, "real")
}

/// `systemd-analyze security` of the unit.
fn exposure(ctx: &Ctx) -> Result<(), Verdict> {
    let out = ctx
        .dom0
        .sh(&format!("systemd-analyze security --no-pager {UNIT}"))?;
    let text = out.text();
    // What it has nothing against is left out.
    for line in text.lines().filter(|l| l.starts_with(['✗', '→'])) {
        eprintln!("{}", line.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    let level = text
        .rsplit_once("exposure level for")
        .map_or("", |(_, line)| line);
    let level = level
        .split_whitespace()
        .find_map(|word| word.parse::<f64>().ok());
    check!(
        level.is_some_and(|level| level < EXPOSURE),
        "systemd-analyze security: {} {text}",
        out.rc
    );
    Ok(())
}

/// The unit's own processes see what they need and no more.
fn sandboxed(ctx: &Ctx) -> Result<(), Verdict> {
    let seen = ctx.dom0.ok(
        "pid=$(systemctl show -P MainPID xen-locus); grep -E '^(CapBnd|NoNewPrivs|Seccomp):' /proc/$pid/status; \
         grep -E 'core|locked' /proc/$pid/limits; ls -ld /run/xen-locus /var/lib/xen-locus /var/cache/xen-locus \
         /var/log/xen-locus; cat /sys/fs/cgroup/system.slice/xen-locus.service/memory.current",
    )?;
    eprintln!("{seen}");
    check!(
        seen.contains("NoNewPrivs:\t1") && seen.contains("Seccomp:\t2"),
        "{seen}"
    );
    Ok(())
}

/// The unit is stopped while a request is carried out, and started: the request is answered once.
fn stopped_at_work(ctx: &Ctx) -> Result<(), Verdict> {
    // Before the pause.
    ctx.dom0.put("/tmp/fault.sh", 0o755, FAULT.as_bytes())?;
    ctx.dom0.ok("sh /tmp/fault.sh 1:stop:journal")?;
    let before = tool::actions(ctx, "real")?.len();
    daemon::submit(ctx, "b1", "apply", "real", PAIR)?;
    let run = ctx.dom0.ok(
        "daemon=$(systemctl show -P MainPID xen-locus); for i in $(seq 600); do \
         run=$(cat /proc/$daemon/task/*/children); run=${run%% *}; \
         [ -n \"$run\" ] && grep -q ') T' /proc/$run/stat && echo $run && exit 0; usleep 100000; done; exit 1",
    );
    let run = run.map_err(|verdict| with_log(ctx, &verdict))?;
    ctx.dom0.ok(&format!(
        "systemctl stop --no-block xen-locus; sleep 3; kill -CONT {run}"
    ))?;
    becomes(ctx, "inactive")?;
    ctx.dom0.ok("systemctl start xen-locus")?;
    answered(ctx, "b1")?;
    daemon::was_carried_out_after_a_stop(ctx, "real", before, "b1")?;
    daemon::ask(
        ctx,
        &format!("b2 op=revert domain=real patch={PAIR}"),
        "0",
        "reverted",
    )
}

/// A run that is held in its guest's pause.
struct Held {
    daemon: String,
    run: String,
    guardian: String,
}

impl Held {
    /// Makes the request `id`, whose run stops in the pause. The daemon is another one than before, and the next one has no
    /// fault.
    fn new(ctx: &Ctx, id: &str) -> Result<Self, Verdict> {
        ctx.expects_long_pauses();
        ctx.dom0.put("/tmp/fault.sh", 0o755, FAULT.as_bytes())?;
        ctx.dom0.put("/tmp/hold.sh", 0o755, HOLD.as_bytes())?;
        ctx.dom0.ok("sh /tmp/fault.sh '3:stop:mark writing'")?;
        is_up(ctx)?;
        let submit = daemon::submission(id, "apply", "real", PAIR);
        let said = ctx
            .dom0
            .sh(&format!("timeout 300 sh /tmp/hold.sh '{submit}'"))?;
        let text = said.text();
        let ids: Vec<&str> = text.split(' ').collect();
        let [daemon, run, guardian] = ids[..] else {
            let verdict = Verdict::failure(format!(
                "no run is held: {} {text} {}",
                said.rc,
                said.err_text()
            ));
            return Err(with_log(ctx, &verdict));
        };
        let held = Self {
            daemon: daemon.to_owned(),
            run: run.to_owned(),
            guardian: guardian.to_owned(),
        };
        check!(held.is_paused(ctx)?, "the guest is not paused");
        held.has_its_rights(ctx)?;
        Ok(held)
    }

    /// What a process does without if it has no right to it: it is killed last, is not paged out, and comes before others.
    fn has_its_rights(&self, ctx: &Ctx) -> Result<(), Verdict> {
        let guardian = &self.guardian;
        let said = ctx.dom0.ok(&format!(
            "cat /proc/{guardian}/oom_score_adj; grep VmLck /proc/{guardian}/status; chrt -p {guardian}"
        ))?;
        check!(
            said.starts_with("-1000\n") && !said.contains(" 0 kB") && said.contains("SCHED_FIFO"),
            "the guardian: {said}"
        );
        Ok(())
    }

    fn is_paused(&self, ctx: &Ctx) -> Result<bool, Verdict> {
        Ok(ctx
            .dom0
            .ok("xl list real | awk 'NR == 2 {print $5}'")?
            .contains('p'))
    }

    /// Lets the guardian go on, and waits until it lets the guest run.
    fn let_run(&self, ctx: &Ctx) -> Result<(), Verdict> {
        ctx.dom0.ok(&format!("kill -CONT {}", self.guardian))?;
        wait::until(Duration::from_secs(30), || {
            Ok(match self.is_paused(ctx)? {
                false => Ok(()),
                true => Err("the guardian does not let the guest run".to_owned()),
            })
        })
    }

    /// Lets the guardian go on. The guest runs, as it was before, and the request is carried out once.
    fn guardian_goes_on(
        &self,
        ctx: &Ctx,
        guest: &Guest,
        rounds: u64,
        before: usize,
        id: &str,
    ) -> Result<(), Verdict> {
        check!(self.is_paused(ctx)?, "the guest is not paused any more");
        let runs = self.let_run(ctx);
        runs.map_err(|verdict| with_log(ctx, &verdict))?;
        guest.went_on(rounds)?;
        answered(ctx, id)?;
        daemon::was_carried_out_once(ctx, "real", before, id)?;
        patches::check(guest, PAIR, "after")?;
        is_up(ctx)
    }
}

/// Kills by id, and waits until they are gone.
fn kill(ctx: &Ctx, ids: &str) -> Result<(), Verdict> {
    ctx.dom0.ok(&format!(
        "kill -KILL {ids}; for id in {ids}; do while [ -e /proc/$id ] && ! grep -q ') Z' /proc/$id/stat; do usleep 10000; done; done"
    ))?;
    Ok(())
}

fn killed(ctx: &mut Ctx) -> Result<(), Verdict> {
    let guest = guest(ctx)?;
    for (id, ids) in [("c1", "daemon, then run"), ("c2", "run, then daemon")] {
        let before = tool::actions(ctx, "real")?.len();
        let rounds = guest.rounds()?;
        let held = Held::new(ctx, id)?;
        let restarts = property(ctx, "NRestarts")?;
        let (daemon, run) = (&held.daemon, &held.run);
        match id {
            "c1" => kill(ctx, &format!("{daemon} {run}"))?,
            _ => kill(ctx, &format!("{run} {daemon}"))?,
        }
        held.guardian_goes_on(ctx, &guest, rounds, before, id)?;
        let now = property(ctx, "NRestarts")?;
        check!(
            now > restarts,
            "{ids}: systemd started the daemon {restarts} times before and {now} now"
        );
        daemon::ask(
            ctx,
            &format!("{id}-back op=revert domain=real patch={PAIR}"),
            "0",
            "reverted",
        )?;
    }
    // A worker alone, wherever it is.
    for delay in 0..6_u32 {
        let (id, op) = match delay % 2 {
            0 => (format!("d{delay}"), "apply"),
            _ => (format!("d{delay}"), "revert"),
        };
        let before = tool::actions(ctx, "real")?.len();
        let rounds = guest.rounds()?;
        daemon::submit(ctx, &id, op, "real", CMDLINE)?;
        ctx.dom0.ok(&format!(
            "daemon=$(systemctl show -P MainPID xen-locus); for i in $(seq 3000); do \
             run=$(cat /proc/$daemon/task/*/children); run=${{run%% *}}; [ -n \"$run\" ] && break; usleep 10000; done; \
             usleep {}; kill -KILL $run 2>/dev/null; true",
            delay * 150_000
        ))?;
        answered(ctx, &id)?;
        daemon::was_carried_out_once(ctx, "real", before, &id)?;
        guest.went_on(rounds)?;
    }
    tool::no_patches(ctx, "real")
}

fn memory(ctx: &mut Ctx) -> Result<(), Verdict> {
    const EVENTS: &str = "/sys/fs/cgroup/system.slice/xen-locus.service/memory.events";
    let guest = guest(ctx)?;
    let before = tool::actions(ctx, "real")?.len();
    let rounds = guest.rounds()?;
    // The kernel says whom it kills.
    ctx.expects("Call Trace:");
    let max = property(ctx, "MemoryMax")?;
    let held = Held::new(ctx, "e1")?;
    let (daemon, run, guardian) = (&held.daemon, &held.run, &held.guardian);
    // Less than any of them has: the kernel kills all that it may.
    let said = ctx.dom0.ok(&format!(
        "cat /sys/fs/cgroup/system.slice/xen-locus.service/memory.current; grep -E 'Vm(RSS|Lck)' /proc/{guardian}/status; \
         systemctl set-property --runtime xen-locus MemoryMax=1M; for i in $(seq 100); do \
         [ ! -e /proc/{run} ] && [ ! -e /proc/{daemon} ] && break; usleep 100000; done; \
         for id in {daemon} {run} {guardian}; do [ -e /proc/$id ] && echo \"$id is there\"; done; cat {EVENTS}"
    ))?;
    eprintln!("real-dom0-memory-pv: daemon {daemon}, run {run}, guardian {guardian}: {said}");
    check!(
        said.contains(&format!("{guardian} is there"))
            && !said.contains(&format!("{run} is there")),
        "{said}"
    );
    // With as little memory, the guardian does its work.
    let runs = held.let_run(ctx);
    ctx.dom0.ok(&format!(
        "systemctl set-property --runtime xen-locus MemoryMax={max}"
    ))?;
    runs.map_err(|verdict| with_log(ctx, &verdict))?;
    guest.went_on(rounds)?;
    answered(ctx, "e1")?;
    daemon::was_carried_out_once(ctx, "real", before, "e1")?;
    patches::check(&guest, PAIR, "after")?;
    is_up(ctx)?;
    daemon::ask(
        ctx,
        &format!("e2 op=revert domain=real patch={PAIR}"),
        "0",
        "reverted",
    )?;
    tool::no_patches(ctx, "real")
}
