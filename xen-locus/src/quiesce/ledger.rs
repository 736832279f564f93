//! Who ran since a moment, without asking everybody.
//!
//! The kernel counts each switch between two tasks twice, one statement after the other: for the CPU
//! (`rq->nr_switches`) and for the task that leaves it (`nvcsw` or `nivcsw`; kernel/sched/core.c:
//! `__schedule`). So the switches of all CPUs since a moment are those of all tasks since then. Those who ran
//! lately are asked first: where they account for all switches, nobody else ran, and nobody else need be asked.
//!
//! For that must be known what all tasks had counted at one moment. Of those who ran lately it is read at that moment
//! ([`Prescan::reckon`]); of the others what they say before is what they say after it. A task that is born later
//! begins with nothing. From that moment on, those who ran lately tell by themselves of a later one.

use locus_guest::addr::{Gva, Range};
use locus_guest::Vcpu;
use locus_kernel::Kernel;

use super::look::Look;
use super::prescan::{Known, Prescan};
use crate::error::Result;

/// Most tasks that are asked in a pause: a time that is little beside that of the pause itself.
pub(super) const FEW: usize = 256;
/// Tries to read all counters at one moment.
const TRIES: u32 = 4;

/// What was counted at a moment.
pub(super) struct Ledger {
    /// Switches of all CPUs.
    switches: u64,
    /// Of each task that ran lately, the latest first.
    pub(super) accounts: Vec<Account>,
}

/// What was counted of a task.
#[derive(PartialEq, Eq)]
pub(super) struct Account {
    pub(super) task: Gva,
    /// Its switches.
    ran: u64,
    /// Nothing watched had been found on its stack, and it had not run since.
    clear: bool,
}

impl Account {
    /// Whether what was found of the task at that moment is that nothing watched is there, and holds.
    /// Those that need not be `asked` did not run.
    pub(super) fn is_clear(&self, known: &Known, asked: bool) -> Result<bool> {
        Ok(self.clear && (!asked || known.ran()? == self.ran))
    }
}

impl Ledger {
    /// Adds a task that was born since.
    pub(super) fn add(&mut self, task: Gva) {
        let born = Account {
            task,
            ran: 0,
            clear: false,
        };
        self.accounts.insert(0, born);
    }
}

/// Where a CPU may be between the two statements that count.
pub(super) fn counting(kernel: &Kernel<'_>) -> Option<Range> {
    let at = kernel.symbols.addr("__schedule")?;
    Some(Range::new(at, kernel.symbols.room(at)?))
}

impl Prescan<'_, '_> {
    /// Notes what is counted now, while the guest runs, with the registers of its `vcpus`. Comes after a rehearsal.
    ///
    /// # Errors
    /// Memory or registers can't be read.
    pub fn reckon(&mut self, vcpus: impl Fn() -> Result<Vec<Vcpu>>) -> Result<()> {
        self.ledger = None;
        let lively = self.lively();
        // Each CPU must tell, or its tasks account for what another's left open.
        if lively.len() > FEW || self.cpus.iter().any(|cpu| cpu.switches.is_none()) {
            return Ok(());
        }
        let moment = self.moment(&lively, &vcpus)?;
        let mut others_ran = false;
        for (task, known) in &self.known {
            if known.rehearsed.get() != known.ran()? && !lively.contains(task) {
                known.lively.set(self.rehearsals);
                others_ran = true;
            }
        }
        self.ledger = moment.filter(|_| !others_ran);
        self.reckon_again(vcpus)
    }

    /// Scans those of the ledger again that ran since they were, and reckons anew from there on. That takes as long for
    /// fifty tasks as for ten thousand, so that few run between it and a pause.
    fn reckon_again(&mut self, vcpus: impl Fn() -> Result<Vec<Vcpu>>) -> Result<()> {
        let Some(before) = &self.ledger else {
            return Ok(());
        };
        let tasks: Vec<Gva> = before.accounts.iter().map(|a| a.task).collect();
        let mut look = Look::new(self);
        for known in tasks.iter().filter_map(|task| self.known.get(task)) {
            self.scan(known, &mut look)?;
        }
        look.verdict();
        let Some(after) = self.moment(&tasks, vcpus)? else {
            return Ok(());
        };
        let mut left = after.switches.wrapping_sub(before.switches);
        for (then, now) in before.accounts.iter().zip(&after.accounts) {
            let Some(known) = self.known.get(&now.task).filter(|_| then.task == now.task) else {
                return Ok(());
            };
            match without(left, known, now.ran.wrapping_sub(then.ran))? {
                Some(rest) => left = rest,
                None => return Ok(()),
            }
        }
        // Nobody else ran.
        if left == 0 {
            self.ledger = Some(after);
        }
        Ok(())
    }

    /// What is counted at one moment of `tasks` and of the CPUs; `None` where there is no such moment.
    fn moment(
        &self,
        tasks: &[Gva],
        vcpus: impl Fn() -> Result<Vec<Vcpu>>,
    ) -> Result<Option<Ledger>> {
        let read = || {
            let switches = total(&self.count_switches()?);
            let known = tasks.iter().filter_map(|task| self.known.get(task));
            let account = |known: &Known| {
                Ok(Account {
                    task: known.task.addr,
                    ran: known.ran()?,
                    clear: known.is_clear()?,
                })
            };
            let accounts = known.map(account).collect::<Result<Vec<_>>>()?;
            Ok::<_, crate::error::Error>(Ledger { switches, accounts })
        };
        for _ in 0..TRIES {
            let ledger = read()?;
            let counts = self.may_count(&vcpus()?);
            let after = read()?;
            // Nobody switched, was about to, or was born unknown meanwhile.
            let same = ledger.switches == after.switches && ledger.accounts == after.accounts;
            if same && !counts && !self.moved()? {
                return Ok(Some(ledger));
            }
        }
        Ok(None)
    }

    /// Whether those who ran lately account for all switches since the reckoning, now that the CPUs count `switches`:
    /// how many had to be asked, in the ledger's order. Nobody else ran.
    pub(super) fn accounts(&self, vcpus: &[Vcpu], switches: &[u64]) -> Result<Option<usize>> {
        let Some(ledger) = &self.ledger else {
            return Ok(None);
        };
        if self.may_count(vcpus) {
            return Ok(None);
        }
        let mut left = total(switches).wrapping_sub(ledger.switches);
        let mut asked = 0;
        for account in &ledger.accounts {
            if left == 0 {
                break;
            }
            asked += 1;
            let Some(known) = self.known.get(&account.task) else {
                return Ok(None);
            };
            match without(left, known, known.ran()?.wrapping_sub(account.ran))? {
                Some(rest) => left = rest,
                None => return Ok(None),
            }
        }
        Ok((left == 0).then_some(asked))
    }

    /// Whether a vCPU may be between the statements that count a switch. It may have been interrupted there only by
    /// what has a stack of its own.
    fn may_count(&self, vcpus: &[Vcpu]) -> bool {
        let Some(counting) = self.counting else {
            return true;
        };
        let is_own = |at: Gva| {
            let mut stacks = self.cpus.iter().flat_map(|cpu| &cpu.stacks);
            stacks.any(|(range, _)| range.contains(at))
        };
        let mut inside = vcpus.iter().filter(|v| v.online && !v.user);
        inside.any(|v| counting.contains(v.rip) || is_own(v.rsp))
    }
}

/// What is left of so many switches of all CPUs without those `ran` of a task; `None` if they can't be its own.
fn without(switches: u64, known: &Known, ran: u64) -> Result<Option<u64>> {
    Ok(match switches.checked_sub(ran) {
        Some(rest) if ran == 0 || known.is_itself()? => Some(rest),
        _ => None,
    })
}

fn total(switches: &[u64]) -> u64 {
    switches.iter().copied().fold(0, u64::wrapping_add)
}
