//! Payloads that must be refused by name, with exit code 3, and without a change of the guest.

use super::subject::Subject;
use crate::check;
use crate::verdict::Verdict;

/// Each payload, and words of its refusal.
const PAYLOADS: &[(&str, &[&str])] = &[
    ("locus_own_percpu", &["per-CPU"]),
    ("locus_own_static_call", &["static call"]),
    ("locus_parameter", &["parameter"]),
    ("locus_export", &["export"]),
    ("locus_callbacks", &["callback"]),
    ("locus_init_function", &["start_kernel", "__init"]),
    ("locus_init_code", &["init"]),
    ("locus_init_work", &["locus_put", "module_init"]),
    ("locus_overflow", &["saved_command_line"]),
    ("locus_no_such_function", &["locus_no_such_function_show"]),
    ("locus_ambiguous", &["control_show", "2"]),
    ("locus_third_of_two", &["control_show", "3"]),
    (
        "locus_other_build",
        &["build-id 0123456789abcdef0123456789abcdef01234567", "text"],
    ),
    ("locus_plain", &["not a livepatch"]),
];

/// Tries all of them, and reports everything that is wrong.
pub fn all(subject: &Subject<'_>) -> Result<(), Verdict> {
    subject.unchanged_by("all refusals", || each(subject))
}

fn each(subject: &Subject<'_>) -> Result<(), Verdict> {
    let mut wrong = Vec::new();
    // If there is only one function of the name, it is not ambiguous.
    let ambiguous = subject.has_namesakes()?;
    let all = PAYLOADS
        .iter()
        .filter(|(name, _)| ambiguous || *name != "locus_ambiguous");
    for (name, words) in all {
        match subject.refused_with(&subject.file(name), words) {
            Err(Verdict::Failure(why)) => {
                wrong.push(format!("{name}: {why}"));
                subject.revert_all()?;
            }
            other => other?,
        }
    }
    check!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
