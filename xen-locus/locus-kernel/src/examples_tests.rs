//! Each example does what it says, on a core of the small guest.

// `main` of an example is not called here.
#[allow(dead_code)]
#[path = "../examples/stacks.rs"]
mod stacks;
#[allow(dead_code)]
#[path = "../examples/symbols.rs"]
mod symbols;
#[allow(dead_code)]
#[path = "../examples/types.rs"]
mod types;

use std::path::{Path, PathBuf};

use locus_guest::GuestType;

use crate::fixture_world::{World, PATCHED};

/// A core of the small guest, gone with this value.
struct SavedCore(PathBuf);

impl SavedCore {
    fn new(kind: GuestType, test: &str) -> SavedCore {
        let name = format!("locus-kernel-{test}-{kind:?}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, World::new(kind).core()).unwrap();
        SavedCore(path)
    }
}

impl Drop for SavedCore {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// What `show` makes of a core of each type of guest.
fn with_cores(test: &str, show: impl Fn(&Path)) {
    for kind in [GuestType::Pv, GuestType::Pvh, GuestType::Hvm] {
        show(&SavedCore::new(kind, test).0);
    }
}

#[test]
fn symbols_finds_a_name_and_what_covers_an_address() {
    with_cores("symbols", |core| {
        let found = symbols::show(core, "cmdline_proc_show").unwrap();
        assert_eq!(
            found,
            format!("{PATCHED} t cmdline_proc_show (16 bytes to the next)\n")
        );
        let within = PATCHED.plus(5);
        let found = symbols::show(core, &format!("{:#x}", within.0)).unwrap();
        assert_eq!(found, format!("{within} is cmdline_proc_show+0x5\n"));
        let none = symbols::show(core, "no_such_symbol").unwrap();
        assert!(none.ends_with("has no symbol no_such_symbol\n"), "{none}");
    });
}

#[test]
fn types_prints_a_structure_with_its_offsets() {
    with_cores("types", |core| {
        let text = types::show(core, "struct signal_struct").unwrap();
        assert!(text.starts_with("struct signal_struct {\n"), "{text}");
        assert!(text.contains("struct list_head thread_head;"), "{text}");
        assert!(text.contains("/* size: 64 */"), "{text}");
        assert!(types::show(core, "no_such_type").is_err());
    });
}

#[test]
fn stacks_prints_each_task_with_its_functions() {
    with_cores("stacks", |core| {
        let text = stacks::show(core).unwrap();
        let sleeper = "42 sleeper (S)\n    \
                       __schedule+0x5/0x100\n    \
                       cmdline_proc_show+0xa/0x10\n    \
                       entry_SYSCALL_64_after_hwframe+0x5/0x100\n    \
                       to user mode\n";
        assert!(text.contains(sleeper), "{text}");
        assert_eq!(text.matches("not reliable").count(), 0, "{text}");
    });
}
