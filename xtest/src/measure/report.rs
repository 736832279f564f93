//! The report, as text and for JSON.

use std::fmt;

use serde::Serialize;

use super::inside::{Calls, Livepatch};
use super::pauses::Measured;
use super::points::{Point, BASE};
use super::stats::{ratio, Samples};
use super::wanted::Clock;
use crate::guest::{Kind, Mitigations};

/// All results of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Version of this form.
    pub schema: u32,
    /// Release of the guests' kernel.
    pub kernel: String,
    /// The clock of the machines.
    pub clock: Clock,
    /// Applies, and reverts, that were asked for at the base point.
    pub rounds: u32,
    /// The results for each type of guest.
    pub guests: Vec<OfGuests>,
}

/// The results in guests of one type.
#[derive(Debug, Serialize)]
pub struct OfGuests {
    /// `pv` or `pvh`.
    pub kind: &'static str,
    /// The pauses at each point.
    pub points: Vec<Measured>,
    /// The guest's own livepatch, in the guest of the base point.
    pub livepatch: Option<Livepatch>,
    /// The cost of a call.
    pub calls: Option<Calls>,
    /// The targets.
    pub targets: Vec<Target>,
    /// What could not be measured, and why.
    pub missing: Vec<String>,
}

/// A target, and the measured value.
#[derive(Debug, Serialize)]
pub struct Target {
    /// What is measured.
    pub what: &'static str,
    /// The measured value; none if it could not be measured.
    pub measured: Option<f64>,
    /// The largest allowed value, or the smallest if `at_least`.
    pub limit: f64,
    /// Whether the limit is the smallest allowed value.
    pub at_least: bool,
}

impl Target {
    /// Whether the target is met; none if that is not known.
    pub fn holds(&self) -> Option<bool> {
        let measured = self.measured?;
        Some(if self.at_least {
            measured >= self.limit
        } else {
            measured <= self.limit
        })
    }
}

impl OfGuests {
    /// The results at a point.
    pub fn at(&self, point: Point) -> Option<&Measured> {
        self.points.iter().find(|m| m.point == point)
    }

    /// Fills in the targets.
    pub fn judge(&mut self) {
        let base = self.at(BASE);
        let threads = |threads| self.at(Point { threads, ..BASE });
        let growth = threads(50)
            .zip(threads(8000))
            .map(|(few, many)| ratio(many.pause_us.p50, few.pause_us.p50));
        let most = |what, measured, limit| Target {
            what,
            measured,
            limit,
            at_least: false,
        };
        let calls = self.calls.as_ref();
        let mitigated = |what, mitigations| {
            let line = self.at(Point {
                mitigations,
                ..BASE
            });
            most(what, line.map(Measured::median_ratio), 1.5)
        };
        let mut targets = vec![
            most(
                "base: median pause, in floors",
                base.map(Measured::median_ratio),
                1.5,
            ),
            most(
                "base: p99 of pauses, in floors",
                base.map(Measured::p99_ratio),
                3.0,
            ),
            most(
                "base: p99 of pauses, in the floor's own",
                base.map(|m| ratio(m.pause_us.p99, m.floor_us.p99)),
                3.0,
            ),
            mitigated(
                "default mitigations: median pause, in floors",
                Mitigations::Default,
            ),
            most("median with 8000 threads, in medians with 50", growth, 2.0),
            most(
                "what a redirect adds to a call, in what the livepatch adds",
                calls.and_then(Calls::overhead),
                0.1,
            ),
            Target {
                what: "base: applies done within 2 s, of all",
                measured: base.map(|m| ratio(m.converged as u64, u64::from(m.applies))),
                limit: 1.0,
                at_least: true,
            },
        ];
        if self.kind != Kind::Pv.name() {
            // Kernels of PV guests have none.
            let isolation = mitigated(
                "page-table isolation: median pause, in floors",
                Mitigations::Isolation,
            );
            targets.insert(4, isolation);
        }
        self.targets = targets;
    }
}

/// Columns of the table of pauses.
const HEAD: &str = "                     threads   empty    floor, us         pause of a change, us          in floors   \
                    pauses  apply ms  applies
                       found  median  median     p99      n  median     p99      max  median   p99     max    median   in 2 s";

impl fmt::Display for OfGuests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_points(f)?;
        if let Some(base) = self.at(BASE) {
            let title = "base, by kind of pause, us";
            self.write_samples(
                f,
                title,
                &[
                    ("empty pause and unpause", &base.empty_us),
                    ("with all vCPU contexts (floor)", &base.floor_us),
                    ("the same in two calls of Xen", &base.together_us),
                    ("that and a write to code", &base.write_us),
                    ("apply", &base.apply_us),
                    ("revert", &base.revert_us),
                ],
            )?;
        }
        if let Some(own) = &self.livepatch {
            let title = "the guest's own livepatch, same file, same guest, us of its clock";
            self.write_samples(
                f,
                title,
                &[
                    ("insmod until end of transition", &own.apply_us),
                    ("of that, insmod", &own.insmod_us),
                    ("disable until end of transition", &own.revert_us),
                ],
            )?;
        }
        if let Some(calls) = &self.calls {
            let title = "one call of a function, ps, idle guest, a million calls each time";
            self.write_samples(
                f,
                title,
                &[
                    ("unpatched", &calls.unpatched),
                    ("redirected by xen-locus", &calls.ours),
                    ("redirected by livepatch (ftrace)", &calls.livepatch),
                ],
            )?;
        }
        self.write_targets(f)?;
        self.write_failures(f)
    }
}

impl OfGuests {
    /// Writes the table of pauses, with a line for each point.
    fn write_points(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: base: {} threads, {} vCPUs, under load, no mitigations, 1 function, asked by one process; other \
             lines differ in one thing",
            self.kind, BASE.threads, BASE.vcpus
        )?;
        writeln!(f, "{HEAD}")?;
        for point in &self.points {
            writeln!(f, "{point}")?;
        }
        Ok(())
    }

    /// Writes a table of samples, with a line for each.
    fn write_samples(
        &self,
        f: &mut fmt::Formatter<'_>,
        title: &str,
        lines: &[(&str, &Samples)],
    ) -> fmt::Result {
        writeln!(f, "\n{}: {title}", self.kind)?;
        writeln!(
            f,
            "{:<34} {:>5} {:>8} {:>8} {:>8}",
            "", "n", "median", "p99", "max"
        )?;
        for (what, samples) in lines {
            line(f, what, samples)?;
        }
        Ok(())
    }

    /// Writes the targets, and whether they are met.
    fn write_targets(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{}: {:<60} measured   limit", self.kind, "must hold")?;
        for target in &self.targets {
            let measured = match target.measured {
                Some(value) => format!("{value:>8.2}"),
                None => format!("{:>8}", "-"),
            };
            let bound = if target.at_least { ">=" } else { "<=" };
            let holds = match target.holds() {
                Some(true) => "holds",
                Some(false) => "does not hold",
                None => "not measured",
            };
            let (what, limit) = (target.what, target.limit);
            writeln!(f, "  {what:<62} {measured} {bound} {limit:>4.1}  {holds}")?;
        }
        Ok(())
    }

    /// Writes what could not be measured, and changes that failed.
    fn write_failures(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind;
        for why in &self.missing {
            writeln!(f, "{kind}: not measured: {why}")?;
        }
        for Measured { name, errors, .. } in &self.points {
            if let Some(first) = errors.first() {
                let count = errors.len();
                writeln!(f, "{kind}: {name}: {count} changes failed, first: {first}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let p = &self.pause_us;
        write!(
            f,
            "{:<18} {:>9} {:>7} {:>7} {:>7} {:>6} {:>7} {:>7} {:>8} {:>7.2} {:>5.1} {:>7} {:>9} {:>4} of {}",
            self.name,
            self.threads_found,
            self.empty_us.p50,
            self.floor_us.p50,
            self.floor_us.p99,
            p.count,
            p.p50,
            p.p99,
            p.max,
            self.median_ratio(),
            self.p99_ratio(),
            self.attempts.max,
            self.total_ms.p50,
            self.converged,
            self.applies
        )
    }
}

fn line(f: &mut fmt::Formatter<'_>, what: &str, s: &Samples) -> fmt::Result {
    let Samples {
        count,
        p50,
        p99,
        max,
        ..
    } = s;
    writeln!(f, "{what:<34} {count:>5} {p50:>8} {p99:>8} {max:>8}")
}

#[cfg(test)]
mod tests {
    use super::super::pauses::measured;
    use super::*;

    fn judged(kind: Kind, pause: u64) -> Vec<Target> {
        let isolation = Point {
            mitigations: Mitigations::Isolation,
            ..BASE
        };
        let mut found = OfGuests {
            kind: kind.name(),
            points: vec![measured(BASE, 100, 100), measured(isolation, 100, pause)],
            livepatch: None,
            calls: None,
            targets: Vec::new(),
            missing: Vec::new(),
        };
        found.judge();
        found.targets
    }

    #[test]
    fn isolation_has_a_limit_where_there_is_isolation() {
        let of = |targets: &[Target], start: &str| {
            let found = targets.iter().find(|t| t.what.starts_with(start));
            found.map(Target::holds)
        };
        for (pause, holds) in [(150, true), (151, false)] {
            let targets = judged(Kind::Pvh, pause);
            assert_eq!(of(&targets, "page-table isolation"), Some(Some(holds)));
            assert_eq!(of(&targets, "base: median"), Some(Some(true)));
            // That line was not measured.
            assert_eq!(of(&targets, "default mitigations"), Some(None));
        }
        assert_eq!(of(&judged(Kind::Pv, 1), "page-table isolation"), None);
    }
}
