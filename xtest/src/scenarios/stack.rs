//! Patches to the same functions: stacked, reverted in order, and all superseded at once.

use std::time::Duration;

use serde_json::Value;

use super::steps::patches::{CMDLINE, SLEEPER, THREE, TWO};
use super::steps::{daemon, sleepers, tool};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "stack-pv",
        summary:
            "patches to one function of a PV guest stack, are reverted in order, and are superseded",
        profile: &PV1,
        run: |ctx| stack(ctx, Kind::Pv),
    },
    Scenario {
        name: "stack-pvh",
        summary:
            "patches to one function of a PVH guest stack, are reverted in order, and are superseded",
        profile: &PVH,
        run: |ctx| stack(ctx, Kind::Pvh),
    },
];

/// Replaces `version_proc_show`: word "all". The payload itself says that it supersedes all other patches.
const ALL: &str = "locus_stack_all";

struct Test<'c> {
    ctx: &'c Ctx,
    guest: Guest,
}

impl Test<'_> {
    /// Runs `xen-locus -o json WORDS`. Returns exit code, object and stderr.
    fn run(&self, words: &str) -> Result<(i32, Value, String), Verdict> {
        let command = format!("xen-locus -o json {words}");
        let out = self
            .ctx
            .dom0
            .sh_timeout(&command, Duration::from_secs(120))?;
        let object = out.json()?;
        Ok((out.rc, object, out.err_text()))
    }

    /// Runs `VERB GUEST FILE-OR-NAME`, which must succeed with `result`.
    fn does(&self, verb: &str, patch: &str, result: &str) -> Result<Value, Verdict> {
        let name = &self.guest.name;
        let words = match verb {
            "revert" => format!("revert {name} {patch}"),
            _ => format!("{verb} {name} /payloads/{patch}.ko"),
        };
        let (rc, report, said) = self.run(&words)?;
        check_eq!(rc, 0, "{words}: {said}");
        check_eq!(report["result"], result, "{words}: {report}");
        check_eq!(report["patch"], patch, "{words}: {report}");
        Ok(report)
    }

    /// Runs a command that must be refused with exit code 1, and say all of `words`.
    fn refused(&self, command: &str, words: &[&str]) -> Result<(), Verdict> {
        let (rc, report, said) = self.run(command)?;
        check_eq!(rc, 1, "{command}: {said}");
        check_eq!(report["result"], "failed", "{command}: {report}");
        for word in words {
            let message = report["message"].as_str().unwrap_or_default();
            check!(
                message.contains(word) && said.contains(word),
                "{command}: {word:?} is not in {message:?}"
            );
        }
        Ok(())
    }

    /// Checks the words in the guest's `/proc/cmdline` and `/proc/version`, empty for the kernel's own text; and
    /// the patches that `status` lists, undermost first.
    fn shows(&self, cmdline: &str, version: &str, patches: &[&str]) -> Result<Value, Verdict> {
        tool::shows(self.ctx, &self.guest, [cmdline, version, ""], patches)
    }

    /// The patch that covers `function` of patch number `patch` in a status.
    fn covered(status: &Value, patch: usize, function: &str) -> Value {
        let functions = status["patches"][patch]["functions"].as_array();
        functions
            .and_then(|all| all.iter().find(|f| f["name"] == function))
            .map_or(Value::from("no such function"), |f| f["covered_by"].clone())
    }

    /// Arena pages in use.
    fn pages(&self) -> Result<Value, Verdict> {
        let info = self.run(&format!("info {}", self.guest.name))?.1;
        Ok(info["arena"].clone())
    }

    fn save_text(&self, file: &str) -> Result<(), Verdict> {
        let command = format!("xen-locus info {} --raw text >{file}", self.guest.name);
        self.ctx.dom0.ok(&command)?;
        Ok(())
    }
}

fn stack(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    let test = Test { ctx, guest };
    test.shows("", "", &[])?;
    test.save_text("/tmp/text.before")?;
    in_order(&test)?;
    let pages = test.pages()?;
    for patch in [CMDLINE, TWO] {
        test.does("apply", patch, "applied")?;
    }
    for patch in [TWO, CMDLINE] {
        test.does("revert", patch, "reverted")?;
    }
    test.shows("", "", &[])?;
    check_eq!(test.pages()?, pages, "arena pages after doing it again");
    superseded(&test)?;
    blocked(&test)?;
    through_xenstore(&test)?;
    all_at_once(&test)?;
    test.save_text("/tmp/text.after")?;
    let same = ctx.dom0.sh(
        "test $(wc -c </tmp/text.before) -gt 8000000 && cmp /tmp/text.before /tmp/text.after",
    )?;
    check_eq!(
        same.rc,
        0,
        "the kernel's text is not what it was: {} {}",
        same.text(),
        same.err_text()
    );
    ctx.dom0.ok("rm -f /tmp/text.before /tmp/text.after")?;
    Ok(())
}

/// Two patches to one function, in either order. Only the last one can be reverted.
fn in_order(test: &Test<'_>) -> Result<(), Verdict> {
    let name = &test.guest.name;
    test.does("apply", CMDLINE, "applied")?;
    test.shows("live", "", &[CMDLINE])?;
    test.does("apply", TWO, "applied")?;
    let status = test.shows("two", "two", &[CMDLINE, TWO])?;
    check_eq!(Test::covered(&status, 0, "cmdline_proc_show"), TWO);
    check_eq!(
        Test::covered(&status, 1, "cmdline_proc_show"),
        Value::Null,
        "{status}"
    );
    let table = test.ctx.dom0.ok(&format!("xen-locus status {name}"))?;
    check!(
        table.contains("cmdline_proc_show (covered by locus_stack_two)"),
        "{table}"
    );
    test.refused(
        &format!("revert {name} {CMDLINE}"),
        &["can't be reverted", TWO, "cmdline_proc_show"],
    )?;
    test.refused(
        &format!("-N revert {name} {CMDLINE}"),
        &["can't be reverted"],
    )?;
    // A payload with the same name and another content.
    let [mine, other] = [
        format!("/payloads/{CMDLINE}.ko"),
        format!("/tmp/{CMDLINE}.ko"),
    ];
    let sums = test.ctx.dom0.ok(&format!(
        "cp {mine} {other} && echo >>{other} && sha256sum {mine} {other} | cut -d' ' -f1"
    ))?;
    let sums: Vec<&str> = sums.lines().collect();
    check_eq!(sums.len(), 2, "{sums:?}");
    for verb in ["apply", "replace"] {
        test.refused(&format!("{verb} {name} {other}"), &sums)?;
    }
    test.shows("two", "two", &[CMDLINE, TWO])?;
    test.does("revert", TWO, "reverted")?;
    test.shows("live", "", &[CMDLINE])?;
    test.does("revert", CMDLINE, "reverted")?;
    test.shows("", "", &[])?;

    // Applied again in the other order: the last one is on top.
    test.does("apply", TWO, "applied")?;
    test.does("apply", CMDLINE, "applied")?;
    let status = test.shows("live", "two", &[TWO, CMDLINE])?;
    check_eq!(Test::covered(&status, 0, "cmdline_proc_show"), CMDLINE);
    check_eq!(
        Test::covered(&status, 0, "version_proc_show"),
        Value::Null,
        "{status}"
    );
    test.refused(
        &format!("revert {name} {TWO}"),
        &["can't be reverted", CMDLINE],
    )?;
    test.does("revert", CMDLINE, "reverted")?;
    test.shows("two", "two", &[TWO])?;
    test.does("revert", TWO, "reverted")?;
    test.shows("", "", &[])?;
    Ok(())
}

/// `replace`, and a payload that itself says that it supersedes other patches.
fn superseded(test: &Test<'_>) -> Result<(), Verdict> {
    test.does("apply", CMDLINE, "applied")?;
    test.does("apply", TWO, "applied")?;
    let both = Value::from(vec![CMDLINE, TWO]);
    let report = test.does("-N replace", THREE, "would-apply")?;
    check_eq!(report["superseded"], both, "{report}");
    test.shows("two", "two", &[CMDLINE, TWO])?;
    let report = test.does("replace", THREE, "applied")?;
    check_eq!(report["superseded"], both, "{report}");
    // A function that only a superseded patch replaced is the kernel's own again.
    test.shows("three", "", &[THREE])?;
    test.does("replace", THREE, "already")?;
    test.does("revert", THREE, "reverted")?;
    test.shows("", "", &[])?;

    test.does("apply", CMDLINE, "applied")?;
    test.does("apply", TWO, "applied")?;
    let report = test.does("apply", ALL, "applied")?;
    check_eq!(report["superseded"], both, "{report}");
    test.shows("", "all", &[ALL])?;
    test.does("apply", THREE, "applied")?;
    test.shows("three", "all", &[ALL, THREE])?;
    let again = format!("replace {} /payloads/{ALL}.ko", test.guest.name);
    test.refused(&again, &["can't supersede itself"])?;
    let out = test.ctx.dom0.ok(&format!(
        "xen-locus replace {} /payloads/{CMDLINE}.ko",
        test.guest.name
    ))?;
    check!(
        out.contains("superseding locus_stack_all, locus_stack_three"),
        "{out}"
    );
    test.shows("live", "", &[CMDLINE])?;
    test.does("revert", CMDLINE, "reverted")?;
    test.shows("", "", &[])?;
    Ok(())
}

/// A thread in the code of a patch that is to be superseded blocks `replace`, and nothing changes.
fn blocked(test: &Test<'_>) -> Result<(), Verdict> {
    let name = &test.guest.name;
    test.does("apply", SLEEPER, "applied")?;
    test.does("apply", CMDLINE, "applied")?;
    sleepers::begin(&test.guest, 1, 1)?;
    let (rc, report, said) =
        test.run(&format!("replace {name} /payloads/{THREE}.ko --timeout 2s"))?;
    check_eq!(rc, 2, "{said}");
    check_eq!(report["result"], "blocked", "{report}");
    check_eq!(report["blockers"][0]["comm"], "pause", "{report}");
    test.shows("live", "", &[SLEEPER, CMDLINE])?;
    sleepers::end(&test.guest)?;
    test.does("replace", THREE, "applied")?;
    test.shows("three", "", &[THREE])?;
    test.does("revert", THREE, "reverted")?;
    test.shows("", "", &[])?;
    Ok(())
}

/// The same by requests through XenStore.
fn through_xenstore(test: &Test<'_>) -> Result<(), Verdict> {
    let dom0 = &test.ctx.dom0;
    let (name, id) = (&test.guest.name, test.guest.domid);
    dom0.ok("xenstore-rm /tool/xen-locus/request 2>/dev/null || true")?;
    daemon::start(test.ctx)?;
    let ask = |request: &str, rc: &str, words: &str| daemon::ask(test.ctx, request, rc, words);
    test.does("apply", CMDLINE, "applied")?;
    ask(
        &format!("s1 op=apply domain={name} patch={TWO}"),
        "0",
        "applied",
    )?;
    test.shows("two", "two", &[CMDLINE, TWO])?;
    ask(
        &format!("s2 op=revert domain={name} patch={CMDLINE}"),
        "1",
        "can't be reverted while another lies on it",
    )?;
    ask(
        &format!("s3 op=replace domain={name} patch={THREE}"),
        "0",
        "superseding locus_cmdline, locus_stack_two",
    )?;
    test.shows("three", "", &[THREE])?;
    let published = dom0.ok(&format!("xenstore-list /tool/xen-locus/domain/{id}/patch"))?;
    check_eq!(published, THREE, "what is published");
    ask(
        &format!("s4 op=revert domain={name} patch={THREE}"),
        "0",
        "reverted",
    )?;
    test.shows("", "", &[])?;
    daemon::stop(test.ctx)
}

/// `revert --all` reverts from the top; a second one has nothing to do.
fn all_at_once(test: &Test<'_>) -> Result<(), Verdict> {
    let name = &test.guest.name;
    for patch in [CMDLINE, TWO, THREE] {
        test.does("apply", patch, "applied")?;
    }
    test.shows("three", "two", &[CMDLINE, TWO, THREE])?;
    for (words, result) in [("-N revert", "would-revert"), ("revert", "reverted")] {
        let (rc, done, said) = test.run(&format!("{words} {name} --all"))?;
        check_eq!(rc, 0, "{words} --all: {said}");
        for (i, patch) in [THREE, TWO, CMDLINE].iter().enumerate() {
            check_eq!(done["results"][i]["patch"], *patch, "{done}");
            check_eq!(done["results"][i]["result"], result, "{done}");
        }
    }
    test.shows("", "", &[])?;
    let (rc, done, said) = test.run(&format!("revert {name} --all"))?;
    check_eq!(rc, 0, "nothing to revert: {said}");
    check_eq!(done["results"], Value::Array(vec![]), "{done}");
    Ok(())
}
