//! `xtest demo`: shows xen-locus at work, live.

use std::io::Write;
use std::time::Duration;

use anyhow::{anyhow, Result};

use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::PVH;
use crate::scenario::Ctx;
use crate::testbed::Testbed;
use crate::verdict::Verdict;

/// Boots a machine and runs the demonstration in it.
pub fn run(testbed: &Testbed) -> Result<()> {
    say("Booting Xen and a Debian dom0 under QEMU: no KVM, no root.");
    let mut machine = testbed.boot(&PVH, 0)?;
    script(&mut machine.ctx).map_err(|v| anyhow!("{v}"))
}

fn script(ctx: &mut Ctx) -> Result<(), Verdict> {
    say("Starting two guests, PV and PVH: stock Debian kernels, nothing of ours in them.");
    let guests = [
        ctx.ensure_guest(GuestSpec::new("web", Kind::Pv))?,
        ctx.ensure_guest(GuestSpec::new("db", Kind::Pvh))?,
    ];
    in_dom0(ctx, "xen-locus list")?;
    in_dom0(ctx, "xen-locus info web")?;
    let payload = "/payloads/locus_cmdline.ko";
    in_dom0(ctx, &format!("xen-locus show {payload}"))?;

    say("The guests' view before.");
    for guest in &guests {
        in_guest(guest, "cat /proc/cmdline")?;
    }
    say("One command patches both running kernels.");
    in_dom0(ctx, &format!("xen-locus apply web db {payload}"))?;
    for guest in &guests {
        in_guest(guest, "cat /proc/cmdline")?;
    }
    in_dom0(ctx, "xen-locus status")?;

    say("A script that knows only XenStore asks the daemon to take it back.");
    in_dom0(ctx, "(xen-locus daemon >/var/log/daemon.log 2>&1 &)")?;
    for guest in &guests {
        let at = format!("/tool/xen-locus/request/undo-{}", guest.name);
        in_dom0(
            ctx,
            &format!(
                "xenstore-write {at}/op revert {at}/domain {} {at}/patch locus_cmdline {at}/submit 1",
                guest.name
            ),
        )?;
        in_dom0(
            ctx,
            &format!(
                "until [ \"$(xenstore-read {at}/state 2>/dev/null)\" = done ]; do sleep 1; done; \
                 xenstore-read {at}/rc {at}/message"
            ),
        )?;
    }
    say("And the guests' view after.");
    for guest in &guests {
        in_guest(guest, "cat /proc/cmdline")?;
    }
    in_dom0(ctx, "xen-locus list")
}

/// Prints what comes next.
fn say(text: &str) {
    println!("\n\x1b[1m{text}\x1b[0m");
}

/// Prints a command, runs it in dom0 and prints its output as it comes. It must succeed.
fn in_dom0(ctx: &Ctx, cmd: &str) -> Result<(), Verdict> {
    println!("\x1b[36mdom0#\x1b[0m {cmd}");
    let show = &mut |_: bool, data: &[u8]| {
        let mut out = std::io::stdout().lock();
        // If nothing reads the output any more, the demonstration still goes on to its end.
        let _ = out.write_all(data).and_then(|()| out.flush());
    };
    match ctx.dom0.sh_stream(cmd, Duration::from_secs(300), show)? {
        0 => Ok(()),
        rc => Err(Verdict::failure(format!("`{cmd}` ended with {rc}"))),
    }
}

/// Prints a command, runs it in a guest and prints its output. It must succeed.
fn in_guest(guest: &Guest, cmd: &str) -> Result<(), Verdict> {
    println!("\x1b[33m{}#\x1b[0m {cmd}", guest.name);
    println!("{}", guest.ok(cmd)?);
    Ok(())
}
