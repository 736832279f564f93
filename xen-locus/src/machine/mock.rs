//! The mock guest for tests of the rooms above: a small kernel with three functions that can be replaced. Its memory takes a
//! number of writes, and then the tool is ended.

#![allow(clippy::cast_possible_truncation)] // small numbers

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use locus_guest::addr::{Frame, Gfn, Gva};
use locus_guest::{self as guest, GuestType, Live, Memory, MemoryMut, PagesMut};
use locus_guest::{Vcpu, Window, WindowMut};
use locus_kernel::fixture::{Fixture, TEXT};
use locus_kernel::fixture_world::{World, STACKS, STACK_LEN};
use locus_kernel::{Kernel, KernelCache, NoCache};
use locus_payload::testelf::{Spec, R_64, VARS};
use locus_payload::Payload;

use super::{Guard, Machine, Paused, Writing};
use crate::error::{Error, Result};
use crate::guard::Spot;
use crate::storage::journal::{Change, Intent};
use crate::storage::mock::Trace;

/// Where the functions stand that are replaced, and their redirects.
pub(crate) const FUNCTIONS: [(&str, u64); 3] = [
    ("a_show", TEXT.0 + 0x1200),
    ("b_show", TEXT.0 + 0x1240),
    ("c_show", TEXT.0 + 0x1280),
];
/// A part of the first of them that stands elsewhere: a call, and back to its main part.
pub(crate) const COLD: (u64, [u8; 10]) = (
    TEXT.0 + 0x12c0,
    [0xe8, 0, 0, 0, 0, 0xe9, 0x40, 0xff, 0xff, 0xff],
);
/// A function's code: the nop of ftrace, `mov $n, %eax`, `ret`.
pub(crate) fn code(n: u8) -> [u8; 11] {
    [0x0f, 0x1f, 0x44, 0, 0, 0xb8, n, 0, 0, 0, 0xc3]
}

/// Where the kernel sees all memory.
const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;
/// Where it sees the RAM of its memory map.
pub(crate) const RAM: Gva = Gva(DIRECT_MAP + (1 << 20));
/// Its length, in bytes.
pub(crate) const RAM_LEN: u64 = 3 << 12;

/// Number of the first function in [`FUNCTIONS`], of the second, and of the third.
pub(crate) const A: usize = 0;
pub(crate) const B: usize = 1;
pub(crate) const C: usize = 2;

/// The guest.
pub(crate) struct Guest {
    pub(crate) world: World,
    /// So many writes are left until the tool is ended.
    pub(crate) left: Rc<Cell<u32>>,
    /// So many writes are passed on to a migration; the next one can't be, once.
    pub(crate) passed_on: Cell<u32>,
    /// What the journal says.
    pub(crate) intent: RefCell<Option<Intent>>,
    /// There is a journal that can't be believed.
    pub(crate) has_damaged_journal: Cell<bool>,
    /// The journal stays until [`Guest::close`], as that of a domain does.
    pub(crate) keeps_journal: Cell<bool>,
    /// It is known how the run ended.
    pub(crate) ended: Cell<bool>,
    /// Another domain has its UUID.
    pub(crate) shares_uuid: Cell<bool>,
    /// What an interrupted run left can't be recovered yet.
    pub(crate) is_busy: Cell<bool>,
    /// Its status may not be true.
    pub(crate) is_unpublished: Cell<bool>,
    /// Its kernel is none that can be read.
    pub(crate) is_strange: Cell<bool>,
    /// Some of its memory is populated on demand.
    pub(crate) on_demand: Cell<bool>,
    /// Pages of memory that it may be given yet.
    pub(crate) spare: Cell<u64>,
    /// Whether it may be written in a pause.
    pub(crate) writing: Cell<Writing>,
    /// Xen logs only the pages that it makes dirty itself.
    pub(crate) log_dirty: Cell<bool>,
    /// Its host is none on which guests can be changed.
    pub(crate) has_strange_host: Cell<bool>,
    /// What happens in the guest right before it is paused, the first time, the second time, and so on.
    pub(crate) meanwhile: RefCell<VecDeque<Meanwhile>>,
    /// Calls: `begin`.
    pub(crate) trace: Trace,
    /// What a pause says of the time since it was asked for.
    pub(crate) pause_takes: Cell<Duration>,
    /// Windows to write that exist.
    pub(crate) writable: Rc<Cell<u32>>,
    /// How many there were each time the guardian was told to let go.
    pub(crate) kept: RefCell<Vec<u32>>,
    /// In so many attempts the guest is what it was.
    pub(crate) attempts_left: Cell<u32>,
}

type Meanwhile = Box<dyn FnOnce(&Guest)>;

impl Guest {
    pub(crate) fn new() -> Guest {
        Guest::with(|_| ())
    }

    /// The same with `more` in its kernel.
    pub(crate) fn with(more: impl FnOnce(&mut Fixture)) -> Guest {
        const E820: Gva = Gva(TEXT.0 + (12 << 20));
        let world = World::with(GuestType::Pvh, |fixture: &mut Fixture| {
            for (n, (name, at)) in FUNCTIONS.into_iter().enumerate() {
                fixture.function(at, name, &code(n as u8));
            }
            fixture.function(COLD.0, "a_show.cold", &COLD.1);
            let variables = [
                (0, "e820_table"),
                (0x100, "page_offset_base"),
                (0x108, "max_pfn"),
            ];
            for (offset, name) in variables {
                let at = E820.0 + offset;
                fixture.symbols.push((at, 'D', name.to_owned()));
            }
            more(fixture);
        });
        // A pointer to a map with some pages of RAM, which the kernel sees at `RAM`.
        let mut words = (E820.0 + 8).to_le_bytes().to_vec();
        words.extend(1u32.to_le_bytes());
        words.extend([RAM.0 - DIRECT_MAP, RAM_LEN].map(u64::to_le_bytes).concat());
        words.extend(1u32.to_le_bytes());
        words.resize(0x100, 0);
        words.extend(DIRECT_MAP.to_le_bytes());
        words.extend(((RAM.0 + RAM_LEN - DIRECT_MAP) >> 12).to_le_bytes());
        world.memory.map_bytes(E820, &words, true, false);
        let ram = vec![0; RAM_LEN as usize];
        world.memory.map_bytes(RAM, &ram, true, false);
        Guest {
            world,
            left: Rc::new(Cell::new(u32::MAX)),
            passed_on: Cell::new(u32::MAX),
            intent: RefCell::default(),
            has_damaged_journal: Cell::new(false),
            keeps_journal: Cell::new(false),
            ended: Cell::new(false),
            shares_uuid: Cell::new(false),
            is_busy: Cell::new(false),
            is_unpublished: Cell::new(false),
            is_strange: Cell::new(false),
            on_demand: Cell::new(false),
            spare: Cell::new(240),
            writing: Cell::new(Writing::Begins),
            log_dirty: Cell::new(false),
            has_strange_host: Cell::new(false),
            meanwhile: RefCell::default(),
            trace: Trace::default(),
            pause_takes: Cell::default(),
            writable: Rc::default(),
            kept: RefCell::default(),
            attempts_left: Cell::new(u32::MAX),
        }
    }

    /// Does this before the next pause for which nothing is to be done yet.
    pub(crate) fn meanwhile(&self, what: impl FnOnce(&Guest) + 'static) {
        self.meanwhile.borrow_mut().push_back(Box::new(what));
    }

    /// Address of a variable of its kernel.
    pub(crate) fn variable(&self, name: &str) -> u64 {
        self.kernel().symbols.need(name).unwrap().0
    }

    /// Registers kprobe number `n`, which is below eight, at `at`. It is disabled: no byte there changes.
    pub(crate) fn add_kprobe(&self, n: u64, at: u64) {
        let list = self.variable("kprobe_table") + 8 * n;
        let probe = self.variable("some_kprobes") + 64 * n;
        let first: [u8; 8] = self.peek(list);
        self.poke(probe, &first);
        self.poke(probe + 40, &at.to_le_bytes());
        self.poke(list, &probe.to_le_bytes());
    }

    /// Removes kprobe number `n`, the last one that was added to its list.
    pub(crate) fn remove_kprobe(&self, n: u64) {
        let list = self.variable("kprobe_table") + 8 * n;
        let next: [u8; 8] = self.peek(self.variable("some_kprobes") + 64 * n);
        self.poke(list, &next);
    }

    /// Removes the journal if it is known how the run ended.
    pub(crate) fn close(&self) {
        if self.ended.take() {
            *self.intent.borrow_mut() = None;
        }
    }

    pub(crate) fn kernel(&self) -> Kernel<'_> {
        let world = &self.world;
        Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap()
    }

    pub(crate) fn poke(&self, at: u64, bytes: &[u8]) {
        let at = Gva(at);
        let kernel = self.kernel();
        let frames = kernel.space.frames(at, bytes.len() as u64).unwrap();
        let window = self.map_mut(&frames).unwrap();
        window.write(at.offset(), bytes).unwrap();
    }

    pub(crate) fn peek<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.kernel().space.read(Gva(at), &mut bytes).unwrap();
        bytes
    }

    /// Lets the sleeping task hold the return address `word`.
    pub(crate) fn sleep_at(&self, word: u64) {
        self.poke(
            STACKS.0 + 3 * 4 * STACK_LEN as u64 + 0x1e80,
            &word.to_le_bytes(),
        );
    }
}

/// A payload called `name` that replaces `functions`.
pub(crate) fn payload(name: &str, functions: &[usize]) -> Payload {
    parsed(name, &spec(functions).bytes())
}

/// A payload with a pointer to `symbol` of another one.
pub(crate) fn using(name: &str, functions: &[usize], symbol: &str) -> Payload {
    let (mut elf, _) = spec(functions).elf();
    let home = elf.find(".data", VARS);
    let at = elf.append(home, 8, 8);
    let symbol = elf.undefined(symbol);
    elf.reloc(home, at, R_64, symbol, 0);
    parsed(name, &elf.build())
}

fn spec(functions: &[usize]) -> Spec {
    let functions = functions.iter().map(|&n| (FUNCTIONS[n].0, 0));
    Spec {
        objects: vec![(None, functions.collect())],
        ..Spec::default()
    }
}

fn parsed(name: &str, file: &[u8]) -> Payload {
    let mut payload = Payload::parse(name, file).unwrap();
    payload.name = name.into();
    payload.sha256 = [name.as_bytes()[0]; 32];
    payload
}

/// A payload that lets threads go on in what it replaces.
pub(crate) fn entry_only(name: &str, functions: &[usize]) -> Payload {
    let mut payload = payload(name, functions);
    payload.modinfo.entry_only = true;
    payload
}

fn spend(left: &Cell<u32>) -> std::result::Result<(), guest::Error> {
    match left.get().checked_sub(1) {
        Some(rest) => {
            left.set(rest);
            Ok(())
        }
        None => Err(guest::Error::Odd("the tool was ended".into())),
    }
}

struct Metered {
    window: Box<dyn WindowMut>,
    left: Rc<Cell<u32>>,
    writable: Rc<Cell<u32>>,
}

impl Drop for Metered {
    fn drop(&mut self) {
        self.writable.set(self.writable.get() - 1);
    }
}

impl Window for Metered {
    fn read(&self, offset: usize, buf: &mut [u8]) -> std::result::Result<(), guest::Error> {
        self.window.read(offset, buf)
    }
}

impl WindowMut for Metered {
    fn write(&self, offset: usize, bytes: &[u8]) -> std::result::Result<(), guest::Error> {
        spend(&self.left)?;
        self.window.write(offset, bytes)
    }
}

impl Memory for Guest {
    fn map(&self, frames: &[Frame]) -> std::result::Result<Box<dyn Window>, guest::Error> {
        self.world.memory.map(frames)
    }
}

impl MemoryMut for Guest {
    fn map_mut(&self, frames: &[Frame]) -> std::result::Result<Box<dyn WindowMut>, guest::Error> {
        let window = self.world.memory.map_mut(frames)?;
        self.writable.set(self.writable.get() + 1);
        Ok(Box::new(Metered {
            window,
            left: Rc::clone(&self.left),
            writable: Rc::clone(&self.writable),
        }))
    }

    fn written(&self, _: &[Frame]) -> std::result::Result<(), guest::Error> {
        match self.passed_on.get().checked_sub(1) {
            Some(rest) => {
                self.passed_on.set(rest);
                Ok(())
            }
            None => {
                self.passed_on.set(u32::MAX);
                Err(guest::Error::Odd("it can't be passed on".into()))
            }
        }
    }
}

struct Unguarded<'g>(&'g Guest);

impl Guard for Unguarded<'_> {
    fn hold(&self) -> std::result::Result<(), guest::Error> {
        match self.0.attempts_left.get().checked_sub(1) {
            Some(left) => self.0.attempts_left.set(left),
            None => return Err(guest::Error::Unsupported("it shares 7 pages".into())),
        }
        Ok(())
    }

    fn let_go(&self) {
        self.0.kept.borrow_mut().push(self.0.writable.get());
    }

    fn vcpus(&self) -> std::result::Result<Vec<Vcpu>, guest::Error> {
        Ok(self.0.world.vcpus.clone())
    }

    fn pause(&self) -> std::result::Result<Box<dyn Paused + '_>, guest::Error> {
        let next = self.0.meanwhile.borrow_mut().pop_front();
        if let Some(next) = next {
            next(self.0);
        }
        Ok(Box::new(Pause(self.0, Instant::now())))
    }
}

struct Pause<'g>(&'g Guest, Instant);

impl Paused for Pause<'_> {
    fn vcpus(&self) -> std::result::Result<Vec<Vcpu>, guest::Error> {
        Ok(self.0.world.vcpus.clone())
    }

    fn writing(&self) -> std::result::Result<Writing, guest::Error> {
        Ok(self.0.writing.get())
    }

    fn elapsed(&self) -> Duration {
        self.0.pause_takes.get()
    }

    fn end(self: Box<Self>) -> std::result::Result<Duration, guest::Error> {
        Ok(self.1.elapsed())
    }
}

impl Live for Guest {
    fn memory(&self) -> &dyn Memory {
        &self.world.memory
    }

    fn kind(&self) -> GuestType {
        self.world.kind
    }

    fn vcpus(&self) -> std::result::Result<Vec<Vcpu>, guest::Error> {
        Ok(self.world.vcpus.clone())
    }
}

impl Machine for Guest {
    fn cache(&self) -> &dyn KernelCache {
        &NoCache
    }

    fn check_changes(&self) -> Result<()> {
        match self.has_strange_host.get() {
            true => Err(Error::not_applicable("a Xen that is not known")),
            false => Ok(()),
        }
    }

    fn begin(&self, change: &Change) -> Result<()> {
        self.trace.call("begin")?;
        self.ended.set(false);
        *self.intent.borrow_mut() = Some(Intent {
            uuid: String::new(),
            domid: 1,
            started_at: 0,
            pid: 0,
            change: change.clone(),
            is_done: false,
        });
        Ok(())
    }

    fn ended(&self) {
        self.ended.set(true);
        if !self.keeps_journal.get() {
            self.close();
        }
    }

    fn is_log_dirty(&self) -> Result<bool> {
        Ok(self.log_dirty.get())
    }

    fn guard(&self, _: &[Spot]) -> Result<Box<dyn Guard + '_>> {
        Ok(Box::new(Unguarded(self)))
    }
}

impl PagesMut for Guest {
    fn write_entry(
        &self,
        table: Frame,
        slot: usize,
        entry: u64,
    ) -> std::result::Result<(), guest::Error> {
        spend(&self.left)?;
        self.world.memory.set_entry(table, slot, entry);
        Ok(())
    }

    fn pages(&self) -> std::result::Result<u64, guest::Error> {
        Ok(1 << 16)
    }

    fn has_pages_on_demand(&self) -> std::result::Result<bool, guest::Error> {
        Ok(self.on_demand.get())
    }

    fn spare(&self) -> std::result::Result<u64, guest::Error> {
        Ok(self.spare.get())
    }

    fn vacant(&self, frames: &[Gfn]) -> std::result::Result<Vec<bool>, guest::Error> {
        let memory = &self.world.memory;
        Ok(frames.iter().map(|&f| !memory.has(f.into())).collect())
    }

    fn not_own(&self, frames: &[Frame]) -> std::result::Result<Vec<bool>, guest::Error> {
        let memory = &self.world.memory;
        Ok(frames.iter().map(|&f| !memory.has(f)).collect())
    }

    fn populate(&self, frames: &[Gfn]) -> std::result::Result<(), guest::Error> {
        let left = self.spare.get().checked_sub(frames.len() as u64);
        self.spare.set(left.expect("more than it may be given"));
        frames.iter().for_each(|&f| self.world.memory.add(f.into()));
        Ok(())
    }
}
