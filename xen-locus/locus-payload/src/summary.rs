//! What `xen-locus show FILE` says about a payload.

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;

use super::elf::{Reloc, Section};
use super::init;
use super::role::Role;
use super::symbol::SymSection;
use super::Payload;

/// Largest alignment that a section of a module gets, in bytes: modules begin on a page.
const MAX_ALIGN: u64 = 4096;

/// A payload as people and JSON get it. The fields and their order are the JSON of `xen-locus show`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Name of the module.
    pub name: String,
    /// Its description, empty if it has none.
    pub description: String,
    /// Its license, empty if it has none.
    pub license: String,
    /// Release and build options of the kernel that it was built for.
    pub vermagic: String,
    /// The release alone, such as `6.1.0-56-amd64`.
    pub kernel_release: String,
    /// Where its functions are listed: `livepatch` (a `struct klp_patch`) or `kpatch` (the tables of
    /// kpatch-build).
    pub format: &'static str,
    /// SHA-256 of the file, in hex.
    pub sha256: String,
    /// Length of the file in bytes.
    pub file_len: u64,
    /// The payload's own build id, in hex.
    pub build_id: Option<String>,
    /// CVE ids that it says it fixes.
    pub cves: Vec<String>,
    /// Names of the payloads that it says it replaces.
    pub supersedes: Vec<String>,
    /// Build-id of the one kernel that it is for, in hex, if it names one.
    pub target_build_id: Option<String>,
    /// True if it says that old and new versions of its functions may run at the same time.
    pub entry_only: bool,
    /// Modules that must be loaded first.
    pub depends: Vec<String>,
    /// True if it replaces all other patches; `None` if the file alone can't tell.
    pub replace: Option<bool>,
    /// Functions that it replaces, per object.
    pub objects: Vec<ObjectSummary>,
    /// Loaded sections by role, largest roles first.
    pub sections: Vec<RoleSummary>,
    /// Symbols that its code and data need from the kernel or from modules.
    pub needs: Vec<String>,
    /// What a loader has to handle beyond code, data and relocations, or refuse.
    pub concerns: Vec<Concern>,
}

/// The kernel or a module, and its functions that are replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ObjectSummary {
    /// `vmlinux` or a module's name.
    pub object: String,
    /// True if callbacks are set for it.
    pub callbacks: bool,
    /// The functions of it that are replaced.
    pub functions: Vec<FunctionSummary>,
}

/// One function that is replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FunctionSummary {
    /// Name in the kernel or module.
    pub old: String,
    /// 0 if the name is unique in its object, else the number of its occurrence, from 1.
    pub sympos: u64,
    /// Name of the new function in the payload.
    pub new: String,
    /// Size of the new function in bytes.
    pub size: u64,
}

/// All sections of one role that are loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RoleSummary {
    /// The role, as [`Role::label`] names it.
    pub role: String,
    /// Sum of the sizes of the sections, in bytes.
    pub size: u64,
    /// Names of the sections.
    pub sections: Vec<String>,
}

/// Something that a loader must handle, or else refuse the payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Concern {
    /// What it is about: a section, an object or a symbol.
    pub subject: String,
    /// Why it matters.
    pub reason: String,
}

/// ELF index of the section that `section` relocates late, if it does.
fn late_home(section: &Section) -> Option<usize> {
    match section.role {
        Role::KlpRela { target, .. } if !section.relocs.is_empty() => Some(target),
        _ => None,
    }
}

impl Payload {
    /// What people want to know about the payload.
    #[must_use]
    pub fn summary(&self) -> Summary {
        Summary {
            name: self.name.clone(),
            description: self.modinfo.description.clone().unwrap_or_default(),
            license: self.modinfo.license.clone().unwrap_or_default(),
            vermagic: self.modinfo.vermagic.clone(),
            kernel_release: self.modinfo.kernel_release().to_owned(),
            format: match self.klp.place {
                Some(_) => "livepatch",
                None => "kpatch",
            },
            sha256: hex::encode(self.sha256),
            file_len: self.file_len,
            build_id: self.build_id.as_deref().map(hex::encode),
            cves: self.modinfo.cves.clone(),
            supersedes: self.modinfo.supersedes.clone(),
            target_build_id: self.modinfo.target_build_id.as_deref().map(hex::encode),
            entry_only: self.modinfo.entry_only,
            depends: self.modinfo.depends.clone(),
            replace: self.klp.replace,
            objects: self.object_summaries(),
            sections: self.role_summaries(),
            needs: self.needed_names(),
            concerns: self.concerns(),
        }
    }

    /// What a loader has to handle beyond code, data and relocations. A loader that can't handle one of
    /// them must refuse the payload, and name the subject and the reason.
    #[must_use]
    pub fn concerns(&self) -> Vec<Concern> {
        let mut concerns = Vec::new();
        let mut add = |subject: &str, reason: &str| {
            concerns.push(Concern {
                subject: subject.to_owned(),
                reason: reason.to_owned(),
            });
        };
        self.section_concerns(&mut add);
        for object in &self.klp.objects {
            if object.callbacks {
                let name = object.name.as_deref().unwrap_or("vmlinux");
                add(name, "callbacks have to be run in the guest");
            }
        }
        if self.klp.states {
            add(
                "struct klp_patch",
                "system states have to be registered with the kernel",
            );
        }
        concerns.extend(init::concerns(self));
        let mut add = |subject: &str, reason: &str| {
            concerns.push(Concern {
                subject: subject.to_owned(),
                reason: reason.to_owned(),
            });
        };
        if self.klp.replace.is_none() {
            add(
                "struct klp_patch",
                "whether it replaces all other patches can't be told",
            );
        }
        if self
            .klp
            .objects
            .iter()
            .all(|object| object.funcs.is_empty())
        {
            add("struct klp_patch", "it replaces no function");
        }
        for symbol in self
            .symbols
            .iter()
            .filter(|s| s.section == SymSection::Common)
        {
            add(
                &symbol.name,
                "a common symbol was not allocated; build with -fno-common",
            );
        }
        concerns
    }

    /// Calls `add` with the subject and the reason of what a loader has to handle of sections.
    fn section_concerns(&self, add: &mut impl FnMut(&str, &str)) {
        let late: HashSet<usize> = self.sections.iter().filter_map(late_home).collect();
        for section in self.sections.iter().filter(|s| s.size > 0) {
            if let Some(reason) = section.role.needs() {
                if self.concerns_placed(section, &late) {
                    add(&section.name, reason);
                }
            }
        }
        let mut names = HashSet::new();
        let single = |s: &&Section| s.role.is_single() || s.name.starts_with(".kpatch.");
        for section in self.sections.iter().filter(single) {
            if !names.insert(&*section.name) {
                add(
                    &section.name,
                    "there are several of this name, of which the kernel takes one",
                );
            }
        }
        let relocated = |s: &&Section| !s.relocs.is_empty() || late.contains(&s.index);
        for section in self.sections.iter().filter(relocated) {
            if matches!(section.role, Role::Modinfo | Role::Versions | Role::Note) {
                let reason = "relocations are to change it, and it is read as it is in the file";
                add(&section.name, reason);
            }
        }
        for section in self.placed().filter(|s| s.align > MAX_ALIGN) {
            add(
                &section.name,
                "it is to begin on more than a page, which the kernel's own loader does not grant either",
            );
        }
    }

    /// False if a table of places in code, of which `late` are relocated late, has only places in code of `module_init`
    /// and `module_exit`. What else a loader acts on is about the whole module, wherever it leads.
    fn concerns_placed(&self, section: &Section, late: &HashSet<usize>) -> bool {
        let leads_to_init = |reloc: &Reloc| match self.symbol(reloc.symbol).map(|s| s.section) {
            Some(SymSection::Section(index)) => self
                .section(index)
                .is_some_and(|s| s.role.is_init_or_exit()),
            _ => false,
        };
        section.role != Role::CfiSites
            || section.relocs.is_empty()
            || !section.relocs.iter().all(leads_to_init)
            || late.contains(&section.index)
    }

    fn object_summaries(&self) -> Vec<ObjectSummary> {
        let function = |func: &super::KlpFunc| FunctionSummary {
            old: func.old_name.clone(),
            sympos: func.old_sympos,
            // There is such a symbol: `klp` and `kpatch` took the index from it.
            new: self
                .symbol(func.new_symbol)
                .map(|s| s.name.clone())
                .unwrap_or_default(),
            size: func.new_size,
        };
        let object = |object: &super::KlpObject| ObjectSummary {
            object: object.name.clone().unwrap_or_else(|| "vmlinux".to_owned()),
            callbacks: object.callbacks,
            functions: object.funcs.iter().map(function).collect(),
        };
        self.klp.objects.iter().map(object).collect()
    }

    fn role_summaries(&self) -> Vec<RoleSummary> {
        let mut roles: BTreeMap<&'static str, RoleSummary> = BTreeMap::new();
        for section in self.sections.iter().filter(|s| s.flags.alloc && s.size > 0) {
            let role = section.role.label();
            let entry = roles.entry(role).or_insert_with(|| RoleSummary {
                role: role.to_owned(),
                size: 0,
                sections: Vec::new(),
            });
            entry.size = entry.size.saturating_add(section.size);
            entry.sections.push(section.name.clone());
        }
        let mut roles: Vec<_> = roles.into_values().collect();
        roles.sort_by_key(|role| std::cmp::Reverse(role.size));
        roles
    }

    fn needed_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .needed_symbols()
            .into_iter()
            .filter_map(|index| self.symbol(index))
            .map(|symbol| match &symbol.klp {
                Some(klp) => format!("{}:{},{}", klp.object, klp.symbol, klp.sympos),
                None => symbol.name.clone(),
            })
            .collect();
        names.sort_unstable();
        names
    }
}
