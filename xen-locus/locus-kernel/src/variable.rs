//! A kernel's variables. Their types are not in BTF, but up to the next symbol there must be room for what is read.

use locus_guest::addr::Gva;

use crate::{Error, Kernel};

impl Kernel<'_> {
    /// Guest virtual address of the variable `name`, which is read as `bytes` bytes. A kernel may make a variable narrower,
    /// and what stands behind it would be read with it. Then another symbol follows too early.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no such symbol, [`Error::Odd`] if there is no room for so many bytes.
    pub fn variable(&self, name: &str, bytes: u64) -> Result<Gva, Error> {
        let at = self.symbols.need(name)?;
        match self.symbols.room(at) {
            Some(room) if room < bytes => Err(Error::Odd(format!(
                "variable {name} at {at} has {room} bytes up to the next symbol; expected {bytes}"
            ))),
            // Behind the last symbol the room is not known.
            _ => Ok(at),
        }
    }

    /// The same for a variable that not all kernels have; `None` if there is no such symbol.
    ///
    /// # Errors
    /// [`Error::Odd`] if there is no room for so many bytes.
    pub fn variable_if_any(&self, name: &str, bytes: u64) -> Result<Option<Gva>, Error> {
        match self.symbols.addr(name) {
            Some(_) => self.variable(name, bytes).map(Some),
            None => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::fixture::{vcpus, Fixture, KIND, TEXT};
    use crate::{Error, Kernel};

    #[test]
    fn a_variable_is_not_read_beyond_the_next_symbol() {
        let mut fixture = Fixture::new();
        let at = TEXT.0 + (8 << 20);
        for (offset, name) in [(0, "narrow"), (4, "wide"), (4, "alias"), (12, "end")] {
            fixture.symbols.push((at + offset, 'D', name.to_owned()));
        }
        let memory = fixture.build();
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        assert_eq!(kernel.variable("wide", 8).unwrap().0, at + 4);
        assert_eq!(kernel.variable("narrow", 4).unwrap().0, at);
        for result in [
            kernel.variable("narrow", 8).map(Some),
            kernel.variable_if_any("narrow", 8),
        ] {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::Odd(_)), "{error}");
            assert!(
                error
                    .to_string()
                    .contains("has 4 bytes up to the next symbol"),
                "{error}"
            );
        }
        assert!(matches!(kernel.variable("none", 8), Err(Error::Missing(_))));
        assert_eq!(kernel.variable_if_any("none", 8).unwrap(), None);
    }
}
