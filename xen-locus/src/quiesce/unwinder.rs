//! The kernel's unwinder, made when it is first needed and kept.

use locus_kernel::unwind::Walker;
use locus_kernel::Kernel;

/// An unwinder that is made when it is first needed.
#[derive(Default)]
pub(super) struct Unwinder<'k, 'm> {
    /// `None` before it is needed; `None` in it if the kernel's unwind data can't be read.
    walker: Option<Option<Walker<'k, 'm>>>,
    /// The tasks were listed since it learned of the guest's modules.
    is_old: bool,
}

impl<'k, 'm> Unwinder<'k, 'm> {
    /// Says that the guest may have loaded modules since.
    pub(super) fn outdate(&mut self) {
        self.is_old = true;
    }

    /// The unwinder, with the guest's modules as they are now; `None` if its data can't be read.
    pub(super) fn get(&mut self, kernel: &'k Kernel<'m>) -> Option<&Walker<'k, 'm>> {
        let walker = self.walker.get_or_insert_with(|| Walker::new(kernel).ok());
        if std::mem::take(&mut self.is_old) {
            if let Some(Err(_)) = walker.as_mut().map(Walker::refresh) {
                *walker = None;
            }
        }
        walker.as_ref()
    }
}
