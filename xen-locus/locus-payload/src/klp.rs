//! `struct klp_patch` and what hangs off it, made out from a module's relocations.
//!
//! From inside, the module hands its `struct klp_patch` to `klp_enable_patch()`. From outside
//! nothing runs, so the structure is found by the one thing that every patch has: its first field
//! is the address of the module itself. The first fields of the three structures are the
//! interface that patch authors write against (`include/linux/livepatch.h`), the same in every
//! kernel since 4.0:
//!
//! ```text
//! struct klp_patch  { struct module *mod; struct klp_object *objs; … }
//! struct klp_object { const char *name; struct klp_func *funcs; callbacks …; … }
//! struct klp_func   { const char *old_name; void *new_func; unsigned long old_sympos; … }
//! ```
//!
//! The structures go on with the kernel's own fields, so their sizes differ between kernels.
//! Arrays end with an element of zeroes, and the symbol of an array gives its whole size, so
//! the size of an element follows from the number of elements seen. The linker confirms it
//! against the guest's own types.

use serde::Serialize;

use super::deref::{Pointee, View};
use super::elf::Section;
use super::error::{PayloadErrorKind, Result};
use super::role::Role;
use super::symbol::{SymSection, Symbol};
use super::MAX_NAME;

/// Most structures that are looked at closely as a possible `struct klp_patch`.
const MAX_LIKELY: u64 = 64;
/// Most objects in a patch.
pub(super) const MAX_OBJECTS: u64 = 1024;
/// Most functions in a patch, over all objects.
pub(super) const MAX_FUNCS: u64 = 16384;
/// Largest structure of the three; in Linux 6.1 they have 200, 168 and 152 bytes.
const MAX_STRUCT: u64 = 4096;
/// Fields of `struct klp_object` that a patch author fills end here: name, funcs, 4 callbacks.
const OBJECT_EXTERNAL: u64 = 48;
/// Fields of `struct klp_func` that a patch author fills end here.
const FUNC_EXTERNAL: u64 = 24;

/// A payload's `struct klp_patch`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Klp {
    /// The section that holds it, and its place there; `None` in a module made by kpatch-build,
    /// which makes it when it is loaded from inside.
    pub place: Option<(usize, u64)>,
    /// Its size, if a symbol tells.
    pub size: Option<u64>,
    /// Its `replace` field; `None` if the file alone can't tell: if it is among fields that this
    /// reader doesn't know, or if the payload's code may set it when it is loaded from inside.
    pub replace: Option<bool>,
    /// True if it has `states`.
    pub states: bool,
    /// `sizeof(struct klp_object)` as inferred; `None` where there is no such array.
    pub object_stride: Option<u64>,
    /// `sizeof(struct klp_func)` as inferred; `None` where there is no such array.
    pub func_stride: Option<u64>,
    /// What it patches.
    pub objects: Vec<KlpObject>,
}

/// A `struct klp_object`: the kernel or a module, and its functions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KlpObject {
    /// A module's name; `None` is the kernel itself.
    pub name: Option<String>,
    /// True if it has callbacks.
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
    /// The symbol of the new function.
    pub new_symbol: usize,
    /// The section that holds the new function, of [`Role::Text`].
    pub new_section: usize,
    /// Its place in that section.
    pub new_offset: u64,
    /// Its size in bytes, at least 1.
    pub new_size: u64,
}

/// Finds the payload's one `struct klp_patch`. `module` is for messages.
pub(super) fn find(sections: &[Section], symbols: &[Symbol], module: &str) -> Result<Klp> {
    let view = View::new(sections, symbols);
    let mut good: Option<Klp> = None;
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
            match (patch_at(&view, section, reloc.offset, &objs), &good) {
                (Ok(second), Some(first)) => {
                    let place = |klp: &Klp| {
                        let (section, offset) = klp.place.unwrap_or_default();
                        view.place(section, offset)
                    };
                    return Err(PayloadErrorKind::AmbiguousKlpPatch {
                        first: place(first),
                        second: place(&second),
                    });
                }
                (Ok(klp), None) => good = Some(klp),
                (Err(problem), _) => fault = Some(problem),
            }
        }
    }
    // A structure that is damaged behind its head must not hide behind a sound one.
    if let Some(fault) = fault {
        return Err(fault);
    }
    good.ok_or_else(|| PayloadErrorKind::NoKlpPatch {
        module: module.to_owned(),
        reasons: format!(
            "{seen} addresses of the module are in its data, none followed by the address of an \
             array of struct klp_object"
        ),
    })
}

/// The objects of a `struct klp_patch`; `None` if this is surely another structure.
///
/// Others that start with their owner go on with functions, strings, lists or numbers.
fn objects_behind(view: &View, section: &Section, offset: u64) -> Option<Pointee> {
    let objs = view
        .pointer(section, offset.saturating_add(8))
        .ok()
        .flatten()?;
    let target = view.data(&objs)?;
    looks_like_object(view, target, objs.offset).then_some(objs)
}

/// Reads a `struct klp_patch`.
fn patch_at(view: &View, section: &Section, offset: u64, objs: &Pointee) -> Result<Klp> {
    let what = "struct klp_patch";
    let here = (section.index, offset);
    let Some(objects) = view.data(objs) else {
        return klp_fault(
            view,
            what,
            here,
            "its objs are not in the payload's data".into(),
        );
    };
    let size = view.object_size(section.index, offset)?;
    let (replace, states) = patch_tail(view, section, offset, size)?;

    let (stride, count) = object_stride(view, objects, objs.offset)?;
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
        return klp_fault(view, what, here, "it has no functions".into());
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

/// What can be said of the fields of `struct klp_patch` behind `objs`.
///
/// `replace` came with Linux 5.1 at offset 16; `states` came before it with Linux 5.5 and moved
/// it to 24. So a lone 1 at either place is `replace`, and zeroes everywhere are `false`.
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
    if view.relocs_in(section, from, end).next().is_some()
        || view.is_late(section, from, end)
        || view.code_refers_to(section.index, from, end)
    {
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

/// True if a `struct klp_object` with functions may start here.
fn looks_like_object(view: &View, section: &Section, offset: u64) -> bool {
    let funcs = view
        .pointer(section, offset.saturating_add(8))
        .ok()
        .flatten();
    let Some(funcs) = funcs else { return false };
    view.data(&funcs).is_some_and(|target| {
        // A first function with a name, or the end at once, if there are callbacks only.
        // Names and lists of other structures don't start so.
        let end = funcs.offset.saturating_add(FUNC_EXTERNAL);
        let named = view
            .pointer(target, funcs.offset)
            .is_ok_and(|name| name.is_some());
        funcs.offset % 8 == 0 && (named || view.is_zero(target, funcs.offset, end))
    })
}

fn klp_fault<T>(view: &View, what: &'static str, at: (usize, u64), problem: String) -> Result<T> {
    Err(PayloadErrorKind::Klp {
        structure: what,
        place: view.place(at.0, at.1),
        problem,
    })
}

/// The size of the array at a place, from its symbol.
fn array_size(view: &View, what: &'static str, section: &Section, offset: u64) -> Result<u64> {
    let reached = |size| view.code_refers_to(section.index, offset, offset.saturating_add(size));
    match view.object_size(section.index, offset)? {
        Some(size) if reached(size) => klp_fault(
            view,
            what,
            (section.index, offset),
            "code of the payload refers to this array, so module_init may change it when it is \
             loaded from inside; fill it in where it is defined"
                .into(),
        ),
        Some(size) => Ok(size),
        None => klp_fault(
            view,
            what,
            (section.index, offset),
            "no symbol gives the size of this array; build the module with its symbols".into(),
        ),
    }
}

/// The size of `struct klp_object` and the number of those before the terminating one.
fn object_stride(view: &View, section: &Section, offset: u64) -> Result<(u64, u64)> {
    let what = "struct klp_object";
    let size = array_size(view, what, section, offset)?;
    let end = offset.saturating_add(size);
    let relocs = view.relocs_in(section, offset, end).count() as u64;
    // Each element but the last holds at least the address of its functions.
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
        [] => klp_fault(
            view,
            what,
            (section.index, offset),
            format!(
                "the array of {size} bytes is not a row of elements with functions that ends \
                 with an element of zeroes; every klp_object needs funcs"
            ),
        ),
        _ => klp_fault(
            view,
            what,
            (section.index, offset),
            format!(
                "the array of {size} bytes can be divided in {} ways",
                found.len()
            ),
        ),
    }
}

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
        Some(pointee) => Some(string(view, what, here, "name", &pointee)?),
        None => None,
    };
    if name.as_deref() == Some("vmlinux") || name.as_deref() == Some("") {
        let problem = "the kernel itself has no name here; leave .name out".into();
        return klp_fault(view, what, here, problem);
    }
    let end = at.saturating_add(stride);
    let external = at.saturating_add(OBJECT_EXTERNAL);
    if !view.is_zero(section, external, end) {
        let problem = "the kernel's own fields are not zero, expected zeroes in a file".into();
        return klp_fault(view, what, here, problem);
    }
    let callbacks = !view.is_zero(section, at.saturating_add(16), external);
    let funcs = match view.pointer(section, at.saturating_add(8))? {
        Some(pointee) => functions(view, &pointee, here, func_stride, total)?,
        None => return klp_fault(view, what, here, "it has no funcs".into()),
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
        let problem = "its funcs are not in a data section of the payload".into();
        return klp_fault(view, "struct klp_object", object, problem);
    };
    let offset = pointee.offset;
    let here = (section.index, offset);
    let size = array_size(view, what, section, offset)?;
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
        return klp_fault(view, what, here, problem);
    }
    if let Some(known) = known_stride.replace(stride) {
        if known != stride {
            let problem =
                format!("its elements have {stride} bytes, those of another array {known}");
            return klp_fault(view, what, here, problem);
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

fn function_at(view: &View, section: &Section, at: u64, stride: u64) -> Result<KlpFunc> {
    let what = "struct klp_func";
    let here = (section.index, at);
    let fail = |problem: String| klp_fault(view, what, here, problem);
    let old_name = match view.pointer(section, at)? {
        Some(pointee) => string(view, what, here, "old_name", &pointee)?,
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

/// A name that a field points at.
fn string(
    view: &View,
    what: &'static str,
    here: (usize, u64),
    field: &str,
    pointee: &Pointee,
) -> Result<String> {
    match view.string(pointee) {
        Some(text) if !text.is_empty() => Ok(text.to_owned()),
        _ => klp_fault(
            view,
            what,
            here,
            format!("{field} doesn't point at a printable name of 1 to {MAX_NAME} bytes"),
        ),
    }
}
