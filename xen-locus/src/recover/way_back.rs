//! The way back from a change that took place in part, by what its journal or the guest's directory says of it.

use locus_guest::addr::{Gva, Range};
use locus_kernel::Kernel;

use crate::apply::{self, Options, Patience};
use crate::error::{Error, Result};
use crate::link::module::lists;
use crate::machine::Machine;
use crate::plan::{conditions, Plan, Proposal};
use crate::quiesce::{Watch, Watched};
use crate::storage::journal::Change;
use crate::target::kernel_locks;
use crate::write::{Lock, Write};

/// Puts back the bytes that were in the guest before `change`, while no thread is in the code that it is about. What is there now
/// must be of the change: each byte the old or the new one.
pub(super) fn roll_back(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    change: &Change,
    options: &Options,
) -> Result<()> {
    let patience = Patience::new(options);
    patience.keep_trying(|_| {
        let plan = way_back(kernel, change)?;
        apply::execute(machine, kernel, &plan, &patience).map(|_| ())
    })
}

/// The plan that undoes `change`.
fn way_back(kernel: &Kernel<'_>, change: &Change) -> Result<Plan> {
    let unprobed = unprobed(change);
    // An enabled kprobe changes bytes: it is the better reason.
    conditions::check_unprobed(kernel, &change.patch, &unprobed)?;
    let space = kernel.space.fresh();
    let (mut data, mut redirects) = (Vec::new(), Vec::new());
    for lock in [Lock::Modules, Lock::StaticKeys] {
        if kernel.symbols.addr(lock.symbol()).is_some() {
            data.push(kernel_locks::is_free(kernel, lock)?);
        }
    }
    // A payload that was put into the guest's lists in part may have run since, and its timers and lists may lead to its
    // variables. So it counts as one that was taken out, whose pages only `reclaim` gives back.
    let marks = lists::marks_of(&change.writes);
    let listed = match marks {
        Some(at) => space.read_u64(at)? != 0,
        None => false,
    };
    let is_mark = |w: &Write| marks.is_some_and(|at| w.at == at || w.at == at.plus(8));
    for write in change.writes.iter().rev() {
        let found = space.read_vec(write.at, write.new.len())?;
        let back = match listed && is_mark(write) {
            true => lists::REMOVED.to_le_bytes().to_vec(),
            false => write.expect.clone(),
        };
        if !write.changes() {
            if found != write.expect {
                return Err(Error::passing(format!(
                    "what the change of {} relied on is not so any more: the bytes at {} are others (they tell whether a \
                     module is there and live)",
                    change.patch, write.at
                )));
            }
            data.push(write.clone());
            continue;
        }
        let own = |((found, old), new): ((&u8, &u8), &u8)| found == old || found == new;
        if found != back && !found.iter().zip(&write.expect).zip(&write.new).all(own) {
            return Err(Error::uncertain(format!(
                "the bytes at {} are neither the old ones nor the new ones: the guest or another tool changed them",
                write.at
            )));
        }
        redirects.push(Write {
            expect: found,
            new: back,
            ..write.clone()
        });
    }
    let watched = change
        .watched
        .iter()
        .map(|w| Watched::new(Range::new(Gva(w.start), w.len), w.name.as_str()));
    let proposal = Proposal {
        patch: &change.patch,
        unprobed,
        data,
        redirects,
        ..Proposal::default()
    };
    Ok(Plan {
        // As the journal has them.
        watch: Watch::of(watched.collect()),
        ..Plan::new(kernel, proposal)?
    })
}

/// Where no kprobe may stand when `change` is undone: on what it wrote. All other code keeps its bytes, so a kprobe there
/// is no reason to leave a guest between two states.
fn unprobed(change: &Change) -> Vec<Watched> {
    let written = change.writes.iter().filter(|w| w.changes());
    let range = |w: &Write| Range::new(w.at, w.new.len() as u64);
    written
        .map(|w| Watched::new(range(w), change.patch.as_str()))
        .collect()
}
