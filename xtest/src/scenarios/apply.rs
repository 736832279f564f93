//! First light: a patch takes effect in a running guest, and goes away again.

use crate::guest::{GuestSpec, Kind};
use crate::scenario::{Ctx, Scenario, PV};
use crate::verdict::Verdict;

/// See the names.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "scratch",
    summary: "scratch",
    profile: &crate::scenario::HVM,
    run: scratch,
}];

fn scratch(ctx: &mut Ctx) -> Result<(), Verdict> {
    let kind = match std::env::var("K").as_deref() {
        Ok("pvh") => Kind::Pvh,
        Ok("hvm") => Kind::Hvm,
        _ => Kind::Pv,
    };
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    let script = std::fs::read_to_string("/tmp/scratch.sh")?;
    for line in script.lines() {
        let (text, rc, err) = match line.strip_prefix("G ") {
            Some(cmd) => {
                let o = guest.sh(cmd)?;
                (o.text(), o.rc, o.err_text())
            }
            None => {
                let o = ctx.dom0.sh(&line.replace("DOM", kind.name()))?;
                (o.text(), o.rc, o.err_text())
            }
        };
        println!("--- {line} -> {rc}\n{text}\n{err}");
    }
    Ok(())
}
