//! Builds the payloads of `patches/`: kernel modules, with the unpacked headers of the guests' kernels.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};

use crate::fetch::Root;
use crate::headers;
use crate::host::{self, newer};
use crate::paths::Paths;
use crate::toolchain;

/// Debian's compiler for the kernels of this release.
const CC: &str = "gcc-12";

/// Which payloads to build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Those of `patches/` itself.
    Examples,
    /// Those of `patches/test/` too.
    All,
    /// Of all, the modules of these names.
    These(&'static [&'static str]),
}

/// Builds all payloads that are out of date, by one `make`.
pub fn build_all(paths: &Paths, root: &Root, which: Which) -> Result<()> {
    let all = paths.payloads(&root.release);
    let mut stale = Vec::new();
    for source in sources(&paths.workspace.join("patches"), which)? {
        let made = all.join(&source.name);
        if !source.up_to_date(&made.join(format!("{}.ko", source.name)))? {
            source.copy(&made)?;
            stale.push(source.name);
        }
    }
    if stale.is_empty() {
        return Ok(());
    }
    let (count, release) = (stale.len(), &root.release);
    eprintln!("xtest: building {count} payloads for {release}");
    build(&stale, &all, root)
}

/// Payloads built for a kernel: name and file.
pub fn built(paths: &Paths, release: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut all = Vec::new();
    for Source { name, .. } in sources(&paths.workspace.join("patches"), Which::All)? {
        let file = paths
            .payloads(release)
            .join(&name)
            .join(format!("{name}.ko"));
        if file.is_file() {
            all.push((name, file));
        }
    }
    Ok(all)
}

/// The source of a payload.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Source {
    /// The module's name.
    name: String,
    files: Vec<PathBuf>,
    /// Headers in the folder above, which several payloads share.
    shared: Vec<PathBuf>,
}

impl Source {
    fn up_to_date(&self, made: &Path) -> Result<bool> {
        let mut files = self.files.iter().chain(&self.shared);
        Ok(made.is_file() && !files.any(|file| newer(file, made)))
    }

    /// Copies the source to the folder where it is built. The folder is emptied first.
    fn copy(&self, made: &Path) -> Result<()> {
        if made.exists() {
            std::fs::remove_dir_all(made)?;
        }
        std::fs::create_dir_all(made)?;
        let above = made.parent().context("a folder without one above")?;
        for (files, to) in [(&self.files, made), (&self.shared, above)] {
            for file in files {
                std::fs::copy(file, to.join(file.file_name().unwrap_or_default()))?;
            }
        }
        Ok(())
    }
}

/// The sources in `patches/*`, and in `patches/test/*` if wanted.
fn sources(patches: &Path, which: Which) -> Result<Vec<Source>> {
    let mut dirs = vec![patches.to_path_buf()];
    if which != Which::Examples {
        dirs.push(patches.join("test"));
    }
    let mut found = Vec::new();
    for dir in dirs {
        let mut shared = files_of(&dir)?;
        shared.retain(|file| file.extension().is_some_and(|e| e == "h"));
        for entry in std::fs::read_dir(&dir)? {
            let path = entry?.path();
            if let Ok(kbuild) = std::fs::read_to_string(path.join("Kbuild")) {
                let name = module_name(&kbuild)
                    .with_context(|| format!("{}/Kbuild makes no module", path.display()))?;
                found.push(Source {
                    name,
                    files: files_of(&path)?,
                    shared: shared.clone(),
                });
            }
        }
    }
    if let Which::These(names) = which {
        found.retain(|source| names.contains(&source.name.as_str()));
    }
    found.sort();
    Ok(found)
}

fn files_of(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry?.path();
        if path.is_file() {
            files.push(path);
        }
    }
    Ok(files)
}

/// Builds these modules, each in its folder below `all`.
fn build(names: &[String], all: &Path, root: &Root) -> Result<()> {
    let folders: Vec<String> = names.iter().map(|name| format!("{name}/")).collect();
    let kbuild = format!("obj-m := {}\n", folders.join(" "));
    std::fs::write(all.join("Kbuild"), kbuild)?;
    let modules: Vec<PathBuf> = names
        .iter()
        .map(|name| all.join(name).join(format!("{name}.ko")))
        .collect();
    make(all, &modules, root)
}

/// Builds these modules, each from one C file in `dir`.
pub fn build_folder(dir: &Path, names: &[String], root: &Root) -> Result<()> {
    let objects: Vec<String> = names.iter().map(|name| format!("{name}.o")).collect();
    let kbuild = format!("obj-m := {}\n", objects.join(" "));
    std::fs::write(dir.join("Kbuild"), kbuild)?;
    let modules: Vec<PathBuf> = names
        .iter()
        .map(|name| dir.join(format!("{name}.ko")))
        .collect();
    make(dir, &modules, root)
}

/// Runs kbuild in a folder with a `Kbuild`. It must make these files.
fn make(all: &Path, modules: &[PathBuf], root: &Root) -> Result<()> {
    let mut make = Command::new("make");
    make.arg("-C")
        .arg(headers::folder(&root.dir, &root.release));
    make.arg(format!("M={}", all.display()));
    make.arg(format!("-j{}", host::cpus()));
    let own = toolchain::bin(&root.dir);
    if own.is_dir() {
        make.args(toolchain::variables(&own));
    } else {
        make.arg(format!("CC={CC}"));
        host_libraries(&mut make, all, root)?;
    }
    // The payload gets no BTF of its own: it is not needed, and making it takes one more program.
    make.arg("CONFIG_DEBUG_INFO_BTF_MODULES=");
    // Payloads may use symbols that are not exported.
    make.args(["KBUILD_MODPOST_WARN=1", "modules"]);
    // A `make` that runs xtest must not pass its options on.
    for var in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL"] {
        make.env_remove(var);
    }
    // The newest kbuild refuses a folder with this file of an earlier run: it takes it for an unclean tree.
    let _ = std::fs::remove_file(all.join("modules.order"));
    let out = make.output().context("running make")?;
    let log = all.join("build.log");
    std::fs::write(&log, [out.stdout.as_slice(), b"\n", &out.stderr].concat())?;
    let missing = modules.iter().find(|file| !file.is_file());
    if let (false, _) | (_, Some(_)) = (out.status.success(), missing) {
        let said = String::from_utf8_lossy(&out.stderr);
        bail!("payloads were not built (see {}):\n{said}", log.display());
    }
    Ok(())
}

/// Gives `make` the libraries of objtool from the unpacked tree, if the host has none. Only those, because an
/// unpacked libc would not fit the host's dynamic linker.
fn host_libraries(make: &mut Command, made: &Path, root: &Root) -> Result<()> {
    if Path::new("/usr/lib/x86_64-linux-gnu/libelf.so.1").exists() {
        return Ok(());
    }
    let own = made.join(".libs");
    std::fs::create_dir_all(&own)?;
    for dir in ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"] {
        for lib in ["libelf.so.1", "libcrypto.so.3"] {
            let file = root.dir.join(dir).join(lib);
            if file.is_file() {
                std::fs::copy(file, own.join(lib))?;
            }
        }
    }
    make.env("LD_LIBRARY_PATH", own);
    Ok(())
}

/// `NAME` of a kbuild file's `obj-m := NAME.o`.
fn module_name(kbuild: &str) -> Option<String> {
    let line = kbuild.lines().find(|line| line.starts_with("obj-m"))?;
    let object = line.split_whitespace().last()?;
    object.strip_suffix(".o").map(str::to_owned)
}
