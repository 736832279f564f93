//! What scenario authors use: [`Scenario`], and [`Ctx`], the running machine.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::dom0::Dom0;
use crate::guest::{Guest, GuestSpec, Kind};
use crate::kernels::Kernels;
use crate::profile::Profile;
use crate::suites::BOOKWORM;
use crate::verdict::Verdict;
use crate::watched::{Look, Watched, LOST};

/// How often the start of a PVH or HVM guest is tried. QEMU's SVM emulation loses some guests while they boot,
/// before xen-locus has touched them.
const STARTS: u32 = 3;
/// After the end of a long pause, the time in which a guest has reported that its CPUs were stuck.
const REPORTED: Duration = Duration::from_secs(3);

/// A test of the suite.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// Unique, in `kebab-case`.
    pub name: &'static str,
    /// What it shows, in one sentence.
    pub summary: &'static str,
    /// The machine it runs on.
    pub profile: &'static Profile,
    /// The test itself.
    pub run: fn(&mut Ctx) -> Result<(), Verdict>,
}

/// The machine a scenario runs on.
#[derive(Debug)]
pub struct Ctx {
    /// The control domain.
    pub dom0: Dom0,
    /// Release of the guests' kernel (`uname -r`).
    pub release: String,
    /// Built payloads on the host: `NAME/NAME.ko`. In dom0 they are at `/payloads/NAME.ko`.
    pub payloads: PathBuf,
    /// Guest kernels of other releases of Debian.
    pub kernels: Arc<Kernels>,
    guests: BTreeMap<String, (GuestSpec, Guest)>,
    /// How far the machine's consoles were read.
    consoles: Watched,
    told: Told,
}

/// What a scenario tells the runner, and what the runner asks of it.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Words of console lines that the scenario provokes.
    pub(crate) expects: RefCell<Vec<String>>,
    /// Guests are paused for so long that they take themselves for stuck.
    pub(crate) long_pauses: Cell<bool>,
    /// The scenario must fail, with these words.
    pub(crate) must_fail: RefCell<Option<String>>,
    /// No other scenario can run on this machine.
    pub(crate) uses_up: Cell<bool>,
    /// Guests that were started again, because QEMU lost them.
    pub(crate) started_again: Cell<u32>,
    /// Stalls of guests that the machine caused.
    pub(crate) excused: Cell<usize>,
    /// Releases of Debian whose kernels guests booted.
    pub(crate) suites: RefCell<BTreeSet<&'static str>>,
}

impl Told {
    /// Adds what one scenario within another told and what counts for the whole. What it expects of consoles does not.
    fn count(&mut self, inner: Self) {
        self.uses_up.set(self.uses_up.get() || inner.uses_up.get());
        let again = &self.started_again;
        again.set(again.get() + inner.started_again.get());
        self.excused.set(self.excused.get() + inner.excused.get());
        self.suites.get_mut().extend(inner.suites.into_inner());
    }
}

impl Ctx {
    /// A context for a machine that has just booted.
    pub(crate) fn new(
        dom0: Dom0,
        release: String,
        payloads: PathBuf,
        kernels: Arc<Kernels>,
        consoles: Watched,
    ) -> Self {
        Self {
            dom0,
            release,
            payloads,
            kernels,
            guests: BTreeMap::new(),
            consoles,
            told: Told::default(),
        }
    }

    /// Says that the scenario provokes a console line with these words in it, of a guest, of dom0 or of Xen. Any other
    /// line that says that something is broken fails the scenario, whatever it looks at itself.
    pub fn expects(&self, words: &str) {
        self.told.expects.borrow_mut().push(words.to_owned());
    }

    /// Says that the scenario leaves guests paused for longer than the tool ever does. To a guest's watchdog, time that
    /// went on meanwhile looks like a CPU that was stuck, and RCU says the same: Xen does not set
    /// `PVCLOCK_GUEST_STOPPED`.
    pub fn expects_long_pauses(&self) {
        self.told.long_pauses.set(true);
    }

    /// Says that this scenario must fail, with these words: it shows that the testbed notices something.
    pub fn must_fail(&self, words: &str) {
        *self.told.must_fail.borrow_mut() = Some(words.to_owned());
    }

    /// Says that the scenario leaves a machine on which nothing else can run. The next one gets a new boot.
    pub fn uses_up_the_machine(&self) {
        self.told.uses_up.set(true);
    }

    /// A scenario begins: it has told nothing yet.
    pub(crate) fn begin(&mut self) {
        self.told = Told::default();
    }

    /// A scenario has ended: looks at all consoles, and judges them by what it told. Returns that, and what is wrong in
    /// words; empty if nothing is.
    pub(crate) fn end(&mut self, ended_well: bool) -> (Told, String) {
        let told = std::mem::take(&mut self.told);
        let long_pauses = told.long_pauses.get();
        if long_pauses && !ended_well {
            // Otherwise the next scenario would be blamed.
            std::thread::sleep(REPORTED);
        }
        let expected = told.expects.take();
        let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
        let Look { wrong, excused } = self.consoles.look(&self.dom0, &expected, long_pauses);
        told.excused.set(told.excused.get() + excused);
        (told, wrong)
    }

    /// Runs a scenario within this one, which expects nothing of the consoles itself. What the inner one expects is
    /// excused there alone. Returns its result.
    ///
    /// # Errors
    ///
    /// [`Verdict::Failure`] if a console says that something is broken.
    pub(crate) fn within(&mut self, scenario: &Scenario) -> Result<Result<(), Verdict>, Verdict> {
        let own = std::mem::take(&mut self.told);
        let result = (scenario.run)(self);
        let (inner, wrong) = self.end(result.is_ok());
        self.told = own;
        self.told.count(inner);
        if wrong.is_empty() {
            return Ok(result);
        }
        let name = scenario.name;
        Err(Verdict::Failure(format!("{name}: {}", wrong.trim_end())))
    }

    /// The text of Xen's and dom0's console since the last look.
    pub(crate) fn xen_said(&self) -> String {
        self.consoles.peek_xen().0
    }

    /// Returns a running guest that responds. A guest of an earlier scenario is used if its specification is equal.
    pub fn ensure_guest(&mut self, spec: GuestSpec) -> Result<Guest, Verdict> {
        if let Some((known, guest)) = self.guests.get(&spec.name) {
            let limit = Duration::from_secs(30);
            if *known == spec && guest.try_sh("true", limit, limit).is_ok() {
                return Ok(guest.clone());
            }
        }
        self.told.suites.borrow_mut().insert(spec.suite.name);
        self.place_kernel(&spec)?;
        let guest = self.start(&spec);
        if *spec.suite != BOOKWORM {
            // dom0's files are in memory, and these are not needed any more.
            self.dom0.ok(&format!("rm -f {}/*", spec.boot_dir()))?;
        }
        let guest = guest?;
        self.guests.insert(spec.name.clone(), (spec, guest.clone()));
        Ok(guest)
    }

    /// Starts a guest, and again if the emulation loses it while it boots.
    fn start(&mut self, spec: &GuestSpec) -> Result<Guest, Verdict> {
        let starts = if spec.kind == Kind::Pv { 1 } else { STARTS };
        let mut start = 1;
        loop {
            self.destroy_guest(&spec.name)?;
            match Guest::start(&self.dom0, spec) {
                Err(Verdict::Crash(why))
                    if start < starts && !self.dom0.is_down() && !self.daemon_runs()? =>
                {
                    let name = &spec.name;
                    eprintln!("xtest: guest {name} is started again ({start} of {starts}): {why}");
                    self.lost(name)?;
                    start += 1;
                }
                other => return other,
            }
        }
    }

    /// Whether the daemon runs, which looks at guests and may change them while they boot.
    fn daemon_runs(&self) -> Result<bool, Verdict> {
        let found = self.dom0.sh(
            "grep -lz '^daemon$' $(grep -l xen-locus /proc/[0-9]*/comm | sed s/comm/cmdline/) \
                 /dev/null 2>/dev/null",
        )?;
        Ok(!found.text().is_empty())
    }

    /// Notes that QEMU lost a guest while it started. What the consoles say of that does not count.
    fn lost(&self, name: &str) -> Result<(), Verdict> {
        self.dom0
            .sh(&format!("echo '{LOST}' >>/var/log/guest-{name}.log"))?;
        let domid = self.dom0.sh(&format!("xl domid {name}"))?.text();
        if !domid.is_empty() {
            self.expects(&format!("(XEN) d{domid}v"));
            self.expects(&format!("(XEN) Domain {domid} (vcpu"));
        }
        let again = &self.told.started_again;
        again.set(again.get() + 1);
        Ok(())
    }

    /// Copies what the guest boots into dom0, and payloads for it to `/payloads/SUITE`. Those of Debian 12 are
    /// already in dom0's image.
    fn place_kernel(&self, spec: &GuestSpec) -> Result<(), Verdict> {
        if *spec.suite == BOOKWORM {
            return Ok(());
        }
        let kernel = self.kernels.get(spec.suite)?;
        let file = if spec.kernel_file() == "vmlinuz" {
            &kernel.vmlinuz
        } else {
            &kernel.vmlinux
        };
        let dir = spec.boot_dir();
        let mut files = vec![
            (format!("{dir}/{}", spec.kernel_file()), file),
            (format!("{dir}/initrd.gz"), &kernel.initrd),
        ];
        for (name, file) in &kernel.payloads {
            files.push((format!("/payloads/{}/{name}.ko", spec.suite.name), file));
        }
        for (path, file) in files {
            self.dom0.put(&path, 0o644, &std::fs::read(file)?)?;
        }
        Ok(())
    }

    /// A guest that [`Self::ensure_guest`] has started.
    pub fn guest(&self, name: &str) -> Result<Guest, Verdict> {
        let found = self.guests.get(name).map(|(_, guest)| guest.clone());
        found.ok_or_else(|| Verdict::Error(format!("no guest {name} was started")))
    }

    /// Registers a guest that was started by other means (`xl restore`, `xl create`).
    pub fn adopt_guest(&mut self, spec: GuestSpec) -> Result<Guest, Verdict> {
        let guest = Guest::attach(&self.dom0, &spec.name)?;
        self.guests.insert(spec.name.clone(), (spec, guest.clone()));
        Ok(guest)
    }

    /// Destroys a guest, whatever its state. It may be missing.
    pub fn destroy_guest(&mut self, name: &str) -> Result<(), Verdict> {
        self.guests.remove(name);
        self.dom0.sh(&format!(
            "xl domid {name} >/dev/null 2>&1 && xl destroy {name}"
        ))?;
        Ok(())
    }

    /// Destroys all guests, including those that are not registered.
    pub fn destroy_all(&mut self) -> Result<(), Verdict> {
        self.guests.clear();
        let each = "xl list | awk 'NR>1 && $2>0 {print $2}' | while read d; do xl destroy $d; done";
        self.dom0.sh(each)?;
        Ok(())
    }

    /// Runs a command in dom0 that must end with 0 and print JSON.
    pub fn json(&self, cmd: &str) -> Result<serde_json::Value, Verdict> {
        let out = self.dom0.sh(cmd)?;
        if out.rc != 0 {
            return Err(Verdict::failure(format!(
                "`{cmd}` ended with {}: {} {}",
                out.rc,
                out.text(),
                out.err_text()
            )));
        }
        out.json()
    }

    /// The lines of `xl list` about guests that have crashed.
    pub(crate) fn crashed(&self) -> Vec<String> {
        // Without xenstored it would wait for ever.
        let cmd = "[ -S /run/xenstored/socket ] && timeout 60 xl list";
        let Ok(list) = self.dom0.sh(cmd) else {
            return Vec::new();
        };
        let dead = |state: &str| state.contains('c') || state.contains('s');
        list.text()
            .lines()
            .skip(1)
            .filter(|l| l.split_whitespace().nth(4).is_some_and(dead))
            .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_inner_scenario_expects_is_not_expected_of_the_next() {
        let mut told = Told::default();
        let inner = Told::default();
        inner.expects.borrow_mut().push("BUG:".to_owned());
        inner.long_pauses.set(true);
        inner.started_again.set(2);
        inner.excused.set(1);
        inner.suites.borrow_mut().insert("trixie");
        told.count(inner);
        assert_eq!((told.started_again.get(), told.excused.get()), (2, 1));
        assert!(told.suites.borrow().contains("trixie"));
        assert!(told.expects.borrow().is_empty() && !told.long_pauses.get());
    }
}
