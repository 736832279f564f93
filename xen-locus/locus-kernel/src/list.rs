//! The kernel's circular lists: `struct list_head` (include/linux/types.h).

use locus_guest::addr::Gva;
use locus_guest::space::Space;

use crate::Error;

/// Walks the circular list whose head is at the guest virtual address `head`.
///
/// The result has the address of the `list_head` of each element, in the order of `next`. The head
/// is not an element. To get from such an address to the structure around it, subtract the offset
/// of the member.
///
/// # Errors
/// [`Error::Odd`] if the list does not come back to its head within `most` elements;
/// [`Error::Memory`] if an element can't be read.
pub fn list(space: &Space<'_>, head: Gva, most: usize) -> Result<Vec<Gva>, Error> {
    let mut found = Vec::new();
    let mut at = Gva(space.read_u64(head)?);
    while at != head {
        if found.len() >= most {
            return Err(Error::Odd(format!(
                "the list at {head} does not come back to its head within {most} elements"
            )));
        }
        found.push(at);
        at = Gva(space.read_u64(at)?);
    }
    Ok(found)
}
