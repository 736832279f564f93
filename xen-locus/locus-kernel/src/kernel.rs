//! A guest's kernel: found, read or taken from a cache, and asked.

use std::cell::OnceCell;
use std::rc::Rc;

use locus_guest::addr::{Gva, Range};
use locus_guest::budget::Budget;
use locus_guest::space::{Region, Space};
use locus_guest::{self as guest, GuestType, Live, Memory, Vcpu};

use crate::cache::{CachedKernel, KernelCache, NoCache};
use crate::kallsyms::{self, Symbols};
use crate::list::list;
use crate::notes::build_id_note;
use crate::tasks::CPUS_MAX;
use crate::{btf, locate, modules, to_usize, Error};

/// Longest notes believed, in bytes.
const NOTES_MAX: u64 = 64 << 10;

/// A guest's kernel.
///
/// It borrows the guest's memory, and reads more of it when it is asked. One value is for one boot
/// of one kernel.
#[derive(Debug)]
pub struct Kernel<'m> {
    /// Its address space, by its own page table (`init_top_pgt`). It remembers what it read of page
    /// tables; a fresh one for what changes is made by [`Space::fresh`].
    pub space: Space<'m>,
    /// How the guest runs. Of a saved PVH or HVM guest the kernel itself says which.
    pub kind: GuestType,
    /// Guest virtual address of `_text`, the first byte of its text.
    pub text_base: Gva,
    /// Mapped runs of its image, in rising order of addresses.
    pub regions: Vec<Region>,
    /// Its symbols, without those of modules.
    pub symbols: kallsyms::Symbols,
    /// Release, as `uname -r` prints it.
    pub release: String,
    /// Build-id of the image, as raw bytes; `None` if it has no such note.
    pub build_id: Option<Vec<u8>>,
    /// Most CPUs that it can have: of a live guest as many as Xen has vCPUs for it, of a saved one
    /// [`CPUS_MAX`](crate::tasks::CPUS_MAX), because a core leaves out vCPUs that never were up.
    pub cpus_max: usize,
    pub(crate) btf: OnceCell<Rc<btf::Btf>>,
}

impl<'m> Kernel<'m> {
    /// Finds and reads the kernel of a running guest. What `cache` has of it is not read again.
    ///
    /// The search begins with the page tables of the process that a vCPU happens to be in, and that
    /// process may end meanwhile. So there are up to five tries, all paid from one budget.
    ///
    /// # Errors
    /// [`Error::NotReady`] while the kernel boots; [`Error::NotLinux`] if none is found; [`Error::Odd`],
    /// [`Error::Missing`] and [`Error::Memory`] as the last try ended.
    pub fn of(guest: &'m dyn Live, cache: &dyn KernelCache) -> Result<Kernel<'m>, Error> {
        const TRIES: u32 = 5;
        let mut tries = 1;
        let budget = guest.budget();
        loop {
            let vcpus = guest.vcpus()?;
            let kernel = Kernel::read_with(guest.memory(), guest.kind(), &vcpus, cache, &budget);
            match kernel {
                Err(Error::NotReady(_) | Error::Memory(guest::Error::Exhausted)) => return kernel,
                Err(_) if tries < TRIES => tries += 1,
                Err(error) => return Err(error),
                Ok(kernel) => {
                    return Ok(Kernel {
                        cpus_max: vcpus.len(),
                        ..kernel
                    })
                }
            }
        }
    }

    /// Finds and reads the kernel of a guest whose vCPUs are in the states `vcpus`, in one try,
    /// without a cache and within the usual budget.
    ///
    /// # Errors
    /// As [`Kernel::of`].
    pub fn read(mem: &'m dyn Memory, kind: GuestType, vcpus: &[Vcpu]) -> Result<Kernel<'m>, Error> {
        Kernel::read_with(mem, kind, vcpus, &NoCache, &Budget::default())
    }

    /// Finds the kernel of a guest whose vCPUs are in the states `vcpus`, in one try. What `cache`
    /// has of it is not read again; what is new goes into it. All reading, later reading through
    /// [`Kernel::space`] too, is paid from `budget`.
    ///
    /// # Errors
    /// As [`Kernel::of`]. A cache that can't be written is no error.
    pub fn read_with(
        mem: &'m dyn Memory,
        kind: GuestType,
        vcpus: &[Vcpu],
        cache: &dyn KernelCache,
        budget: &Budget,
    ) -> Result<Kernel<'m>, Error> {
        let mut none = None;
        for located in locate::locate(mem, kind, vcpus, budget)? {
            match Kernel::at(&located, kind, vcpus, cache) {
                // Another vCPU's may be the guest's own.
                Err(error @ Error::NotLinux(_)) => none = none.or(Some(error)),
                done => return done,
            }
        }
        Err(none.unwrap_or_else(|| Error::NotLinux("no kernel was located".into())))
    }

    /// Reads the kernel at a place, which must have the entry points of `vcpus`.
    fn at(
        located: &locate::Located<'m>,
        kind: GuestType,
        vcpus: &[Vcpu],
        cache: &dyn KernelCache,
    ) -> Result<Kernel<'m>, Error> {
        let agrees = |symbols: &Symbols| locate::agrees(symbols, &located.space, vcpus);
        let anchors = located.anchors(&agrees);
        for kept in cache.load() {
            if let Some(kernel) = Kernel::kept(located, kind, anchors, kept) {
                return Ok(kernel);
            }
        }
        let symbols = kallsyms::read(&located.space, &located.regions, anchors)
            .map_err(|error| located.not_understood(error))?;
        let kernel = Kernel::with(located, kind, symbols)?;
        // A kernel without BTF is stored without. A cache that can't be written costs only time.
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

    /// Finds and reads the kernel of a saved guest, given its type and the registers in the core.
    ///
    /// A core of a PVH or HVM guest has no entry point. There the kernel is found by the page
    /// tables alone, and other facts must agree with its symbols ([`locate::agrees`]).
    ///
    /// # Errors
    /// As [`Kernel::of`]; if there are several candidates, the error of the likeliest.
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
                    // A kernel that can't tell is taken for what the core says.
                    kernel.kind = kernel.kind_by_itself().unwrap_or(kind);
                    return Ok(kernel);
                }
                Err(error) => first = first.or(Some(error)),
            }
        }
        // `candidates` gives one at least, the likeliest first, so there is a first error.
        Err(first.unwrap_or_else(|| Error::NotLinux("no kernel is in the core".into())))
    }

    /// PVH or HVM, by the kernel's variable `xen_pvh` (arch/x86/xen/enlighten_pvh.c), which is set
    /// if the guest was started as PVH. `None` for a kernel without it.
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

    /// The kernel with what a cache `kept` of it; `None` if that does not fit what the guest shows now.
    pub(crate) fn kept(
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
            let btf = btf::Btf::new(kept.btf).ok()?;
            let btf = btf.paid_from(kernel.space.budget());
            let _ = kernel.btf.set(Rc::new(btf));
        }
        Some(kernel)
    }

    fn with(
        located: &locate::Located<'m>,
        kind: GuestType,
        symbols: kallsyms::Symbols,
    ) -> Result<Kernel<'m>, Error> {
        // Processes come and go with their page tables. The kernel's own stays: `init_top_pgt`
        // (arch/x86/include/asm/pgtable_64.h: swapper_pg_dir).
        let space = &located.space;
        let space = space.with_root(space.walk(symbols.need("init_top_pgt")?)?.frame);
        let mut kernel = Kernel {
            space,
            kind,
            text_base: located.text_base,
            regions: within_image(&located.regions, &symbols),
            symbols: symbols.paid_from(located.space.budget()),
            release: String::new(),
            build_id: None,
            cpus_max: CPUS_MAX,
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
            // Programs show it to people, and publish it.
            .filter(|release| !release.is_empty() && !release.contains(char::is_control))
            .map(str::to_owned)
            .ok_or_else(|| Error::Odd(format!("linux_banner reads {banner:?}")))
    }

    /// The kernel's ELF notes as they are in memory, and as `/sys/kernel/notes` shows them.
    ///
    /// # Errors
    /// [`Error::Missing`] if it has none, [`Error::Odd`] if they are longer than 64 KiB, [`Error::Memory`].
    pub fn notes(&self) -> Result<Vec<u8>, Error> {
        let range = self.between("__start_notes", "__stop_notes", NOTES_MAX)?;
        Ok(self.space.read_vec(range.start, to_usize(range.len())?)?)
    }

    /// The build-id note; `None` for a kernel without notes, or without this one.
    fn read_build_id(&self) -> Result<Option<Vec<u8>>, Error> {
        match self.notes() {
            Err(Error::Missing(_)) => Ok(None),
            notes => Ok(build_id_note(&notes?)),
        }
    }

    /// How far the image was moved by KASLR, in bytes, wrapping.
    ///
    /// That holds for a kernel linked at 16 MiB, which is the default (`CONFIG_PHYSICAL_START`).
    /// Where there is a VMCOREINFO, its
    /// [`kernel_offset`](crate::vmcoreinfo::VmcoreInfo::kernel_offset) is more reliable.
    #[must_use]
    pub fn kaslr_offset(&self) -> u64 {
        self.text_base
            .0
            .wrapping_sub(locate::KERNEL_MAP.0 + (16 << 20))
    }

    /// The kernel's types (`__start_BTF` to `__stop_BTF`), read at first use and remembered.
    ///
    /// # Errors
    /// [`Error::Missing`] if the kernel has none (`CONFIG_DEBUG_INFO_BTF`), [`Error::Odd`] if they
    /// are not well-formed, [`Error::Memory`].
    pub fn btf(&self) -> Result<&btf::Btf, Error> {
        self.btf_shared().map(|btf| &**btf)
    }

    /// The kernel's types, shared: a module's types are built on them ([`btf::Btf::split`]).
    ///
    /// # Errors
    /// As [`Kernel::btf`].
    pub fn btf_shared(&self) -> Result<&Rc<btf::Btf>, Error> {
        if let Some(btf) = self.btf.get() {
            return Ok(btf);
        }
        let range = self.between("__start_BTF", "__stop_BTF", btf::BYTES_MAX as u64)?;
        let bytes = self.space.read_vec(range.start, to_usize(range.len())?)?;
        let btf = btf::Btf::new(bytes)?.paid_from(self.space.budget());
        Ok(self.btf.get_or_init(|| Rc::new(btf)))
    }

    /// The addresses between two symbols, at most `most` bytes.
    pub(crate) fn between(&self, start: &str, stop: &str, most: u64) -> Result<Range, Error> {
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

    /// The number of entries in the list `modules` (kernel/module/main.c). It counts modules that
    /// are about to be loaded too, which [`modules::ModuleReader::all`] leaves out.
    ///
    /// # Errors
    /// As [`list()`](crate::list()); [`Error::Missing`] for a kernel without modules.
    pub fn module_count(&self) -> Result<usize, Error> {
        let head = self.symbols.need("modules")?;
        Ok(list(&self.space, head, modules::MODULES_MAX)?.len())
    }

    /// The text that a module's `vermagic` must equal (include/linux/vermagic.h), without the space
    /// at its end.
    ///
    /// # Errors
    /// [`Error::Missing`] for a kernel without modules, [`Error::Odd`] if it has control characters, [`Error::Memory`].
    pub fn vermagic(&self) -> Result<String, Error> {
        let text = self.space.read_cstr(self.symbols.need("vermagic")?, 256)?;
        let text = text.trim_end();
        if text.contains(char::is_control) {
            return Err(Error::Odd(format!("vermagic reads {text:?}")));
        }
        Ok(text.to_owned())
    }

    /// Guest virtual address of the symbol `name`. `sympos` chooses among several as livepatch
    /// counts them: 1 is the first in the symbol table, 0 says that there must be only one
    /// (Documentation/livepatch/module-elf-format.rst).
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no such symbol, or none of that number; [`Error::Several`] if
    /// there are several and `sympos` is 0; [`Error::Memory`] if there are more than the guest's budget pays for.
    pub fn function(&self, name: &str, sympos: u64) -> Result<Gva, Error> {
        let mut found: Vec<Gva> = Vec::new();
        for at in self.symbols.addrs(name) {
            // A guest may have many of one name.
            self.space.budget().spend(1)?;
            found.push(at);
        }
        self.space.budget().check()?;
        // A number that is too large for this machine is the number of no symbol either.
        let wanted = usize::try_from(sympos).unwrap_or(usize::MAX);
        match (found.as_slice(), wanted) {
            ([], _) => Err(Error::Missing(format!("symbol {name}"))),
            ([one], 0 | 1) => Ok(*one),
            (many, 0) => Err(Error::Several {
                count: many.len(),
                name: name.to_owned(),
            }),
            (many, n) => many.get(n - 1).copied().ok_or_else(|| {
                Error::Missing(format!("symbol {name} number {n}: it has {}", many.len()))
            }),
        }
    }
}

/// The runs that begin before `_end`. A kernel without KASLR has modules behind its image, within
/// the addresses in which it is searched for (`MODULES_VADDR`, arch/x86/include/asm/pgtable_64_types.h).
fn within_image(found: &[Region], symbols: &Symbols) -> Vec<Region> {
    let end = symbols.addr("_end");
    let within = |r: &&Region| end.is_none_or(|end| r.range.start < end);
    found.iter().filter(within).copied().collect()
}
