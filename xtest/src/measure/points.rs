//! The points at which pauses are measured: one base point, and points that differ from it in one property.

use serde::Serialize;

use crate::guest::{Kind, Mitigations};

/// What asks for a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Asker {
    /// One process that makes all changes, as the daemon does.
    Resident,
    /// The command line: a new process for each change.
    OneShot,
}

/// Properties of a guest, and of the change that is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Point {
    /// Threads, including kernel threads and those of every guest.
    pub threads: u32,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Whether processes, files, disk and network are busy.
    pub load: bool,
    /// The number of functions that the payload replaces.
    pub functions: u32,
    /// What asks for the change.
    pub asker: Asker,
    /// What the guest's kernel does against faults of the processor.
    pub mitigations: Mitigations,
    /// How many other processes keep dom0's vCPU busy all the time.
    pub beside: u32,
}

/// The base point, which the targets are about. It has no mitigations, so that results are comparable whatever
/// kernels choose.
pub const BASE: Point = Point {
    threads: 500,
    vcpus: 2,
    load: true,
    functions: 1,
    asker: Asker::Resident,
    mitigations: Mitigations::Off,
    beside: 0,
};

impl Point {
    /// The name: what differs from the base.
    pub fn name(&self) -> String {
        if self.asker == Asker::OneShot {
            "one-shot command".to_owned()
        } else if self.beside != BASE.beside {
            "busy dom0".to_owned()
        } else if !self.load {
            "idle".to_owned()
        } else if self.threads != BASE.threads {
            format!("{} threads", self.threads)
        } else if self.vcpus != BASE.vcpus {
            format!(
                "{} vCPU{}",
                self.vcpus,
                if self.vcpus == 1 { "" } else { "s" }
            )
        } else if self.functions != BASE.functions {
            format!("{} functions", self.functions)
        } else {
            match self.mitigations {
                Mitigations::Off => "base",
                Mitigations::Default => "default mitigations",
                Mitigations::Isolation => "page-table isolation",
            }
            .to_owned()
        }
    }

    /// The name of the payload to apply.
    pub fn payload(&self) -> String {
        format!("locus_many_{}", self.functions)
    }
}

/// All points for guests of a type, or some of them if `quick`. The order is the one with the fewest restarts of
/// guests and ends of threads.
pub fn points(kind: Kind, quick: bool) -> Vec<Point> {
    let threads = |threads| Point { threads, ..BASE };
    let vcpus = |vcpus| Point { vcpus, ..BASE };
    let functions = |functions| Point { functions, ..BASE };
    let idle = Point {
        load: false,
        ..BASE
    };
    let one_shot = Point {
        asker: Asker::OneShot,
        ..BASE
    };
    let busy = Point { beside: 4, ..BASE };
    let mut all = vec![idle, BASE, one_shot, busy];
    if quick {
        all.extend([functions(100), threads(50), threads(2000), vcpus(4)]);
    } else {
        all.extend([10, 100].map(functions));
        all.extend([50, 2000, 8000].map(threads));
        all.extend([1, 4, 8].map(vcpus));
    }
    let with = |mitigations| Point {
        mitigations,
        ..BASE
    };
    all.push(with(Mitigations::Default));
    if kind != Kind::Pv {
        all.push(with(Mitigations::Isolation));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_differs_from_the_base_in_one_thing_and_has_its_own_name() {
        for (quick, kind) in [(false, Kind::Pv), (false, Kind::Pvh), (true, Kind::Pvh)] {
            let all = points(kind, quick);
            assert!(all.contains(&BASE));
            for (n, point) in all.iter().enumerate() {
                let differs = [
                    point.threads != BASE.threads,
                    point.vcpus != BASE.vcpus,
                    point.load != BASE.load,
                    point.functions != BASE.functions,
                    point.asker != BASE.asker,
                    point.mitigations != BASE.mitigations,
                    point.beside != BASE.beside,
                ];
                let count = differs.iter().filter(|d| **d).count();
                assert_eq!(count, usize::from(*point != BASE), "{point:?}");
                assert!(all[..n].iter().all(|p| p.name() != point.name()));
            }
        }
    }
}
