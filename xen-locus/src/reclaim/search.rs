//! Looks through a guest's memory for words that lead into payloads.
//!
//! All memory is read that the kernel has in its mapping of all memory (`page_offset_base`), hot-added memory too, and the
//! pages of other payloads. A word that leads into one of them is a hit, even if it is gone a moment later, except where it is known to
//! mean nothing:
//!
//! - on a kernel stack, below what is live of it ([`Stacks`]). Stacks of threads that ended wait there for the next one;
//! - in a page that the kernel's allocator has as free;
//! - in the code of the kernel and of its modules: bytes of instructions may look like any number;
//! - in memory of processes and of files, which the kernel never follows ([`Pages::is_ignored`]): any number may be there;
//! - in the bounds of all addresses of modules, which are numbers;
//! - in the lists by which the guest knows the payload as a module, while it is to be taken out of them;
//! - in the tables of a payload that is out of the guest's lists already.

use std::collections::HashSet;

use locus_guest::addr::{Frame, Gva, Range, PAGE_LEN, PAGE_SIZE};
use locus_guest::budget::Budget;
use locus_guest::space::{if_mapped, Space};
use locus_guest::{self as guest, fetch};
use locus_kernel::Kernel;

use super::code_frames::{code_frames, IMAGE};
use super::page_types::Pages;
use super::stacks::Stacks;
use super::{check_interrupted, pages_of};
use crate::apply::Options;
use crate::arena::record::MODULE;
use crate::arena::{self, Arena, Resident};
use crate::error::{Error, Result};
use crate::link::module::lists::{self, Known, Users};
use crate::machine::Machine;
use crate::write::Write;

/// Pages that are mapped at once.
const AT_ONCE: usize = 256;
/// Pages that an honest guest has at most beside what Xen says: the search ends there.
const MORE_PAGES: u64 = 1 << 16;
/// How functions are aligned at least where the compiler aligns them (`CONFIG_FUNCTION_ALIGNMENT`).
const FUNCTION_ALIGN: u64 = 16;
/// First byte of a call to a distance, of five bytes.
const CALL: u8 = 0xe8;
/// Page frames of a block. In which order they are mapped is worked out for one block at a time.
const BLOCK: u64 = 1 << 18;
/// Most page frames that a guest can count: physical addresses have 52 bits.
const PFN_MAX: u64 = 1 << 40;

/// In which order memory is looked through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// Stacks, memory from its start, payloads.
    Up,
    /// The other way round.
    Down,
}

/// A search for words that lead into payloads.
pub(super) struct Search<'a, 'm> {
    machine: &'a dyn Machine,
    kernel: &'a Kernel<'m>,
    options: &'a Options,
    arena: &'a Arena,
    payloads: Vec<SearchedPayload>,
    /// From the first of them to the last.
    all: Range,
    /// Start of the kernel's mapping of all memory.
    direct_map: Gva,
    /// Words that are numbers.
    numbers: [Gva; 2],
    /// Where the words are by which the guest knows the payloads as modules.
    list_words: HashSet<(Frame, u64)>,
    /// The same in the pages of payloads.
    list_words_in_arena: HashSet<Gva>,
    /// Tables of payloads that are out of the guest's lists: their words lead where they led.
    stale: Vec<Range>,
}

/// A payload that is searched for.
pub(super) struct SearchedPayload {
    /// All of its pages.
    own: Range,
    /// Its code.
    code: Range,
    /// Where the words are by which the guest knows it as a module.
    list_words: Vec<Gva>,
}

impl SearchedPayload {
    /// # Errors
    /// The guest's lists are not as they must be, or it is at work on them.
    pub(super) fn new(kernel: &Kernel<'_>, resident: &Resident) -> Result<SearchedPayload> {
        let own = pages_of(resident);
        let module = resident.record.module;
        let mut list_words = Vec::new();
        if lists::known(kernel, module)? == Known::Listed {
            let leads = |w: &&Write| {
                w.changes() && fetch::u64(&w.expect, 0).is_some_and(|word| own.contains(Gva(word)))
            };
            let removal = lists::remove(kernel, module, own, Users::Go)?;
            list_words.extend(removal.writes.iter().filter(leads).map(|w| w.at));
        }
        Ok(SearchedPayload {
            own,
            code: Range::new(own.start, resident.record.text.1.min(own.len())),
            list_words,
        })
    }
}

/// What leads into the payloads: for each, in their order, the first word that was found, in words.
pub(super) type FirstHits = Vec<Option<String>>;

impl<'a, 'm> Search<'a, 'm> {
    /// # Errors
    /// The kernel lacks a symbol that the search needs, or its lists can't be read.
    pub(super) fn new(
        machine: &'a dyn Machine,
        kernel: &'a Kernel<'m>,
        options: &'a Options,
        arena: &'a Arena,
        payloads: Vec<SearchedPayload>,
    ) -> Result<Search<'a, 'm>> {
        let base = kernel.variable("page_offset_base", 8)?;
        let space = kernel.space.fresh();
        let (mut list_words, mut list_words_in_arena) = (HashSet::new(), HashSet::new());
        for &at in payloads.iter().flat_map(|payload| &payload.list_words) {
            match arena::addresses().contains(at) {
                true => drop(list_words_in_arena.insert(at)),
                false => {
                    let frame = space.walk(at)?.frame;
                    list_words.insert((frame, at.offset() as u64));
                }
            }
        }
        Ok(Search {
            machine,
            kernel,
            options,
            arena,
            all: Range {
                start: payloads.iter().map(|t| t.own.start).min().unwrap_or(Gva(0)),
                end: payloads.iter().map(|t| t.own.end).max().unwrap_or(Gva(0)),
            },
            payloads,
            direct_map: Gva(space.read_u64(base)?),
            numbers: lists::address_bounds(kernel)?,
            list_words,
            list_words_in_arena,
            stale: stale(kernel, arena)?,
        })
    }

    /// Looks through all memory once. Returns what it finds.
    ///
    /// # Errors
    /// Memory can't be read, the guest has more of it than it can have, or the run was interrupted.
    pub(super) fn run(&self, direction: Direction) -> Result<FirstHits> {
        let mut found = vec![None; self.payloads.len()];
        let stacks = Stacks::find(self.machine, self.kernel)?;
        match direction {
            Direction::Up => {
                self.stacks(&stacks, &mut found)?;
                self.memory(direction, &stacks.frames, &mut found)?;
                self.payloads(&mut found)?;
            }
            Direction::Down => {
                self.payloads(&mut found)?;
                self.memory(direction, &stacks.frames, &mut found)?;
                // Where the live part of each is now.
                self.stacks(&Stacks::find(self.machine, self.kernel)?, &mut found)?;
            }
        }
        Ok(found)
    }

    /// Looks through all memory that the kernel has, but for the frames of stacks, of code and of the arena.
    fn memory(
        &self,
        direction: Direction,
        stacks: &HashSet<Frame>,
        found: &mut FirstHits,
    ) -> Result<()> {
        let most = self.machine.pages()?.saturating_add(MORE_PAGES);
        // What is not mapped is asked for too: memory that the guest gave back, and holes.
        let budget = Budget::of(most.saturating_mul(64));
        let space = self.kernel.space.fresh();
        space.budget().refill()?;
        let end = space.read_u64(self.kernel.variable("max_pfn", 8)?)?;
        if end > PFN_MAX {
            return Err(Error::not_applicable(format!(
                "the guest's max_pfn is {end}; expected at most {PFN_MAX}, which is more than physical addresses have bits for"
            )));
        }
        let pages = Pages::of(self.kernel, &space)?;
        let mut passed_over = stacks.clone();
        passed_over.extend(self.arena.own_frames());
        passed_over.extend(code_frames(self.kernel, &space)?);
        let mut seen = 0;
        let blocks = end.div_ceil(BLOCK);
        for nth in 0..blocks {
            let nth = match direction {
                Direction::Up => nth,
                Direction::Down => blocks - 1 - nth,
            };
            let start = nth * BLOCK;
            let mut wanted = self.mapped((start, end.min(start + BLOCK)), &budget)?;
            wanted.retain(|(_, frame)| !passed_over.contains(frame));
            if direction == Direction::Down {
                wanted.reverse();
            }
            for some in wanted.chunks(AT_ONCE) {
                check_interrupted(self.options)?;
                seen += self.pages(some, &pages, found)?;
                if seen > most {
                    return Err(Error::not_applicable(format!(
                        "the kernel's mapping of all memory leads to more pages than the {most} that the guest can have"
                    )));
                }
            }
        }
        Ok(())
    }

    /// The page frames of a block that are mapped, and the frames that they are in.
    fn mapped(&self, (start, end): (u64, u64), budget: &Budget) -> Result<Vec<(u64, Frame)>> {
        // A space keeps the page tables that it walked.
        let space = self.kernel.space.fresh_within(budget.clone());
        let mut mapped = Vec::new();
        let mut at = start;
        while at < end {
            let leaf = match space.walk(self.seen_at(at)) {
                Ok(leaf) => leaf,
                Err(guest::Error::NotMapped { .. }) => {
                    at += 1;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let pages = leaf.size / PAGE_SIZE;
            let inside = self.seen_at(at).0 / PAGE_SIZE % pages.max(1);
            let count = pages.saturating_sub(inside).clamp(1, end - at);
            budget.spend(count)?;
            mapped.extend((0..count).map(|n| (at + n, Frame(leaf.frame.0 + n))));
            at += count;
        }
        Ok(mapped)
    }

    /// The payload that `word` leads into.
    fn payload(&self, word: u64) -> Option<usize> {
        let leads = |t: &SearchedPayload| t.own.contains(Gva(word));
        match self.all.contains(Gva(word)) {
            true => self.payloads.iter().position(leads),
            false => None,
        }
    }

    /// The words in `bytes` that lead into payloads of which nothing is found yet: offset, and number of the payload.
    fn hits(&self, bytes: &[u8], found: &FirstHits) -> Vec<(u64, usize)> {
        let mut hits = Vec::new();
        for (word, offset) in bytes.chunks_exact(8).zip((0..).step_by(8)) {
            let payload = fetch::u64(word, 0).and_then(|word| self.payload(word));
            if let Some(payload) = payload.filter(|&t| matches!(found.get(t), Some(None))) {
                hits.push((offset, payload));
            }
        }
        hits
    }

    /// Where the kernel sees page frame `pfn`.
    fn seen_at(&self, pfn: u64) -> Gva {
        Gva(self.direct_map.0.wrapping_add(pfn.wrapping_mul(PAGE_SIZE)))
    }

    /// Looks through these page frames. Returns how many of them have memory.
    fn pages(&self, some: &[(u64, Frame)], pages: &Pages, found: &mut FirstHits) -> Result<u64> {
        let mut wanted = some.to_vec();
        let frames = |some: &[(u64, Frame)]| some.iter().map(|(_, f)| *f).collect::<Vec<_>>();
        let window = match self.machine.memory().map(&frames(&wanted)) {
            Ok(window) => window,
            // A balloon took some of them. Or they are another domain's, in which this
            // kernel keeps no pointers.
            Err(_) => {
                let mut not_own = self.machine.not_own(&frames(&wanted))?.into_iter();
                wanted.retain(|_| !not_own.next().unwrap_or(true));
                if wanted.is_empty() {
                    return Ok(0);
                }
                self.machine.memory().map(&frames(&wanted))?
            }
        };
        let mut bytes = vec![0; wanted.len() * PAGE_LEN];
        window.read(0, &mut bytes)?;
        let space = self.kernel.space.fresh();
        for (page, (pfn, frame)) in bytes.chunks_exact(PAGE_LEN).zip(&wanted) {
            let mut hits = self.hits(page, found);
            hits.retain(|(offset, _)| !self.list_words.contains(&(*frame, *offset)));
            if hits.is_empty() || pages.is_ignored(&space, *pfn) {
                continue;
            }
            for (offset, payload) in hits {
                if let Some(by) = self.named(*pfn, offset) {
                    let slab = pages.slab(&space, *pfn);
                    let of = slab.map(|name| format!(", of the slab cache {name},"));
                    note(found, payload, by + of.as_deref().unwrap_or_default());
                }
            }
        }
        Ok(wanted.len() as u64)
    }

    /// What the word at `offset` of page frame `pfn` is; `None` if it is a number.
    fn named(&self, pfn: u64, offset: u64) -> Option<String> {
        let physical = pfn.wrapping_mul(PAGE_SIZE).wrapping_add(offset);
        let image = self.in_image(physical);
        if image.is_some_and(|at| self.numbers.contains(&at)) {
            return None;
        }
        let symbol = image.and_then(|at| self.kernel.symbols.covering(at));
        Some(match symbol {
            Some((name, offset)) => format!("the kernel's variable {name}+{offset:#x}"),
            None => format!("the word at {}", self.direct_map.plus(physical)),
        })
    }

    /// The address of what is at `physical` in the kernel's image, if it is there.
    fn in_image(&self, physical: u64) -> Option<Gva> {
        let symbol = |name| self.kernel.symbols.addr(name);
        let base = self
            .kernel
            .space
            .fresh()
            .read_u64(self.kernel.variable("phys_base", 8).ok()?)
            .ok()?;
        let at = Gva(IMAGE.checked_add(physical.wrapping_sub(base))?);
        // What is only for the start is other memory by then.
        let is_freed = symbol("__init_begin").zip(symbol("__init_end"));
        let is_freed = is_freed.is_some_and(|(start, end)| start <= at && at < end);
        (symbol("_text")? <= at && at < symbol("_end")? && !is_freed).then_some(at)
    }

    /// Looks through the pages of all payloads. A word in one that is searched for itself counts only if that one stays.
    fn payloads(&self, found: &mut FirstHits) -> Result<()> {
        let space = self.kernel.space.fresh();
        space.budget().refill()?;
        let mut slots = Vec::new();
        for slot in &self.arena.directory.slots {
            let start = arena::page_address(slot.first.into());
            let len = usize::from(slot.pages) * PAGE_LEN;
            let stale = self
                .stale
                .iter()
                .find(|r| pages_from(start, len).contains(r.start));
            let end = stale.map_or(len, |r| usize::try_from(r.start.0 - start.0).unwrap_or(len));
            let bytes = space.read_vec(start, end.min(len))?;
            slots.push((start, self.payload(start.0), bytes));
        }
        loop {
            let before = found.clone();
            for (start, itself, bytes) in &slots {
                let goes = itself.is_some_and(|t| matches!(found.get(t), Some(None)));
                if goes {
                    continue;
                }
                for (offset, payload) in self.hits(bytes, found) {
                    let at = start.plus(offset);
                    if self.list_words_in_arena.contains(&at) {
                        continue;
                    }
                    note(
                        found,
                        payload,
                        format!("the word at {at}, in another payload,"),
                    );
                }
            }
            if *found == before {
                return Ok(());
            }
        }
    }

    /// Looks through what is live of all stacks. Whose return addresses lead into a payload's code is seen by a whole look,
    /// which knows those that nobody returns to.
    ///
    /// # Errors
    /// One can't be read, or the guest's budget is spent.
    fn stacks(&self, stacks: &Stacks, found: &mut FirstHits) -> Result<()> {
        let space = self.kernel.space.fresh();
        for (live, name) in &stacks.live {
            let len = usize::try_from(live.len()).unwrap_or(0);
            let Some(words) = if_mapped(space.read_vec(live.start, len))? else {
                // Its thread ended meanwhile.
                continue;
            };
            for (offset, payload) in self.hits(&words, found) {
                let at = usize::try_from(offset).unwrap_or(usize::MAX);
                let word = Gva(fetch::u64(&words, at).unwrap_or(0));
                let code = self.payloads.get(payload).map(|t| t.code);
                let in_code = code.is_some_and(|code| code.contains(word));
                if !(in_code && follows_a_call(&space, word)) {
                    note(found, payload, format!("a word on the stack of {name}"));
                }
            }
        }
        // A call that could not be read for want of budget counts as none.
        Ok(space.budget().check()?)
    }
}

/// Whether the instruction before `at` may be a call, so that `at` is a return address, and no function begins there: those
/// are aligned.
fn follows_a_call(space: &Space<'_>, at: Gva) -> bool {
    let before = |n: u64| space.read_vec(Gva(at.0.wrapping_sub(n)), 1).ok();
    !at.0.is_multiple_of(FUNCTION_ALIGN) && before(5) == Some(vec![CALL])
}

/// Notes what leads into payload number `payload`.
fn note(found: &mut FirstHits, payload: usize, by: String) {
    if let Some(place) = found.get_mut(payload) {
        place.get_or_insert(by);
    }
}

fn pages_from(start: Gva, len: usize) -> Range {
    Range::new(start, len as u64)
}

/// The tables of the payloads that are out of the guest's lists, each from its marks to the end of its pages. Nothing
/// follows them any more.
fn stale(kernel: &Kernel<'_>, arena: &Arena) -> Result<Vec<Range>> {
    let mut stale = Vec::new();
    for resident in arena.residents(kernel)? {
        let module = resident.record.module;
        if lists::known(kernel, module)? == Known::Removed {
            stale.push(Range {
                start: Gva(module.0.wrapping_sub(MODULE)),
                end: pages_of(&resident).end,
            });
        }
    }
    Ok(stale)
}
