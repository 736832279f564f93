//! A run waits long, and meanwhile a PV guest frees pages that the run means to write to, and makes page tables of them. Xen
//! makes no page table of a page that dom0 has mapped to be written.

use std::thread;
use std::time::Duration;

use super::steps::guest_log::Log;
use super::steps::patches::{file, DRAIN, SLEEPER};
use super::steps::wait::until;
use super::steps::{sleepers, tool};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::PV;
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[Scenario {
    name: "long-wait-pv",
    summary: "while apply waits for a thread, or is stopped as it waits, a PV guest unloads a module and starts programs",
    profile: &PV,
    run: long_wait,
}];

/// Starts programs in the guest, one after the other and some at the same time, and prints how many it started. By their
/// paths: the shell has programs of these names in it.
const PROGRAMS: &str = "n=0; for round in $(seq 25); do pids=; \
    for i in $(seq 20); do /bin/sleep 1 & pids=\"$pids $!\"; done; \
    for i in $(seq 20); do /bin/true || exit 1; n=$((n + 1)); done; \
    for pid in $pids; do wait $pid || exit 1; n=$((n + 1)); done; done; echo $n";
/// How many these are.
const STARTED: &str = "1000";
/// The longest time for that.
const STARTING: Duration = Duration::from_secs(300);
/// A module with which the guest's list of modules begins: what is written to the list is written to it.
const MODULE: &str = "insmod /lib/modules/dummy.ko";
/// How long the run may wait: for as long as the guest takes, whatever the machine.
const TIMEOUT: &str = "30m";
/// The longest time for its end when nothing is in its way.
const ENDING: Duration = Duration::from_secs(120);
/// Files in dom0 of the run: what it said, its process id, its exit code.
const RUN: &str = "/run/long-wait";

fn long_wait(ctx: &mut Ctx) -> Result<(), Verdict> {
    let name = "long-wait-pv";
    ctx.destroy_guest(name)?;
    let guest = ctx.ensure_guest(GuestSpec::new(name, Kind::Pv))?;
    // What the kernel says of a module it says once.
    guest.ok(&format!("{MODULE} && rmmod dummy"))?;
    let log = Log::begin(ctx, &guest)?;
    // Each payload comes to the list once, and stays there when it is reverted.
    for (patch, is_stopped) in [(SLEEPER, false), (DRAIN, true)] {
        guest.ok(MODULE)?;
        sleepers::begin(&guest, 1, 1)?;
        let run = Run::begin(ctx, &guest, patch)?;
        if is_stopped {
            run.stop(ctx)?;
        }
        guest.ok("rmmod dummy")?;
        starts_programs(&guest)?;
        // The module comes again, to other pages perhaps, and goes.
        guest.ok(&format!("{MODULE} && rmmod dummy"))?;
        starts_programs(&guest)?;
        run.waits(ctx)?;
        log.nothing_new(ctx, &guest)?;
        if is_stopped {
            run.signal(ctx, "CONT")?;
            // It is still in the way.
            thread::sleep(Duration::from_secs(2));
            run.waits(ctx)?;
        }
        sleepers::end(&guest)?;
        run.end(ctx)?;
        tool::in_force(ctx, &guest, &[patch])?;
        sleepers::begin(&guest, 1, 1)?;
        sleepers::end(&guest)?;
        ctx.dom0.ok(&format!("xen-locus verify {name}"))?;
        tool::revert(ctx, name, patch)?;
        log.nothing_new(ctx, &guest)?;
    }
    tool::no_patches(ctx, name)?;
    ctx.destroy_guest(name)
}

/// The guest starts many programs. None of them may fail.
fn starts_programs(guest: &Guest) -> Result<(), Verdict> {
    let out = guest.sh_timeout(PROGRAMS, STARTING)?;
    check!(
        out.rc == 0 && out.text() == STARTED,
        "programs of the guest: {} {} {}",
        out.rc,
        out.text(),
        out.err_text()
    );
    Ok(())
}

/// A run of `apply` in dom0 that goes on meanwhile.
struct Run;

impl Run {
    /// Starts it, and leaves it the time to come to its wait.
    fn begin(ctx: &Ctx, guest: &Guest, patch: &str) -> Result<Run, Verdict> {
        let (name, file) = (&guest.name, file(patch));
        let apply = format!("xen-locus apply {name} {file} --timeout {TIMEOUT}");
        ctx.dom0.ok(&format!(
            "rm -f {RUN}.*; (sh -c '{apply} >{RUN}.log 2>&1 & echo $! >{RUN}.pid; wait $!; echo $? >{RUN}.new; \
             mv {RUN}.new {RUN}.rc' </dev/null >/dev/null 2>&1 &); sleep 5"
        ))?;
        let run = Run;
        run.waits(ctx)?;
        Ok(run)
    }

    /// Checks that it has not ended.
    fn waits(&self, ctx: &Ctx) -> Result<(), Verdict> {
        let out = ctx.dom0.sh(&format!(
            "[ -e /proc/$(cat {RUN}.pid) ] && [ ! -e {RUN}.rc ] || {{ cat {RUN}.rc {RUN}.log; exit 1; }}"
        ))?;
        let said = format!("{} {}", out.text(), out.err_text());
        check!(out.rc == 0, "it does not wait any more: {said}");
        Ok(())
    }

    fn signal(&self, ctx: &Ctx, signal: &str) -> Result<(), Verdict> {
        ctx.dom0.ok(&format!("kill -{signal} $(cat {RUN}.pid)"))?;
        Ok(())
    }

    /// Stops it. A thread that sleeps is in its way, so it does not hold the guest.
    fn stop(&self, ctx: &Ctx) -> Result<(), Verdict> {
        self.signal(ctx, "STOP")?;
        ctx.dom0.ok(&format!(
            "sleep 1; grep -q '^State:.*stopped' /proc/$(cat {RUN}.pid)/status"
        ))?;
        Ok(())
    }

    /// Waits for its end. It must have succeeded.
    fn end(self, ctx: &Ctx) -> Result<(), Verdict> {
        let rc = until(ENDING, || {
            let out = ctx.dom0.sh(&format!("cat {RUN}.rc"))?;
            Ok(match out.rc {
                0 => Ok(out.text()),
                _ => Err("it does not end".to_owned()),
            })
        })?;
        let said = ctx.dom0.ok(&format!("cat {RUN}.log"))?;
        check_eq!(rc, "0", "{said}");
        Ok(())
    }
}
