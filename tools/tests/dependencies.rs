//! What the workspace depends on: under which licences, from where, and what of it is there twice.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // a test that cannot run its subject has failed

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Licences that may be part of a GPL-3.0-only program. Of an expression with OR one must be here, with AND all.
const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "GPL-3.0-only",
    "ISC",
    "LGPL-2.1-or-later",
    "LGPL-3.0-only",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Crates that are there in two versions, and which other crates want it so. Only what others build with is here: none
/// of these is in the product twice, except embedded-io, which has no code of its own.
const TWICE: &[(&str, &str)] = &[
    ("embedded-io", "postcard has both in its optional features"),
    (
        "libloading",
        "bindgen, which makes xenctrl-sys, wants an older one",
    ),
    (
        "syn",
        "serde's and thiserror's macros have the newer one, others not yet",
    ),
];

fn packages() -> Vec<Value> {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "cargo metadata: {said}");
    let metadata: Value = serde_json::from_slice(&out.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

fn text<'p>(package: &'p Value, key: &str) -> &'p str {
    package[key].as_str().unwrap_or_default()
}

fn is_allowed(expression: &str) -> bool {
    // Old crates write MIT/Apache-2.0 for OR.
    let plain = expression.replace(['(', ')'], " ").replace('/', " OR ");
    let alternatives = |term: &str| {
        let mut names = term.split(" OR ").map(str::trim);
        names.any(|name| LICENCES.contains(&name))
    };
    plain.split(" AND ").all(alternatives)
}

#[test]
fn every_dependency_has_a_licence_that_the_gpl_allows() {
    let odd: Vec<String> = packages()
        .iter()
        .filter(|p| !is_allowed(text(p, "license")))
        .map(|p| {
            format!(
                "{} {}: {:?}",
                text(p, "name"),
                text(p, "version"),
                p["license"]
            )
        })
        .collect();
    assert!(odd.is_empty(), "{odd:#?}");
}

#[test]
fn every_dependency_comes_from_the_registry() {
    // A member of the workspace has no source.
    let odd: Vec<Value> = packages()
        .iter()
        .map(|p| p["source"].clone())
        .filter(|source| source.as_str().is_some_and(|s| !s.starts_with("registry+")))
        .collect();
    assert!(odd.is_empty(), "{odd:#?}");
}

#[test]
fn what_is_there_twice_is_known() {
    let mut versions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in &packages() {
        let name = text(package, "name").to_owned();
        let version = text(package, "version").to_owned();
        versions.entry(name).or_default().insert(version);
    }
    versions.retain(|name, all| all.len() > 1 && !name.starts_with("windows"));
    let found: Vec<&str> = versions.keys().map(String::as_str).collect();
    let known: Vec<&str> = TWICE.iter().map(|(name, _)| *name).collect();
    assert_eq!(found, known, "{versions:#?}");
}

#[test]
fn licences_are_told_apart() {
    for allowed in [
        "MIT",
        "GPL-2.0 OR MIT",
        "MIT/Apache-2.0",
        "(MIT OR X) AND Unicode-3.0",
    ] {
        assert!(is_allowed(allowed), "{allowed}");
    }
    for odd in ["", "GPL-2.0-only", "MIT AND GPL-2.0-only", "Proprietary"] {
        assert!(!is_allowed(odd), "{odd}");
    }
}
