//! Checks that a payload was built for the guest's kernel: it must have the CRCs of the kernel's interfaces, and its
//! `struct klp_patch` the layout of the guest's own types.
//!
//! The payload was compiled against some kernel's headers, and only its own bytes were read: the
//! first fields where every kernel has them, sizes from how the arrays divide, and `replace` where it
//! was found (`locus_payload`'s `klp`). The guest's types must agree with all of it.

use locus_kernel::btf::Btf;
use locus_kernel::Kernel;
use locus_payload::{Payload, Role, SymSection, HOOK_REPLACE};

use crate::error::{Error, Result};
use crate::target::exports::Exports;

/// The export whose CRC covers the structures that every module shares with the kernel
/// (kernel/module/version.c).
const LAYOUT: &str = "module_layout";

/// Where the first fields are, as [`locus_payload::Klp`] was read: structure, field, offset.
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
/// The structure that a patch begins with.
const PATCH: &str = "klp_patch";

/// Compares the CRCs of `payload` with those of what the kernel exports: of `module_layout`, and of what the
/// payload's code and data refer to. A kernel with CRCs must find that of `module_layout` in the payload: it
/// loads no module without CRCs, unless it is told to (`check_version`, kernel/module/version.c). Any other
/// name that has none on either side passes, as there.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable) that names the first that differs or is missing, or the guest's memory
/// can't be read.
pub fn check_versions(kernel: &Kernel<'_>, exports: &Exports, payload: &Payload) -> Result<()> {
    let versions = payload.versions();
    if !versions.contains_key(LAYOUT.as_bytes()) && exports.crc(kernel, LAYOUT)?.is_some() {
        return Err(Error::not_applicable(format!(
            "payload {} has no CRC of {LAYOUT} (section __versions), and the guest's kernel has one \
             (CONFIG_MODVERSIONS): whether both have the same structures can't be told; build it against \
             the guest's kernel ({}), with its Module.symvers",
            payload.name, kernel.release
        )));
    }
    let needed = payload.needed_symbols();
    let needed = needed.iter().filter_map(|&index| payload.symbol(index));
    let needed = needed.filter(|s| s.section == SymSection::Undefined);
    for name in std::iter::once(LAYOUT).chain(needed.map(|s| s.name.as_str())) {
        let Some(&ours) = versions.get(name.as_bytes()) else {
            continue;
        };
        match exports.crc(kernel, name)? {
            Some(theirs) if ours != u64::from(theirs) => {
                return Err(Error::not_applicable(format!(
                    "payload {} is built for another kernel: its CRC of {name} is {ours:#010x}, the \
                     guest's is {theirs:#010x}; build it against the guest's kernel ({})",
                    payload.name, kernel.release
                )))
            }
            _ => {}
        }
    }
    Ok(())
}

/// Compares the layout of `payload` with the guest's types: its `struct module`, and the structures of livepatch. A kernel
/// built without livepatch has none of these, and nothing to disagree with. A kernel that has them has all members that are
/// compared.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable) that names the first difference, or the first member that is
/// missing or has another width.
pub fn check_layout(btf: &Btf, payload: &Payload) -> Result<()> {
    let klp = &payload.klp;
    let differs = |what: &str, ours: u64, theirs: usize| {
        Err(Error::not_applicable(format!(
            "payload {}: {what} is {ours} bytes in it and {theirs} in the guest's kernel; build it \
             against the guest's kernel",
            payload.name
        )))
    };
    // Later kernels' own loader asks the same of `.gnu.linkonce.this_module` (kernel/module/main.c).
    let modules = payload
        .sections
        .iter()
        .filter(|s| s.role == Role::ThisModule);
    for own in modules {
        match btf.size_of("module") {
            Ok(size) if size as u64 != own.size => {
                return differs("the size of struct module", own.size, size);
            }
            _ => {}
        }
    }
    // The reader saw to it that the first is `init_module` and the second `cleanup_module`.
    let members = payload.sections.iter();
    let members = members.filter(|s| s.role == Role::ThisModule);
    let members = members.flat_map(|s| &s.relocs).map(|r| r.offset);
    for (ours, field) in members.zip(["init", "exit"]) {
        if btf.size_of("module").is_err() {
            continue;
        }
        let theirs = btf.offset_of("module", field)?;
        if theirs as u64 != ours {
            let what = format!("the place of {field} in struct module");
            return differs(&what, ours, theirs);
        }
    }
    if btf.size_of(PATCH).is_err() {
        return Ok(());
    }
    let replace_at = btf.offset_of_sized(PATCH, "replace", 1)?;
    let Some(place) = klp.place else {
        // Made by kpatch-build: what is read has a layout of its own.
        return match HOOK_REPLACE.contains(&(replace_at as u64)) {
            true => Ok(()),
            false => Err(Error::not_applicable(format!(
                "payload {}: its module_init was searched for what sets `replace` at the offsets {HOOK_REPLACE:?} \
                 of struct klp_patch, and the guest's kernel has it at {replace_at}; use a payload made without \
                 kpatch-build",
                payload.name
            ))),
        };
    };
    for (name, stride) in [
        ("klp_object", klp.object_stride),
        ("klp_func", klp.func_stride),
        (PATCH, klp.size),
    ] {
        match (btf.size_of(name)?, stride) {
            (size, Some(stride)) if size as u64 != stride => {
                return differs(&format!("the size of struct {name}"), stride, size);
            }
            _ => {}
        }
    }
    for (name, field, ours) in FIELDS {
        let theirs = btf.offset_of(name, field)?;
        if theirs != ours {
            let what = format!("the place of {field} in struct {name}");
            return differs(&what, ours as u64, theirs);
        }
    }
    check_replace(payload, place, replace_at)
}

/// Refuses a payload whose `struct klp_patch`, which is at `place`, does not have what was read of it as `replace` at the
/// offset where the guest has that.
fn check_replace(payload: &Payload, (section, offset): (usize, u64), at: usize) -> Result<()> {
    let at = offset.saturating_add(at as u64);
    let set = payload
        .section(section)
        .zip(usize::try_from(at).ok())
        .and_then(|(section, at)| section.data.get(at))
        .is_some_and(|&byte| byte != 0);
    if payload.klp.replace.is_none_or(|replace| set == replace) {
        return Ok(());
    }
    Err(Error::not_applicable(format!(
        "payload {}: its struct klp_patch does not have `replace` where the guest's kernel has it; \
         build it against the guest's kernel",
        payload.name
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ExitCode;
    use locus_guest::addr::Gva;
    use locus_guest::budget::Budget;
    use locus_kernel::btf::blob::Blob;
    use locus_kernel::fixture::{renewed, vcpus, Fixture, KIND, TEXT};
    use locus_payload::testelf::{Spec, ALLOC, MODULE_SIZE, R_PLT32};

    /// Where the guest's tables of exports stand.
    const EXPORTS: Gva = Gva(TEXT.0 + (8 << 20));

    /// What is said to a payload whose CRCs of `module_layout` and of `printk`, which it calls, are
    /// `ours`, by a guest whose tables hold `theirs`.
    fn answer(ours: [u64; 2], theirs: &[u32]) -> Result<()> {
        let ours = ours.into_iter().zip([LAYOUT, "printk"]);
        answer_to(&ours.collect::<Vec<_>>(), theirs)
    }

    /// The same, for a payload with these CRCs and names.
    fn answer_to(ours: &[(u64, &str)], theirs: &[u32]) -> Result<()> {
        let mut types = Blob::with_integers();
        types.structure(
            "kernel_symbol",
            12,
            &[("value_offset", 3, 0), ("name_offset", 3, 4)],
        );
        let mut fixture = Fixture::new();
        let code = TEXT.0 + 0x1000;
        fixture.function(code, LAYOUT, &[0xc3]);
        fixture.function(code + 16, "printk", &[0xc3]);
        for (offset, name) in [
            (0, "__start___ksymtab"),
            (36, "__stop___ksymtab"),
            (36, "__start___kcrctab"),
            (36 + 4 * theirs.len() as u64, "__stop___kcrctab"),
        ] {
            let at = EXPORTS.plus(offset);
            fixture.symbols.push((at.0, 'D', name.into()));
        }
        let memory = fixture.build();
        let mut tables = Vec::new();
        // Two names for one place: only that of the name counts.
        for (value, name) in [(16, 0), (16, 6), (0, 13)] {
            for to in [code + value, EXPORTS.0 + 0x100 + name] {
                let place = EXPORTS.0 + tables.len() as u64;
                tables.extend(&to.wrapping_sub(place).to_le_bytes()[..4]);
            }
            tables.extend([0; 4]);
        }
        tables.extend(theirs.iter().flat_map(|crc| crc.to_le_bytes()));
        tables.resize(0x100, 0);
        tables.extend(b"other\0printk\0module_layout\0");
        memory.map_bytes(EXPORTS, &tables, false, false);
        let kernel = Kernel::read(&memory, KIND, &vcpus())?;
        let kernel = renewed(&kernel, &types.bytes(), Budget::default())?;

        let (mut elf, places) = Spec::default().elf();
        let printk = elf.undefined("printk");
        let at = elf.append(places.text, 16, 16);
        elf.reloc(places.text, at, R_PLT32, printk, -4);
        let mut versions = Vec::new();
        for (crc, name) in ours {
            let start = versions.len();
            versions.extend(crc.to_le_bytes());
            versions.extend(name.as_bytes());
            versions.resize(start + 64, 0);
        }
        if !versions.is_empty() {
            elf.section("__versions", ALLOC, &versions);
        }
        let payload = Payload::parse("test.ko", &elf.build()).unwrap();
        let exports = Exports::read(&kernel)?;
        assert!(exports.has(Gva(code)) && !exports.has(Gva(code + 1)));
        check_versions(&kernel, &exports, &payload)
    }

    #[test]
    fn a_payload_built_against_other_interfaces_is_refused() {
        let theirs = [1, 0x0bad_cafe, 0xfeed_0001];
        assert!(answer([0xfeed_0001, 0x0bad_cafe], &theirs).is_ok());
        for (ours, words) in [
            (
                [0xfeed_0002, 0x0bad_cafe],
                "module_layout is 0xfeed0002, the guest's is 0xfeed0001",
            ),
            (
                [0xfeed_0001, 1],
                "printk is 0x00000001, the guest's is 0x0badcafe",
            ),
        ] {
            let error = answer(ours, &theirs).unwrap_err();
            assert_eq!(error.exit_code(), ExitCode::NotApplicable);
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn what_may_not_be_crcs_is_not_compared() {
        // Distances within the image; one CRC too few, or of another size.
        for theirs in [&[1, 2, 0xffff_fff0][..], &[1, 0xfeed_0001], &[0; 6], &[]] {
            assert!(answer([5, 6], theirs).is_ok(), "{theirs:x?}");
        }
    }

    #[test]
    fn a_payload_without_crcs_is_refused_where_the_kernel_has_them() {
        let theirs = [1, 0x0bad_cafe, 0xfeed_0001];
        for ours in [&[][..], &[(0x0bad_cafe, "printk")]] {
            let error = answer_to(ours, &theirs).unwrap_err();
            assert_eq!(error.exit_code(), ExitCode::NotApplicable);
            assert!(
                error.to_string().contains("no CRC of module_layout"),
                "{error}"
            );
            // A kernel without CRCs asks for none.
            assert!(answer_to(ours, &[]).is_ok());
        }
        // As with the kernel's loader.
        assert!(answer_to(&[(0xfeed_0001, LAYOUT)], &theirs).is_ok());
    }

    #[test]
    fn a_payload_must_have_the_guests_struct_module() {
        let types_with = |size, init| {
            let mut b = Blob::new();
            let long = b.int("long", 8);
            let exit = size - 64;
            let members = [
                ("state", long, 0),
                ("init", long, init),
                ("exit", long, exit),
            ];
            b.structure("module", size, &members);
            Btf::new(b.bytes()).unwrap()
        };
        let types = |size| types_with(size, 392);
        for payload in [Spec::default().bytes(), Spec::kpatch().build()] {
            let payload = Payload::parse("test.ko", &payload).unwrap();
            assert!(check_layout(&types(MODULE_SIZE), &payload).is_ok());
            let error = check_layout(&types(960), &payload).unwrap_err();
            assert_eq!(error.exit_code(), ExitCode::NotApplicable);
            let words = "the size of struct module is 448 bytes in it and 960";
            assert!(error.to_string().contains(words), "{error}");
            // The kernel would call what stands elsewhere.
            let error = check_layout(&types_with(MODULE_SIZE, 400), &payload).unwrap_err();
            let words = "the place of init in struct module is 392 bytes in it and 400";
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    /// Types whose `replace` and `sympos` stand where they are told to, with sizes of 6.1.
    fn types(replace: usize, sympos: usize, func: usize) -> Btf {
        types_with("replace", 1, (replace, sympos, func))
    }

    /// The same, with another name and width of `replace`.
    fn types_with(name: &str, width: u32, (replace, sympos, func): (usize, usize, usize)) -> Btf {
        let mut b = Blob::new();
        let long = b.int("long", 8);
        let byte = b.int("bool", width);
        b.structure(
            "klp_patch",
            200,
            &[("mod", long, 0), ("objs", long, 8), (name, byte, replace)],
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
        let payload = Payload::parse("test.ko", &Spec::default().bytes()).unwrap();
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

    #[test]
    fn a_kernel_whose_replace_is_not_where_it_is_looked_for_is_refused() {
        let replaces = |mut payload: Payload| {
            payload.klp.replace = Some(true);
            payload
        };
        let usual = Payload::parse("test.ko", &Spec::default().bytes()).unwrap();
        let kpatch = Payload::parse("test.ko", &Spec::kpatch().build()).unwrap();
        for payload in [usual, kpatch].map(replaces) {
            for (name, width, words) in [
                ("replaces", 1, "member replace of klp_patch"),
                ("replace", 4, "has 4 bytes in BTF; expected 1"),
            ] {
                let error = check_layout(&types_with(name, width, (24, 16, 152)), &payload);
                let error = error.unwrap_err();
                assert_eq!(error.exit_code(), ExitCode::NotApplicable);
                assert!(error.to_string().contains(words), "{error}");
            }
        }
        // The hook's code was searched for the offsets 16 and 24.
        let kpatch = Payload::parse("test.ko", &Spec::kpatch().build()).unwrap();
        for (at, fits) in [(24, true), (16, true), (32, false)] {
            assert_eq!(
                check_layout(&types(at, 16, 152), &kpatch).is_ok(),
                fits,
                "{at}"
            );
        }
    }
}
