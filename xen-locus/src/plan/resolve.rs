//! What a payload's names mean in this guest: the functions that it replaces, and the modules that it uses.

use locus_guest::addr::Gva;
use locus_kernel::modules::Module;

use super::patch_stack::Layers;
use super::preconditions::Fitted;
use crate::arena::record::{Draft, DraftFunction, ModuleAt};
use crate::error::{Error, Result};
use crate::link::split::SplitFunctions;
use crate::target::kprobes::Kprobes;
use crate::target::redirect::{self, Returns};
use crate::target::symbols::VMLINUX;

/// A payload whose names are resolved.
#[derive(Debug)]
pub struct Resolved {
    /// Its record, as far as it is known by now.
    pub draft: Draft,
    /// How the kernel's functions return, where that can be seen.
    pub returns: Option<Returns>,
    /// Modules whose functions it replaces or whose symbols it uses, payloads applied before among them.
    pub depends: Vec<ModuleAt>,
}

/// Resolves the payload's names.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): a symbol is missing or there are several, or a function
/// can't be redirected. [`Class::TryAgain`](crate::error::Class::TryAgain): it can't be now, because the guest traces it.
pub fn resolve(fitted: &Fitted<'_, '_>) -> Result<Resolved> {
    let payload = fitted.payload;
    let (functions, returns) = functions(fitted)?;
    // By now the modules of the functions are used, and no other.
    let objects = used(fitted)?;
    fitted.objects.look_up(payload)?;
    let depends = used(fitted)?;
    let is_payload = |at: &Gva| {
        let mut applied = fitted.stack.applied().iter();
        applied.any(|r| r.record.module == *at)
    };
    let uses = depends.iter().map(|m| m.at).filter(is_payload);
    Ok(Resolved {
        draft: Draft {
            name: payload.name.clone(),
            sha256: hex::encode(payload.sha256),
            description: payload.modinfo.description.clone().unwrap_or_default(),
            cves: payload.modinfo.cves.clone(),
            functions,
            objects,
            entry_only: payload.modinfo.entry_only,
            uses: uses.collect(),
        },
        returns,
        depends,
    })
}

/// The modules that were used until now.
fn used(fitted: &Fitted<'_, '_>) -> Result<Vec<ModuleAt>> {
    let used = fitted.objects.used()?.into_iter();
    let at = |m: &Module| ModuleAt {
        name: m.name.clone(),
        at: m.addr,
        base: m.base,
    };
    Ok(used.map(at).collect())
}

/// The functions that the payload replaces, and how the first of them that shows it returns.
fn functions(fitted: &Fitted<'_, '_>) -> Result<(Vec<DraftFunction>, Option<Returns>)> {
    let payload = fitted.payload;
    let subject = format!("payload {}", payload.name);
    let no = |why: String| Error::not_applicable(format!("{subject}: {why}"));
    let parts = SplitFunctions::of(payload)?;
    let mut functions: Vec<DraftFunction> = Vec::new();
    let mut returns = None;
    let kprobes = Kprobes::read(fitted.kernel)?;
    for object in &payload.klp.objects {
        let name = object.name.as_deref();
        let owner = fitted
            .objects
            .object(name)
            .map_err(|e| e.context(&*subject))?;
        for func in &object.funcs {
            let old = fitted
                .objects
                .symbol(name, &func.old_name, func.old_sympos)
                .map_err(|e| e.context(format!("{subject}: function {}", func.old_name)))?;
            if functions.iter().any(|f| f.old.start == old) {
                return Err(no(format!("it replaces {} twice", func.old_name)));
            }
            let installed = fitted.stack.layers(old).map(Layers::installed);
            let function = redirect::examine(
                fitted.kernel,
                owner,
                &func.old_name,
                old,
                installed.as_ref(),
                &kprobes,
            )?;
            let original = function.site.old;
            let found = installed.map_or(original, |ours| ours.jump);
            returns = returns.or(function.returns);
            functions.push(DraftFunction {
                name: func.old_name.clone(),
                object: name.unwrap_or(VMLINUX).to_owned(),
                old: function.range,
                old_cold: function.cold,
                new_size: func.new_size,
                new_cold: parts.of_function(func).iter().map(|p| p.size).collect(),
                site: function.site.at,
                found,
                old_bytes: if fitted.supersedes { original } else { found },
            });
        }
    }
    if functions.is_empty() {
        return Err(no("it replaces no function".into()));
    }
    Ok((functions, returns))
}
