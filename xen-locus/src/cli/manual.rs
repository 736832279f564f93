//! The manual: one text for each command, in the folder `manual/`.
//!
//! The same text is the head of the command's module, the long help (`xen-locus COMMAND --help`) and the manual page
//! (`locus-man`). It is Markdown of four kinds of blocks, which [`parse`] reads: headings (`# Examples`),
//! paragraphs, items (a line that begins with `- `, a term in backticks, and a colon), and output in fences of
//! three backticks. The text before the first heading is the description.

/// Stands for a space at which clap must not break the line: output is shown as it is. [`shown`] takes it out again.
const SPACE: &str = "\u{a0}";

/// Help as clap made it, as it is to be printed.
pub(super) fn shown(help: &str) -> String {
    help.replace(SPACE, " ")
}

/// The manual of `xen-locus` itself.
pub const XEN_LOCUS: &str = include_str!("manual/xen-locus.md");
/// The manual of `apply`.
pub const APPLY: &str = include_str!("manual/apply.md");
/// The manual of `blocking`.
pub const BLOCKING: &str = include_str!("manual/blocking.md");
/// The manual of `check`.
pub const CHECK: &str = include_str!("manual/check.md");
/// The manual of `daemon`.
pub const DAEMON: &str = include_str!("manual/daemon.md");
/// The manual of `history`.
pub const HISTORY: &str = include_str!("manual/history.md");
/// The manual of `info`.
pub const INFO: &str = include_str!("manual/info.md");
/// The manual of `list`.
pub const LIST: &str = include_str!("manual/list.md");
/// The manual of `nudge`.
pub const NUDGE: &str = include_str!("manual/nudge.md");
/// The manual of `reclaim`.
pub const RECLAIM: &str = include_str!("manual/reclaim.md");
/// The manual of `recover`.
pub const RECOVER: &str = include_str!("manual/recover.md");
/// The manual of `replace`.
pub const REPLACE: &str = include_str!("manual/replace.md");
/// The manual of `revert`.
pub const REVERT: &str = include_str!("manual/revert.md");
/// The manual of `show`.
pub const SHOW: &str = include_str!("manual/show.md");
/// The manual of `status`.
pub const STATUS: &str = include_str!("manual/status.md");
/// The manual of `verify`.
pub const VERIFY: &str = include_str!("manual/verify.md");

/// The manual of the command called `name`; `None` if there is no such command.
#[must_use]
pub fn of(name: &str) -> Option<&'static str> {
    Some(match name {
        "xen-locus" => XEN_LOCUS,
        "apply" => APPLY,
        "blocking" => BLOCKING,
        "check" => CHECK,
        "daemon" => DAEMON,
        "history" => HISTORY,
        "info" => INFO,
        "list" => LIST,
        "nudge" => NUDGE,
        "reclaim" => RECLAIM,
        "recover" => RECOVER,
        "replace" => REPLACE,
        "revert" => REVERT,
        "show" => SHOW,
        "status" => STATUS,
        "verify" => VERIFY,
        _ => return None,
    })
}

/// A block of a manual.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Block {
    /// A heading.
    Heading(String),
    /// A paragraph, in one line. Words in backticks are names.
    Paragraph(String),
    /// A term, and what it means.
    Item(String, String),
    /// Lines of output, to be shown as they are.
    Output(Vec<String>),
}

/// The blocks of a manual.
#[must_use]
pub fn parse(text: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    // The last block goes on in the next line.
    let mut open = false;
    while let Some(line) = lines.next() {
        if line.starts_with("```") {
            let output = lines.by_ref().take_while(|line| !line.starts_with("```"));
            blocks.push(Block::Output(output.map(str::to_owned).collect()));
            open = false;
        } else if let Some(heading) = line.strip_prefix("# ") {
            blocks.push(Block::Heading(heading.to_owned()));
            open = false;
        } else if let Some((term, meaning)) = item(line) {
            blocks.push(Block::Item(term.to_owned(), meaning.to_owned()));
            open = true;
        } else if line.is_empty() {
            open = false;
        } else {
            match blocks.last_mut() {
                Some(Block::Paragraph(text) | Block::Item(_, text)) if open => {
                    text.push(' ');
                    text.push_str(line.trim());
                }
                _ => blocks.push(Block::Paragraph(line.to_owned())),
            }
            open = true;
        }
    }
    blocks
}

fn item(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix("- `")?.split_once("`: ")
}

/// A manual in two parts: the description, and what comes from the first heading on.
#[must_use]
pub fn parts(text: &str) -> (Vec<Block>, Vec<Block>) {
    let mut description = parse(text);
    let heading = |block: &Block| matches!(block, Block::Heading(_));
    let first = description.iter().position(heading);
    let rest = description.split_off(first.unwrap_or(description.len()));
    (description, rest)
}

/// The description, for clap.
pub(super) fn long_about(text: &str) -> String {
    plain(&parts(text).0)
}

/// Everything after the description, for clap.
pub(super) fn after_help(text: &str) -> String {
    plain(&parts(text).1)
}

fn plain(blocks: &[Block]) -> String {
    let mut text = String::new();
    let mut last: Option<&Block> = None;
    for block in blocks {
        // Items of one list, and a heading and what it is over, have no empty line between them.
        let joined = match (last, block) {
            (Some(Block::Item(..)), Block::Item(..)) | (Some(Block::Heading(_)), _) => true,
            (last, _) => last.is_none(),
        };
        if !joined {
            text.push('\n');
        }
        match block {
            Block::Heading(heading) => text.push_str(&format!("{heading}:\n")),
            Block::Paragraph(words) => text.push_str(&format!("{words}\n")),
            // A term may be several names, each in backticks.
            Block::Item(term, meaning) => {
                text.push_str(&format!("  {}: {meaning}\n", term.replace('`', "")));
            }
            Block::Output(lines) => {
                for line in lines {
                    text.push_str(&format!("    {}\n", line.replace(' ', SPACE)));
                }
            }
        }
        last = Some(block);
    }
    text.truncate(text.trim_end().len());
    text
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::CommandFactory as _;
    use serde_json::Value;

    use super::super::args::Cli;
    use super::*;

    #[test]
    fn blocks_are_told_apart() {
        let text = "Does\nthis.\n\n# JSON\n\n- `a`: one\n  line\n- `b`: two\n\n```text\n# x\n\n```\nEnd.\n";
        assert_eq!(
            parse(text),
            [
                Block::Paragraph("Does this.".into()),
                Block::Heading("JSON".into()),
                Block::Item("a".into(), "one line".into()),
                Block::Item("b".into(), "two".into()),
                Block::Output(vec!["# x".into(), String::new()]),
                Block::Paragraph("End.".into()),
            ]
        );
        assert_eq!(long_about(text), "Does this.");
        assert_eq!(
            after_help(text),
            "JSON:\n  a: one line\n  b: two\n\n    #\u{a0}x\n    \n\nEnd."
        );
        let several = parse("- `a`, `b`: two\n");
        assert_eq!(plain(&several), "  a, b: two");
    }

    #[test]
    fn what_looks_like_an_item_of_a_manual_is_one() {
        let commands = Cli::command();
        let names = commands.get_subcommands().map(clap::Command::get_name);
        for name in names.chain(["xen-locus"]) {
            let mut lines = of(name).unwrap_or_default().lines();
            while let Some(line) = lines.next() {
                if line.starts_with("```") {
                    lines.by_ref().find(|line| line.starts_with("```"));
                }
                assert!(
                    !line.starts_with('-') || item(line).is_some(),
                    "{name}: {line}"
                );
            }
        }
    }

    #[test]
    fn every_manual_names_the_exit_status_of_wrong_usage() {
        for command in Cli::command().get_subcommands() {
            let name = command.get_name();
            let text = of(name).unwrap_or_default();
            let (_, status) = text.split_once("# Exit status").unwrap_or_default();
            assert!(
                status.contains("- `64`: wrong usage")
                    || status.starts_with("\n\nAs `xen-locus apply`."),
                "{name}"
            );
        }
    }

    #[test]
    fn every_command_has_a_manual_with_every_section() {
        for command in Cli::command().get_subcommands() {
            let name = command.get_name();
            let (description, rest) = parts(of(name).unwrap_or_default());
            assert!(!description.is_empty(), "{name}");
            for section in ["Examples", "JSON", "Exit status", "Files"] {
                let heading = Block::Heading(section.into());
                assert!(rest.contains(&heading), "{name} has no section {section}");
            }
        }
        assert!(of("xen-locus").is_some());
        assert!(of("frobnicate").is_none());
    }

    #[test]
    fn every_json_field_of_the_golden_output_is_in_the_manual() {
        fn names(value: &Value, found: &mut Vec<String>) {
            match value {
                Value::Array(all) => all.iter().for_each(|one| names(one, found)),
                Value::Object(map) => {
                    for (name, value) in map {
                        found.push(name.clone());
                        // Its fields have the guest's names.
                        if name != "vmcoreinfo" && name != "mitigations" {
                            names(value, found);
                        }
                    }
                }
                _ => {}
            }
        }
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        for (file, text) in [
            ("blocking", BLOCKING),
            ("check", CHECK),
            ("info", INFO),
            ("list", LIST),
            ("modules", INFO),
            ("stacks", INFO),
            ("status", STATUS),
            ("symbols", INFO),
            ("tasks", INFO),
            ("type", INFO),
        ] {
            let golden =
                std::fs::read_to_string(folder.join(format!("mock-pv.{file}.json"))).unwrap();
            let (_, json) = golden.split_once("--- stdout\n").unwrap();
            let (json, _) = json.split_once("--- stderr").unwrap();
            let mut found = Vec::new();
            names(&serde_json::from_str(json).unwrap(), &mut found);
            found.retain(|name| name != "schema" && !text.contains(&format!("`{name}`")));
            assert!(found.is_empty(), "{file}: {found:?}");
        }
    }
}
