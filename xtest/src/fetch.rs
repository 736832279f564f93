//! Downloads and unpacks the Debian packages that dom0 and the guests are made of. No root is needed.
//!
//! The host's own apt does the work, with a private state: its resolver computes the closure as if
//! nothing were installed, and it verifies what it downloads against Debian's keyring. It uses the mirrors
//! that the host is configured with. Once the packages are unpacked, xtest needs no network.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, ensure, Context, Result};
use serde::{Deserialize, Serialize};

use crate::headers;
use crate::host::checked;
use crate::paths::Paths;
use crate::room;
use crate::suites::{Suite, BOOKWORM, SKIP};
use crate::toolchain;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// To be changed when what is unpacked, or how, changes: old trees are then unpacked again.
const FORMAT: u32 = 2;

/// Packages of which apt must not take the newest version.
///
/// With the device model 1:7.2+dfsg-7+deb12u18+b3 of bookworm most starts of an HVM guest fail while its
/// firmware loads the kernel (5 of 7). With the security archive's 1:7.2+dfsg-7+deb12u15 one in nine was
/// still there when watching stopped. If the security archive has no version, this has no effect.
const PREFERENCES: &str = "\
Package: qemu-system-xen qemu-system-data
Pin: release l=Debian-Security
Pin-Priority: 1001
";

/// An unpacked suite.
#[derive(Debug, Clone)]
pub struct Root {
    /// The unpacked tree.
    pub dir: PathBuf,
    /// Release of its kernel, as `uname -r` gives it.
    pub release: String,
}

impl Root {
    /// The kernel, a bzImage.
    pub fn kernel(&self) -> Result<PathBuf> {
        self.first(&[
            format!("boot/vmlinuz-{}", self.release),
            format!("usr/lib/modules/{}/vmlinuz", self.release),
        ])
    }

    /// The folder of its modules.
    pub fn modules(&self) -> Result<PathBuf> {
        self.first(&[
            format!("lib/modules/{}/kernel", self.release),
            format!("usr/lib/modules/{}/kernel", self.release),
        ])
    }

    /// The first of these paths that exists. The place of a file depends on the release of Debian.
    pub fn first(&self, paths: &[String]) -> Result<PathBuf> {
        let found = paths.iter().map(|p| self.dir.join(p)).find(|p| p.exists());
        found.with_context(|| format!("{} has none of: {}", self.dir.display(), paths.join(", ")))
    }
}

/// Written when the tree is complete: what it is made of.
#[derive(Debug, Serialize, Deserialize)]
struct Stamp {
    format: u32,
    packages: Vec<String>,
    #[serde(default)]
    only: Vec<String>,
    release: String,
    files: BTreeSet<String>,
}

/// Whether the suite was downloaded and unpacked.
pub fn is_unpacked(paths: &Paths, suite: &Suite) -> bool {
    let base = paths.base.join(suite.name);
    read_stamp(&base.join("stamp.json"), suite).is_some() && base.join("root").is_dir()
}

/// Downloads and unpacks the suite, unless that was done before.
pub fn ensure_suite(paths: &Paths, suite: &Suite) -> Result<Root> {
    let base = paths.base.join(suite.name);
    let root = base.join("root");
    let stamp_file = base.join("stamp.json");
    if let Some(stamp) = read_stamp(&stamp_file, suite) {
        if root.is_dir() {
            return Ok(Root {
                dir: root,
                release: stamp.release,
            });
        }
    }
    room::check(&base, room::SUITE, suite.name)?;
    let debs = base.join("debs");
    std::fs::create_dir_all(&debs)?;
    let listed = base.join("downloaded.json");
    let stamp = match read_stamp(&listed, suite) {
        Some(stamp) if stamp.files.iter().all(|f| debs.join(f).is_file()) => stamp,
        _ => {
            let stamp = download(&base, suite)?;
            std::fs::write(&listed, serde_json::to_vec_pretty(&stamp)?)?;
            stamp
        }
    };
    unpack(&debs, &root, &stamp)?;
    headers::relocate(&root, &stamp.release)?;
    if *suite != BOOKWORM {
        toolchain::relocate(&root)?;
    }
    std::fs::write(&stamp_file, serde_json::to_vec_pretty(&stamp)?)?;
    Ok(Root {
        dir: root,
        release: stamp.release,
    })
}

/// Downloads `package` in the version of `other`, a package of the suite's tree. Returns its file.
pub fn download_beside(
    paths: &Paths,
    suite: &Suite,
    other: &str,
    package: &str,
) -> Result<PathBuf> {
    let base = paths.base.join(suite.name);
    let stamp = read_stamp(&base.join("stamp.json"), suite);
    let stamp = stamp.context("the suite is not unpacked")?;
    let version = stamp.files.iter().find_map(|file| {
        let (name, rest) = file.split_once('_')?;
        (name == other).then(|| rest.split('_').next())?
    });
    let version = version.with_context(|| format!("{} has no {other}", suite.name))?;
    let debs = base.join("debs");
    std::fs::create_dir_all(&debs)?;
    let file = debs.join(format!("{package}_{version}_all.deb"));
    if !file.is_file() {
        let apt = Apt::prepare(&base, suite)?;
        eprintln!("xtest: {}: downloading {package}", suite.name);
        let wanted = format!("{package}={}", version.replace("%3a", ":"));
        apt.run("apt-get", &["download", "-q", &wanted])?;
    }
    ensure!(
        file.is_file(),
        "apt-get download gave no {}",
        file.display()
    );
    Ok(file)
}

/// Downloads these packages of the suite and all that they depend on, as far as they are not there. Returns their files. What
/// was chosen is noted in the file `listed`, and holds until other packages are wanted.
pub fn package_files(
    paths: &Paths,
    suite: &Suite,
    packages: &[&str],
    listed: &Path,
) -> Result<Vec<PathBuf>> {
    let base = paths.base.join(suite.name);
    let debs = base.join("debs");
    let in_debs = |files: BTreeSet<String>| files.into_iter().map(|f| debs.join(f)).collect();
    let known = std::fs::read(listed).ok();
    let known = known.and_then(|text| serde_json::from_slice::<Listed>(&text).ok());
    if let Some(known) = known.filter(|k| k.packages == packages) {
        if known.files.iter().all(|f| debs.join(f).is_file()) {
            return Ok(in_debs(known.files));
        }
    }
    let apt = Apt::prepare(&base, suite)?;
    let files = apt.get(apt.closure(packages)?)?;
    let list = Listed {
        packages: owned(packages),
        files: files.clone(),
    };
    std::fs::write(listed, serde_json::to_vec_pretty(&list)?)?;
    Ok(in_debs(files))
}

/// Packages that were wanted, and the files that this means.
#[derive(Debug, Serialize, Deserialize)]
struct Listed {
    packages: Vec<String>,
    files: BTreeSet<String>,
}

fn read_stamp(file: &Path, suite: &Suite) -> Option<Stamp> {
    let stamp: Stamp = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    (stamp.format == FORMAT && stamp.packages == suite.packages && stamp.only == suite.only)
        .then_some(stamp)
}

fn download(base: &Path, suite: &Suite) -> Result<Stamp> {
    let apt = Apt::prepare(base, suite)?;
    eprintln!("xtest: {}: reading package lists", suite.name);
    if let Err(e) = apt.run("apt-get", &["update", "-q"]) {
        // The lists of an earlier run may do.
        eprintln!("xtest: warning: {e:#}");
    }
    let release = apt.kernel_release()?;
    let mut closure = apt.closure(suite.packages)?;
    closure.retain(|p| {
        let begins = |list: &[&str]| list.iter().any(|s| p.file.starts_with(s));
        match suite.only {
            [] => !begins(SKIP),
            only => begins(only),
        }
    });
    Ok(Stamp {
        format: FORMAT,
        packages: owned(suite.packages),
        only: owned(suite.only),
        release,
        files: apt.get(closure)?,
    })
}

fn owned(list: &[&str]) -> Vec<String> {
    list.iter().map(|&p| p.to_owned()).collect()
}

fn unpack(debs: &Path, root: &Path, stamp: &Stamp) -> Result<()> {
    eprintln!("xtest: unpacking {} packages", stamp.files.len());
    if root.exists() {
        std::fs::remove_dir_all(root)?;
    }
    std::fs::create_dir_all(root)?;
    for file in &stamp.files {
        let mut cmd = Command::new("dpkg-deb");
        checked(cmd.arg("-x").arg(debs.join(file)).arg(root))?;
    }
    Ok(())
}

/// One package of a closure.
#[derive(Debug)]
struct Package {
    /// As apt takes it: `name=version`.
    versioned: String,
    /// Name of the downloaded file.
    file: String,
    size: u64,
}

/// The host's apt, with a private state.
struct Apt {
    conf: PathBuf,
    debs: PathBuf,
}

impl Apt {
    fn prepare(base: &Path, suite: &Suite) -> Result<Self> {
        ensure!(
            Path::new(KEYRING).is_file(),
            "{KEYRING} is missing: install debian-archive-keyring"
        );
        let dir = base.join("apt");
        for sub in ["state/lists/partial", "cache/archives/partial", "etc/none"] {
            std::fs::create_dir_all(dir.join(sub))?;
        }
        std::fs::write(dir.join("status"), "")?;
        std::fs::write(dir.join("etc/sources.list"), sources(suite)?)?;
        std::fs::write(dir.join("etc/preferences"), PREFERENCES)?;
        let d = dir
            .to_str()
            .context("the target folder's path is not UTF-8")?;
        let conf = dir.join("apt.conf");
        std::fs::write(&conf, configuration(d))?;
        Ok(Self {
            conf,
            debs: base.join("debs"),
        })
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut cmd = Command::new(program);
        cmd.arg("-c")
            .arg(&self.conf)
            .args(args)
            .current_dir(&self.debs)
            .env("LC_ALL", "C");
        let out = checked(&mut cmd)?;
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// The kernel release that `linux-image-amd64` depends on at present.
    fn kernel_release(&self) -> Result<String> {
        let text = self.run("apt-cache", &["depends", "linux-image-amd64"])?;
        let name = text
            .lines()
            .find_map(|l| l.trim().strip_prefix("Depends: linux-image-"));
        Ok(name
            .context("linux-image-amd64 depends on no kernel")?
            .trim()
            .to_owned())
    }

    /// Downloads packages that are not there, and returns the names of all files.
    fn get(&self, closure: Vec<Package>) -> Result<BTreeSet<String>> {
        let size = |p: &Package| self.debs.join(&p.file).metadata().map(|m| m.len());
        let missing: Vec<&str> = closure
            .iter()
            .filter(|p| !size(p).is_ok_and(|size| size == p.size))
            .map(|p| p.versioned.as_str())
            .collect();
        if !missing.is_empty() {
            eprintln!("xtest: downloading {} packages", missing.len());
            let mut args = vec!["download", "-q"];
            args.extend(missing);
            self.run("apt-get", &args)?;
        }
        let files: BTreeSet<String> = closure.into_iter().map(|p| p.file).collect();
        for file in &files {
            ensure!(
                self.debs.join(file).is_file(),
                "apt-get download gave no {file}"
            );
        }
        Ok(files)
    }

    /// These packages, and all that they depend on.
    fn closure(&self, packages: &[&str]) -> Result<Vec<Package>> {
        let mut args = vec![
            "install",
            "-qq",
            "-y",
            "--no-install-recommends",
            "--print-uris",
        ];
        args.extend(packages);
        let text = self.run("apt-get", &args)?;
        let mut all = Vec::new();
        for line in text.lines().filter(|l| l.starts_with('\'')) {
            // 'URI' name_version_arch.deb size hash
            let mut words = line.split_whitespace().skip(1);
            let (Some(file), Some(size)) = (words.next(), words.next()) else {
                bail!("apt-get --print-uris printed a line that is not understood: {line}");
            };
            let mut parts = file.splitn(3, '_');
            let (Some(name), Some(version)) = (parts.next(), parts.next()) else {
                bail!("{file}: not the name of a package file");
            };
            let versioned = format!("{name}={}", version.replace("%3a", ":"));
            all.push(Package {
                versioned,
                file: file.to_owned(),
                size: size.parse()?,
            });
        }
        ensure!(!all.is_empty(), "apt found no package to download");
        Ok(all)
    }
}

/// apt's options: private state and cache; of the host's options only how to reach mirrors.
fn configuration(dir: &str) -> String {
    format!(
        r#"#clear APT::Update;
#clear DPkg;
Dir::State "{dir}/state";
Dir::State::lists "{dir}/state/lists";
Dir::State::status "{dir}/status";
Dir::State::extended_states "{dir}/state/extended_states";
Dir::Cache "{dir}/cache";
Dir::Cache::archives "{dir}/cache/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Etc::sourcelist "{dir}/etc/sources.list";
Dir::Etc::sourceparts "{dir}/etc/none";
Dir::Etc::preferences "{dir}/etc/preferences";
Dir::Etc::preferencesparts "{dir}/etc/none";
APT::Sandbox::User "";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
Debug::NoLocking "true";
"#
    )
}

/// The suite's `sources.list`, with the mirrors that the host uses.
fn sources(suite: &Suite) -> Result<String> {
    let format = "$(IDENTIFIER) $(REPO_URI) $(LABEL)";
    let out = checked(Command::new("apt-get").args(["indextargets", "--format", format]))?;
    let text = String::from_utf8_lossy(&out.stdout);
    let (main, security) = mirrors(&text);
    let main = main.context(
        "the host's apt knows no Debian archive (`apt-get indextargets`): add one to its sources",
    )?;
    let mut list = format!("deb [signed-by={KEYRING}] {main} {} main\n", suite.name);
    if let (true, Some(security)) = (suite.security, security) {
        list += &format!(
            "deb [signed-by={KEYRING}] {security} {}-security main\n",
            suite.name
        );
    }
    Ok(list)
}

/// Base addresses of the main and the security archive. The host knows the labels of archives only after
/// it has read their lists; before that the last part of the address decides.
fn mirrors(targets: &str) -> (Option<String>, Option<String>) {
    let (mut main, mut security) = (None, None);
    for line in targets.lines() {
        let mut words = line.split_whitespace();
        let (Some("Packages"), Some(uri)) = (words.next(), words.next()) else {
            continue;
        };
        let last = uri
            .trim_end_matches('/')
            .rsplit('/')
            .next()
            .unwrap_or_default();
        let slot = match (words.next(), last) {
            (Some("Debian"), _) | (None, "debian") => &mut main,
            (Some("Debian-Security"), _) | (None, "debian-security") => &mut security,
            _ => continue,
        };
        slot.get_or_insert_with(|| uri.to_owned());
    }
    (main, security)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_are_told_apart_by_label_or_by_address() {
        let labelled = "Packages mirror://a/x/ Debian\nDEP-11 mirror://a/x/ Debian\n\
                        Packages mirror://a/y/ Debian-Security\nPackages other://z/ Other\n";
        let (main, security) = mirrors(labelled);
        assert_eq!(main.as_deref(), Some("mirror://a/x/"));
        assert_eq!(security.as_deref(), Some("mirror://a/y/"));
        let (main, security) = mirrors("Packages m://a/debian-security/ \nPackages m://a/debian/ ");
        assert_eq!(main.as_deref(), Some("m://a/debian/"));
        assert_eq!(security.as_deref(), Some("m://a/debian-security/"));
    }
}
