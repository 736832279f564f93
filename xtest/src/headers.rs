//! Debian's kernel headers, in the tree that they were unpacked to.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The folder of the headers of a kernel release, below the unpacked tree `root`.
pub fn folder(root: &Path, release: &str) -> PathBuf {
    root.join(format!("usr/src/linux-headers-{release}"))
}

/// Makes the headers work from where they were unpacked. The only absolute paths in them are those
/// in their `Makefile`.
pub fn relocate(root: &Path, release: &str) -> Result<()> {
    let makefile = folder(root, release).join("Makefile");
    let text = std::fs::read_to_string(&makefile)
        .with_context(|| format!("reading {}", makefile.display()))?;
    let here = format!("{}/usr/src/", root.display());
    std::fs::write(&makefile, text.replace("/usr/src/", &here))?;
    Ok(())
}
