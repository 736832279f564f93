//! Names of frames in the form that the kernel prints (`%pB`, kernel/kallsyms.c: `sprint_backtrace`):
//! `function+0x12/0x80 [module]`.

use std::cell::OnceCell;

use locus_guest::addr::{Gva, Range};

use super::StackFrame;
use crate::modules::{Module, ModuleReader, ModuleSymbol};
use crate::{Error, Kernel};

/// Names the code of a kernel and its modules, as they were loaded when it was made.
#[derive(Debug)]
pub struct FrameNames<'k, 'm> {
    kernel: &'k Kernel<'m>,
    image: Range,
    reader: ModuleReader<'k, 'm>,
    modules: Vec<ModuleNames>,
}

#[derive(Debug)]
struct ModuleNames {
    module: Module,
    /// Where its code may be.
    text: Vec<Range>,
    /// Sorted by address; read at first use.
    symbols: OnceCell<Vec<ModuleSymbol>>,
}

impl<'k, 'm> FrameNames<'k, 'm> {
    /// Lists the modules of `kernel`. Their symbols are read at first use.
    ///
    /// # Errors
    /// [`Error::Missing`] if the kernel has no types; otherwise as [`ModuleReader::all`].
    pub fn read(kernel: &'k Kernel<'m>) -> Result<FrameNames<'k, 'm>, Error> {
        let mut reader = ModuleReader::new(kernel)?;
        let btf = kernel.btf()?;
        let sizes = [("core", "core_layout"), ("init", "init_layout")].map(|(kind, member)| {
            let size = btf.offset_of_sized("module", &format!("{member}.text_size"), 4);
            (kind, size.ok())
        });
        let modules = reader.each(|_, module| {
            let text = module.parts.iter().map(|part| {
                // Where code and data are one part, code comes first.
                let size = sizes.iter().find(|(kind, _)| *kind == part.kind);
                let len = match size.and_then(|(_, offset)| *offset) {
                    Some(offset) => kernel
                        .space
                        .read_u32(module.addr.plus(offset as u64))?
                        .into(),
                    None => part.range.len(),
                };
                Ok(Range::new(part.range.start, len))
            });
            Ok(ModuleNames {
                text: text.collect::<Result<_, Error>>()?,
                module: module.clone(),
                symbols: OnceCell::new(),
            })
        })?;
        let end = kernel
            .symbols
            .addr("_end")
            .or(kernel.symbols.addr("_etext"));
        Ok(FrameNames {
            kernel,
            image: Range {
                start: kernel.text_base,
                // Without either symbol, all above the text counts as the image.
                end: end.unwrap_or(Gva(u64::MAX)),
            },
            reader,
            modules,
        })
    }

    /// The function that `frame` is in, with offset and size in hexadecimal. For a return address
    /// it is the function of the `call` before it. The bare address if no symbol covers it, or the
    /// symbols of its module can't be read.
    #[must_use]
    pub fn of(&self, frame: StackFrame) -> String {
        let back = u64::from(!frame.interrupted);
        let at = Gva(frame.address.0.wrapping_sub(back));
        self.covering(at).map_or_else(
            || format!("{:#x}", frame.address.0),
            |(name, start, size, module)| {
                let offset = frame.address.0.wrapping_sub(start.0);
                let module = module.map(|name| format!(" [{name}]")).unwrap_or_default();
                format!("{name}+{offset:#x}/{size:#x}{module}")
            },
        )
    }

    fn covering(&self, at: Gva) -> Option<(String, Gva, u64, Option<&str>)> {
        if self.image.contains(at) {
            let (name, offset) = self.kernel.symbols.covering(at)?;
            let start = Gva(at.0 - offset);
            return Some((name, start, self.kernel.symbols.room(start)?, None));
        }
        let holds = |loaded: &&ModuleNames| loaded.text.iter().any(|range| range.contains(at));
        let loaded = self.modules.iter().find(holds)?;
        let text = loaded.text.iter().find(|range| range.contains(at))?;
        let symbols = loaded.symbols.get_or_init(|| {
            // A module that is gone, or is damaged, has no names.
            let mut all = self.reader.symbols(&loaded.module).unwrap_or_default();
            // The sort is stable: of several at one address, the first is shown.
            all.sort_by_key(|symbol| symbol.addr);
            all
        });
        let behind = symbols.partition_point(|symbol| symbol.addr <= at);
        let last = symbols.get(behind.checked_sub(1)?)?.addr;
        let first = symbols.partition_point(|symbol| symbol.addr < last);
        let symbol = symbols.get(first).filter(|s| s.addr >= text.start)?;
        let next = symbols
            .get(behind)
            .map_or(text.end, |s| s.addr.min(text.end));
        Some((
            symbol.name.clone(),
            symbol.addr,
            next.0 - symbol.addr.0,
            Some(&loaded.module.name),
        ))
    }
}
