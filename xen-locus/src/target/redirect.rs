//! Where a function can be redirected: five bytes behind the `__fentry__` nop that ftrace owns.
//!
//! The nop is at the entry, or behind an `endbr64` or what the kernel made of one ([`ENDBRS`]). It stays as it is,
//! so ftrace in the guest still works, and the redirect does not depend on ftrace.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Mnemonic};
use locus_guest::addr::{Gva, Range};
use locus_guest::fetch;
use locus_kernel::modules::{Module, ModuleReader, JUMP_LABEL};
use locus_kernel::Kernel;

use crate::arena;
use crate::error::{Error, Result};
use crate::target::conflicts::{self, Lead};
use crate::target::kprobes::Kprobes;
use crate::target::symbols::Object;
use crate::x86::{self, CALL, ENDBRS, JMP, JUMP, NOPS5};

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
/// applied patch has in it. The site's `old` bytes are the kernel's own in either case. `kprobes` are the guest's.
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
    kprobes: &Kprobes,
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
    if let Some(at) = kprobes.in_range(Range::new(entry, room)) {
        return Err(Error::try_again(format!(
            "function {name} at {entry}: a kprobe of the guest's own stands at {at}; remove it and \
             try again"
        )));
    }
    let offset = match fentry_end(&code, entry) {
        Ok(offset) => offset,
        Err(Head { bytes, lead }) => {
            let caller = lead.map(|lead| conflicts::caller(kernel, entry, lead));
            return Err(match caller.transpose()?.flatten() {
                Some(who) => Error::try_again(format!(
                    "function {name} at {entry} is {who} right now; stop that and try again"
                )),
                None => no(format!(
                    "expected ftrace's five-byte nop at its entry, found {bytes}: it can't be traced \
                     (notrace, assembly), so it can't be redirected"
                )),
            });
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
    // This comes first: a jump that the kernel itself wrote is nobody else's.
    if let Some(why) = patched_at_run_time(kernel, owner, Range::new(at, JUMP as u64))? {
        return Err(no(why));
    }
    if let Some(to) = check_bytes(&code, entry, offset).map_err(no)? {
        if !begins_function(kernel, owner, to)? {
            return Err(no(foreign(kernel, at, to)));
        }
    }
    let mut cold = Vec::new();
    let parts = owner.cold_parts(kernel, entry);
    for part in parts.map_err(|e| e.context(format!("function {name}")))? {
        let len = owner.room(kernel, part);
        if len > FUNCTION_MAX {
            return Err(no(format!(
                "{len} bytes from its part at {part} to the next symbol; expected at most 1 MiB"
            )));
        }
        let code = kernel.space.read_vec(part, length(len)?)?;
        check_branches(&code, part, at).map_err(no)?;
        cold.push(Range::new(part, len));
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

/// What to do about a redirect that is not as it was written.
pub const REPAIR: &str =
    "Undo that where it was done, or reboot the guest: then all its patches are gone; `verify` shows all that differs";

/// The error for a redirect of `function` at `at` that is not as patch `patch` wrote it.
pub fn displaced(function: &str, at: Gva, patch: &str) -> Error {
    Error::failed(format!(
        "the redirect of {function} at {at} is not as {patch} wrote it: the guest or another tool \
         changed it, so it is left alone. {REPAIR}"
    ))
}

/// What a function begins with in place of ftrace's nop.
#[derive(Clone, Debug)]
pub struct Head {
    /// The function's first bytes, in hex.
    pub bytes: String,
    /// Where it leads, if it is a call or a jump.
    pub lead: Option<Lead>,
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
    let lead = head.first_chunk().and_then(|bytes: &[u8; JUMP]| {
        let target = x86::branch_target(entry.plus(start as u64), *bytes);
        match bytes[0] {
            CALL => Some(Lead::Call(target)),
            JMP => Some(Lead::Jump(target)),
            _ => None,
        }
    });
    let shown: Vec<String> = code.iter().take(16).map(|b| format!("{b:02x}")).collect();
    let bytes = shown.join(" ");
    Err(Head { bytes, lead })
}

/// Decodes the function: the overwritten bytes must be whole instructions of it, and no branch of it may lead into
/// them. Behind the function's end they may be filler, which nothing runs.
///
/// The result is where the first of them jumps to, if that is outside the function: its own tail call, or somebody
/// else's redirect.
fn check_bytes(code: &[u8], entry: Gva, offset: usize) -> std::result::Result<Option<Gva>, String> {
    let first = entry.plus(offset as u64);
    // No code behind the nop is no room for a redirect.
    let body = code.get(offset..).unwrap_or_default();
    let mut covered = 0;
    let mut leaves = None;
    // Where it ends, if that is before the last of the bytes.
    let mut end = None;
    for i in Decoder::with_ip(64, body, first.0, DecoderOptions::NONE).iter() {
        // Behind a function's own jump out of it there is nothing, up to the next function.
        if covered >= JUMP && leaves.is_none() {
            break;
        }
        let at = Gva(i.ip());
        if let Some(end) = end {
            if !matches!(i.mnemonic(), Mnemonic::Int3 | Mnemonic::Nop) {
                return Err(match leaves.filter(|_| covered >= JUMP) {
                    Some(to) => format!(
                        "it is already redirected by someone else: found a jump to {to} at {end}, out of the function, \
                         and other code behind it at {at}; expected nothing behind such a jump, or none"
                    ),
                    None => format!(
                        "no room for a redirect: its first instructions end at {end}, and other code follows at {at}"
                    ),
                });
            }
        } else if i.is_invalid() || i.mnemonic() == Mnemonic::Int3 {
            return Err(format!(
                "expected its code at {at}, found a breakpoint or no instruction \
                                (a kprobe of the guest?)"
            ));
        }
        if covered == 0 && i.is_jmp_near() {
            let to = Gva(i.near_branch_target());
            leaves = Some(to).filter(|&to| !Range::new(entry, code.len() as u64).contains(to));
        }
        covered += i.len();
        if never_goes_on(i.flow_control()) {
            end = Some(at);
        }
    }
    if covered < JUMP {
        return Err(format!(
            "no room for a redirect: {covered} bytes behind its ftrace nop"
        ));
    }
    check_branches(code, entry, first)?;
    Ok(leaves)
}

/// Whether no CPU goes on behind such an instruction. (Some fetch what is there, and filler stops them.)
fn never_goes_on(flow: FlowControl) -> bool {
    matches!(
        flow,
        FlowControl::Return | FlowControl::UnconditionalBranch | FlowControl::IndirectBranch
    )
}

/// Whether the code of `owner` may jump to `to` because it was linked so: a symbol of the kernel's image is there, or,
/// if it is a module, one of its own or of a module that it uses. The kernel's return thunks are such symbols.
///
/// # Errors
/// The guest's modules can't be read.
fn begins_function(kernel: &Kernel<'_>, owner: Object<'_>, to: Gva) -> Result<bool> {
    if Object::Kernel.executable(kernel, to)? {
        let found = kernel.symbols.covering(to);
        return Ok(found.is_some_and(|(_, offset)| offset == 0));
    }
    match owner {
        // The image was linked before any module.
        Object::Kernel => Ok(false),
        Object::Module(module, symbols) => {
            if owner.executable(kernel, to)? {
                return Ok(symbols.iter().any(|s| s.addr == to));
            }
            exported_to(kernel, module, to)
        }
    }
}

/// Whether a symbol at `to` is of a module that `user` uses.
fn exported_to(kernel: &Kernel<'_>, user: &Module, to: Gva) -> Result<bool> {
    let mut reader = ModuleReader::new(kernel)?;
    let all = reader.all()?;
    let used = all.iter().find(|m| {
        m.used_by.contains(&user.name) && m.parts.iter().any(|part| part.range.contains(to))
    });
    Ok(match used {
        Some(used) => reader.symbols(used)?.iter().any(|s| s.addr == to),
        None => false,
    })
}

/// Why a function that begins with a jump to `to`, at `at`, is left alone.
///
/// GCC makes such jumps into the middle of other functions, and some kernels allocate thunks for indirect jumps at run time
/// (`its_allocate_thunk`, arch/x86/kernel/alternative.c). So not all of them are somebody's redirects.
fn foreign(kernel: &Kernel<'_>, at: Gva, to: Gva) -> String {
    if (arena::BASE..arena::page_address(arena::PAGES)).contains(&to) {
        return format!(
            "it is already redirected: found a jump to {to} at {at}, into the arena, of which no patch in force tells; \
             expected its own code"
        );
    }
    let where_to = match kernel.symbols.covering(to) {
        Some((name, offset)) if offset < FUNCTION_MAX => format!(" ({name}+{offset:#x})"),
        _ => String::new(),
    };
    format!(
        "its first instruction, at {at}, jumps to {to}{where_to}, where no function begins. Either it was compiled so, or \
         someone else redirected it, which can't be told apart; expected a first instruction that stays in it, or jumps to \
         where a function begins, of the kernel or of a module that it was linked with"
    )
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

/// Why `bytes` of `owner` can't be overwritten, if the kernel rewrites them at run time or makes a branch to them;
/// `None` if it does neither.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): a table is longer than any kernel's, or has entries of
/// another form.
fn patched_at_run_time(
    kernel: &Kernel<'_>,
    owner: Object<'_>,
    bytes: Range,
) -> Result<Option<String>> {
    for live in owner.rewritten(kernel)? {
        let (what, len) = (live.what, live.table.len());
        if len > TABLE_MAX {
            return Err(Error::not_applicable(format!(
                "the guest's table of places of a {what} is {len} bytes long; expected at most {TABLE_MAX}. So it can't \
                 be known which bytes its kernel rewrites"
            )));
        }
        let table = kernel.space.read_vec(live.table.start, length(len)?)?;
        for (i, entry) in table.chunks_exact(live.entry.max(1)).enumerate() {
            let here = live.table.start.plus((i * live.entry) as u64);
            // A place is as far from the word that says so as the word says.
            let place = |offset: usize| {
                let distance = fetch::u32(entry, offset).map(u32::cast_signed)?;
                let word = here.0.wrapping_add(offset as u64);
                Some(Gva(word.wrapping_add_signed(distance.into())))
            };
            let Some(from) = place(0) else {
                return Err(Error::not_applicable(format!(
                    "an entry for a {what} has {} bytes in the guest's kernel; expected 4 or more",
                    live.entry
                )));
            };
            // A place is at most five bytes long.
            if from < bytes.end && from.0.saturating_add(5) > bytes.start.0 {
                return Ok(Some(format!(
                    "the kernel itself rewrites the bytes at {} ({what})",
                    bytes.start
                )));
            }
            // struct jump_entry: where the branch is, and where it leads. While it is off, no code shows that.
            if what == JUMP_LABEL && place(4).is_some_and(|to| bytes.contains(to)) {
                return Ok(Some(format!(
                    "the branch at {from}, which the kernel switches on and off ({what}), leads into the bytes to be \
                     overwritten"
                )));
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
        .variable("x86_return_thunk", 8)
        .ok()
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
mod tests;
