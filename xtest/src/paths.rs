//! The folders of the workspace, of cargo and of the testbed.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};

/// Folders of one run.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The workspace's root folder.
    pub workspace: PathBuf,
    /// Cargo's target folder.
    pub target: PathBuf,
    /// Folder of all that the testbed makes: `target/xtest`.
    pub base: PathBuf,
}

impl Paths {
    /// Asks cargo, which knows `CARGO_TARGET_DIR` and its configuration files.
    pub fn find() -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        let mut cmd = Command::new(cargo());
        cmd.args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
        ]);
        if manifest.exists() {
            cmd.arg("--manifest-path").arg(&manifest);
        }
        let out = cmd.output().context("running cargo metadata")?;
        if !out.status.success() {
            bail!("cargo metadata: {}", String::from_utf8_lossy(&out.stderr));
        }
        let meta: serde_json::Value = serde_json::from_slice(&out.stdout)?;
        let field = |name: &str| -> Result<PathBuf> {
            let text = meta.get(name).and_then(|v| v.as_str());
            Ok(PathBuf::from(text.with_context(|| {
                format!("cargo metadata has no {name}")
            })?))
        };
        let target = field("target_directory")?;
        Ok(Self {
            workspace: field("workspace_root")?,
            base: target.join("xtest"),
            target,
        })
    }

    /// Folder of one profile's logs, emptied before a run.
    pub fn logs(&self, profile: &str) -> PathBuf {
        self.base.join("logs").join(profile)
    }

    /// Folder of the built payloads for a kernel release: `NAME/NAME.ko`.
    pub fn payloads(&self, release: &str) -> PathBuf {
        self.base.join("payloads").join(release)
    }
}

/// The cargo that runs xtest, or else the one on the search path.
pub fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}
