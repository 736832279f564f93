//! Whether a kernel has started: its variable `system_state` (include/linux/kernel.h, `enum system_states`).

use crate::{Error, Kernel};

/// The state of a kernel that has started. From here on its text is mapped as it stays, and
/// `__init` code is gone.
const RUNNING: &str = "SYSTEM_RUNNING";

impl Kernel<'_> {
    /// Checks that the kernel has started and is not going down. A kernel without `system_state`,
    /// or with a value that its types have no name for, passes.
    ///
    /// # Errors
    /// [`Error::NotReady`] if it is in another state; [`Error::Missing`] if it has no types;
    /// [`Error::Memory`].
    pub fn check_runs(&self) -> Result<(), Error> {
        let Some(at) = self.symbols.addr("system_state") else {
            return Ok(());
        };
        let value = self.space.read_u32(at)?;
        let name = self.btf()?.enum_name("system_states", value.into());
        match name {
            Some(state) if state != RUNNING => Err(Error::NotReady(format!(
                "the guest is still starting, or is going down or to sleep: its kernel is in state {state}, and \
                 may be changed only in {RUNNING}; try again when it runs"
            ))),
            _ => Ok(()),
        }
    }
}
