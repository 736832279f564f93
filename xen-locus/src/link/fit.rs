//! Does a payload's `struct klp_patch` have the layout that the guest's kernel gives it?
//!
//! The payload was compiled against some kernel's headers, and only its own bytes were read: the
//! first fields where every kernel has them, sizes from how the arrays divide, and `replace` where it
//! was found (`patch::klp`). The guest's types must say the same of all of it.

use crate::error::{Error, Result};
use crate::kernel::btf::Btf;
use crate::patch::Payload;

/// Where the first fields are, as [`crate::patch::Klp`] was read: structure, field, offset.
const FIELDS: [(&str, &str, usize); 8] = [
    ("klp_patch", "mod", 0),
    ("klp_patch", "objs", 8),
    ("klp_object", "name", 0),
    ("klp_object", "funcs", 8),
    ("klp_object", "callbacks", 16),
    ("klp_func", "old_name", 0),
    ("klp_func", "new_func", 8),
    ("klp_func", "old_sympos", 16),
];

/// Compares the layout of `payload` with the guest's types. A kernel built without livepatch has
/// none of these, and nothing to disagree with.
///
/// # Errors
/// [`Error::NotApplicable`] that names the first difference.
pub fn check_layout(btf: &Btf, payload: &Payload) -> Result<()> {
    let klp = &payload.klp;
    let Some((section, offset)) = klp.place else {
        // Made by kpatch-build: what is read has a layout of its own.
        return Ok(());
    };
    let differs = |what: &str, ours: u64, theirs: usize| {
        Err(Error::NotApplicable(format!(
            "payload {}: {what} is {ours} bytes in it and {theirs} in the guest's kernel; build it \
             against the guest's kernel",
            payload.name
        )))
    };
    for (name, stride) in [
        ("klp_object", klp.object_stride),
        ("klp_func", klp.func_stride),
        ("klp_patch", klp.size),
    ] {
        match (btf.size_of(name), stride) {
            (Ok(size), Some(stride)) if size as u64 != stride => {
                return differs(&format!("the size of struct {name}"), stride, size);
            }
            _ => {}
        }
    }
    for (name, field, ours) in FIELDS {
        match btf.offset_of(name, field) {
            Ok(theirs) if theirs != ours => {
                let what = format!("the place of {field} in struct {name}");
                return differs(&what, ours as u64, theirs);
            }
            _ => {}
        }
    }
    let (Some(replace), Ok(at)) = (klp.replace, btf.offset_of("klp_patch", "replace")) else {
        return Ok(());
    };
    let at = offset.saturating_add(at as u64);
    let set = payload
        .section(section)
        .zip(usize::try_from(at).ok())
        .and_then(|(section, at)| section.data.get(at))
        .is_some_and(|&byte| byte != 0);
    if set == replace {
        return Ok(());
    }
    Err(Error::NotApplicable(format!(
        "payload {}: its struct klp_patch does not have `replace` where the guest's kernel has it; \
         build it against the guest's kernel",
        payload.name
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::btf::blob::Blob;
    use crate::patch::test_payload;

    /// Types whose `replace` and `sympos` stand where they are told to, with sizes of 6.1.
    fn types(replace: usize, sympos: usize, func: usize) -> Btf {
        let mut b = Blob::new();
        let long = b.int("long", 8);
        let byte = b.int("bool", 1);
        b.structure(
            "klp_patch",
            200,
            &[
                ("mod", long, 0),
                ("objs", long, 8),
                ("replace", byte, replace),
            ],
        );
        b.structure(
            "klp_object",
            168,
            &[
                ("name", long, 0),
                ("funcs", long, 8),
                ("callbacks", long, 16),
            ],
        );
        b.structure(
            "klp_func",
            func,
            &[
                ("old_name", long, 0),
                ("new_func", long, 8),
                ("old_sympos", long, sympos),
            ],
        );
        Btf::new(b.bytes()).unwrap()
    }

    #[test]
    fn a_payload_must_have_the_layout_of_the_guests_types() {
        let payload = Payload::parse("test.ko", &test_payload()).unwrap();
        let said = |btf: &Btf, payload: &Payload| {
            check_layout(btf, payload).map_err(|e| e.to_string()).err()
        };
        assert_eq!(said(&types(24, 16, 152), &payload), None);
        let none = Btf::new(Blob::new().bytes()).unwrap();
        assert_eq!(said(&none, &payload), None);
        for (btf, words) in [
            (types(24, 16, 160), "the size of struct klp_func is 152"),
            (
                types(24, 24, 152),
                "the place of old_sympos in struct klp_func is 16",
            ),
        ] {
            let error = said(&btf, &payload).unwrap_or_default();
            assert!(error.contains(words), "{error}");
        }
        // A 1 that stands where this kernel has something else.
        let mut replaces = payload.clone();
        replaces.klp.replace = Some(true);
        let (section, offset) = payload.klp.place.unwrap();
        let at = usize::try_from(offset).unwrap() + 16;
        replaces.sections[section].data[at] = 1;
        assert_eq!(said(&types(16, 16, 152), &replaces), None);
        let error = said(&types(24, 16, 152), &replaces).unwrap_or_default();
        assert!(error.contains("`replace`"), "{error}");
    }
}
