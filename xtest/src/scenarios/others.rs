//! What others can do to the tool, and it to them: their files beside its cache, a payload without CRCs, locks that another
//! user takes, a name that commands a terminal.

use std::collections::BTreeSet;
use std::iter::once;
use std::process::Command;

use super::steps::patches::{self, CMDLINE, CMDLINE_FILE, PAIR};
use super::steps::{daemon, tool};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::host;
use crate::profile::PV1;
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[Scenario {
    name: "others-pv",
    summary: "others' files stay, a name commands no terminal, no other user holds a lock, a payload without CRCs is refused",
    profile: &PV1,
    run: others,
}];

const NAME: &str = "others";
/// What this scenario puts into dom0.
const DIR: &str = "/tmp/others";
/// What the daemon says.
const LOG: &str = "/tmp/others/daemon.log";
/// A payload without CRCs.
const NO_CRCS: &str = "/tmp/others/no-crcs.ko";
/// A file that has [`ODD`] in it.
const NAMED: &str = "/tmp/others/name";
/// A file that everybody may read.
const OPEN: &str = "/tmp/others/open.lock";
/// Locks files as another user: [`SOURCE`].
const LOCKER: &str = "/tmp/others/locker";
/// The folder of the tool's locks, and in it the folder of guardians' files, which are locked too.
const RUN: &str = "/run/xen-locus";
const GUARDIANS: &str = "/run/xen-locus/guard";
/// The user `nobody`, who is not in dom0's list of users.
const NOBODY: u32 = 65534;
/// The UUID of no guest.
const STALE: &str = "11111111-2222-3333-4444-555555555555";

/// A name that sets a terminal's title, clears its screen, goes back to the beginning of the line, begins a line and a column
/// that look like another domain's, has a command of one character, and turns the order of letters.
const ODD: &str = "others\u{1b}]0;owned\u{7}\u{1b}[2J\r\n9  root\tpv\u{9b}1m\u{202e}x";
/// How it is shown.
const SHOWN: &str =
    r"others\u001b]0;owned\u0007\u001b[2J\u000d\u000a9  root\u0009pv\u009b1m\u202ex";
/// The same in JSON.
const IN_JSON: &str = r"others\u001b]0;owned\u0007\u001b[2J\r\n9  root\tpv\u009b1m\u202ex";

/// What flock(1) does, which busybox has not.
const SOURCE: &str = r#"
/* locker UID FILE...: as this user, locks each file, and says how that went. If one is locked, another process holds it
 * from then on, and its id is the last line. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int user = argc > 1 ? atoi(argv[1]) : 0;
	int held = 0;

	if (setgroups(0, NULL) || setgid(user) || setuid(user)) {
		perror("locker");
		return 1;
	}
	for (int i = 2; i < argc; i++) {
		/* flock(2) asks for no more than a file that is open. */
		int file = open(argv[i], O_RDONLY);
		int ok = file >= 0 && flock(file, LOCK_EX | LOCK_NB) == 0;

		printf("%s: %s\n", argv[i], ok ? "locked" : strerror(errno));
		held |= ok;
	}
	fflush(stdout);
	if (!held)
		return 0;
	pid_t holder = fork();

	if (holder < 0) {
		perror("locker");
		return 1;
	}
	if (holder > 0) {
		printf("%d\n", (int)holder);
		return 0;
	}
	setsid();
	for (int fd = 0; fd < 3; fd++)
		close(fd);
	pause();
	return 0;
}
"#;

fn others(ctx: &mut Ctx) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new(NAME, Kind::Pv))?;
    ctx.dom0
        .ok(&format!("rm -rf {DIR} && mkdir -m 755 {DIR}"))?;
    forget_requests(ctx)?;
    cache(ctx, &guest)?;
    without_crcs(ctx, &guest)?;
    locks(ctx, &guest)?;
    name(ctx, &guest)?;
    forget_requests(ctx)?;
    ctx.dom0.ok(&format!("rm -rf {DIR}"))?;
    ctx.destroy_guest(NAME)
}

/// Removes this scenario's requests, if there are any.
fn forget_requests(ctx: &Ctx) -> Result<(), Verdict> {
    let at = daemon::REQUESTS;
    ctx.dom0.ok(&format!(
        "for n in 1 2 3 4; do xenstore-rm {at}/others-$n 2>/dev/null; done; true"
    ))?;
    Ok(())
}

/// The guest's UUID.
fn uuid(ctx: &Ctx, guest: &Guest) -> Result<String, Verdict> {
    let vm = ctx
        .dom0
        .ok(&format!("xenstore-read /local/domain/{}/vm", guest.domid))?;
    Ok(vm.trim_start_matches("/vm/").to_owned())
}

/// In the folder that `--cache` names are 80 files of others, some with names as the cache's own have: all stay as they are.
fn cache(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let (name, uuid) = (&guest.name, uuid(ctx, guest)?);
    let dir = format!("{DIR}/cache");
    ctx.dom0.ok(&format!(
        "mkdir -m 700 {dir} && cd {dir} && for name in $(seq 76) .profile {uuid}.key {uuid}.20240101 \
         .{uuid}.00ff.77; do echo \"$name is somebody's\" >$name || exit 1; done"
    ))?;
    // Each with its digest.
    let files = || -> Result<BTreeSet<String>, Verdict> {
        let said = ctx
            .dom0
            .ok(&format!("cd {dir} && find . -type f | xargs sha256sum"))?;
        Ok(said.lines().map(str::to_owned).collect())
    };
    let before = files()?;
    check_eq!(before.len(), 80, "files of others: {before:?}");
    // The second one finds its own file there.
    let info = format!("xen-locus --cache {dir} info {name}");
    ctx.dom0.ok(&format!("{info} && {info}"))?;
    let after = files()?;
    let gone: Vec<&String> = before.difference(&after).collect();
    check!(gone.is_empty(), "gone, or changed: {gone:?}");
    let new: Vec<&String> = after.difference(&before).collect();
    let own = format!("  ./{uuid}.");
    check!(
        matches!(new[..], [file] if file.contains(&own)),
        "the cache's own file: {new:?}"
    );
    Ok(())
}

/// A payload without the CRCs that its kernel has is refused, by `check` and by `apply`.
fn without_crcs(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let name = &guest.name;
    ctx.dom0
        .ok(&format!("xen-locus check {name} {CMDLINE_FILE}"))?;
    let whole = ctx.payloads.join("locus_cmdline/locus_cmdline.ko");
    let cut = std::env::temp_dir().join(format!("xtest-no-crcs-{}.ko", std::process::id()));
    let mut objcopy = Command::new("objcopy");
    // Debug information refers to the section, which then can't be removed.
    objcopy.args(["--strip-debug", "-R", "__versions"]);
    host::checked(objcopy.args([&whole, &cut]))?;
    let payload = std::fs::read(&cut)?;
    std::fs::remove_file(&cut)?;
    ctx.dom0.put(NO_CRCS, 0o644, &payload)?;
    for command in ["check", "apply"] {
        let command = format!("xen-locus {command} {name} {NO_CRCS}");
        tool::refused(ctx, &command, 3, "no CRC of module_layout")?;
    }
    tool::no_patches(ctx, name)?;
    patches::cmdline_is_untouched(guest)
}

/// Does `work` while the daemon runs. Returns what the daemon said.
fn with_daemon(ctx: &Ctx, work: impl FnOnce() -> Result<(), Verdict>) -> Result<Vec<u8>, Verdict> {
    daemon::start_as(ctx, "xen-locus -v daemon", LOG)?;
    let done = work();
    let stopped = daemon::stop(ctx);
    let log = ctx.dom0.get(LOG)?;
    done.map_err(|verdict| {
        let said = String::from_utf8_lossy(&log);
        Verdict::failure(format!("{verdict}\nthe daemon said: {said:?}"))
    })?;
    stopped?;
    Ok(log)
}

/// A request by the guest's name that must be answered with 0 and this word.
fn ask(ctx: &Ctx, id: &str, op: &str, word: &str) -> Result<(), Verdict> {
    let request = format!("{id} op={op} domain={NAME} patch={CMDLINE}");
    daemon::ask(ctx, &request, "0", word)
}

/// The program that locks files, for dom0.
fn locker() -> Result<Vec<u8>, Verdict> {
    let made = std::env::temp_dir().join(format!("xtest-locker-{}", std::process::id()));
    let path = made.display().to_string();
    let flags = ["-static", "-O2", "-Wall", "-s", "-x", "c", "-", "-o"];
    let args = [&flags[..], &[path.as_str()]].concat();
    host::piped("gcc", &args, SOURCE.into())?;
    let program = std::fs::read(&made)?;
    std::fs::remove_file(&made)?;
    Ok(program)
}

/// Another user gets none of the tool's locks, and root's commands and the daemon go on while that user has tried.
fn locks(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    ctx.dom0.put(LOCKER, 0o755, &locker()?)?;
    ctx.dom0.ok(&format!("touch {OPEN} && chmod 644 {OPEN}"))?;
    // From now on there is a lock of each kind.
    with_daemon(ctx, || ask(ctx, "others-1", "apply", "applied"))?;
    check!(patches::cmdline_is_live(guest)?, "the patch has no effect");
    let found = ctx.dom0.ok(&format!("find {RUN} -name '*.lock'"))?;
    let uuid = uuid(ctx, guest)?;
    let requests = format!("{uuid}.requests");
    for lock in ["daemon", "audit", uuid.as_str(), requests.as_str()] {
        let lock = format!("{RUN}/{lock}.lock");
        check!(found.lines().any(|f| f == lock), "no {lock}: {found}");
    }
    let files: Vec<&str> = once(OPEN)
        .chain(found.lines())
        .chain(once(GUARDIANS))
        .collect();
    let said = ctx
        .dom0
        .ok(&format!("{LOCKER} {NOBODY} {}", files.join(" ")))?;
    let Some((lines, holder)) = said.rsplit_once('\n') else {
        return Err(Verdict::Error(format!("nothing was locked: {said}")));
    };
    let done = is_shut_out(&files, lines).and_then(|()| root_goes_on(ctx, guest));
    // It was there all the time.
    let killed = ctx.dom0.ok(&format!("kill {holder}"));
    done?;
    killed?;
    Ok(())
}

/// Checks what was said of `files`: of the one that everybody may read the lock was taken, and no other one could be opened.
fn is_shut_out(files: &[&str], said: &str) -> Result<(), Verdict> {
    let expected = files.iter().map(|file| match *file == OPEN {
        true => format!("{file}: locked"),
        false => format!("{file}: Permission denied"),
    });
    let expected: Vec<String> = expected.collect();
    check_eq!(said.lines().collect::<Vec<_>>(), expected, "as nobody");
    Ok(())
}

/// While another user holds the lock of [`OPEN`], which root does not get, commands and the daemon do their work.
fn root_goes_on(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let name = &guest.name;
    let said = ctx.dom0.ok(&format!("{LOCKER} 0 {OPEN}"))?;
    check_eq!(said, format!("{OPEN}: Resource temporarily unavailable"));
    tool::revert(ctx, name, CMDLINE)?;
    with_daemon(ctx, || ask(ctx, "others-2", "apply", "applied"))?;
    tool::revert(ctx, name, CMDLINE)?;
    tool::no_patches(ctx, name)?;
    patches::cmdline_is_untouched(guest)
}

/// The guest gets a name that commands a terminal, and its own one afterwards.
fn name(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let node = format!("/local/domain/{}/name", guest.domid);
    let lines = |command: &str| -> Result<usize, Verdict> {
        let said = ctx.dom0.ok(&format!("xen-locus {command}"))?;
        Ok(said.lines().count())
    };
    // `status` shows guests with patches, if there are any.
    tool::apply(ctx, &guest.name, PAIR)?;
    let before = [lines("list")?, lines("status")?];
    ctx.dom0.put(NAMED, 0o600, ODD.as_bytes())?;
    ctx.dom0
        .ok(&format!("xenstore-write -- {node} \"$(cat {NAMED})\""))?;
    let shown = is_only_shown(ctx, guest).and_then(|()| {
        let now = [lines("list")?, lines("status")?];
        check_eq!(now, before, "lines of list and status");
        Ok(())
    });
    ctx.dom0
        .ok(&format!("xenstore-write -- {node} {}", guest.name))?;
    shown?;
    tool::revert(ctx, &guest.name, PAIR)?;
    Ok(())
}

/// Checks that commands, the daemon and the audit log only show the odd name that the guest has now.
fn is_only_shown(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let (id, odd) = (guest.domid, format!("\"$(cat {NAMED})\""));
    for (command, rc, words) in [
        ("list".to_owned(), 0, SHOWN),
        ("-o json list".to_owned(), 0, IN_JSON),
        ("status".to_owned(), 0, SHOWN),
        ("-o json status".to_owned(), 0, IN_JSON),
        (format!("info {odd}"), 0, SHOWN),
        // These say it on stderr.
        (format!("check {odd} {NO_CRCS}"), 3, SHOWN),
        (format!("apply {odd} {NO_CRCS}"), 3, SHOWN),
        // The last one was logged.
        (format!("history {id}"), 0, SHOWN),
        (format!("-o json history {id}"), 0, IN_JSON),
    ] {
        let out = ctx.dom0.sh(&format!("xen-locus {command}"))?;
        check_eq!(out.rc, rc, "{command}: {}", out.err_text());
        is_harmless(&format!("stdout of {command}"), &out.stdout)?;
        is_harmless(&format!("stderr of {command}"), &out.stderr)?;
        let said = out.text() + &out.err_text();
        check!(said.contains(words), "{command}: no {words} in {said}");
    }
    let logged = ctx.dom0.sh("tail -n 1 /var/log/xen-locus/audit.jsonl")?;
    is_harmless("the audit log", &logged.stdout)?;
    check!(logged.text().contains(IN_JSON), "{}", logged.text());
    let log = with_daemon(ctx, || {
        let stale = format!("others-3 op=apply domain={id} uuid={STALE} patch={CMDLINE}");
        daemon::ask(ctx, &stale, "1", "UUID")?;
        // Of no domain, and the name is the request's own.
        let unknown = format!("others-4 op=apply \"domain=no$(cat {NAMED})\" patch={CMDLINE}");
        daemon::ask(ctx, &unknown, "1", "no domain")
    })?;
    is_harmless("the daemon's log", &log)?;
    let log = String::from_utf8_lossy(&log);
    check!(
        log.contains(SHOWN),
        "the daemon's log has no {SHOWN}: {log}"
    );
    Ok(())
}

/// Checks that a terminal only shows this text.
fn is_harmless(what: &str, bytes: &[u8]) -> Result<(), Verdict> {
    let text = std::str::from_utf8(bytes);
    let text = text.map_err(|e| Verdict::failure(format!("{what} is no text: {e}")))?;
    let odd = |c: char| c.is_control() && c != '\n' || c == '\u{202e}';
    check!(!text.contains(odd), "{what} commands a terminal: {text:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_commands_a_terminal_is_noticed() {
        assert!(is_harmless("", SHOWN.as_bytes()).is_ok());
        assert!(is_harmless("", "one …\ntwo\n".as_bytes()).is_ok());
        for text in [
            "\u{1b}[2J",
            "a\rb",
            "a\tb",
            "\u{7f}",
            "\u{9b}1m",
            "\u{202e}x",
        ] {
            assert!(is_harmless("", text.as_bytes()).is_err(), "{text:?}");
        }
        assert!(is_harmless("", b"\x9b1m").is_err());
    }

    #[test]
    fn a_lock_that_another_user_got_is_noticed() {
        let said = |lock: &str| format!("{OPEN}: locked\n/run/a.lock: {lock}");
        let files = [OPEN, "/run/a.lock"];
        assert!(is_shut_out(&files, &said("Permission denied")).is_ok());
        assert!(is_shut_out(&files, &said("locked")).is_err());
        let other = said("Permission denied").replace("locked", "No such file or directory");
        assert!(is_shut_out(&files, &other).is_err());
    }
}
