//! Guests are destroyed while a patch is applied to them.

use std::time::Duration;

use crate::guest::{GuestSpec, Kind};
use crate::profile::{PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::scenarios::steps::patches::PAIR;
use crate::scenarios::steps::tool::{self, shows_now};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "destroy-pv",
    summary:
        "a guest that is destroyed during an apply is reported as gone, and nothing is left of it",
    profile: &PV1,
    run: |ctx| {
        destroy(
            ctx,
            Kind::Pv,
            &["1:stop:journal", "40:stop:journal"],
            &[600],
        )
    },
}];

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "destroy-all-pv",
        summary: "a PV guest is destroyed at 12 places and 12 random moments of an apply",
        profile: &PV1,
        run: |ctx| destroy(ctx, Kind::Pv, PLACES, DELAYS),
    },
    Scenario {
        name: "destroy-all-pvh",
        summary: "a PVH guest is destroyed at 6 places and 6 random moments of an apply",
        profile: &PVH,
        run: |ctx| {
            let (places, _) = PLACES.split_at(6);
            let delays: Vec<u32> = DELAYS.iter().copied().step_by(2).collect();
            destroy(ctx, Kind::Pvh, places, &delays)
        },
    },
];

/// Places at which the run is stopped and the guest destroyed. Then the run goes on.
const PLACES: &[&str] = &[
    "1:stop:journal",
    "8:stop:journal",
    "20:stop:journal",
    "1:stop:guard: spawn",
    "1:stop:mark pausing",
    "1:stop:mark writing",
    "1:stop:mark unpausing",
    "1:stop:guard: end",
    "1:stop:audit: append",
    "30:stop:journal",
    "40:stop:journal",
    "60:stop:journal",
];
/// Times from the start of a run until the guest is destroyed, in milliseconds.
const DELAYS: &[u32] = &[0, 60, 120, 200, 280, 360, 440, 520, 600, 700, 800, 1000];

/// `destroy.sh PLACE DELAY-MS NAME`: prints exit code and messages of the run. The guardian kills a run that is
/// stopped in its pause.
const SCRIPT: &str = r#"
XEN_LOCUS_FAULT="$1" xen-locus-faults apply "$3" /payloads/locus_proc_pair.ko >/tmp/destroy.log 2>&1 &
pid=$!
if [ -n "$1" ]; then
	until grep -q ') [TZ]' /proc/$pid/stat || ! [ -e /proc/$pid/stat ]; do usleep 20000; done 2>/dev/null
else
	usleep "$2"000
fi
xl destroy "$3"
kill -CONT $pid 2>/dev/null
wait $pid
echo "rc $?"
cat /tmp/destroy.log
"#;

/// Domains that Xen still has, including dying ones.
fn domains(ctx: &Ctx) -> Result<String, Verdict> {
    ctx.dom0.ok("xl list | awk 'NR > 1 && $2 > 0'")
}

fn destroy(ctx: &mut Ctx, kind: Kind, places: &[&str], delays: &[u32]) -> Result<(), Verdict> {
    ctx.destroy_all()?;
    ctx.dom0.put("/tmp/destroy.sh", 0o755, SCRIPT.as_bytes())?;
    let spec = GuestSpec::new("victim", kind).memory(128).vcpus(1);
    let stops = places.iter().map(|place| (*place, 0));
    let waits = delays.iter().map(|delay| ("", *delay));
    let mut seen: Vec<String> = Vec::new();
    for (place, delay) in stops.chain(waits) {
        // Otherwise a response of the destroyed guest would be waited for.
        ctx.destroy_guest("victim")?;
        ctx.ensure_guest(spec.clone())?;
        let out = ctx.dom0.sh_timeout(
            &format!("sh /tmp/destroy.sh '{place}' {delay} victim"),
            Duration::from_secs(60),
        )?;
        let when = format!("destroyed at {place:?} or after {delay} ms");
        check!(!out.timed_out, "{when}: the run hangs: {}", out.text());
        let said = out.text();
        let rc = said.lines().next().unwrap_or_default().to_owned();
        match &*rc {
            // Exit 0: the run was over. 137: its guardian killed it, because it was stopped in its pause.
            "rc 0" => check!(said.contains("applied"), "{when}: {said}"),
            "rc 137" => check!(!place.is_empty(), "{when}: {said}"),
            "rc 1" | "rc 2" => check!(
                ["is gone", "there is no domain", "is going away"]
                    .iter()
                    .any(|w| said.contains(w)),
                "{when}: it isn't said that the guest is gone: {said}"
            ),
            _ => return Err(Verdict::failure(format!("{when}: {said}"))),
        }
        seen.push(format!("{place}{delay}: {rc}"));
        nothing_left(ctx, &when)?;
    }
    eprintln!("xtest: {}: {seen:?}", kind.name());
    check!(
        seen.iter().any(|s| !s.ends_with("rc 0")),
        "each run was over before its guest was destroyed: {seen:?}"
    );

    // A new guest of the same name has nothing of the old one.
    ctx.destroy_guest("victim")?;
    let guest = ctx.ensure_guest(spec)?;
    shows_now(ctx, &guest, ["", "", ""], &[])?;
    tool::apply(ctx, "victim", PAIR)?;
    shows_now(ctx, &guest, ["", "live", "live"], &[PAIR])?;
    tool::revert_all(ctx, "victim")?;
    shows_now(ctx, &guest, ["", "", ""], &[])?;
    ctx.destroy_guest("victim")
}

/// Checks that Xen has removed the domain, and that `recover` removes what is noted of it but for its journal, and says so. Then
/// removes the journal.
fn nothing_left(ctx: &Ctx, when: &str) -> Result<(), Verdict> {
    let mut tries = 0;
    while !domains(ctx)?.is_empty() {
        tries += 1;
        check!(tries < 20, "{when}: {}", domains(ctx)?);
        std::thread::sleep(Duration::from_millis(500));
    }
    const GUARDS: &str = "ls /run/xen-locus/guard";
    const JOURNALS: &str = "ls /var/lib/xen-locus/journal";
    let noted = ctx.dom0.sh(&format!("{GUARDS}; {JOURNALS}"))?.text();
    let found = ctx.dom0.ok("xen-locus recover")?;
    check_eq!(
        found.contains(": gone"),
        !noted.is_empty(),
        "{when}: {noted:?} was left, and recover says {found:?}"
    );
    // Its journal is kept: it could be a guest that is saved and comes back.
    let kept = ctx.dom0.sh(JOURNALS)?.text();
    check_eq!(
        found.contains("is kept until it is back"),
        !kept.is_empty(),
        "{when}: {kept:?} is there, and recover says {found:?}"
    );
    let left = ctx.dom0.sh(&format!(
        "{GUARDS}; ls /run/xen-locus/*.lock | grep -v -e daemon -e audit; ps | grep xen-locus-guardia[n]"
    ))?;
    check_eq!(left.text(), "", "{when}: after recover");
    // As recover says: this guest never comes back.
    ctx.dom0.ok("rm -f /var/lib/xen-locus/journal/*").map(drop)
}
