//! The kernel's own livepatches, built from the package of its source.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{ensure, Context, Result};

use crate::fetch::{self, Root};
use crate::host::checked;
use crate::paths::Paths;
use crate::payloads;
use crate::room;
use crate::suites::Suite;

/// Folders of the source that are unpacked.
const FOLDERS: [&str; 2] = ["samples/livepatch", "lib/livepatch"];

/// Builds all modules of the kernel's samples and tests of livepatch unchanged, unless that was done before.
/// Returns name and file of each. The source has the version of the unpacked kernel.
pub fn own_livepatches(
    paths: &Paths,
    suite: &Suite,
    root: &Root,
) -> Result<Vec<(String, PathBuf)>> {
    let dir = paths.base.join("own-livepatches").join(&root.release);
    let done = dir.join("done");
    if !done.exists() {
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        std::fs::create_dir_all(&dir)?;
        unpack(paths, suite, root, &dir)?;
        for folder in FOLDERS {
            payloads::build_folder(&dir.join(folder), &objects(&dir.join(folder))?, root)?;
        }
        std::fs::write(done, "")?;
    }
    let mut all = Vec::new();
    for folder in FOLDERS {
        for name in objects(&dir.join(folder))? {
            let file = dir.join(folder).join(format!("{name}.ko"));
            ensure!(file.is_file(), "{} was not built", file.display());
            all.push((name, file));
        }
    }
    Ok(all)
}

/// Downloads the package of the source and unpacks [`FOLDERS`].
fn unpack(paths: &Paths, suite: &Suite, root: &Root, dir: &Path) -> Result<()> {
    let short: Vec<&str> = root.release.splitn(3, '.').take(2).collect();
    let name = format!("linux-source-{}", short.join("."));
    let kernel = format!("linux-image-{}", root.release);
    room::check(dir, room::SOURCE, &name)?;
    let package = fetch::download_beside(paths, suite, &kernel, &name)?;
    checked(Command::new("dpkg-deb").arg("-x").arg(&package).arg(dir))?;
    let archive = dir.join(format!("usr/src/{name}.tar.xz"));
    let mut tar = Command::new("tar");
    tar.arg("-C")
        .arg(dir)
        .args(["--strip-components=1", "-xJf"]);
    tar.arg(&archive);
    tar.args(FOLDERS.map(|folder| format!("{name}/{folder}")));
    checked(&mut tar)?;
    std::fs::remove_file(&archive)?;
    std::fs::remove_file(&package)?;
    Ok(())
}

/// Modules of a folder: all its C files, except those that kbuild generated.
fn objects(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry?.path();
        let text = path.to_string_lossy();
        if path.extension().is_some_and(|e| e == "c") && !text.ends_with(".mod.c") {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            names.push(stem.into_owned());
        }
    }
    names.sort();
    Ok(names)
}
