//! Return sites, `jmp __x86_return_thunk`: a plain `ret` where the CPU needs no mitigation, else a
//! jump to the thunk that the guest's kernel chose.
//!
//! Sources: `apply_returns`, `cpu_wants_rethunk_at` (arch/x86/kernel/alternative.c); `bugs.c` beside
//! it, which sets `x86_return_thunk`. The feature bit has no name and moved between kernels, so the
//! guest tells by what it holds: a chosen thunk other than the default one, or its own functions'
//! returns. On a CPU with ITS the kernel leaves `ret` in upper halves of cache lines; the thunk is
//! right there as well.

use locus_guest::addr::Gva;
use locus_kernel::Kernel;

use super::code::{target, FixupTable, LinkedCode};
use super::FixupPlace;
use crate::error::Result;
use crate::target::redirect::{self, Returns};
use crate::x86::{branch, INT3, JMP};

const TABLE: &str = ".return_sites";
/// A plain return, with the breakpoints that keep the CPU from running ahead.
const RET: [u8; 5] = [0xc3, INT3, INT3, INT3, INT3];
/// Return thunks that count calls, by their names in v6.2 and since v6.6.
const COUNTING: [&str; 2] = ["__x86_return_skl", "call_depth_return_thunk"];
/// Functions that every kernel has and that return: one of them tells how, where the patched ones
/// don't.
const SAMPLES: [&str; 2] = ["_printk", "printk"];

/// The thunk that the guest's kernel chose, if it has any.
///
/// # Errors
/// Memory can't be read.
pub fn chosen(kernel: &Kernel<'_>) -> Result<Option<Gva>> {
    match kernel.variable_if_any("x86_return_thunk", 8)? {
        Some(at) => Ok(Some(Gva(kernel.space.read_u64(at)?))),
        None => Ok(None),
    }
}

/// How code returns in this guest, one function of which returns as `seen`; `None` if that can't be known.
fn wanted(kernel: &Kernel<'_>, seen: Option<Returns>) -> Result<Option<Returns>> {
    let default = kernel.symbols.addr("__x86_return_thunk");
    if let Some(to) = chosen(kernel)?.filter(|&to| to.0 != 0 && Some(to) != default) {
        return Ok(Some(Returns::Thunk(to)));
    }
    let sample = || {
        let at = SAMPLES.iter().find_map(|name| kernel.symbols.addr(name))?;
        redirect::returns_at(kernel, at)
    };
    Ok(seen.or_else(sample))
}

/// Refuses code whose calls have to be counted: where the guest tracks call depth.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable) if so.
pub fn check_calls(kernel: &Kernel<'_>, code: &LinkedCode, tables: &[FixupTable]) -> Result<()> {
    let calls: usize = tables.iter().map(|t| t.bytes.len() / 4).sum();
    let chosen = chosen(kernel)?.filter(|_| calls > 0);
    let counting = COUNTING
        .iter()
        .find(|name| chosen.is_some() && kernel.symbols.addr(name) == chosen);
    match counting {
        None => Ok(()),
        Some(thunk) => Err(code.no(&format!(
            "the guest tracks the depth of calls (retbleed=stuff: it returns through {thunk}), and \
             {calls} calls of the payload would have to be counted, which is not supported"
        ))),
    }
}

/// Patches the jumps at `sites`, in a guest one function of which returns as `seen`.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): a site isn't in the code, or the thunk is out
/// of reach.
pub fn apply(
    kernel: &Kernel<'_>,
    code: &mut LinkedCode,
    sites: &[Gva],
    seen: Option<Returns>,
    places: &mut Vec<FixupPlace>,
) -> Result<()> {
    if sites.is_empty() {
        return Ok(());
    }
    let wanted = wanted(kernel, seen)?;
    let default = kernel.symbols.addr("__x86_return_thunk");
    for &at in sites {
        if !code.runs(at, TABLE)? {
            continue;
        }
        let old = code.live(at, RET.len(), TABLE)?;
        // A conditional jump to the thunk (of Clang) is not the kernel's to patch, either.
        if old.first() != Some(&JMP) || target(at, old) != default {
            continue;
        }
        match wanted {
            Some(Returns::Plain) => code.put(at, &RET)?,
            Some(Returns::Thunk(to)) => {
                let jump = branch(JMP, at, to).ok_or_else(|| {
                    code.no(&format!("the return thunk {to} is out of reach of {at}"))
                })?;
                code.put(at, &jump)?;
            }
            None => {}
        }
        places.push(FixupPlace::new(at, RET.len() as u64, TABLE));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::fixups::testing::{code, with, BASE, FUNCTIONS, NOP};

    const OTHER: Gva = Gva(FUNCTIONS.0 + 0x100);

    /// A return, fixed up, where the guest has chosen the thunk `thunk`.
    fn patched(thunk: Option<&str>, seen: Option<Returns>) -> Vec<u8> {
        let change = |f: &mut locus_kernel::fixture::Fixture| {
            if let Some(name) = thunk {
                f.function(OTHER.0, name, &[0xc3]);
            }
        };
        with(&[], change, |kernel| {
            let default = NOP.plus(2);
            let mut code = code(&branch(JMP, BASE, default).unwrap());
            let places = &mut Vec::new();
            apply(kernel, &mut code, &[BASE], seen, places)?;
            assert_eq!(places.len(), 1);
            Ok(code.bytes)
        })
        .unwrap()
    }

    #[test]
    fn returns_follow_the_chosen_thunk_and_else_what_functions_do() {
        let jump = |to| branch(JMP, BASE, to).unwrap().to_vec();
        assert_eq!(patched(None, Some(Returns::Plain)), RET);
        let default = NOP.plus(2);
        assert_eq!(patched(None, Some(Returns::Thunk(default))), jump(default));
        assert_eq!(patched(None, Some(Returns::Thunk(OTHER))), jump(OTHER));
        // Nothing seen: the sample function has a plain return.
        assert_eq!(patched(None, None), RET);
        // With ITS, a plain return seen in an upper half says nothing.
        let its = patched(Some("its_return_thunk"), Some(Returns::Plain));
        assert_eq!(its, jump(OTHER));
    }

    #[test]
    fn only_jumps_to_the_thunk_are_touched() {
        with(
            &[],
            |_| {},
            |kernel| {
                let bytes = [0xe9, 0, 0, 0, 0, 0x0f, 0x84, 0, 0, 0, 0];
                let mut code = code(&bytes);
                let sites = [BASE, BASE.plus(5)];
                apply(
                    kernel,
                    &mut code,
                    &sites,
                    Some(Returns::Plain),
                    &mut Vec::new(),
                )?;
                assert_eq!(code.bytes, bytes);
                let error = apply(kernel, &mut code, &[BASE.plus(9)], None, &mut Vec::new());
                assert!(error.unwrap_err().to_string().contains("leave its code"));
                Ok(())
            },
        )
        .unwrap();
    }

    #[test]
    fn calls_that_would_have_to_be_counted_are_refused() {
        let checked = |thunk: &str, calls: usize| {
            with(
                &[],
                |f| f.function(OTHER.0, thunk, &[0xc3]),
                |kernel| {
                    let bytes = vec![0; 4 * calls];
                    check_calls(kernel, &code(&[]), &[FixupTable { at: BASE, bytes }])
                },
            )
        };
        let error = checked("call_depth_return_thunk", 3)
            .unwrap_err()
            .to_string();
        assert!(error.contains("3 calls of the payload"), "{error}");
        assert!(checked("call_depth_return_thunk", 0).is_ok());
        assert!(checked("its_return_thunk", 3).is_ok());
    }
}
