//! What is not logged: that something is to be tried again, and guests of which nothing is noted and that can't be read.

use super::*;
use crate::ops::recover_all::Recovered;

#[test]
fn that_a_guest_of_which_nothing_is_noted_can_not_be_read_is_no_line() {
    let host = Host::new();
    let recover = || super::recover(&host.operator(), &host.guest, &options(false));
    host.guest.is_strange.set(true);
    recover().unwrap_err();
    assert_eq!(host.log.told(), [""; 0]);
    // If a run was at work on it, it is one.
    let host = Host::interrupted();
    host.guest.is_strange.set(true);
    super::recover(&host.operator(), &host.guest, &options(false)).unwrap_err();
    assert_eq!(host.log.told(), ["recover  not-applicable"]);
}

#[test]
fn a_guest_is_left_out_only_if_nothing_is_noted_of_it_and_it_has_no_kernel_of_ours() {
    let found = |is_noted, result: Result<recover::Report>| Recovered {
        domid: Some(DomId(3)),
        name: "web".into(),
        uuid: UUID.into(),
        is_noted,
        result,
    };
    let booting = || locus_kernel::Error::NotReady("it boots".into()).into();
    for error in [booting(), Error::not_applicable("not Linux")] {
        assert!(found(false, Err(error)).is_left_out());
    }
    for error in [
        Error::failed("Xen"),
        Error::try_again("a run has the lock"),
        Error::uncertain("half"),
    ] {
        assert!(!found(false, Err(error)).is_left_out());
    }
    assert!(!found(true, Err(booting())).is_left_out());
}

#[test]
fn that_an_interrupted_run_is_to_be_recovered_later_is_no_line() {
    let host = Host::interrupted();
    let recover = || super::recover(&host.operator(), &host.guest, &options(false));
    host.guest.is_busy.set(true);
    recover().unwrap_err();
    assert_eq!(host.log.told(), [""; 0]);
    assert!(host.has_journal());
    host.guest.is_busy.set(false);
    recover().unwrap();
    assert_eq!(host.log.told(), ["recover one finished"]);
}

#[test]
fn an_error_after_which_the_operator_tries_again_is_not_logged() {
    let host = Host::new();
    let asked = Asked {
        operation: Operation::Apply,
        patch: "one",
        sha256: String::new(),
    };
    let run = |error: fn() -> Error| {
        let act = |_: &locus_kernel::Kernel<'_>, _: &Options| Err(error());
        host.operator()
            .run(&host.guest, &asked, &options(false), act)
            .unwrap_err();
        host.log.told()
    };
    assert_eq!(run(|| Error::not_loaded("ext4")), [""; 0]);
    let told = run(|| Error::not_applicable("another kernel"));
    assert_eq!(told, ["apply one not-applicable"]);
}
