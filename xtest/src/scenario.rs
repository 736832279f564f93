//! What scenario authors use: [`Scenario`], its [`Profile`], and [`Ctx`], the running machine.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::dom0::Dom0;
use crate::fetch::BOOKWORM;
use crate::guest::{Guest, GuestSpec, Kind};
use crate::kernels::Kernels;
use crate::verdict::Verdict;

/// Starts of a PVH or HVM guest before it counts as failed: QEMU's SVM emulation loses some while
/// they boot, before anything that is tested here has touched them.
const STARTS: u32 = 3;

/// What a machine is like. Scenarios of one profile share a boot.
#[derive(Debug, PartialEq, Eq)]
pub struct Profile {
    /// For the command line and the logs' folder.
    pub name: &'static str,
    /// QEMU's `thread=`: its SVM emulation loses guests under `multi`, so only PV may use that.
    pub thread: &'static str,
    /// Whether the device model and firmware for HVM guests are in the image.
    pub hvm: bool,
    /// Whether the machine's clock counts instructions, 2 ns each, instead of the host's time; while all of its
    /// CPUs are idle it leaps to the next timer. Takes `thread=single`.
    pub counted: bool,
    /// Physical CPUs.
    pub cpus: u32,
    /// Memory of the machine, in MiB.
    pub memory: u32,
    /// Memory of dom0, in MiB.
    pub dom0_memory: u32,
    /// vCPUs of dom0.
    pub dom0_vcpus: u32,
    /// More arguments for the hypervisor.
    pub xen_args: &'static str,
    /// More arguments for dom0's kernel.
    pub dom0_args: &'static str,
}

/// PV guests, physical CPUs truly in parallel.
pub const PV: Profile = Profile {
    name: "pv",
    thread: "multi",
    hvm: false,
    counted: false,
    cpus: 2,
    memory: 3072,
    dom0_memory: 1536,
    dom0_vcpus: 1,
    xen_args: "",
    dom0_args: "",
};

/// PV guests on one physical CPU: on a host with two another machine runs beside it.
pub const PV1: Profile = Profile {
    name: "pv1",
    thread: "single",
    cpus: 1,
    ..PV
};

/// PV guests, and memory for twenty of them.
pub const CROWD: Profile = Profile {
    name: "crowd",
    memory: 4096,
    ..PV
};

/// PVH guests (and PV ones), on one physical CPU: with two, QEMU's SVM emulation loses the guest's GS
/// base even under `thread=single` (9 of 15 guests crashed as their first process began, none of 16
/// with one; those 16 without fsgsbase).
pub const PVH: Profile = Profile {
    name: "pvh",
    thread: "single",
    cpus: 1,
    ..PV
};

/// HVM guests (and PVH and PV ones).
pub const HVM: Profile = Profile {
    name: "hvm",
    hvm: true,
    memory: 3584,
    ..PVH
};

/// All profiles, in the order they are run.
pub const PROFILES: &[&Profile] = &[&PV, &CROWD, &PV1, &PVH, &HVM];

/// A test of the suite.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// Unique, in `kebab-case`.
    pub name: &'static str,
    /// One sentence: what is shown.
    pub summary: &'static str,
    /// The machine it runs on.
    pub profile: &'static Profile,
    /// The test.
    pub run: fn(&mut Ctx) -> Result<(), Verdict>,
}

/// The machine a scenario runs on.
#[derive(Debug)]
pub struct Ctx {
    /// The control domain.
    pub dom0: Dom0,
    /// Release of the guests' kernel (`uname -r`).
    pub release: String,
    /// Built payloads on the host: `NAME/NAME.ko`. In dom0 they are at `/payloads/NAME.ko`.
    pub payloads: PathBuf,
    /// Guest kernels of other releases of Debian.
    pub kernels: Arc<Kernels>,
    guests: BTreeMap<String, (GuestSpec, Guest)>,
}

impl Ctx {
    /// A context for a machine that has just booted.
    pub(crate) fn new(
        dom0: Dom0,
        release: String,
        payloads: PathBuf,
        kernels: Arc<Kernels>,
    ) -> Self {
        Self {
            dom0,
            release,
            payloads,
            kernels,
            guests: BTreeMap::new(),
        }
    }

    /// Gives a running, healthy guest of this kind: one of an earlier scenario if it is equal.
    pub fn ensure_guest(&mut self, spec: GuestSpec) -> Result<Guest, Verdict> {
        if let Some((known, guest)) = self.guests.get(&spec.name) {
            let limit = Duration::from_secs(30);
            if *known == spec && guest.try_sh("true", limit, limit).is_ok() {
                return Ok(guest.clone());
            }
        }
        self.place_kernel(&spec)?;
        let guest = self.start(&spec);
        if *spec.suite != BOOKWORM {
            // dom0's files are memory, and these are of no use any more
            self.dom0.ok(&format!("rm -f {}/*", spec.boot_dir()))?;
        }
        let guest = guest?;
        self.guests.insert(spec.name.clone(), (spec, guest.clone()));
        Ok(guest)
    }

    /// Starts a guest, again where emulation lost it as it booted.
    fn start(&mut self, spec: &GuestSpec) -> Result<Guest, Verdict> {
        let starts = if spec.kind == Kind::Pv { 1 } else { STARTS };
        let mut start = 1;
        loop {
            self.destroy_guest(&spec.name)?;
            match Guest::start(&self.dom0, spec) {
                Err(Verdict::Crash(why)) if start < starts && !self.dom0.is_down() => {
                    let name = &spec.name;
                    eprintln!("xtest: guest {name} is started again ({start} of {starts}): {why}");
                    self.dom0.sh(&format!(
                        "mv -f /var/log/guest-{name}.log /var/log/guest-{name}-start{start}.log"
                    ))?;
                    start += 1;
                }
                other => return other,
            }
        }
    }

    /// Brings what the guest boots into dom0, and payloads for it to `/payloads/SUITE`. Debian 12's
    /// are in dom0's image.
    fn place_kernel(&self, spec: &GuestSpec) -> Result<(), Verdict> {
        if *spec.suite == BOOKWORM {
            return Ok(());
        }
        let kernel = self.kernels.get(spec.suite)?;
        let file = if spec.kernel_file() == "vmlinuz" {
            &kernel.vmlinuz
        } else {
            &kernel.vmlinux
        };
        let dir = spec.boot_dir();
        let mut files = vec![
            (format!("{dir}/{}", spec.kernel_file()), file),
            (format!("{dir}/initrd.gz"), &kernel.initrd),
        ];
        for (name, file) in &kernel.payloads {
            files.push((format!("/payloads/{}/{name}.ko", spec.suite.name), file));
        }
        for (path, file) in files {
            self.dom0.put(&path, 0o644, &std::fs::read(file)?)?;
        }
        Ok(())
    }

    /// A guest that [`Self::ensure_guest`] has started.
    pub fn guest(&self, name: &str) -> Result<Guest, Verdict> {
        let found = self.guests.get(name).map(|(_, guest)| guest.clone());
        found.ok_or_else(|| Verdict::Error(format!("no guest {name} was started")))
    }

    /// Makes a guest known that was started by other means (`xl restore`, `xl create`).
    pub fn adopt_guest(&mut self, spec: GuestSpec) -> Result<Guest, Verdict> {
        let guest = Guest::attach(&self.dom0, &spec.name)?;
        self.guests.insert(spec.name.clone(), (spec, guest.clone()));
        Ok(guest)
    }

    /// Destroys a guest, whatever its state; one that is not there is fine.
    pub fn destroy_guest(&mut self, name: &str) -> Result<(), Verdict> {
        self.guests.remove(name);
        self.dom0.sh(&format!(
            "xl domid {name} >/dev/null 2>&1 && xl destroy {name}"
        ))?;
        Ok(())
    }

    /// Destroys all guests, the unknown ones too.
    pub fn destroy_all(&mut self) -> Result<(), Verdict> {
        self.guests.clear();
        let each = "xl list | awk 'NR>1 && $2>0 {print $2}' | while read d; do xl destroy $d; done";
        self.dom0.sh(each)?;
        Ok(())
    }

    /// Runs a command of dom0 that must end with 0 and print JSON.
    pub fn json(&self, cmd: &str) -> Result<serde_json::Value, Verdict> {
        let out = self.dom0.sh(cmd)?;
        if out.rc != 0 {
            return Err(Verdict::failure(format!(
                "`{cmd}` ended with {}: {} {}",
                out.rc,
                out.text(),
                out.err_text()
            )));
        }
        out.json()
    }

    /// Names of guests that have crashed, with what `xl list` says of them.
    pub(crate) fn crashed(&self) -> Vec<String> {
        let Ok(list) = self.dom0.sh("xl list") else {
            return Vec::new();
        };
        let dead = |state: &str| state.contains('c') || state.contains('s');
        list.text()
            .lines()
            .skip(1)
            .filter(|l| l.split_whitespace().nth(4).is_some_and(dead))
            .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    }
}
