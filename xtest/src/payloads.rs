//! Builds the payloads of `patches/`: kernel modules, with the extracted headers of the guests'
//! kernel.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, ensure, Context, Result};

use crate::fetch::Root;
use crate::image::newer;
use crate::paths::Paths;
use crate::toolchain;

/// Debian's compiler for the kernels of this release.
const CC: &str = "gcc-12";

/// Makes Debian's headers work from where they were unpacked: the only absolute paths in them are
/// those in their `Makefile`.
pub fn relocate_headers(root: &Path, release: &str) -> Result<()> {
    let makefile = headers(root, release).join("Makefile");
    let text = std::fs::read_to_string(&makefile)
        .with_context(|| format!("reading {}", makefile.display()))?;
    let here = format!("{}/usr/src/", root.display());
    std::fs::write(&makefile, text.replace("/usr/src/", &here))?;
    Ok(())
}

fn headers(root: &Path, release: &str) -> PathBuf {
    root.join(format!("usr/src/linux-headers-{release}"))
}

/// Builds every payload that is not up to date.
pub fn build_all(paths: &Paths, root: &Root) -> Result<()> {
    for (name, source) in sources(&paths.workspace.join("patches"))? {
        let made = paths.payloads(&root.release).join(&name);
        if up_to_date(&source, &made.join(format!("{name}.ko")))? {
            continue;
        }
        eprintln!("xtest: building payload {name} for {}", root.release);
        build(&name, &source, &made, root)?;
    }
    Ok(())
}

/// Payloads built for a kernel: name and file.
pub fn built(paths: &Paths, release: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut all = Vec::new();
    for (name, _) in sources(&paths.workspace.join("patches"))? {
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

/// The modules of `patches/*` and `patches/test/*`: name and folder of the source.
fn sources(patches: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for dir in [patches.to_path_buf(), patches.join("test")] {
        if !dir.is_dir() {
            continue;
        }
        for entry in std::fs::read_dir(&dir)? {
            let path = entry?.path();
            let module = ["Kbuild", "Makefile"]
                .iter()
                .find_map(|file| module_name(&std::fs::read_to_string(path.join(file)).ok()?));
            if let Some(name) = module {
                found.push((name, path));
            }
        }
    }
    found.sort();
    Ok(found)
}

fn up_to_date(source: &Path, made: &Path) -> Result<bool> {
    for entry in std::fs::read_dir(source)? {
        let path = entry?.path();
        if path.is_file() && newer(&path, made) {
            return Ok(false);
        }
    }
    Ok(made.is_file())
}

fn build(name: &str, source: &Path, made: &Path, root: &Root) -> Result<()> {
    if made.exists() {
        std::fs::remove_dir_all(made)?;
    }
    std::fs::create_dir_all(made)?;
    for entry in std::fs::read_dir(source)? {
        let path = entry?.path();
        if let (true, Some(file)) = (path.is_file(), path.file_name()) {
            std::fs::copy(&path, made.join(file))?;
        }
    }
    let mut make = Command::new("make");
    make.arg("-C").arg(headers(&root.dir, &root.release));
    make.arg(format!("M={}", made.display()));
    let own = toolchain::bin(&root.dir);
    if own.is_dir() {
        make.args(toolchain::variables(&own));
    } else {
        make.arg(format!("CC={CC}"));
        host_libraries(&mut make, made, root)?;
    }
    // no BTF of the payload's own: nobody needs it, and making it takes one more program
    make.arg("CONFIG_DEBUG_INFO_BTF_MODULES=");
    // payloads may use symbols that are not exported
    make.args(["KBUILD_MODPOST_WARN=1", "modules"]);
    // a make that runs us must not hand its own switches down
    for var in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL"] {
        make.env_remove(var);
    }
    let out = make.output().context("running make")?;
    let log = made.join("build.log");
    std::fs::write(&log, [out.stdout.as_slice(), b"\n", &out.stderr].concat())?;
    let module = made.join(format!("{name}.ko"));
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        bail!(
            "payload {name} was not built (see {}):\n{said}",
            log.display()
        );
    }
    ensure!(
        module.is_file(),
        "payload {name}: its build made no {name}.ko"
    );
    Ok(())
}

/// Gives `make` objtool's libraries from the unpacked tree where the host has none; only those, since
/// an unpacked libc would not fit the host's dynamic linker.
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
