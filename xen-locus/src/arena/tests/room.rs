//! Which pages a payload gets, and what does not fit.

use super::*;

#[test]
fn room_is_the_first_run_that_is_free_or_was_left_behind() {
    let guest = Guest::new(GuestType::Pvh);
    let mut arena = guest.committed(&[]);
    guest.add(&mut arena, 1, &ALL).unwrap();
    let kernel = guest.kernel();
    arena.commit(&guest, &kernel, vec![slot(1, 3)]).unwrap();
    let find = |arena: &Arena, rights: &[Rights]| arena.find_room(GuestType::Pvh, rights);
    assert_eq!(find(&arena, &ALL).unwrap(), 4);
    // Left behind by a run that was ended: taken again for the same rights, passed over for others.
    guest.add(&mut arena, 4, &ALL).unwrap();
    assert_eq!(find(&arena, &ALL).unwrap(), 4);
    assert_eq!(find(&arena, &[Rights::Data]).unwrap(), 6);
    assert_eq!(find(&arena, &[Rights::Data, Rights::Text]).unwrap(), 6);
    // To the last page and no further.
    assert_eq!(find(&arena, &[Rights::Data; 234]).unwrap(), 6);
    refused(
        find(&arena, &[Rights::Data; 235]),
        Class::NotApplicable,
        "this pvh guest has 239, of which payloads, parked ones included, use 3",
    );
    let pv = arena.find_room(GuestType::Pv, &[Rights::Data; 91]);
    refused(pv, Class::NotApplicable, "pv guest has 95");
    arena.directory.slots = vec![slot(1, 1); record::ENTRIES_MAX];
    refused(
        find(&arena, &ALL),
        Class::NotApplicable,
        "directory is full",
    );
    let slots = vec![slot(1, 1); record::ENTRIES_MAX + 1];
    let full = arena.commit(&guest, &kernel, slots);
    refused(full, Class::NotApplicable, "directory is full");
}
