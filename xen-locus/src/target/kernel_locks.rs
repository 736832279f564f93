//! Locks of the guest's kernel: under them it changes what a plan relies on.

use locus_guest::addr::Gva;
use locus_kernel::btf::Btf;
use locus_kernel::Kernel;

use crate::error::{Error, Result};
use crate::write::{About, Lock, Write};

/// Where the owner of a `struct mutex` is: with PREEMPT_RT it is an rt-mutex (include/linux/mutex.h; Linux kernel commit
/// bb630f9f7a7d ("locking/rtmutex: Add mutex variant for RT") (in v5.15), and the RT patches before it). The word is 0
/// while the lock is free and nobody waits for it.
const OWNERS: [&str; 3] = ["owner", "rtmutex.owner", "lock.owner"];

/// Address of the word that says who holds `lock`.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): the kernel has no such lock, or locks of another kind.
pub fn owner(kernel: &Kernel<'_>, lock: Lock) -> Result<Gva> {
    let at = kernel.symbols.need(lock.symbol())?;
    Ok(at.plus(owner_offset(kernel.btf()?)?))
}

fn owner_offset(btf: &Btf) -> Result<u64> {
    let known = OWNERS
        .iter()
        .find_map(|path| btf.offset_of_sized("mutex", path, 8).ok());
    known.map(|offset| offset as u64).ok_or_else(|| {
        Error::not_applicable(format!(
            "whether a lock of the guest's kernel is held can't be told: its struct mutex has none of the members {}",
            OWNERS.join(", ")
        ))
    })
}

/// The condition that `lock` is free.
///
/// # Errors
/// As [`owner`]; [`Cause::Passing`](crate::error::Cause::Passing) while it is held.
pub fn is_free(kernel: &Kernel<'_>, lock: Lock) -> Result<Write> {
    let at = owner(kernel, lock)?;
    match kernel.space.fresh().read_u64(at)? {
        0 => Ok(Write::condition(at, vec![0; 8], About::Lock(lock))),
        _ => Err(Error::passing(lock.held())),
    }
}

#[cfg(test)]
mod tests {
    use locus_kernel::btf::blob::Blob;

    use super::*;
    use crate::error::Class;

    #[test]
    fn the_owner_is_found_in_each_kind_of_mutex() {
        let offset = |member: &str, inner: Option<&str>| {
            let mut b = Blob::new();
            let long = b.int("long", 8);
            let ty = inner.map_or(long, |name| {
                b.structure(
                    "rt_mutex_base",
                    32,
                    &[("waiters", long, 0), (name, long, 24)],
                )
            });
            b.structure("mutex", 48, &[("wait_lock", long, 0), (member, ty, 8)]);
            owner_offset(&Btf::new(b.bytes()).unwrap())
        };
        assert_eq!(offset("owner", None).unwrap(), 8);
        assert_eq!(offset("rtmutex", Some("owner")).unwrap(), 32);
        assert_eq!(offset("lock", Some("owner")).unwrap(), 32);
        let error = offset("holder", None).unwrap_err();
        assert_eq!(error.class(), Class::NotApplicable);
        assert!(error.to_string().contains("struct mutex"), "{error}");
    }
}
