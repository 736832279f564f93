//! Where nothing is but code of the kernel and of its modules: bytes of instructions may look like any address.

use std::collections::HashSet;

use locus_guest::addr::{Frame, Gva, Range, PAGE_SIZE};
use locus_guest::space::{if_mapped, Space};
use locus_kernel::modules::ModuleReader;
use locus_kernel::Kernel;

use crate::error::Result;

/// Where the kernel's image is mapped (`__START_KERNEL_map`).
pub(super) const IMAGE: u64 = 0xffff_ffff_8000_0000;

/// The frames in which nothing is but code of the kernel and of its modules. All of that is within 2 GiB ([`IMAGE`]), where
/// code can call other code. What a module says to be its code elsewhere is looked through as all other memory.
pub(super) fn code_frames(kernel: &Kernel<'_>, space: &Space<'_>) -> Result<HashSet<Frame>> {
    let kernels = ["_stext", "_etext"].map(|name| kernel.symbols.addr(name));
    let mut ranges = Vec::new();
    if let [Some(start), Some(end)] = kernels {
        ranges.push(Range { start, end });
    }
    for module in ModuleReader::new(kernel)?.all()? {
        // Older kernels keep code, constants and variables in one part.
        let text = module.parts.iter().filter(|p| p.kind == "text");
        ranges.extend(text.map(|p| p.range));
    }
    let mut frames = HashSet::new();
    for pages in whole_pages(ranges) {
        // A module may have gone.
        let found = if_mapped(space.frames(pages.start, pages.len()))?;
        frames.extend(found.unwrap_or_default());
    }
    Ok(frames)
}

/// The pages from [`IMAGE`] on that are wholly in one of `ranges`. Many modules may say that they are at the same place: each
/// page counts once.
fn whole_pages(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_by_key(|range| range.start);
    let mut found = Vec::with_capacity(ranges.len());
    let mut next = IMAGE;
    for range in ranges {
        let start = range.start.0.max(next).checked_next_multiple_of(PAGE_SIZE);
        let end = range.end.0 & !(PAGE_SIZE - 1);
        if let Some(start) = start.filter(|&start| start < end) {
            found.push(Range {
                start: Gva(start),
                end: Gva(end),
            });
            next = end;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_looked_for_where_code_can_be_and_once() {
        const MODULES: u64 = 0xffff_ffff_c000_0000;
        let range = |start: u64, end: u64| Range {
            start: Gva(start),
            end: Gva(end),
        };
        // Of 4 GiB each, as many as there may be.
        let elsewhere = (0..4096).map(|n| 0xffff_c900_0000_0000 + (n << 32));
        let mut all: Vec<Range> = elsewhere.map(|at| range(at, at + (1 << 32))).collect();
        all.extend([range(MODULES + 0x1100, MODULES + 0x5100); 4096]);
        all.push(range(MODULES, MODULES + 0x3000));
        all.push(range(MODULES + 0x8100, MODULES + 0x8f00));
        all.push(range(u64::MAX - 0x10, u64::MAX));
        let wanted = [
            range(MODULES, MODULES + 0x3000),
            range(MODULES + 0x3000, MODULES + 0x5000),
        ];
        assert_eq!(whole_pages(all), wanted);
    }
}
