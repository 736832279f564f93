use super::*;
use crate::error::ExitCode;
use crate::x86::NOP5;
use locus_kernel::btf::blob::Blob;
use locus_kernel::fixture::{vcpus, Fixture, KIND, TEXT};

const AT: u64 = TEXT.0 + 0x1000;

/// Examines a function of the given code, which the next symbol follows at once.
fn examined(code: &[u8]) -> Result<ExaminedFunction> {
    examined_with(code, None)
}

fn examined_with(
    code: &[u8],
    installed: Option<&InstalledRedirect<'_>>,
) -> Result<ExaminedFunction> {
    let mut fixture = Fixture::new();
    fixture.function(AT, "victim", code);
    fixture.function(AT + code.len() as u64, "next", &[0xc3]);
    let memory = fixture.build();
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let kprobes = Kprobes::read(&kernel)?;
    examine(
        &kernel,
        Object::Kernel,
        "victim",
        Gva(AT),
        installed,
        &kprobes,
    )
}

fn refusal(code: &[u8]) -> (ExitCode, String) {
    let error = examined(code).unwrap_err();
    (error.exit_code(), error.to_string())
}

#[test]
fn the_redirect_goes_behind_either_nop_and_behind_endbr64_sealed_or_not() {
    let body = [0x55, 0x48, 0x89, 0xe5, 0x5d, 0xc3];
    for (head, offset) in [
        (NOP5.to_vec(), 5),
        ([0x66, 0x66, 0x66, 0x66, 0x90].to_vec(), 5),
    ]
    .into_iter()
    .chain(ENDBRS.map(|endbr| ([endbr.as_slice(), &NOP5].concat(), 9)))
    {
        let function = examined(&[head, body.to_vec()].concat()).unwrap();
        assert_eq!(function.site.at, Gva(AT + offset));
        assert_eq!(function.site.old, [0x55, 0x48, 0x89, 0xe5, 0x5d]);
        assert_eq!(function.returns, Some(Returns::Plain));
    }
}

#[test]
fn functions_that_cannot_be_redirected_are_refused_by_name() {
    let with = |body: &[u8]| [NOP5.as_slice(), body].concat();
    for (code, why) in [
        (vec![0x90; 16], "ftrace's five-byte nop"),
        (with(&[0x31, 0xc0, 0xc3]), "no room"),
        // xor eax,eax; ret; then code that something else may lead to
        (
            with(&[0x31, 0xc0, 0xc3, 0x31, 0xc0, 0xc3]),
            "and other code follows",
        ),
        (with(&[0x31, 0xc0, 0xc3, 0xcc]), "no room"),
        (with(&[0xcc, 0x90, 0x90, 0x90, 0x90, 0xc3]), "breakpoint"),
        // nop; int3: a breakpoint where the function goes on
        (with(&[0x90, 0xcc, 0x90, 0x90, 0x90, 0xc3]), "breakpoint"),
        // nops, then a short jump back to the second byte of what is overwritten
        (
            with(&[0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xeb, 0xf9, 0xc3]),
            "leads into the bytes",
        ),
    ] {
        let (exit, said) = refusal(&code);
        assert_eq!(exit, ExitCode::NotApplicable, "{said}");
        assert!(said.contains(why), "{said} does not say {why}");
    }
}

#[test]
fn a_short_function_may_end_within_the_redirect_if_only_filler_follows() {
    for body in [
        // ret, as the kernel makes it of the jump to a return thunk
        [0xc3, 0xcc, 0xcc, 0xcc, 0xcc],
        // xor eax,eax; ret; nops up to the next function
        [0x31, 0xc0, 0xc3, 0x66, 0x90],
        // jmp *%rdi, as the kernel makes it of the jump to a thunk
        [0xff, 0xe7, 0xcc, 0x90, 0x90],
        // jmp short, out of the function
        [0xeb, 0x20, 0x0f, 0x1f, 0x00],
    ] {
        let code = [NOP5.as_slice(), &body].concat();
        assert_eq!(examined(&code).unwrap().site.old, body);
    }
}

/// Code of a function at `AT` that begins, behind the head, with a jump to `to`.
fn tail_call(head: &[u8], to: Gva) -> Vec<u8> {
    let at = Gva(AT).plus(head.len() as u64);
    [head, &crate::x86::jump(at, to).unwrap()].concat()
}

#[test]
fn a_tail_call_to_a_function_of_the_kernel_is_the_functions_own() {
    // `next` begins behind the function, and `filler_0` with the last page of the text.
    let thunk = TEXT.plus(15 * 4096);
    for head in [
        NOP5.to_vec(),
        [ENDBRS[0].as_slice(), &NOP5].concat(),
        [ENDBRS[2].as_slice(), &NOP5].concat(),
    ] {
        let next = Gva(AT).plus(head.len() as u64 + 5);
        for to in [thunk, next] {
            let function = examined(&tail_call(&head, to)).unwrap();
            let at = Gva(AT).plus(head.len() as u64);
            assert_eq!(function.site.at, at);
            assert_eq!(Some(function.site.old), crate::x86::jump(at, to));
        }
    }
}

#[test]
fn a_module_s_tail_call_into_a_module_that_it_uses_is_its_own() {
    use locus_kernel::modules::sample::{data, guest, Age, DATA, STEP};
    // A symbol in the text of each: `first`, and `second`, which uses it.
    let symbols = [Gva(0xffff_ffff_c100_0040), Gva(0xffff_ffff_c101_0040)];
    let mut modules = data(Age::New);
    for (module, symbol) in [DATA, DATA + STEP].into_iter().zip(symbols) {
        modules.word(module + 0x400 + 24 + 8, symbol.0);
    }
    let memory = guest(Age::New, &modules);
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let all = ModuleReader::new(&kernel).unwrap().all().unwrap();
    let begins = |owner: &str, to: Gva| {
        let owner = all.iter().find(|m| m.name == owner).unwrap();
        begins_function(&kernel, Object::Module(owner, &[]), to).unwrap()
    };
    assert!(begins("second", symbols[0]));
    assert!(!begins("second", symbols[0].plus(1)));
    // It was linked before `second` was there.
    assert!(!begins("first", symbols[1]));
}

#[test]
fn a_jump_in_front_of_other_code_is_someone_elses_wherever_it_leads() {
    let to = TEXT.plus(15 * 4096);
    let filler = [0xcc, 0x0f, 0x1f, 0x00, 0xcc];
    let code = [tail_call(&NOP5, to), filler.to_vec()].concat();
    examined(&code).unwrap();
    // What is left of a function over whose first bytes the jump was written.
    let code = [tail_call(&NOP5, to), vec![0x5d, 0xc3]].concat();
    let (exit, said) = refusal(&code);
    assert_eq!(exit, ExitCode::NotApplicable, "{said}");
    assert!(said.contains("redirected by someone else"), "{said}");
}

#[test]
fn a_jump_to_where_no_function_begins_is_left_alone_and_nobody_is_accused() {
    let arena = arena::page_address(3);
    for (to, words) in [
        // In the text, where no symbol is; in constants; above the image; in the arena.
        (TEXT.plus(0x2000), "+0x"),
        (locus_kernel::fixture::RODATA, "linux"),
        (TEXT.plus(256 << 20), "0xffffffff91000000, where"),
        (arena, "into the arena"),
    ] {
        let (exit, said) = refusal(&tail_call(&NOP5, to));
        assert_eq!(exit, ExitCode::NotApplicable, "{said}");
        let why = match to == arena {
            true => "it is already redirected: found a jump",
            false => "Either it was compiled so, or someone else redirected it",
        };
        assert!(
            said.contains(why) && said.contains(&to.to_string()),
            "{said}"
        );
        assert!(words == "linux" || said.contains(words), "{said}");
    }
}

#[test]
fn a_redirect_of_ours_is_known_by_its_bytes_and_what_it_covers_is_looked_at() {
    let body = |bytes: [u8; 5]| [NOP5.as_slice(), &bytes, &[0x5d, 0xc3]].concat();
    let ours = InstalledRedirect {
        patch: "first",
        at: Gva(AT + 5),
        jump: [0xe9, 0, 0, 0x10, 0],
        original: [0x55, 0x48, 0x89, 0xe5, 0x90],
    };
    let function = examined_with(&body(ours.jump), Some(&ours)).unwrap();
    assert_eq!(
        (function.site.at, function.site.old),
        (ours.at, ours.original)
    );
    for bytes in [ours.original, [0xe9, 1, 0, 0x10, 0]] {
        let error = examined_with(&body(bytes), Some(&ours)).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::Failed);
        assert!(
            error.to_string().contains("not as first wrote it"),
            "{error}"
        );
    }
    // Bytes that no redirect can have covered: the record of the patch is not true.
    let liar = InstalledRedirect {
        original: [0xc3; 5],
        ..ours.clone()
    };
    let error = examined_with(&body(ours.jump), Some(&liar)).unwrap_err();
    assert!(error.to_string().contains("no room"), "{error}");
}

#[test]
fn a_traced_function_is_to_be_tried_again() {
    let body = [0xe8, 0, 0, 0, 0, 0x55, 0x48, 0x89, 0xe5, 0x5d, 0xc3];
    for head in [&[][..], &ENDBRS[0], &ENDBRS[1], &ENDBRS[2], &ENDBRS[3]] {
        let (exit, said) = refusal(&[head, &body].concat());
        assert_eq!(exit, ExitCode::TryAgain, "{said}");
        assert!(said.contains("traced"), "{said}");
    }
}

/// Where the guest's lists of kprobes and of livepatched functions stand.
const LISTS: Gva = Gva(TEXT.0 + (8 << 20));
/// Offset of the second one.
const KLP_OPS: usize = 0x200;
/// What the guest's ftrace calls.
const TRACER: Gva = Gva(TEXT.0 + 0x8000);
/// The kernel's return thunk.
const THUNK: Gva = Gva(TEXT.0 + 0x9000);

/// Examines a function of the given code in a guest whose lists have `words` at these offsets from [`LISTS`].
fn examined_with_lists(code: &[u8], words: &[(usize, u64)]) -> Result<ExaminedFunction> {
    let mut fixture = Fixture::new();
    fixture.function(AT, "victim", code);
    fixture.function(AT + code.len() as u64, "next", &[0xc3]);
    fixture.function(TRACER.0, "tracer", &[0xc3]);
    fixture.function(THUNK.0, "__x86_return_thunk", &[0xc3]);
    for (offset, name) in [(0, "kprobe_table"), (KLP_OPS as u64, "klp_ops")] {
        fixture
            .symbols
            .push((LISTS.0 + offset, 'd', name.to_owned()));
    }
    let mut types = Blob::with_integers();
    let node = types.structure("list_head", 16, &[("next", 4, 0), ("prev", 4, 8)]);
    types.structure("kprobe", 64, &[("hlist", node, 0), ("addr", 4, 40)]);
    let ops = [("node", node, 0), ("func_stack", node, 16)];
    types.structure("klp_ops", 32, &ops);
    let func = [("old_func", 4, 24), ("stack_node", node, 40)];
    types.structure("klp_func", 64, &func);
    fixture.constants.push(("__start_BTF", types.bytes()));
    fixture.constants.push(("__stop_BTF", Vec::new()));
    let mut lists = [0; 4096];
    // Nothing is livepatched, if `words` do not say so.
    let none = (KLP_OPS, LISTS.0 + KLP_OPS as u64);
    for &(at, word) in std::iter::once(&none).chain(words) {
        lists[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }
    let memory = fixture.build();
    memory.map_bytes(LISTS, &lists, true, false);
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let kprobes = Kprobes::read(&kernel)?;
    examine(&kernel, Object::Kernel, "victim", Gva(AT), None, &kprobes)
}

#[test]
fn what_holds_a_function_of_one_jump_or_return_is_told_as_of_any_other() {
    let told = |code: &[u8], words: &[(usize, u64)], why: &str| {
        let error = examined_with_lists(code, words).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::TryAgain, "{error}");
        assert!(error.to_string().contains(why), "{error}");
    };
    for endbr in [&[][..], &ENDBRS[0], &ENDBRS[2]] {
        let nop = Gva(AT).plus(endbr.len() as u64);
        let site = nop.plus(JUMP as u64);
        for body in [
            // A tail call, a return through the thunk, and the return that the kernel makes of that.
            x86::jump(site, TEXT.plus(15 * 4096)).unwrap(),
            x86::jump(site, THUNK).unwrap(),
            [0xc3, 0xcc, 0xcc, 0xcc, 0xcc],
        ] {
            let idle = [endbr, &NOP5, &body].concat();
            let free = examined_with_lists(&idle, &[]).unwrap().site;
            assert_eq!((free.at, free.old), (site, body));

            let call = x86::branch(CALL, nop, TRACER).unwrap();
            let traced = [endbr, &call, &body].concat();
            told(&traced, &[], "(its ftrace site calls tracer)");

            // By ftrace at the nop or, by its name, at the entry; by a breakpoint at the jump or return; and disabled there.
            let mut trapped = idle.clone();
            trapped[endbr.len() + JUMP] = 0xcc;
            for (code, at) in [
                (&traced, nop),
                (&traced, Gva(AT)),
                (&trapped, site),
                (&idle, site),
            ] {
                let probe = [(16, LISTS.0 + 0x400), (0x400 + 40, at.0)];
                let why = format!("a kprobe of the guest's own stands at {at};");
                told(code, &probe, &why);
            }

            // Its livepatch names the function's entry.
            let livepatch = [
                (KLP_OPS, LISTS.0 + 0x600),
                (0x600, LISTS.0 + KLP_OPS as u64),
                (0x610, LISTS.0 + 0x700 + 40),
                (0x700 + 24, AT),
            ];
            told(&traced, &livepatch, "livepatched by the guest itself");
        }
    }
}

/// What is said to a function whose kernel has a table of jump labels of `len` bytes, whose first entry names
/// places at these distances from the function's entry.
fn with_jump_label(len: u64, from: u64, to: u64) -> Result<ExaminedFunction> {
    const TABLE: u64 = TEXT.0 + (8 << 20);
    let mut fixture = Fixture::new();
    let code = [NOP5.as_slice(), &[0xb8, 0, 0, 0, 0, 0xc3]].concat();
    fixture.function(AT, "victim", &code);
    fixture.function(AT + 11, "next", &[0xc3]);
    for (at, name) in [
        (TABLE, "__start___jump_table"),
        (TABLE + len, "__stop___jump_table"),
    ] {
        fixture.symbols.push((at, 'd', name.to_owned()));
    }
    let mut types = Blob::with_integers();
    let members = [("code", 3, 0), ("target", 3, 4), ("key", 4, 8)];
    types.structure("jump_entry", 16, &members);
    fixture.constants.push(("__start_BTF", types.bytes()));
    fixture.constants.push(("__stop_BTF", Vec::new()));
    let distance = |place: u64, word: u64| (AT + place).wrapping_sub(word).to_le_bytes();
    let mut entry = [0; 4096];
    entry[..4].copy_from_slice(&distance(from, TABLE)[..4]);
    entry[4..8].copy_from_slice(&distance(to, TABLE + 4)[..4]);
    let memory = fixture.build();
    memory.map_bytes(Gva(TABLE), &entry, false, false);
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let kprobes = Kprobes::read(&kernel)?;
    examine(&kernel, Object::Kernel, "victim", Gva(AT), None, &kprobes)
}

#[test]
fn branches_that_the_kernel_switches_are_no_part_of_what_is_overwritten() {
    assert!(with_jump_label(16, 0x100, 0x200).is_ok());
    assert!(with_jump_label(16, 10, 0x200).is_ok());
    for at in [5, 9] {
        let said = with_jump_label(16, at, 0x200).unwrap_err().to_string();
        assert!(said.contains("rewrites the bytes"), "{said}");
        let said = with_jump_label(16, 0x100, at).unwrap_err().to_string();
        assert!(said.contains("switches on and off"), "{said}");
    }
    assert!(with_jump_label(16, 0x100, 10).is_ok());
}

#[test]
fn a_table_of_rewritten_places_that_is_too_long_is_not_cut() {
    let error = with_jump_label(TABLE_MAX + 16, 0x100, 0x200).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::NotApplicable);
    let said = error.to_string();
    assert!(
        said.contains("4194320 bytes long; expected at most 4194304"),
        "{said}"
    );
}
