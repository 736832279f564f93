//! The mock guest, whose memory takes so many writes until the tool is ended.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use locus_guest::{self as guest, Live, PagesMut, Vcpu, Window, WindowMut};
use locus_kernel::{KernelCache, NoCache};

use super::*;
use crate::machine::{Guard, Machine, Paused};

/// The guest.
pub(super) struct Guest {
    pub(super) world: World,
    pub(super) left: Rc<Cell<u32>>,
    pub(super) intent: RefCell<Option<Intent>>,
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
        Ok(Box::new(Metered {
            window: self.world.memory.map_mut(frames)?,
            left: Rc::clone(&self.left),
        }))
    }
}

struct Unguarded<'g>(&'g World);

impl Guard for Unguarded<'_> {
    fn vcpus(&self) -> std::result::Result<Vec<Vcpu>, guest::Error> {
        Ok(self.0.vcpus.clone())
    }

    fn pause(&self) -> std::result::Result<Box<dyn Paused + '_>, guest::Error> {
        Ok(Box::new(Pause(self.0, Instant::now())))
    }
}

struct Pause<'g>(&'g World, Instant);

impl Paused for Pause<'_> {
    fn vcpus(&self) -> std::result::Result<Vec<Vcpu>, guest::Error> {
        Ok(self.0.vcpus.clone())
    }

    fn writing(&self) -> std::result::Result<bool, guest::Error> {
        Ok(true)
    }

    fn elapsed(&self) -> Duration {
        Duration::ZERO
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

    fn begin(&self, change: &Change) -> Result<()> {
        *self.intent.borrow_mut() = Some(Intent {
            uuid: String::new(),
            domid: 1,
            started_at: 0,
            pid: 0,
            change: change.clone(),
        });
        Ok(())
    }

    fn ended(&self) {
        *self.intent.borrow_mut() = None;
    }

    fn guard(&self, _: &[Spot]) -> Result<Box<dyn Guard + '_>> {
        Ok(Box::new(Unguarded(&self.world)))
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

    fn vacant(&self, frames: &[Gfn]) -> std::result::Result<Vec<bool>, guest::Error> {
        let memory = &self.world.memory;
        Ok(frames.iter().map(|&f| !memory.has(f.into())).collect())
    }

    fn populate(&self, frames: &[Gfn]) -> std::result::Result<(), guest::Error> {
        frames.iter().for_each(|&f| self.world.memory.add(f.into()));
        Ok(())
    }
}
