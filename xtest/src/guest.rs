//! Guests: their configuration, and commands in them.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde::Serialize;

use crate::check;
use crate::dom0::{Dom0, Output, Trouble};
use crate::host::checked;
use crate::limits;
use crate::suites::{Suite, BOOKWORM};
use crate::verdict::Verdict;
use crate::watched::START;

/// Arguments of a guest's kernel. It logs warnings and worse, because the console carries commands too.
const KERNEL_ARGS: &str = "console=hvc0 loglevel=5 no_timer_check tsc=reliable panic=0";
/// Room for what a guest's kernel logs: a scenario that looks for its mark must find it behind dozens of reports.
const LOG_ARGS: &str = "log_buf_len=1M";
/// More arguments of an HVM guest's kernel. Without these, an emulated guest takes minutes to look for
/// hardware that does not exist.
///
/// `pci=off` also hides Xen's platform device, and with it grant tables. A frontend would then crash the
/// kernel, so the configuration must have none (`vkb_device=0`).
const HVM_ARGS: &str = "pci=off agp=off iommu=off 8250.nr_uarts=0 i8042.nokbd i8042.noaux";

/// Xen's types of guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Paravirtual.
    Pv,
    /// Hardware assisted, without firmware and device model.
    Pvh,
    /// Hardware assisted, with both.
    Hvm,
}

impl Kind {
    /// The name that `xl` and xen-locus use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pv => "pv",
            Self::Pvh => "pvh",
            Self::Hvm => "hvm",
        }
    }

    /// The longest time until a guest of this type answers.
    fn boot_limit(self) -> Duration {
        Duration::from_secs(match self {
            Self::Pv => 120,
            Self::Pvh => 150,
            Self::Hvm => 240,
        })
    }
}

/// What a guest's kernel does against faults of the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mitigations {
    /// What it chooses by itself. Without KVM, QEMU's processor has no Meltdown, so that is no
    /// page-table isolation.
    Default,
    /// The same, with page-table isolation. Kernels of PV guests have none.
    Isolation,
    /// Nothing.
    Off,
}

impl Mitigations {
    /// The kernel's argument.
    fn argument(self) -> &'static str {
        match self {
            Self::Default => "",
            Self::Isolation => "pti=on",
            Self::Off => "mitigations=off",
        }
    }
}

/// The guest that a scenario wants. Equal specifications mean the same guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestSpec {
    /// Its name in Xen.
    pub name: String,
    /// Its type.
    pub kind: Kind,
    /// The release of Debian whose kernel it boots.
    pub suite: &'static Suite,
    /// Memory in MiB.
    pub memory: u32,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// What its kernel does against faults of the processor.
    pub mitigations: Mitigations,
    /// Additional kernel arguments.
    pub kernel_args: String,
    /// Additional lines of its `xl` configuration.
    pub config: String,
}

impl GuestSpec {
    /// A guest of the usual size: 192 MiB, two vCPUs. PVH guests have page-table isolation.
    pub fn new(name: &str, kind: Kind) -> Self {
        Self {
            name: name.to_owned(),
            kind,
            suite: &BOOKWORM,
            memory: 192,
            vcpus: 2,
            mitigations: match kind {
                Kind::Pvh => Mitigations::Isolation,
                Kind::Pv | Kind::Hvm => Mitigations::Default,
            },
            kernel_args: String::new(),
            config: String::new(),
        }
    }

    /// With the kernel of this release of Debian.
    pub fn suite(mut self, suite: &'static Suite) -> Self {
        self.suite = suite;
        self
    }

    /// The folder in dom0 with its kernel and initramfs.
    pub fn boot_dir(&self) -> String {
        if *self.suite == BOOKWORM {
            "/guest".to_owned()
        } else {
            format!("/guest/{}", self.suite.name)
        }
    }

    /// The name of the kernel's file. Firmware boots a bzImage; Xen's domain builder boots the ELF file in it.
    pub fn kernel_file(&self) -> &'static str {
        if self.kind == Kind::Hvm {
            "vmlinuz"
        } else {
            "vmlinux"
        }
    }

    /// With this much memory, in MiB.
    pub fn memory(mut self, mib: u32) -> Self {
        self.memory = mib;
        self
    }

    /// With this many virtual CPUs.
    pub fn vcpus(mut self, count: u32) -> Self {
        self.vcpus = count;
        self
    }

    /// With these mitigations.
    pub fn mitigations(mut self, mitigations: Mitigations) -> Self {
        self.mitigations = mitigations;
        self
    }

    /// With more kernel arguments.
    pub fn kernel_args(mut self, args: &str) -> Self {
        self.kernel_args = args.to_owned();
        self
    }

    /// With more lines of `xl` configuration.
    pub fn config(mut self, lines: &str) -> Self {
        self.config = lines.to_owned();
        self
    }

    /// The configuration file for `xl create`. A crashed guest is preserved, so that it can be examined and
    /// told from a destroyed one.
    pub fn to_config(&self) -> String {
        let hvm_args = if self.kind == Kind::Hvm { HVM_ARGS } else { "" };
        let extra = format!(
            "{KERNEL_ARGS} {LOG_ARGS} {hvm_args} {} {}",
            self.mitigations.argument(),
            self.kernel_args
        );
        let mut text = format!(
            "name=\"{}\"\ntype=\"{}\"\nmemory={}\nvcpus={}\nkernel=\"{dir}/{}\"\n\
             ramdisk=\"{dir}/initrd.gz\"\nextra=\"{}\"\non_crash=\"preserve\"\n\
             on_reboot=\"preserve\"\n",
            self.name,
            self.kind.name(),
            self.memory,
            self.vcpus,
            self.kernel_file(),
            extra.split_whitespace().collect::<Vec<_>>().join(" "),
            dir = self.boot_dir(),
        );
        if self.kind == Kind::Hvm {
            text += "vga=\"none\"\nnographic=1\nvnc=0\nsdl=0\nusb=0\nvkb_device=0\n\
                     device_model_args=[\"-nodefaults\"]\n";
        }
        text + &self.config + "\n"
    }
}

/// A running guest.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its name in Xen.
    pub name: String,
    /// Its domain id when it was started.
    pub domid: u32,
    dom0: Dom0,
}

impl Guest {
    /// Starts a guest and waits until it takes commands.
    pub(crate) fn start(dom0: &Dom0, spec: &GuestSpec) -> Result<Self, Verdict> {
        let name = &spec.name;
        let config = format!("/etc/xen/{name}.cfg");
        dom0.put(&config, 0o644, spec.to_config().as_bytes())?;
        let limit = Duration::from_secs(240);
        // Behind what an earlier guest of this name said.
        let out = dom0.sh_timeout(
            &format!("echo '{START}' >>/var/log/guest-{name}.log; xl create -q {config}"),
            limit,
        )?;
        if out.rc != 0 {
            return Err(Verdict::Error(format!(
                "xl create {name} ended with {}: {} {}",
                out.rc,
                out.text(),
                out.err_text()
            )));
        }
        let guest = Self::attach(dom0, name)?;
        match guest.try_sh("true", Duration::from_secs(30), spec.kind.boot_limit()) {
            Ok(_) => Ok(guest),
            Err(Trouble::Hung(why) | Trouble::Gone(why)) => {
                Err(Verdict::crash(format!("did not come up: {why}")))
            }
            Err(other) => Err(other.into()),
        }
    }

    /// A guest that already runs, for example after `xl restore`.
    pub fn attach(dom0: &Dom0, name: &str) -> Result<Self, Verdict> {
        let domid = dom0.ok(&format!("xl domid {name}"))?;
        let domid = domid
            .parse()
            .map_err(|_| Verdict::Error(format!("xl domid: {domid}")))?;
        Ok(Self {
            name: name.to_owned(),
            domid,
            dom0: dom0.clone(),
        })
    }

    /// Runs a shell command in the guest, with a limit of two minutes.
    pub fn sh(&self, cmd: &str) -> Result<Output, Verdict> {
        self.sh_timeout(cmd, Duration::from_secs(120))
    }

    /// Runs a shell command in the guest. If it exceeds the limit, it is killed ([`Output::timed_out`]).
    ///
    /// # Errors
    ///
    /// [`Verdict::Failure`] if the guest does not respond, [`Verdict::Crash`] if it is gone.
    pub fn sh_timeout(&self, cmd: &str, limit: Duration) -> Result<Output, Verdict> {
        Ok(self.try_sh(cmd, limit, limits::SILENCE)?)
    }

    /// Like [`Self::sh_timeout`], for scenarios that expect trouble. A guest that does not respond for
    /// `silence` is [`Trouble::Hung`].
    pub fn try_sh(&self, cmd: &str, limit: Duration, silence: Duration) -> Result<Output, Trouble> {
        self.dom0.guest_exec(&self.name, cmd, limit, silence)
    }

    /// Runs a shell command that must end with 0, and returns what it printed, as text.
    pub fn ok(&self, cmd: &str) -> Result<String, Verdict> {
        let out = self.sh(cmd)?;
        if out.rc != 0 {
            return Err(Verdict::failure(format!(
                "{}: `{cmd}` ended with {}: {} {}",
                self.name,
                out.rc,
                out.text(),
                out.err_text()
            )));
        }
        Ok(out.text())
    }

    /// Writes a file in the guest, at a few 100 KB/s.
    pub fn put(&self, path: &str, mode: u32, data: &[u8]) -> Result<(), Verdict> {
        use base64::prelude::{Engine, BASE64_STANDARD};
        self.ok(&format!(": > {path}"))?;
        for piece in data.chunks(48 * 1024) {
            let text = BASE64_STANDARD.encode(piece);
            self.ok(&format!("base64 -d >> {path} <<E\n{text}\nE"))?;
        }
        self.ok(&format!("chmod {mode:o} {path}"))?;
        Ok(())
    }

    /// Loads a kernel module from a file of the host, without its debug information.
    pub fn insmod(&self, module: &Path) -> Result<(), Verdict> {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        let there = format!("/tmp/{name}");
        self.put_module(&there, module)?;
        self.ok(&format!("insmod {there}"))?;
        Ok(())
    }

    /// Copies a kernel module from the host to a file in the guest, without its debug information.
    pub fn put_module(&self, there: &str, module: &Path) -> Result<(), Verdict> {
        let fail = |e: std::io::Error| Verdict::Error(format!("{}: {e}", module.display()));
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        let small = std::env::temp_dir().join(format!("xtest-{}-{name}", std::process::id()));
        let mut strip = Command::new("strip");
        strip.arg("--strip-debug").arg("-o").args([&small, module]);
        checked(&mut strip)?;
        let data = std::fs::read(&small).map_err(fail)?;
        std::fs::remove_file(&small).map_err(fail)?;
        self.put(there, 0o644, &data)
    }

    /// Starts the workload of `guest/spin-workload.c` unless it already runs; see [`Self::rounds`].
    pub fn start_workload(&self) -> Result<(), Verdict> {
        // Otherwise the count of an earlier workload would seem to go down.
        self.ok("pidof spin-workload >/dev/null || { rm -f /run/workload; \
             spin-workload >/run/workload.log 2>&1 & }")?;
        Ok(())
    }

    /// Checks that the workload has gone on since it had done this many rounds.
    pub fn went_on(&self, since: u64) -> Result<(), Verdict> {
        let now = self.rounds()?;
        check!(
            now > since,
            "the workload makes no progress: {since} rounds before, {now} now"
        );
        Ok(())
    }

    /// The rounds that the workload has done. The number grows as long as the guest runs.
    pub fn rounds(&self) -> Result<u64, Verdict> {
        let text = self.ok("cat /run/workload 2>/dev/null || echo 0")?;
        text.parse()
            .map_err(|_| Verdict::failure(format!("/run/workload has {text:?}")))
    }

    /// The number of threads in the guest, kernel threads included.
    pub fn threads(&self) -> Result<u64, Verdict> {
        let text = self.ok("cut -d' ' -f4 /proc/loadavg")?;
        let count = text.split_once('/').and_then(|(_, all)| all.parse().ok());
        count.ok_or_else(|| Verdict::failure(format!("/proc/loadavg has {text:?}")))
    }
}
