//! What `module_init` does: its code, decoded from where the kernel would enter it.
//!
//! `module_init` does not run when xen-locus applies a payload. So all that it does besides enabling the
//! patch would be missing, and the new functions may rely on it. Whether it does more is decided by what is
//! understood. All code that it can reach is followed: jumps, local calls, tail calls, with the relocations
//! of every section for it. Accepted are instructions that change registers only, `push` and `pop`, calls of
//! [`ENABLING`], and at least one call of `klp_enable_patch` with the address of the one
//! `struct klp_patch`. Each function must return to its caller, with the registers that are the caller's as
//! they were. All else is named: memory that is read or written, other calls, indirect branches, addresses
//! of code, tables that have the kernel change this code, and code that ends nowhere.
//!
//! `module_init` of kpatch-build is known: `kmod/patch/livepatch-patch-hook.c` of kpatch. It builds its
//! structures in memory that it allocates, so memory may be used, by registers that it has set, and
//! [`KPATCH_HOOK`] may be called. It must refer to the table of functions. What it uses of the payload's own
//! variables may be used by nothing else in the payload. Of its pointers only that of its patch is followed
//! ([`replace()`]).
//!
//! - `entry`: where the kernel enters; `decode`: instructions and their relocations; `state`: stack and registers;
//!   `origins`: where values come from; `replace`: what of the patch is set; `tables`: what changes the code.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register,
};

use super::elf::Reloc;
use super::pointers::View;
use super::role::Role;
use super::summary::Concern;
use super::symbol::{ElfSymbol, SymKind, SymSection};
use super::Payload;

mod decode;
mod entry;
mod instruction;
mod names;
mod origins;
mod registers;
mod replace;
mod state;
mod tables;

use instruction::{copies_memory, is_canary, is_plain, is_write};
use names::{ENABLING, ENDS, KPATCH_HOOK, MARK, OF_PATCH, VARIABLES};
use origins::{Origin, OTHERS};
use registers::{is_relative, Fields, Target};
use replace::Sources;
use state::State;

pub use origins::HOOK_REPLACE;
pub(super) use replace::replace;

/// Most instructions that are looked at, each time they are. The hook of kpatch has less than a thousand.
const MAX_STEPS: usize = 1 << 15;
/// Most places of the payload's own variables that the hook of kpatch uses. It has a dozen.
const MAX_USED: usize = 64;
/// Most things that are named.
const MAX_NAMED: usize = 32;
/// The register of a function's first argument, rdi.
const FIRST_ARGUMENT: u16 = 1 << 7;
/// Why a symbol or a variable is named.
const REFERS: &str = "module_init refers to it, and module_init is not run from outside";

/// A place in the file: ELF index of a section, and offset in it in bytes.
type Place = (usize, u64);

/// What `payload`'s `module_init` does besides enabling the patch.
pub(super) fn concerns(payload: &Payload) -> Vec<Concern> {
    let mut walk = Walk::new(payload);
    walk.run();
    walk.tables();
    walk.variables();
    if !walk.enables {
        let reason = "it does not enable the patch, so the kernel's own loader would not either";
        walk.name("module_init", reason);
    }
    if walk.is_kpatch() && !walk.lists {
        let reason = "it does not use .kpatch.funcs, which says what is replaced";
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
    /// ELF indexes of the sections of late relocations, by the section that they relocate.
    late: HashMap<usize, Vec<usize>>,
    /// Relocations by section, rising, late ones too. Only of sections that are looked at.
    relocs: HashMap<usize, Vec<Reloc>>,
    /// Instructions that were reached: what is known there, and their length.
    reached: BTreeMap<Place, (State, u64)>,
    todo: Vec<(Place, State)>,
    steps: usize,
    enables: bool,
    /// The table of functions of kpatch is used.
    lists: bool,
    /// The payload's own variables that are used.
    used: BTreeSet<Place>,
    /// What the patch of kpatch's hook may come from.
    sources: Sources,
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
        let mut late: HashMap<usize, Vec<usize>> = HashMap::new();
        for section in &payload.sections {
            if let Role::KlpRela { target, .. } = section.role {
                late.entry(target).or_default().push(section.index);
            }
        }
        Self {
            payload,
            symbols,
            late,
            relocs: HashMap::new(),
            reached: BTreeMap::new(),
            todo: Vec::new(),
            steps: 0,
            enables: false,
            lists: false,
            used: BTreeSet::new(),
            sources: Sources::default(),
            named: BTreeSet::new(),
        }
    }

    /// Follows all code that can be reached.
    fn run(&mut self) {
        self.start();
        while let Some((at, known)) = self.todo.pop() {
            self.arrive(at, known);
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

    /// Goes on at `place`, which must be code.
    fn follow(&mut self, place: Place, state: &State) {
        let inside = self.payload.section(place.0).is_some_and(|s| {
            s.flags.exec && usize::try_from(place.1).is_ok_and(|at| at < s.data.len())
        });
        if inside {
            self.todo.push((place, state.clone()));
        } else {
            self.name_code(place, "goes on where there is no code");
        }
    }

    /// Looks at the instruction at `at`, unless nothing new is known there.
    fn arrive(&mut self, at: Place, state: State) {
        let state = match self.reached.get(&at) {
            None => state,
            Some((before, _)) => match before.joined(&state) {
                Some(both) if both == *before => return,
                Some(both) => both,
                None => {
                    let does = "is reached by two ways with different stacks";
                    return self.name_code(at, does);
                }
            },
        };
        self.steps = self.steps.saturating_add(1);
        if self.steps > MAX_STEPS {
            self.todo.clear();
            return self.name_code(at, "goes on for too long to be understood");
        }
        let (instruction, fields) = match self.decode(at) {
            Ok(decoded) => decoded,
            Err(does) => {
                self.reached.insert(at, (state, 1));
                return self.name_code(at, does);
            }
        };
        let len = instruction.next_ip().saturating_sub(at.1);
        self.reached.insert(at, (state.clone(), len));
        self.step(at, &instruction, &fields, &state);
    }

    fn step(&mut self, at: Place, instruction: &Instruction, fields: &Fields<'p>, state: &State) {
        let next = (at.0, instruction.next_ip());
        let branch = match fields.immediate {
            Some((target, rtype)) if is_relative(rtype) => target,
            Some(_) => Target::Unknown,
            None => Target::Own((at.0, instruction.near_branch_target())),
        };
        match instruction.flow_control() {
            FlowControl::Next => {
                self.operands(at, instruction, fields);
                let variable = self.source_of(instruction, fields);
                let after = state.after(instruction, fields, self.payload.klp.place, variable);
                let after = after.unwrap_or_else(|does| {
                    self.name_code(at, does);
                    state.clone()
                });
                self.follow(next, &after);
            }
            FlowControl::UnconditionalBranch if instruction.is_jmp_short_or_near() => {
                self.jump(at, branch, state);
            }
            FlowControl::ConditionalBranch if instruction.is_jcc_short_or_near() => {
                self.jump(at, branch, state);
                self.follow(next, state);
            }
            FlowControl::Call if instruction.code() == Code::Call_rel32_64 => {
                match branch {
                    Target::Own(place) => self.follow(place, &state.called(place)),
                    _ => self.leave(at, branch, state),
                }
                match branch {
                    Target::Other(symbol, 0) if symbol.name == ENDS => {}
                    Target::Other(symbol, 0) if symbol.name == MARK => self.follow(next, state),
                    _ => {
                        let returned = self.returned(at, branch, state);
                        self.follow(next, &state.after_call(returned));
                    }
                }
            }
            FlowControl::Return if instruction.code() == Code::Retnq => self.give_back(at, state),
            // WARN goes on behind it.
            FlowControl::Exception if instruction.mnemonic() == Mnemonic::Ud2 => {
                self.follow(next, state);
            }
            _ => self.name_code(
                at,
                "branches to where the file does not say, or leaves the kernel",
            ),
        }
    }

    /// Where the value comes from that a function returns, which is called at `at`.
    fn returned(&mut self, at: Place, function: Target<'p>, state: &State) -> Origin {
        match function {
            Target::Other(symbol, _) if symbol.name == "memset" => state.origins.argument(),
            Target::Other(symbol, _) if !symbol.name.contains("alloc") => Origin::default(),
            Target::Other(..) | Target::Own(_) => Origin::of(self.source_of_call(at)),
            Target::Unknown => Origin::of(OTHERS),
        }
    }

    /// Goes where a jump leads. One to another function is a call and a return.
    fn jump(&mut self, at: Place, target: Target<'p>, state: &State) {
        if let Target::Own(place) = target {
            return self.follow(place, state);
        }
        self.leave(at, target, state);
        self.give_back(at, state);
    }

    /// Names a return that does not lead to the caller.
    fn give_back(&mut self, at: Place, state: &State) {
        if !state.returns() {
            let does = "returns without the stack and the registers that its caller had";
            self.name_code(at, does);
        }
    }

    /// Notes a call of a function that is not the payload's.
    fn leave(&mut self, at: Place, target: Target<'p>, state: &State) {
        let Target::Other(symbol, 0) = target else {
            return self.name_code(at, "branches to where the file does not say");
        };
        self.refer(symbol);
        self.enables |= symbol.name == "klp_enable_patch";
        let of_patch = !self.is_kpatch() && OF_PATCH.contains(&&*symbol.name);
        if of_patch && state.known & FIRST_ARGUMENT == 0 {
            let does = "passes on another address than that of its struct klp_patch";
            self.name_code(at, does);
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
        let of_code = instruction.is_ip_rel_memory_operand() && fields.displacement.is_none();
        if of_code && instruction.mnemonic() != Mnemonic::Nop {
            self.name_code(at, "takes the address of code");
        }
        self.addresses(at, instruction, fields);
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
            Some((Target::Other(symbol, _), _)) => self.name(&*symbol.name, REFERS),
            _ => self.name_code(at, "reads or writes memory"),
        }
    }

    /// Looks at the addresses in an instruction that does not branch.
    fn addresses(&mut self, at: Place, instruction: &Instruction, fields: &Fields<'p>) {
        let relative = instruction.is_ip_rel_memory_operand();
        let displacement = fields.displacement.map(|field| (field, relative));
        let immediate = fields.immediate.map(|field| (field, false));
        for ((target, rtype), relative) in [displacement, immediate].into_iter().flatten() {
            match target {
                _ if is_relative(rtype) != relative => {
                    self.name_code(at, "has an address that is not understood");
                }
                Target::Other(symbol, _) if VARIABLES.contains(&&*symbol.name) => {
                    self.refer(symbol);
                }
                Target::Other(symbol, _) => self.name(&*symbol.name, REFERS),
                Target::Own(place) => self.own(at, place),
                Target::Unknown => self.name_code(at, "has an address that is not understood"),
            }
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
            Some((Target::Other(symbol, _), _)) if writes => self.name(&*symbol.name, REFERS),
            Some(_) if segment => self.name_code(at, "uses memory of a CPU"),
            Some(_) => {}
            None if segment && !writes && is_canary(instruction) => {}
            None if by_register && !segment => {}
            None => self.name_code(at, "uses memory at a fixed address"),
        }
    }

    /// Notes a variable of the payload that is used by the instruction at `at`, or whose address is.
    fn own(&mut self, at: Place, place: Place) {
        let Some(section) = self.payload.section(place.0) else {
            return;
        };
        if section.flags.exec {
            return self.name_code(at, "takes the address of code");
        }
        self.lists |= section.name == super::kpatch::FUNCS;
        if self.is_kpatch() && matches!(section.role, Role::Data | Role::Bss) {
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
