//! How long the testbed waits. Everything runs on an emulated processor, on hosts of very different speed.
//! The environment variable `XTEST_SLOW=3` makes every limit three times as long.

use std::sync::OnceLock;
use std::time::Duration;

/// Until dom0's agent answers.
pub const BOOT: Duration = Duration::from_secs(180);
/// Added to a command's own limit until the agent counts as silent. An emulated machine sometimes stops for
/// up to two minutes, dom0 included.
pub const GRACE: Duration = Duration::from_secs(150);
/// For a file to or from dom0.
pub const TRANSFER: Duration = Duration::from_secs(300);
/// A guest that does not respond for so long is hung.
pub const SILENCE: Duration = Duration::from_secs(180);

/// A limit, multiplied by `XTEST_SLOW`.
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
