//! `locus-man FOLDER`: writes the manual pages of `xen-locus` and of each command, section 8.
//!
//! Names, usage and options come from the types of the command line, all else from the manuals in
//! `xen_locus::cli::manual`, which `--help` prints too.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use clap::{Command, CommandFactory as _};
use clap_mangen::roff::{bold, roman, Inline, Roff};
use clap_mangen::Man;
use xen_locus::cli::args::Cli;
use xen_locus::cli::manual::{self, Block};

/// System administration tools and daemons.
const SECTION: &str = "8";

fn main() -> Result<()> {
    let folder = std::env::args_os()
        .nth(1)
        .context("usage: locus-man FOLDER")?;
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    for command in std::iter::once(&root).chain(root.get_subcommands()) {
        let name = command.get_display_name().unwrap_or(command.get_name());
        let path = Path::new(&folder).join(format!("{name}.{SECTION}"));
        let manual_page = manual_page(&root, command)?;
        fs::write(&path, manual_page).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// The manual page of a command, which is `root` itself or one of its subcommands.
fn manual_page(root: &Command, command: &Command) -> Result<Vec<u8>> {
    let name = command.get_name();
    let text = manual::of(name).with_context(|| format!("{name} has no manual"))?;
    let (description, rest) = manual::parts(text);
    let is_root = name == root.get_name();
    let version = root.get_version().unwrap_or_default();
    let man = Man::new(command.clone())
        .section(SECTION)
        .source(format!("xen-locus {version}"))
        .manual("Xen");
    let mut manual_page = Vec::new();
    man.render_title(&mut manual_page)?;
    man.render_name_section(&mut manual_page)?;
    synopsis(command).to_writer(&mut manual_page)?;
    let mut roff = Roff::new();
    roff.control("SH", ["DESCRIPTION"]);
    blocks(&mut roff, &description);
    roff.to_writer(&mut manual_page)?;
    man.render_options_section(&mut manual_page)?;
    if is_root {
        man.render_subcommands_section(&mut manual_page)?;
    }
    let mut roff = Roff::new();
    blocks(&mut roff, &rest);
    roff.control("SH", ["SEE ALSO"]);
    let other = match is_root {
        true => "xen-locus-xenstore(7), xl(1)",
        false => "xen-locus(8), xen-locus-xenstore(7)",
    };
    roff.text([roman(other)]);
    roff.to_writer(&mut manual_page)?;
    Ok(manual_page)
}

/// The usage lines. clap_mangen's own synopsis does not know that a file comes after the domains.
fn synopsis(command: &Command) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["SYNOPSIS"]);
    let usage = command.clone().render_usage().to_string();
    for (i, line) in usage.lines().enumerate() {
        if i > 0 {
            roff.control("br", []);
        }
        roff.text([bold(line.trim_start_matches("Usage:").trim())]);
    }
    roff
}

fn blocks(roff: &mut Roff, blocks: &[Block]) {
    for block in blocks {
        match block {
            Block::Heading(heading) => {
                roff.control("SH", [heading.to_uppercase().as_str()]);
            }
            Block::Paragraph(text) => {
                roff.control("PP", []);
                roff.text(inline(text));
            }
            Block::Item(term, text) => {
                roff.control("TP", []);
                roff.text([bold(term.replace('`', ""))]);
                roff.text(inline(text));
            }
            Block::Output(lines) => {
                roff.control("PP", []);
                roff.control("EX", []);
                for line in lines {
                    roff.text([roman(line)]);
                }
                roff.control("EE", []);
            }
        }
    }
}

/// Words in backticks are bold.
fn inline(text: &str) -> Vec<Inline> {
    let parts = text.split('`').enumerate();
    let inlines = parts.map(|(i, part)| if i % 2 == 1 { bold(part) } else { roman(part) });
    inlines.collect()
}
