//! How long the testbed waits. Everything runs on an emulated processor, on hosts of very different speed.
//! The environment variable `XTEST_SLOW=3` makes every limit three times as long; so does a host on which dom0 took three
//! times as long to boot as usual.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;
use std::time::Duration;

/// Until dom0's agent answers.
pub const BOOT: Duration = Duration::from_secs(180);
/// The same, if dom0 is a whole Debian.
pub const BOOT_DEBIAN: Duration = Duration::from_secs(600);
/// A whole Debian takes so many times as long as the usual dom0.
pub const DEBIAN_BOOTS: u32 = 4;
/// Added to a command's own limit until the agent counts as silent. An emulated machine sometimes stops for
/// up to two minutes, dom0 included.
pub const GRACE: Duration = Duration::from_secs(150);
/// For a file to or from dom0.
pub const TRANSFER: Duration = Duration::from_secs(300);
/// A guest that does not respond for so long is hung.
pub const SILENCE: Duration = Duration::from_secs(180);

/// The seconds that dom0 takes to boot on the machine on which the limits were made.
const USUAL_BOOT: f64 = 21.0;
/// The most that a slow boot makes of a limit.
const SLOWEST: f64 = 8.0;
/// How slow the host is, in thousandths, by the last boot of dom0.
static SLOW: AtomicU64 = AtomicU64::new(1000);

/// Notes how long dom0 took to boot.
pub fn booted_in(took: Duration) {
    SLOW.store(thousandths(took), Ordering::Relaxed);
}

fn thousandths(took: Duration) -> u64 {
    let slow = Duration::from_secs_f64((took.as_secs_f64() / USUAL_BOOT).clamp(1.0, SLOWEST));
    u64::try_from(slow.as_millis()).unwrap_or(1000)
}

/// A limit, multiplied by `XTEST_SLOW` or by how slow the host is.
pub fn scaled(limit: Duration) -> Duration {
    static FACTOR: OnceLock<f64> = OnceLock::new();
    let factor = *FACTOR.get_or_init(|| {
        let given = std::env::var("XTEST_SLOW")
            .ok()
            .and_then(|v| v.parse::<f64>().ok());
        given.filter(|f| (1.0..=100.0).contains(f)).unwrap_or(1.0)
    });
    let slow = Duration::from_millis(SLOW.load(Ordering::Relaxed));
    limit.mul_f64(factor.max(slow.as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_as_slow_as_its_boot_but_not_without_end() {
        for (seconds, slow) in [(5, 1000), (21, 1000), (42, 2000), (9999, 8000)] {
            assert_eq!(thousandths(Duration::from_secs(seconds)), slow);
        }
    }
}
