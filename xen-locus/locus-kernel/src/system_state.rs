//! How far a kernel has got: `system_state` (include/linux/kernel.h, `enum system_states`).

use super::{Error, Kernel};

/// The state of a kernel that has started: its text is mapped as it stays, and `__init` code is gone.
const RUNNING: &str = "SYSTEM_RUNNING";

impl Kernel<'_> {
    /// Checks that the kernel has started, and is not going down. One that doesn't tell is believed to run.
    ///
    /// # Errors
    /// [`Error::NotReady`]; memory or types can't be read.
    pub fn check_runs(&self) -> Result<(), Error> {
        let Some(at) = self.symbols.addr("system_state") else {
            return Ok(());
        };
        let value = self.space.read_u32(at)?;
        let name = self.btf()?.enum_name("system_states", value.into());
        match name {
            Some(state) if state != RUNNING => Err(Error::NotReady(format!(
                "the guest is starting still, or going down or to sleep: its kernel is in state {state}, and \
                 is changed in {RUNNING} only; try again when it runs"
            ))),
            _ => Ok(()),
        }
    }
}
