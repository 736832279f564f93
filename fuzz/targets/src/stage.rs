//! A guest that each thread builds once and uses for many inputs.

use locus_guest::addr::{Frame, Gva, PAGE_LEN};
use locus_guest::budget::{Budget, LIMIT};
use locus_guest::mock::MockMemory;
use locus_kernel::fixture::{renewed, vcpus, Fixture, KIND};
use locus_kernel::Kernel;

/// Units of the budget for one input: ten times what the honest guests take.
const BUDGET: u64 = LIMIT / 256;

/// A guest in which some pages are the input.
pub struct Stage {
    /// Memory of the guest.
    pub memory: &'static MockMemory,
    kernel: Kernel<'static>,
    pages: Vec<Frame>,
}

impl Stage {
    /// The guest `fixture`, with `pages` pages at `at` for the input. It is never freed.
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

    /// The kernel with the beginning of `data` in those pages, and the rest of `data` as its types. Without a
    /// rest it has its own types. `None` if the rest is not well-formed.
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
