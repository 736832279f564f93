//! `info --type NAME`: a type as C.

use locus_kernel::btf::text::Described;
use locus_kernel::modules::ModuleReader;
use locus_kernel::Kernel;
use serde_json::{json, Value};

use super::super::{out, Session};
use crate::cli::args::Output;
use crate::cli::guest::Guest;
use crate::error::Error;

/// Shows all types called `wanted`: the kernel's, or if it has none those of its modules.
///
/// # Errors
/// The types can't be read, none is called so, or their text costs more than the guest's budget.
pub fn show(
    session: &Session,
    guest: &Guest,
    kernel: &Kernel<'_>,
    wanted: &str,
) -> Result<(), Error> {
    let found = find(kernel, wanted)?;
    match session.output {
        Output::Table => {
            for (i, (module, d)) in found.iter().enumerate() {
                if i > 0 {
                    out::line("");
                }
                if let Some(module) = module {
                    out::line(&format!("/* module {module} */"));
                }
                out::text(&d.text);
            }
        }
        Output::Json => out::object(guest.object(json!({
            "type_list": found.iter().map(|(module, d)| entry(module.as_deref(), d))
                .collect::<Vec<_>>(),
        }))),
    }
    Ok(())
}

fn find(kernel: &Kernel<'_>, wanted: &str) -> Result<Vec<(Option<String>, Described)>, Error> {
    let budget = kernel.space.budget();
    let own = kernel.btf()?.describe(wanted, budget)?;
    if !own.is_empty() {
        return Ok(own.into_iter().map(|d| (None, d)).collect());
    }
    let of_modules = ModuleReader::new(kernel)?.each(|reader, module| {
        let found = reader.btf(module)?.map(|btf| btf.describe(wanted, budget));
        let found = found.transpose()?.unwrap_or_default();
        let named = found.into_iter().map(|d| (Some(module.name.clone()), d));
        Ok(named.collect::<Vec<_>>())
    })?;
    let found: Vec<_> = of_modules.into_iter().flatten().collect();
    if found.is_empty() {
        return Err(Error::failed(format!(
            "neither the guest's kernel nor its modules have a type called {wanted:?}; expected \
             the name of a structure, union, enum, typedef, function or variable"
        )));
    }
    Ok(found)
}

fn entry(module: Option<&str>, d: &Described) -> Value {
    json!({
        "kind": d.kind,
        "name": d.name,
        "id": d.id,
        "size": d.size,
        "module": module,
        "text": d.text,
        "members": d.members.iter().map(|m| json!({
            "name": m.name,
            "declaration": m.declaration,
            "offset": m.offset,
            "size": m.size,
            "bit_offset": m.bits.map(|(offset, _)| offset),
            "bit_size": m.bits.map(|(_, size)| size),
        })).collect::<Vec<_>>(),
    })
}
