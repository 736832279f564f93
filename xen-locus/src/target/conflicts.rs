//! Conflicts: functions that can't be replaced because of their section, or because tracing, a kprobe, BPF or a
//! livepatch of the guest uses them.
//!
//! After a redirect behind the ftrace nop, whatever is attached to the old function would no longer see it run. In
//! code that runs before the kernel is set up, or while it is entered, the effects can't be foreseen. The guest's
//! own tables show what is attached.

use std::fmt;

use locus_guest::addr::Gva;
use locus_kernel::{list, Kernel};

use crate::error::Result;

/// Sections of the kernel's text whose functions can't be replaced: symbols at their start and end,
/// and why.
const SECTIONS: [(&str, &str, &str); 4] = [
    (
        "_sinittext",
        "_einittext",
        "it is __init code, which ran when the kernel started and whose memory is free since",
    ),
    (
        "__init_begin",
        "__init_end",
        "it is in the kernel's __init memory, which is free since the kernel started",
    ),
    (
        "__entry_text_start",
        "__entry_text_end",
        "it is entry code, which runs on unusual stacks and page tables and can't be traced",
    ),
    (
        "__noinstr_text_start",
        "__noinstr_text_end",
        "it is noinstr code, which runs while the kernel is entered or left and can't be traced",
    ),
];
/// Most elements of any of the lists looked at.
const ELEMENTS_MAX: usize = 1 << 16;

/// Why the place of a function of the kernel's image forbids to replace it, if it does.
#[must_use]
pub fn section(kernel: &Kernel<'_>, entry: Gva) -> Option<String> {
    SECTIONS.into_iter().find_map(|(start, end, why)| {
        let from = kernel.symbols.addr(start)?;
        let to = kernel.symbols.addr(end)?;
        (from <= entry && entry < to).then(|| format!("{why} (between {start} and {end})"))
    })
}

/// Whether `at` is in memory of the kernel's image that it frees after its start. Its first copy of the
/// per-CPU variables stands there too, whose addresses mean the CPUs' own.
#[must_use]
pub fn freed(kernel: &Kernel<'_>, at: Gva) -> bool {
    let between = |start, end| {
        let (start, end) = (kernel.symbols.addr(start), kernel.symbols.addr(end));
        start
            .zip(end)
            .is_some_and(|(start, end)| start <= at && at < end)
    };
    (between("__init_begin", "__init_end") || between("_sinittext", "_einittext"))
        && !between("__per_cpu_start", "__per_cpu_end")
}

/// Where a function's ftrace site leads, instead of being a nop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lead {
    /// It calls that.
    Call(Gva),
    /// It jumps there.
    Jump(Gva),
}

/// What made a function's ftrace site lead somewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// The guest's own livepatch: the function that runs is another one.
    Livepatch,
    /// A BPF program, by its name.
    Bpf(String),
    /// A tracer, by what is called.
    Ftrace(String),
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Caller::Livepatch => f.write_str("livepatched by the guest itself"),
            Caller::Bpf(name) => write!(f, "attached to by a BPF program of the guest ({name})"),
            Caller::Ftrace(whom) => {
                write!(
                    f,
                    "traced by the guest itself (its ftrace site calls {whom})"
                )
            }
        }
    }
}

/// What made the ftrace site of the function at `entry` `lead` somewhere; `None` if nothing of the guest's is known that
/// does so.
///
/// Of ftrace's users only BPF has a jump put there, to a trampoline that does not return to the function's entry (Linux
/// kernel commit 0c3772a8db1f ("x86/ftrace: Implement DYNAMIC_FTRACE_WITH_JMP") (in v6.19)). Any other jump may be the
/// function's own.
///
/// # Errors
/// The guest's lists can't be read.
pub fn caller(kernel: &Kernel<'_>, entry: Gva, lead: Lead) -> Result<Option<Caller>> {
    let target = match lead {
        Lead::Call(_) if livepatched(kernel, entry)? => return Ok(Some(Caller::Livepatch)),
        Lead::Call(target) | Lead::Jump(target) => target,
    };
    if let Some(name) = bpf_image(kernel, target)? {
        return Ok(Some(Caller::Bpf(name)));
    }
    if let Lead::Jump(_) = lead {
        return Ok(None);
    }
    Ok(Some(Caller::Ftrace(
        match kernel.symbols.covering(target) {
            Some((name, offset)) if offset < 4096 => name.to_owned(),
            _ => target.to_string(),
        },
    )))
}

/// `klp_ops` of kernel/livepatch/patch.c lists, for each livepatched function, the stack of what
/// replaces it.
fn livepatched(kernel: &Kernel<'_>, entry: Gva) -> Result<bool> {
    let (Some(head), Ok(btf)) = (kernel.symbols.addr("klp_ops"), kernel.btf()) else {
        return Ok(false);
    };
    let (Ok(node), Ok(stack), Ok(in_stack), Ok(old)) = (
        btf.offset_of("klp_ops", "node"),
        btf.offset_of("klp_ops", "func_stack"),
        btf.offset_of("klp_func", "stack_node"),
        btf.offset_of_sized("klp_func", "old_func", 8),
    ) else {
        return Ok(false);
    };
    let space = &kernel.space;
    for at in list(space, head, ELEMENTS_MAX)? {
        let ops = Gva(at.0.wrapping_sub(node as u64));
        let top = space.read_u64(ops.plus(stack as u64))?;
        let func = Gva(top.wrapping_sub(in_stack as u64));
        if Gva(space.read_u64(func.plus(old as u64))?) == entry {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The name of the BPF program or trampoline at `target`, from `bpf_kallsyms` (kernel/bpf/core.c).
fn bpf_image(kernel: &Kernel<'_>, target: Gva) -> Result<Option<String>> {
    let (Some(head), Ok(btf)) = (kernel.symbols.addr("bpf_kallsyms"), kernel.btf()) else {
        return Ok(None);
    };
    let (Ok(link), Ok(start), Ok(end), Ok(name), Ok(len)) = (
        btf.offset_of("bpf_ksym", "lnode"),
        btf.offset_of_sized("bpf_ksym", "start", 8),
        btf.offset_of_sized("bpf_ksym", "end", 8),
        btf.offset_of("bpf_ksym", "name"),
        btf.array_len("bpf_ksym", "name"),
    ) else {
        return Ok(None);
    };
    let space = &kernel.space;
    for at in list(space, head, ELEMENTS_MAX)? {
        let symbol = Gva(at.0.wrapping_sub(link as u64));
        let from = Gva(space.read_u64(symbol.plus(start as u64))?);
        let to = Gva(space.read_u64(symbol.plus(end as u64))?);
        if from <= target && target < to {
            let bytes = space.read_vec(symbol.plus(name as u64), len.min(4096))?;
            // There is always a first part.
            let text = bytes.split(|&b| b == 0).next().unwrap_or_default();
            let printable = |c: char| if c.is_control() { '?' } else { c };
            let text = String::from_utf8_lossy(text);
            return Ok(Some(text.chars().map(printable).collect()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ExitCode;
    use crate::target::kprobes::Kprobes;
    use crate::target::redirect;
    use crate::target::symbols::Object;
    use crate::x86::ENDBRS;
    use locus_kernel::btf::blob::Blob;
    use locus_kernel::fixture::{vcpus, Fixture, KIND, TEXT};

    const AT: u64 = TEXT.0 + 0x1000;
    /// Where the lists' elements stand.
    const DATA: u64 = TEXT.0 + (8 << 20);
    /// A trampoline of the guest's.
    const TRAMPOLINE: u64 = TEXT.0 + 0x8000;

    fn types() -> Vec<u8> {
        let mut b = Blob::new();
        let long = b.int("long", 8);
        let byte = b.int("char", 1);
        let two = b.structure("list_head", 16, &[("next", long, 0)]);
        let name = b.array(byte, 16);
        b.structure("kprobe", 64, &[("hlist", two, 0), ("addr", long, 40)]);
        b.structure("klp_ops", 32, &[("node", two, 0), ("func_stack", two, 16)]);
        b.structure(
            "klp_func",
            64,
            &[("old_func", long, 24), ("stack_node", two, 40)],
        );
        b.structure(
            "bpf_ksym",
            64,
            &[
                ("start", long, 0),
                ("end", long, 8),
                ("name", name, 16),
                ("lnode", two, 32),
            ],
        );
        b.bytes()
    }

    /// What is said to a function at `AT` with `code`, where the guest's lists have `words` at their
    /// offsets and the kernel `symbols`.
    fn said(code: &[u8], words: &[(u64, u64)], symbols: &[(u64, &str)]) -> (ExitCode, String) {
        let mut fixture = Fixture::new();
        fixture.function(AT, "victim", code);
        fixture.function(AT + code.len() as u64, "next", &[0xc3]);
        fixture.function(TRAMPOLINE, "ftrace_trampoline", &[0xc3]);
        let mut data = vec![0; 0x1000];
        let mut put = |at: u64, value: u64| {
            let at = usize::try_from(at).unwrap();
            data[at..at + 8].copy_from_slice(&value.to_le_bytes());
        };
        // Empty lists: kprobe_table, klp_ops, bpf_kallsyms.
        put(0x200, DATA + 0x200);
        put(0x210, DATA + 0x210);
        words.iter().for_each(|&(at, value)| put(at, value));
        for (at, name) in [
            (DATA, "kprobe_table"),
            (DATA + 0x200, "klp_ops"),
            (DATA + 0x210, "bpf_kallsyms"),
        ] {
            fixture.symbols.push((at, 'd', name.to_owned()));
        }
        for (at, name) in symbols {
            fixture.symbols.push((*at, 't', (*name).to_owned()));
        }
        fixture.constants.push(("__start_BTF", types()));
        fixture.constants.push(("__stop_BTF", Vec::new()));
        let memory = fixture.build();
        memory.map_bytes(Gva(DATA), &data, true, false);
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        let kprobes = Kprobes::read(&kernel);
        match kprobes.and_then(|kprobes| {
            redirect::examine(&kernel, Object::Kernel, "victim", Gva(AT), None, &kprobes)
        }) {
            Ok(_) => (ExitCode::Done, String::new()),
            Err(error) => (error.exit_code(), error.to_string()),
        }
    }

    /// A nop of ftrace and five whole bytes behind it.
    const GOOD: [u8; 11] = [0x0f, 0x1f, 0x44, 0, 0, 0xb8, 0x2a, 0, 0, 0, 0xc3];
    /// The same with a call of `TRAMPOLINE` for the nop.
    fn called() -> Vec<u8> {
        let distance = u32::try_from(TRAMPOLINE - (AT + 5)).unwrap();
        let mut code = GOOD.to_vec();
        code[0] = 0xe8;
        code[1..5].copy_from_slice(&distance.to_le_bytes());
        code
    }

    #[test]
    fn functions_of_special_sections_are_refused_by_name() {
        assert_eq!(said(&GOOD, &[], &[]).0, ExitCode::Done);
        for (start, end, words) in [
            ("_sinittext", "_einittext", "__init code"),
            ("__init_begin", "__init_end", "__init memory"),
            ("__entry_text_start", "__entry_text_end", "entry code"),
            ("__noinstr_text_start", "__noinstr_text_end", "noinstr code"),
        ] {
            let (exit, text) = said(&GOOD, &[], &[(AT - 16, start), (AT + 64, end)]);
            assert_eq!(exit, ExitCode::NotApplicable, "{text}");
            assert!(text.contains(words) && text.contains(start), "{text}");
            // The end does not belong to it.
            let (exit, text) = said(&GOOD, &[], &[(AT - 16, start), (AT, end)]);
            assert_eq!(exit, ExitCode::Done, "{text}");
        }
    }

    #[test]
    fn what_holds_a_sealed_function_is_told_as_of_any_other() {
        for endbr in ENDBRS {
            let sealed = |rest: &[u8]| [endbr.as_slice(), rest].concat();
            assert_eq!(said(&sealed(&GOOD), &[], &[]).0, ExitCode::Done);
            // The ftrace site is at +4, where the guest's kernel also puts a kprobe of the function's entry.
            let distance = u32::try_from(TRAMPOLINE - (AT + 9)).unwrap();
            let mut code = sealed(&called());
            code[5..9].copy_from_slice(&distance.to_le_bytes());
            let (exit, text) = said(&code, &[], &[]);
            assert_eq!(exit, ExitCode::TryAgain, "{text}");
            assert!(
                text.contains("(its ftrace site calls ftrace_trampoline)"),
                "{text}"
            );
            for at in [AT, AT + 4, AT + 9] {
                let probe = [(16, DATA + 0x400), (0x400 + 40, at)];
                let (exit, text) = said(&code, &probe, &[]);
                assert_eq!(exit, ExitCode::TryAgain, "{text}");
                assert!(
                    text.contains(&format!("kprobe of the guest's own stands at {}", Gva(at))),
                    "{text}"
                );
            }
            // Its livepatch names the function's entry.
            let livepatch = [
                (0x200, DATA + 0x600),
                (0x600, DATA + 0x200),
                (0x610, DATA + 0x700 + 40),
                (0x700 + 24, AT),
            ];
            let (exit, text) = said(&code, &livepatch, &[]);
            assert_eq!(exit, ExitCode::TryAgain, "{text}");
            assert!(text.contains("livepatched by the guest itself"), "{text}");
        }
    }

    #[test]
    fn a_kprobe_anywhere_in_the_function_is_named() {
        // The table's third list has a probe elsewhere, then one in the function.
        let probes = |at: u64| {
            [
                (16, DATA + 0x400),
                (0x400, DATA + 0x500),
                (0x400 + 40, AT + 0x100),
                (0x500 + 40, at),
            ]
        };
        for at in [AT, AT + 10] {
            let (exit, text) = said(&GOOD, &probes(at), &[]);
            assert_eq!(exit, ExitCode::TryAgain, "{text}");
            assert!(
                text.contains("kprobe") && text.contains(&Gva(at).to_string()),
                "{text}"
            );
        }
        assert_eq!(said(&GOOD, &probes(AT + 11), &[]).0, ExitCode::Done);
    }

    #[test]
    fn who_calls_from_the_ftrace_site_is_told_apart() {
        let (exit, text) = said(&called(), &[], &[]);
        assert_eq!(exit, ExitCode::TryAgain);
        assert!(
            text.contains("traced") && text.contains("ftrace_trampoline"),
            "{text}"
        );
        // One element of klp_ops, whose stack's top replaces the function.
        let livepatch = |old: u64| {
            [
                (0x200, DATA + 0x600),
                (0x600, DATA + 0x200),
                (0x610, DATA + 0x700 + 40),
                (0x700 + 24, old),
            ]
        };
        let (exit, text) = said(&called(), &livepatch(AT), &[]);
        assert_eq!(exit, ExitCode::TryAgain);
        assert!(text.contains("livepatched by the guest itself"), "{text}");
        let (_, text) = said(&called(), &livepatch(AT + 1), &[]);
        assert!(text.contains("traced"), "{text}");
        // One BPF image, where the call leads.
        let bpf = [
            (0x210, DATA + 0x800 + 32),
            (0x800 + 32, DATA + 0x210),
            (0x800, TRAMPOLINE),
            (0x808, TRAMPOLINE + 64),
            (0x810, u64::from_le_bytes(*b"bpf_tram")),
        ];
        let (exit, text) = said(&called(), &bpf, &[]);
        assert_eq!(exit, ExitCode::TryAgain);
        assert!(
            text.contains("BPF program of the guest (bpf_tram)"),
            "{text}"
        );
        // The same by a jump, in a plain function and in a sealed one.
        let mut jump = called();
        jump[0] = 0xe9;
        let distance = u32::try_from(TRAMPOLINE - (AT + 9)).unwrap();
        let mut sealed = [ENDBRS[0].as_slice(), &jump].concat();
        sealed[5..9].copy_from_slice(&distance.to_le_bytes());
        for code in [&jump, &sealed] {
            let (exit, text) = said(code, &bpf, &[]);
            assert_eq!(exit, ExitCode::TryAgain, "{text}");
            assert!(
                text.contains("BPF program of the guest (bpf_tram)"),
                "{text}"
            );
            // No image of a BPF program is where it leads, whatever else is attached.
            for words in [&[][..], &livepatch(AT)] {
                let (exit, text) = said(code, words, &[]);
                assert_eq!(exit, ExitCode::NotApplicable, "{text}");
                assert!(text.contains("can't be traced"), "{text}");
            }
        }
    }

    #[test]
    fn lists_without_an_end_are_refused() {
        let looped = [(16, DATA + 0x400), (0x400, DATA + 0x400)];
        let (exit, text) = said(&GOOD, &looped, &[]);
        assert_eq!(exit, ExitCode::NotApplicable, "{text}");
        assert!(
            text.contains("kprobes") && text.contains("no end within 65536"),
            "{text}"
        );
        let (exit, text) = said(
            &called(),
            &[(0x200, DATA + 0x600), (0x600, DATA + 0x600)],
            &[],
        );
        assert_eq!(exit, ExitCode::NotApplicable, "{text}");
    }

    #[test]
    fn a_table_of_kprobes_of_another_length_is_refused_by_name() {
        for (next, accepted) in [
            (8, false),
            (0x1f8, false),
            (0x208, true),
            (0x3f8, true),
            (0x400, false),
        ] {
            let mut fixture = Fixture::new();
            for (at, name) in [(DATA, "kprobe_table"), (DATA + next, "behind_it")] {
                fixture.symbols.push((at, 'd', name.to_owned()));
            }
            fixture.constants.push(("__start_BTF", types()));
            fixture.constants.push(("__stop_BTF", Vec::new()));
            let memory = fixture.build();
            memory.map_bytes(Gva(DATA), &[0; 0x1000], true, false);
            let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
            let read = Kprobes::read(&kernel);
            assert_eq!(read.is_ok(), accepted, "{next}: {read:?}");
            if let Err(error) = read {
                assert_eq!(error.exit_code(), ExitCode::NotApplicable, "{error}");
                let text = error.to_string();
                assert!(text.contains("expected 512, for 64 lists"), "{text}");
            }
        }
    }

    #[test]
    fn without_types_kprobes_are_not_taken_for_absent() {
        let mut fixture = Fixture::new();
        fixture.symbols.push((DATA, 'd', "kprobe_table".to_owned()));
        let memory = fixture.build();
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        let error = Kprobes::read(&kernel).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::NotApplicable, "{error}");
    }
}
