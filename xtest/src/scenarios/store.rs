//! Requests through XenStore: a script that only uses `xenstore-write` gets a guest patched, and gets true answers.

use super::steps::beside::with_xl;
use super::steps::patches::{self, CMDLINE};
use super::steps::{daemon, tool};
use crate::dom0::Output;
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{PV1, PV4};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "xenstore-requests",
        summary:
            "the daemon serves requests for apply and revert through XenStore, and publishes status",
        profile: &PV1,
        run: requests,
    },
    Scenario {
        name: "xenstore-late-module",
        summary: "a request for a module that is not loaded is carried out when it is loaded",
        profile: &PV1,
        run: late_module,
    },
    Scenario {
        name: "xenstore-updated",
        summary:
            "xenstored is updated live while patches are changed, and neither commands nor the daemon fail",
        profile: &PV1,
        run: updated,
    },
];

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[Scenario {
    name: "xenstore-requests-pv4",
    summary: "the daemon serves requests, while guardians and xl run on other CPUs",
    profile: &PV4,
    run: |ctx| with_xl(ctx, requests),
}];

/// Where the daemon publishes what it does and what is in force.
const PUBLISHED: &str = "/tool/xen-locus";

fn requests(ctx: &mut Ctx) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new("pv", Kind::Pv))?;
    daemon::start(ctx)?;
    let uuid = published(ctx, &guest)?;
    served(ctx, &guest, &uuid)?;
    not_served(ctx, &guest)?;
    started_again(ctx)
}

/// Reads a node of XenStore; exit code 1 if there is none.
fn read(ctx: &Ctx, node: &str) -> Result<Output, Verdict> {
    ctx.dom0.sh(&format!("xenstore-read {node} 2>/dev/null"))
}

/// The daemon publishes its own state, and UUID and kernel of the guest. Returns the UUID.
fn published(ctx: &Ctx, guest: &Guest) -> Result<String, Verdict> {
    let id = guest.domid;
    ctx.dom0.ok(&format!(
        "for i in $(seq 100); do xenstore-read {PUBLISHED}/domain/{id}/uuid && \
         [ \"$(xenstore-read {PUBLISHED}/state)\" = running ] && exit 0; \
         usleep 100000; done 2>/dev/null; exit 1"
    ))?;
    check_eq!(read(ctx, &format!("{PUBLISHED}/state"))?.text(), "running");
    let vm = ctx
        .dom0
        .ok(&format!("xenstore-read /local/domain/{id}/vm"))?;
    let uuid = vm.trim_start_matches("/vm/").to_owned();
    let of_guest = |node: &str| read(ctx, &format!("{PUBLISHED}/domain/{id}/{node}"));
    check_eq!(of_guest("uuid")?.text(), uuid);
    check_eq!(of_guest("kernel")?.text(), ctx.release);
    Ok(uuid)
}

/// A patch is applied and reverted by request, and the published state follows.
fn served(ctx: &Ctx, guest: &Guest, uuid: &str) -> Result<(), Verdict> {
    let id = guest.domid;
    let ask = |request: &str, words: &str| daemon::ask(ctx, request, "0", words);
    let apply = format!("op=apply domain={id} uuid={uuid} patch={CMDLINE}");
    ask(&format!("a1 {apply}"), "applied")?;
    check!(patches::cmdline_is_live(guest)?, "the patch has no effect");
    let state = format!("{PUBLISHED}/domain/{id}/patch/{CMDLINE}/state");
    check_eq!(read(ctx, &state)?.text(), "applied");
    ask(&format!("a2 {apply}"), "already")?;
    let revert = format!("op=revert domain=pv patch={CMDLINE}");
    ask(&format!("a3 {revert}"), "reverted")?;
    patches::cmdline_is_untouched(guest)?;
    check!(read(ctx, &state)?.rc != 0, "{state} is still there");
    ask(&format!("a4 {revert}"), "already")
}

/// Requests that can't be carried out: exit code and words of each answer.
fn not_served(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    const STALE: &str = "11111111-2222-3333-4444-555555555555";
    let id = guest.domid;
    for (request, rc, words) in [
        (
            format!("b1 op=apply domain=nobody patch={CMDLINE}"),
            "1",
            "no domain",
        ),
        (
            format!("b2 op=apply domain={id} uuid={STALE} patch={CMDLINE}"),
            "1",
            "UUID",
        ),
        (
            "b3 op=apply domain=pv patch=locus_nothing".to_owned(),
            "1",
            "No such file",
        ),
        (
            "b4 op=apply domain=pv patch=../../etc/passwd".to_owned(),
            "64",
            "expected a name",
        ),
        (
            format!("b5 op=apply domain={id} patch={CMDLINE}"),
            "64",
            "uuid",
        ),
        (
            format!("b6 op=explode domain=pv patch={CMDLINE}"),
            "64",
            "expected apply, replace or revert",
        ),
        (
            format!("b7 op=apply domain=pv patch={CMDLINE} deadline=1"),
            "2",
            "deadline",
        ),
        (
            format!("b8 op=apply domain=pv patch={CMDLINE} sha256=00"),
            "64",
            "64 hex digits",
        ),
        (
            format!(
                "b10 op=apply domain=pv patch={CMDLINE} sha256={}",
                "0".repeat(64)
            ),
            "1",
            "SHA-256",
        ),
        (
            "b9 op=apply domain=pv patch=locus_own_static_call".to_owned(),
            "3",
            ".static_call.text",
        ),
    ] {
        daemon::ask(ctx, &request, rc, words)?;
    }
    Ok(())
}

/// A second daemon does not start. The first ends when asked, and a request waits for the next one.
fn started_again(ctx: &Ctx) -> Result<(), Verdict> {
    check_eq!(ctx.dom0.sh("xen-locus daemon")?.rc, 2, "a second daemon");
    daemon::stop(ctx)?;
    check_eq!(read(ctx, &format!("{PUBLISHED}/state"))?.text(), "stopped");
    ctx.dom0.ok(
        "(sleep 3; exec xen-locus daemon >>/var/log/daemon.log 2>&1) & echo $! >/run/daemon.pid",
    )?;
    for (id, op, words) in [("c1", "apply", "applied"), ("c2", "revert", "reverted")] {
        let request = format!("{id} op={op} domain=pv patch={CMDLINE}");
        daemon::ask(ctx, &request, "0", words)?;
    }
    daemon::stop(ctx)
}

/// A request for a module that is not loaded yet waits for it, until its deadline.
fn late_module(ctx: &mut Ctx) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new("late", Kind::Pv))?;
    daemon::start(ctx)?;
    let at = daemon::REQUESTS;
    let ask = |id: &str, seconds: u32| {
        ctx.dom0.ok(&format!(
            "xenstore-write {at}/{id}/op apply {at}/{id}/domain late \
             {at}/{id}/patch locus_object_dummy {at}/{id}/deadline $(($(date +%s) + {seconds})) && \
             xenstore-write {at}/{id}/submit 1"
        ))
    };
    let wait = |id: &str, state: &str| {
        ctx.dom0.ok(&format!(
            "for i in $(seq 600); do [ \"$(xenstore-read {at}/{id}/state 2>/dev/null)\" = {state} ] && \
             xenstore-read {at}/{id}/message 2>/dev/null && exit 0; usleep 100000; done; exit 1"
        ))
    };
    ask("d1", 4)?;
    let why = wait("d1", "queued")?;
    check!(why.contains("module dummy is not loaded"), "d1: {why}");
    let end = wait("d1", "done")?;
    check!(end.contains("deadline"), "d1: {end}");
    check_eq!(
        ctx.dom0.ok(&format!("xenstore-read {at}/d1/rc"))?,
        "2",
        "d1"
    );
    ask("d2", 120)?;
    wait("d2", "queued")?;
    guest.ok("insmod /lib/modules/crc_itu_t.ko && insmod /lib/modules/dummy.ko")?;
    let end = wait("d2", "done")?;
    check!(end.contains("applied"), "d2: {end}");
    check_eq!(
        ctx.dom0.ok(&format!("xenstore-read {at}/d2/rc"))?,
        "0",
        "d2"
    );
    let status = ctx.dom0.ok("xen-locus status late")?;
    check!(status.contains("locus_object_dummy"), "status: {status}");
    daemon::stop(ctx)?;
    ctx.destroy_guest("late")
}

/// Applies and reverts a patch until `/tmp/stop` exists, and counts the exit codes.
const STEPS: &str = r#"
rm -f /tmp/steps /tmp/stop
while [ ! -e /tmp/stop ]; do
	xen-locus apply updated /payloads/locus_proc_pair.ko >/tmp/step.log 2>&1
	echo $? >>/tmp/steps
	xen-locus revert updated locus_proc_pair >>/tmp/step.log 2>&1
	echo $? >>/tmp/steps
done
sort /tmp/steps | uniq -c >/tmp/said
"#;

/// xenstored replaces itself with a new process while commands and the daemon are connected to it.
fn updated(ctx: &mut Ctx) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new("updated", Kind::Pv))?;
    guest.start_workload()?;
    let rounds = guest.rounds()?;
    ctx.dom0.put("/tmp/steps.sh", 0o755, STEPS.as_bytes())?;
    daemon::start(ctx)?;
    let ask = |request: &str| daemon::ask(ctx, &format!("{request} patch={CMDLINE}"), "0", "");
    ask("before op=apply domain=updated")?;

    ctx.dom0
        .ok("sh /tmp/steps.sh </dev/null >/dev/null 2>&1 &")?;
    let steps = "until [ $(grep -c . /tmp/steps) -ge STEPS ]; do usleep 100000; done 2>/dev/null";
    ctx.dom0.ok(&steps.replace("STEPS", "2"))?;
    for round in 1..=5 {
        let said = ctx.dom0.ok(
            "xenstore-control live-update /usr/lib/xen/bin/xenstored && \
             tr '\\0' ' ' </proc/$(pidof xenstored)/cmdline",
        )?;
        check!(said.ends_with(" -U"), "round {round}: {said}");
    }
    ctx.dom0
        .ok("touch /tmp/stop; until [ -s /tmp/said ]; do usleep 100000; done")?;
    let said = ctx.dom0.ok("cat /tmp/said")?;
    let words: Vec<&str> = said.split_whitespace().collect();
    check!(
        matches!(words[..], [_, "0"]),
        "steps by exit code: {said}, last: {}",
        ctx.dom0.ok("cat /tmp/step.log")?
    );

    ask("after op=revert domain=updated")?;
    daemon::stop(ctx)?;
    tool::no_patches(ctx, "updated")?;
    guest.went_on(rounds)?;
    ctx.destroy_guest("updated")
}
