//! One change of a guest's memory, as a value. `plan` decides on it, `apply` carries it out, `recover` undoes it.

use std::fmt;

use locus_guest::addr::Gva;
use serde::{Deserialize, Serialize};

/// Longest single write, in bytes.
pub const WRITE_MAX: usize = 64;

/// Bytes to be changed, and what must stand there before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Write {
    /// Address in the guest's kernel, of text or data.
    pub at: Gva,
    /// Bytes expected there.
    pub expect: Vec<u8>,
    /// Bytes to write, as many; the same ones where nothing may have changed for the plan to hold.
    pub new: Vec<u8>,
    /// What the bytes are. The journal does not have it: what is read from there is [`About::Text`].
    #[serde(skip)]
    pub about: About,
}

impl Write {
    /// A condition: the bytes at `at` must be these, and stay.
    #[must_use]
    pub fn condition(at: Gva, bytes: Vec<u8>, about: About) -> Write {
        Write {
            at,
            expect: bytes.clone(),
            new: bytes,
            about,
        }
    }

    /// Whether anything is written. Else it is a condition.
    #[must_use]
    pub fn changes(&self) -> bool {
        self.new != self.expect
    }

    /// Whether it is still of use when the change is undone, perhaps much later: what was written, and the modules that the
    /// change was about. Locks, kprobes and static keys are looked at anew then.
    #[must_use]
    pub fn lasts(&self) -> bool {
        self.changes() || matches!(self.about, About::Text | About::Module(_))
    }

    /// Why it can't be made, where its place holds other bytes than expected.
    #[must_use]
    pub fn broken(&self) -> String {
        format!("{} ({})", self.about, self.at)
    }
}

/// What the bytes of a [`Write`] are. Its text says what it means that they are not those expected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum About {
    /// The bytes of a redirect, or what an earlier run's journal says.
    #[default]
    Text,
    /// What a function has in front of its redirect: ftrace's nop.
    Entry(String),
    /// State, name and place of this module, whose functions are replaced or whose symbols are used.
    Module(String),
    /// The lists and the tree by which the guest knows a payload as a module.
    ModuleLists,
    /// The static key that a branch of the payload follows.
    StaticKey,
    /// The owner of a lock of the guest's kernel, which must be free.
    Lock(Lock),
    /// The guest's kprobes.
    Kprobes,
}

impl fmt::Display for About {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            About::Text => f.write_str(
                "the bytes to be replaced changed since they were checked: the guest traces or patches this function \
                 itself?",
            ),
            About::Entry(function) => write!(
                f,
                "the guest began or stopped to trace or to livepatch {function} since it was checked"
            ),
            About::Module(name) => write!(
                f,
                "module {name} changed since it was looked at: the guest unloads it, or loaded it anew"
            ),
            About::ModuleLists => f.write_str(
                "the guest loaded or unloaded a module, or changed a static key's branches, since the place of the \
                 payload in its lists was worked out",
            ),
            About::StaticKey => f.write_str(
                "the guest switched a static key that the payload's branches follow since they were linked",
            ),
            About::Lock(lock) => f.write_str(&lock.held()),
            About::Kprobes => {
                f.write_str("the guest added or removed a kprobe since its kprobes were looked at")
            }
        }
    }
}

/// A lock of the guest's kernel that must be free when the guest is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// `module_mutex`.
    Modules,
    /// `jump_label_mutex`.
    StaticKeys,
    /// `kprobe_mutex`.
    Kprobes,
}

impl Lock {
    /// Its symbol.
    #[must_use]
    pub fn symbol(self) -> &'static str {
        match self {
            Lock::Modules => "module_mutex",
            Lock::StaticKeys => "jump_label_mutex",
            Lock::Kprobes => "kprobe_mutex",
        }
    }

    /// What the guest does while it holds the lock, as a sentence.
    #[must_use]
    pub fn held(self) -> String {
        let does = match self {
            Lock::Modules => "loads or unloads a module",
            Lock::StaticKeys => "changes a static key",
            Lock::Kprobes => "adds, removes or optimises a kprobe",
        };
        format!("the guest {does} right now ({} is held)", self.symbol())
    }
}
