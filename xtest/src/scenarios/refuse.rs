//! Wrong requests are refused with the right exit code and a sentence, and the guest stays untouched.

use std::path::PathBuf;
use std::process::Command;

use super::steps::patches::{cmdline_is_untouched, CMDLINE, CMDLINE_FILE};
use super::steps::tool::{self, refused};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{HVM, PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "refuse-payloads",
        summary: "garbage, foreign and unsuitable payloads are refused by name",
        profile: &PV1,
        run: payloads,
    },
    Scenario {
        name: "refuse-domains",
        summary:
            "unknown domains, dom0, a guest that is not up, and one that is not Linux are refused",
        profile: &PV1,
        run: domains,
    },
    Scenario {
        name: "refuse-changed-functions",
        summary: "a function that is traced, or redirected by another tool, is refused",
        profile: &PV1,
        run: changed_functions,
    },
    Scenario {
        name: "refuse-firmware-hvm",
        summary: "an HVM guest that is still in its firmware is refused for now",
        profile: &HVM,
        run: firmware,
    },
];

/// Scenarios that a usual run has no time for: a unit test has the refusal.
pub const MATRIX: &[Scenario] = &[Scenario {
    name: "refuse-shadow-pvh",
    summary: "a PVH guest without nested paging (hap=0) is refused, or Xen itself starts none",
    profile: &PVH,
    run: shadow,
}];

fn payloads(ctx: &mut Ctx) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new("pv", Kind::Pv))?;
    let good = std::fs::read(ctx.payloads.join("locus_cmdline/locus_cmdline.ko"))?;
    let changed = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        if let Some(b) = bytes.get_mut(at) {
            *b = byte;
        }
        bytes
    };
    let text = ctx.release.as_bytes();
    let mut other = good.clone();
    // Every mention of the release, in vermagic and notes, is replaced by one of the same length.
    let places: Vec<usize> = other
        .windows(text.len())
        .enumerate()
        .filter(|(_, w)| *w == text)
        .map(|(i, _)| i)
        .collect();
    check!(!places.is_empty(), "the payload does not name its kernel");
    for at in places {
        if let Some(b) = other.get_mut(at) {
            *b = b'9';
        }
    }
    let half = good.get(..good.len() / 2).unwrap_or_default().to_vec();
    for (name, bytes, rc, words) in [
        ("truncated", half, 1, "truncated"),
        ("garbage", vec![0x5a; 5000], 1, "not an ELF file"),
        ("empty", Vec::new(), 1, "ELF"),
        ("x86-32", changed(4, 1), 3, "32"),
        ("arm64", changed(18, 0xb7), 3, "machine"),
        ("other-kernel", other, 3, "vermagic"),
    ] {
        let path = format!("/tmp/{name}.ko");
        ctx.dom0.put(&path, 0o644, &bytes)?;
        refused(ctx, &format!("xen-locus apply pv {path}"), rc, words)?;
    }
    for (name, words) in [
        (
            "locus_no_such_function",
            "no symbol locus_no_such_function_show",
        ),
        ("locus_own_static_call", ".static_call.text"),
        ("locus_plain", "not a livepatch"),
    ] {
        refused(
            ctx,
            &format!("xen-locus apply pv /payloads/{name}.ko"),
            3,
            words,
        )?;
        refused(
            ctx,
            &format!("xen-locus check pv /payloads/{name}.ko"),
            3,
            words,
        )?;
    }
    refused(ctx, "xen-locus apply pv /tmp/none.ko", 1, "No such file")?;
    refused(ctx, "xen-locus revert pv locus_none", 1, "no patch")?;
    refused(ctx, "xen-locus apply pv", 64, "at least one domain")?;
    refused(ctx, "xen-locus frobnicate", 64, "frobnicate")?;
    untouched(ctx, &guest)
}

fn untouched(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    tool::no_patches(ctx, &guest.name)?;
    cmdline_is_untouched(guest)
}

/// Debian's Xen is built without shadow paging, and `xl` starts no such guest there.
fn shadow(ctx: &mut Ctx) -> Result<(), Verdict> {
    const NAME: &str = "shadow-pvh";
    let spec = GuestSpec::new(NAME, Kind::Pvh).config("hap=0");
    let able = ctx.dom0.ok("xl info | grep '^virt_caps'")?;
    if !able.split_whitespace().any(|word| word == "shadow") {
        let config = format!("/etc/xen/{NAME}.cfg");
        ctx.dom0.put(&config, 0o644, spec.to_config().as_bytes())?;
        let out = ctx.dom0.sh(&format!("xl create -q {config}"))?;
        ctx.dom0.note(&format!("{able}\n{}", out.err_text()));
        check!(out.rc != 0, "a guest runs without nested paging, on {able}");
        return ctx.destroy_guest(NAME);
    }
    let guest = ctx.ensure_guest(spec)?;
    for command in [
        format!("info {NAME}"),
        format!("status {NAME}"),
        format!("check {NAME} {CMDLINE_FILE}"),
        format!("apply {NAME} {CMDLINE_FILE}"),
    ] {
        refused(ctx, &format!("xen-locus {command}"), 3, "shadow paging")?;
    }
    cmdline_is_untouched(&guest)?;
    ctx.destroy_guest(NAME)
}

fn domains(ctx: &mut Ctx) -> Result<(), Verdict> {
    let file = CMDLINE_FILE;
    refused(
        ctx,
        &format!("xen-locus apply nobody {file}"),
        1,
        "no domain",
    )?;
    refused(ctx, &format!("xen-locus apply 4711 {file}"), 1, "no domain")?;
    refused(
        ctx,
        &format!("xen-locus apply 99999999999 {file}"),
        1,
        "no domain",
    )?;
    for dom0 in ["0", "Domain-0"] {
        refused(
            ctx,
            &format!("xen-locus apply {dom0} {file}"),
            3,
            "control domain",
        )?;
    }
    // Nothing is changed before all names are known.
    ctx.ensure_guest(GuestSpec::new("pv", Kind::Pv))?;
    refused(
        ctx,
        &format!("xen-locus apply pv nobody {file}"),
        1,
        "no domain",
    )?;
    tool::no_patches(ctx, "pv")?;
    refused(
        ctx,
        &format!("xen-locus apply pv {file} {file}"),
        64,
        "one payload is applied at a time",
    )?;
    // Built, never started.
    ctx.dom0.put(
        "/etc/xen/early.cfg",
        0o644,
        GuestSpec::new("early", Kind::Pv).to_config().as_bytes(),
    )?;
    ctx.dom0.ok("xl create -q -p /etc/xen/early.cfg")?;
    refused(
        ctx,
        &format!("xen-locus apply early {file}"),
        2,
        "try again",
    )?;
    ctx.destroy_guest("early")?;

    let kernel = std::fs::read(not_linux()?)?;
    ctx.dom0.put("/tmp/not-linux", 0o755, &kernel)?;
    let config = "name=\"odd\"\ntype=\"pv\"\nmemory=32\nkernel=\"/tmp/not-linux\"\n";
    ctx.dom0.put("/etc/xen/odd.cfg", 0o644, config.as_bytes())?;
    ctx.dom0
        .ok("xl create -q /etc/xen/odd.cfg; sleep 1; xl domid odd")?;
    refused(
        ctx,
        &format!("xen-locus apply odd {file}"),
        3,
        "Linux kernel",
    )?;
    let row = tool::list_row(ctx, "odd")?;
    check_eq!(row["status"], "unsupported", "list: {row}");
    ctx.destroy_guest("odd")
}

/// Builds the guest that is not Linux.
fn not_linux() -> Result<PathBuf, Verdict> {
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("guest/not-linux.S");
    let kernel = std::env::temp_dir().join(format!("not-linux-{}", std::process::id()));
    let flags = [
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,-Ttext=0x100000,-e,start,--build-id=none",
    ];
    let built = Command::new("gcc")
        .args(flags)
        .arg("-o")
        .arg(&kernel)
        .arg(source)
        .output()?;
    let said = String::from_utf8_lossy(&built.stderr);
    if !built.status.success() {
        return Err(Verdict::Error(format!("gcc not-linux.S: {said}")));
    }
    Ok(kernel)
}

fn changed_functions(ctx: &mut Ctx) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new("pv", Kind::Pv))?;
    let apply = &format!("xen-locus apply pv {CMDLINE_FILE}");
    // ftrace in the guest turns the nop into a call.
    guest.ok(&tool::in_tracing(
        "echo cmdline_proc_show > set_ftrace_filter && echo function > current_tracer",
    ))?;
    refused(ctx, apply, 2, "traced")?;
    guest.ok(&tool::in_tracing(
        "echo nop > current_tracer && echo > set_ftrace_filter",
    ))?;
    ctx.dom0.ok(apply)?;
    // A redirect of xen-locus that something else has changed is refused, and reported as changed.
    let mine = ctx
        .dom0
        .ok("locus-poke pv cmdline_proc_show+5 cccccccccc")?;
    check!(mine.starts_with("e9"), "no jump follows the nop: {mine}");
    refused(ctx, "xen-locus revert pv locus_cmdline", 1, "changed it")?;
    let status = tool::status(ctx, "pv")?;
    check_eq!(status["patches"][0]["state"], "drifted");
    ctx.dom0
        .ok(&format!("locus-poke pv cmdline_proc_show+5 {mine}"))?;
    tool::revert(ctx, "pv", CMDLINE)?;
    // A jump of another tool, to an unknown address.
    let old = ctx
        .dom0
        .ok("locus-poke pv cmdline_proc_show+5 e900001000")?;
    refused(ctx, apply, 3, "redirected by someone else")?;
    ctx.dom0
        .ok(&format!("locus-poke pv cmdline_proc_show+5 {old}"))?;
    untouched(ctx, &guest)
}

fn firmware(ctx: &mut Ctx) -> Result<(), Verdict> {
    // No kernel and no disk: SeaBIOS looks for something to boot, forever.
    let config =
        "name=\"firm\"\ntype=\"hvm\"\nmemory=64\nvcpus=1\nvga=\"none\"\nnographic=1\nvnc=0\n\
                  sdl=0\nusb=0\ndevice_model_args=[\"-nodefaults\"]\n";
    ctx.dom0
        .put("/etc/xen/firm.cfg", 0o644, config.as_bytes())?;
    ctx.dom0
        .ok("xl create -q /etc/xen/firm.cfg; sleep 2; xl domid firm")?;
    refused(
        ctx,
        &format!("xen-locus apply firm {CMDLINE_FILE}"),
        2,
        "firmware",
    )?;
    ctx.destroy_guest("firm")
}
