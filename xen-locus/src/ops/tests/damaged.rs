//! A journal that can't be believed.

use super::*;
use crate::arena::record::MODULE;
use crate::error::Class;

#[test]
fn that_a_journal_can_not_be_believed_is_logged_before_it_goes() {
    let host = Host::new();
    host.guest.has_damaged_journal.set(true);
    host.trace.fail("append");
    host.apply("one", false).unwrap_err();
    assert!(host.guest.has_damaged_journal.get());
    host.trace.fail("");
    host.trace.take();
    host.apply("one", false).unwrap();
    let steps = host.trace.take();
    let place = |step| steps.iter().position(|&s| s == step);
    assert!(place("append") < place("remove journal"));
    assert!(place("remove journal") < place("begin"));
    let told = host.log.told();
    assert_eq!(
        told[told.len() - 2..],
        ["recover  nothing-to-do", "apply one applied"]
    );
    let lines = host.log.lines.borrow();
    let message = &lines[lines.len() - 2].message;
    assert!(message.contains("it is cut off"), "{message}");
    assert!(message.contains("kept as /kept"), "{message}");
    // Where the guest's memory does not account for all, it stays.
    let host = Host::interrupted();
    let module = host.guest.residents().unwrap()[0].record.module.0;
    host.guest.poke(module - MODULE, &[2]);
    host.guest.has_damaged_journal.set(true);
    let error = host.apply("two", false).unwrap_err();
    assert_eq!(error.class(), Class::Uncertain, "{error}");
    assert!(host.guest.has_damaged_journal.get());
    assert_eq!(host.log.told()[0], "recover  uncertain");
}
