//! The daemon of dom0, and requests to it through XenStore.

use std::time::Duration;

use crate::check;
use crate::scenario::Ctx;
use crate::verdict::Verdict;

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
    ctx.dom0.put("/tmp/ask", 0o755, ASK.as_bytes())?;
    ctx.dom0.ok(&format!(
        "mkdir -p /var/lib/xen-locus/payloads && \
         cp /payloads/*.ko /var/lib/xen-locus/payloads/ && \
         ({command} >>{log} 2>&1 & echo $! >/run/daemon.pid)"
    ))?;
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
