//! What xtest asks of the host it runs on: processors, programs and files.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{bail, ensure, Context, Result};

/// The number of processors that this process may use; at least one.
pub fn cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

/// Runs a command and returns its output.
///
/// # Errors
///
/// The command can't be started, or fails; the error then contains its standard error.
pub fn checked(cmd: &mut Command) -> Result<Output> {
    let name = cmd.get_program().to_string_lossy().into_owned();
    let out = cmd.output().with_context(|| format!("running {name}"))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        bail!("{name} failed ({}): {}", out.status, said.trim());
    }
    Ok(out)
}

/// Seconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| d.as_secs())
}

/// Runs a program with `input` as its standard input, and returns its standard output.
///
/// # Errors
///
/// The program can't be started, or fails.
pub fn piped(program: &str, args: &[&str], input: Vec<u8>) -> Result<Vec<u8>> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("running {program}"))?;
    let mut pipe = child.stdin.take().context("no pipe to a child")?;
    // On a thread of its own, because both pipes can fill up.
    let feeder = std::thread::spawn(move || pipe.write_all(&input));
    let out = child.wait_with_output()?;
    let _ = feeder.join();
    ensure!(out.status.success(), "{program} failed ({})", out.status);
    Ok(out.stdout)
}

/// Whether `source` was changed after `made`, or one of them does not exist.
pub fn newer(source: &Path, made: &Path) -> bool {
    let time = |p: &Path| p.metadata().and_then(|m| m.modified()).ok();
    match (time(source), time(made)) {
        (Some(source), Some(made)) => source > made,
        _ => true,
    }
}

/// Replaces a file that others may be reading: writes a new one and renames it over the old one.
pub fn replace(path: &Path, data: &[u8]) -> Result<()> {
    let new = path.with_extension(format!("new{}", std::process::id()));
    std::fs::write(&new, data).with_context(|| format!("writing {}", new.display()))?;
    std::fs::rename(&new, path)?;
    Ok(())
}

/// The last lines of a file; empty if it can't be read.
pub fn tail(path: &Path, lines: usize) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all.iter()
        .skip(all.len().saturating_sub(lines))
        .copied()
        .collect::<Vec<_>>()
        .join("\n")
}
