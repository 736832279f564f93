//! Known faults of QEMU's SVM emulation, and what they look like on a console. A scenario that fails
//! by one of them says nothing about the subject, and is run again.

use std::path::Path;

use crate::host::tail;

/// Whether Xen's console shows a triple fault of a guest at an address of Xen itself (code segment
/// e008). No guest can cause that.
pub fn triple_fault_in_xen(console: &str) -> bool {
    let lines: Vec<&str> = console.lines().collect();
    lines
        .iter()
        .enumerate()
        .filter(|(_, l)| l.contains("Triple fault"))
        .any(|(at, _)| {
            let dump = || lines.iter().skip(at).take(16);
            dump().any(|l| l.contains("RIP:") && l.contains(" e008:"))
                && dump().any(|l| l.contains("CONTEXT: hvm guest"))
        })
}

/// Whether the console log of a crashed guest shows [`equal_gs_bases`]. `crashed` are lines of
/// `xl list`; `logs` is the folder of the run's logs.
pub fn equal_gs_bases_in(logs: &Path, crashed: &[String]) -> bool {
    let names = crashed.iter().filter_map(|line| line.split(' ').next());
    names
        .map(|name| logs.join(format!("guest-{name}.log")))
        .any(|log| equal_gs_bases(&tail(&log, 60)))
}

/// Whether a guest's console shows a panic in the kernel's exception entry with both GS bases being
/// the kernel's. `swapgs` can't lead to that.
pub fn equal_gs_bases(console: &str) -> bool {
    let panicked = console.contains("Kernel panic - not syncing: Fatal exception in interrupt");
    let bases = |line: &str| {
        let (_, rest) = line.split_once(" GS:")?;
        let (gs, rest) = rest.split_once('(')?;
        let (_, kernel_gs) = rest.split_once("knlGS:")?;
        Some((gs.to_owned(), kernel_gs.trim().to_owned()))
    };
    let equal = |(gs, kernel_gs): (String, String)| gs == kernel_gs && gs.starts_with("ffff");
    panicked && console.lines().filter_map(bases).any(equal)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOST: &str = "(XEN) d1v0 Triple fault - invoking HVM shutdown action 1\n\
        (XEN) *** Dumping Dom1 vcpu#0 state: ***\n\
        (XEN) CPU:    1\n\
        (XEN) RIP:    e008:[<ffff82d0402a1b2c>]\n\
        (XEN) RFLAGS: 0000000000010046   CONTEXT: hvm guest (d1v0)\n";

    #[test]
    fn equal_gs_bases_in_a_panic_are_qemus_fault() {
        let lost = "[   42.5] FS:  000000000bc923c0(0000) GS:ffff88800f800000(0000) \
            knlGS:ffff88800f800000\n\
            [   42.6] Kernel panic - not syncing: Fatal exception in interrupt\n";
        assert!(equal_gs_bases(lost));
        assert!(!equal_gs_bases(
            &lost.replace("knlGS:ffff88800f800000", "knlGS:0000000000000000")
        ));
        assert!(!equal_gs_bases(&lost.replace("panic", "warning")));
    }

    #[test]
    fn only_a_triple_fault_at_xens_own_address_is_qemus_fault() {
        assert!(triple_fault_in_xen(LOST));
        assert!(!triple_fault_in_xen(&LOST.replace("e008", "0010")));
        assert!(!triple_fault_in_xen(
            &LOST.replace("Triple fault", "Something else")
        ));
    }
}
