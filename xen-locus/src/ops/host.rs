//! The host that commands and the daemon work on.

use std::path::{Path, PathBuf};

use locus_xen::{self as xen, Control, DomainInfo};

use super::Operator;
use crate::domain::Domain;
use crate::error::Result;
use crate::storage::audit::Audit;
use crate::storage::kernel_cache::Cache;
use crate::storage::xenstore::Store;

/// The host of a command or of the daemon.
#[derive(Debug)]
pub struct Host {
    /// Xen's control interface.
    pub control: Control,
    /// XenStore.
    pub store: Store,
    /// The audit log.
    pub audit: Audit,
    cache: Option<PathBuf>,
}

impl Host {
    /// Opens Xen and XenStore. Guests' kernels are cached in folder `cache`, if there is one.
    ///
    /// # Errors
    /// Not dom0, not root, no libxenctrl, no xenstored.
    pub fn open(cache: Option<&Path>) -> Result<Host> {
        xen::keep_freed_memory();
        // If it isn't allowed, everything takes longer, pauses too.
        let _ = xen::lock_memory();
        xen::check_environment()?;
        Ok(Host {
            control: Control::open()?,
            store: Store::open()?,
            audit: Audit::system(),
            cache: cache.map(Path::to_owned),
        })
    }

    /// The operator `who`, who repeats no operation.
    #[must_use]
    pub fn operator(&self, who: String) -> Operator<'_> {
        Operator {
            store: &self.store,
            audit: &self.audit,
            who,
            retries_after: |_| false,
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
        // What a guest put there must not mislead about another one.
        let known = |_: &&PathBuf| domain.check_uuid().is_ok();
        if let Some(dir) = self.cache.as_ref().filter(known) {
            domain.cache = Cache::new(dir, &domain.info.uuid);
        }
        domain
    }

    /// Finds a guest by name, id or UUID.
    ///
    /// # Errors
    /// As [`Domain::find`].
    pub fn guest(&self, wanted: &str) -> Result<Domain<'_>> {
        Domain::find(&self.control, &self.store, wanted).map(|domain| self.with_cache(domain))
    }
}
