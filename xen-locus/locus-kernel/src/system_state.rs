//! Whether a kernel has started: its variable `system_state` (include/linux/kernel.h, `enum system_states`).

use crate::{Error, Kernel};

/// The state of a kernel that has started. From here on its text is mapped as it stays, and
/// `__init` code is gone.
const RUNNING: &str = "SYSTEM_RUNNING";

impl Kernel<'_> {
    /// Checks that the kernel has started and is not going down. A kernel without `system_state` passes.
    ///
    /// # Errors
    /// [`Error::NotReady`] if it is in another state; [`Error::Odd`] if its types have no name for the state, or the
    /// variable is too narrow; [`Error::Missing`] if it has no types; [`Error::Memory`].
    pub fn check_runs(&self) -> Result<(), Error> {
        let Some(at) = self.variable_if_any("system_state", 4)? else {
            return Ok(());
        };
        let value = self.space.read_u32(at)?;
        let name = self.btf()?.enum_name("system_states", value.into());
        match name {
            Some(state) if state == RUNNING => Ok(()),
            Some(state) => Err(Error::NotReady(format!(
                "the guest is still starting, or is going down or to sleep: its kernel is in state {state}, and \
                 may be changed only in {RUNNING}; try again when it runs"
            ))),
            None => Err(Error::Odd(format!(
                "system_state is {value}, which is none of the system_states in BTF; expected {RUNNING}"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::btf::blob::Blob;
    use crate::fixture::{vcpus, Fixture, KIND};
    use crate::{Error, Kernel};

    fn checked(state: u32) -> Result<(), Error> {
        let mut types = Blob::new();
        types.enumeration(
            "system_states",
            &[("SYSTEM_BOOTING", 0), ("SYSTEM_RUNNING", 3)],
        );
        let mut fixture = Fixture::new();
        fixture.constants.extend([
            ("__start_BTF", types.bytes()),
            ("__stop_BTF", Vec::new()),
            ("system_state", state.to_le_bytes().to_vec()),
        ]);
        let memory = fixture.build();
        Kernel::read(&memory, KIND, &vcpus()).unwrap().check_runs()
    }

    #[test]
    fn only_a_kernel_in_the_running_state_runs() {
        checked(3).unwrap();
        assert!(matches!(checked(0), Err(Error::NotReady(_))));
        let error = checked(9).unwrap_err();
        assert!(matches!(error, Error::Odd(_)));
        assert!(error.to_string().contains("system_state is 9"), "{error}");
    }
}
