//! The guarded pause of a domain, as a change needs it.

use locus_guest::{self as guest, Vcpu};
use locus_xen::{Pause, WriteState};

use crate::guard::worker::Guarded;
use crate::machine::{Guard, Paused, Writing};
use crate::say;

impl Guard for Guarded<'_> {
    fn wait_for_guardian_tick(&self) {
        Guarded::wait_for_guardian_tick(self);
    }

    fn hold(&self) -> std::result::Result<(), guest::Error> {
        Guarded::hold(self)
    }

    fn let_go(&self) {
        Guarded::let_go(self);
    }

    fn vcpus(&self) -> std::result::Result<Vec<Vcpu>, guest::Error> {
        self.vcpus_now()
    }

    fn pause(&self) -> std::result::Result<Box<dyn Paused + '_>, guest::Error> {
        Ok(Box::new(Guarded::pause(self)?))
    }
}

impl Paused for Pause<'_> {
    fn vcpus(&self) -> std::result::Result<Vec<Vcpu>, guest::Error> {
        Ok(Pause::vcpus(self)?)
    }

    fn writing(&self) -> std::result::Result<Writing, guest::Error> {
        if Pause::is_log_dirty(self)? {
            return Ok(Writing::IsLogDirty);
        }
        Ok(match Pause::writing(self)? {
            WriteState::Held => Writing::Begins,
            WriteState::ShutDown => Writing::IsShutDown,
            WriteState::LetRun => Writing::WasLetRun,
        })
    }

    fn elapsed(&self) -> std::time::Duration {
        Pause::elapsed(self)
    }

    fn end(self: Box<Self>) -> std::result::Result<std::time::Duration, guest::Error> {
        let ended = Pause::end(*self)?;
        if let Err(error) = ended.reported {
            say::warn(format_args!(
                "if the guest is being moved as it runs, stop that: {error}"
            ));
        }
        Ok(ended.duration)
    }
}
