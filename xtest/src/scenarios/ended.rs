//! The daemon is killed while it serves requests, and xenstored is stopped: each request is answered once, and no guest waits.

use std::time::Duration;

use super::steps::patches::{CMDLINE, CMDLINE_FILE};
use super::steps::{daemon, tool, wait};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::PV1;
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "xenstore-killed",
        summary: "the daemon and two workers of it are killed at every 17th call: each request is carried out and answered once",
        profile: &PV1,
        run: |ctx| killed(ctx, 17),
    },
    Scenario {
        name: "xenstore-killed-all",
        summary: "the same at every call of an apply and of a revert",
        profile: &PV1,
        run: |ctx| killed(ctx, 1),
    },
    Scenario {
        name: "xenstore-stopped",
        summary: "xenstored is stopped for 30 s: commands end, guests run, and the daemon goes on by itself",
        profile: &PV1,
        run: stopped,
    },
    Scenario {
        name: "xenstore-unpublished",
        summary: "the daemon publishes what a command could not, or did not because it was killed after its line in the log",
        profile: &PV1,
        run: unpublished,
    },
];

/// What the daemon says.
const LOG: &str = "/var/log/daemon.log";
/// Longest wait for an answer: guests under load, on one emulated processor.
const ANSWER: Duration = Duration::from_secs(360);

/// Waits for the answer, which must be 0.
fn answered(ctx: &Ctx, id: &str) -> Result<(), Verdict> {
    daemon::answered(ctx, id, ANSWER).map_err(|verdict| {
        let log = ctx.dom0.ok(&format!("tail -n 40 {LOG}"));
        Verdict::failure(format!("{verdict}\nthe daemon said: {log:?}"))
    })
}

/// `step` is the number of calls between two places at which the workers are killed. One of them applies, the other one
/// reverts, and the next time it is the other way round.
fn killed(ctx: &mut Ctx, step: usize) -> Result<(), Verdict> {
    let names = ["one", "two"];
    let guests: Vec<Guest> = names
        .iter()
        .map(|name| ctx.ensure_guest(GuestSpec::new(name, Kind::Pv)))
        .collect::<Result<_, _>>()?;
    for guest in &guests {
        guest.start_workload()?;
    }
    ctx.dom0
        .ok(&format!("xen-locus apply two {CMDLINE_FILE}"))?;
    let mut ops = ["apply", "revert"];
    let mut hits = 0;
    for nth in (1..).step_by(step) {
        ctx.dom0.ok(&format!("rm -f {LOG}"))?;
        daemon::start_as(
            ctx,
            &format!("env XEN_LOCUS_FAULT={nth}:kill:journal xen-locus-faults daemon"),
            LOG,
        )?;
        let mut before = Vec::new();
        let mut rounds = Vec::new();
        for (name, guest) in names.iter().zip(&guests) {
            before.push(tool::actions(ctx, name)?.len());
            rounds.push(guest.rounds()?);
        }
        for (name, op) in names.iter().zip(ops) {
            daemon::submit(ctx, &format!("{op}-{name}-{nth}"), op, name, CMDLINE)?;
        }
        // Each is killed, or has no such place. Then the daemon is killed too, before it starts other workers, or while
        // these begin.
        let said = ctx.dom0.ok(&format!(
            "for i in $(seq 600); do \
             [ $(grep -c -e 'fault: kill' -e '^request.* rc ' {LOG}) -ge 2 ] && break; usleep 50000; done; \
             kill -KILL $(cat /run/daemon.pid); cat {LOG}"
        ))?;
        let hit = said.matches("fault: kill").count();
        daemon::start(ctx)?;
        for (i, (name, guest)) in names.iter().zip(&guests).enumerate() {
            let op = ops[i];
            let id = format!("{op}-{name}-{nth}");
            answered(ctx, &id)?;
            daemon::was_carried_out_once(ctx, name, before[i], &id)?;
            let patches = tool::listed(ctx, name)?;
            check_eq!(
                patches.len(),
                usize::from(op == "apply"),
                "{name}: {patches:?}"
            );
            guest.went_on(rounds[i])?;
        }
        daemon::stop(ctx)?;
        hits += hit;
        ops.reverse();
        if hit == 0 {
            break;
        }
    }
    eprintln!("xenstore-killed: the daemon was killed, and workers {hits} times");
    check!(hits * step > 200, "{hits} kills only: it shows nothing");
    ctx.destroy_all()
}

fn stopped(ctx: &mut Ctx) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new("stopped", Kind::Pv))?;
    guest.start_workload()?;
    daemon::start(ctx)?;
    let ask = |request: &str| daemon::ask(ctx, &format!("{request} patch={CMDLINE}"), "0", "");
    ask("before op=apply domain=stopped")?;
    let rounds = guest.rounds()?;
    ctx.dom0.ok("kill -STOP $(pidof xenstored)")?;
    let limit = Duration::from_secs(25);
    let revert = format!("xen-locus revert stopped {CMDLINE}");
    let out = ctx.dom0.sh_timeout(&revert, limit);
    // Whatever became of that, xenstored is to go on.
    let rest = ctx.dom0.sh("sleep 30");
    let went_on = guest.went_on(rounds);
    ctx.dom0.ok("kill -CONT $(pidof xenstored)")?;
    let (out, _) = (out?, rest?);
    went_on?;
    check_eq!(out.rc, 1, "{}", out.err_text());
    check!(out.err_text().contains("xenstored"), "{}", out.err_text());
    ask("after op=revert domain=stopped")?;
    let said = ctx.dom0.ok(&format!("cat {LOG}"))?;
    for words in ["until xenstored answers", "xenstored answers again"] {
        check!(
            said.contains(words),
            "the daemon does not say {words:?}: {said}"
        );
    }
    daemon::stop(ctx)?;
    tool::no_patches(ctx, "stopped")?;
    ctx.destroy_guest("stopped")
}

fn unpublished(ctx: &mut Ctx) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new("unpublished", Kind::Pv))?;
    daemon::start(ctx)?;
    let base = format!("/tool/xen-locus/domain/{}", guest.domid);
    // Prints what is published of the patch.
    let state = format!("xenstore-read {base}/patch/{CMDLINE}/state 2>/dev/null; true");
    let becomes = |node: &str, wanted: &str| {
        wait::until(Duration::from_secs(30), || {
            let found = ctx.dom0.ok(node)?;
            Ok(match found.trim() == wanted {
                true => Ok(()),
                false => Err(format!("{node}: {found:?}, expected {wanted:?}")),
            })
        })
    };
    let kernel = format!("xenstore-read {base}/kernel 2>/dev/null; true");
    becomes(&kernel, &ctx.release)?;
    for (command, what, wanted) in [
        (
            format!("apply unpublished {CMDLINE_FILE}"),
            "fail",
            "applied",
        ),
        (format!("revert unpublished {CMDLINE}"), "fail", ""),
        (
            format!("apply unpublished {CMDLINE_FILE}"),
            "fail",
            "applied",
        ),
        // Its line is in the log by then, and its journal is gone.
        ("revert unpublished --all".into(), "kill", ""),
    ] {
        // The first write to XenStore is the first of the publication.
        let out = ctx.dom0.sh(&format!(
            "XEN_LOCUS_FAULT=1:{what}:xs_write xen-locus-faults {command}"
        ))?;
        let said = out.err_text();
        check_eq!(out.rc == 0, what == "fail", "{command}: {said}");
        let words = if what == "fail" {
            "not published"
        } else {
            "fault: kill"
        };
        check!(said.contains(words), "{command}: {said}");
        becomes(&state, wanted)?;
        becomes("ls /run/xen-locus | grep unpublished; true", "")?;
    }
    daemon::stop(ctx)?;
    tool::no_patches(ctx, "unpublished")?;
    ctx.destroy_guest("unpublished")
}
