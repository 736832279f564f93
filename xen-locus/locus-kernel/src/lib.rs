//! Who is this guest: its kernel's place, symbols, types and tasks, read from guest memory alone.
#![forbid(unsafe_code)]
#![deny(clippy::print_stderr)]

pub mod btf;
mod cache;
pub mod cpu;
#[cfg(any(test, feature = "testing"))]
pub mod fixture;
#[cfg(any(test, feature = "testing"))]
pub mod fixture_world;
pub mod kallsyms;
pub mod locate;
pub mod modules;
mod name_index;
pub mod orc;
pub mod split_functions;
mod system_state;
pub mod tasks;
pub mod unwind;
pub mod vmcoreinfo;

use std::cell::OnceCell;
use std::rc::Rc;

pub use self::cache::{CachedKernel, KernelCache, NoCache};
use locus_guest::addr::{Gva, Range};
use locus_guest::budget::Budget;
use locus_guest::space::{Region, Space};
use locus_guest::{self as guest, GuestType, Live, Memory, Vcpu};

use self::kallsyms::Symbols;

/// Why a guest's kernel can't be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It isn't running yet.
    #[error("{0}")]
    NotReady(String),
    /// It is no Linux kernel as this tool knows them.
    #[error("{0}")]
    NotLinux(String),
    /// A symbol, type or member that is needed isn't there.
    #[error("the guest's kernel has no {0}")]
    Missing(String),
    /// Its data contradicts itself.
    #[error("the guest's kernel data is not as it must be: {0}")]
    Odd(String),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] guest::Error),
}

/// Longest believed notes, in bytes.
const NOTES_MAX: u64 = 64 << 10;

/// A guest's kernel.
#[derive(Debug)]
pub struct Kernel<'m> {
    /// Its address space.
    pub space: Space<'m>,
    /// How the guest runs.
    pub kind: GuestType,
    /// First byte of its text (`_text`).
    pub text_base: Gva,
    /// Mapped runs of its image.
    pub regions: Vec<Region>,
    /// Its symbols.
    pub symbols: kallsyms::Symbols,
    /// Release, as `uname -r` prints it.
    pub release: String,
    /// Build-id of the image.
    pub build_id: Option<Vec<u8>>,
    btf: OnceCell<Rc<btf::Btf>>,
}

impl<'m> Kernel<'m> {
    /// Finds and reads the kernel of a running guest, what `cache` has of it not anew.
    ///
    /// It begins with the page tables of whatever process a vCPU is in, and that process may end
    /// meanwhile: so there are several tries.
    ///
    /// # Errors
    /// See [`Error`]; of the last try.
    pub fn of(guest: &'m dyn Live, cache: &dyn KernelCache) -> Result<Kernel<'m>, Error> {
        const TRIES: u32 = 5;
        let mut tries = 1;
        let budget = Budget::default();
        loop {
            let vcpus = guest.vcpus()?;
            let kernel = Kernel::read_with(guest.memory(), guest.kind(), &vcpus, cache, &budget);
            match kernel {
                Err(Error::NotReady(_) | Error::Memory(locus_guest::Error::Exhausted)) => {
                    return kernel
                }
                Err(_) if tries < TRIES => tries += 1,
                _ => return kernel,
            }
        }
    }

    /// Finds and reads the kernel of a guest whose vCPUs are in the states `vcpus`.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn read(mem: &'m dyn Memory, kind: GuestType, vcpus: &[Vcpu]) -> Result<Kernel<'m>, Error> {
        Kernel::read_with(mem, kind, vcpus, &NoCache, &Budget::default())
    }

    /// Finds the kernel of a guest whose vCPUs are in the states `vcpus`, and reads what `cache` does
    /// not have of it, for what `budget` holds.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn read_with(
        mem: &'m dyn Memory,
        kind: GuestType,
        vcpus: &[Vcpu],
        cache: &dyn KernelCache,
        budget: &Budget,
    ) -> Result<Kernel<'m>, Error> {
        let located = locate::locate(mem, kind, vcpus, budget)?;
        let agrees = |symbols: &Symbols| locate::agrees(symbols, &located.space, vcpus);
        let anchors = located.anchors(&agrees);
        for kept in cache.load() {
            if let Some(kernel) = Kernel::kept(&located, kind, anchors, kept) {
                return Ok(kernel);
            }
        }
        let symbols = kallsyms::read(&located.space, &located.regions, anchors)?;
        let kernel = Kernel::with(&located, kind, symbols)?;
        // A kernel without BTF is kept without; a folder that can't be written costs only time.
        if let (Some(build_id), true) = (&kernel.build_id, cache.is_wanted()) {
            let btf = kernel.btf().map(|b| b.bytes().to_vec()).unwrap_or_default();
            let _ = cache.store(&CachedKernel {
                text_base: kernel.text_base.0,
                release: kernel.release.clone(),
                build_id: build_id.clone(),
                symbols: kernel.symbols.clone(),
                btf,
            });
        }
        Ok(kernel)
    }

    /// Finds and reads the kernel of a saved guest. In a core of a PVH or HVM guest no entry point
    /// is known, so the kernel is found by the page tables and believed by other anchors
    /// ([`locate::agrees`]).
    ///
    /// # Errors
    /// See [`Error`].
    pub fn of_saved(
        mem: &'m dyn Memory,
        kind: GuestType,
        vcpus: &[Vcpu],
    ) -> Result<Kernel<'m>, Error> {
        if kind == GuestType::Pv {
            return Kernel::read(mem, kind, vcpus);
        }
        let mut first = None;
        for located in locate::candidates(mem, kind, vcpus, &Budget::default())? {
            let agrees = |symbols: &Symbols| locate::agrees(symbols, &located.space, vcpus);
            let kernel = kallsyms::read(&located.space, &located.regions, located.anchors(&agrees))
                .and_then(|symbols| Kernel::with(&located, kind, symbols));
            match kernel {
                Ok(mut kernel) => {
                    kernel.kind = kernel.kind_by_itself().unwrap_or(kind);
                    return Ok(kernel);
                }
                Err(error) => first = first.or(Some(error)),
            }
        }
        // There is one candidate at least, and the first is the likeliest.
        Err(first.unwrap_or_else(|| Error::NotLinux("no kernel is in the core".into())))
    }

    /// What an auto-translated guest thinks it is: `xen_pvh` (arch/x86/xen/enlighten_pvh.c)
    /// is set where the guest was started as PVH.
    fn kind_by_itself(&self) -> Option<GuestType> {
        let mut flag = [0];
        self.space
            .read(self.symbols.addr("xen_pvh")?, &mut flag)
            .ok()?;
        Some(if flag == [0] {
            GuestType::Hvm
        } else {
            GuestType::Pvh
        })
    }

    /// The kernel with what was kept of it, if that fits what the guest shows now.
    fn kept(
        located: &locate::Located<'m>,
        kind: GuestType,
        anchors: kallsyms::Anchors<'_>,
        kept: CachedKernel,
    ) -> Option<Kernel<'m>> {
        let mut symbols = kept.symbols;
        symbols.slide(anchors.text_base.0.wrapping_sub(kept.text_base));
        if !symbols.agrees(anchors) {
            return None;
        }
        let kernel = Kernel::with(located, kind, symbols).ok()?;
        if kernel.release != kept.release || kernel.build_id.as_ref() != Some(&kept.build_id) {
            return None;
        }
        if !kept.btf.is_empty() {
            let _ = kernel.btf.set(Rc::new(btf::Btf::new(kept.btf).ok()?));
        }
        Some(kernel)
    }

    fn with(
        located: &locate::Located<'m>,
        kind: GuestType,
        symbols: kallsyms::Symbols,
    ) -> Result<Kernel<'m>, Error> {
        // The kernel's own page table stays, whichever process comes and goes: `init_top_pgt`
        // (arch/x86/include/asm/pgtable_64.h: swapper_pg_dir).
        let space = &located.space;
        let space = space.with_root(space.walk(symbols.need("init_top_pgt")?)?.frame);
        let mut kernel = Kernel {
            space,
            kind,
            text_base: located.text_base,
            regions: located.regions.clone(),
            symbols,
            release: String::new(),
            build_id: None,
            btf: OnceCell::new(),
        };
        kernel.release = kernel.read_release()?;
        kernel.build_id = kernel.read_build_id()?;
        Ok(kernel)
    }

    /// `linux_banner` begins "Linux version RELEASE (…" (init/version-timestamp.c).
    fn read_release(&self) -> Result<String, Error> {
        let banner = self
            .space
            .read_cstr(self.symbols.need("linux_banner")?, 512)?;
        banner
            .strip_prefix("Linux version ")
            .and_then(|rest| rest.split(' ').next())
            // It is shown, and published in XenStore.
            .filter(|release| !release.is_empty() && !release.contains(char::is_control))
            .map(str::to_owned)
            .ok_or_else(|| Error::Odd(format!("linux_banner reads {banner:?}")))
    }

    /// The kernel's notes, as `/sys/kernel/notes` shows them.
    ///
    /// # Errors
    /// It has none, they are too long, or they can't be read.
    pub fn notes(&self) -> Result<Vec<u8>, Error> {
        let range = self.between("__start_notes", "__stop_notes", NOTES_MAX)?;
        let len = usize::try_from(range.len()).unwrap_or(0);
        Ok(self.space.read_vec(range.start, len)?)
    }

    /// The `NT_GNU_BUILD_ID` note.
    fn read_build_id(&self) -> Result<Option<Vec<u8>>, Error> {
        match self.notes() {
            Err(Error::Missing(_)) => Ok(None),
            notes => Ok(build_id_note(&notes?)),
        }
    }

    /// Offset of the image (KASLR) if it was linked at 16 MiB, as it is by default
    /// (`CONFIG_PHYSICAL_START`); VMCOREINFO knows better, where there is one.
    #[must_use]
    pub fn kaslr_offset(&self) -> u64 {
        self.text_base
            .0
            .wrapping_sub(locate::KERNEL_MAP.0 + (16 << 20))
    }

    /// The kernel's types; read at first use.
    ///
    /// # Errors
    /// The kernel has none, or they can't be read.
    pub fn btf(&self) -> Result<&btf::Btf, Error> {
        self.btf_shared().map(|btf| &**btf)
    }

    /// The same, to build the types of modules on.
    ///
    /// # Errors
    /// As [`Kernel::btf`].
    pub fn btf_shared(&self) -> Result<&Rc<btf::Btf>, Error> {
        if let Some(btf) = self.btf.get() {
            return Ok(btf);
        }
        let range = self.between("__start_BTF", "__stop_BTF", btf::BYTES_MAX as u64)?;
        let len = usize::try_from(range.len()).unwrap_or(0);
        let btf = btf::Btf::new(self.space.read_vec(range.start, len)?)?;
        Ok(self.btf.get_or_init(|| Rc::new(btf)))
    }

    fn between(&self, start: &str, stop: &str, most: u64) -> Result<Range, Error> {
        let range = Range {
            start: self.symbols.need(start)?,
            end: self.symbols.need(stop)?,
        };
        if range.start > range.end || range.len() > most {
            return Err(Error::Odd(format!(
                "{start} is {} and {stop} is {}; expected at most {most} bytes between them",
                range.start, range.end
            )));
        }
        Ok(range)
    }

    /// The number of loaded modules: a bounded walk of the list `modules` (kernel/module/main.c).
    ///
    /// # Errors
    /// The list can't be read.
    pub fn module_count(&self) -> Result<usize, Error> {
        let head = self.symbols.need("modules")?;
        Ok(list(&self.space, head, modules::MODULES_MAX)?.len())
    }

    /// The string a module's `vermagic` must equal, less its trailing space.
    ///
    /// # Errors
    /// The kernel has none, or it can't be read.
    pub fn vermagic(&self) -> Result<String, Error> {
        let text = self.space.read_cstr(self.symbols.need("vermagic")?, 256)?;
        Ok(text.trim_end().to_owned())
    }

    /// Address of the text symbol, unique in the kernel or chosen by `sympos` as livepatch counts
    /// (0 = must be unique, 1 = first, …; Documentation/livepatch/module-elf-format.rst).
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Odd`] (several and none chosen).
    pub fn function(&self, name: &str, sympos: u64) -> Result<Gva, Error> {
        let found: Vec<Gva> = self.symbols.all(name).map(|s| s.addr).collect();
        let wanted = usize::try_from(sympos).unwrap_or(usize::MAX);
        match (found.as_slice(), wanted) {
            ([], _) => Err(Error::Missing(format!("symbol {name}"))),
            ([one], 0 | 1) => Ok(*one),
            (many, 0) => Err(Error::Odd(format!(
                "{} symbols are called {name}, and the payload does not say which (sympos)",
                many.len()
            ))),
            (many, n) => many.get(n - 1).copied().ok_or_else(|| {
                Error::Missing(format!("symbol {name} number {n}: it has {}", many.len()))
            }),
        }
    }
}

/// Elements of the circular list at `head` (each the address of its `list_head`), at most `most`.
pub fn list(space: &Space<'_>, head: Gva, most: usize) -> Result<Vec<Gva>, Error> {
    let mut found = Vec::new();
    let mut at = Gva(space.read_u64(head)?);
    while at != head {
        if found.len() >= most {
            return Err(Error::Odd(format!(
                "the list at {head} does not come back to its head within {most} elements"
            )));
        }
        found.push(at);
        at = Gva(space.read_u64(at)?);
    }
    Ok(found)
}

fn build_id_note(notes: &[u8]) -> Option<Vec<u8>> {
    use guest::fetch;
    let mut at = 0usize;
    while let (Some(name), Some(desc), Some(kind)) = (
        fetch::u32(notes, at),
        fetch::u32(notes, at + 4),
        fetch::u32(notes, at + 8),
    ) {
        let align = |n: u32| (n as usize).saturating_add(3) & !3;
        let name_at = at + 12;
        let desc_at = name_at.checked_add(align(name))?;
        if kind == 3 && notes.get(name_at..name_at + 4) == Some(b"GNU\0") && desc <= 64 {
            return notes
                .get(desc_at..desc_at + desc as usize)
                .map(<[u8]>::to_vec);
        }
        at = desc_at.checked_add(align(desc))?;
    }
    None
}
