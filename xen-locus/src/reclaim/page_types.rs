//! What the guest's kernel uses a page for, by its `struct page`.

use locus_guest::addr::Gva;
use locus_guest::space::Space;
use locus_kernel::Kernel;

use crate::error::Result;

/// Largest block of free pages: so many times a page is doubled.
const ORDER_MAX: u32 = 18;
/// Longest name of a slab cache that is shown, in bytes.
const NAME_MAX: usize = 32;
/// `page_type` of a free page where a type is one cleared bit (include/linux/page-flags.h of 5.10 to 6.9: `PG_buddy`). A free
/// page has no other type, and all other bits stay as in a page without one. A type in the highest byte is another
/// value than this, so it is not taken for a free page if its name is not known.
const BUDDY: u32 = 0xffff_ff7f;

/// The kernel's `struct page` of each page frame (`vmemmap_base`), and how to read them.
#[derive(Default)]
pub(super) struct Pages {
    /// Where they begin, and the size of one; `None` if that is not known.
    array: Option<(Gva, u64)>,
    free: Option<Free>,
    lru: Option<Flag>,
    slab: Option<Slab>,
    /// Offset of what names the first part of a larger page.
    head: Option<u64>,
}

/// How a free page is known: the kernel's allocator says so of the first page of a block.
struct Free {
    kind: u64,
    order: u64,
    is_buddy: IsBuddy,
}

enum IsBuddy {
    /// By the highest byte of the type. Linux kernel commit 4ffca5a96678 ("mm: support only one page_type per page") (in
    /// v6.12).
    Kind(i64),
    /// By [`BUDDY`]. Older kernels have no names for the types of pages in their BTF.
    Cleared,
}

/// A bit of the page's flags.
struct Flag {
    flags: u64,
    bit: u32,
}

/// How a page of a slab is known, and its cache.
struct Slab {
    is_slab: IsSlab,
    /// Offset of the pointer to the cache, and in the cache of the pointer to its name.
    cache: u64,
    name: u64,
}

enum IsSlab {
    Flag(Flag),
    /// The offset of the type, and its highest byte.
    Kind(u64, i64),
}

impl Pages {
    /// # Errors
    /// Memory can't be read.
    pub(super) fn of(kernel: &Kernel<'_>, space: &Space<'_>) -> Result<Pages> {
        let at = kernel.variable_if_any("vmemmap_base", 8)?;
        let (Some(at), Ok(btf)) = (at, kernel.btf()) else {
            return Ok(Pages::default());
        };
        let sized = |path, bytes| {
            btf.offset_of_sized("page", path, bytes)
                .ok()
                .map(|o| o as u64)
        };
        let (word, half) = (|path| sized(path, 8), |path| sized(path, 4));
        let is_buddy = match btf.enum_value("pagetype", "PGTY_buddy") {
            Some(kind) => Some(IsBuddy::Kind(kind)),
            None if btf.enum_value("pagetype", "PG_buddy").is_some() => None,
            None => Some(IsBuddy::Cleared),
        };
        let free = || {
            Some(Free {
                kind: half("page_type")?,
                order: word("private")?,
                is_buddy: is_buddy?,
            })
        };
        let flag = |name| {
            Some(Flag {
                flags: word("flags")?,
                bit: u32::try_from(btf.enum_value("pageflags", name)?).ok()?,
            })
        };
        let slab = || {
            let of_slab = btf
                .offset_of_sized("slab", "slab_cache", 8)
                .ok()
                .map(|o| o as u64);
            let kind = || Some((half("page_type")?, btf.enum_value("pagetype", "PGTY_slab")?));
            Some(Slab {
                is_slab: match kind() {
                    Some((at, kind)) => IsSlab::Kind(at, kind),
                    None => IsSlab::Flag(flag("PG_slab")?),
                },
                cache: of_slab.or_else(|| word("slab_cache"))?,
                name: btf.offset_of_sized("kmem_cache", "name", 8).ok()? as u64,
            })
        };
        let size = btf.size_of("page").ok().map(|size| size as u64);
        let start = Gva(space.read_u64(at)?);
        Ok(Pages {
            array: size.map(|size| (start, size)),
            free: free(),
            // Flags of a part of a larger page are those of the first part, which must be known then.
            lru: word("compound_head").and_then(|_| flag("PG_lru")),
            slab: slab(),
            head: word("compound_head"),
        })
    }

    /// Whether nothing in page frame `pfn` is followed by the kernel: it is free, or holds memory of processes or files. A
    /// kernel whose form is not known has no such page.
    pub(super) fn is_ignored(&self, space: &Space<'_>, pfn: u64) -> bool {
        let is_lru = || {
            let (lru, page) = (self.lru.as_ref()?, self.first_part(space, pfn)?);
            lru.is_set(space, page)
        };
        is_lru() == Some(true) || self.is_free(space, pfn)
    }

    /// Name of the slab cache that page frame `pfn` belongs to, if it does.
    pub(super) fn slab(&self, space: &Space<'_>, pfn: u64) -> Option<String> {
        let (slab, page) = (self.slab.as_ref()?, self.first_part(space, pfn)?);
        let is_slab = match &slab.is_slab {
            IsSlab::Flag(flag) => flag.is_set(space, page)?,
            IsSlab::Kind(at, kind) => {
                i64::from(space.read_u32(page.plus(*at)).ok()? >> 24) == *kind
            }
        };
        if !is_slab {
            return None;
        }
        let cache = Gva(space.read_u64(page.plus(slab.cache)).ok()?);
        let name = Gva(space.read_u64(cache.plus(slab.name)).ok()?);
        // It is shown as any word of the guest's, so what can't be printed ends it.
        let name = space.read_cstr(name, NAME_MAX).ok()?;
        Some(name.chars().take_while(char::is_ascii_graphic).collect())
    }

    fn page(&self, pfn: u64) -> Option<Gva> {
        let (start, size) = self.array?;
        Some(Gva(start.0.wrapping_add(pfn.wrapping_mul(size))))
    }

    /// The first part of the larger page that page frame `pfn` is a part of; its own, if it is of none.
    fn first_part(&self, space: &Space<'_>, pfn: u64) -> Option<Gva> {
        let page = self.page(pfn)?;
        let word = space.read_u64(page.plus(self.head?)).ok()?;
        // Bit 0 says that it names the first part.
        Some(if word & 1 == 1 { Gva(word & !1) } else { page })
    }

    fn is_free(&self, space: &Space<'_>, pfn: u64) -> bool {
        let Some(free) = &self.free else {
            return false;
        };
        (0..=ORDER_MAX).any(|block| {
            let Some(first) = self.page(pfn & !((1 << block) - 1)) else {
                return false;
            };
            // There need be no page before the first one.
            let Ok(kind) = space.read_u32(first.plus(free.kind)) else {
                return false;
            };
            let is_buddy = match free.is_buddy {
                IsBuddy::Kind(buddy) => i64::from(kind >> 24) == buddy,
                IsBuddy::Cleared => kind == BUDDY,
            };
            let order = || space.read_u64(first.plus(free.order)).ok();
            is_buddy && order().is_some_and(|order| order >= u64::from(block))
        })
    }
}

impl Flag {
    fn is_set(&self, space: &Space<'_>, page: Gva) -> Option<bool> {
        let flags = space.read_u64(page.plus(self.flags)).ok()?;
        Some(flags.checked_shr(self.bit)? & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use locus_kernel::btf::blob::Blob;
    use locus_kernel::fixture::{vcpus, Fixture, KIND, TEXT};

    /// A variable of the kernel's, and its array of `struct page`.
    const BASE: u64 = TEXT.0 + (8 << 20);
    const PAGES: Gva = Gva(0xffff_ea00_0000_0000);

    /// Whether page frame 3 is ignored, whose `page_type` is this, in a kernel that has no names for types.
    fn is_ignored(kind: u32) -> bool {
        let mut types = Blob::with_integers();
        let members = [("flags", 4, 0), ("private", 4, 40), ("page_type", 3, 48)];
        types.structure("page", 64, &members);
        let mut fixture = Fixture::new();
        fixture.symbols.push((BASE, 'd', "vmemmap_base".to_owned()));
        fixture.constants.push(("__start_BTF", types.bytes()));
        fixture.constants.push(("__stop_BTF", Vec::new()));
        let memory = fixture.build();
        memory.map_bytes(Gva(BASE), &PAGES.0.to_le_bytes(), true, false);
        let mut pages = vec![0xff; 4096];
        pages[3 * 64 + 40..][..8].fill(0);
        pages[3 * 64 + 48..][..4].copy_from_slice(&kind.to_le_bytes());
        memory.map_bytes(PAGES, &pages, true, false);
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        let pages = Pages::of(&kernel, &kernel.space).unwrap();
        pages.is_ignored(&kernel.space, 3)
    }

    #[test]
    fn a_type_in_the_highest_byte_is_no_free_page_where_types_have_no_names() {
        assert!(is_ignored(BUDDY));
        // A slab, a page table and a free page as 6.12 has them; no type; another type, also with the first one.
        for kind in [
            0xf500_0000,
            0xf200_0001,
            0xf000_0000,
            u32::MAX,
            0xffff_fdff,
            0xffff_fd7f,
        ] {
            assert!(!is_ignored(kind), "{kind:#x}");
        }
    }
}
