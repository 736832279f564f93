//! The payloads that a run is to give back, and what became of each.

use std::collections::HashSet;

use locus_kernel::Kernel;

use crate::apply::Done;
use crate::arena::record::State;
use crate::arena::Resident;
use crate::error::{Error, Result};
use crate::plan::patch_stack;

/// What became of a payload so far.
enum Fate {
    /// Nothing is in its way. How long the guest was paused for it.
    Goes(Done),
    /// Something is in its way.
    Stays(Error),
    /// It is gone, or would be.
    Gone,
}

struct Candidate<'r> {
    resident: &'r Resident,
    /// Payloads that use it: positions in the directory.
    users: HashSet<usize>,
    fate: Fate,
}

/// The payloads that are to be given back. One that another payload uses goes only if that one goes too: what calls it
/// does so by a distance, which no search for addresses finds.
pub(super) struct Candidates<'r>(Vec<Candidate<'r>>);

impl<'r> Candidates<'r> {
    /// Those of `all` that are `meant`. Some of them may stay already.
    ///
    /// # Errors
    /// The guest's modules can't be read.
    pub(super) fn new(
        kernel: &Kernel<'_>,
        all: &[Resident],
        meant: &[&'r Resident],
    ) -> Result<Candidates<'r>> {
        let others: Vec<&Resident> = all.iter().collect();
        let mut candidates = Vec::new();
        for &resident in meant {
            let fate = match check_unused(kernel, resident, all) {
                Ok(()) => Fate::Goes(Done::default()),
                Err(error) => Fate::Stays(error),
            };
            candidates.push(Candidate {
                resident,
                users: patch_stack::users(kernel, resident, &others)?,
                fate,
            });
        }
        let mut candidates = Candidates(candidates);
        let meant: HashSet<usize> = meant.iter().map(|r| r.index).collect();
        for candidate in &mut candidates.0 {
            let stays =
                |r: &&Resident| candidate.users.contains(&r.index) && !meant.contains(&r.index);
            if let (Some(by), Fate::Goes(_)) = (all.iter().find(stays), &candidate.fate) {
                candidate.fate = Fate::Stays(used(by));
            }
        }
        candidates.keep_used();
        Ok(candidates)
    }

    /// Those in whose way nothing is so far, by number.
    pub(super) fn going(&self) -> Vec<(usize, &'r Resident)> {
        let all = self.0.iter().enumerate();
        let going = all.filter(|(_, c)| matches!(c.fate, Fate::Goes(_)));
        going.map(|(n, c)| (n, c.resident)).collect()
    }

    /// The next one that nothing keeps, without numbers `out`: one that no other uses, if there is such a one. And how
    /// long the guest was paused for it.
    pub(super) fn next(&self, out: &HashSet<usize>) -> Option<(usize, &'r Resident, Done)> {
        let all = self.0.iter().enumerate().filter(|(n, _)| !out.contains(n));
        let left: Vec<_> = all
            .filter_map(|(n, c)| match c.fate {
                Fate::Goes(done) => Some((n, c, done)),
                Fate::Stays(_) | Fate::Gone => None,
            })
            .collect();
        let is_used = |c: &Candidate<'r>| {
            let mut others = left.iter();
            others.any(|(_, other, _)| c.users.contains(&other.resident.index))
        };
        let mut free = left.iter().filter(|(_, c, _)| !is_used(c));
        // Whom those of an earlier build use is not always known, and each then counts as a user of the other.
        let next = free.next().or_else(|| left.first());
        next.map(|(n, c, done)| (*n, c.resident, *done))
    }

    /// Something is in the way of this one.
    pub(super) fn stays(&mut self, n: usize, error: Error) {
        let candidate = self.0.get_mut(n);
        if let Some(candidate) = candidate.filter(|c| matches!(c.fate, Fate::Goes(_))) {
            candidate.fate = Fate::Stays(error);
            self.keep_used();
        }
    }

    /// An error about all of those in whose way nothing else is.
    pub(super) fn all_stay(&mut self, error: &Error) {
        for candidate in &mut self.0 {
            if matches!(candidate.fate, Fate::Goes(_)) {
                candidate.fate = Fate::Stays(Error::said(error.class(), error.to_string()));
            }
        }
    }

    /// This one was taken out of the guest's lists, for which the guest was paused so long; or could not be.
    ///
    /// # Errors
    /// As [`Candidates::is_gone`].
    pub(super) fn taken_out(&mut self, n: usize, done: Result<Done>) -> Result<()> {
        let goes = done.map(|done| self.set(n, Fate::Goes(done)));
        self.unless_failed(n, goes)
    }

    /// This one is gone, or could not be given back.
    ///
    /// # Errors
    /// [`Class::TryAgain`](crate::error::Class::TryAgain), if it is uncertain how it ended: nothing else begins before that is known.
    pub(super) fn is_gone(&mut self, n: usize, done: Result<()>) -> Result<()> {
        let gone = done.map(|()| self.set(n, Fate::Gone));
        self.unless_failed(n, gone)
    }

    fn unless_failed(&mut self, n: usize, done: Result<()>) -> Result<()> {
        let Err(error) = done else {
            return Ok(());
        };
        let is_uncertain = error.is_uncertain();
        self.stays(n, error);
        match is_uncertain {
            true => Err(Error::try_again(
                "it was not tried, because how another one ended is uncertain: run `xen-locus recover` first",
            )),
            false => Ok(()),
        }
    }

    fn set(&mut self, n: usize, fate: Fate) {
        if let Some(candidate) = self.0.get_mut(n) {
            candidate.fate = fate;
        }
    }

    /// Those that stay, and why.
    pub(super) fn into_staying(self) -> Vec<(&'r Resident, Error)> {
        let stays = |candidate: Candidate<'r>| match candidate.fate {
            Fate::Stays(error) => Some((candidate.resident, error)),
            Fate::Gone => None,
            Fate::Goes(_) => {
                let error = Error::failed("it was not tried: this is a defect of xen-locus");
                Some((candidate.resident, error))
            }
        };
        self.0.into_iter().filter_map(stays).collect()
    }

    /// Keeps what is used by one that stays.
    fn keep_used(&mut self) {
        loop {
            let stays = |c: &&Candidate<'r>| matches!(c.fate, Fate::Stays(_));
            let stay: Vec<&Resident> = self.0.iter().filter(stays).map(|c| c.resident).collect();
            let next = self.0.iter_mut().find_map(|candidate| {
                let by = stay.iter().find(|r| candidate.users.contains(&r.index))?;
                matches!(candidate.fate, Fate::Goes(_)).then_some((candidate, *by))
            });
            match next {
                Some((candidate, by)) => candidate.fate = Fate::Stays(used(by)),
                None => return,
            }
        }
    }
}

fn used(by: &Resident) -> Error {
    Error::failed(format!(
        "payload {} uses it and stays: reclaim that first",
        by.record.name
    ))
}

/// Refuses a payload to which a redirect leads, now or once another patch is reverted.
fn check_unused(kernel: &Kernel<'_>, resident: &Resident, all: &[Resident]) -> Result<()> {
    let others = all.iter().filter(|r| r.slot.state == State::Applied);
    let others: Vec<_> = others.flat_map(|r| &r.record.functions).collect();
    for function in &resident.record.functions {
        let comes_back = others
            .iter()
            .any(|o| o.site == function.site && o.old_bytes == function.new_bytes);
        // The memory of a module that is gone may have another use.
        let found = patch_stack::bytes_at(kernel, function.site).ok();
        if comes_back || found == Some(function.new_bytes) {
            return Err(Error::failed(format!(
                "payload {} is not out of the way: the redirect of {} at {} leads to it, or will when another patch is \
                 reverted",
                resident.record.name, function.name, function.site
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::mock::{payload, Guest, A, B};

    #[test]
    fn none_is_called_reclaimed_that_was_not_tried_and_two_that_use_each_other_are_tried() {
        let guest = Guest::new();
        guest.applied(&payload("one", &[A]));
        guest.applied(&payload("two", &[B]));
        let residents = guest.residents().unwrap();
        let candidate = |n: usize, user: usize| Candidate {
            resident: &residents[n],
            users: HashSet::from([user]),
            fate: Fate::Goes(Done::default()),
        };
        let all = || Candidates(vec![candidate(0, 1), candidate(1, 0)]);
        assert_eq!(all().into_staying().len(), 2);
        let (first, ..) = all().next(&HashSet::new()).unwrap();
        let second = all().next(&HashSet::from([first])).map(|(n, ..)| n);
        assert_eq!((first, second), (0, Some(1)));
    }
}
