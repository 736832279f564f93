//! Many guests are patched at the same time.

use std::time::Duration;

use super::steps::patches::{cmdline_is_live, CMDLINE, CMDLINE_FILE};
use super::steps::tool;
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::CROWD;
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[Scenario {
    name: "twenty-pv",
    summary: "twenty PV guests are patched at the same time by as many processes, and back",
    profile: &CROWD,
    run: twenty,
}];

const COUNT: usize = 20;
/// Memory of each, in MiB.
const MEMORY: u32 = 112;

/// Starts `xen-locus` once for each guest, waits for all, and prints the guests for which it failed.
const AT_ONCE: &str = r#"
for g in $1; do
	( xen-locus $2 $g $3 --timeout 120s >/tmp/many.$g 2>&1; echo $? >/tmp/many.$g.rc ) &
done
wait
for g in $1; do
	[ "$(cat /tmp/many.$g.rc)" = 0 ] || { echo "$g: $(cat /tmp/many.$g.rc) $(cat /tmp/many.$g)"; }
done
"#;

fn twenty(ctx: &mut Ctx) -> Result<(), Verdict> {
    ctx.destroy_all()?;
    ctx.dom0.put("/tmp/at-once", 0o755, AT_ONCE.as_bytes())?;
    let names: Vec<String> = (1..=COUNT).map(|n| format!("many{n}")).collect();
    let mut guests: Vec<Guest> = Vec::new();
    for name in &names {
        let spec = GuestSpec::new(name, Kind::Pv).memory(MEMORY).vcpus(1);
        guests.push(ctx.ensure_guest(spec)?);
    }
    let all = names.join(" ");
    let memory = || ctx.dom0.ok("xl list | awk 'NR > 1 {print $1, $3}'");
    let before = memory()?;
    for (action, what, new) in [("apply", CMDLINE_FILE, true), ("revert", CMDLINE, false)] {
        let began = std::time::Instant::now();
        let out = ctx.dom0.sh_timeout(
            &format!("sh /tmp/at-once '{all}' {action} {what}"),
            Duration::from_secs(400),
        )?;
        check_eq!(out.text(), "", "{action}: {}", out.err_text());
        eprintln!("many: {action} of {COUNT} guests: {:?}", began.elapsed());
        for guest in &guests {
            let name = &guest.name;
            check_eq!(cmdline_is_live(guest)?, new, "{name} after {action}");
            let count = tool::listed(ctx, name)?.len();
            check_eq!(count, usize::from(new), "patches of {name} after {action}");
        }
    }
    check_eq!(memory()?, before, "memory of the guests");
    let left = ctx.dom0.ok(
        "ls /run/xen-locus/guard /var/lib/xen-locus/journal 2>/dev/null | grep -v : ; \
         xl list | awk 'NR > 1 && $5 ~ /[pc]/'; pidof xen-locus; true",
    )?;
    check!(left.trim().is_empty(), "left: {left}");
    // The audit log has each of the actions.
    let log = ctx.dom0.ok("xen-locus history | grep -c many")?;
    check_eq!(log.trim(), (2 * COUNT).to_string(), "lines of history");
    ctx.destroy_all()
}
