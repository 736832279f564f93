//! A `struct module` for a payload, laid out as the guest's own types say (include/linux/module.h).

use locus_guest::addr::{Gva, Range};
use locus_kernel::btf::Btf;
use locus_kernel::Kernel;

use crate::error::{Error, Result};

/// Largest structure believed, in bytes.
const SIZE_MAX: usize = 64 << 10;
/// Most kinds of memory a module has.
const KINDS_MAX: i64 = 32;

/// Memory of a payload.
#[derive(Clone, Copy, Debug)]
pub struct ModuleMemory {
    /// The kind, as `enum mod_mem_type` names it.
    pub kind: &'static str,
    /// Its pages.
    pub range: Range,
}

/// A node for the guest's tree of module addresses.
#[derive(Clone, Copy, Debug)]
pub struct TreeNode {
    /// Address of the `latch_tree_node`.
    pub at: Gva,
    /// Its key: the first address of the memory that it stands for.
    pub key: Gva,
}

/// The structure, being filled in.
#[derive(Debug)]
pub struct Structure<'k> {
    btf: &'k Btf,
    at: Gva,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Size of the guest's `struct NAME`, in bytes.
///
/// # Errors
/// The guest has no such type, or its size is absurd.
pub fn size_of(btf: &Btf, name: &str) -> Result<usize> {
    let size = btf.size_of(name)?;
    if size == 0 || size > SIZE_MAX {
        return Err(Error::not_applicable(format!(
            "struct {name} has {size} bytes in the guest's types; expected 1 to {SIZE_MAX}"
        )));
    }
    Ok(size)
}

impl<'k> Structure<'k> {
    /// A structure of zeroes that is to stand at `at`.
    ///
    /// # Errors
    /// The kernel has no types.
    pub fn new(kernel: &'k Kernel<'_>, at: Gva) -> Result<Structure<'k>> {
        let btf = kernel.btf()?;
        Ok(Structure {
            btf,
            at,
            bytes: vec![0; size_of(btf, "module")?],
        })
    }

    /// Address of the member at `path`.
    ///
    /// # Errors
    /// There is none.
    pub fn member(&self, path: &str) -> Result<Gva> {
        Ok(self.at.plus(self.btf.offset_of("module", path)? as u64))
    }

    /// Fills in the member at `path`.
    ///
    /// # Errors
    /// There is none, or it has another number of bytes.
    pub fn set(&mut self, path: &str, value: &[u8]) -> Result<()> {
        let at = self.btf.offset_of_sized("module", path, value.len())?;
        self.put(at, value)
    }

    /// Fills in the first bytes of the array of bytes at `path`.
    ///
    /// # Errors
    /// There is none, or it does not hold so many.
    pub fn begin(&mut self, path: &str, value: &[u8]) -> Result<()> {
        let at = self.btf.offset_of("module", path)?;
        let room = self.btf.array_len("module", path)?;
        if value.len() > room {
            return Err(Error::not_applicable(format!(
                "{path} of the guest's struct module has {room} bytes; {} are needed",
                value.len()
            )));
        }
        self.put(at, value)
    }

    fn put(&mut self, at: usize, value: &[u8]) -> Result<()> {
        let end = at.saturating_add(value.len());
        match self.bytes.get_mut(at..end) {
            Some(room) => {
                room.copy_from_slice(value);
                Ok(())
            }
            None => Err(Error::not_applicable(format!(
                "a member of the guest's struct module ends at byte {end} of {}",
                self.bytes.len()
            ))),
        }
    }

    /// Fills in a table: a pointer and a count.
    ///
    /// # Errors
    /// A member is missing, or the count is larger than 32 bits.
    pub fn table(&mut self, pointer: &str, count: &str, at: Gva, len: usize) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let len = u32::try_from(len)
            .map_err(|_| Error::not_applicable(format!("{len} rows for {pointer}")))?;
        self.set(pointer, &at.0.to_le_bytes())?;
        self.set(count, &len.to_le_bytes())
    }

    /// Makes the list head at `path` an empty list.
    ///
    /// # Errors
    /// There is none.
    pub fn empty_list(&mut self, path: &str) -> Result<()> {
        let own = self.member(path)?.0.to_le_bytes();
        self.set(path, &[own, own].concat())
    }

    /// Says which memory the module has; returns the nodes for the tree of module addresses.
    ///
    /// # Errors
    /// The guest describes the memory of modules in an unknown way.
    pub fn memory(&mut self, parts: &[ModuleMemory]) -> Result<Vec<TreeNode>> {
        if self.btf.has("module", "mem") {
            return self.memory_by_kind(parts);
        }
        // A payload has code, so there is memory.
        let end = parts.iter().map(|p| p.range.end.0).max().unwrap_or(0);
        let start = parts.iter().map(|p| p.range.start.0).min().unwrap_or(0);
        let up_to = |kinds: &[&str]| {
            let of_kind = parts.iter().filter(|p| kinds.contains(&p.kind));
            of_kind.map(|p| p.range.end.0).max().unwrap_or(start) - start
        };
        let sizes = [
            ("core_layout.size", end - start),
            ("core_layout.text_size", up_to(&["MOD_TEXT"])),
            ("core_layout.ro_size", up_to(&["MOD_TEXT", "MOD_RODATA"])),
            (
                "core_layout.ro_after_init_size",
                up_to(&["MOD_TEXT", "MOD_RODATA"]),
            ),
        ];
        self.set("core_layout.base", &start.to_le_bytes())?;
        for (path, size) in sizes {
            self.set(path, &half(size)?)?;
        }
        let module = self.at.0.to_le_bytes();
        self.set("core_layout.mtn.mod", &module)?;
        Ok(vec![TreeNode {
            at: self.member("core_layout.mtn.node")?,
            key: Gva(start),
        }])
    }

    /// Linux kernel commit ac3b43283923 ("module: replace module_layout with module_memory") (in
    /// v6.4).
    fn memory_by_kind(&mut self, parts: &[ModuleMemory]) -> Result<Vec<TreeNode>> {
        let mem = self.btf.offset_of("module", "mem")?;
        let stride = size_of(self.btf, "module_memory")?;
        let of = |path, bytes| self.btf.offset_of_sized("module_memory", path, bytes);
        let (base, size, owner) = (of("base", 8)?, of("size", 4)?, of("mtn.mod", 8)?);
        let node = self.btf.offset_of("module_memory", "mtn.node")?;
        let module = self.at.0.to_le_bytes();
        let mut nodes = Vec::new();
        for &ModuleMemory { kind, range } in parts {
            let number = self
                .btf
                .enum_value("mod_mem_type", kind)
                .filter(|n| (0..KINDS_MAX).contains(n))
                .and_then(|n| usize::try_from(n).ok())
                .ok_or_else(|| {
                    Error::not_applicable(format!("the guest has no {kind} in enum mod_mem_type"))
                })?;
            let at = mem + number * stride;
            self.put(at + base, &range.start.0.to_le_bytes())?;
            self.put(at + size, &half(range.len())?)?;
            self.put(at + owner, &module)?;
            nodes.push(TreeNode {
                at: self.at.plus((at + node) as u64),
                key: range.start,
            });
        }
        Ok(nodes)
    }
}

fn half(size: u64) -> Result<[u8; 4]> {
    u32::try_from(size)
        .map(u32::to_le_bytes)
        .map_err(|_| Error::not_applicable(format!("a payload of {size} bytes")))
}
