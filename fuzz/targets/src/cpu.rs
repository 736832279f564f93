//! Features, bugs and mitigations of the processor.

use locus_guest::addr::PAGE_LEN;
use locus_kernel::btf::blob::Blob;
use locus_kernel::btf::TypeKind;
use locus_kernel::fixture::{Fixture, TEXT};

use super::guest::DATA;
use super::look;
use super::stage::Stage;

// Offsets in the page that is the input: pointers to the names of features (two words) and of bugs (one
// word), `boot_cpu_data`, mitigations, the return thunk, and the text of the names.
const FEATURES: u64 = 0;
const BUGS: u64 = 0x200;
const CPU: u64 = 0x300;
const CHOICES: u64 = 0x340;
const THUNK: u64 = 0x350;
const STRINGS: u64 = 0x400;

fn types() -> Vec<u8> {
    let mut types = Blob::with_integers();
    let caps = types.array(3, 3);
    let union = types.composite(TypeKind::Union, "", 64, &[("x86_capability", caps, 0)]);
    types.structure("cpuinfo_x86", 72, &[("family", 3, 0), ("", union, 8)]);
    for name in [
        "mds_mitigations",
        "retbleed_mitigation",
        "spectre_v2_mitigation",
    ] {
        types.enumeration(name, &[("NONE", 0), ("FULL", 1), ("HALF", -1)]);
    }
    types.bytes()
}

fn page() -> Vec<u8> {
    let mut page = vec![0; PAGE_LEN];
    let mut put = |at: u64, bytes: &[u8]| {
        page[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    };
    for (bit, name) in [(0, 0), (33, 4), (63, 0)] {
        put(FEATURES + 8 * bit, &(DATA.0 + STRINGS + name).to_le_bytes());
    }
    put(BUGS, &(DATA.0 + STRINGS + 8).to_le_bytes());
    put(STRINGS, b"fpu\0pti\0meltdown\0");
    put(CPU + 8, &[1, 0, 0, 0, 2, 0, 0, 0, 1]);
    put(CHOICES, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    put(THUNK, &TEXT.0.to_le_bytes());
    page
}

fn stage() -> Stage {
    let mut fixture = Fixture::new();
    for (name, at) in [
        ("x86_cap_flags", FEATURES),
        ("x86_bug_flags", BUGS),
        ("boot_cpu_data", CPU),
        ("mds_mitigation", CHOICES),
        ("retbleed_mitigation", CHOICES + 4),
        ("spectre_v2_enabled", CHOICES + 8),
        ("x86_return_thunk", THUNK),
    ] {
        fixture.symbols.push((DATA.0 + at, 'd', name.to_owned()));
    }
    fixture.constants.push(("__start_BTF", types()));
    fixture.constants.push(("__stop_BTF", vec![0; 8]));
    Stage::new(fixture, DATA, 1)
}

thread_local! {
    static STAGE: Stage = stage();
}

/// `data` is the page with all variables, and then the kernel's types.
pub fn run(data: &[u8]) {
    STAGE.with(|stage| stage.kernel(data).iter().for_each(look::cpu));
}

/// One processor, with the types of the fixture, and with types in the input.
pub fn seeds() -> Vec<Vec<u8>> {
    vec![page(), [page(), types()].concat()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use locus_kernel::cpu::Cpu;

    #[test]
    fn the_seeds_have_features_bugs_and_choices() {
        for seed in seeds() {
            let cpu = Cpu::read(&stage().kernel(&seed).unwrap()).unwrap();
            assert_eq!(cpu.features(), ["fpu", "pti"]);
            assert_eq!(cpu.bugs(), ["meltdown"]);
            assert_eq!(cpu.mitigations().len(), 3);
        }
    }
}
