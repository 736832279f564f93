//! What became of each scenario. A result holds as long as what it depends on is unchanged ([`Inputs`]), so a run can be
//! made in several sittings, and on several machines: the tree keeps those that passed ([`RECORD`]).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::host::{checked, replace};
use crate::inputs::{Inputs, RECORD};
use crate::paths::Paths;

/// The word for a scenario that passed.
pub const PASSED: &str = "passed";

/// How one run of a scenario ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    /// "passed", "failed" or "skipped".
    pub verdict: String,
    /// Why, if it did not pass.
    #[serde(default)]
    pub why: String,
    /// How long it took, second tries included.
    pub seconds: f64,
    /// Seconds since 1970, at its end.
    pub at: u64,
    /// It was run a second time, because QEMU was at fault the first time.
    #[serde(default)]
    pub second_try: bool,
    /// Guests that QEMU lost while they started, and that were started again.
    #[serde(default)]
    pub started_again: u32,
    /// Reports of stalls that were excused, because the machine stood still.
    #[serde(default)]
    pub excused: usize,
    /// The commit of the sources.
    #[serde(default)]
    pub commit: String,
    /// What it depends on.
    pub inputs: BTreeMap<String, String>,
}

/// The file of a scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stored {
    /// The last run.
    pub last: Ended,
    /// Runs before it, the oldest first.
    #[serde(default)]
    pub earlier: Vec<Ended>,
}

/// The results of all scenarios.
#[derive(Debug)]
pub struct Results {
    dir: PathBuf,
    /// What the tree keeps.
    recorded: BTreeMap<String, Stored>,
    /// The commit; and a digest of the changes, if there are any.
    pub key: String,
    /// What results depend on, as it is now.
    pub inputs: Inputs,
}

impl Results {
    /// Finds out the state of the sources.
    ///
    /// # Errors
    /// The sources can't be read.
    pub fn open(paths: &Paths) -> Result<Self> {
        Ok(Self {
            dir: paths.base.join("results"),
            recorded: recorded(&paths.workspace.join(RECORD))?,
            key: key(&paths.workspace)?,
            inputs: Inputs::now(paths)?,
        })
    }

    /// Keeps the result of a run.
    pub fn store(&self, name: &str, ended: Ended) -> Result<()> {
        std::fs::create_dir_all(&self.dir)?;
        let file = self.file(name);
        let mut earlier = Vec::new();
        if let Some(before) = read(&file) {
            earlier = before.earlier;
            earlier.push(before.last);
        }
        let stored = Stored {
            last: ended,
            earlier,
        };
        replace(&file, &serde_json::to_vec_pretty(&stored)?)
            .with_context(|| format!("storing the result of {name}"))
    }

    /// The result of a scenario, if it holds for what is there now. Earlier ones that don't are left out. One of this
    /// machine is taken before one of the tree.
    pub fn of(&self, name: &str) -> Option<Stored> {
        let holding = |mut stored: Stored| {
            let holds = |ended: &Ended| self.inputs.allow(name, &ended.inputs);
            stored.earlier.retain(holds);
            holds(&stored.last).then_some(stored)
        };
        let here = read(&self.file(name)).and_then(holding);
        here.or_else(|| self.recorded.get(name).cloned().and_then(holding))
    }

    /// Keeps in the tree what passed of these scenarios and holds. Returns how many there are.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn record(&self, workspace: &Path, scenarios: &[&str]) -> Result<usize> {
        let mut lines = BTreeMap::new();
        for name in scenarios {
            let Some(mut stored) = self.of(name) else {
                continue;
            };
            if stored.last.verdict == PASSED {
                // What is said of a failure can name this machine's folders.
                stored.earlier.iter_mut().for_each(|e| e.why.clear());
                lines.insert(name, serde_json::to_string(&stored)?);
            }
        }
        let text: Vec<String> = lines.iter().map(|(n, s)| format!("{n:?}: {s}")).collect();
        let whole = format!("{{\n{}\n}}\n", text.join(",\n"));
        replace(&workspace.join(RECORD), whole.as_bytes()).context("keeping results")?;
        Ok(lines.len())
    }

    /// The seconds that a scenario usually takes: by the list of the tree, or else by an earlier run.
    pub fn usual(&self, name: &str) -> Option<f64> {
        listed(name).or_else(|| {
            let stored = read(&self.file(name))?;
            let all = [&stored.last]
                .into_iter()
                .chain(stored.earlier.iter().rev());
            let mut passed = all.filter(|ended| ended.verdict == PASSED);
            passed.next().map(|ended| ended.seconds)
        })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.json"))
    }
}

/// Names and seconds of `usual.txt`: lines `NAME SECONDS`, `#` begins a comment.
pub fn usual() -> impl Iterator<Item = (&'static str, f64)> {
    include_str!("../usual.txt").lines().filter_map(|line| {
        let (name, seconds) = line.split('#').next()?.trim().split_once(' ')?;
        Some((name, seconds.trim().parse().ok()?))
    })
}

fn listed(name: &str) -> Option<f64> {
    usual()
        .find(|(found, _)| *found == name)
        .map(|(_, seconds)| seconds)
}

/// What the tree keeps; nothing if there is no such file.
fn recorded(file: &Path) -> Result<BTreeMap<String, Stored>> {
    match std::fs::read(file) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .with_context(|| format!("{}: results can't be read", file.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(e) => Err(e).with_context(|| format!("reading {}", file.display())),
    }
}

fn read(file: &Path) -> Option<Stored> {
    serde_json::from_slice(&std::fs::read(file).ok()?).ok()
}

/// The commit, and a digest of what was changed since.
fn key(workspace: &Path) -> Result<String> {
    let git = |args: &[&str]| -> Result<Vec<u8>> {
        let mut cmd = Command::new("git");
        Ok(checked(cmd.args(args).current_dir(workspace))?.stdout)
    };
    let Ok(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return Ok("no-commit".to_owned());
    };
    let commit = String::from_utf8_lossy(&commit).trim().to_owned();
    let mut changed = git(&["diff", "HEAD", "--binary"])?;
    let new = git(&["ls-files", "--others", "--exclude-standard", "-z"])?;
    for name in new.split(|&b| b == 0).filter(|n| !n.is_empty()) {
        let path = workspace.join(String::from_utf8_lossy(name).as_ref());
        changed.extend_from_slice(name);
        changed.extend(std::fs::read(path).unwrap_or_default());
    }
    Ok(if changed.is_empty() {
        commit
    } else {
        format!("{commit}-changed-{:08x}", crc32fast::hash(&changed))
    })
}

/// A share of a list: every `of`-th element from the `number`-th on, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    number: usize,
    of: usize,
}

impl Part {
    /// Reads `2/4`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('/').and_then(|(number, of)| {
            let (number, of) = (number.parse().ok()?, of.parse().ok()?);
            (1 <= number && number <= of).then_some(Self { number, of })
        });
        numbers.ok_or_else(|| format!("{text:?}: expected a share like 2/4"))
    }

    /// Whether an element of the list belongs to the share.
    pub fn has(self, index: usize) -> bool {
        index % self.of == self.number - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(name: &str, product: &str) -> Results {
        let base = std::env::temp_dir().join(format!("xtest-{name}-{}", std::process::id()));
        std::fs::create_dir_all(base.join("bookworm")).unwrap();
        Results {
            dir: base.join("results"),
            recorded: recorded(&base.join(RECORD)).unwrap(),
            key: "abc".into(),
            inputs: crate::inputs::tests::inputs(&base, product, "", ""),
        }
    }

    fn ended(results: &Results, verdict: &str, at: u64) -> Ended {
        Ended {
            verdict: verdict.into(),
            why: String::new(),
            seconds: 7.0,
            at,
            second_try: false,
            started_again: 0,
            excused: 0,
            commit: results.key.clone(),
            inputs: results.inputs.of("a-pv", ["bookworm"].into_iter()),
        }
    }

    #[test]
    fn a_result_holds_for_what_it_ran_on_and_keeps_what_was_before() {
        let before = results("results", "p");
        assert_eq!(before.of("a-pv"), None);
        before.store("a-pv", ended(&before, "failed", 1)).unwrap();
        before.store("a-pv", ended(&before, PASSED, 2)).unwrap();
        let stored = before.of("a-pv").unwrap();
        assert_eq!(stored.last.verdict, PASSED);
        assert_eq!(stored.earlier[0].verdict, "failed");
        assert_eq!(before.usual("a-pv"), Some(7.0));
        // Another product: the scenario is to be run again, and what it did before says nothing of it.
        let after = results("results", "q");
        assert_eq!(after.of("a-pv"), None);
        after.store("a-pv", ended(&after, PASSED, 3)).unwrap();
        assert_eq!(after.of("a-pv").unwrap().earlier, []);
        assert_eq!(before.of("a-pv"), None);
        // Other packages.
        let base = after.dir.parent().unwrap();
        std::fs::write(base.join("bookworm/stamp.json"), "new").unwrap();
        assert_eq!(after.of("a-pv"), None);
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn the_tree_keeps_what_passed_for_other_machines() {
        let before = results("record", "p");
        let base = before.dir.parent().unwrap().to_owned();
        std::fs::create_dir_all(base.join("xtest")).unwrap();
        std::fs::write(base.join("bookworm/stamp.json"), "these").unwrap();
        let all = ["a-pv", "b-pv", "c-pv"];
        let mut failed = ended(&before, "failed", 1);
        failed.why = "in a folder of this machine".into();
        before.store("a-pv", failed.clone()).unwrap();
        before.store("a-pv", ended(&before, PASSED, 2)).unwrap();
        before.store("b-pv", failed).unwrap();
        assert_eq!(before.record(&base, &all).unwrap(), 1);
        // Another machine: it has no results, and no packages that could differ.
        std::fs::remove_dir_all(&before.dir).unwrap();
        std::fs::remove_dir_all(base.join("bookworm")).unwrap();
        let there = results("record", "p");
        let stored = there.of("a-pv").unwrap();
        assert_eq!((&*stored.last.verdict, stored.last.at), (PASSED, 2));
        assert_eq!((stored.earlier.len(), &*stored.earlier[0].why), (1, ""));
        assert_eq!(there.of("b-pv"), None);
        // A result of its own is taken first.
        there.store("a-pv", ended(&there, "failed", 3)).unwrap();
        assert_eq!(there.of("a-pv").unwrap().last.verdict, "failed");
        std::fs::remove_dir_all(&there.dir).unwrap();
        // Other packages, or another product.
        std::fs::write(base.join("bookworm/stamp.json"), "others").unwrap();
        assert_eq!(there.of("a-pv"), None);
        assert_eq!(results("record", "q").of("a-pv"), None);
        std::fs::write(base.join(RECORD), "{").unwrap();
        assert!(recorded(&base.join(RECORD)).is_err());
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn shares_make_up_the_whole() {
        let parts = ["1/3", "2/3", "3/3"].map(|p| Part::parse(p).unwrap());
        for index in 0..7 {
            assert_eq!(parts.iter().filter(|p| p.has(index)).count(), 1);
        }
        for wrong in ["0/3", "4/3", "1", "a/b", ""] {
            assert!(Part::parse(wrong).is_err(), "{wrong}");
        }
    }
}
