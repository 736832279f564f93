//! A scenario that takes much longer than usual: what everything in dom0 is doing, and its end.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::dom0::Dom0;
use crate::limits;

/// How many times its usual time a scenario may take.
const TIMES: f64 = 3.0;
/// Nothing is ended earlier than this, in seconds.
const LEAST: f64 = 240.0;

/// The time after which a scenario is ended, which usually takes so many seconds.
pub fn limit(usual: f64) -> Duration {
    limits::scaled(Duration::from_secs_f64((TIMES * usual).max(LEAST)))
}

/// What each process of the tools, and of what they wait for, is doing: state, signals, system call, place in the
/// kernel, stack, open files; then the domains and their vCPUs.
const DOING: &str = r#"
for p in /proc/[0-9]*; do
	line=$(tr '\0' ' ' <$p/cmdline 2>/dev/null)
	case "$line" in
	"" | *xtest-agent*) continue ;;
	*locus* | xl* | sh* | /bin/sh* | xenstore* | xenconsoled* | *libxl* | guest* | busybox*) ;;
	*) continue ;;
	esac
	[ $p = /proc/$$ ] && continue
	echo "--- ${p#/proc/}: $(echo "$line" | head -c 300)"
	grep -E '^(State|PPid|Threads|SigPnd|ShdPnd|SigBlk|SigIgn|SigCgt|voluntary|nonvol)' $p/status | tr '\n\t' '; '
	echo
	for t in $p/task/*; do
		echo "  thread ${t##*/}: $(head -n 1 $t/comm), wchan $(cat $t/wchan), syscall $(cat $t/syscall)"
		sed 's/^/    /' $t/stack
	done
	ls -l $p/fd | awk 'NR > 1 {print "  fd", $9, $10, $11}' | head -n 24
done 2>/dev/null
echo "--- all processes"
ps -o pid,ppid,stat,time,args 2>/dev/null || ps
echo "--- domains"
xl list
xl vcpu-list
xenstore-ls /tool/xen-locus 2>/dev/null | head -n 60
dmesg | tail -n 20
"#;

/// Runs something in this thread. When `limit` has passed, says what everything in dom0 is doing, and ends all requests
/// to dom0. Returns what was said, if so.
pub fn watched<T>(
    dom0: &Dom0,
    limit: Option<Duration>,
    run: impl FnOnce() -> T,
) -> (T, Option<String>) {
    let Some(limit) = limit else {
        return (run(), None);
    };
    std::thread::scope(|scope| {
        let (done, ended) = mpsc::channel::<()>();
        let watcher = scope.spawn(move || {
            match ended.recv_timeout(limit) {
                Err(RecvTimeoutError::Timeout) => {}
                _ => return None,
            }
            let began = Instant::now();
            let said = match dom0.sh_timeout(DOING, Duration::from_secs(60)) {
                Ok(out) => out.text(),
                Err(why) => format!("dom0 does not say what it does: {why}"),
            };
            dom0.note(&format!("=== too late after {limit:?}:\n{said}"));
            dom0.end();
            Some(format!(
                "({:.1} s to ask)\n{said}",
                began.elapsed().as_secs_f64()
            ))
        });
        let result = run();
        drop(done);
        (result, watcher.join().unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scenario_has_three_times_its_usual_time() {
        assert_eq!(limit(10.0), Duration::from_secs(240));
        assert_eq!(limit(200.0), Duration::from_secs(600));
    }
}
