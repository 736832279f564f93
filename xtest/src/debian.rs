//! A dom0 that is a real Debian 12: packages installed by dpkg on a disk, systemd, and the init scripts of Xen's packages.
//!
//! No root is needed: packages are unpacked here, and dpkg configures them in an emulated machine, once. Each boot gets the
//! disk as it was then, and on it what `make install` installs. Only the boot loader and the initramfs are the testbed's.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};

use crate::cpio::Cpio;
use crate::elf;
use crate::fetch::{self, Root};
use crate::host::{checked, replace, tail};
use crate::image::add_modules;
use crate::limits;
use crate::paths::Paths;
use crate::suites::{BOOKWORM, INSTALLED};

/// The folder of all that is made here, below `target/xtest`; among results, the release of Debian that they depend on.
pub const NAME: &str = "bookworm-dom0";
/// Size of the disk, in MiB. Its file has holes.
const DISK_MIB: u64 = 3072;
/// Longest time in which the packages are configured.
const INSTALLING: Duration = Duration::from_secs(2400);
/// What the machine says last that installs the packages.
const MADE: &str = "the disk is made";

/// Drivers for the disk and for the agent's port.
const DISK_MODULES: &[&str] = &[
    "crc32c_generic",
    "virtio_pci",
    "virtio_blk",
    "ext4",
    "virtio_console",
];
/// What else the kernel of this dom0 can load.
const OTHER_MODULES: &[&str] = &[
    "autofs4",
    "binfmt_misc",
    "loop",
    "tun",
    "xen-blkback",
    "xen-evtchn",
    "xen-gntalloc",
    "xen-gntdev",
    "xen-netback",
    "xen-privcmd",
    "xenfs",
];

const INSTALL: &str = include_str!("../debian/install");
const INIT: &str = include_str!("../debian/init");
const AGENT: &str = include_str!("../debian/xtest-agent.service");

/// What a boot of this dom0 needs beside the other images.
#[derive(Debug, Clone)]
pub struct Debian {
    /// The disk. It must not be written.
    pub disk: PathBuf,
    /// An archive for the initramfs, behind the usual dom0's.
    pub archive: PathBuf,
}

/// Makes it, as far as it is out of date.
pub fn prepare(paths: &Paths, root: &Root) -> Result<Debian> {
    let dir = paths.base.join(NAME);
    std::fs::create_dir_all(&dir)?;
    let made = Debian {
        disk: make_disk(paths, root, &dir)?,
        archive: dir.join("boot.cpio"),
    };
    replace(&made.archive, &boot_archive(paths, root, &dir)?)?;
    Ok(made)
}

fn make_disk(paths: &Paths, root: &Root, dir: &Path) -> Result<PathBuf> {
    let list = dir.join("packages.json");
    let packages = fetch::package_files(paths, &BOOKWORM, INSTALLED, &list)?;
    // What a result depends on (`inputs.rs`), and this disk.
    let mut stamp = format!("{DISK_MIB} {}\n{INSTALL}", root.release);
    for file in &packages {
        let name = file.file_name().unwrap_or_default();
        stamp += &format!("{}\n", name.to_string_lossy());
    }
    let disk = dir.join("disk.img");
    let stamp_file = dir.join("stamp.json");
    let stamp = serde_json::to_string_pretty(&stamp)?;
    if disk.is_file() && std::fs::read_to_string(&stamp_file).is_ok_and(|old| old == stamp) {
        return Ok(disk);
    }
    let _ = std::fs::remove_file(&disk);
    let began = Instant::now();
    let count = packages.len();
    eprintln!("xtest: unpacking {count} packages of Debian 12 for a dom0");
    let tree = dir.join("unpacked");
    unpack(root, &packages, &tree)?;
    let new = dir.join("disk.new");
    let _ = std::fs::remove_file(&new);
    File::create(&new)?.set_len(DISK_MIB << 20)?;
    // It is not on the search path of all users.
    let mut mke2fs = Command::new("/sbin/mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-d"]);
    mke2fs.args([&tree, &new]);
    checked(&mut mke2fs).context("e2fsprogs is needed")?;
    std::fs::remove_dir_all(&tree)?;
    eprintln!("xtest: configuring them, in an emulated machine");
    let archive = dir.join("install.cpio");
    let mut c = Cpio::new();
    c.file("init", 0o755, INSTALL.as_bytes())?;
    c.host_file("xtest/busybox", 0o755, &root.dir.join("bin/busybox"))?;
    add_modules(&mut c, root, "xtest/modules", DISK_MODULES)?;
    replace(&archive, &c.finish()?)?;
    install(root, &archive, &new, &dir.join("install.log"))?;
    eprintln!("xtest: that took {:.0} s", began.elapsed().as_secs_f64());
    std::fs::rename(&new, &disk)?;
    replace(&stamp_file, stamp.as_bytes())?;
    Ok(disk)
}

/// Unpacks packages and the kernel's modules, and makes what dpkg knows of packages that are unpacked and not configured. `$1` is
/// a package, `$2` the tree.
///
/// `dpkg-deb -x` would put a folder in the place of a link to `usr`. The tree has no documents.
const UNPACK: &str = r#"
set -e
known=$2/var/lib/dpkg
control=$2.control
dpkg-deb --fsys-tarfile "$1" >"$2.tar"
tar -x -p --no-same-owner --keep-directory-symlink -C "$2" --exclude='./usr/share/doc/*' \
	--exclude='./usr/share/info/*' --exclude='./usr/share/locale/*' <"$2.tar"
rm -rf "$control"
dpkg-deb -e "$1" "$control"
name=$(sed -n 's/^Package: //p' "$control/control")
grep -q '^Multi-Arch: same' "$control/control" && name=$name:amd64
(sed '1aStatus: install ok unpacked' "$control/control"; echo) >>"$known/status"
rm "$control/control"
for file in "$control"/*; do
	[ ! -e "$file" ] || cp "$file" "$known/info/$name.${file##*/}"
done
tar -t <"$2.tar" | sed 's,^\.,,; s,/$,,; s,^$,/.,' >"$known/info/$name.list"
rm -r "$control" "$2.tar"
"#;

fn unpack(root: &Root, packages: &[PathBuf], tree: &Path) -> Result<()> {
    if tree.exists() {
        std::fs::remove_dir_all(tree)?;
    }
    for name in ["bin", "sbin", "lib", "lib64"] {
        std::fs::create_dir_all(tree.join("usr").join(name))?;
        std::os::unix::fs::symlink(format!("usr/{name}"), tree.join(name))?;
    }
    let known = tree.join("var/lib/dpkg");
    for folder in ["info", "updates"] {
        std::fs::create_dir_all(known.join(folder))?;
    }
    std::fs::write(known.join("info/format"), "1\n")?;
    for package in packages {
        let mut sh = Command::new("sh");
        checked(
            sh.args(["-c", UNPACK, "sh"])
                .args([package.as_path(), tree]),
        )?;
    }
    let modules = tree.join("usr/lib/modules").join(&root.release);
    std::fs::create_dir_all(modules.join("kernel"))?;
    let names = [DISK_MODULES, OTHER_MODULES].concat();
    for module in elf::modules(&root.modules()?, &names)? {
        std::fs::write(modules.join("kernel").join(&module.name), &module.data)?;
    }
    std::fs::write(modules.join("modules.order"), "")?;
    for list in ["modules.builtin", "modules.builtin.modinfo"] {
        let from = root.modules()?.with_file_name(list);
        std::fs::copy(&from, modules.join(list))
            .with_context(|| format!("copying {}", from.display()))?;
    }
    Ok(())
}

/// Boots the machine that installs the packages, and waits for its end.
fn install(root: &Root, archive: &Path, disk: &Path, log: &Path) -> Result<()> {
    let text = |path: &Path| path.display().to_string().replace(',', ",,");
    let mut qemu = Command::new("setpriv");
    qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-nodefaults"]);
    qemu.args(["-no-reboot", "-accel", "tcg,thread=single", "-cpu"]);
    qemu.args(["qemu64,+rdrand", "-m", "2048", "-display", "none"]);
    qemu.args(["-monitor", "none", "-serial"]);
    qemu.arg(format!("file:{}", text(log)));
    qemu.arg("-kernel").arg(root.kernel()?);
    qemu.arg("-initrd").arg(archive);
    qemu.args([
        "-append",
        "console=ttyS0 loglevel=4 panic=-1 no_timer_check mitigations=off",
    ]);
    qemu.arg("-drive").arg(format!(
        "file={},format=raw,if=virtio,cache.no-flush=on",
        text(disk)
    ));
    let _ = std::fs::remove_file(log);
    let mut child = qemu
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("starting QEMU through setpriv (util-linux)")?;
    let limit = Instant::now() + limits::scaled(INSTALLING);
    while child.try_wait()?.is_none() {
        if Instant::now() > limit {
            child.kill()?;
            child.wait()?;
            bail!("installing packages takes too long: {}", tail(log, 10));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    let said = std::fs::read(log).unwrap_or_default();
    ensure!(
        String::from_utf8_lossy(&said).contains(MADE),
        "the packages could not be installed (all of it: {}):\n{}",
        log.display(),
        tail(log, 20)
    );
    Ok(())
}

/// The first process of a boot, its drivers, and what `make install` installs.
fn boot_archive(paths: &Paths, root: &Root, dir: &Path) -> Result<Vec<u8>> {
    let installed = dir.join("installed");
    if installed.exists() {
        std::fs::remove_dir_all(&installed)?;
    }
    let mut make = Command::new("make");
    make.args(["-s", "install-files"])
        .arg(format!("DESTDIR={}", installed.display()))
        .arg(format!("BUILT={}", paths.target.join("release").display()))
        .current_dir(&paths.workspace);
    checked(&mut make)?;
    // That has debug information, which is most of it. The same program without it is among the others.
    std::fs::remove_file(installed.join("usr/sbin/xen-locus"))?;
    let mut c = Cpio::new();
    c.file("init", 0o755, INIT.as_bytes())?;
    c.file("debian/xtest-agent.service", 0o644, AGENT.as_bytes())?;
    add_modules(&mut c, root, "debian/modules", DISK_MODULES)?;
    c.tree("debian/installed", &installed)?;
    c.finish()
}
