//! Room on the disk: a run that begins without enough of it would end in the middle of something else.

use std::path::Path;

use anyhow::{bail, Context, Result};
use rustix::fs::statvfs;

const MIB: u64 = 1 << 20;
/// The packages of a release of Debian, downloaded and unpacked, in bytes. Those of Debian 12 take 720 MiB, and apt's lists
/// some more.
pub const SUITE: u64 = 1024 * MIB;
/// Programs, payloads and images, built for the first time. They take 1.2 GiB, most of it what the compiler keeps.
pub const BUILDS: u64 = 1536 * MIB;
/// The source of a kernel: its package, and the folders of it that are unpacked.
pub const SOURCE: u64 = 512 * MIB;
/// An earlier version of xen-locus, unpacked and built. It takes 600 MiB.
pub const PREVIOUS: u64 = 768 * MIB;
/// Logs of a run, and what is built again.
pub const RUN: u64 = 256 * MIB;

/// Checks that `need` bytes can be written below `dir`, which need not exist yet. `what` needs them.
///
/// # Errors
/// A sentence that says what is missing where, and what to do.
pub fn check(dir: &Path, need: u64, what: &str) -> Result<()> {
    let exists = |dir: &&Path| dir.exists();
    let nearest = dir.ancestors().find(exists).unwrap_or(Path::new("."));
    let disk = statvfs(nearest).with_context(|| format!("looking at {}", nearest.display()))?;
    enough(dir, need, disk.f_bavail.saturating_mul(disk.f_frsize), what)
}

fn enough(dir: &Path, need: u64, free: u64, what: &str) -> Result<()> {
    if free < need {
        bail!(
            "{what} needs {} MiB below {}, and its disk has {} MiB free: make room there, or set CARGO_TARGET_DIR to a folder \
             on a larger disk",
            need.div_ceil(MIB),
            dir.display(),
            free / MIB
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_is_too_small_is_named_with_what_is_needed() {
        let dir = std::env::temp_dir().join("not/there/yet");
        check(&dir, 0, "nothing").unwrap();
        let said = check(&dir, u64::MAX, "a run").unwrap_err().to_string();
        assert!(
            said.starts_with("a run needs 17592186044416 MiB below "),
            "{said}"
        );
        assert!(said.contains("not/there/yet") && said.contains("CARGO_TARGET_DIR"));
        enough(&dir, RUN, RUN, "a run").unwrap();
        let said = enough(&dir, RUN, RUN - 1, "a run").unwrap_err().to_string();
        assert!(
            said.contains("needs 256 MiB") && said.contains("has 255 MiB free"),
            "{said}"
        );
    }
}
