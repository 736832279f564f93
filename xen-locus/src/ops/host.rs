//! The host that commands and the daemon work on.

use std::path::{Path, PathBuf};

use locus_xen::{self as xen, Control, DomainInfo};

use super::Desk;
use crate::domain::Domain;
use crate::error::Result;
use crate::storage::audit::Audit;
use crate::storage::kernel_cache::Cache;
use crate::storage::xenstore::Store;

/// The host a command works on.
#[derive(Debug)]
pub struct Host {
    /// Xen's control interface.
    pub control: Control,
    /// XenStore.
    pub store: Store,
    cache: Option<PathBuf>,
}

impl Host {
    /// Opens Xen and XenStore. What is read of guests' kernels is kept in folder `cache`, if any.
    ///
    /// # Errors
    /// Not dom0, not root, no libxenctrl, no xenstored: one sentence.
    pub fn open(cache: Option<&Path>) -> Result<Host> {
        xen::keep_freed_memory();
        // Where it isn't allowed things take longer, pauses too.
        let _ = xen::lock_memory();
        xen::check_environment()?;
        Ok(Host {
            control: Control::open()?,
            store: Store::open()?,
            cache: cache.map(Path::to_owned),
        })
    }

    /// What actions go through that `who` asks for.
    #[must_use]
    pub fn desk(&self, who: String) -> Desk<'_> {
        Desk {
            store: &self.store,
            audit: Audit::system(),
            who,
            comes_again: |_| false,
        }
    }

    /// The domain `info` is about.
    ///
    /// # Errors
    /// As [`Domain::of`].
    pub fn domain(&self, info: DomainInfo) -> Result<Domain<'_>> {
        Ok(self.with_cache(Domain::of(&self.control, &self.store, info)?))
    }

    fn with_cache<'h>(&self, mut domain: Domain<'h>) -> Domain<'h> {
        if let Some(dir) = &self.cache {
            domain.cache = Cache::new(dir, &domain.info.uuid);
        }
        domain
    }

    /// Finds a guest by name or id.
    ///
    /// # Errors
    /// As [`Domain::find`].
    pub fn guest(&self, wanted: &str) -> Result<Domain<'_>> {
        Domain::find(&self.control, &self.store, wanted).map(|domain| self.with_cache(domain))
    }
}
