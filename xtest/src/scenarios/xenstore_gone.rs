//! xenstored is killed, and a minute later another one is started, which knows nothing: the guest runs, and the daemon serves again.

use std::time::Duration;

use super::steps::patches::{self, CMDLINE};
use super::steps::{daemon, tool, wait};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::PV1;
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[Scenario {
    name: "xenstore-gone-pv",
    summary: "xenstored is killed, and started again after 60 s: guests run, commands end, and the daemon goes on by itself",
    profile: &PV1,
    run: gone,
}];

/// The guest.
const NAME: &str = "gone";
/// What the daemon says.
const LOG: &str = "/var/log/daemon.log";
/// How often the guest and the daemon are looked at while there is no xenstored: every ten seconds.
const LOOKS: u32 = 6;
/// Longest time for a command that finds no xenstored.
const COMMAND: Duration = Duration::from_secs(25);
/// Longest wait until the daemon has found the new xenstored, and has published the guest there.
const FOUND: Duration = Duration::from_secs(60);

/// Makes a request about [`CMDLINE`].
fn ask(ctx: &Ctx, request: &str, rc: &str, words: &str) -> Result<(), Verdict> {
    daemon::ask(ctx, &format!("{request} patch={CMDLINE}"), rc, words)
}

fn gone(ctx: &mut Ctx) -> Result<(), Verdict> {
    ctx.destroy_all()?;
    let guest = ctx.ensure_guest(GuestSpec::new(NAME, Kind::Pv))?;
    guest.start_workload()?;
    ctx.dom0.ok(&format!("rm -f {LOG}"))?;
    daemon::start(ctx)?;
    ask(
        ctx,
        &format!("{NAME}-before op=apply domain={NAME}"),
        "0",
        "applied",
    )?;
    check!(patches::cmdline_is_live(&guest)?, "the patch has no effect");
    // The new xenstored does not know the domains that run, and xenconsoled does not know the new xenstored.
    ctx.uses_up_the_machine();
    ctx.dom0.ok("kill -KILL $(pidof xenstored)")?;
    let done = away(ctx, &guest)
        .and_then(|()| another(ctx, &guest))
        .and_then(|()| serves_again(ctx, &guest));
    done.map_err(|verdict| with_log(ctx, &verdict))
}

/// A failure, with what the daemon said.
fn with_log(ctx: &Ctx, verdict: &Verdict) -> Verdict {
    let log = ctx.dom0.sh(&format!("tail -n 40 {LOG}"));
    let log = log.map_or_else(|e| e.to_string(), |out| out.text());
    Verdict::failure(format!("{verdict}\nthe daemon said: {log}"))
}

/// For a minute there is no xenstored: a command ends, and the daemon and the guest go on. Nothing here may need xenstored; guests
/// are talked to by their consoles.
fn away(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let revert = format!("xen-locus revert {NAME} {CMDLINE}");
    let out = ctx.dom0.sh_timeout(&revert, COMMAND)?;
    let said = out.err_text();
    check_eq!(out.rc, 1, "{revert}: {said}");
    check!(said.contains("xenstored"), "{revert}: {said}");
    for _ in 0..LOOKS {
        let rounds = guest.rounds()?;
        ctx.dom0.ok("sleep 10")?;
        guest.went_on(rounds)?;
        lives(ctx)?;
    }
    check!(patches::cmdline_is_live(guest)?, "the patch is gone");
    Ok(())
}

/// Checks that the daemon that was started has not ended.
fn lives(ctx: &Ctx) -> Result<(), Verdict> {
    let out = ctx
        .dom0
        .sh("grep -q ') [^Z]' /proc/$(cat /run/daemon.pid)/stat")?;
    check_eq!(out.rc, 0, "the daemon has ended: {}", out.err_text());
    Ok(())
}

/// Starts another xenstored, as `dom0/init` does. Of what the toolstack had written of the guest, it is told the name. That comes
/// first: the agent forgets the console of a guest that is not among the domains.
fn another(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    ctx.dom0
        .ok("xenstored --pid-file /run/xenstored.pid >/dev/null 2>&1")?;
    ctx.dom0.ok(
        "for i in $(seq 100); do xenstore-read -s / >/dev/null 2>&1 && exit 0; usleep 100000; done; exit 1",
    )?;
    ctx.dom0.ok(&format!(
        "xenstore-write /local/domain/{}/name {NAME} && xen-init-dom0",
        guest.domid
    ))?;
    Ok(())
}

/// Waits until a node of XenStore has this value.
fn becomes(ctx: &Ctx, node: &str, wanted: &str) -> Result<(), Verdict> {
    wait::until(FOUND, || {
        let found = ctx
            .dom0
            .ok(&format!("xenstore-read {node} 2>/dev/null; true"))?;
        Ok(match found == wanted {
            true => Ok(()),
            false => Err(format!("{node}: {found:?}, expected {wanted:?}")),
        })
    })
}

/// The same daemon says that it runs, has published the guest, and answers requests.
fn serves_again(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let rounds = guest.rounds()?;
    let pid = ctx.dom0.ok("cat /run/daemon.pid")?;
    becomes(ctx, "/tool/xen-locus/pid", &pid)?;
    becomes(ctx, "/tool/xen-locus/state", "running")?;
    let patch = format!(
        "/tool/xen-locus/domain/{}/patch/{CMDLINE}/state",
        guest.domid
    );
    becomes(ctx, &patch, "applied")?;
    lives(ctx)?;
    let said = ctx.dom0.ok(&format!("cat {LOG}"))?;
    for words in [
        "until xenstored answers",
        "xenstored was started again",
        "xenstored answers again",
    ] {
        check!(said.contains(words), "the daemon does not say {words:?}");
    }
    ask(ctx, "gone-nobody op=apply domain=nobody", "1", "no domain")?;
    ask(
        ctx,
        &format!("{NAME}-after op=revert domain={NAME}"),
        "0",
        "reverted",
    )?;
    patches::cmdline_is_untouched(guest)?;
    daemon::stop(ctx)?;
    tool::no_patches(ctx, NAME)?;
    guest.went_on(rounds)
}
