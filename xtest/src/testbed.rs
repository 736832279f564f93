//! The testbed: everything that is needed to boot machines; and one booted machine.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use rustix::fs::{flock, FlockOperation};

use crate::debian;
use crate::dom0::Dom0;
use crate::fetch::{self, Root};
use crate::host::newer;
use crate::image::{self, Images, Tools};
use crate::kernels::Kernels;
use crate::limits;
use crate::paths::{cargo, Paths};
use crate::payloads::{self, Which};
use crate::profile::Profile;
use crate::qemu::Qemu;
use crate::room;
use crate::scenario::Ctx;
use crate::suites::BOOKWORM;
use crate::watched::Watched;

/// What all boots of a run share. It locks the target folder while it exists.
#[derive(Debug)]
pub struct Testbed {
    /// The folders of the run.
    pub paths: Paths,
    /// The unpacked packages of Debian 12.
    pub root: Root,
    /// Guest kernels of other releases of Debian.
    pub kernels: Arc<Kernels>,
    images: Images,
    _lock: File,
}

impl Testbed {
    /// Downloads packages and builds programs, payloads and images, as far as they are out of date.
    pub fn prepare() -> Result<Self> {
        let paths = Paths::find()?;
        check_room(&paths)?;
        let lock = lock(&paths)?;
        let root = fetch::ensure_suite(&paths, &BOOKWORM)?;
        let tools = build_tools(&paths)?;
        payloads::build_all(&paths, &root, Which::All)?;
        let images = image::build(&paths, &root, tools)?;
        let kernels = Arc::new(Kernels::new(paths.clone(), root.clone()));
        Ok(Self {
            paths,
            root,
            kernels,
            images,
            _lock: lock,
        })
    }

    /// Boots a machine. `again` is the number of earlier boots of this profile in the run, whose logs are preserved.
    pub fn boot(&self, profile: &Profile, again: u32) -> Result<Machine> {
        let base = self.paths.logs(profile.name);
        let logs = if again == 0 {
            base
        } else {
            base.join(format!("boot-{}", again + 1))
        };
        if logs.exists() {
            std::fs::remove_dir_all(&logs)?;
        }
        std::fs::create_dir_all(&logs)?;
        let extra: Vec<(String, u32, PathBuf)> = payloads::built(&self.paths, &self.root.release)?
            .into_iter()
            .map(|(name, file)| (format!("payloads/{name}.ko"), 0o644, file))
            .collect();
        let overlay = image::overlay(&self.images.tools, &extra)?;
        let debian = match profile.debian {
            true => {
                let _made = self.kernels.making();
                Some(debian::prepare(&self.paths, &self.root)?)
            }
            false => None,
        };
        let began = Instant::now();
        let debian = debian.as_ref();
        let (qemu, stream) = Qemu::start(&self.images, profile, debian, &overlay, &logs)?;
        let boot = match profile.debian {
            true => limits::BOOT_DEBIAN,
            false => limits::BOOT,
        };
        let limit = limits::scaled(boot);
        let dom0 = Dom0::connect(stream, &logs.join("transcript.log"), limit)
            .with_context(|| format!("dom0's console ends:\n{}", qemu.console_tail(30)))?;
        let payloads = self.paths.payloads(&self.root.release);
        let boot_time = began.elapsed();
        limits::booted_in(match profile.debian {
            true => boot_time / limits::DEBIAN_BOOTS,
            false => boot_time,
        });
        let ctx = Ctx::new(
            dom0,
            self.root.release.clone(),
            payloads,
            Arc::clone(&self.kernels),
            Watched::new(qemu.console.clone()),
        );
        Ok(Machine {
            ctx,
            qemu,
            logs,
            boot_time,
        })
    }
}

/// A booted machine; dropping it kills it.
#[derive(Debug)]
pub struct Machine {
    /// The context of scenarios.
    pub ctx: Ctx,
    /// The emulator.
    pub qemu: Qemu,
    /// The folder of its logs.
    pub logs: PathBuf,
    /// From the start of QEMU to the agent's first message.
    pub boot_time: Duration,
}

impl Machine {
    /// Copies the console logs of guests and the logs of the tools to the folder of logs, if the machine still
    /// answers.
    pub fn collect_logs(&self) {
        let list = "cd /var/log && ls guest-*.log xen/*.log xen-locus/* 2>/dev/null";
        let Ok(found) = self.ctx.dom0.sh_timeout(list, Duration::from_secs(20)) else {
            return;
        };
        for name in found.text().lines() {
            if let Ok(data) = self.ctx.dom0.get(&format!("/var/log/{name}")) {
                let _ = std::fs::write(self.logs.join(name.replace('/', "-")), data);
            }
        }
    }
}

/// Checks that there is room for what is not there yet, and for a run.
fn check_room(paths: &Paths) -> Result<()> {
    let mut need = room::RUN;
    if !fetch::is_unpacked(paths, &BOOKWORM) {
        need += room::SUITE;
    }
    if !paths.base.join("images").exists() {
        need += room::BUILDS;
    }
    room::check(&paths.base, need, "a run")
}

/// Locks the target folder. Two runs at a time would mix their logs and images.
fn lock(paths: &Paths) -> Result<File> {
    std::fs::create_dir_all(&paths.base)?;
    let file = File::create(paths.base.join("lock"))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        eprintln!("xtest: waiting for another xtest to end");
        flock(&file, FlockOperation::LockExclusive)?;
    }
    Ok(file)
}

/// Builds the programs for dom0, without debug information. That is nine tenths of them, and dom0's files are in
/// memory, unpacked at each boot.
fn build_tools(paths: &Paths) -> Result<Tools> {
    let build = |args: &[&str], names: &[&str]| -> Result<()> {
        let mut cmd = Command::new(cargo());
        cmd.args(["build", "--release", "--locked", "--workspace"]);
        cmd.args(args);
        for name in names {
            cmd.args(["--bin", name]);
        }
        cmd.current_dir(&paths.workspace);
        ensure!(
            cmd.status().context("running cargo")?.success(),
            "cargo build failed"
        );
        Ok(())
    };
    // The last one makes manual pages, for `make install`.
    build(&[], &[&Tools::NAMES[..], &["locus-man"]].concat())?;
    build(&["--features", "xen-locus/faults"], &[Tools::FAULTS])?;
    let tools = Tools {
        built: paths.base.join("tools"),
    };
    std::fs::create_dir_all(&tools.built)?;
    for (name, small) in tools.files() {
        let whole = paths.target.join("release").join(name);
        if newer(&whole, &small) {
            let mut cmd = Command::new("strip");
            cmd.args(["--strip-debug", "-o"]).arg(&small).arg(&whole);
            let status = cmd.status().context("running strip (binutils)")?;
            ensure!(status.success(), "strip failed for {name}");
        }
    }
    Ok(tools)
}
