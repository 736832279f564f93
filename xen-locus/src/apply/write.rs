//! The writes themselves, in the pause: all of them or none, and read back.

use std::collections::HashMap;
use std::rc::Rc;

use locus_guest::addr::Frame;
use locus_guest::space::Trail;
use locus_guest::{MemoryMut, Window, WindowMut};

use crate::error::{Error, Result};
use crate::machine::Writing;
use crate::write::{Write, WRITE_MAX};

/// A write of a plan, and its pages.
pub(super) struct MappedWrite<'p> {
    pub(super) write: &'p Write,
    pub(super) frames: Vec<Frame>,
    /// The pages, while they are mapped ([`map_all`]).
    pub(super) window: Option<Mapped>,
    pub(super) offset: usize,
}

/// Mapped pages. Those of conditions are only read: what is mapped to be written can't become a page table of a PV guest,
/// and the guest frees them as it likes.
pub(super) enum Mapped {
    Read(Rc<dyn Window>),
    Write(Box<dyn WindowMut>),
}

fn not_mapped() -> Error {
    Error::failed("a page to be written is not mapped: this is a defect of xen-locus")
}

impl MappedWrite<'_> {
    fn window(&self) -> Result<&dyn Window> {
        match &self.window {
            Some(Mapped::Read(window)) => Ok(&**window),
            Some(Mapped::Write(window)) => Ok(&**window),
            None => Err(not_mapped()),
        }
    }

    fn holds(&self, bytes: &[u8]) -> Result<bool> {
        let mut found = [0; WRITE_MAX];
        let found = found
            .get_mut(..bytes.len())
            .ok_or_else(|| Error::failed(format!("a write of more than {} bytes", WRITE_MAX)))?;
        self.window()?.read(self.offset, found)?;
        Ok(found == bytes)
    }

    fn put(&self, bytes: &[u8]) -> Result<()> {
        match &self.window {
            Some(Mapped::Write(window)) => Ok(window.write(self.offset, bytes)?),
            _ => Err(not_mapped()),
        }
    }
}

/// Maps the pages of all writes that are not mapped, unless the guest's page tables lead elsewhere by now.
pub(super) fn map_all(
    memory: &(impl MemoryMut + ?Sized),
    writes: &mut [MappedWrite<'_>],
    trail: &Trail,
) -> Result<()> {
    check_trail(trail)?;
    // Conditions about one page are compared through one window.
    let mut read: HashMap<Vec<Frame>, Rc<dyn Window>> = HashMap::new();
    for mapped in writes.iter_mut().filter(|w| w.window.is_none()) {
        mapped.window = Some(if mapped.write.changes() {
            Mapped::Write(memory.map_mut(&mapped.frames)?)
        } else if let Some(window) = read.get(&mapped.frames) {
            Mapped::Read(Rc::clone(window))
        } else {
            let window: Rc<dyn Window> = memory.map(&mapped.frames)?.into();
            read.insert(mapped.frames.clone(), Rc::clone(&window));
            Mapped::Read(window)
        });
    }
    Ok(())
}

/// Unmaps the pages of all writes. Xen lets no page of a PV guest become a page table while it is mapped to be written,
/// and the guest may have freed it meanwhile.
pub(super) fn unmap_all(writes: &mut [MappedWrite<'_>]) {
    writes.iter_mut().for_each(|w| w.window = None);
}

/// Checks that the guest's page tables still lead to the frames that are to be written.
///
/// # Errors
/// [`Cause::Passing`](crate::error::Cause::Passing): they lead elsewhere.
pub(super) fn check_trail(trail: &Trail) -> Result<()> {
    match trail.holds()? {
        true => Ok(()),
        false => Err(Error::passing(
            "the guest's page tables lead elsewhere than when the pages to be written were mapped (the guest \
             unloads a module, or remaps its own code?)",
        )),
    }
}

/// Checks that the guest's memory holds the bytes that are to be replaced and those that conditions are about, and that its
/// page tables still lead there.
///
/// # Errors
/// [`Cause::Passing`](crate::error::Cause::Passing): the plan does not hold any more.
pub(super) fn check_all(writes: &[MappedWrite<'_>], trail: &Trail) -> Result<()> {
    check_trail(trail)?;
    for mapped in writes {
        if !mapped.holds(&mapped.write.expect)? {
            return Err(Error::passing(mapped.write.broken()));
        }
    }
    Ok(())
}

/// The guest is moved as it runs.
pub(super) fn is_log_dirty() -> Error {
    Error::try_again(
        "Xen runs this PV guest on shadows of its page tables: it is probably being moved to another host as it runs, and \
         what is written to it now from outside would be missing there. Nothing was changed; try again when it has arrived \
         (if it is not moved, Xen shadows it against L1TF: see pv-l1tf in Xen's documentation; it can't be changed then)",
    )
}

/// Carries out all writes or none. Calls `begin` after the checks and before the first write; it says whether to go on.
pub(super) fn write_all(
    writes: &[MappedWrite<'_>],
    trail: &Trail,
    begin: impl FnOnce() -> Result<Writing>,
) -> Result<()> {
    check_all(writes, trail)?;
    match begin()? {
        Writing::Begins => {}
        Writing::IsLogDirty => return Err(is_log_dirty()),
        Writing::WasLetRun => {
            return Err(Error::try_again(
                "somebody else let the guest run while it was paused to be changed (xl unpause?); nothing was changed",
            ))
        }
        Writing::IsShutDown => {
            return Err(Error::try_again(
                "the guest has shut down or is suspended (is it being saved or moved?); nothing was changed",
            ))
        }
    }
    let changed = || writes.iter().filter(|w| w.write.changes());
    let written = changed().try_for_each(|w| w.put(&w.write.new));
    // What can't be read back is not known to be there.
    let is_there = |w: &MappedWrite<'_>, bytes: &[u8]| w.holds(bytes).unwrap_or(false);
    if written.is_ok() && changed().all(|t| is_there(t, &t.write.new)) {
        return Ok(());
    }
    // The last one first: what was written first is put back last.
    for mapped in changed().rev() {
        // All are tried. What counts is what is there in the end.
        let _ = mapped.put(&mapped.write.expect);
    }
    for mapped in changed() {
        if !is_there(mapped, &mapped.write.expect) {
            return Err(Error::uncertain(format!(
                "writing failed midway and the bytes at {} could not be put back; run `xen-locus \
                 recover`",
                mapped.write.at
            )));
        }
    }
    Err(Error::rolled_back(
        "writing failed midway; all bytes are put back and verified",
    ))
}

#[cfg(test)]
mod tests {
    use locus_guest::addr::Gva;

    use super::*;
    use crate::error::ExitCode;
    use crate::write::About;
    use locus_guest::addr::PAGE_LEN;
    use locus_guest::mock::MockMemory;
    use locus_guest::{self as guest, Window};
    use std::cell::Cell;

    const OLD: [u8; 5] = [1; 5];
    const NEW: [u8; 5] = [2; 5];

    /// A window whose writes number `fails` and reads number `blind` fail, from 0.
    struct Failing {
        inner: Box<dyn WindowMut>,
        writes: Cell<u32>,
        fails: std::ops::Range<u32>,
        reads: Cell<u32>,
        blind: std::ops::Range<u32>,
    }

    impl Window for Failing {
        fn read(&self, offset: usize, buf: &mut [u8]) -> std::result::Result<(), guest::Error> {
            let n = self.reads.replace(self.reads.get() + 1);
            if self.blind.contains(&n) {
                return Err(guest::Error::Odd("the read failed".into()));
            }
            self.inner.read(offset, buf)
        }
    }

    impl WindowMut for Failing {
        fn write(&self, offset: usize, bytes: &[u8]) -> std::result::Result<(), guest::Error> {
            let n = self.writes.replace(self.writes.get() + 1);
            if self.fails.contains(&n) {
                // Torn: the first time two bytes get there, the second time one, then none.
                self.inner
                    .write(offset, &bytes[..2usize.saturating_sub(n as usize)])?;
                return Err(guest::Error::Odd("the write failed".into()));
            }
            self.inner.write(offset, bytes)
        }
    }

    /// Writes two redirects, of which the second fails at its writes `fails`; returns the outcome
    /// and what then stands at both places.
    fn written(first_byte: u8, fails: std::ops::Range<u32>) -> (Result<()>, [[u8; 5]; 2]) {
        written_blindly(first_byte, fails, 0..0)
    }

    /// The same, where it can't be read at its reads `blind`.
    fn written_blindly(
        first_byte: u8,
        fails: std::ops::Range<u32>,
        blind: std::ops::Range<u32>,
    ) -> (Result<()>, [[u8; 5]; 2]) {
        let memory = MockMemory::new();
        let frames: Vec<Frame> = (0..2).map(|_| memory.frame()).collect();
        let write = Write {
            at: Gva(0x1000),
            expect: OLD.to_vec(),
            new: NEW.to_vec(),
            about: About::Text,
        };
        for &frame in &frames {
            memory.map_mut(&[frame]).unwrap().write(100, &OLD).unwrap();
        }
        memory
            .map_mut(&frames[1..])
            .unwrap()
            .write(100, &[first_byte])
            .unwrap();
        let writes: Vec<MappedWrite<'_>> = frames
            .iter()
            .zip([(0..0, 0..0), (fails, blind)])
            .map(|(&frame, (fails, blind))| {
                let inner = memory.map_mut(&[frame]).unwrap();
                let window: Box<dyn WindowMut> = Box::new(Failing {
                    inner,
                    writes: Cell::new(0),
                    fails,
                    reads: Cell::new(0),
                    blind,
                });
                MappedWrite {
                    write: &write,
                    frames: vec![frame],
                    window: Some(Mapped::Write(window)),
                    offset: 100,
                }
            })
            .collect();
        let result = write_all(&writes, &Trail::default(), || Ok(Writing::Begins));
        let stands = [0, 1].map(|i| {
            let mut bytes = [0; 5];
            writes[i].window().unwrap().read(100, &mut bytes).unwrap();
            bytes
        });
        assert!(writes
            .iter()
            .all(|t| t.window().unwrap().read(PAGE_LEN - 8, &mut [0; 8]).is_ok()));
        (result, stands)
    }

    #[test]
    fn all_redirects_are_written_or_none() {
        let (result, stands) = written(1, 0..0);
        assert!(result.is_ok());
        assert_eq!(stands, [NEW, NEW]);
    }

    #[test]
    fn bytes_that_changed_since_they_were_checked_stop_the_write_before_it_begins() {
        let (result, stands) = written(9, 0..0);
        assert_eq!(result.unwrap_err().exit_code(), ExitCode::TryAgain);
        assert_eq!(stands, [OLD, [9, 1, 1, 1, 1]]);
    }

    #[test]
    fn a_write_that_fails_midway_is_rolled_back_and_verified() {
        let (result, stands) = written(1, 0..1);
        assert_eq!(result.unwrap_err().exit_code(), ExitCode::RolledBack);
        assert_eq!(stands, [OLD, OLD]);
    }

    #[test]
    fn what_cant_be_read_back_is_rolled_back() {
        // its reads: before the write, after it, after the old bytes were put back
        let (result, stands) = written_blindly(1, 0..0, 1..2);
        assert_eq!(result.unwrap_err().exit_code(), ExitCode::RolledBack);
        assert_eq!(stands, [OLD, OLD]);
        let (result, stands) = written_blindly(1, 0..0, 1..3);
        assert_eq!(result.unwrap_err().exit_code(), ExitCode::Uncertain);
        assert_eq!(stands, [OLD, OLD]);
    }

    #[test]
    fn a_rollback_that_fails_too_is_called_uncertain() {
        let (result, _) = written(1, 0..9);
        assert_eq!(result.unwrap_err().exit_code(), ExitCode::Uncertain);
    }
}
