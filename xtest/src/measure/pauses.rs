//! Measures the pauses of changes at one point.

use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::points::{Asker, Point};
use super::stats::{ratio, Samples};
use super::wanted::Wanted;
use crate::guest::Guest;
use crate::scenario::Ctx;
use crate::verdict::Verdict;

/// An apply that takes longer than this, in milliseconds from start to end, has not converged.
const CONVERGED_MS: u64 = 2000;

/// The results at a point.
#[derive(Debug, Serialize)]
pub struct Measured {
    /// The name of the point.
    pub name: String,
    /// The point: properties of the guest and of the change.
    #[serde(flatten)]
    pub point: Point,
    /// Threads in the guest at the end.
    pub threads_found: u64,
    /// Microseconds of an empty pause and unpause, by libxenctrl's calls.
    pub empty_us: Samples,
    /// Microseconds of a pause in which all vCPUs' contexts are read, by libxenctrl's calls: the floor.
    pub floor_us: Samples,
    /// Microseconds of the same, done as xen-locus does it: several hypercalls at once.
    pub together_us: Samples,
    /// Microseconds of that, with one write to the kernel's code.
    pub write_us: Samples,
    /// Microseconds of the pauses in which a payload was applied or reverted.
    pub pause_us: Samples,
    /// Those of applies.
    pub apply_us: Samples,
    /// Those of reverts.
    pub revert_us: Samples,
    /// The number of pauses that each change needed.
    pub attempts: Samples,
    /// Milliseconds of each apply from start to end, reading the guest's kernel included.
    pub total_ms: Samples,
    /// The number of applies that were tried.
    pub applies: u32,
    /// The number of applies that were done within two seconds.
    pub converged: usize,
    /// Reports of changes that failed.
    pub errors: Vec<String>,
}

impl Measured {
    /// The median pause, divided by the median floor.
    pub fn median_ratio(&self) -> f64 {
        ratio(self.pause_us.p50, self.floor_us.p50)
    }

    /// The 99th percentile of pauses, divided by the median floor.
    pub fn p99_ratio(&self) -> f64 {
        ratio(self.pause_us.p99, self.floor_us.p50)
    }
}

/// Measures `rounds` applies and reverts, or as many as the time allows, in a guest that is prepared for the point.
pub fn measure(
    ctx: &Ctx,
    guest: &Guest,
    point: Point,
    rounds: u32,
    wanted: &Wanted,
) -> Result<Measured, Verdict> {
    let name = &guest.name;
    let payload = point.payload();
    let seconds = wanted.limit.as_secs();
    let cmd = match point.asker {
        Asker::Resident => format!(
            "locus-pauses {name} /payloads/{payload}.ko --rounds {rounds} --limit {seconds}"
        ),
        Asker::OneShot => format!(
            "end=$(($(cut -d. -f1 /proc/uptime) + {seconds})); for i in $(seq {rounds}); do \
             [ $(cut -d. -f1 /proc/uptime) -lt $end ] || break; \
             locus-pauses {name} --rounds 1 --cold; \
             xen-locus -o json apply {name} /payloads/{payload}.ko --max-pause 1s; \
             xen-locus -o json revert {name} {payload} --max-pause 1s; done; true"
        ),
    };
    let patience = wanted.patience(wanted.limit + Duration::from_secs(120));
    let out = ctx.dom0.sh_timeout(&cmd, patience)?;
    if out.rc != 0 || out.timed_out {
        let said = out.err_text();
        return Err(Verdict::failure(format!("`{cmd}`: {}: {said}", out.rc)));
    }
    let documents = serde_json::Deserializer::from_slice(&out.stdout).into_iter();
    let documents: Vec<Value> = documents
        .collect::<Result<_, _>>()
        .map_err(|e| Verdict::failure(format!("`{cmd}`: {e}: {}", out.text())))?;
    let threads_found = guest.threads()?;
    Ok(of(point, &documents, threads_found))
}

fn of(point: Point, documents: &[Value], threads_found: u64) -> Measured {
    let all = |key: &str| -> Vec<u64> {
        let lists = documents.iter().filter_map(|d| d.get(key)?.as_array());
        lists.flatten().filter_map(Value::as_u64).collect()
    };
    let inner = documents
        .iter()
        .filter_map(|d| d.get("changes")?.as_array());
    let changes: Vec<&Value> = inner
        .flatten()
        .chain(documents.iter().filter(|d| d.get("empty_us").is_none()))
        .collect();
    let result = |change: &Value| {
        change
            .get("result")
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    let number = |key: &str, of: &[&str]| -> Vec<u64> {
        let wanted = |c: &&&Value| result(c).is_some_and(|r| of.contains(&r.as_str()));
        let chosen = changes.iter().filter(wanted);
        chosen.filter_map(|c| c.get(key)?.as_u64()).collect()
    };
    let both = ["applied", "reverted"];
    let total_ms = number("total_ms", &["applied"]);
    Measured {
        name: point.name(),
        point,
        threads_found,
        empty_us: all("empty_us").into(),
        floor_us: all("contexts_us").into(),
        together_us: all("together_us").into(),
        write_us: all("write_us").into(),
        pause_us: number("pause_us", &both).into(),
        apply_us: number("pause_us", &["applied"]).into(),
        revert_us: number("pause_us", &["reverted"]).into(),
        attempts: number("attempts", &both).into(),
        // Each round is an apply and a revert.
        applies: u32::try_from(changes.len() / 2).unwrap_or(u32::MAX),
        converged: total_ms.iter().filter(|&&ms| ms <= CONVERGED_MS).count(),
        total_ms: total_ms.into(),
        errors: changes
            .iter()
            .filter(|c| !result(c).is_some_and(|r| both.contains(&r.as_str())))
            .map(|c| c.to_string())
            .collect(),
    }
}

/// What a point came to if all floors and all pauses were this long.
#[cfg(test)]
pub fn measured(point: Point, floor_us: u64, pause_us: u64) -> Measured {
    let applied = serde_json::json!({
        "contexts_us": [floor_us],
        "empty_us": [1],
        "changes": [{"result": "applied", "pause_us": pause_us, "attempts": 1, "total_ms": 1}],
    });
    of(point, &[applied], point.threads.into())
}

#[cfg(test)]
mod tests {
    use super::super::points::BASE;
    use super::*;
    use serde_json::json;

    #[test]
    fn changes_are_told_apart_whoever_asked_for_them() {
        let applied = json!({"result": "applied", "pause_us": 30, "attempts": 1, "total_ms": 400});
        let late = json!({"result": "applied", "pause_us": 50, "attempts": 9, "total_ms": 2001});
        let reverted =
            json!({"result": "reverted", "pause_us": 20, "attempts": 2, "total_ms": 300});
        let failed = json!({"error": "blocked"});
        let changes = [&applied, &reverted, &late, &failed];
        let floor = json!({"empty_us": [5, 6], "contexts_us": [10, 10], "changes": changes});
        let resident = of(BASE, &[floor], 510);
        let alone = json!({"empty_us": [5], "contexts_us": [10], "changes": []});
        let documents = [
            alone.clone(),
            applied.clone(),
            reverted.clone(),
            alone,
            late.clone(),
            failed.clone(),
        ];
        let one_shot = of(BASE, &documents, 510);
        for found in [resident, one_shot] {
            assert_eq!(found.pause_us.samples, [30, 20, 50]);
            assert_eq!(found.total_ms.samples, [400, 2001]);
            assert_eq!((found.applies, found.converged), (2, 1));
            assert_eq!(found.floor_us.samples, [10, 10]);
            assert_eq!(found.errors.len(), 1);
            assert!((found.median_ratio() - 3.0).abs() < 1e-9);
        }
    }
}
