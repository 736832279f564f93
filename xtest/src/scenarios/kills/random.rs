//! The tool is killed at random moments.

use super::subject::{nothing_left, Subject, Tally};
use crate::check_eq;
use crate::guest::Kind;
use crate::scenario::Ctx;
use crate::scenarios::steps::tool;
use crate::verdict::Verdict;

/// Random numbers that are the same in each run (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit.max(1)
    }
}

pub fn random(ctx: &mut Ctx, kind: Kind, kills: u32) -> Result<(), Verdict> {
    let mut subject = Subject::new(ctx, kind)?;
    let mut tally = Tally::default();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut length = 400_000;
    while tally.kills < kills {
        let cmd = subject.next(ctx)?;
        let when = match random.below(2) {
            0 => format!("--after {}", random.below(length)),
            _ => format!("--in-pause {}", random.below(1000)),
        };
        let done = subject.kill(ctx, &when, &cmd, &mut tally)?;
        if done["signal"].is_null() {
            length = done["total_us"].as_u64().unwrap_or(length);
        }
        // Otherwise the next run recovers by itself.
        if random.below(2) == 0 {
            subject.recover(ctx, &mut tally)?;
        }
        // Nothing blocks the next run.
        if tally.kills % 4 == 0 {
            let cmd = subject.next(ctx)?;
            ctx.dom0.ok(&cmd)?;
            subject.progresses()?;
        }
    }
    tool::revert_all(ctx, &subject.guest.name)?;
    check_eq!(subject.is_new()?, false);
    subject.recover(ctx, &mut tally)?;
    nothing_left(ctx)?;
    eprintln!("{}: {tally:?}", subject.guest.name);
    Ok(())
}
