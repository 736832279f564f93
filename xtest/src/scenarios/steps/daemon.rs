//! The daemon of dom0, and requests to it through XenStore.

use std::time::Duration;

use super::{tool, wait};
use crate::scenario::Ctx;
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Where requests are made.
pub const REQUESTS: &str = "/tool/xen-locus/request";

/// A request as a shell script makes it: nodes first, `submit` last, then wait for `state`.
const ASK: &str = r#"#!/bin/sh
# ask ID NODE=VALUE...: prints rc and message
set -e
at=/tool/xen-locus/request/$1; shift
for n in "$@"; do xenstore-write "$at/${n%%=*}" "${n#*=}"; done
xenstore-write "$at/submit" 1
i=0
until [ "$(xenstore-read "$at/state" 2>/dev/null)" = done ]; do
	i=$((i + 1)); [ $i -lt 600 ] || { echo "no answer"; exit 1; }
	usleep 100000
done
echo "$(xenstore-read "$at/rc") $(xenstore-read "$at/message")"
"#;

/// The longest time for an answer.
const PATIENCE: Duration = Duration::from_secs(90);

/// Starts the daemon, with the payloads where it looks for them.
pub fn start(ctx: &Ctx) -> Result<(), Verdict> {
    start_as(ctx, "xen-locus daemon", "/var/log/daemon.log")
}

/// Starts the daemon by this command, and appends what it says to a file of dom0.
pub fn start_as(ctx: &Ctx, command: &str, log: &str) -> Result<(), Verdict> {
    put_ask(ctx)?;
    ctx.dom0.ok(&format!(
        "mkdir -p /var/lib/xen-locus/payloads && \
         cp /payloads/*.ko /var/lib/xen-locus/payloads/ && \
         ({command} >>{log} 2>&1 & echo $! >/run/daemon.pid)"
    ))?;
    Ok(())
}

/// Puts the script into dom0 that [`ask`] needs, if another daemon runs than [`start`] starts.
pub fn put_ask(ctx: &Ctx) -> Result<(), Verdict> {
    ctx.dom0.put("/tmp/ask", 0o755, ASK.as_bytes())
}

/// The command that submits the request ID to apply or revert the patch on the domain NAME.
pub fn submission(id: &str, op: &str, name: &str, patch: &str) -> String {
    let at = format!("{REQUESTS}/{id}");
    format!("xenstore-write {at}/op {op} {at}/domain {name} {at}/patch {patch} {at}/submit 1")
}

/// Submits a request.
pub fn submit(ctx: &Ctx, id: &str, op: &str, name: &str, patch: &str) -> Result<(), Verdict> {
    ctx.dom0.ok(&submission(id, op, name, patch))?;
    Ok(())
}

/// What a request's nodes say now: lines with its state, its exit code and its message, as far as they are there.
pub fn answer(ctx: &Ctx, id: &str) -> Result<String, Verdict> {
    let at = format!("{REQUESTS}/{id}");
    ctx.dom0.ok(&format!(
        "xenstore-read {at}/state {at}/rc {at}/message 2>/dev/null; true"
    ))
}

/// Waits so long for the answer, which must be 0.
pub fn answered(ctx: &Ctx, id: &str, patience: Duration) -> Result<(), Verdict> {
    let said = wait::until(patience, || {
        let said = answer(ctx, id)?;
        Ok(match said.starts_with("done") {
            true => Ok(said),
            false => Err(format!("{id} is not answered: {said:?}")),
        })
    })?;
    check_eq!(said.lines().nth(1), Some("0"), "{id}: {said}");
    Ok(())
}

/// Checks that the actions of the guest after the first `before` say that the request was carried out, and once: in a line of its
/// own, or if there is none, by a run that recover found finished.
pub fn was_carried_out_once(ctx: &Ctx, name: &str, before: usize, id: &str) -> Result<(), Verdict> {
    carried_out_once(ctx, name, before, id, "")
}

/// The same of a request whose first worker was asked to stop: that one's line says that it failed.
pub fn was_carried_out_after_a_stop(
    ctx: &Ctx,
    name: &str,
    before: usize,
    id: &str,
) -> Result<(), Verdict> {
    carried_out_once(ctx, name, before, id, "failed")
}

/// Results that are `overlooked` don't count.
fn carried_out_once(
    ctx: &Ctx,
    name: &str,
    before: usize,
    id: &str,
    overlooked: &str,
) -> Result<(), Verdict> {
    let actions = tool::actions(ctx, name)?;
    let new = actions.get(before..).unwrap_or_default();
    let results = |recovered: bool| -> Vec<&str> {
        let lines = new.iter().filter(|a| match a["op"] == "recover" {
            true => recovered,
            false => !recovered && a["who"] == format!("XenStore request {id}"),
        });
        let results = lines.filter_map(|a| a["result"].as_str());
        results.filter(|result| *result != overlooked).collect()
    };
    let once = match results(false)[..] {
        [own] => own == "applied" || own == "reverted",
        [] => results(true).iter().filter(|r| **r == "finished").count() == 1,
        _ => false,
    };
    check!(once, "{id} of {name}: {new:?}");
    Ok(())
}

/// Ends the daemon, and waits until it has ended.
pub fn stop(ctx: &Ctx) -> Result<(), Verdict> {
    ctx.dom0
        .ok("kill $(cat /run/daemon.pid); for i in $(seq 100); do \
         kill -0 $(cat /run/daemon.pid) 2>/dev/null || exit 0; usleep 100000; done; exit 1")?;
    Ok(())
}

/// Makes a request, `ID NODE=VALUE…`, of a daemon that [`start`] started. The answer must have this exit
/// code, and a message with these words in it.
pub fn ask(ctx: &Ctx, request: &str, rc: &str, words: &str) -> Result<(), Verdict> {
    let out = ctx
        .dom0
        .sh_timeout(&format!("/tmp/ask {request}"), PATIENCE)?;
    let text = out.text();
    check!(
        text.split(' ').next() == Some(rc) && text.contains(words),
        "`{request}`: got {text:?}, expected {rc} and {words:?} ({})",
        out.err_text()
    );
    Ok(())
}
