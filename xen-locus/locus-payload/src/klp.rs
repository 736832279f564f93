//! `struct klp_patch` and the structures that it points at, found through a module's relocations.
//!
//! When the kernel loads a module, `module_init` passes the `struct klp_patch` to
//! `klp_enable_patch()`. Here nothing runs. So the structure is found by the one thing that every patch
//! has: its first field is the address of the module itself. The first fields of the three structures
//! are the interface that patch authors write against (`include/linux/livepatch.h`). They are the same
//! in every kernel since 4.0:
//!
//! ```text
//! struct klp_patch  { struct module *mod; struct klp_object *objs; … }
//! struct klp_object { const char *name; struct klp_func *funcs; callbacks …; … }
//! struct klp_func   { const char *old_name; void *new_func; unsigned long old_sympos; … }
//! ```
//!
//! The kernel's own fields follow, so the sizes of the structures differ between kernels. An array ends
//! with an element of zeroes, and its symbol gives its whole size. So the size of an element follows
//! from the number of elements. The linker later compares it with the guest's own types.

use serde::Serialize;

use super::elf::Section;
use super::error::{PayloadErrorKind, Result};
use super::pointers::{Pointee, View};
use super::role::Role;
use super::symbol::{ElfSymbol, SymSection};

/// Most structures that are read as a possible `struct klp_patch`.
const MAX_LIKELY: u64 = 64;
/// Most objects in a patch.
pub(super) const MAX_OBJECTS: u64 = 1024;
/// Most functions in a patch, over all objects.
pub(super) const MAX_FUNCS: u64 = 16384;
/// Largest size of each of the three structures, in bytes. In Linux 6.1 they have 200, 168 and 152.
const MAX_STRUCT: u64 = 4096;
/// Offset in `struct klp_patch` where the fields of the patch author end: mod, objs, states, replace.
const PATCH_EXTERNAL: u64 = 32;
/// Offset in `struct klp_object` where the fields of the patch author end: name, funcs, 4 callbacks.
const OBJECT_EXTERNAL: u64 = 48;
/// Offset in `struct klp_func` where the fields of the patch author end.
const FUNC_EXTERNAL: u64 = 24;

/// What a payload replaces: its `struct klp_patch` (`include/linux/livepatch.h` of Linux), or the tables
/// of kpatch-build that stand for one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Klp {
    /// ELF index of the section that holds it, and offset there in bytes. `None` in a module made by
    /// kpatch-build, whose `module_init` makes the structure.
    pub place: Option<(usize, u64)>,
    /// Size of the structure in bytes, if a symbol gives it.
    pub size: Option<u64>,
    /// The `replace` field: true if the patch replaces all others. `None` if the file alone can't tell:
    /// the field is among fields that this reader does not know, or `module_init` may set it.
    pub replace: Option<bool>,
    /// True if the `states` field is not null.
    pub states: bool,
    /// `sizeof(struct klp_object)` in bytes, as inferred; `None` if there is no such array.
    pub object_stride: Option<u64>,
    /// `sizeof(struct klp_func)` in bytes, as inferred; `None` if there is no such array.
    pub func_stride: Option<u64>,
    /// The kernel and the modules whose functions are replaced.
    pub objects: Vec<KlpObject>,
}

/// A `struct klp_object`: the kernel or a module, and its functions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KlpObject {
    /// Name of the module; `None` is the kernel itself (`vmlinux`).
    pub name: Option<String>,
    /// True if one of `pre_patch`, `post_patch`, `pre_unpatch` and `post_unpatch` is set.
    pub callbacks: bool,
    /// Functions that are replaced.
    pub funcs: Vec<KlpFunc>,
}

/// A `struct klp_func`: one function that is replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KlpFunc {
    /// Name of the function in the kernel or module.
    pub old_name: String,
    /// 0 if the name is unique in its object, else which of its occurrences, from 1.
    pub old_sympos: u64,
    /// Index of the new function in [`Payload::symbols`](super::Payload::symbols).
    pub new_symbol: usize,
    /// ELF index of the section that holds the new function; its role is [`Role::Text`].
    pub new_section: usize,
    /// Offset of the new function in that section, in bytes.
    pub new_offset: u64,
    /// Size of the new function in bytes, at least 1.
    pub new_size: u64,
}

/// Finds the payload's one `struct klp_patch`. `module` is its name, for messages.
pub(super) fn find(sections: &[Section], symbols: &[ElfSymbol], module: &str) -> Result<Klp> {
    let view = View::new(sections, symbols);
    let mut good: Option<((usize, u64), Klp)> = None;
    let mut fault: Option<PayloadErrorKind> = None;
    let mut seen = 0u64;
    let mut likely = 0u64;
    for section in sections
        .iter()
        .filter(|s| matches!(s.role, Role::Data | Role::RoData))
    {
        for reloc in section.relocs.iter().filter(|r| view.is_this_module(r)) {
            seen = seen.saturating_add(1);
            let Some(objs) = objects_behind(&view, section, reloc.offset) else {
                continue;
            };
            likely = likely.saturating_add(1);
            super::error::limit(
                "the number of possible struct klp_patch",
                likely,
                MAX_LIKELY,
            )?;
            let here = (section.index, reloc.offset);
            match (patch_at(&view, section, reloc.offset, &objs), &good) {
                (Ok(_), Some((first, _))) => {
                    return Err(PayloadErrorKind::AmbiguousKlpPatch {
                        first: view.place(first.0, first.1),
                        second: view.place(here.0, here.1),
                    });
                }
                (Ok(klp), None) => good = Some((here, klp)),
                (Err(problem), _) => fault = Some(problem),
            }
        }
    }
    // A structure whose first fields are right and whose rest is damaged is an error, also beside a good one.
    if let Some(fault) = fault {
        return Err(fault);
    }
    let found = good.map(|(_, klp)| klp);
    found.ok_or_else(|| PayloadErrorKind::NoKlpPatch {
        module: module.to_owned(),
        reasons: format!(
            "{seen} addresses of the module are in its data, none is followed by the address of an \
             array of struct klp_object"
        ),
    })
}

/// Where the `objs` of a `struct klp_patch` lead; `None` if this must be another structure.
///
/// In other structures that start with their owner, functions, strings, lists or numbers follow.
fn objects_behind(view: &View, section: &Section, offset: u64) -> Option<Pointee> {
    let objs = view
        .pointer(section, offset.saturating_add(8))
        .ok()
        .flatten()?;
    let target = view.data(&objs)?;
    looks_like_object(view, target, objs.offset).then_some(objs)
}

/// Reads the `struct klp_patch` at `offset` of a section.
fn patch_at(view: &View, section: &Section, offset: u64, objs: &Pointee) -> Result<Klp> {
    let what = "struct klp_patch";
    let here = (section.index, offset);
    let Some(objects) = view.data(objs) else {
        return view.fault(what, here, "its objs are not in the payload's data");
    };
    let size = view.object_size(section.index, offset)?;
    super::error::limit(
        "the size of a struct klp_patch",
        size.unwrap_or(0),
        MAX_STRUCT,
    )?;
    let end = offset.saturating_add(size.unwrap_or(PATCH_EXTERNAL));
    if let Some(pointer) = view.pointer_to(section.index, offset, end, None) {
        return reached_by_pointer(view, what, here, pointer);
    }
    let (replace, states) = patch_tail(view, section, offset, size)?;

    let field = (section.index, offset.saturating_add(8));
    let (stride, count) = object_stride(view, objects, objs.offset, field)?;
    let mut found = Vec::new();
    let mut func_stride = None;
    let mut total = 0u64;
    for index in 0..count {
        let at = objs.offset.saturating_add(index.saturating_mul(stride));
        found.push(object_at(
            view,
            objects,
            at,
            stride,
            &mut func_stride,
            &mut total,
        )?);
    }
    let Some(func_stride) = func_stride else {
        return view.fault(what, here, "it has no functions");
    };
    Ok(Klp {
        place: Some(here),
        size,
        replace,
        states,
        object_stride: Some(stride),
        func_stride: Some(func_stride),
        objects: found,
    })
}

/// The fields of `struct klp_patch` after `objs`: `replace` if it can be told, and whether there are
/// `states`.
///
/// Linux 5.1 added `replace` at offset 16. Linux 5.5 put `states` in front of it, so that it is at 24. So a
/// single 1 at either offset is `replace`, and
/// zeroes everywhere are `false`.
fn patch_tail(
    view: &View,
    section: &Section,
    offset: u64,
    size: Option<u64>,
) -> Result<(Option<bool>, bool)> {
    let states_field = offset.saturating_add(16);
    let states = view.pointer(section, states_field).ok().flatten().is_some();
    let Some(size) = size else {
        return Ok((None, states));
    };
    let end = offset.saturating_add(size);
    let from = if states {
        offset.saturating_add(24)
    } else {
        states_field
    };
    if view.is_changed(section, from, end) || view.code_refers_to(section.index, from, end) {
        return Ok((None, states));
    }
    let nonzero = view.nonzero_bytes(section, from, end)?;
    let replace = match nonzero.as_slice() {
        [] => Some(false),
        [(at, 1)] if *at == offset.saturating_add(24) || (*at == states_field && !states) => {
            Some(true)
        }
        _ => None,
    };
    Ok((replace, states))
}

/// True if a `struct klp_object` with functions may start at `offset` of a section.
fn looks_like_object(view: &View, section: &Section, offset: u64) -> bool {
    let funcs = view
        .pointer(section, offset.saturating_add(8))
        .ok()
        .flatten();
    let Some(funcs) = funcs else { return false };
    view.data(&funcs).is_some_and(|target| {
        // The first function has a name, or the array ends at once if there are callbacks only. Names
        // and lists of other structures do not begin like that.
        let end = funcs.offset.saturating_add(FUNC_EXTERNAL);
        let named = view
            .pointer(target, funcs.offset)
            .is_ok_and(|name| name.is_some());
        funcs.offset % 8 == 0 && (named || view.is_zero(target, funcs.offset, end))
    })
}

/// The error that a structure at `place` has another pointer to it, at `pointer`.
fn reached_by_pointer<T>(
    view: &View,
    what: &'static str,
    place: (usize, u64),
    pointer: (usize, u64),
) -> Result<T> {
    let pointer = view.place(pointer.0, pointer.1);
    view.fault(
        what,
        place,
        format!(
            "the pointer at {pointer} leads to it, so module_init may change it when the kernel loads \
             the module; fill it in where it is defined, and leave out that pointer"
        ),
    )
}

/// Size in bytes of the array at `offset` of a section, which its symbol gives.
///
/// `field` is the pointer to it in the structure that it belongs to.
fn array_size(
    view: &View,
    what: &'static str,
    section: &Section,
    offset: u64,
    field: (usize, u64),
) -> Result<u64> {
    let end = |size| offset.saturating_add(size);
    let pointer = |size| view.pointer_to(section.index, offset, end(size), Some(field));
    let reached = |size| view.code_refers_to(section.index, offset, end(size));
    match view.object_size(section.index, offset)? {
        Some(size) if reached(size) => view.fault(what,
            (section.index, offset),
            "code of the payload refers to this array, so module_init may change it when the kernel \
             loads the module; fill it in where it is defined",
        ),
        Some(size) => match pointer(size) {
            Some(pointer) => reached_by_pointer(view, what, (section.index, offset), pointer),
            None => Ok(size),
        },
        None => view.fault(what,
            (section.index, offset),
            "no symbol gives the size of this array; build the module with its symbols",
        ),
    }
}

/// Size of `struct klp_object` in bytes, and number of elements before the terminating one.
fn object_stride(
    view: &View,
    section: &Section,
    offset: u64,
    field: (usize, u64),
) -> Result<(u64, u64)> {
    let what = "struct klp_object";
    let size = array_size(view, what, section, offset, field)?;
    let end = offset.saturating_add(size);
    let relocs = view.relocs_in(section, offset, end).count() as u64;
    // Each element except the last holds at least the address of its functions.
    let most = relocs.saturating_add(1).min(MAX_OBJECTS.saturating_add(1));
    let fits = |elements: u64| {
        let stride = size / elements;
        let last = size.saturating_sub(stride);
        size % elements == 0
            && stride.is_multiple_of(8)
            && (OBJECT_EXTERNAL..=MAX_STRUCT).contains(&stride)
            && view.is_zero(section, offset.saturating_add(last), end)
            && (0..elements.saturating_sub(1)).all(|index| {
                let at = offset.saturating_add(index.saturating_mul(stride));
                looks_like_object(view, section, at)
            })
    };
    let found: Vec<u64> = (2..=most).filter(|elements| fits(*elements)).collect();
    match found.as_slice() {
        [elements] => Ok((size / elements, elements.saturating_sub(1))),
        [] => view.fault(
            what,
            (section.index, offset),
            format!(
                "the array of {size} bytes is not a row of elements with functions that ends \
                 with an element of zeroes; every klp_object needs funcs"
            ),
        ),
        _ => view.fault(
            what,
            (section.index, offset),
            format!(
                "the array of {size} bytes can be divided in {} ways",
                found.len()
            ),
        ),
    }
}

/// Reads the `struct klp_object` of `stride` bytes at offset `at`. `func_stride` and `total` are those of
/// the objects before it.
fn object_at(
    view: &View,
    section: &Section,
    at: u64,
    stride: u64,
    func_stride: &mut Option<u64>,
    total: &mut u64,
) -> Result<KlpObject> {
    let what = "struct klp_object";
    let here = (section.index, at);
    let name = match view.pointer(section, at)? {
        Some(pointee) => Some(view.name(what, here, "name", Some(pointee))?),
        None => None,
    };
    if name.as_deref() == Some("vmlinux") || name.as_deref() == Some("") {
        let problem = "the kernel itself has no name here; leave .name out";
        return view.fault(what, here, problem);
    }
    let end = at.saturating_add(stride);
    let external = at.saturating_add(OBJECT_EXTERNAL);
    if !view.is_zero(section, external, end) {
        let problem = "the kernel's own fields are not zero, expected zeroes in a file";
        return view.fault(what, here, problem);
    }
    let callbacks = !view.is_zero(section, at.saturating_add(16), external);
    let funcs = match view.pointer(section, at.saturating_add(8))? {
        Some(pointee) => functions(view, &pointee, here, func_stride, total)?,
        None => return view.fault(what, here, "it has no funcs"),
    };
    Ok(KlpObject {
        name,
        callbacks,
        funcs,
    })
}

/// Reads the array of `struct klp_func` that an object points at.
fn functions(
    view: &View,
    pointee: &Pointee,
    object: (usize, u64),
    known_stride: &mut Option<u64>,
    total: &mut u64,
) -> Result<Vec<KlpFunc>> {
    let what = "struct klp_func";
    let Some(section) = view.data(pointee) else {
        let problem = "its funcs are not in a data section of the payload";
        return view.fault("struct klp_object", object, problem);
    };
    let offset = pointee.offset;
    let here = (section.index, offset);
    let field = (object.0, object.1.saturating_add(8));
    let size = array_size(view, what, section, offset, field)?;
    let end = offset.saturating_add(size);
    // Each element has two addresses, old_name and new_func, and there is one of zeroes.
    let relocs = view.relocs_in(section, offset, end).count() as u64;
    let count = relocs / 2;
    let elements = count.saturating_add(1);
    let stride = size / elements;
    if !relocs.is_multiple_of(2)
        || size % elements != 0
        || !stride.is_multiple_of(8)
        || !(FUNC_EXTERNAL..=MAX_STRUCT).contains(&stride)
        || !view.is_zero(section, end.saturating_sub(stride), end)
    {
        let problem = format!(
            "{relocs} addresses in an array of {size} bytes, expected two for each function and \
             an element of zeroes at the end; every klp_func needs old_name and new_func"
        );
        return view.fault(what, here, problem);
    }
    if let Some(known) = known_stride.replace(stride) {
        if known != stride {
            let problem =
                format!("its elements have {stride} bytes, those of another array {known}");
            return view.fault(what, here, problem);
        }
    }
    *total = total.saturating_add(count);
    super::error::limit("the number of functions", *total, MAX_FUNCS)?;
    (0..count)
        .map(|index| {
            function_at(
                view,
                section,
                offset.saturating_add(index.saturating_mul(stride)),
                stride,
            )
        })
        .collect()
}

/// Reads the `struct klp_func` of `stride` bytes at offset `at`.
fn function_at(view: &View, section: &Section, at: u64, stride: u64) -> Result<KlpFunc> {
    let what = "struct klp_func";
    let here = (section.index, at);
    let fail = |problem: String| view.fault(what, here, problem);
    let old_name = match view.pointer(section, at)? {
        Some(pointee) => view.name(what, here, "old_name", Some(pointee))?,
        None => return fail("it has no old_name".into()),
    };
    let Some(new) = view.pointer(section, at.saturating_add(8))? else {
        return fail(format!("{old_name} has no new_func"));
    };
    let sympos_field = at.saturating_add(16);
    if !view.is_zero(
        section,
        at.saturating_add(FUNC_EXTERNAL),
        at.saturating_add(stride),
    ) {
        return fail(format!(
            "{old_name}: the kernel's own fields are not zero, expected zeroes in a file"
        ));
    }
    let old_sympos = view.literal(section, sympos_field)?;
    let (new_section, role) = match new.section {
        SymSection::Section(index) => (index, view.section(index).map(|s| &s.role)),
        _ => return fail(format!("the new {old_name} is not in the payload")),
    };
    if role != Some(&Role::Text) {
        return fail(format!(
            "the new {old_name} is in {}, expected a section of code that stays loaded",
            view.place(new_section, new.offset)
        ));
    }
    let Some((new_symbol, new_size)) = view.function(&new, new_section) else {
        return fail(format!(
            "no function symbol with a size starts at {}, where the new {old_name} should be",
            view.place(new_section, new.offset)
        ));
    };
    Ok(KlpFunc {
        old_name,
        old_sympos,
        new_symbol,
        new_section,
        new_offset: new.offset,
        new_size,
    })
}
