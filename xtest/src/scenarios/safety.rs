//! Nothing leaves a guest paused. If the tool can't work, it says why in one sentence.

use std::time::Duration;

use super::steps::patches::CMDLINE;
use super::steps::tool;
use crate::guest::{GuestSpec, Kind};
use crate::profile::{PV, PV1};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run. The last one ends xenstored, so it must
/// stay the last of its profile.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "signals-pv",
        summary: "INT, TERM, HUP and TSTP at any moment leave the guest running, old or new",
        profile: &PV,
        run: signals,
    },
    Scenario {
        name: "two-at-once-pv",
        summary: "two runs on one guest wait for each other",
        profile: &PV1,
        run: two_at_once,
    },
    Scenario {
        name: "environment",
        summary: "not root, and no xenstored: one clear sentence, exit 1",
        profile: &PV1,
        run: environment,
    },
];

/// Sends each signal to applies and reverts at moments spread over their run. After each, the guest must not stay
/// paused. Xen is asked while a stopped run is still stopped.
const SIGNALS: &str = r#"
fail() { xl list; echo "$1"; exit 1; }
n=0
for sig in INT TERM HUP TSTP; do
	for delay in 50 150 250 300 350 400 450 500 550 600 650 700 800 1000; do
		n=$((n + 1))
		if [ $((n % 2)) = 1 ]; then
			xen-locus apply pv /payloads/locus_proc_pair.ko >/tmp/said 2>&1 &
		else
			xen-locus revert pv locus_proc_pair >/tmp/said 2>&1 &
		fi
		pid=$!
		usleep ${delay}000
		kill -$sig $pid 2>/dev/null
		usleep 20000
		[ $sig = TSTP ] && usleep 100000
		# The pause of a change that is being made may be met once, not again and again.
		looks=0
		while [ -z "$(xl list pv | awk 'NR == 2 && $5 !~ /p/')" ]; do
			looks=$((looks + 1))
			[ $looks = 8 ] && fail "paused after $sig at $delay ms"
			usleep 30000
		done
		kill -CONT $pid 2>/dev/null
		wait $pid
		rc=$?
		echo "$sig at $delay ms: $rc"
		# Over 128: it came before the run could begin to hold signals off.
		case $rc in 0 | 1 | 129 | 130 | 143) ;; *) fail "rc $rc after $sig at $delay ms: $(tr '\n' ' ' </tmp/said)" ;; esac
	done
done
echo "$n signals"
"#;

fn signals(ctx: &mut Ctx) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new("pv", Kind::Pv))?;
    guest.start_workload()?;
    let rounds = guest.rounds()?;
    let out = ctx.dom0.sh_timeout(SIGNALS, Duration::from_secs(1800))?;
    let said = out.text();
    let last = said.lines().last().unwrap_or_default();
    check_eq!(out.rc, 0, "{last} {}\n{said}", out.err_text());
    ctx.dom0.sh("xen-locus revert pv --all")?;
    tool::no_patches(ctx, "pv")?;
    guest.went_on(rounds)?;
    let seen = guest.ok("cat /proc/version")?;
    check!(!seen.contains("locus="), "the guest shows {seen:?}");
    Ok(())
}

fn two_at_once(ctx: &mut Ctx) -> Result<(), Verdict> {
    ctx.ensure_guest(GuestSpec::new("pv", Kind::Pv))?;
    let both = "xen-locus apply pv /payloads/locus_cmdline.ko >/tmp/1 2>&1 & p=$!
        xen-locus apply pv /payloads/locus_cmdline.ko >/tmp/2 2>&1; b=$?
        wait $p && [ $b = 0 ]; rc=$?; cat /tmp/1 /tmp/2; exit $rc";
    let said = ctx.dom0.ok(both)?;
    check!(
        said.contains("applied (") && said.contains("already"),
        "one should apply and the other find it applied: {said}"
    );
    tool::revert(ctx, "pv", CMDLINE)?;
    Ok(())
}

fn environment(ctx: &mut Ctx) -> Result<(), Verdict> {
    ctx.dom0
        .ok("echo nobody:x:65534:65534::/:/bin/sh > /etc/passwd")?;
    let out = ctx.dom0.sh("su nobody -c \"xen-locus list\"")?;
    check_eq!(out.rc, 1, "not root: {}", out.err_text());
    check!(
        out.err_text().contains("must be run as root"),
        "not root: {}",
        out.err_text()
    );

    ctx.destroy_all()?;
    ctx.dom0
        .ok("kill $(pidof xenstored); sleep 1; rm -f /run/xenstored/socket")?;
    let out = ctx
        .dom0
        .sh_timeout("xen-locus list", Duration::from_secs(60))?;
    check_eq!(out.rc, 1, "no xenstored: {}", out.err_text());
    let lines = out.err_text().lines().count();
    check!(
        lines == 1 && out.err_text().contains("xenstored"),
        "no xenstored: {}",
        out.err_text()
    );
    Ok(())
}
