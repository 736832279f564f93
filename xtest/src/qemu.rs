//! One machine under QEMU: Xen, dom0, and a port for the agent.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use crate::debian::Debian;
use crate::host::tail;
use crate::image::Images;
use crate::profile::Profile;

/// Machines so far.
static MACHINES: AtomicU32 = AtomicU32::new(0);

/// A running machine; dropping it kills it.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    socket: PathBuf,
    /// The log file of Xen's and dom0's console.
    pub console: PathBuf,
    initrd: PathBuf,
}

impl Qemu {
    /// Starts a machine of this profile, with the disk of its dom0 if that is a Debian. Nothing is written to that disk. Returns
    /// the machine and the stream to its agent.
    ///
    /// The calling thread must outlive the machine: QEMU is killed when that thread ends.
    pub fn start(
        images: &Images,
        profile: &Profile,
        debian: Option<&Debian>,
        overlay: &[u8],
        logs: &Path,
    ) -> Result<(Self, UnixStream)> {
        let initrd = logs.join("initrd.cpio");
        let mut out = File::create(&initrd)?;
        let mut parts = vec![&images.base];
        if profile.hvm {
            parts.push(&images.hvm);
        }
        parts.extend(debian.map(|debian| &debian.archive));
        for part in parts {
            std::io::copy(&mut File::open(part)?, &mut out)?;
        }
        out.write_all(overlay)?;
        drop(out);

        // A socket's path is at most 107 bytes long. The path of a target folder may be longer.
        let socket = std::env::temp_dir().join(format!(
            "xtest-{}-{}.sock",
            std::process::id(),
            MACHINES.fetch_add(1, Ordering::Relaxed)
        ));
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("listening on {}", socket.display()))?;
        let console = logs.join("console.log");
        let stderr = File::create(logs.join("qemu.log"))?;
        let mut cmd = Command::new("setpriv");
        cmd.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        cmd.args(arguments(images, profile, &socket, &console, &initrd));
        if let Some(debian) = debian {
            let disk = debian.disk.display().to_string().replace(',', ",,");
            let drive = format!("file={disk},format=raw,if=virtio,snapshot=on");
            cmd.args(["-drive", &drive]);
        }
        cmd.stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        let child = cmd
            .spawn()
            .context("starting QEMU through setpriv (util-linux)")?;
        let mut qemu = Self {
            child,
            socket,
            console,
            initrd,
        };
        let stream = qemu.accept(&listener)?;
        // The name is not needed any more, and would be left if xtest were killed.
        let _ = std::fs::remove_file(&qemu.socket);
        Ok((qemu, stream))
    }

    fn accept(&mut self, listener: &UnixListener) -> Result<UnixStream> {
        listener.set_nonblocking(true)?;
        let limit = Instant::now() + Duration::from_secs(30);
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Ok(stream);
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
            if let Some(status) = self.child.try_wait()? {
                let log = self.console.with_file_name("qemu.log");
                let said = std::fs::read_to_string(log).unwrap_or_default();
                bail!("QEMU ended at once ({status}): {}", said.trim());
            }
            if Instant::now() > limit {
                bail!("QEMU did not connect to the agent's socket");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether the machine still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The last lines of Xen's and dom0's console.
    pub fn console_tail(&self, lines: usize) -> String {
        tail(&self.console, lines)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
        let _ = std::fs::remove_file(&self.initrd);
    }
}

fn arguments(
    images: &Images,
    profile: &Profile,
    socket: &Path,
    console: &Path,
    initrd: &Path,
) -> Vec<String> {
    let xen = format!(
        "console=com1 com1=115200 loglvl=all guest_loglvl=all sync_console=0 \
         dom0_mem={0}M,max:{0}M dom0_max_vcpus={1} {2}",
        profile.dom0_memory, profile.dom0_vcpus, profile.xen_args
    );
    let kernel = images.kernel.display().to_string().replace(',', ",,");
    let initrd = initrd.display().to_string().replace(',', ",,");
    let pairs = [
        ("-accel", format!("tcg,thread={}", profile.thread)),
        ("-cpu", profile.cpu.to_owned()),
        ("-smp", profile.cpus.to_string()),
        ("-m", profile.memory.to_string()),
        ("-display", "none".to_owned()),
        ("-monitor", "none".to_owned()),
        ("-serial", format!("file:{}", console.display())),
        (
            "-chardev",
            format!("socket,id=agent,path={}", socket.display()),
        ),
        ("-device", "virtio-serial-pci".to_owned()),
        (
            "-device",
            "virtserialport,chardev=agent,name=xtest".to_owned(),
        ),
        ("-kernel", images.xen.display().to_string()),
        ("-append", xen),
        (
            "-initrd",
            format!(
                "{kernel} console=hvc0 loglevel=5 {},{initrd}",
                profile.dom0_args
            ),
        ),
    ];
    let mut args = vec!["-nodefaults".to_owned(), "-no-reboot".to_owned()];
    if profile.counted {
        args.extend(["-icount", "shift=1,sleep=off"].map(str::to_owned));
    }
    args.extend(
        pairs
            .into_iter()
            .flat_map(|(name, value)| [name.to_owned(), value]),
    );
    args
}
