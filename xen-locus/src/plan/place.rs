//! Where in the arena a payload goes, and its image linked for that place.

use std::ops::Range;

use locus_guest::addr;
use locus_kernel::Kernel;

use super::lay_out::LaidOut;
use super::preconditions::Fitted;
use super::resolve::Resolved;
use super::{conditions, patch_stack};
use crate::arena::digests::CodeDigests;
use crate::arena::record::State;
use crate::arena::{self, Arena, Resident};
use crate::error::{Error, Result};
use crate::link::image::{self, Image};
use crate::link::layout::ImageLayout;
use crate::link::module::lists::{self, Known};
use crate::link::module::{BuiltModule, PayloadAddresses};

/// A payload linked for its place.
#[derive(Debug)]
pub struct Placed {
    /// Its first arena page.
    pub first: usize,
    /// Its code is in the arena already: the number of the directory entry that it takes over.
    pub parked: Option<usize>,
    /// The guest knows its module entry already.
    pub listed: bool,
    /// Where its record goes: a range of the image's bytes.
    pub record_place: Range<usize>,
    /// Its bytes; the room of the records is empty.
    pub image: Image,
    /// Its module entry, in none of the guest's lists.
    pub entry: BuiltModule,
}

/// Links the payload for the pages that it had, if its code is parked in the arena, else for free ones. Threads or timers
/// that an earlier application left behind must go on in the same code.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): the arena is full, or a reference is out of reach.
pub fn place(
    fitted: &Fitted<'_, '_>,
    arena: &Arena,
    residents: &[Resident],
    resolved: &Resolved,
    laid_out: &LaidOut<'_>,
) -> Result<Placed> {
    let layout = &laid_out.layout;
    let [record_place, _] = layout.record.places();
    let parked = residents.iter().filter(|r| {
        r.slot.state == State::Parked
            && r.record.sha256 == resolved.draft.sha256
            && usize::from(r.slot.pages) == layout.rights.len()
    });
    for old in parked {
        let first = usize::from(old.slot.first);
        let (image, entry) = link(fitted, resolved, laid_out, first)?;
        let known = lists::known(fitted.kernel, old.record.module)?;
        let record_place = match known {
            // What the guest never knew it can't be using: that may be replaced by other bytes.
            Known::Never => Some(record_place.clone()),
            Known::Listed => next_place(fitted.kernel, layout, old, (&image, &entry.place))?,
            // It is about to be reclaimed.
            Known::Removed => None,
        };
        if let Some(record_place) = record_place {
            return Ok(Placed {
                first,
                parked: Some(old.index),
                listed: known == Known::Listed,
                record_place,
                image,
                entry,
            });
        }
    }
    let first = arena.find_room(fitted.kernel.kind, layout.rights.len())?;
    let (image, entry) = link(fitted, resolved, laid_out, first)?;
    Ok(Placed {
        first,
        parked: None,
        listed: false,
        record_place,
        image,
        entry,
    })
}

/// Where the next record of `old` goes, which the guest knows. `None` if it is another payload than this `image`, or was
/// placed by an earlier build that left no room for a second record.
///
/// # Errors
/// [`Class::TryAgain`](crate::error::Class::TryAgain): its code has breakpoints of the guest's own. With these it would
/// look like another payload, and get fresh variables.
fn next_place(
    kernel: &Kernel<'_>,
    layout: &ImageLayout,
    old: &Resident,
    (image, place): (&Image, &PayloadAddresses),
) -> Result<Option<Range<usize>>> {
    if old.record.record_room != Some(layout.record.recorded())
        || old.record.module != place.module()
    {
        return Ok(None);
    }
    if !is_same(kernel, layout, image, place)? {
        // A kprobe's breakpoint does not make it another payload.
        let (name, code) = (&old.record.name, patch_stack::code_of(&old.record));
        conditions::check_unprobed(kernel, name, &code)?;
        return Ok(None);
    }
    Ok(layout.record.after(old.slot.record_offset))
}

/// The image and the module entry for arena page `first`.
fn link(
    fitted: &Fitted<'_, '_>,
    resolved: &Resolved,
    laid_out: &LaidOut<'_>,
    first: usize,
) -> Result<(Image, BuiltModule)> {
    let (kernel, payload, objects) = (fitted.kernel, fitted.payload, &fitted.objects);
    let LaidOut { entry, layout } = laid_out;
    let base = arena::page_address(first);
    let mut image = image::link(payload, kernel, objects, layout, base, resolved.returns)?;
    let entry = image::build_module(entry, payload, kernel, objects, layout, (base, &image))?;
    image.put_module(layout, &entry)?;
    Ok((image, entry))
}

/// Whether the code and constants of `image`, except the records, are in the arena already. A branch may be switched the
/// other way there: its static key may be a variable of the payload, and these keep their values.
///
/// # Errors
/// [`Class::TryAgain`](crate::error::Class::TryAgain): the guest is just switching a branch. Or it can't be read.
fn is_same(
    kernel: &Kernel<'_>,
    layout: &ImageLayout,
    image: &Image,
    place: &PayloadAddresses,
) -> Result<bool> {
    let len = bytes_of(place.text)? + bytes_of(place.rodata)?;
    let mut found = kernel.space.fresh().read_vec(place.text.start, len)?;
    let mut wanted = image.bytes.get(..len).ok_or_else(too_short)?.to_vec();
    for bytes in [&mut found, &mut wanted] {
        let record = layout.record.range();
        bytes.get_mut(record).ok_or_else(too_short)?.fill(0);
    }
    let base = place.text.start;
    let labels = image.jumps.iter().filter_map(|jump| jump.recorded(base));
    are_same(&CodeDigests::of(wanted, labels.collect()), base, found)
}

/// Whether `found`, at `base`, is the code of `digests`.
fn are_same(digests: &CodeDigests, base: addr::Gva, found: Vec<u8>) -> Result<bool> {
    if let Some(label) = digests.being_switched(&found) {
        return Err(Error::passing(format!(
            "the guest is switching the branch at {} of the parked payload, as a static key says",
            base.plus(label.at.into())
        )));
    }
    Ok(digests.changed(found).is_empty())
}

/// Length of `range` in bytes.
pub(super) fn bytes_of(range: addr::Range) -> Result<usize> {
    usize::try_from(range.len()).map_err(|_| too_short())
}

/// The image is shorter than its layout says. It never is: the linker gives it the layout's length.
pub(super) fn too_short() -> Error {
    Error::failed("the payload's image is shorter than its layout: this is a defect of xen-locus")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::digests::RecordedLabel;
    use crate::x86::{INT3, NOP5};

    #[test]
    fn a_payload_whose_branch_is_being_switched_is_looked_at_again() {
        let label = RecordedLabel {
            at: 5,
            to: 20,
            size: 5,
        };
        let code = [[0x90; 5], NOP5, [0xc3; 5]].concat();
        let digests = CodeDigests::of(code.clone(), vec![label]);
        let found = |at: usize, byte: u8| {
            let mut found = code.clone();
            found[at] = byte;
            are_same(&digests, arena::BASE, found)
        };
        assert!(found(0, 0x90).unwrap());
        let error = found(5, INT3).unwrap_err();
        assert!(error.is_passing(), "{error}");
        let place = arena::BASE.plus(5).to_string();
        assert!(error.to_string().contains(&place), "{error}");
        // Elsewhere it is other code.
        assert!(!found(0, INT3).unwrap());
        assert!(!found(5, 0).unwrap());
    }
}
