//! Where a function can be redirected: five bytes behind the `__fentry__` nop that ftrace owns.
//!
//! The nop is at the entry, or behind an `endbr64` or what the kernel made of one ([`ENDBRS`]). It stays as it is,
//! so ftrace in the guest still works, and the redirect does not depend on ftrace.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Mnemonic};
use locus_guest::addr::{Gva, Range};
use locus_guest::fetch;
use locus_kernel::Kernel;

use crate::error::{Error, Result};
use crate::target::conflicts;
use crate::target::symbols::Object;
use crate::x86::{ENDBRS, JUMP, NOPS5};

/// Longest function that is decoded, in bytes.
const FUNCTION_MAX: u64 = 1 << 20;

/// The place of a redirect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedirectSite {
    /// Address of the first byte to be overwritten, in the guest's kernel.
    pub at: Gva,
    /// The kernel's own five bytes at that address.
    pub old: [u8; JUMP],
}

/// Whether the kernel's own code in a function returns through the return thunk or with `ret`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Returns {
    /// `jmp` to this address.
    Thunk(Gva),
    /// `ret`.
    Plain,
}

/// A function of the guest, decoded.
#[derive(Clone, Debug)]
pub struct ExaminedFunction {
    /// The addresses from its symbol to the next one.
    pub range: Range,
    /// The place for its redirect.
    pub site: RedirectSite,
    /// The parts that the compiler put elsewhere because they seldom run, each up to the next symbol.
    pub cold: Vec<Range>,
    /// How it returns, where that can be seen.
    pub returns: Option<Returns>,
}

/// The redirect of an applied patch, as a function has it now.
#[derive(Clone, Debug)]
pub struct InstalledRedirect<'r> {
    /// Name of the patch.
    pub patch: &'r str,
    /// Address of the redirect.
    pub at: Gva,
    /// Its bytes.
    pub jump: [u8; JUMP],
    /// The kernel's own bytes at that address.
    pub original: [u8; JUMP],
}

/// Reads and checks the function `name` at `entry`, which belongs to `owner`. `installed` is the redirect that an
/// applied patch has in it. The site's `old` bytes are the kernel's own in either case.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable) or, for what passes, [`Class::TryAgain`](crate::error::Class::TryAgain): it has no ftrace nop, no room,
/// is traced, redirected by something else, or its bytes are patched at run time by the kernel.
/// [`Class::Failed`](crate::error::Class::Failed): the redirect that should stand there doesn't.
pub fn examine(
    kernel: &Kernel<'_>,
    owner: Object<'_>,
    name: &str,
    entry: Gva,
    installed: Option<&InstalledRedirect<'_>>,
) -> Result<ExaminedFunction> {
    let room = owner.room(kernel, entry);
    let no = |why: String| Error::not_applicable(format!("function {name} at {entry}: {why}"));
    if let Some(why) = conflicts::section(kernel, entry) {
        return Err(no(why));
    }
    if !owner.executable(kernel, entry)? {
        return Err(no(
            "expected code there, found a page that may not be executed: data, or code of \
             module_init that is gone"
                .into(),
        ));
    }
    if room > FUNCTION_MAX {
        return Err(no(format!(
            "{room} bytes up to the next symbol; expected at most 1 MiB"
        )));
    }
    let mut code = kernel.space.read_vec(entry, length(room)?)?;
    if let Some(at) = conflicts::kprobe(kernel, Range::new(entry, room))? {
        return Err(Error::try_again(format!(
            "function {name} at {entry}: a kprobe of the guest's own stands at {at}; remove it and \
             try again"
        )));
    }
    let offset = match fentry_end(&code, entry) {
        Ok(offset) => offset,
        Err(Head::Call(target)) => {
            let who = conflicts::caller(kernel, entry, target)?;
            return Err(Error::try_again(format!(
                "function {name} at {entry} is {who} right now; stop that and try again"
            )));
        }
        Err(Head::Unknown(bytes)) => {
            return Err(no(format!(
                "expected ftrace's five-byte nop at its entry, found {bytes}: it can't be traced \
                 (notrace, assembly), so it can't be redirected"
            )))
        }
    };
    let too_short = || no(format!("no room for a redirect: it is {room} bytes long"));
    let at = entry.plus(offset as u64);
    if let Some(ours) = installed {
        let place = code.get_mut(offset..offset + JUMP).ok_or_else(too_short)?;
        if ours.at != at || *place != ours.jump {
            return Err(displaced(name, at, ours.patch));
        }
        place.copy_from_slice(&ours.original);
    }
    let old: [u8; JUMP] = fetch::array(&code, offset).ok_or_else(too_short)?;
    check_bytes(kernel, &code, entry, offset).map_err(no)?;
    let mut cold = Vec::new();
    for part in owner.cold(kernel, entry) {
        let len = owner.room(kernel, part).min(FUNCTION_MAX);
        let code = kernel.space.read_vec(part, length(len)?)?;
        check_branches(&code, part, at).map_err(no)?;
        cold.push(Range::new(part, len));
    }
    if let Some(what) = patched_at_run_time(kernel, owner, Range::new(at, JUMP as u64))? {
        return Err(no(format!(
            "the kernel itself rewrites the bytes at {at} ({what})"
        )));
    }
    Ok(ExaminedFunction {
        range: Range::new(entry, room),
        site: RedirectSite { at, old },
        cold,
        returns: returns(kernel, &code, entry),
    })
}

/// A length in bytes as a size on this host.
fn length(bytes: u64) -> Result<usize> {
    usize::try_from(bytes)
        .map_err(|_| Error::not_applicable(format!("{bytes} bytes are more than can be read")))
}

/// The error for a redirect of `function` at `at` that is not as patch `patch` wrote it.
pub fn displaced(function: &str, at: Gva, patch: &str) -> Error {
    Error::failed(format!(
        "the redirect of {function} at {at} is not as {patch} wrote it: the guest or another tool \
         changed it, so it is left alone"
    ))
}

/// What a function begins with in place of ftrace's nop.
#[derive(Clone, Debug)]
pub enum Head {
    /// A call to there.
    Call(Gva),
    /// These bytes, in hex.
    Unknown(String),
}

/// Offset of the first byte behind the ftrace nop, in bytes from the function's entry.
///
/// # Errors
/// There is no nop: the value is what is there in its place.
pub fn fentry_end(code: &[u8], entry: Gva) -> std::result::Result<usize, Head> {
    let sealed = ENDBRS.iter().find(|endbr| code.starts_with(*endbr));
    let start = sealed.map_or(0, |endbr| endbr.len());
    // Code that is too short is none.
    let head = code.get(start..).unwrap_or_default();
    if NOPS5.iter().any(|nop| head.starts_with(nop)) {
        return Ok(start + 5);
    }
    if let (Some(0xe8), Some(distance)) = (head.first(), fetch::u32(head, 1)) {
        let next = entry.plus(start as u64 + 5);
        let target = next.0.wrapping_add_signed(distance.cast_signed().into());
        return Err(Head::Call(Gva(target)));
    }
    let shown: Vec<String> = code.iter().take(16).map(|b| format!("{b:02x}")).collect();
    Err(Head::Unknown(shown.join(" ")))
}

/// Decodes the function: the overwritten bytes must be whole instructions of it, none of them
/// foreign, and no branch of it may lead into them.
fn check_bytes(
    kernel: &Kernel<'_>,
    code: &[u8],
    entry: Gva,
    offset: usize,
) -> std::result::Result<(), String> {
    let first = entry.plus(offset as u64);
    // No code behind the nop is no room for a redirect.
    let body = code.get(offset..).unwrap_or_default();
    let mut covered = 0;
    for i in Decoder::with_ip(64, body, first.0, DecoderOptions::NONE).iter() {
        if covered >= JUMP {
            break;
        }
        let at = Gva(i.ip());
        if i.is_invalid() || i.mnemonic() == Mnemonic::Int3 {
            return Err(format!(
                "expected its code at {at}, found a breakpoint or no instruction \
                                (a kprobe of the guest?)"
            ));
        }
        if covered == 0 && i.is_jmp_near() {
            let to = Gva(i.near_branch_target());
            if !Range::new(entry, code.len() as u64).contains(to) {
                let whom = kernel
                    .symbols
                    .covering(to)
                    .map_or_else(String::new, |(name, off)| format!(" ({name}+{off:#x})"));
                return Err(format!(
                    "it is already redirected by someone else: found a jump to {to}{whom} at {at}"
                ));
            }
        }
        covered += i.len();
        if covered < JUMP && matches!(i.flow_control(), FlowControl::Return) {
            return Err(format!("no room for a redirect: it returns at {at}"));
        }
    }
    if covered < JUMP {
        return Err(format!(
            "no room for a redirect: {covered} bytes behind its ftrace nop"
        ));
    }
    check_branches(code, entry, first)
}

/// Refuses a branch in `code`, which is at `start`, into the bytes that are overwritten at `first`. The first of them
/// may be no target either: a thread that comes there by a branch would be redirected in the middle of the old
/// function.
fn check_branches(code: &[u8], start: Gva, first: Gva) -> std::result::Result<(), String> {
    let overwritten = Range::new(first, JUMP as u64);
    for i in Decoder::with_ip(64, code, start.0, DecoderOptions::NONE).iter() {
        let branches = matches!(
            i.flow_control(),
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
        );
        if branches && overwritten.contains(Gva(i.near_branch_target())) {
            return Err(format!(
                "the branch at {} leads into the bytes to be overwritten",
                Gva(i.ip())
            ));
        }
    }
    Ok(())
}

/// Most bytes that are read of a table of places that the kernel rewrites.
const TABLE_MAX: u64 = 4 << 20;

/// What the kernel rewrites at run time in `bytes` of `owner`; `None` if nothing.
fn patched_at_run_time(
    kernel: &Kernel<'_>,
    owner: Object<'_>,
    bytes: Range,
) -> Result<Option<&'static str>> {
    for live in owner.rewritten(kernel)? {
        let len = length(live.table.len().min(TABLE_MAX))?;
        let table = kernel.space.read_vec(live.table.start, len)?;
        for (i, entry) in table.chunks_exact(live.entry.max(1)).enumerate() {
            let here = live.table.start.plus((i * live.entry) as u64);
            let Some(offset) = fetch::u32(entry, 0).map(u32::cast_signed) else {
                return Err(Error::not_applicable(format!(
                    "an entry for a {} has {} bytes in the guest's kernel; expected 4 or more",
                    live.what, live.entry
                )));
            };
            let place = Gva(here.0.wrapping_add_signed(offset.into()));
            // A place is at most five bytes long.
            if place < bytes.end && place.plus(5) > bytes.start {
                return Ok(Some(live.what));
            }
        }
    }
    Ok(None)
}

/// How the function returns.
///
/// Where the CPU needs a mitigation the kernel leaves `jmp __x86_return_thunk` (or another thunk) in
/// its text, elsewhere it writes `ret`: Linux kernel commit 15e67227c49a ("x86: Undo return-thunk
/// damage") (in v5.19). Its own text tells, whatever the reason was.
fn returns(kernel: &Kernel<'_>, code: &[u8], entry: Gva) -> Option<Returns> {
    let chosen = kernel
        .symbols
        .addr("x86_return_thunk")
        .and_then(|at| kernel.space.read_u64(at).ok())
        .map(Gva);
    let default = kernel.symbols.addr("__x86_return_thunk");
    Decoder::with_ip(64, code, entry.0, DecoderOptions::NONE)
        .iter()
        .find_map(|i| {
            if i.mnemonic() == Mnemonic::Ret {
                return Some(Returns::Plain);
            }
            let to = Gva(i.near_branch_target());
            let thunk = i.is_jmp_near() && (Some(to) == chosen || Some(to) == default);
            thunk.then_some(Returns::Thunk(to))
        })
}

/// How the function at `entry` returns, where that can be seen.
#[must_use]
pub fn returns_at(kernel: &Kernel<'_>, entry: Gva) -> Option<Returns> {
    let room = kernel.symbols.room(entry)?.min(FUNCTION_MAX);
    let len = usize::try_from(room).ok()?;
    returns(kernel, &kernel.space.read_vec(entry, len).ok()?, entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ExitCode;
    use crate::x86::NOP5;
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
        examine(&kernel, Object::Kernel, "victim", Gva(AT), installed)
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
            (with(&[0x31, 0xc0, 0xc3, 0x90, 0x90, 0x90]), "it returns at"),
            (with(&[0xcc, 0x90, 0x90, 0x90, 0x90, 0xc3]), "breakpoint"),
            // jmp to far outside
            (
                with(&[0xe9, 0, 0, 0x10, 0, 0xc3]),
                "redirected by someone else",
            ),
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
}
