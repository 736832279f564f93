//! Looks up what a payload names: functions to replace and symbols to refer to, in the kernel and in its loaded
//! modules. Livepatch calls each of them an object.
//!
//! The kernel's own loader and livepatch decide the same way: kernel/livepatch/core.c
//! (`klp_find_object_symbol`) and kernel/module/main.c (`resolve_symbol`). Beyond that a payload may refer
//! to symbols that are not exported, and to global symbols of applied payloads. The guest's list of modules has
//! all payloads, reverted ones too, with their `struct module` in the arena.

mod object;

use std::cell::{OnceCell, RefCell};

use locus_guest::addr::Gva;
use locus_kernel::modules::{Module, ModuleReader, ModuleState, ModuleSymbol};
use locus_kernel::{self as kernel, Kernel};
use locus_payload::{Binding, ElfSymbol, Payload};

pub use self::object::Object;
use crate::arena;
use crate::error::{Error, Result};
use crate::target::conflicts;
use crate::target::exports::{self, Exports};

/// Symbols of a module whose names can be looked at for one unit of the guest's budget.
const PER_UNIT: u64 = 4;

/// A payload's name for the kernel itself, where it needs one.
pub const VMLINUX: &str = "vmlinux";

/// The symbols of the kernel and of its modules. Modules are read when they are first asked for.
#[derive(Debug)]
pub struct GuestSymbols<'k, 'm> {
    kernel: &'k Kernel<'m>,
    reader: OnceCell<std::result::Result<ModuleReader<'k, 'm>, String>>,
    /// `struct module` of the payloads whose symbols count, newest first.
    payloads: Vec<Gva>,
    /// Newest first, as the guest lists them.
    loaded: OnceCell<std::result::Result<Vec<Loaded>, String>>,
    /// Addresses of those that were referred to.
    used: RefCell<Vec<Gva>>,
    /// What the kernel exports, if that can be known.
    exported: OnceCell<Option<Exports>>,
}

/// A loaded module and, once asked for, its symbols.
#[derive(Debug)]
pub struct Loaded {
    /// The module.
    pub module: Module,
    symbols: OnceCell<Vec<ModuleSymbol>>,
    /// The places of its symbols in the table, in the order of their names.
    by_name: OnceCell<Vec<usize>>,
    exports: OnceCell<Vec<(String, Gva)>>,
}

impl<'k, 'm> GuestSymbols<'k, 'm> {
    /// Of this kernel; nothing is read yet. `payloads` are the `struct module`s of the payloads that
    /// are applied, the one applied last first: the guest lists those that are undone too.
    #[must_use]
    pub fn new(kernel: &'k Kernel<'m>, payloads: Vec<Gva>) -> GuestSymbols<'k, 'm> {
        GuestSymbols {
            kernel,
            payloads,
            reader: OnceCell::new(),
            loaded: OnceCell::new(),
            used: RefCell::default(),
            exported: OnceCell::new(),
        }
    }

    /// What the kernel itself exports; `None` if it has no table of that.
    ///
    /// # Errors
    /// As [`Exports::read`]: that says nothing of its exports.
    pub fn exported(&self) -> Result<Option<&Exports>> {
        if let Some(exported) = self.exported.get() {
            return Ok(exported.as_ref());
        }
        let has_table = self.kernel.symbols.addr(exports::TABLE).is_some();
        let read = has_table.then(|| Exports::read(self.kernel)).transpose()?;
        Ok(self.exported.get_or_init(|| read).as_ref())
    }

    fn reader(&self) -> Result<&ModuleReader<'k, 'm>> {
        let read = || ModuleReader::new(self.kernel).map_err(|e| e.to_string());
        self.reader.get_or_init(read).as_ref().map_err(unreadable)
    }

    /// All modules, newest first.
    fn loaded(&self) -> Result<&[Loaded]> {
        let read = || {
            let all = ModuleReader::new(self.kernel).and_then(|mut reader| reader.all());
            let loaded = |module| Loaded {
                module,
                symbols: OnceCell::new(),
                by_name: OnceCell::new(),
                exports: OnceCell::new(),
            };
            let all = all.map_err(|e| e.to_string())?;
            Ok(all.into_iter().map(loaded).collect())
        };
        let all = self.loaded.get_or_init(read);
        all.as_ref().map(Vec::as_slice).map_err(unreadable)
    }

    fn symbols<'s>(&'s self, loaded: &'s Loaded) -> Result<&'s [ModuleSymbol]> {
        if let Some(symbols) = loaded.symbols.get() {
            return Ok(symbols);
        }
        let symbols = self.reader()?.symbols(&loaded.module)?;
        Ok(loaded.symbols.get_or_init(|| symbols))
    }

    /// The symbols of a module that are called `name`, in the table's order.
    fn named<'s>(&'s self, loaded: &'s Loaded, name: &str) -> Result<Vec<&'s ModuleSymbol>> {
        let symbols = self.symbols(loaded)?;
        let name_of = |i: &usize| symbols.get(*i).map_or("", |s| s.name.as_str());
        let by_name = loaded.by_name.get_or_init(|| {
            let mut order: Vec<usize> = (0..symbols.len()).collect();
            order.sort_by(|a, b| name_of(a).cmp(name_of(b)));
            order
        });
        let first = by_name.partition_point(|i| name_of(i) < name);
        let behind = by_name.get(first..).unwrap_or_default().iter();
        let found: Vec<&ModuleSymbol> = behind
            .take_while(|i| name_of(i) == name)
            .filter_map(|&i| symbols.get(i))
            .collect();
        self.kernel.space.budget().spend(found.len() as u64)?;
        Ok(found)
    }

    fn exports<'s>(&'s self, loaded: &'s Loaded) -> Result<&'s [(String, Gva)]> {
        if let Some(exports) = loaded.exports.get() {
            return Ok(exports);
        }
        let exports = self.reader()?.exported(&loaded.module)?;
        Ok(loaded.exports.get_or_init(|| exports))
    }

    /// The module called `name`.
    ///
    /// # Errors
    /// [`Cause::NotLoaded`](crate::error::Cause::NotLoaded) when it is not loaded, [`Class::TryAgain`](crate::error::Class::TryAgain) when it is about to be, or
    /// about to go.
    fn module(&self, name: &str) -> Result<&Loaded> {
        // In file names a dash stands for the same as an underscore.
        let wanted = name.replace('-', "_");
        let found = self
            .loaded()?
            .iter()
            .find(|l| l.module.name.replace('-', "_") == wanted && !in_arena(l));
        let Some(found) = found else {
            return Err(Error::not_loaded(format!(
                "module {name} is not loaded in the guest; load it there (modprobe {name}), then \
                 apply the payload"
            )));
        };
        if found.module.state != ModuleState::Live {
            return Err(Error::passing(format!(
                "module {name} is {} in the guest right now, expected it to be live",
                found.module.state.name().to_lowercase()
            )));
        }
        Ok(found)
    }

    fn uses(&self, loaded: &Loaded) {
        let mut used = self.used.borrow_mut();
        if !used.contains(&loaded.module.addr) {
            used.push(loaded.module.addr);
        }
    }

    /// The object that a payload names: `None` is the kernel.
    ///
    /// # Errors
    /// The module is not loaded, or it can't be read.
    pub fn object(&self, object: Option<&str>) -> Result<Object<'_>> {
        let Some(name) = object.filter(|&name| name != VMLINUX) else {
            return Ok(Object::Kernel);
        };
        let loaded = self.module(name)?;
        Ok(Object::Module(&loaded.module, self.symbols(loaded)?))
    }

    /// Address of the symbol `name` of `object` (`None`: the kernel): the only one if `sympos` is 0,
    /// else the one of that number, in the order of the object's symbol table.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): no such symbol, or several; [`Cause::NotLoaded`](crate::error::Cause::NotLoaded): the module is not;
    /// [`Class::TryAgain`](crate::error::Class::TryAgain): it is about to be.
    pub fn symbol(&self, object: Option<&str>, name: &str, sympos: u64) -> Result<Gva> {
        let Some(object) = object.filter(|&object| object != VMLINUX) else {
            return self.kernel.function(name, sympos).map_err(not_applicable);
        };
        let loaded = self.module(object)?;
        // As module_kallsyms_on_each_symbol (kernel/module/kallsyms.c) goes: undefined ones don't count.
        let found: Vec<Gva> = self
            .named(loaded, name)?
            .into_iter()
            .filter(|s| !s.kind.eq_ignore_ascii_case(&'u'))
            .map(|s| s.addr)
            .collect();
        // No table has so many symbols.
        let wanted = usize::try_from(sympos).unwrap_or(usize::MAX);
        let chosen = match (found.as_slice(), wanted) {
            ([], _) => Err(format!("module {object} has no symbol {name}")),
            ([one], 0) => Ok(*one),
            (many, 0) => Err(several(many.len(), &format!("module {object}"), name)),
            (many, n) => many.get(n - 1).copied().ok_or_else(|| {
                format!(
                    "module {object} has no symbol {name} number {n}: it has {}",
                    many.len()
                )
            }),
        };
        let at = chosen.map_err(Error::not_applicable)?;
        self.uses(loaded);
        Ok(at)
    }

    /// As [`GuestSymbols::symbol`], for what code or data of a payload refers to: that must still be there.
    ///
    /// # Errors
    /// As [`GuestSymbols::symbol`]; [`Class::NotApplicable`](crate::error::Class::NotApplicable) for what the kernel freed after its start.
    pub fn reference(&self, object: Option<&str>, name: &str, sympos: u64) -> Result<Gva> {
        let at = self.symbol(object, name, sympos)?;
        self.stays(name, at)
    }

    fn stays(&self, name: &str, at: Gva) -> Result<Gva> {
        match conflicts::freed(self.kernel, at) {
            true => Err(Error::not_applicable(format!(
                "it refers to {name} at {at}, which is in the kernel's __init memory: that is free \
                 since the kernel started"
            ))),
            false => Ok(at),
        }
    }

    /// Address of a symbol that a payload leaves undefined: of the kernel, else the one that a module
    /// exports, else the global one of the payload applied last. `None` if there is none.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable) when several have it. What the kernel does not export may be local to one
    /// of its files, and is no more likely to be meant than what a module exports.
    pub fn undefined(&self, name: &str) -> Result<Option<Gva>> {
        let exports = self.exported()?;
        let exported = |at: &Gva| exports.is_some_and(|all| all.has(*at));
        let mut of_kernel = self.addrs(name)?;
        if of_kernel.len() > 1 {
            // Others may be local to their files; modules are given the one that is exported.
            of_kernel.retain(exported);
            of_kernel.sort_unstable();
            of_kernel.dedup();
            if of_kernel.len() != 1 {
                let several = self.kernel.function(name, 0);
                return several.map_err(not_applicable).map(Some);
            }
        }
        let own = of_kernel.first().copied();
        if !self.knows_modules()? || own.as_ref().is_some_and(exported) {
            return own.map(|at| self.stays(name, at)).transpose();
        }
        let found = self.exporting(name)?;
        if let (Some(at), Some((loaded, _))) = (own, found.first()) {
            let module = &loaded.module.name;
            return Err(Error::not_applicable(format!(
                "it refers to {name}, which is both a symbol of the kernel at {at} that is not \
                 exported, and one that module {module} exports; say which, as \
                 .klp.sym.{VMLINUX}.{name},1 or .klp.sym.{module}.{name},0"
            )));
        }
        match own {
            Some(at) => self.stays(name, at).map(Some),
            None => self.of_modules(name, &found),
        }
    }

    /// As [`GuestSymbols::undefined`] for `symbol`, which a payload leaves undefined. A weak one is only what
    /// is exported, or a global symbol of a payload: else it is 0, as the kernel's own loader has it
    /// (`simplify_symbols` and `resolve_symbol`, kernel/module/main.c), whatever is called like that in one
    /// file of the kernel. `None` if there is none.
    ///
    /// # Errors
    /// As [`GuestSymbols::undefined`]; [`Class::NotApplicable`](crate::error::Class::NotApplicable) for a weak one that
    /// the kernel has, if what it exports can't be known.
    pub fn unresolved(&self, symbol: &ElfSymbol) -> Result<Option<Gva>> {
        let name = symbol.name.as_str();
        if symbol.binding != Binding::Weak {
            return self.undefined(name);
        }
        let own = self.addrs(name)?;
        if !own.is_empty() {
            let exports = self.exported()?.ok_or_else(|| {
                Error::not_applicable(format!(
                    "its weak symbol {name} is one of the kernel's, and what the guest's kernel exports \
                     can't be read: build the payload without the weak symbol"
                ))
            })?;
            if let Some(at) = own.into_iter().find(|at| exports.has(*at)) {
                return self.stays(name, at).map(Some);
            }
        }
        if !self.knows_modules()? {
            return Ok(None);
        }
        self.of_modules(name, &self.exporting(name)?)
    }

    /// Without types nothing is known of modules.
    fn knows_modules(&self) -> Result<bool> {
        let known = self.kernel.symbols.addr("modules").is_some() && self.kernel.btf().is_ok();
        self.kernel.space.budget().check()?;
        Ok(known)
    }

    /// Addresses of the kernel's symbols called `name`. A payload may refer to one name many times, and a guest have it
    /// many times.
    fn addrs(&self, name: &str) -> Result<Vec<Gva>> {
        let all: Vec<Gva> = self.kernel.symbols.addrs(name).collect();
        let budget = self.kernel.space.budget();
        budget.spend(all.len() as u64)?;
        budget.check()?;
        Ok(all)
    }

    /// The modules that export `name`, without payloads, and where.
    fn exporting(&self, name: &str) -> Result<Vec<(&Loaded, Gva)>> {
        let mut found: Vec<(&Loaded, Gva)> = Vec::new();
        let all = self.loaded()?;
        let cost = all.len() as u64 / PER_UNIT;
        self.kernel.space.budget().spend(cost)?;
        for loaded in all.iter().filter(|l| !in_arena(l)) {
            let exports = self.exports(loaded)?;
            let first = exports.partition_point(|(n, _)| n.as_str() < name);
            if let Some((_, at)) = exports.get(first).filter(|(n, _)| n == name) {
                found.push((loaded, *at));
            }
        }
        Ok(found)
    }

    /// The symbol `name` of the one module in `found`, else of a payload.
    fn of_modules(&self, name: &str, found: &[(&Loaded, Gva)]) -> Result<Option<Gva>> {
        match found {
            [] => self.of_payloads(name),
            [(loaded, at)] if loaded.module.state == ModuleState::Live => {
                self.uses(loaded);
                Ok(Some(*at))
            }
            [(loaded, _)] => Err(Error::passing(format!(
                "symbol {name} is exported by module {}, which is {} in the guest right now",
                loaded.module.name,
                loaded.module.state.name().to_lowercase()
            ))),
            many => {
                let names: Vec<&str> = many.iter().map(|(l, _)| l.module.name.as_str()).collect();
                Err(Error::not_applicable(format!(
                    "symbol {name} is exported by several modules: {}",
                    names.join(", ")
                )))
            }
        }
    }

    /// The global symbol `name` of the payload applied last that has one.
    fn of_payloads(&self, name: &str) -> Result<Option<Gva>> {
        for &payload in &self.payloads {
            let Some(loaded) = self.loaded()?.iter().find(|l| l.module.addr == payload) else {
                continue;
            };
            let mut named = self.named(loaded, name)?.into_iter();
            if let Some(symbol) = named.find(|s| s.global) {
                self.uses(loaded);
                return Ok(Some(symbol.addr));
            }
        }
        Ok(None)
    }

    /// Looks up all that the code and data of `payload` refer to, so that [`GuestSymbols::used`] is
    /// complete. A symbol that is not found is passed over: linking refuses it.
    ///
    /// # Errors
    /// As [`GuestSymbols::reference`] and [`GuestSymbols::unresolved`].
    pub fn look_up(&self, payload: &Payload) -> Result<()> {
        let of_payload = |e: Error| e.context(format!("payload {}", payload.name));
        let needed = payload.needed_symbols().into_iter();
        for symbol in needed.filter_map(|index| payload.symbol(index)) {
            match &symbol.klp {
                Some(klp) => {
                    self.reference(Some(&klp.object), &klp.symbol, klp.sympos)
                        .map_err(of_payload)?;
                }
                None => {
                    self.unresolved(symbol).map_err(of_payload)?;
                }
            }
        }
        Ok(())
    }

    /// The modules, and payloads applied before, whose symbols were asked for and found: none of them
    /// may go while the payload is applied.
    ///
    /// # Errors
    /// The modules can't be read.
    pub fn used(&self) -> Result<Vec<&Module>> {
        let used = self.used.borrow();
        if used.is_empty() {
            return Ok(Vec::new());
        }
        let all = self.loaded()?.iter().map(|l| &l.module);
        Ok(all.filter(|m| used.contains(&m.addr)).collect())
    }
}

/// Whether a module is a payload: its `struct module` is in the arena.
fn in_arena(loaded: &Loaded) -> bool {
    let end = arena::page_address(arena::PAGES);
    (arena::BASE..end).contains(&loaded.module.addr)
}

/// What is wrong with a payload that names one of several symbols.
fn several(count: usize, of: &str, name: &str) -> String {
    format!(
        "{count} symbols of {of} are called {name}, and the payload does not say which: expected a number from 1 to {count}, \
         in the order of the symbol table (sympos: `.old_sympos` of a function, or the end of a .klp.sym name)"
    )
}

/// A lookup that found nothing, or too much.
fn not_applicable(error: kernel::Error) -> Error {
    match error {
        kernel::Error::Several { count, name } => {
            Error::not_applicable(several(count, "the kernel", &name))
        }
        kernel::Error::Missing(_) | kernel::Error::Odd(_) => {
            Error::not_applicable(error.to_string())
        }
        other => other.into(),
    }
}

fn unreadable(why: &String) -> Error {
    Error::not_applicable(format!("the guest's modules can't be read: {why}"))
}

#[cfg(test)]
mod tests;
