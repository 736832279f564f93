//! Nothing leaves a guest paused. If the tool can't work, it says why in one sentence.

use std::collections::BTreeMap;
use std::time::Duration;

use super::steps::patches::{self, CMDLINE, PAIR};
use super::steps::tool;
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{PV, PV1};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run. The last one ends xenstored: what follows it needs another boot.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "signals-pv",
        summary: "INT, TERM, HUP, QUIT and TSTP at any moment, in the pause too, leave the guest running, old or new",
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

/// Sends each signal to applies and reverts at moments spread over the time that an undisturbed one takes here. After
/// each, the guest must not stay paused. Xen is asked while a stopped run is still stopped. Prints what was signalled,
/// the exit code, and the last words. A shell lets what it starts in the background ignore INT and QUIT, and what takes
/// its own place QUIT. So the run is a child in the foreground.
const SIGNALS: &str = r#"
fail() { xl list; echo "$1"; exit 1; }
now() { awk '{print int($1 * 1000)}' /proc/uptime; }
began=$(now)
xen-locus apply pv /payloads/locus_proc_pair.ko >/tmp/said 2>&1 || fail "undisturbed: $(cat /tmp/said)"
took=$(($(now) - began))
xen-locus revert pv locus_proc_pair >/tmp/said 2>&1 || fail "undisturbed: $(cat /tmp/said)"
echo "undisturbed: $took ms"
# Sends signal $1 at $2 %. The pause of a change that is being made may be met once, not again and again.
send() {
	until [ -s /tmp/pid ]; do usleep 1000; done
	pid=$(cat /tmp/pid)
	usleep $((took * $2 * 10))
	kill -$1 $pid 2>/dev/null
	usleep 20000
	[ $1 = TSTP ] && usleep 100000
	looks=0
	while [ -z "$(xl list pv | awk 'NR == 2 && $5 !~ /p/')" ]; do
		looks=$((looks + 1))
		[ $looks = 8 ] && echo "paused after $1 at $2 %" >/tmp/wrong && break
		usleep 30000
	done
	kill -CONT $pid 2>/dev/null
}
n=0
ulimit -c 0
for sig in INT TERM HUP TSTP QUIT; do
	for part in 5 20 35 40 45 50 55 60 75 130; do
		n=$((n + 1))
		if [ $((n % 2)) = 1 ]; then
			set -- apply pv /payloads/locus_proc_pair.ko
		else
			set -- revert pv locus_proc_pair
		fi
		rm -f /tmp/pid /tmp/wrong
		send $sig $part &
		(sh -c 'echo $PPID >/tmp/pid'; exec xen-locus "$@") >/tmp/said 2>&1
		rc=$?
		wait
		[ -e /tmp/wrong ] && fail "$(cat /tmp/wrong)"
		said=$(tail -n 1 /tmp/said)
		echo "$1 $sig $part: $rc $said"
		# Over 128: it came before the run could begin to hold signals off. QUIT ends a run wherever the guest is not paused.
		case $rc in 0 | 1 | 129 | 130 | 131 | 143) ;; *) fail "rc $rc after $sig at $part %: $said" ;; esac
	done
done
"#;

/// How many signals [`SIGNALS`] sends.
const SENT: usize = 5 * 10;

/// Lets an apply send itself the signal $signal while it holds the guest paused: when the journal is there, the guardian
/// waits, and the first byte is to be written. Prints what Xen says of the guest when the run is stopped or has ended,
/// the exit code, and what it said.
const INSIDE: &str = r#"
ulimit -c 0
rm -f /tmp/pid
look() {
	until [ -s /tmp/pid ]; do usleep 1000; done
	pid=$(cat /tmp/pid)
	while grep -q ') [^TZ]' /proc/$pid/stat; do usleep 5000; done 2>/dev/null
	grep -q ') T' /proc/$pid/stat 2>/dev/null && echo stopped
	xl list pv | awk 'NR == 2 {print "state " $5}'
	kill -CONT $pid 2>/dev/null
}
look &
(
	sh -c 'echo $PPID >/tmp/pid'
	export XEN_LOCUS_FAULT="2:$signal:mark writing"
	exec xen-locus-faults apply pv /payloads/locus_proc_pair.ko
) >/tmp/said 2>&1
echo "rc $?"
wait
cat /tmp/said
"#;

/// Signals by name and number, and the exit code of a run that gets it in its pause: such a run ends as it would without.
/// QUIT ends it as soon as the guest runs, and the change is made by then.
const IN_PAUSE: [(&str, u32, &str); 5] = [
    ("HUP", 1, "rc 0"),
    ("INT", 2, "rc 0"),
    ("QUIT", 3, "rc 131"),
    ("TERM", 15, "rc 0"),
    ("TSTP", 20, "rc 0"),
];

/// A signal in the pause waits for its end: the change is made, and the guest runs.
fn signals_in_the_pause(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    patches::put_check(guest, PAIR)?;
    for (name, number, ends) in IN_PAUSE {
        let said = ctx.dom0.ok(&format!("signal={number}\n{INSIDE}"))?;
        let has = |words: &str| said.lines().any(|line| line.starts_with(words));
        let hit = format!("xen-locus: fault: {number} at ");
        check!(has(&hit), "{name} was not sent in the pause: {said}");
        let state = said.lines().find_map(|line| line.strip_prefix("state "));
        check!(
            state.is_some_and(|state| !state.contains('p')),
            "the guest stays paused after {name} in the pause: {said}"
        );
        check!(has(ends), "{name} in the pause: {said}");
        check!(
            !said.contains("nothing had been written"),
            "the change is there, and not said so: {said}"
        );
        check_eq!(
            has("stopped"),
            name == "TSTP",
            "{name} in the pause: {said}"
        );
        patches::check(guest, PAIR, "after")?;
        ctx.dom0.ok("xen-locus recover pv")?;
        tool::in_force(ctx, guest, &[PAIR])?;
        tool::revert_all(ctx, "pv")?;
        patches::check(guest, PAIR, "before")?;
    }
    Ok(())
}

fn signals(ctx: &mut Ctx) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new("pv", Kind::Pv))?;
    guest.start_workload()?;
    let rounds = guest.rounds()?;
    signals_in_the_pause(ctx, &guest)?;
    let out = ctx.dom0.sh_timeout(SIGNALS, Duration::from_secs(1800))?;
    let said = out.text();
    let last = said.lines().last().unwrap_or_default();
    check_eq!(out.rc, 0, "{last} {}\n{said}", out.err_text());
    let tally = tally(&said);
    let line = format!("signals: what, exit code, interrupted: how often: {tally:?}");
    ctx.dom0.note(&line);
    eprintln!("{line}");
    check_eq!(tally.values().sum::<usize>(), SENT, "{said}");
    let count = |wanted: &dyn Fn(&Key) -> bool| -> usize {
        let some = tally.iter().filter(|(key, _)| wanted(key));
        some.map(|(_, n)| n).sum()
    };
    for action in ["apply", "revert"] {
        let done = count(&|(what, rc, _)| what == action && rc == "0");
        check!(done > 0, "no {action} succeeded: {said}");
    }
    let interrupted = count(&|(_, rc, interrupted)| rc == "1" && *interrupted);
    check!(
        interrupted > 0,
        "no run said that it was interrupted: {said}"
    );
    // The rest: there was nothing to revert, or it ended before it could hold signals off.
    let other = count(&|(what, rc, interrupted)| rc == "1" && !interrupted && what == "apply");
    check_eq!(other, 0, "applies that failed for another reason: {said}");
    ctx.dom0.ok("xen-locus revert pv --all")?;
    tool::no_patches(ctx, "pv")?;
    guest.went_on(rounds)?;
    let seen = guest.ok("cat /proc/version")?;
    check!(!seen.contains("locus="), "the guest shows {seen:?}");
    Ok(())
}

/// An action, its exit code, and whether it said that it was interrupted.
type Key = (String, String, bool);

/// How often each action ended in each way, by what [`SIGNALS`] prints.
fn tally(said: &str) -> BTreeMap<Key, usize> {
    let mut tally = BTreeMap::new();
    for line in said.lines() {
        let Some((sent, end)) = line.split_once(": ") else {
            continue;
        };
        let mut sent = sent.split(' ');
        let action = sent.next().unwrap_or_default();
        if ["apply", "revert"].contains(&action) && sent.count() == 2 {
            let (rc, words) = end.split_once(' ').unwrap_or((end, ""));
            let key = (
                action.to_owned(),
                rc.to_owned(),
                words.contains("interrupted"),
            );
            *tally.entry(key).or_default() += 1;
        }
    }
    tally
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
    ctx.uses_up_the_machine();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tally_counts_what_the_script_prints() {
        let said = "undisturbed: 400 ms\n\
            apply INT 5: 130 \n\
            revert INT 15: 1 xen-locus: pv: there is no patch x\n\
            apply TERM 25: 1 xen-locus: interrupted; nothing was changed\n\
            apply HUP 25: 1 xen-locus: interrupted; nothing was changed\n\
            apply TSTP 90: 0 applied (x)\n";
        let tally = tally(said);
        let key = |what: &str, rc: &str, interrupted| (what.to_owned(), rc.to_owned(), interrupted);
        assert_eq!(tally.values().sum::<usize>(), 5);
        assert_eq!(tally[&key("apply", "1", true)], 2);
        assert_eq!(tally[&key("revert", "1", false)], 1);
        assert_eq!(tally[&key("apply", "0", false)], 1);
    }
}
