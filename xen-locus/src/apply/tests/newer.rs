//! What a newer xen-locus left in the guest is refused, and stays as it is.

use locus_guest::addr::PAGE_LEN;

use super::*;
use crate::arena::record::tests::newer::{of_next_version, of_unknown_state};
use crate::arena::record::COPY;
use crate::arena::BASE;
use crate::machine::mock::code;

/// The arena's directory with both of its copies.
fn page(guest: &Guest) -> [u8; PAGE_LEN] {
    guest.peek(BASE.0)
}

#[test]
fn a_newer_directory_is_refused_and_stays_as_it_is() {
    for make_newer in [of_next_version, of_unknown_state] {
        let guest = Guest::new();
        guest.applied(&payload("one", &[A]));
        let mut newer = page(&guest);
        // The copy that counts was written last.
        let half = match Arena::read(&guest.kernel()).unwrap().directory.generation % 2 {
            0 => 0,
            _ => COPY,
        };
        make_newer(&mut newer[half..half + COPY]);
        guest.poke(BASE.0, &newer);
        let kernel = guest.kernel();
        let recovered = crate::recover::of_guest(&guest, &kernel, None, &options(false));
        for error in [
            guest.apply(&payload("two", &[B]), Mode::Apply).unwrap_err(),
            guest.revert("one").unwrap_err(),
            recovered.unwrap_err(),
        ] {
            assert_eq!(error.exit_code(), ExitCode::NotApplicable, "{error}");
            assert!(error.is_newer_format(), "{error}");
        }
        assert_eq!(page(&guest), newer);
        assert!(guest.intent.borrow().is_none());
        assert_ne!(guest.peek::<11>(FUNCTIONS[A].1), code(A as u8));
        assert_eq!(guest.peek::<11>(FUNCTIONS[B].1), code(B as u8));
    }
}
