//! How long the testbed waits. Everything runs on an emulated processor, on hosts of very different
//! speed: `XTEST_SLOW=3` makes every limit three times as long.

use std::sync::OnceLock;
use std::time::Duration;

/// Until dom0's agent is there.
pub const BOOT: Duration = Duration::from_secs(180);
/// What the agent gets on top of a command's own limit: emulated machines have been seen to stand
/// still, dom0 and all, for two minutes.
pub const GRACE: Duration = Duration::from_secs(150);
/// For a file to or from dom0.
pub const TRANSFER: Duration = Duration::from_secs(300);
/// A guest that gives no sign of life for so long is hung.
pub const SILENCE: Duration = Duration::from_secs(180);

/// A limit, adapted to the host.
pub fn scaled(limit: Duration) -> Duration {
    static FACTOR: OnceLock<f64> = OnceLock::new();
    let factor = *FACTOR.get_or_init(|| {
        let given = std::env::var("XTEST_SLOW")
            .ok()
            .and_then(|v| v.parse::<f64>().ok());
        given.filter(|f| (1.0..=100.0).contains(f)).unwrap_or(1.0)
    });
    limit.mul_f64(factor)
}
