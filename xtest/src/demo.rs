//! `xtest demo`: shows the tool at work to a person, live.

use std::io::Write;
use std::time::Duration;

use anyhow::{anyhow, Result};

use crate::bench::Bench;
use crate::guest::{Guest, GuestSpec, Kind};
use crate::scenario::{Ctx, PV};
use crate::verdict::Verdict;

/// Boots a machine and plays the script.
pub fn run(bench: &Bench) -> Result<()> {
    say("Booting Xen and a Debian dom0 under QEMU (no KVM, no root).");
    let mut machine = bench.boot(&PV, 0)?;
    script(&mut machine.ctx).map_err(|v| anyhow!("{v}"))
}

fn script(ctx: &mut Ctx) -> Result<(), Verdict> {
    say("Starting a guest: a stock Debian kernel, nothing of ours in it.");
    let guest = ctx.ensure_guest(GuestSpec::new("web", Kind::Pv))?;
    in_guest(&guest, "uname -a")?;
    in_dom0(ctx, "xl list")?;
    in_dom0(ctx, "xen-locus list")?;
    Ok(())
}

/// Narration.
fn say(text: &str) {
    println!("\n\x1b[1m{text}\x1b[0m");
}

/// Shows and runs a command of dom0; its output appears as it comes.
fn in_dom0(ctx: &Ctx, cmd: &str) -> Result<i32, Verdict> {
    println!("\x1b[36mdom0#\x1b[0m {cmd}");
    ctx.dom0
        .sh_stream(cmd, Duration::from_secs(300), &mut |_, data| {
            let mut out = std::io::stdout().lock();
            let _ = out.write_all(data).and_then(|()| out.flush());
        })
}

/// Shows and runs a command in a guest.
fn in_guest(guest: &Guest, cmd: &str) -> Result<i32, Verdict> {
    println!("\x1b[33m{}#\x1b[0m {cmd}", guest.name);
    let out = guest.sh(cmd)?;
    println!("{}", out.text());
    if !out.stderr.is_empty() {
        eprintln!("{}", out.err_text());
    }
    Ok(out.rc)
}
