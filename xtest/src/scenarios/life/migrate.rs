//! A guest is migrated to the same host while it runs, and is patched meanwhile.

use std::time::Duration;

use super::text::Text;
use crate::guest::{GuestSpec, Kind};
use crate::profile::{HVM, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::scenarios::steps::patches::{CMDLINE, PAIR};
use crate::scenarios::steps::tool::{self, shows_now};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that take too long for a usual run. No PV: to migrate a running PV guest, Xen
/// needs shadow paging, which Debian's Xen is built without.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "migrate-pvh",
        summary:
            "what is applied and reverted while a PVH guest is migrated is so in the migrated guest",
        profile: &PVH,
        run: |ctx| migrate(ctx, Kind::Pvh),
    },
    Scenario {
        name: "migrate-hvm",
        summary:
            "what is applied and reverted while an HVM guest is migrated is so in the migrated guest",
        profile: &HVM,
        run: |ctx| migrate(ctx, Kind::Hvm),
    },
];

/// `migrate.sh NAME`: applies and reverts a patch until the guest is migrated or a step fails. Prints the exit code
/// of the migration, whether the patch is in force, the number of steps, and exit code and message of the last.
const SCRIPT: &str = r#"
id=$(xl domid "$1")
rm -f /tmp/migrate.rc
(xl migrate -s '' "$1" 'xl migrate-receive' >/tmp/migrate.log 2>&1; echo $? >/tmp/migrate.rc) &
in=no steps=0
until [ -e /tmp/migrate.rc ]; do
	case $in in
	no) next=yes; xen-locus apply "$id" /payloads/locus_proc_pair.ko ;;
	yes) next=no; xen-locus revert "$id" locus_proc_pair ;;
	esac >/tmp/step.log 2>&1
	rc=$?
	[ $rc = 0 ] || break
	in=$next steps=$((steps + 1))
done
wait
echo "$(cat /tmp/migrate.rc) $in $steps ${rc:-0} $(tail -n 1 /tmp/step.log)"
"#;

fn migrate(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let name = &format!("move-{}", kind.name());
    let spec = GuestSpec::new(name, kind);
    let mut guest = ctx.ensure_guest(spec.clone())?;
    guest.start_workload()?;
    let text = Text::of(ctx, name)?;
    ctx.dom0.put("/tmp/migrate.sh", 0o755, SCRIPT.as_bytes())?;
    tool::apply(ctx, name, CMDLINE)?;
    for round in 1..=2 {
        let rounds = guest.rounds()?;
        let old = guest.domid;
        let out = ctx.dom0.sh_timeout(
            &format!("sh /tmp/migrate.sh {name}"),
            Duration::from_secs(300),
        )?;
        let said = out.text();
        eprintln!("xtest: {name}, round {round}: {said}");
        let mut parts = said.splitn(5, ' ');
        let mut part = || parts.next().unwrap_or_default().to_owned();
        let (moved, is_in, steps, rc) = (part(), part(), part(), part());
        check_eq!(moved, "0", "xl migrate: {said}");
        check!(
            steps.parse().is_ok_and(|n: u32| n > 0),
            "no step meanwhile: {said}"
        );
        check!(["0", "1", "2"].contains(&&*rc), "a step ended with {said}");
        guest = ctx.adopt_guest(spec.clone())?;
        check!(guest.domid != old, "it is domain {old} still");
        let (seen, patches) = match &*is_in {
            "yes" => (["live", "live", "live"], &[CMDLINE, PAIR][..]),
            _ => (["live", "", ""], &[CMDLINE][..]),
        };
        shows_now(ctx, &guest, seen, patches)?;
        guest.went_on(rounds)?;
        // The next step resolves what the last one left, on either side.
        tool::apply(ctx, name, PAIR)?;
        shows_now(ctx, &guest, ["live", "live", "live"], &[CMDLINE, PAIR])?;
        tool::revert(ctx, name, PAIR)?;
        shows_now(ctx, &guest, ["live", "", ""], &[CMDLINE])?;
    }
    tool::revert_all(ctx, name)?;
    shows_now(ctx, &guest, ["", "", ""], &[])?;
    text.check(ctx, name, kind)?;
    ctx.destroy_guest(name)
}
