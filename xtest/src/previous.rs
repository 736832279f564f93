//! An earlier build of xen-locus, made from the repository's history.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::host::{checked, piped};
use crate::paths::{cargo, Paths};
use crate::room;

/// The commit before the tree was divided into crates. A guest that this build patched must be of use to every later
/// one.
const COMMIT: &str = "4d0ae248e9a30058d473d7a8190909bb08a6293a";

/// The programs of that build, on the host.
#[derive(Debug)]
pub struct Previous {
    /// `xen-locus`.
    pub tool: PathBuf,
    /// `xen-locus-faults`, which a test can kill at any of its calls.
    pub faults: PathBuf,
}

/// Builds them, unless that was done before. `None` where the repository's history does not reach back so far, as in a
/// shallow clone.
///
/// # Errors
///
/// git or cargo failed.
pub fn build(paths: &Paths) -> Result<Option<Previous>> {
    let git = |args: &[&str]| {
        let mut cmd = Command::new("git");
        cmd.arg("-C").arg(&paths.workspace).args(args);
        cmd
    };
    let commit = format!("{COMMIT}^{{commit}}");
    let known = git(&["cat-file", "-e", &commit]).output();
    if !known.is_ok_and(|out| out.status.success()) {
        return Ok(None);
    }
    let base = paths.base.join("previous");
    let tree = base.join("tree");
    if !tree.join("Cargo.toml").exists() {
        fs::create_dir_all(&tree)?;
        room::check(&base, room::PREVIOUS, "the earlier version of xen-locus")?;
        let archive = checked(&mut git(&["archive", COMMIT]))?.stdout;
        let tree = tree.to_str().context("a path that is not UTF-8")?;
        piped("tar", &["-x", "-C", tree], archive)?;
    }
    let target = base.join("target");
    for args in [
        &["--bin", "xen-locus"][..],
        &["--features", "faults", "--bin", "xen-locus-faults"],
    ] {
        let mut cmd = Command::new(cargo());
        cmd.args(["build", "--release", "--locked", "-p", "xen-locus"]);
        cmd.args(args);
        cmd.current_dir(&tree).env("CARGO_TARGET_DIR", &target);
        checked(&mut cmd)?;
    }
    let stripped = |name: &str| -> Result<PathBuf> {
        let small = base.join(name);
        let mut cmd = Command::new("strip");
        cmd.args(["--strip-debug", "-o"]).arg(&small);
        cmd.arg(target.join("release").join(name));
        checked(&mut cmd)?;
        Ok(small)
    };
    Ok(Some(Previous {
        tool: stripped("xen-locus")?,
        faults: stripped("xen-locus-faults")?,
    }))
}
