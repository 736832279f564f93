//! `verify` reports each difference between a guest's memory and the records of its patches, and what caused it.
//! What the guest does to patches legitimately is not a difference.

use serde_json::Value;

use super::steps::patches::CMDLINE;
use super::steps::tool;
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "verify-pv",
        summary: "changes of patches by a PV guest or from outside are reported, with their cause",
        profile: &PV1,
        run: |ctx| verify(ctx, Kind::Pv),
    },
    Scenario {
        name: "verify-pvh",
        summary: "changes of patches by a PVH guest or from outside are reported, with their cause",
        profile: &PVH,
        run: |ctx| verify(ctx, Kind::Pvh),
    },
];

const FUNCTION: &str = "cmdline_proc_show";

/// Runs `verify`, which must end with `rc`. Returns all differences.
fn drift(ctx: &Ctx, guest: &Guest, rc: i32) -> Result<Vec<Value>, Verdict> {
    let out = ctx
        .dom0
        .sh(&format!("xen-locus -o json verify {}", guest.name))?;
    check_eq!(out.rc, rc, "{} {}", out.text(), out.err_text());
    let said = out.json()?;
    let word = if rc == 0 { "clean" } else { "drifted" };
    check_eq!(said["result"], word, "{said}");
    Ok(said["drift"].as_array().cloned().unwrap_or_default())
}

fn clean(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    check_eq!(drift(ctx, guest, 0)?.len(), 0);
    Ok(())
}

/// Checks that there is exactly one difference, with these `what`, `by` and `function`.
fn differs(
    ctx: &Ctx,
    guest: &Guest,
    (what, by, function): (&str, &str, &str),
) -> Result<Value, Verdict> {
    let all = drift(ctx, guest, 1)?;
    check!(all.len() == 1, "{all:?}");
    let one = all.into_iter().next().unwrap_or_default();
    check_eq!(one["what"], what, "{one}");
    check_eq!(one["by"], by, "{one}");
    check_eq!(one["function"], function, "{one}");
    eprintln!("verify: {}: {one}", guest.name);
    Ok(one)
}

fn verify(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    let name = &guest.name;
    clean(ctx, &guest)?;
    tool::apply(ctx, name, CMDLINE)?;
    clean(ctx, &guest)?;
    by_the_guest(ctx, &guest)?;
    by_others(ctx, &guest)?;
    by_the_log(ctx, &guest)?;
    let table = ctx.dom0.ok("xen-locus verify")?;
    check!(table.contains("all as recorded (1 patch,"), "{table}");
    tool::revert_all(ctx, name)?;
    clean(ctx, &guest)?;
    keys(ctx, &guest)
}

/// The guest itself uses ftrace, a kprobe and a livepatch on a redirected function.
fn by_the_guest(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let trace = |cmd: &str| guest.ok(&tool::in_tracing(cmd));
    trace(&format!(
        "echo {FUNCTION} > set_ftrace_filter && echo function > current_tracer"
    ))?;
    differs(ctx, guest, ("entry", "ftrace", FUNCTION))?;
    trace("echo nop > current_tracer && echo > set_ftrace_filter")?;
    clean(ctx, guest)?;

    trace(&format!("echo 'p:verify {FUNCTION}+5' > kprobe_events"))?;
    differs(ctx, guest, ("redirect", "kprobe", FUNCTION))?;
    trace("echo 1 > events/kprobes/verify/enable")?;
    differs(ctx, guest, ("redirect", "kprobe", FUNCTION))?;
    trace("echo 0 > events/kprobes/verify/enable && echo > kprobe_events")?;
    clean(ctx, guest)?;

    let module = "locus_stack";
    let wait = format!(
        "until [ \"$(cat /sys/kernel/livepatch/{module}/transition 2>/dev/null || echo 0)\" = 0 ]; \
         do sleep 0.1; done"
    );
    guest.insmod(&ctx.payloads.join(module).join(format!("{module}.ko")))?;
    guest.ok(&wait)?;
    differs(ctx, guest, ("entry", "livepatch", FUNCTION))?;
    guest.ok(&format!(
        "echo 0 > /sys/kernel/livepatch/{module}/enabled; {wait}; rmmod {module}"
    ))?;
    clean(ctx, guest)
}

/// Something with access to the guest's memory changes the redirect, and the payload's code.
fn by_others(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let name = &guest.name;
    let poke = |place: &str, bytes: &str| {
        let cmd = format!("locus-poke {name} {place} {bytes}");
        Ok::<String, Verdict>(ctx.dom0.ok(&cmd)?.trim().to_owned())
    };
    let site = format!("{FUNCTION}+5");
    let was = poke(&site, "0f1f440000")?;
    let one = differs(ctx, guest, ("redirect", "unknown", FUNCTION))?;
    check_eq!(one["expected"], was.as_str(), "{one}");
    check_eq!(one["found"], "0f1f440000", "{one}");
    poke(&site, &was)?;
    clean(ctx, guest)?;

    let status = tool::status(ctx, name)?;
    let new = status["patches"][0]["functions"][0]["new"].as_str();
    let new = new.unwrap_or_default().to_owned();
    let was = poke(&new, "c3")?;
    let one = differs(ctx, guest, ("code", "unknown", FUNCTION))?;
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or(0);
    let at = number(one["address"].as_str().unwrap_or_default());
    let new_at = number(&new);
    check!(at <= new_at && new_at - at < 4096, "{new} is not in {one}");
    poke(&new, &was)?;
    clean(ctx, guest)
}

/// The record itself is compared with the audit log. If that is gone, what is kept of it confirms the record; without
/// either it is not confirmed. A record that the log does not have is a difference.
fn by_the_log(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let verify = format!("xen-locus -o json verify {}", guest.name);
    let unconfirmed = |said: &Value| said["unconfirmed"].as_array().cloned().unwrap_or_default();
    check_eq!(unconfirmed(&ctx.json(&verify)?).len(), 0);
    let log = "/var/log/xen-locus/audit.jsonl";
    // Not a name that a rotated log may have.
    let away = "/var/log/xen-locus/away.jsonl";
    let kept = "/var/lib/xen-locus/in-force";
    ctx.dom0.ok(&format!("mv {log} {away}"))?;
    let said = ctx.json(&verify)?;
    check_eq!(unconfirmed(&said).len(), 0, "{said}");
    ctx.dom0.ok(&format!("mv {kept} {kept}.away"))?;
    let said = ctx.json(&verify)?;
    check_eq!(unconfirmed(&said), [CMDLINE], "{said}");
    check_eq!(said["result"], "clean", "{said}");
    ctx.dom0.ok(&format!(
        "sed 's/\"record\":\"..../\"record\":\"----/g' {away} > {log}"
    ))?;
    let all = drift(ctx, guest, 1)?;
    check!(all.len() == 1, "{all:?}");
    let one = all.first().cloned().unwrap_or_default();
    check_eq!(one["what"], "record", "{one}");
    check!(
        one["expected"].as_str().is_some_and(|e| e.contains("----")),
        "{one}"
    );
    ctx.dom0
        .ok(&format!("mv {away} {log} && mv {kept}.away {kept}"))?;
    clean(ctx, guest)
}

/// The guest switches static keys that a payload uses, while it is in force and after it was reverted.
fn keys(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let name = &guest.name;
    let turn = |on: u8| guest.ok(&format!("echo {on} > /proc/sys/kernel/sched_schedstats"));
    turn(0)?;
    tool::apply(ctx, name, "locus_statickey")?;
    for on in [1, 0, 1] {
        turn(on)?;
        clean(ctx, guest)?;
    }
    tool::revert_all(ctx, name)?;
    clean(ctx, guest)?;
    turn(0)?;
    clean(ctx, guest)
}
