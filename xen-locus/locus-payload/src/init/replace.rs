//! What the `module_init` of kpatch-build sets `replace` of its patch to.
//!
//! The hook allocates the patch, keeps its address in a variable, and passes it to `klp_enable_patch`. So the patch is
//! known: it is what this call is given, and where that comes from. Then all that the hook writes by an address that may
//! be the patch's must be understood: its first two members, and one constant to the byte of `replace`. Its address may
//! be kept in that variable and in registers, and nowhere else. Members of other structures are not looked at.

use std::collections::BTreeMap;

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

use super::instruction::{copies_memory, is_write};
use super::origins::{is_of_memory, replace_set_by, Origin, Origins, OTHERS};
use super::registers::{Fields, Target};
use super::state::State;
use super::{Place, Walk};
use crate::role::Role;
use crate::Payload;

/// End of the members that stand in front of `replace` in each form: `mod` and `objs`.
const FIRST_MEMBERS: u64 = 16;
/// Size of an address in bytes.
const ADDRESS: u64 = 8;
/// Most sources that have a bit of their own.
const MAX_SOURCES: usize = 63;

/// What a value may come from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    /// What the function returns that is called here: an allocation, or one of the payload.
    Call(Place),
    /// A variable of the payload.
    Variable(Place),
}

/// The sources that have bits.
#[derive(Default)]
pub(super) struct Sources(BTreeMap<Source, u64>);

impl Sources {
    fn bit(&mut self, source: Source) -> u64 {
        let next = self.0.len();
        let new = if next < MAX_SOURCES {
            1 << next
        } else {
            OTHERS
        };
        match self.0.get(&source) {
            Some(known) => *known,
            None if new == OTHERS => OTHERS,
            None => *self.0.entry(source).or_insert(new),
        }
    }
}

/// A place that was reached, and what is known there.
struct Step<'p> {
    at: Place,
    instruction: Instruction,
    fields: Fields<'p>,
    origins: Origins,
    /// What it returns, if it returns.
    returned: Option<Origin>,
}

/// Where the address of the patch comes from.
#[derive(Clone, Copy)]
struct Patch {
    /// The call that made it, and the variables that hold it.
    own: u64,
    /// All that may be it: those, and what is not known.
    may: u64,
    /// Allocations that only a function returns which the hook has for allocating.
    inner: u64,
}

/// What the hook of `payload` sets `replace` to. `None` if that can't be told.
pub(crate) fn replace(payload: &Payload) -> Option<bool> {
    let mut walk = Walk::new(payload);
    walk.run();
    let reached = walk.reached.iter();
    let reached: Vec<(Place, State)> = reached
        .map(|(at, (state, _))| (*at, state.clone()))
        .collect();
    let mut steps = Vec::new();
    for (at, state) in reached {
        let (instruction, fields) = walk.decode(at).ok()?;
        let returned = walk.returned_by(at, &instruction, &fields, &state);
        steps.push(Step {
            at,
            instruction,
            fields,
            origins: state.origins,
            returned,
        });
    }
    let patch = walk.patch(&steps)?;
    let mut set = None;
    for step in &steps {
        if !walk.is_understood(step, patch) {
            return None;
        }
        if let Some(value) = replace_set_by(&step.instruction) {
            let is_patch = step.base().is_one_of(patch.own);
            if !is_patch || set.replace(value).is_some() {
                return None;
            }
        }
    }
    match set? {
        value @ 0..=1 => Some(value == 1),
        _ => None,
    }
}

/// What a function of the payload may return, which begins at `function`.
fn returns<'a>(steps: &'a [Step<'_>], function: Place) -> impl Iterator<Item = Origin> + 'a {
    let here = move |step: &&Step<'_>| step.origins.function.is_none_or(|of| of == function);
    steps.iter().filter(here).filter_map(|step| step.returned)
}

impl Step<'_> {
    /// The function of the payload that it calls.
    fn own_function(&self) -> Option<Place> {
        let place = match self.fields.immediate {
            Some((Target::Own(place), _)) => place,
            Some(_) => return None,
            None => (self.at.0, self.instruction.near_branch_target()),
        };
        self.instruction.is_call_near().then_some(place)
    }

    /// Where the address comes from that its operand in memory is behind.
    fn base(&self) -> Origin {
        self.origins.get(self.instruction.memory_base())
    }

    /// The function of the kernel that it calls or jumps to.
    fn calls(&self) -> Option<&str> {
        let instruction = &self.instruction;
        match self.fields.immediate {
            Some((Target::Other(symbol, _), _))
                if instruction.is_jmp_short_or_near() || instruction.is_call_near() =>
            {
                Some(&symbol.name)
            }
            _ => None,
        }
    }

    /// What it writes to memory.
    fn written(&self) -> Origin {
        if self.instruction.mnemonic() == Mnemonic::Push {
            return match self.instruction.op0_kind() {
                OpKind::Register => self.origins.get(self.instruction.op0_register()),
                _ => Origin::of(OTHERS),
            };
        }
        match self.instruction.op1_kind() {
            OpKind::Register => self.origins.get(self.instruction.op1_register()),
            _ => Origin::default(),
        }
    }

    fn writes(&self) -> bool {
        let mut factory = InstructionInfoFactory::new();
        let used = factory.info(&self.instruction).used_memory();
        used.iter().any(|m| is_write(m.access()))
    }

    /// The variable that its operand in memory is, if no register is added.
    fn variable(&self) -> Option<Place> {
        let register = |r: Register| !matches!(r, Register::None | Register::RIP);
        let plain =
            !register(self.instruction.memory_base()) && !register(self.instruction.memory_index());
        match self.fields.displacement {
            Some((Target::Own(place), _)) if plain && is_of_memory(&self.instruction) => {
                Some(place)
            }
            _ => None,
        }
    }

    /// Whether it puts an address as it is into memory.
    fn stores_address(&self) -> bool {
        self.instruction.mnemonic() == Mnemonic::Mov
            && self.instruction.op1_kind() == OpKind::Register
            && self.instruction.op1_register().is_gpr64()
    }
}

impl<'p> Walk<'p> {
    /// The source of what is allocated at a place.
    pub(super) fn source_of_call(&mut self, at: Place) -> u64 {
        self.sources.bit(Source::Call(at))
    }

    /// The source of what an instruction reads of a variable of the payload; 0 if it reads none.
    pub(super) fn source_of(&mut self, instruction: &Instruction, fields: &Fields<'_>) -> u64 {
        let Some((Target::Own(place), _)) = fields.displacement else {
            return 0;
        };
        let data = |role: &Role| matches!(role, Role::Data | Role::Bss);
        let section = self.payload.section(place.0);
        if !is_of_memory(instruction) || !section.is_some_and(|s| data(&s.role)) {
            return 0;
        }
        let base = instruction.memory_base();
        let plain = matches!(base, Register::None | Register::RIP)
            && instruction.memory_index() == Register::None;
        match plain {
            true => self.sources.bit(Source::Variable(place)),
            false => OTHERS,
        }
    }

    /// What an instruction returns to the caller of its function, if it does.
    fn returned_by(
        &mut self,
        at: Place,
        instruction: &Instruction,
        fields: &Fields<'p>,
        state: &State,
    ) -> Option<Origin> {
        match fields.immediate {
            _ if instruction.mnemonic() == Mnemonic::Ret => Some(state.origins.returned()),
            Some((to @ Target::Other(symbol, _), _)) if instruction.is_jmp_short_or_near() => {
                Some(match &*symbol.name {
                    "__x86_return_thunk" => state.origins.returned(),
                    _ => self.returned(at, to, state),
                })
            }
            _ => None,
        }
    }

    /// Where the address of the patch comes from that is enabled. `None` unless it is one that is allocated, and that
    /// each call is given.
    fn patch(&self, steps: &[Step<'_>]) -> Option<Patch> {
        let is_enabled = |step: &&Step<'_>| step.calls() == Some("klp_enable_patch");
        let first = steps.iter().find(is_enabled)?;
        // Variables that hold it, and what is put into them.
        let mut own = first.origins.argument().may;
        loop {
            let before = own;
            for step in steps.iter().filter(|step| step.writes()) {
                let variable = step.variable().and_then(|at| self.known_variable(at));
                let both = variable.map_or(0, |source| source | step.written().may);
                if own & both != 0 {
                    own |= both;
                }
            }
            if own == before {
                break;
            }
        }
        let mut enabled = steps.iter().filter(is_enabled);
        let is_given = |s: &Step<'_>| s.origins.argument().is_one_of(own) && s.origins.sets_replace;
        if own & OTHERS != 0 || !enabled.all(is_given) {
            return None;
        }
        let made = self.sources.0.iter();
        let mut made = made.filter_map(|(source, bit)| match source {
            Source::Call(at) if own & bit != 0 => Some(*at),
            _ => None,
        });
        let (made, more) = (made.next()?, made.next());
        if more.is_some() {
            return None;
        }
        let inner = self.allocated_by(made, steps)?;
        // Calls of functions of the payload that may return the patch.
        let mut returned: BTreeMap<Option<Place>, u64> = BTreeMap::new();
        for step in steps {
            let may = step.returned.map_or(0, |origin| origin.may);
            *returned.entry(step.origins.function).or_default() |= may;
        }
        let of = |function: Option<Place>| returned.get(&function).copied().unwrap_or(0);
        let calls = || steps.iter().filter_map(|s| Some((s.at, s.own_function()?)));
        let mut may = own | OTHERS;
        loop {
            let before = may;
            for (at, function) in calls() {
                if (of(Some(function)) | of(None)) & may != 0 {
                    may |= self.known_call(at);
                }
            }
            if may == before {
                break;
            }
        }
        Some(Patch { own, may, inner })
    }

    /// The source of a new allocation that the call at `at` returns, if that is one of a function of the payload; 0 if it
    /// is the kernel's own. `None` if it may return something else.
    fn allocated_by(&self, at: Place, steps: &[Step<'_>]) -> Option<u64> {
        let call = steps.iter().find(|step| step.at == at)?;
        let Some(function) = call.own_function() else {
            return call.calls().is_some().then_some(0);
        };
        let mut all = returns(steps, function);
        let first = all.next()?;
        let kernels = steps
            .iter()
            .any(|step| step.calls().is_some() && first.is_one_of(self.known_call(step.at)));
        (kernels && all.all(|other| other == first)).then_some(first.may)
    }

    fn known_call(&self, at: Place) -> u64 {
        self.sources.0.get(&Source::Call(at)).copied().unwrap_or(0)
    }

    fn known_variable(&self, at: Place) -> Option<u64> {
        self.sources.0.get(&Source::Variable(at)).copied()
    }

    /// The variables that hold the address of the patch.
    fn holders(&self, patch: u64) -> impl Iterator<Item = Place> + '_ {
        let sources = self.sources.0.iter();
        sources.filter_map(move |(source, bit)| match source {
            Source::Variable(at) if patch & bit != 0 => Some(*at),
            _ => None,
        })
    }

    /// Whether a step leaves alone the patch, and the variables that hold its address, or what it does to them is known.
    fn is_understood(&self, step: &Step<'_>, patch: Patch) -> bool {
        let instruction = &step.instruction;
        let of_patch = |origin: Origin| origin.may & (patch.may | patch.inner) != 0;
        let holds = |place: Place, size: u64| {
            self.holders(patch.own).any(|at| {
                let overlaps =
                    place.1 < at.1.saturating_add(ADDRESS) && at.1 < place.1.saturating_add(size);
                at.0 == place.0 && overlaps
            })
        };
        // Addresses of these variables, and of what begins elsewhere and may reach them.
        let indexed = step.variable().is_none() && is_of_memory(instruction);
        let lea = instruction.mnemonic() == Mnemonic::Lea;
        let displacement = step.fields.displacement.filter(|_| indexed || lea);
        let addresses = [displacement, step.fields.immediate];
        let taken = addresses.into_iter().flatten();
        for (target, _) in taken {
            if matches!(target, Target::Own(place) if holds(place, 1)) {
                return false;
            }
        }
        if copies_memory(instruction) || step.calls() == Some("memset") {
            return !of_patch(step.origins.argument());
        }
        if instruction.mnemonic() == Mnemonic::Push {
            return !of_patch(step.written());
        }
        let size = instruction.memory_size().size() as u64;
        let variable = step.variable().filter(|place| holds(*place, size));
        if let Some(place) = variable {
            let whole = size == ADDRESS && self.holders(patch.own).any(|at| at == place);
            let bss = self
                .payload
                .section(place.0)
                .is_some_and(|s| s.role == Role::Bss);
            let same = step.written().is_one_of(patch.own) && step.stores_address();
            return whole && bss && (same || !step.writes());
        }
        if !is_of_memory(instruction) || !step.writes() {
            return true;
        }
        let index = step.origins.get(instruction.memory_index());
        if !of_patch(step.base()) && !of_patch(index) {
            return !of_patch(step.written());
        }
        let end = instruction.memory_displacement64().checked_add(size);
        let first = end.is_some_and(|end| size > 0 && end <= FIRST_MEMBERS);
        step.base().is_one_of(patch.own)
            && instruction.memory_index() == Register::None
            && step.fields.displacement.is_none()
            && !of_patch(step.written())
            && (first || replace_set_by(instruction).is_some())
    }
}
