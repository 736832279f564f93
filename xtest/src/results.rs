//! What became of each scenario, kept for each commit: a run can be made in several sittings.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::host::{checked, replace};
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
    /// What it ran on: the version of QEMU, and a digest of the packages of each release of Debian.
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

/// The results for the state of the sources as it is now.
#[derive(Debug)]
pub struct Results {
    all: PathBuf,
    dir: PathBuf,
    /// The commit; and a digest of the changes, if there are any.
    pub key: String,
    base: PathBuf,
    qemu: String,
}

impl Results {
    /// Finds out the state of the sources.
    pub fn open(paths: &Paths) -> Result<Self> {
        let key = key(&paths.workspace)?;
        let all = paths.base.join("results");
        let said = Command::new("qemu-system-x86_64").arg("--version").output();
        let said = said.map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
        let qemu = said.unwrap_or_default();
        Ok(Self {
            dir: all.join(&key),
            all,
            key,
            base: paths.base.clone(),
            qemu: qemu.lines().next().unwrap_or_default().to_owned(),
        })
    }

    /// The inputs of a scenario whose guests boot kernels of these releases of Debian.
    pub fn inputs<'s>(&self, suites: impl Iterator<Item = &'s str>) -> BTreeMap<String, String> {
        let mut inputs = BTreeMap::from([("qemu".to_owned(), self.qemu.clone())]);
        for suite in suites {
            inputs.insert(suite.to_owned(), self.digest(suite));
        }
        inputs
    }

    /// A digest of what a release of Debian was unpacked from.
    fn digest(&self, suite: &str) -> String {
        let stamp = std::fs::read(self.base.join(suite).join("stamp.json")).unwrap_or_default();
        format!("{:08x}", crc32fast::hash(&stamp))
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

    /// The result of a scenario for this state of the sources, if it ran on what is there now.
    pub fn of(&self, name: &str) -> Option<Stored> {
        let stored = read(&self.file(name))?;
        let suites = stored.last.inputs.keys().map(String::as_str);
        let now = self.inputs(suites.filter(|&s| s != "qemu"));
        (now == stored.last.inputs).then_some(stored)
    }

    /// The seconds that a scenario usually takes: by the list of the tree, or else by a run for any state of the
    /// sources.
    pub fn usual(&self, name: &str) -> Option<f64> {
        listed(name).or_else(|| {
            let folders = std::fs::read_dir(&self.all).ok()?.flatten();
            let found = folders.filter_map(|f| read(&f.path().join(format!("{name}.json"))));
            let passed = found.filter(|s| s.last.verdict == PASSED);
            passed.max_by_key(|s| s.last.at).map(|s| s.last.seconds)
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

fn read(file: &Path) -> Option<Stored> {
    serde_json::from_slice(&std::fs::read(file).ok()?).ok()
}

/// Seconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| d.as_secs())
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

    fn results(name: &str) -> Results {
        let base = std::env::temp_dir().join(format!("xtest-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&base);
        std::fs::create_dir_all(base.join("bookworm")).unwrap();
        let all = base.join("results");
        Results {
            dir: all.join("abc"),
            all,
            key: "abc".into(),
            base,
            qemu: "QEMU 7".into(),
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
            inputs: results.inputs(["bookworm"].into_iter()),
        }
    }

    #[test]
    fn a_result_holds_for_what_it_ran_on_and_keeps_what_was_before() {
        let results = results("results");
        assert_eq!(results.of("one"), None);
        results.store("one", ended(&results, "failed", 1)).unwrap();
        results.store("one", ended(&results, PASSED, 2)).unwrap();
        let stored = results.of("one").unwrap();
        assert_eq!(stored.last.verdict, PASSED);
        assert_eq!(stored.earlier[0].verdict, "failed");
        assert_eq!(results.usual("one"), Some(7.0));
        // Other packages: the scenario is to be run again.
        std::fs::write(results.base.join("bookworm/stamp.json"), "new").unwrap();
        assert_eq!(results.of("one"), None);
        std::fs::remove_dir_all(&results.base).unwrap();
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
