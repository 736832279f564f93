//! What a result depends on. As long as none of it changes, a scenario need not run again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::host::{checked, now};
use crate::paths::Paths;

/// Where the tree keeps results: a line for each scenario, in the order of their names.
pub const RECORD: &str = "xtest/matrix.json";
/// The folder of the scenarios, seen from the workspace.
const SCENARIOS: &str = "xtest/src/scenarios/";
/// Folders and files that the tool and the payloads are built from.
const PRODUCT: &[&str] = &["Cargo.", "xen-locus/", "tools/", "patches/", "deploy/"];
/// Files of the testbed that choose and count scenarios, and keep results. They don't say how one runs.
const LISTS: &[&str] = &["xtest/usual.txt", RECORD, "xtest/src/scenarios/mod.rs"];

/// Digests of everything that the result of a scenario depends on.
#[derive(Debug)]
pub struct Inputs {
    base: PathBuf,
    qemu: String,
    product: String,
    testbed: String,
    /// The texts of the files and folders of scenarios, by their names without `.rs`.
    subjects: BTreeMap<String, String>,
}

impl Inputs {
    /// Reads the sources as they are now, whether committed or not. If the workspace is no git repository, no result holds
    /// for longer than the run that it is of.
    ///
    /// # Errors
    /// A file can't be read.
    pub fn now(paths: &Paths) -> Result<Self> {
        let said = Command::new("qemu-system-x86_64").arg("--version").output();
        let said = said.map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
        let qemu = said.unwrap_or_default();
        let mut product = crc32fast::Hasher::new();
        let mut testbed = crc32fast::Hasher::new();
        let mut subjects: BTreeMap<String, String> = BTreeMap::new();
        let names = files(&paths.workspace).unwrap_or_default();
        if names.is_empty() {
            product.update(&now().to_le_bytes());
        }
        for name in names {
            let path = paths.workspace.join(&name);
            if path.is_symlink() || !path.is_file() {
                continue;
            }
            let content =
                std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            match kind(&name) {
                Kind::None => {}
                Kind::Product => add(&mut product, &name, &content),
                Kind::Testbed => add(&mut testbed, &name, &content),
                Kind::Subject(subject) => {
                    let text = subjects.entry(subject.to_owned()).or_default();
                    text.push_str(&name);
                    text.push_str(&String::from_utf8_lossy(&content));
                }
            }
        }
        Ok(Self {
            base: paths.base.clone(),
            qemu: qemu.lines().next().unwrap_or_default().to_owned(),
            product: format!("{:08x}", product.finalize()),
            testbed: format!("{:08x}", testbed.finalize()),
            subjects,
        })
    }

    /// What the result of a scenario depends on, whose guests boot kernels of these releases of Debian.
    pub fn of<'s>(
        &self,
        scenario: &str,
        suites: impl Iterator<Item = &'s str>,
    ) -> BTreeMap<String, String> {
        let mut inputs = BTreeMap::from([
            ("qemu".to_owned(), self.qemu.clone()),
            ("product".to_owned(), self.product.clone()),
            ("testbed".to_owned(), self.testbed.clone()),
            ("scenario".to_owned(), self.scenario(scenario)),
        ]);
        for suite in suites {
            inputs.insert(release(suite), self.unpacked(suite));
        }
        inputs
    }

    /// Whether a result of the scenario holds that depends on `inputs`. Packages of which this machine has none don't
    /// speak against it.
    pub fn allow(&self, scenario: &str, inputs: &BTreeMap<String, String>) -> bool {
        let mut now = self.of(scenario, releases(inputs));
        for suite in releases(inputs).filter(|suite| !self.stamp(suite).exists()) {
            let key = release(suite);
            now.insert(key.clone(), inputs[&key].clone());
        }
        now == *inputs
    }

    /// The digest of the file that names the scenario, and of the files whose parts it uses.
    fn scenario(&self, name: &str) -> String {
        let quoted = format!("\"{name}\"");
        let mut digest = crc32fast::Hasher::new();
        for text in self.subjects.values().filter(|t| t.contains(&quoted)) {
            digest.update(text.as_bytes());
            let uses = |other: &str| {
                let (by_super, whole) = (format!("super::{other}"), format!("scenarios::{other}"));
                [&*by_super, &*whole, "super::all"]
                    .iter()
                    .any(|path| text.contains(path))
            };
            for (_, other) in self.subjects.iter().filter(|(other, _)| uses(other)) {
                digest.update(other.as_bytes());
            }
        }
        format!("{:08x}", digest.finalize())
    }

    /// A digest of what a release of Debian was unpacked from.
    fn unpacked(&self, suite: &str) -> String {
        let stamp = std::fs::read(self.stamp(suite)).unwrap_or_default();
        format!("{:08x}", crc32fast::hash(&stamp))
    }

    /// What the release was unpacked from.
    fn stamp(&self, suite: &str) -> PathBuf {
        self.base.join(suite).join("stamp.json")
    }
}

/// The key of a release of Debian among the inputs.
fn release(suite: &str) -> String {
    format!("debian {suite}")
}

/// The releases of Debian among the inputs of a result.
pub fn releases(inputs: &BTreeMap<String, String>) -> impl Iterator<Item = &str> {
    inputs.keys().filter_map(|key| key.strip_prefix("debian "))
}

/// What a file of the workspace is to a result.
#[derive(Debug, PartialEq, Eq)]
enum Kind<'n> {
    /// Nothing: a document, a unit test, a list.
    None,
    Product,
    Testbed,
    /// It belongs to the scenarios of this file or folder.
    Subject(&'n str),
}

fn kind(name: &str) -> Kind<'_> {
    // The texts of the manual are in the product. They are printed on request, and no scenario reads them.
    let is_document = name.ends_with(".md");
    let is_test = name.starts_with("xen-locus/") && name.split('/').any(|part| part == "tests");
    if is_document || is_test || name.ends_with("/tests.rs") || LISTS.contains(&name) {
        return Kind::None;
    }
    if PRODUCT.iter().any(|start| name.starts_with(start)) {
        return Kind::Product;
    }
    let Some(within) = name.strip_prefix(SCENARIOS) else {
        return match name.starts_with("xtest/") {
            true => Kind::Testbed,
            false => Kind::None,
        };
    };
    let entry = within.split('/').next().unwrap_or(within);
    match entry.strip_suffix(".rs").unwrap_or(entry) {
        "steps" => Kind::Testbed,
        subject => Kind::Subject(subject),
    }
}

/// Names of all files that are not ignored, in order.
fn files(workspace: &Path) -> Result<Vec<String>> {
    let mut cmd = Command::new("git");
    cmd.args(["ls-files", "-co", "--exclude-standard", "-z"]);
    let out = checked(cmd.current_dir(workspace))?.stdout;
    let names = String::from_utf8_lossy(&out);
    let mut names: Vec<String> = names.split('\0').map(str::to_owned).collect();
    names.retain(|name| !name.is_empty());
    names.sort();
    names.dedup();
    Ok(names)
}

fn add(digest: &mut crc32fast::Hasher, name: &str, content: &[u8]) {
    digest.update(name.as_bytes());
    digest.update(&(content.len() as u64).to_le_bytes());
    digest.update(content);
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Inputs of a workspace in which two files have scenarios: `one` uses a part of `two`.
    pub(crate) fn inputs(base: &Path, product: &str, one: &str, two: &str) -> Inputs {
        Inputs {
            base: base.to_owned(),
            qemu: "QEMU 7".into(),
            product: product.into(),
            testbed: "b".into(),
            subjects: BTreeMap::from([
                ("one".into(), format!("\"a-pv\" use super::two; {one}")),
                ("two".into(), format!("\"b-pv\" {two}")),
            ]),
        }
    }

    #[test]
    fn a_file_is_of_the_product_of_the_testbed_or_of_a_subject() {
        for (name, is) in [
            ("Cargo.lock", Kind::Product),
            ("xen-locus/src/plan/mod.rs", Kind::Product),
            ("xen-locus/src/cli/manual/apply.md", Kind::None),
            ("xen-locus/src/plan/tests.rs", Kind::None),
            ("xen-locus/tests/cli.rs", Kind::None),
            ("patches/STATE.md", Kind::None),
            ("README.md", Kind::None),
            ("fuzz/run.sh", Kind::None),
            ("xtest/src/runner.rs", Kind::Testbed),
            ("xtest/usual.txt", Kind::None),
            ("xtest/src/scenarios/steps/tool.rs", Kind::Testbed),
            ("xtest/src/scenarios/parked.rs", Kind::Subject("parked")),
            ("xtest/src/scenarios/kills/mod.rs", Kind::Subject("kills")),
            ("xtest/src/scenarios/mod.rs", Kind::None),
        ] {
            assert_eq!(kind(name), is, "{name}");
        }
    }

    #[test]
    fn a_scenario_depends_on_its_own_file_and_what_that_uses() {
        let base = Path::new("/nowhere");
        let of = |inputs: &Inputs, name: &str| inputs.of(name, ["bookworm"].into_iter());
        let before = inputs(base, "p", "", "");
        let one = inputs(base, "p", "changed", "");
        assert_ne!(of(&before, "a-pv"), of(&one, "a-pv"));
        assert_eq!(of(&before, "b-pv"), of(&one, "b-pv"));
        let two = inputs(base, "p", "", "changed");
        assert_ne!(of(&before, "a-pv"), of(&two, "a-pv"));
        assert_ne!(of(&before, "b-pv"), of(&two, "b-pv"));
        let product = inputs(base, "changed", "", "");
        assert_ne!(of(&before, "a-pv"), of(&product, "a-pv"));
        assert_eq!(
            releases(&of(&before, "a-pv")).collect::<Vec<_>>(),
            ["bookworm"]
        );
    }
}
