//! What `module_init` does: its code, decoded from where the kernel would enter it.
//!
//! `module_init` does not run when xen-locus applies a payload. So all that it does besides enabling the
//! patch would be missing, and the new functions may rely on it. Whether it does more is decided by what is
//! understood. All code that it can reach is followed: jumps, local calls, tail calls, with the relocations
//! of every section for it. Accepted are instructions that change registers only, `push` and `pop`, calls of
//! [`ENABLING`], and at least one call of `klp_enable_patch` with the address of the one
//! `struct klp_patch`. All else is named: memory that is read or written, other calls, indirect branches,
//! tables that have the kernel change this code, and code that ends nowhere.
//!
//! `module_init` of kpatch-build is known: `kmod/patch/livepatch-patch-hook.c` of kpatch. It builds its
//! structures in memory that it allocates, so memory may be used, and [`KPATCH_HOOK`] may be called. But what
//! it uses of the payload's own variables may be used by nothing else in the payload.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind,
    Register,
};
use object::elf;

use super::elf::{Reloc, Section};
use super::pointers::View;
use super::role::Role;
use super::summary::Concern;
use super::symbol::{ElfSymbol, SymKind, SymSection};
use super::Payload;

mod instruction;
mod names;
mod registers;

use instruction::{copies_memory, is_plain, is_write, moves_stack};
use names::{ENABLING, KPATCH_HOOK};
use registers::{is_relative, known_after, Fields, Target};

/// Most instructions that are looked at, each time they are. The hook of kpatch has less than a thousand.
const MAX_STEPS: usize = 1 << 15;
/// Most places of the payload's own variables that the hook of kpatch uses. It has a dozen.
const MAX_USED: usize = 64;
/// Most things that are named.
const MAX_NAMED: usize = 32;
/// Registers that a function of the kernel leaves as they are: rbx, rbp, r12 to r15.
const KEPT_BY_CALLS: u16 = 1 << 3 | 1 << 5 | 0xf << 12;
/// The register of a function's first argument, rdi.
const FIRST_ARGUMENT: u16 = 1 << 7;
/// Why a symbol or a variable is named.
const REFERS: &str = "module_init refers to it, and module_init is not run from outside";

/// A place in the file: ELF index of a section, and offset in it in bytes.
type Place = (usize, u64);

/// What `payload`'s `module_init` does besides enabling the patch.
pub(super) fn concerns(payload: &Payload) -> Vec<Concern> {
    let mut walk = Walk::new(payload);
    walk.start();
    while let Some((at, known)) = walk.todo.pop() {
        walk.arrive(at, known);
    }
    walk.tables();
    walk.variables();
    if !walk.enables {
        let reason = "it does not enable the patch, so the kernel's own loader would not either";
        walk.name("module_init", reason);
    }
    let named = walk.named.into_iter();
    named
        .map(|(subject, reason)| Concern { subject, reason })
        .collect()
}

struct Walk<'p> {
    payload: &'p Payload,
    /// Functions and variables by where they begin; the largest of those that begin at one place.
    symbols: BTreeMap<Place, &'p ElfSymbol>,
    /// Relocations by section, rising, late ones too. Only of sections that are looked at.
    relocs: HashMap<usize, Vec<Reloc>>,
    /// Instructions that were reached: which registers surely hold the address of `struct klp_patch` there,
    /// one bit each, and their length.
    reached: BTreeMap<Place, (u16, u64)>,
    todo: Vec<(Place, u16)>,
    steps: usize,
    enables: bool,
    /// The payload's own variables that are used.
    used: BTreeSet<Place>,
    named: BTreeSet<(String, String)>,
}

impl<'p> Walk<'p> {
    fn new(payload: &'p Payload) -> Self {
        let mut symbols: BTreeMap<Place, &ElfSymbol> = BTreeMap::new();
        for symbol in &payload.symbols {
            let SymSection::Section(section) = symbol.section else {
                continue;
            };
            if matches!(symbol.kind, SymKind::Object | SymKind::Func) {
                let first = symbols.entry((section, symbol.value)).or_insert(symbol);
                if first.size < symbol.size {
                    *first = symbol;
                }
            }
        }
        Self {
            payload,
            symbols,
            relocs: HashMap::new(),
            reached: BTreeMap::new(),
            todo: Vec::new(),
            steps: 0,
            enables: false,
            used: BTreeSet::new(),
            named: BTreeSet::new(),
        }
    }

    fn is_kpatch(&self) -> bool {
        self.payload.klp.place.is_none()
    }

    fn name(&mut self, subject: impl Into<String>, reason: impl Into<String>) {
        if self.named.len() < MAX_NAMED {
            self.named.insert((subject.into(), reason.into()));
        }
    }

    /// Names what the instruction at `at` does.
    fn name_code(&mut self, at: Place, does: &str) {
        let place = self.describe(at);
        self.name(
            "module_init",
            format!("at {place} it {does}, and module_init is not run from outside"),
        );
    }

    /// The function or variable at a place, for messages.
    fn describe(&self, (section, offset): Place) -> String {
        let around = self
            .variable((section, offset))
            .map(|s| (s.value, &*s.name));
        match around {
            Some((start, name)) if start == offset => name.to_owned(),
            Some((start, name)) => format!("{name}+{:#x}", offset.saturating_sub(start)),
            None => {
                let name = self.payload.section(section).map_or("?", |s| &*s.name);
                format!("{name}+{offset:#x}")
            }
        }
    }

    /// The symbol of the function or variable around a place.
    fn variable(&self, place: Place) -> Option<&'p ElfSymbol> {
        let (at, symbol) = self.symbols.range(..=place).next_back()?;
        let end = symbol.value.saturating_add(symbol.size);
        (at.0 == place.0 && place.1 < end).then_some(*symbol)
    }

    /// Relocations of a section, late ones too, that start at offsets `from..to`.
    fn relocs(&mut self, section: usize, from: u64, to: u64) -> Vec<Reloc> {
        let payload = self.payload;
        let all = self.relocs.entry(section).or_insert_with(|| {
            let late = payload
                .sections
                .iter()
                .filter(|s| matches!(s.role, Role::KlpRela { target, .. } if target == section));
            let own = payload.section(section).into_iter();
            let mut all: Vec<Reloc> = own.chain(late).flat_map(|s| s.relocs.clone()).collect();
            all.sort_by_key(|r| r.offset);
            all
        });
        let first = all.partition_point(|r| r.offset < from);
        let rest = all.get(first..).unwrap_or_default().iter();
        rest.take_while(|r| r.offset < to).copied().collect()
    }

    /// Where `reloc` leads; `end` is the end of its instruction.
    fn target(&self, reloc: &Reloc, end: u64) -> Target<'p> {
        let Some(symbol) = self.payload.symbol(reloc.symbol) else {
            return Target::Unknown;
        };
        let from = match elf::RelocationType(reloc.rtype) {
            elf::R_X86_64_PC32 | elf::R_X86_64_PLT32 => end.saturating_sub(reloc.offset),
            elf::R_X86_64_64 | elf::R_X86_64_32 | elf::R_X86_64_32S => 0,
            _ => return Target::Unknown,
        };
        let bias = reloc.addend.checked_add_unsigned(from);
        match symbol.section {
            SymSection::Undefined | SymSection::Livepatch => Target::Other(symbol),
            SymSection::Section(section) => bias
                .and_then(|bias| symbol.value.checked_add_signed(bias))
                .map_or(Target::Unknown, |offset| Target::Own((section, offset))),
            SymSection::Absolute | SymSection::Common => Target::Unknown,
        }
    }

    /// Where the kernel enters the module: what its `struct module` names, but for `module_exit`.
    fn start(&mut self) {
        let payload = self.payload;
        let module = payload.sections.iter().find(|s| s.role == Role::ThisModule);
        for reloc in module.map_or(Vec::new(), |m| self.relocs(m.index, 0, u64::MAX)) {
            let symbol = payload.symbol(reloc.symbol);
            match self.target(&reloc, reloc.offset) {
                Target::Own((section, _)) if self.is_exit(symbol, section) => {}
                Target::Own(place) => self.follow(place, 0),
                _ => {
                    let name = symbol.map_or("?", |s| &*s.name);
                    let reason =
                        format!("it refers to {name}, expected module_init and module_exit");
                    self.name("struct module", reason);
                }
            }
        }
        for symbol in payload.symbols.iter().filter(|s| s.name == "init_module") {
            if let SymSection::Section(section) = symbol.section {
                self.follow((section, symbol.value), 0);
            }
        }
    }

    fn is_exit(&self, symbol: Option<&ElfSymbol>, section: usize) -> bool {
        let in_exit = |s: &Section| s.role == Role::ExitText;
        symbol.is_some_and(|s| s.name == "cleanup_module")
            || self.payload.section(section).is_some_and(in_exit)
    }

    /// Goes on at `place`, which must be code.
    fn follow(&mut self, place: Place, known: u16) {
        let inside = self.payload.section(place.0).is_some_and(|s| {
            s.flags.exec && usize::try_from(place.1).is_ok_and(|at| at < s.data.len())
        });
        if inside {
            self.todo.push((place, known));
        } else {
            self.name_code(place, "goes on where there is no code");
        }
    }

    /// Looks at the instruction at `at`, unless nothing new is known there.
    fn arrive(&mut self, at: Place, known: u16) {
        let known = match self.reached.get(&at) {
            Some((before, _)) if before & known == *before => return,
            Some((before, _)) => before & known,
            None => known,
        };
        self.steps = self.steps.saturating_add(1);
        if self.steps > MAX_STEPS {
            self.todo.clear();
            return self.name_code(at, "goes on for too long to be understood");
        }
        let start = usize::try_from(at.1).unwrap_or(usize::MAX);
        let code = self.payload.section(at.0).and_then(|s| s.data.get(start..));
        let mut decoder =
            Decoder::with_ip(64, code.unwrap_or_default(), at.1, DecoderOptions::NONE);
        let instruction = decoder.decode();
        let constants = decoder.get_constant_offsets(&instruction);
        let end = instruction.next_ip();
        self.reached.insert(at, (known, end.saturating_sub(at.1)));
        if instruction.is_invalid() {
            return self.name_code(at, "has bytes that are no instruction");
        }
        let mut fields = Fields::default();
        for reloc in self.relocs(at.0, at.1.saturating_sub(7), end) {
            let target = (self.target(&reloc, end), reloc.rtype);
            let field = reloc.offset.checked_sub(at.1);
            let is = |offset: usize| field == Some(offset as u64);
            let room = if constants.has_displacement() && is(constants.displacement_offset()) {
                &mut fields.displacement
            } else if constants.has_immediate() && is(constants.immediate_offset()) {
                &mut fields.immediate
            } else if reloc
                .offset
                .saturating_add(super::elf::reloc_width(reloc.rtype))
                <= at.1
            {
                continue;
            } else {
                return self.name_code(at, "is changed by a relocation that fits no operand");
            };
            if room.replace(target).is_some() {
                return self.name_code(at, "is changed by two relocations at one place");
            }
        }
        self.step(at, &instruction, &fields, known);
    }

    fn step(&mut self, at: Place, instruction: &Instruction, fields: &Fields<'p>, known: u16) {
        let next = (at.0, instruction.next_ip());
        let branch = match fields.immediate {
            Some((target, rtype)) if is_relative(rtype) => target,
            Some(_) => Target::Unknown,
            None => Target::Own((at.0, instruction.near_branch_target())),
        };
        match instruction.flow_control() {
            FlowControl::Next => {
                self.operands(at, instruction, fields);
                self.follow(
                    next,
                    known_after(instruction, fields, known, self.payload.klp.place),
                );
            }
            FlowControl::UnconditionalBranch if instruction.is_jmp_short_or_near() => {
                self.branch(at, branch, known);
            }
            FlowControl::ConditionalBranch if instruction.is_jcc_short_or_near() => {
                self.branch(at, branch, known);
                self.follow(next, known);
            }
            FlowControl::Call if instruction.is_call_near() => {
                let other = matches!(branch, Target::Other(_));
                self.branch(at, branch, known);
                self.follow(next, if other { known & KEPT_BY_CALLS } else { 0 });
            }
            FlowControl::Return if instruction.mnemonic() == Mnemonic::Ret => {}
            // WARN goes on behind it.
            FlowControl::Exception if instruction.mnemonic() == Mnemonic::Ud2 => {
                self.follow(next, known);
            }
            _ => self.name_code(
                at,
                "branches to where the file does not say, or leaves the kernel",
            ),
        }
    }

    /// Goes where a branch or a call leads.
    fn branch(&mut self, at: Place, target: Target<'p>, known: u16) {
        match target {
            Target::Own(place) => self.follow(place, known),
            Target::Unknown => self.name_code(at, "branches to where the file does not say"),
            Target::Other(symbol) => {
                self.refer(symbol);
                let enables = symbol.name == "klp_enable_patch";
                self.enables |= enables;
                if !self.is_kpatch()
                    && (enables || symbol.name == "klp_register_patch")
                    && known & FIRST_ARGUMENT == 0
                {
                    self.name_code(
                        at,
                        "passes on another address than that of its struct klp_patch",
                    );
                }
            }
        }
    }

    /// Names a symbol that `module_init` does not need to enable the patch.
    fn refer(&mut self, symbol: &ElfSymbol) {
        let name = symbol.name.as_str();
        let known = symbol.section == SymSection::Undefined
            && (ENABLING.contains(&name) || self.is_kpatch() && KPATCH_HOOK.contains(&name));
        if !known {
            self.name(name, REFERS);
        }
    }

    /// Looks at the operands of an instruction that does not branch.
    fn operands(&mut self, at: Place, instruction: &Instruction, fields: &Fields<'p>) {
        let address_only = matches!(instruction.mnemonic(), Mnemonic::Lea | Mnemonic::Nop);
        let kinds = || (0..instruction.op_count()).map(|n| instruction.op_kind(n));
        let memory = !address_only && kinds().any(|kind| kind == OpKind::Memory);
        // The hook of kpatch copies and clears structures.
        let copies = self.is_kpatch() && copies_memory(instruction);
        let repeats = instruction.has_rep_prefix() || instruction.has_repne_prefix();
        if !copies && (repeats || !is_plain(instruction)) {
            self.name_code(at, &format!("does {:?}", instruction.mnemonic()));
        }
        if moves_stack(instruction) {
            self.name_code(at, "moves the stack");
        }
        for (target, _) in [fields.displacement, fields.immediate]
            .into_iter()
            .flatten()
        {
            match target {
                Target::Other(symbol) => self.refer(symbol),
                Target::Own(place) => self.own(at, place),
                Target::Unknown => self.name_code(at, "has an address that is not understood"),
            }
        }
        if !memory {
            return;
        }
        if self.is_kpatch() {
            return self.memory_of_kpatch(at, instruction, fields);
        }
        match fields.displacement {
            Some((Target::Own(place), _)) => {
                let name = self.describe(place);
                self.name(name, REFERS);
            }
            Some((Target::Other(symbol), _)) => self.name(&*symbol.name, REFERS),
            _ => self.name_code(at, "reads or writes memory"),
        }
    }

    /// kpatch-build's hook uses what it allocated, what it has of its own, and the stack.
    fn memory_of_kpatch(&mut self, at: Place, instruction: &Instruction, fields: &Fields<'p>) {
        let mut factory = InstructionInfoFactory::new();
        let writes = factory
            .info(instruction)
            .used_memory()
            .iter()
            .any(|m| is_write(m.access()));
        let by_register =
            instruction.memory_base() != Register::None && !instruction.is_ip_rel_memory_operand();
        let segment = instruction.segment_prefix() != Register::None;
        match fields.displacement {
            Some((Target::Other(symbol), _)) if writes => self.name(&*symbol.name, REFERS),
            Some(_) if segment => self.name_code(at, "uses memory of a CPU"),
            Some(_) => {}
            // The canary of the stack.
            None if segment && !writes => {}
            None if by_register && !segment => {}
            None => self.name_code(at, "uses memory at a fixed address"),
        }
    }

    /// Notes a variable of the payload that is used by the instruction at `at`, or whose address is.
    fn own(&mut self, at: Place, place: Place) {
        let data = |s: &Section| matches!(s.role, Role::Data | Role::Bss);
        if self.is_kpatch() && self.payload.section(place.0).is_some_and(data) {
            self.used.insert(place);
            if self.used.len() > MAX_USED {
                self.used.remove(&place);
                self.name_code(at, "uses more variables than the hook of kpatch has");
            }
        }
    }

    /// Whether a place is in an instruction that was reached.
    fn is_reached(&self, place: Place) -> bool {
        let last = self.reached.range(..=place).next_back();
        last.is_some_and(|(at, (_, len))| at.0 == place.0 && place.1 < at.1.saturating_add(*len))
    }

    /// Names the tables that have the kernel change code that was reached: it would not do what it says.
    fn tables(&mut self) {
        let payload = self.payload;
        let changes = |s: &&Section| {
            matches!(
                s.role,
                Role::Altinstructions
                    | Role::Parainstructions
                    | Role::JumpTable
                    | Role::StaticCalls
            ) && !s.flags.exec
        };
        for table in payload.sections.iter().filter(changes) {
            // Tables hold distances from their own fields, or addresses.
            let here = table.relocs.iter().any(|reloc| {
                let at = self.target(reloc, reloc.offset);
                matches!(at, Target::Own(place) if self.is_reached(place))
            });
            if here {
                let reason = "it changes code of module_init when the kernel loads the module";
                self.name(&*table.name, reason);
            }
        }
    }

    /// Names the variables that kpatch's hook uses, and other parts of the payload too.
    fn variables(&mut self) {
        if self.used.is_empty() {
            return;
        }
        let view = View::new(&self.payload.sections, &self.payload.symbols);
        let ranges: BTreeSet<(usize, u64, u64)> = self
            .used
            .iter()
            .map(|place| match self.variable(*place) {
                Some(symbol) => (place.0, symbol.value, symbol.size),
                None => (place.0, place.1, 8),
            })
            .collect();
        for (section, start, size) in ranges {
            let end = start.saturating_add(size);
            let own = |from: Place| from.0 == section && (start..end).contains(&from.1);
            let mut referrers = view.referrers(section, start, end);
            if referrers.any(|from| !own(from) && !self.is_reached(from)) {
                let name = self.describe((section, start));
                self.name(name, REFERS);
            }
        }
    }
}
