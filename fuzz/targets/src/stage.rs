//! A guest that is built once for each thread, for many inputs.

use locus_guest::addr::{Frame, Gva, PAGE_LEN};
use locus_guest::budget::{Budget, LIMIT};
use locus_guest::mock::MockMemory;
use locus_kernel::fixture::{renewed, vcpus, Fixture, KIND};
use locus_kernel::Kernel;

/// What one look may cost here: ten times what the guests take that do not lie.
const BUDGET: u64 = LIMIT / 256;

/// A guest, some of whose pages are an input.
pub struct Stage {
    /// Its memory.
    pub memory: &'static MockMemory,
    kernel: Kernel<'static>,
    pages: Vec<Frame>,
}

impl Stage {
    /// The guest `fixture` with `pages` pages at `at` for the input. It stays for good.
    pub fn new(fixture: Fixture, at: Gva, pages: usize) -> Stage {
        let memory: &MockMemory = Box::leak(Box::new(fixture.build()));
        let page = |n: usize| {
            let frame = memory.frame();
            memory.map_page(at.plus((n * PAGE_LEN) as u64), frame, true, false);
            frame
        };
        let pages = (0..pages).map(page).collect();
        let kernel = Kernel::read(memory, KIND, &vcpus()).unwrap();
        kernel.btf().unwrap();
        Stage {
            memory,
            kernel,
            pages,
        }
    }

    /// The kernel with the beginning of `data` in those pages and the rest of it as its types; with
    /// its own types if there is no rest. `None` when the rest is not well-formed.
    pub fn kernel(&self, data: &[u8]) -> Option<Kernel<'static>> {
        let mut rest = data;
        for &frame in &self.pages {
            let (bytes, behind) = rest.split_at(rest.len().min(PAGE_LEN));
            let mut page = [0; PAGE_LEN];
            page[..bytes.len()].copy_from_slice(bytes);
            self.memory.fill(frame, 0, &page);
            rest = behind;
        }
        renewed(&self.kernel, rest, Budget::of(BUDGET)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{guest, look};

    #[test]
    fn guests_that_do_not_lie_stay_within_the_budget() {
        let kernel = guest::stage().kernel(&guest::variables()).unwrap();
        look::all(&kernel);
        let spent = kernel.space.budget().spent();
        assert!((1..BUDGET / 10).contains(&spent), "{spent}");
    }
}
