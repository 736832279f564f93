//! Builds what QEMU boots: the hypervisor, dom0's kernel and initramfs, and what guests boot.
//!
//! dom0's initramfs is several concatenated archives, which Linux accepts: the base, files for HVM guests
//! only, and an overlay with files that change from run to run. A guest's initramfs is one gzipped archive,
//! because libxc unpacks gzip itself and drops what is appended.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{bail, ensure, Context, Result};

use crate::cpio::Cpio;
use crate::elf;
use crate::fetch::Root;
use crate::host::{checked, newer, piped, replace};
use crate::paths::Paths;

/// Drivers that dom0 needs. Those built into the kernel are skipped.
const MODULES: &[&str] = &[
    "xen-evtchn",
    "xen-gntdev",
    "xen-gntalloc",
    "xen-privcmd",
    "xenfs",
    "virtio_pci",
    "virtio_console",
];

/// Modules that scenarios load in guests: small and large ones, with and without dependencies. Some are
/// there only because others need them.
const GUEST_MODULES: &[&str] = &["dummy", "crc8", "crc-itu-t", "nls_utf8", "ext4", "loop"];

/// Xen's programs, from `usr/lib/xen-4.17/bin`.
const XEN_PROGRAMS: &[&str] = &[
    "xl",
    "xenstored",
    "xenconsoled",
    "xenconsole",
    "xen-init-dom0",
    "libxl-save-helper",
    "xenctx",
    "xen-hvmctx",
    "xenstore-control",
];

/// Libraries that are opened at run time, so that no `DT_NEEDED` names them: the first by
/// `pthread_cancel`, the others by xen-locus.
const DLOPENED: &[&str] = &[
    "libgcc_s.so.1",
    "libxenctrl.so.4.17",
    "libxenforeignmemory.so.1",
    "libxencall.so.1",
    "libxenstore.so.4",
    "libxendevicemodel.so.1",
    "libxentoollog.so.1",
    "libxenevtchn.so.1",
];

const HYPERVISOR: &str = "boot/xen-4.17-amd64.gz";
const XEN_BIN: &str = "usr/lib/xen-4.17/bin";
const DEVICE_MODEL: &str = "usr/libexec/xen-qemu-system-i386";

/// Files that are made once per run and shared by its boots.
#[derive(Debug, Clone)]
pub struct Images {
    /// Xen, unpacked.
    pub xen: PathBuf,
    /// dom0's kernel.
    pub kernel: PathBuf,
    /// dom0's first archive.
    pub base: PathBuf,
    /// What HVM guests need on top.
    pub hvm: PathBuf,
    /// Programs of this workspace.
    pub tools: Tools,
    /// The kernel release of guests.
    pub release: String,
}

/// Programs of this workspace that go into dom0.
#[derive(Debug, Clone)]
pub struct Tools {
    /// The folder they were built in.
    pub built: PathBuf,
}

impl Tools {
    /// Their names.
    pub const NAMES: [&str; 9] = [
        "xen-locus",
        "locus-copy",
        "locus-core",
        "locus-forge",
        "locus-kill",
        "locus-pauses",
        "locus-poke",
        "locus-sites",
        "xtest-agent",
    ];
    /// xen-locus with the feature `faults`: a test can make it fail or die at any call, or skip its look at
    /// stacks.
    pub const FAULTS: &str = "xen-locus-faults";

    /// Each with its file.
    pub fn files(&self) -> impl Iterator<Item = (&'static str, PathBuf)> + '_ {
        Self::NAMES
            .into_iter()
            .chain([Self::FAULTS])
            .map(|name| (name, self.built.join(name)))
    }
}

/// Makes (or refreshes) all images.
pub fn build(paths: &Paths, root: &Root, tools: Tools) -> Result<Images> {
    let dir = paths.base.join("images");
    std::fs::create_dir_all(&dir)?;
    let out = Images {
        xen: dir.join("xen"),
        kernel: root.kernel()?,
        base: dir.join("dom0.cpio"),
        hvm: dir.join("hvm.cpio"),
        tools,
        release: root.release.clone(),
    };
    let mut xen = Vec::new();
    let packed = root.dir.join(HYPERVISOR);
    let file = std::fs::File::open(&packed).with_context(|| format!("{}", packed.display()))?;
    flate2::read::GzDecoder::new(file).read_to_end(&mut xen)?;
    replace(&out.xen, &xen)?;
    replace(&out.base, &dom0_base(paths, root, &out.tools)?)?;
    replace(&out.hvm, &hvm_extras(root)?)?;
    Ok(out)
}

fn dom0_base(paths: &Paths, root: &Root, tools: &Tools) -> Result<Vec<u8>> {
    let mut c = Cpio::new();
    c.file("init", 0o755, include_bytes!("../dom0/init"))?;
    c.host_file("bin/busybox", 0o755, &busybox(root))?;
    let mut programs: Vec<(String, PathBuf)> = XEN_PROGRAMS
        .iter()
        .map(|p| (format!("{XEN_BIN}/{p}"), root.dir.join(XEN_BIN).join(p)))
        .collect();
    for entry in std::fs::read_dir(root.dir.join("usr/bin"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("xenstore") {
            programs.push((format!("usr/bin/{name}"), entry.path()));
        }
    }
    for (path, file) in &programs {
        c.host_file(path, 0o755, file)?;
    }
    c.symlink("usr/lib/xen", "xen-4.17")?;
    c.file("etc/xen/xl.conf", 0o644, b"autoballoon=\"off\"\n")?;
    c.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
    c.file("etc/group", 0o644, b"root:x:0:\n")?;
    for dir in [
        "usr/sbin",
        "var/lib/xen",
        "var/log/xen",
        "var/lib/xenstored",
        "lib64",
    ] {
        c.dir(dir)?;
    }
    add_modules(&mut c, root, "lib/modules", MODULES)?;

    let mut files: Vec<PathBuf> = programs.into_iter().map(|(_, file)| file).collect();
    files.extend(tools.files().map(|(_, file)| file));
    for (path, file) in elf::libraries(&root.dir, &files, DLOPENED)? {
        c.host_file(&path, 0o755, &file)?;
    }
    c.symlink(
        "lib64/ld-linux-x86-64.so.2",
        "/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
    )?;
    c.host_file(
        "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
        0o755,
        &root.dir.join("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"),
    )?;

    let kernel = root.kernel()?;
    c.host_file("guest/vmlinuz", 0o644, &kernel)?;
    let packed = std::fs::read(&kernel)?;
    c.file(
        "guest/vmlinux",
        0o644,
        &unpacked_kernel(&packed).context("unpacking the kernel")?,
    )?;
    c.file(
        "guest/initrd.gz",
        0o644,
        &guest_initramfs(paths, root, root)?,
    )?;
    c.finish()
}

/// The ELF file inside a bzImage (Linux `Documentation/arch/x86/boot.rst`, `payload_offset`).
///
/// PV and PVH guests boot it. Otherwise libxc would unpack it at every start of a guest, on an emulated
/// processor.
pub fn unpacked_kernel(image: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("too short for a bzImage")?;
        Ok(usize::try_from(u32::from_le_bytes(bytes.try_into()?))?)
    };
    let setup_sectors = usize::from(*image.get(0x1f1).context("too short for a bzImage")?);
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    let payload = image
        .get(start..start + word(0x24c)?)
        .context("payload out of bounds")?;
    let unpacker = match payload {
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        _ => bail!("the payload is compressed with neither xz nor zstd"),
    };
    // Four bytes with the unpacked size follow the stream.
    let stream = payload.get(..payload.len() - 4).unwrap_or_default();
    let out = piped(unpacker, &["-dc"], stream.to_vec())?;
    ensure!(out.starts_with(b"\x7fELF"), "{unpacker} gave no ELF file");
    Ok(out)
}

/// Adds these modules, those that they need, and a list of all in the order to load them, in a folder of the archive.
pub(crate) fn add_modules(c: &mut Cpio, root: &Root, dir: &str, names: &[&str]) -> Result<()> {
    let mut order = String::new();
    for module in elf::modules(&root.modules()?, names)? {
        c.file(&format!("{dir}/{}", module.name), 0o644, &module.data)?;
        order += &format!("{}\n", module.name);
    }
    c.file(&format!("{dir}/order"), 0o644, order.as_bytes())
}

/// The device model, its libraries and the firmware.
fn hvm_extras(root: &Root) -> Result<Vec<u8>> {
    let mut c = Cpio::new();
    let model = root.dir.join(DEVICE_MODEL);
    c.host_file(DEVICE_MODEL, 0o755, &model)?;
    for (path, file) in elf::libraries(&root.dir, &[model], &[])? {
        c.host_file(&path, 0o755, &file)?;
    }
    let loader = "usr/lib/xen-4.17/boot/hvmloader";
    c.host_file(loader, 0o755, &root.dir.join(loader))?;
    for bios in ["bios.bin", "bios-256k.bin"] {
        let path = format!("usr/share/seabios/{bios}");
        c.host_file(&path, 0o644, &root.dir.join(&path))?;
    }
    for rom in ["linuxboot.bin", "linuxboot_dma.bin", "kvmvapic.bin"] {
        let path = format!("usr/share/qemu/{rom}");
        c.host_file(&path, 0o644, &root.dir.join(&path))?;
    }
    // The device model reads one even if there is no keyboard.
    let keymap = "usr/share/qemu/keymaps/en-us";
    c.host_file(keymap, 0o644, &root.dir.join(keymap))?;
    c.finish()
}

/// The overlay: programs of the workspace, and more files as (path, mode, file of the host).
pub fn overlay(tools: &Tools, extra: &[(String, u32, PathBuf)]) -> Result<Vec<u8>> {
    let mut c = Cpio::new();
    for (name, file) in tools.files() {
        c.host_file(&format!("usr/sbin/{name}"), 0o755, &file)?;
    }
    c.symlink("usr/sbin/guest", "xtest-agent")?;
    for (path, mode, file) in extra {
        c.host_file(path, *mode, file)?;
    }
    c.finish()
}

/// A guest's initramfs, gzipped, with programs from the tree `root` and modules from the tree `kernel`.
pub fn guest_initramfs(paths: &Paths, root: &Root, kernel: &Root) -> Result<Vec<u8>> {
    let mut c = Cpio::new();
    c.file("init", 0o755, include_bytes!("../guest/init"))?;
    c.host_file("bin/busybox", 0o755, &busybox(root))?;
    for (name, program) in guest_programs(paths)? {
        c.host_file(&format!("bin/{name}"), 0o755, &program)?;
    }
    add_modules(&mut c, kernel, "lib/modules", GUEST_MODULES)?;
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    gz.write_all(&c.finish()?)?;
    Ok(gz.finish()?)
}

/// Compiles every C file of `xtest/guest` into a static program of the same name.
fn guest_programs(paths: &Paths) -> Result<Vec<(String, PathBuf)>> {
    let out = paths.base.join("guest-programs");
    std::fs::create_dir_all(&out)?;
    let mut programs = Vec::new();
    for entry in std::fs::read_dir(paths.workspace.join("xtest/guest"))? {
        let source = entry?.path();
        if source.extension().is_none_or(|e| e != "c") {
            continue;
        }
        let name = source.file_stem().context("a C file without a name")?;
        let name = name.to_string_lossy().into_owned();
        let program = out.join(&name);
        if newer(&source, &program) {
            let mut cc = Command::new("gcc");
            cc.args(["-static", "-O2", "-Wall", "-Werror", "-s", "-o"])
                .arg(&program)
                .arg(&source);
            checked(&mut cc)?;
        }
        programs.push((name, program));
    }
    programs.sort();
    Ok(programs)
}

fn busybox(root: &Root) -> PathBuf {
    root.dir.join("bin/busybox")
}
