//! How large a payload is in the guest, and what goes where in it.

use locus_payload::Payload;

use super::preconditions::Fitted;
use super::resolve::Resolved;
use crate::error::Result;
use crate::link::layout::ImageLayout;
use crate::link::module::{self, ModuleDraft};

/// A payload whose size in the guest is known.
#[derive(Debug)]
pub struct LaidOut<'p> {
    /// Its module entry, not built yet.
    pub entry: ModuleDraft<'p>,
    /// Its sections, its record's room and its module entry, page by page.
    pub layout: ImageLayout,
}

/// Lays out the payload, with room for its record and its module entry.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): it is larger than any arena, or a table of it is not as
/// this kernel has it.
pub fn lay_out<'a>(fitted: &Fitted<'a, '_>, resolved: &Resolved) -> Result<LaidOut<'a>> {
    let payload: &'a Payload = fitted.payload;
    let entry = ModuleDraft::of(payload, fitted.kernel, resolved.depends.len())?;
    // The code comes first, so its length does not depend on the record's room.
    let text_len = ImageLayout::new(payload, 0, entry.size())?.text_len;
    let labels = module::jump_labels(payload);
    let room = resolved.draft.room(text_len, labels)?;
    let layout = ImageLayout::new(payload, room, entry.size())?;
    Ok(LaidOut { entry, layout })
}
