//! Guest kernels of other releases of Debian: what a guest boots, and payloads for it. They are made on first
//! use.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;

use crate::fetch::{self, Root};
use crate::host;
use crate::image;
use crate::paths::Paths;
use crate::payloads::{self, Which};
use crate::source;
use crate::suites::{Suite, BOOKWORM};

/// A guest kernel, on the host.
#[derive(Debug)]
pub struct Kernel {
    /// The release, as `uname -r` prints it.
    pub release: String,
    /// The kernel as built, a bzImage.
    pub vmlinuz: PathBuf,
    /// The ELF file in the bzImage.
    pub vmlinux: PathBuf,
    /// The guest's initramfs, with some of the kernel's modules.
    pub initrd: PathBuf,
    /// Payloads for this kernel: name and file.
    pub payloads: Vec<(String, PathBuf)>,
}

/// All guest kernels except the one in dom0's image.
#[derive(Debug)]
pub struct Kernels {
    paths: Paths,
    dom0: Root,
    /// Who holds it makes the files: machines run side by side and ask for the same ones.
    made: Mutex<Made>,
}

type Made = BTreeMap<&'static str, Arc<Kernel>>;

impl Kernels {
    /// No kernel yet. `dom0` is the tree of dom0, from which the guests' programs are taken.
    pub fn new(paths: Paths, dom0: Root) -> Self {
        Self {
            paths,
            dom0,
            made: Mutex::default(),
        }
    }

    /// The kernel of this release. Its packages are downloaded and its payloads built, unless that was done
    /// before.
    pub fn get(&self, suite: &'static Suite) -> Result<Arc<Kernel>> {
        let mut made = self.making();
        if let Some(kernel) = made.get(suite.name) {
            return Ok(Arc::clone(kernel));
        }
        let root = fetch::ensure_suite(&self.paths, suite)?;
        let kernel = Arc::new(self.make(suite, &root)?);
        made.insert(suite.name, Arc::clone(&kernel));
        Ok(kernel)
    }

    /// Payloads for the kernel of this release, these and others that were built before: name and file.
    pub fn payloads(&self, suite: &Suite, which: Which) -> Result<Vec<(String, PathBuf)>> {
        let _made = self.making();
        let root = fetch::ensure_suite(&self.paths, suite)?;
        payloads::build_all(&self.paths, &root, which)?;
        payloads::built(&self.paths, &root.release)
    }

    /// The livepatches that the source of Debian 12's kernel comes with: name and file.
    pub fn own_livepatches(&self) -> Result<Vec<(String, PathBuf)>> {
        let _made = self.making();
        source::own_livepatches(&self.paths, &BOOKWORM, &self.dom0)
    }

    /// Held while files are made that several machines use.
    pub fn making(&self) -> MutexGuard<'_, Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make(&self, suite: &Suite, root: &Root) -> Result<Kernel> {
        payloads::build_all(&self.paths, root, Which::Examples)?;
        let dir = self.paths.base.join("images").join(suite.name);
        std::fs::create_dir_all(&dir)?;
        let vmlinuz = root.kernel()?;
        let kernel = Kernel {
            release: root.release.clone(),
            vmlinux: dir.join("vmlinux"),
            initrd: dir.join("initrd.gz"),
            payloads: payloads::built(&self.paths, &root.release)?,
            vmlinuz,
        };
        let packed = std::fs::read(&kernel.vmlinuz)?;
        host::replace(&kernel.vmlinux, &image::unpacked_kernel(&packed)?)?;
        host::replace(
            &kernel.initrd,
            &image::guest_initramfs(&self.paths, &self.dom0, root)?,
        )?;
        Ok(kernel)
    }
}
