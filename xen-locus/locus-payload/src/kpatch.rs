//! What a module made by kpatch-build replaces.
//!
//! The file of such a module has no `struct klp_patch`. Its `module_init` makes one from tables that
//! kpatch-build writes (`kmod/patch/kpatch-patch.h`, `livepatch-patch-hook.c` and `kpatch.lds.S` of
//! kpatch). The tables say the same, so they are read instead:
//!
//! ```text
//! .kpatch.funcs       struct kpatch_patch_func { unsigned long new_addr, new_size, old_addr,
//!                     old_size, sympos; char *name, *objname; } [];
//! .kpatch.callbacks.* struct { callback; char *objname; } [];
//! .kpatch.strings     the names
//! .kpatch.force       functions that kpatch does not wait for; xen-locus waits for them too
//! ```
//!
//! `old_addr` and `old_size` are those of the kernel that the module was built for, without KASLR. They
//! are not used: as in livepatch, the running kernel's own symbols count.

use super::elf::Section;
use super::error::{limit, PayloadErrorKind, Result};
use super::klp::{Klp, KlpFunc, KlpObject, MAX_FUNCS, MAX_OBJECTS};
use super::pointers::{Pointee, View};
use super::role::Role;
use super::symbol::{ElfSymbol, SymSection};

/// The table of functions. Every module made by kpatch-build has it.
pub(super) const FUNCS: &str = ".kpatch.funcs";
/// Relocations in kpatch's own format, for its module `kpatch.ko` and not for livepatch.
const DYNRELAS: &str = ".kpatch.dynrelas";
/// Beginning of the names of the four tables of callbacks.
const CALLBACKS: &str = ".kpatch.callbacks.";
/// What messages call an element of the tables.
const STRUCTURE: &str = "struct kpatch_patch_func";
/// Size of a `struct kpatch_patch_func` in bytes, and offsets of its fields.
const FUNC: u64 = 56;
const NEW_SIZE: u64 = 8;
const SYMPOS: u64 = 32;
const NAME: u64 = 40;
const OBJNAME: u64 = 48;
/// Size of an element of a table of callbacks, in bytes. Zeroes of half that size end each table.
const CALLBACK: u64 = 16;

/// Reads the tables; `None` if the module has none of them.
pub(super) fn find(sections: &[Section], symbols: &[ElfSymbol]) -> Result<Option<Klp>> {
    let named = |name: &str| sections.iter().find(|s| s.name == name && s.flags.alloc);
    if named(DYNRELAS).is_some() {
        return Err(PayloadErrorKind::KpatchCore);
    }
    let Some(funcs) = named(FUNCS) else {
        return Ok(None);
    };
    let view = View::new(sections, symbols);
    let mut klp = Klp {
        place: None,
        size: None,
        // What `module_init` makes of it.
        replace: None,
        states: false,
        object_stride: None,
        func_stride: None,
        objects: Vec::new(),
    };
    if !funcs.size.is_multiple_of(FUNC) {
        return view.fault(
            STRUCTURE,
            (funcs.index, 0),
            format!(
                "the table has {} bytes, expected a multiple of {FUNC}: made by a kpatch \
                 that does not know sympos yet?",
                funcs.size
            ),
        );
    }
    limit("the number of functions", funcs.size / FUNC, MAX_FUNCS)?;
    for index in 0..funcs.size / FUNC {
        let (object, func) = function(&view, funcs, index.saturating_mul(FUNC))?;
        object_of(&mut klp, object)?.funcs.push(func);
    }
    let mut callbacks = 0u64;
    for table in sections
        .iter()
        .filter(|s| s.flags.alloc && s.name.starts_with(CALLBACKS))
    {
        callbacks = callbacks.saturating_add(table.size / CALLBACK);
        limit("the number of callbacks", callbacks, MAX_FUNCS)?;
        for at in (0..table.size / CALLBACK).map(|index| index.saturating_mul(CALLBACK)) {
            if view.pointer(table, at)?.is_some() {
                let name = name(&view, table, at, ("objname", CALLBACK / 2))?;
                object_of(&mut klp, name)?.callbacks = true;
            }
        }
    }
    Ok(Some(klp))
}

/// The object called `name`, which is added if it is new.
fn object_of(klp: &mut Klp, name: String) -> Result<&mut KlpObject> {
    let name = Some(name).filter(|name| name != "vmlinux");
    let at = match klp.objects.iter().position(|o| o.name == name) {
        Some(at) => at,
        None => {
            klp.objects.push(KlpObject {
                name,
                callbacks: false,
                funcs: Vec::new(),
            });
            klp.objects.len().saturating_sub(1)
        }
    };
    limit(
        "the number of objects",
        klp.objects.len() as u64,
        MAX_OBJECTS,
    )?;
    klp.objects
        .get_mut(at)
        .ok_or_else(|| PayloadErrorKind::malformed(FUNCS, "no object"))
}

/// The name that a field, called and at an offset as in `field`, of the structure at `at` points at.
fn name(view: &View, table: &Section, at: u64, field: (&str, u64)) -> Result<String> {
    let pointee = view.pointer(table, at.saturating_add(field.1))?;
    view.name(STRUCTURE, (table.index, at), field.0, pointee)
}

/// The function at an offset in the table, and the name of its object.
fn function(view: &View, table: &Section, at: u64) -> Result<(String, KlpFunc)> {
    let fault = |problem: String| view.fault(STRUCTURE, (table.index, at), problem);
    let object = name(view, table, at, ("objname", OBJNAME))?;
    let old_name = name(view, table, at, ("name", NAME))?;
    let old_sympos = view.literal(table, at.saturating_add(SYMPOS))?;
    let listed = view.literal(table, at.saturating_add(NEW_SIZE))?;
    let Some(new) = view.pointer(table, at)? else {
        return fault(format!("{old_name} has no new_addr"));
    };
    let Some((new_section, new_symbol, new_size)) = code(view, &new) else {
        return fault(format!(
            "new_addr of {old_name} is no function with a size in a section of code that \
                 stays loaded"
        ));
    };
    if listed != new_size {
        return fault(format!(
            "{old_name} has {listed} bytes in the table, its symbol {new_size}"
        ));
    }
    let func = KlpFunc {
        old_name,
        old_sympos,
        new_symbol,
        new_section,
        new_offset: new.offset,
        new_size,
    };
    Ok((object, func))
}

/// The function that a pointer leads to: index of its section and of its symbol, and size in bytes.
fn code(view: &View, pointee: &Pointee) -> Option<(usize, usize, u64)> {
    let SymSection::Section(index) = pointee.section else {
        return None;
    };
    let section = view.section(index)?;
    let (symbol, size) = view.function(pointee, index)?;
    (section.role == Role::Text).then_some((index, symbol, size))
}

#[cfg(test)]
mod tests {
    use super::super::testelf::{Spec, TestElf, ALLOC, CODE, R_64, VARS};
    use super::super::tests::{parse, refused};
    use super::*;

    #[test]
    fn functions_come_from_the_tables_of_kpatch() {
        let payload = parse(&Spec::kpatch().build()).unwrap();
        let names: Vec<_> = payload
            .klp
            .objects
            .iter()
            .map(|o| {
                let funcs: Vec<_> = o
                    .funcs
                    .iter()
                    .map(|f| (f.old_name.as_str(), f.old_sympos, f.new_offset, f.new_size))
                    .collect();
                (o.name.as_deref(), o.callbacks, funcs)
            })
            .collect();
        assert_eq!(
            names,
            [
                (
                    None,
                    false,
                    vec![("version_proc_show", 0, 16, 11), ("show_it", 2, 32, 11)]
                ),
                (Some("ext4"), false, vec![("ext4_read", 0, 48, 11)]),
            ]
        );
        assert_eq!((payload.klp.place, payload.klp.object_stride), (None, None));
        assert_eq!(payload.klp.replace, Some(true));
        assert_eq!(payload.concerns(), []);
        let placed: Vec<_> = payload.placed().map(|s| s.name.as_str()).collect();
        assert!(
            placed.contains(&".kpatch.funcs") && placed.contains(&".kpatch.strings"),
            "code of the hook refers to them: {placed:?}"
        );
        let summary = payload.summary();
        assert_eq!(summary.format, "kpatch");
        assert_eq!(summary.objects[1].functions[0].new, "new_ext4_read");
    }

    #[test]
    fn callbacks_of_kpatch_are_refused_as_those_of_livepatch() {
        let mut elf = Spec::kpatch();
        let table = elf.find(".kpatch.callbacks.pre_patch", VARS);
        elf.data(table).resize(24, 0);
        let text = elf.find(".text", CODE);
        let strings = elf.find(".kpatch.strings", ALLOC);
        let (text, name) = (elf.section_symbol(text), elf.string(strings, "nf_tables"));
        let strings = elf.section_symbol(strings);
        elf.reloc(table, 0, R_64, text, 0);
        elf.reloc(table, 8, R_64, strings, i64::try_from(name).unwrap());
        let payload = parse(&elf.build()).unwrap();
        let concerns = payload.concerns();
        assert_eq!(concerns.len(), 1, "{concerns:?}");
        assert_eq!(concerns[0].subject, "nf_tables");
        assert!(concerns[0].reason.contains("callbacks"));
    }

    #[test]
    fn damaged_tables_are_refused_with_their_place() {
        let changed = |change: &dyn Fn(&mut TestElf, usize)| {
            let mut elf = Spec::kpatch();
            let funcs = elf.find(FUNCS, ALLOC);
            change(&mut elf, funcs);
            elf
        };
        for (change, words) in [
            (
                (&|e: &mut TestElf, f| e.data(f).truncate(160)) as &dyn Fn(&mut TestElf, usize),
                "lies outside",
            ),
            (
                &|e: &mut TestElf, f| e.data(f).resize(200, 0),
                "a multiple of 56",
            ),
            (&|e: &mut TestElf, f| e.drop_reloc(f, 0), "no new_addr"),
            (
                &|e: &mut TestElf, f| e.drop_reloc(f, 56 + NAME),
                "name doesn't point",
            ),
            (
                &|e: &mut TestElf, f| e.drop_reloc(f, OBJNAME),
                "objname doesn't point",
            ),
            (
                &|e: &mut TestElf, f| e.put_u64(f, NEW_SIZE, 12),
                "12 bytes in the table",
            ),
            (
                &|e: &mut TestElf, f| {
                    let text = e.find(".text", CODE);
                    let text = e.section_symbol(text);
                    e.drop_reloc(f, 0);
                    e.reloc(f, 0, R_64, text, 17);
                },
                "no function with a size",
            ),
        ] {
            refused(changed(change), words);
        }
        let mut elf = Spec::kpatch();
        elf.section(DYNRELAS, ALLOC, &[0; 64]);
        refused(elf, "kpatch.ko");
    }
}
