//! Work of others in dom0 while a scenario runs: they ask Xen for domains all the time, under Xen's one lock.

use crate::check;
use crate::scenario::Ctx;
use crate::verdict::Verdict;

/// Asks until the file is gone, and counts how often it did.
const LOOP: &str = "touch /tmp/beside; echo 0 >/tmp/beside-count; (n=0; while [ -e /tmp/beside ]; do \
     xl list && xl vcpu-list && n=$((n + 1)) && echo $n >/tmp/beside-count; done) >/dev/null 2>&1 </dev/null &";

/// Fewest rounds without which the scenario shows nothing.
const ROUNDS: u32 = 20;

/// Does `work` while `xl list` and `xl vcpu-list` run beside it all the time.
///
/// # Errors
/// Those of `work`; [`Verdict::Failure`] if too little ran beside it.
pub fn with_xl(
    ctx: &mut Ctx,
    work: impl FnOnce(&mut Ctx) -> Result<(), Verdict>,
) -> Result<(), Verdict> {
    ctx.dom0.ok(LOOP)?;
    let done = work(ctx);
    let count = ctx
        .dom0
        .ok("rm -f /tmp/beside; sleep 1; cat /tmp/beside-count")?;
    done?;
    let rounds: u32 = count.trim().parse().unwrap_or(0);
    check!(rounds >= ROUNDS, "xl ran only {rounds} times beside it");
    Ok(())
}
