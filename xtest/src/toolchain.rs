//! The compiler and kbuild's programs of another Debian release, made to run on the host. Each runs with the
//! dynamic linker and the libraries of its own release, because it needs a newer C library than the host's,
//! or an older OpenSSL.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Triplet in the names of Debian's compiler and binutils.
const TRIPLET: &str = "x86_64-linux-gnu";
/// Binutils that kbuild calls, and with them the compiler.
const BINUTILS: &[&str] = &[
    "ar", "as", "ld", "nm", "objcopy", "objdump", "readelf", "strip",
];
/// What the compiler's driver runs beside `as`.
const PASSES: &[&str] = &["cc1"];

/// The folder of the programs to call: `TOOL` for each of the binutils, `gcc` for the compiler.
pub fn bin(root: &Path) -> PathBuf {
    root.join("toolchain")
}

/// Variables for `make` that name the programs in [`bin`].
pub fn variables(bin: &Path) -> impl Iterator<Item = String> + '_ {
    let own = BINUTILS.iter().filter(|&&tool| tool != "as");
    own.map(|tool| (tool.to_uppercase(), *tool))
        .chain([("CC".to_owned(), "gcc")])
        .map(|(name, tool)| format!("{name}={}", bin.join(tool).display()))
}

/// Replaces each of kbuild's programs in an unpacked tree by a script, and makes the folder [`bin`].
pub fn relocate(root: &Path) -> Result<()> {
    let run = Runner::of(root)?;
    let bin = bin(root);
    std::fs::create_dir_all(&bin)?;
    for tool in BINUTILS {
        let program = root.join(format!("usr/bin/{TRIPLET}-{tool}"));
        run.script(&bin.join(tool), &program, "")?;
    }
    let mut compiler = None;
    for entry in std::fs::read_dir(root.join("usr/bin"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let version = name.strip_prefix(&format!("{TRIPLET}-gcc-"));
        if let Some(version) = version.filter(|v| v.bytes().all(|b| b.is_ascii_digit())) {
            compiler = Some((path.clone(), version.to_owned()));
        }
    }
    let (gcc, version) = compiler.with_context(|| {
        format!(
            "{}: no compiler {TRIPLET}-gcc-VERSION in usr/bin",
            root.display()
        )
    })?;
    for pass in PASSES {
        let program = ["libexec", "lib"]
            .map(|dir| root.join(format!("usr/{dir}/gcc/{TRIPLET}/{version}/{pass}")))
            .into_iter()
            .find(|p| p.is_file())
            .with_context(|| format!("{}: no {pass} of gcc-{version}", root.display()))?;
        run.script(&bin.join(pass), &program, "")?;
    }
    // The compiler's driver looks there first for the programs that it runs.
    let passes = format!("'-B{}'", bin.display());
    run.script(&bin.join("gcc"), &gcc, &passes)?;

    let kbuild = std::fs::read_dir(root.join("usr/lib"))?
        .filter_map(Result::ok)
        .map(|e| e.path())
        .filter(|p| {
            p.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("linux-kbuild-"))
        });
    for dir in kbuild {
        run.replace_programs(&dir)?;
    }
    Ok(())
}

/// How a program of the tree is run.
struct Runner {
    linker: PathBuf,
    libraries: String,
}

impl Runner {
    fn of(root: &Path) -> Result<Self> {
        let dirs = [format!("lib/{TRIPLET}"), format!("usr/lib/{TRIPLET}")].map(|d| root.join(d));
        let linker = dirs
            .iter()
            .map(|d| d.join("ld-linux-x86-64.so.2"))
            .find(|p| p.exists())
            .with_context(|| format!("{}: no dynamic linker", root.display()))?;
        let libraries = dirs.map(|d| d.display().to_string()).join(":");
        Ok(Self { linker, libraries })
    }

    fn script(&self, at: &Path, program: &Path, first: &str) -> Result<()> {
        let text = format!(
            "#!/bin/sh\nexec '{}' --library-path '{}' '{}' {first} \"$@\"\n",
            self.linker.display(),
            self.libraries,
            program.display()
        );
        std::fs::write(at, text).with_context(|| format!("writing {}", at.display()))?;
        std::fs::set_permissions(at, std::fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    fn replace_programs(&self, dir: &Path) -> Result<()> {
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                self.replace_programs(&path)?;
            } else if entry.file_type()?.is_file() && is_program(&path)? {
                let name = entry.file_name().to_string_lossy().into_owned();
                let moved = path.with_file_name(format!("{name}.elf"));
                std::fs::rename(&path, &moved)?;
                // Debian's front ends run PROGRAM.real-KIND, where PROGRAM is what they are called
                if let Some((front, kind)) = name.split_once(".real-") {
                    let called = path.with_file_name(format!("{front}.elf.real-{kind}"));
                    self.script(&called, &moved, "")?;
                }
                self.script(&path, &moved, "")?;
            }
        }
        Ok(())
    }
}

fn is_program(path: &Path) -> Result<bool> {
    use std::io::Read;
    let executable = path.metadata()?.permissions().mode() & 0o111 != 0;
    let mut magic = Vec::new();
    std::fs::File::open(path)?.take(4).read_to_end(&mut magic)?;
    Ok(executable && magic == b"\x7fELF")
}
