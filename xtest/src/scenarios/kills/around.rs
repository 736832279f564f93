//! What stands around the change that is made to end early: other patches, kprobes of the guest, payloads of before.

use super::actions::Action;
use super::subject::Subject;
use crate::guest::{Guest, Kind};
use crate::scenario::Ctx;
use crate::scenarios::late::KPROBE;
use crate::scenarios::steps::patches::{self, CMDLINE, PAIR};
use crate::scenarios::steps::tool;
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// What stands around a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Around {
    /// Nothing.
    Nothing,
    /// Two times of four, a patch below and one that came later. So the payload is applied again on another layer than
    /// before.
    Layers,
    /// Kprobes of the guest: on other functions all the time, and on this one between the end of the run and `recover`.
    Probes,
    /// Payloads that were applied and reverted before, so many that this one just fits.
    LastRoom,
}

/// Payloads that a guest can be given in its life, at most.
const PAYLOADS: u32 = 64;
/// If fewer fit, something else is wrong.
const FEWEST: u32 = 8;

/// Registers kprobes on functions that no payload replaces, one of them enabled. Prints the offset of an instruction of
/// `version_proc_show` far behind the redirect.
const OTHERS: &str = "echo 'p:other cmdline_proc_show' >> kprobe_events && \
     echo 'p:idle uptime_proc_show+5' >> kprobe_events && echo 1 > events/kprobes/other/enable && \
     for at in $(seq 16 64); do echo \"p:late version_proc_show+$at\" >> kprobe_events && \
     echo '-:late' >> kprobe_events && echo $at && exit; done 2>/dev/null; exit 1";

/// What stands around the changes of one guest, made ready.
#[derive(Debug)]
pub struct Ready {
    around: Around,
    /// Offset in `version_proc_show` of an instruction behind the redirect.
    behind: u32,
    /// Kprobes that were registered between the end of a run and `recover`.
    probes: u32,
    /// How often that made `recover` wait.
    refused: u32,
}

impl Around {
    /// Makes it ready, in a guest that was just started. Returns that, and the guest under test, which may be another one
    /// now.
    pub fn ready(self, ctx: &mut Ctx, kind: Kind) -> Result<(Ready, Subject), Verdict> {
        let mut subject = Subject::new(ctx, kind)?;
        let mut behind = 0;
        match self {
            Self::Nothing | Self::Layers => {}
            Self::Probes => {
                let said = subject.guest.ok(&tool::in_tracing(OTHERS))?;
                behind = said
                    .parse()
                    .map_err(|_| Verdict::Error(format!("a place for a kprobe: {said:?}")))?;
            }
            Self::LastRoom => {
                let fits = fill(ctx, &subject.guest, PAYLOADS)?;
                check!(
                    (FEWEST..PAYLOADS).contains(&fits),
                    "{fits} payloads fit before the one that is to be the last"
                );
                ctx.destroy_guest(kind.name())?;
                subject = Subject::new(ctx, kind)?;
                check_eq!(fill(ctx, &subject.guest, fits - 1)?, fits - 1);
            }
        }
        let ready = Ready {
            around: self,
            behind,
            probes: 0,
            refused: 0,
        };
        Ok((ready, subject))
    }
}

/// Applies and reverts payloads, none of them twice, while the one that will be killed fits; at most `most`. Returns how
/// many.
fn fill(ctx: &Ctx, guest: &Guest, most: u32) -> Result<u32, Verdict> {
    let name = &guest.name;
    for n in 0..most {
        let out = ctx
            .dom0
            .sh(&format!("xen-locus check {name} {}", patches::file(PAIR)))?;
        if out.rc == 3 {
            return Ok(n);
        }
        check_eq!(out.rc, 0, "after {n} payloads: {}", out.err_text());
        let file = patches::another(ctx, n)?;
        ctx.dom0.ok(&format!("xen-locus apply {name} {file}"))?;
        tool::revert(ctx, name, CMDLINE)?;
    }
    Ok(most)
}

impl Ready {
    /// The action as it is made in this run.
    pub fn action(&self, action: Action, run: u32) -> Action {
        if self.around == Around::Layers && run % 4 >= 2 {
            action.layered()
        } else {
            action
        }
    }

    /// After a run that ended early, before `recover`.
    pub fn after_run(&mut self, ctx: &Ctx, subject: &Subject, run: u32) -> Result<(), Verdict> {
        if self.around != Around::Probes {
            return Ok(());
        }
        let guest = &subject.guest;
        // On the first byte of the redirect, or behind it; enabled or not.
        let at = match run % 2 {
            0 => 5,
            _ => self.behind,
        };
        let enable = if run % 4 < 2 { "0" } else { "1" };
        let out = guest.sh(&tool::in_tracing(&format!(
            "echo 'p:late version_proc_show+{at}' >> kprobe_events && \
             echo {enable} > events/kprobes/late/enable"
        )))?;
        // The guest's kernel takes none where it does not find an instruction, as behind a redirect.
        if out.rc != 0 {
            return Ok(());
        }
        self.probes += 1;
        guest.ok("cat /proc/version")?;
        let recover = format!("xen-locus recover {}", guest.name);
        let out = ctx.dom0.sh(&recover)?;
        let said = out.err_text();
        check!(
            out.rc == 0 || out.rc == 2 && said.contains(KPROBE),
            "{recover}, with a kprobe at +{at}: {} {said}",
            out.rc
        );
        self.refused += u32::from(out.rc == 2);
        guest.ok("cat /proc/version")?;
        guest.ok(&tool::in_tracing(
            "echo 0 > events/kprobes/late/enable && echo '-:late' >> kprobe_events",
        ))?;
        Ok(())
    }

    /// After all runs: what was to be shown was there.
    pub fn end(&self, ctx: &Ctx, subject: &mut Subject) -> Result<(), Verdict> {
        let name = subject.guest.name.clone();
        match self.around {
            Around::Nothing | Around::Layers => {}
            Around::Probes => {
                let Self {
                    probes, refused, ..
                } = self;
                eprintln!(
                    "{name}: {probes} kprobes before recover, which was refused {refused} times"
                );
                check!(*probes > 0, "no kprobe was registered between");
                subject.guest.ok(&tool::in_tracing(
                    "echo 0 > events/kprobes/other/enable && echo > kprobe_events",
                ))?;
            }
            Around::LastRoom => {
                // It had the last room, each time again.
                let file = patches::another(ctx, PAYLOADS)?;
                tool::refused(ctx, &format!("xen-locus check {name} {file}"), 3, "")?;
            }
        }
        Ok(())
    }
}
