use super::*;
use crate::btf::blob::Blob;
use crate::fixture::{vcpus, Fixture, KIND, RODATA, TEXT};

/// Two words of features and one of bugs.
const WORDS: u32 = 3;
const CPU: Gva = Gva(TEXT.0 + (32 << 20));
const CHOICES: Gva = Gva(CPU.0 + 0x1000);
const INIT: Gva = Gva(CPU.0 + 0x2000);

/// Types, with so many words of bits.
fn btf(words: u32, full: &str) -> Vec<u8> {
    let mut types = Blob::with_integers();
    let caps = types.array(3, words);
    let union = types.fields(TypeKind::Struct, "", 64, &[("x86_capability", caps, 0, 0)]);
    types.fields(
        TypeKind::Struct,
        "cpuinfo_x86",
        64,
        &[("family", 3, 0, 0), ("", union, 64, 0)],
    );
    let choice = |types: &mut Blob, name| {
        types.enumeration(name, &[("NONE", 0), (full, 1), ("HALF", -1)]);
    };
    for name in [
        "mds_mitigations",
        "retbleed_mitigation",
        "spectre_v2_mitigation",
        "l1d_flush_mitigations",
    ] {
        choice(&mut types, name);
    }
    types.bytes()
}

/// Names for the bits, as a table of pointers to stand right behind their strings.
fn names(count: usize, named: &[(usize, u64)]) -> Vec<u8> {
    let mut out = vec![0; count * 32 * 8];
    for &(bit, at) in named {
        out[8 * bit..8 * bit + 8].copy_from_slice(&at.to_le_bytes());
    }
    out
}

struct Sample {
    words: [u32; 3],
    btf_words: u32,
    /// What the name of bit 33 points to.
    name_at: u64,
    /// More variables.
    more: Vec<String>,
    /// A name of a choice has control characters.
    strange: bool,
}

impl Default for Sample {
    fn default() -> Sample {
        Sample {
            words: [0x8000_0001, 0b110, 0b11],
            btf_words: WORDS,
            name_at: RODATA.0 + 64 + 4,
            more: Vec::new(),
            strange: false,
        }
    }
}

impl Sample {
    fn read(&self) -> Result<Cpu, Error> {
        let mut fixture = Fixture::new();
        // The first constant stands 64 bytes into read-only data.
        let at = RODATA.0 + 64;
        let strings = b"fpu\0pti\0meltdown\0es\x1bc\0".to_vec();
        fixture.constants.insert(0, ("strings", strings));
        let features = names(2, &[(0, at), (33, self.name_at)]);
        fixture.constants.push(("x86_cap_flags", features));
        let bugs = names(1, &[(0, at + 8)]);
        fixture.constants.push(("x86_bug_flags", bugs));
        let full = if self.strange { "FU\u{7}LL" } else { "FULL" };
        let blob = btf(self.btf_words, full);
        fixture.constants.push(("__start_BTF", blob));
        fixture.constants.push(("__stop_BTF", Vec::new()));
        for (name, at) in [
            ("boot_cpu_data", CPU.0),
            ("mds_mitigation", CHOICES.0),
            ("retbleed_mitigation", CHOICES.0 + 4),
            ("spectre_v2_enabled", CHOICES.0 + 8),
            ("other_mitigation", CHOICES.0 + 12),
            ("x86_return_thunk", CHOICES.0 + 16),
            ("__init_begin", INIT.0),
            ("l1d_flush_mitigation", INIT.0 + 8),
            ("__init_end", INIT.0 + 16),
        ] {
            fixture.symbols.push((at, 'd', name.to_owned()));
        }
        for name in &self.more {
            fixture.symbols.push((CHOICES.0, 'd', name.clone()));
        }
        let memory = fixture.build();
        let mut cpu = vec![0; 8];
        cpu.extend(self.words.iter().flat_map(|w| w.to_le_bytes()));
        memory.map_bytes(CPU, &cpu, true, false);
        let mut choices = Vec::new();
        for choice in [1u32, 7, u32::MAX, 1] {
            choices.extend(choice.to_le_bytes());
        }
        choices.extend(TEXT.0.to_le_bytes());
        memory.map_bytes(CHOICES, &choices, true, false);
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        Cpu::read(&kernel)
    }
}

#[test]
fn features_and_bugs_have_the_names_that_the_kernel_gives_them() {
    let cpu = Sample::default().read().unwrap();
    assert_eq!(cpu.words(), [0x8000_0001, 0b110, 0b11]);
    // Bits 31, 34 and 65 are set and have no name.
    assert_eq!(cpu.features(), ["fpu", "pti"]);
    assert_eq!(cpu.bugs(), ["meltdown"]);
    assert!(cpu.has(31) && cpu.has(34) && !cpu.has(32) && !cpu.has(96));
    assert_eq!(cpu.named("pti"), Some(true));
    assert_eq!(cpu.named("sse"), None);
    assert!(cpu.pti());
    assert_eq!(cpu.return_thunk(), Some(TEXT));
    let without = Sample {
        words: [0, 0b100, 0],
        ..Sample::default()
    };
    let cpu = without.read().unwrap();
    assert_eq!(cpu.named("pti"), Some(false));
    assert!(!cpu.pti() && cpu.features().is_empty() && cpu.bugs().is_empty());
}

#[test]
fn choices_are_named_by_their_enumeration_and_discarded_ones_left_out() {
    let cpu = Sample::default().read().unwrap();
    let found: Vec<(&str, &str)> = cpu
        .mitigations()
        .iter()
        .map(|(what, name)| (what.as_str(), name.as_str()))
        .collect();
    assert_eq!(
        found,
        [
            ("mds_mitigation", "FULL"),
            (
                "retbleed_mitigation",
                "7, which retbleed_mitigation has no name for"
            ),
            ("spectre_v2_enabled", "HALF"),
        ]
    );
}

#[test]
fn a_choice_whose_name_is_not_plain_is_cleaned_and_too_many_are_refused() {
    let strange = Sample {
        more: vec!["\u{1b}[2J_mitigation".into()],
        ..Sample::default()
    };
    // Its enumeration is not there: it is passed over.
    assert_eq!(strange.read().unwrap().mitigations().len(), 3);
    let named = Sample {
        strange: true,
        ..Sample::default()
    };
    let cpu = named.read().unwrap();
    let mut names = cpu.mitigations().values();
    assert!(names.all(|name| !name.contains(char::is_control)));
    let many = Sample {
        more: (0..64).map(|i| format!("bug{i}_mitigation")).collect(),
        ..Sample::default()
    };
    assert!(matches!(many.read(), Err(Error::Odd(_))));
}

#[test]
fn words_and_names_that_do_not_add_up_are_refused() {
    for btf_words in [0, 2, 4, 65, u32::MAX] {
        let sample = Sample {
            btf_words,
            ..Sample::default()
        };
        assert!(matches!(sample.read(), Err(Error::Odd(_))), "{btf_words}");
    }
}

#[test]
fn a_name_that_is_no_word_or_no_memory_is_refused() {
    let text = RODATA.0 + 64;
    for name_at in [text + 17, text + 3, 0x1000, u64::MAX] {
        let sample = Sample {
            name_at,
            ..Sample::default()
        };
        assert!(sample.read().is_err(), "{name_at:#x}");
    }
}
