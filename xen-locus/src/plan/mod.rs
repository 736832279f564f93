//! What is to be written, and when that is safe: decided here, carried out by [`crate::apply`].

use locus_guest::addr::{Gva, Range};
use locus_kernel::Kernel;
use locus_payload::Payload;

use crate::arena::digests::{self, Code};
use crate::arena::record::{Function, ModuleAt, Record, State, SCHEMA};
use crate::arena::{self, Arena, Resident};
use crate::error::{Error, Result};
use crate::link::image::{self, Image, Layout};
use crate::link::module::links::{self, Entering};
use crate::link::module::{self, Entry, Place};
use crate::link::split;
use crate::quiesce::Watch;
use crate::target::compat;
use crate::target::modules_present;
use crate::target::redirect;
use crate::target::symbols::{Objects, VMLINUX};
use crate::write::Write;
use crate::x86;

pub mod stack;

pub use stack::{Layers, Mode, Stack};

/// A change of the guest's text and data that takes effect as a whole.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Name of the payload.
    pub patch: String,
    /// The writes.
    pub writes: Vec<Write>,
    /// Where nobody may be.
    pub watch: Watch,
    /// Where nobody may be if threads may go on in the versions that are replaced: in the bytes that
    /// are written. `None` where the payload does not say that they may.
    pub entry_only: Option<Watch>,
}

/// A payload made ready for one guest, nothing of it written yet.
#[derive(Debug)]
pub struct Prepared {
    /// Its rights, page by page.
    pub layout: Layout,
    /// First arena page.
    pub first: usize,
    /// Its bytes, record included.
    pub image: Image,
    /// Its record.
    pub record: Record,
    /// The record as it stands in the image.
    pub record_json: Vec<u8>,
    /// The directory entry it takes over, if its code is parked in the arena already.
    pub parked: Option<usize>,
    /// What of the image is to be written: ranges of bytes. Of code that is parked the
    /// guest may have changed tables and branches meanwhile, which are to stay.
    pub fresh: Vec<std::ops::Range<usize>>,
    /// The patches it supersedes, the undermost first.
    pub superseded: Vec<Resident>,
    /// The change of text.
    pub plan: Plan,
    /// Modules whose functions it replaces or whose symbols it uses, payloads applied before among
    /// them: name and address of the `struct module`. None of them may go while it is applied.
    pub depends: Vec<(String, Gva)>,
}

/// What `prepare` found.
#[derive(Debug)]
pub enum Readiness {
    /// It is in force already.
    Already(Box<Resident>),
    /// It can be applied.
    Ready(Box<Prepared>),
}

/// Payloads in the arena in the order they were last applied, the state of each as the redirects
/// themselves show it: a run that was ended midway left its entries at applying or reverting.
///
/// # Errors
/// [`Class::Uncertain`](crate::error::Class::Uncertain) when what it was about took place in part.
pub fn residents(kernel: &Kernel<'_>, arena: &Arena) -> Result<Vec<Resident>> {
    let mut all = arena.residents(kernel)?;
    stack::settle(kernel, &mut all)?;
    Ok(all)
}

/// The same, and makes the arena's directory say so from the next time it is written.
///
/// # Errors
/// As [`residents`].
pub fn settle(kernel: &Kernel<'_>, arena: &mut Arena) -> Result<Vec<Resident>> {
    let all = residents(kernel, arena)?;
    for (slot, resident) in arena.directory.slots.iter_mut().zip(&all) {
        slot.state = resident.slot.state;
    }
    Ok(all)
}

/// Where threads may still be that entered functions of `resident`, one of those in `stack`, before it
/// was applied; `None` if it does not say that they may.
#[must_use]
pub fn old_versions(kernel: &Kernel<'_>, stack: &Stack<'_>, resident: &Resident) -> Option<Watch> {
    let entry_only = resident.record.entry_only;
    entry_only.then(|| Watch::new(kernel, stack.below(resident)))
}

/// Checks everything and links the payload for this guest; writes nothing.
///
/// # Errors
/// Whatever makes it not applicable, by name.
pub fn prepare(
    kernel: &Kernel<'_>,
    arena: &Arena,
    payload: &Payload,
    mode: Mode,
) -> Result<Readiness> {
    let residents = residents(kernel, arena)?;
    let stack = Stack::new(&residents);
    let sha256 = hex::encode(payload.sha256);
    let mut applied = stack.applied().iter();
    if let Some(same) = applied.find(|r| r.record.name == payload.name) {
        if let Some(why) = modules_present::gone(kernel, &same.record)? {
            return Err(Error::failed(format!(
                "payload {} was applied, and is not in force any more: {why}. Neither what is left \
                 of it is undone nor is it applied again before the guest starts anew",
                payload.name
            )));
        }
        if same.record.sha256 == sha256 {
            if mode == Mode::Replace && stack.applied().len() > 1 {
                return Err(Error::failed(format!(
                    "payload {} is applied already, and not alone: it can't supersede itself; \
                     revert the others, as `status` lists them, the last one first",
                    payload.name
                )));
            }
            return Ok(Readiness::Already(Box::new((*same).clone())));
        }
        return Err(Error::failed(format!(
            "another payload of the name {} is applied: this file has SHA-256 {sha256}, the one \
             applied {}; revert that one first",
            payload.name, same.record.sha256
        )));
    }
    check_kernel(kernel, payload)?;
    image::check_supported(payload)?;
    let supersedes = mode.supersedes(payload);
    if supersedes {
        for patch in stack.applied() {
            if let Some(why) = modules_present::gone(kernel, &patch.record)? {
                return Err(Error::failed(format!(
                    "{why}: so that payload can't be superseded, for nothing is written where its \
                     redirects were"
                )));
            }
            stack.check_holds(kernel, patch)?;
        }
    }
    let payloads = stack.applied().iter().rev();
    let payloads = payloads.map(|r| r.record.module).collect();
    let objects = Objects::new(kernel, payloads);
    if let Some(exports) = objects.exported() {
        compat::check_versions(kernel, exports, payload)?;
    }
    let (mut functions, returns) = find_functions(kernel, &objects, payload, &stack, supersedes)?;
    let patched: Vec<ModuleAt> = objects
        .used()?
        .into_iter()
        .map(|m| ModuleAt {
            name: m.name.clone(),
            at: m.addr,
            base: m.base,
        })
        .collect();
    let mut record = Record {
        schema: SCHEMA,
        name: payload.name.clone(),
        sha256,
        description: payload.modinfo.description.clone().unwrap_or_default(),
        cves: payload.modinfo.cves.clone(),
        functions: functions.clone(),
        text: (Gva(u64::MAX), u64::MAX),
        code: Code::default(),
        rodata_len: u64::MAX,
        rodata_sha256: hex::encode([0; 32]),
        module: Gva(u64::MAX),
        objects: patched,
        entry_only: payload.modinfo.entry_only,
    };
    for function in &mut record.functions {
        function.new = Gva(u64::MAX);
        function
            .new_cold
            .iter_mut()
            .for_each(|part| part.0 = Gva(u64::MAX));
        (function.found, function.old_bytes) = ([u8::MAX; 5], [u8::MAX; 5]);
        function.new_bytes = [u8::MAX; 5];
    }
    objects.look_up(payload)?;
    let depends: Vec<(String, Gva)> = objects
        .used()?
        .into_iter()
        .map(|m| (m.name.clone(), m.addr))
        .collect();
    // The room for the record: as long as it can get once addresses are known, and whatever it lies
    // on, so that it fits its old pages when it is applied again.
    let entry = Entry::of(payload, kernel, depends.len())?;
    let text_len = Layout::new(payload, 0, entry.size())?.text_len;
    record.code = Code::longest(text_len, module::jump_labels(payload));
    let layout = Layout::new(payload, to_json(&record)?.len(), entry.size())?;
    let link_at = |first| {
        let base = arena::page_address(first);
        let mut image = image::link(payload, kernel, &objects, &layout, base, returns)?;
        let entry = image::entry(&entry, payload, kernel, &objects, &layout, (base, &image))?;
        image.put_entry(&layout, &entry)?;
        Ok::<_, Error>((image, entry))
    };
    // The code of an earlier application may stand there still: what it left behind of threads or
    // timers goes on in the same code.
    let mut parked = None;
    for old in residents.iter().filter(|r| r.slot.state == State::Parked) {
        let first = usize::from(old.slot.first);
        if old.record.sha256 != record.sha256 || usize::from(old.slot.pages) != layout.rights.len()
        {
            continue;
        }
        let (image, entry) = link_at(first)?;
        let entered = links::is_entered(kernel, entry.place.module())?;
        if !entered || is_same(kernel, &layout, &image, &entry.place)? {
            parked = Some((old.index, first, (image, entry), entered));
            break;
        }
    }
    let (parked, first, (mut image, mut entry), entered) = match parked {
        Some((index, first, linked, entered)) => (Some(index), first, linked, entered),
        None => {
            let first = arena.find_room(kernel.kind, &layout.rights)?;
            (None, first, link_at(first)?, false)
        }
    };
    let entering = if entered {
        Entering::default()
    } else {
        let uses: Vec<Gva> = depends.iter().map(|(_, at)| *at).collect();
        links::enter(kernel, &mut entry, &uses)?
    };
    image.put_entry(&layout, &entry)?;
    let fresh = if entered {
        layout.rewritten(record.entry_only)
    } else {
        std::iter::once(0..image.bytes.len()).collect()
    };
    for (function, (new, cold)) in functions.iter_mut().zip(&image.functions) {
        function.new = *new;
        for (part, at) in function.new_cold.iter_mut().zip(cold) {
            part.0 = *at;
        }
        function.new_bytes = x86::jump(function.site, *new).ok_or_else(|| {
            Error::not_applicable(format!(
                "{new} is out of reach of a jump from {}",
                function.name
            ))
        })?;
    }
    record.functions = functions;
    record.text = (arena::page_address(first), layout.text_len);
    seal(&mut record, &image, &layout);
    record.module = entry.place.module();
    let record_json = to_json(&record)?;
    let (offset, room) = layout.record;
    let place = usize::try_from(offset)
        .ok()
        .filter(|_| record_json.len() <= room)
        .and_then(|at| image.bytes.get_mut(at..at + record_json.len()))
        .ok_or_else(|| Error::failed("the record does not fit its room"))?;
    place.copy_from_slice(&record_json);
    // First of all: the modules must be there still.
    let mut there = record.objects.clone();
    if supersedes {
        let others = stack.applied().iter().flat_map(|r| &r.record.objects);
        there.extend(others.cloned());
    }
    let mut writes = modules_present::conditions(kernel, &there)?;
    let mut watched = entering.watched;
    if !entered {
        // From then on the guest itself writes its keys' changes into the payload.
        writes.extend(image.keys.iter().map(|(key, count)| Write {
            at: *key,
            expect: count.to_le_bytes().to_vec(),
            new: count.to_le_bytes().to_vec(),
        }));
    }
    writes.extend(entering.writes);
    writes.extend(stack.writes(&record.functions, supersedes));
    let entry_only = (record.entry_only && !supersedes).then(|| {
        let redirects = stack::redirects(&record.functions);
        Watch::new(kernel, watched.iter().cloned().chain(redirects).collect())
    });
    watched.extend(stack.watched(&record.functions, supersedes));
    let plan = Plan {
        patch: payload.name.clone(),
        writes,
        watch: Watch::new(kernel, watched),
        entry_only,
    };
    let superseded = stack.applied().iter().filter(|_| supersedes);
    let superseded = superseded.map(|&r| r.clone()).collect();
    Ok(Readiness::Ready(Box::new(Prepared {
        layout,
        first,
        image,
        record,
        record_json,
        parked,
        fresh,
        superseded,
        plan,
        depends,
    })))
}

/// The way back of `resident`, one of those in `stack`.
///
/// # Errors
/// Another patch lies on it, or a redirect isn't as it was written.
pub fn undo(kernel: &Kernel<'_>, stack: &Stack<'_>, resident: &Resident) -> Result<Plan> {
    stack.check_on_top(resident)?;
    let record = &resident.record;
    if let Some(why) = modules_present::gone(kernel, record)? {
        return Err(Error::failed(format!(
            "{why}: its redirects went with it, and nothing is written where they were"
        )));
    }
    stack.check_holds(kernel, resident)?;
    let mut writes = modules_present::conditions(kernel, &record.objects)?;
    writes.extend(record.functions.iter().map(|f| Write {
        at: f.site,
        expect: f.new_bytes.to_vec(),
        new: f.old_bytes.to_vec(),
    }));
    Ok(Plan {
        patch: record.name.clone(),
        writes,
        // Nobody may be in the payload's code: in a replacement, or in a function only it calls.
        watch: Watch::new(kernel, stack::code_of(record)),
        entry_only: record
            .entry_only
            .then(|| Watch::new(kernel, stack::redirects(&record.functions).collect())),
    })
}

fn to_json(record: &Record) -> Result<Vec<u8>> {
    serde_json::to_vec(record)
        .map_err(|e| Error::failed(format!("the payload's record can't be written: {e}")))
}

/// Whether the code and constants of `image`, less the record, stand in the arena already.
fn is_same(kernel: &Kernel<'_>, layout: &Layout, image: &Image, place: &Place) -> Result<bool> {
    let len = usize::try_from(place.text.len() + place.rodata.len()).unwrap_or(0);
    let mut found = kernel.space.fresh().read_vec(place.text.start, len)?;
    let mut wanted = image.bytes.get(..len).unwrap_or_default().to_vec();
    let (record, room) = layout.record;
    let record = usize::try_from(record).unwrap_or(usize::MAX);
    for bytes in [&mut found, &mut wanted] {
        if let Some(room) = bytes.get_mut(record..record.saturating_add(room)) {
            room.fill(0);
        }
    }
    Ok(found == wanted)
}

/// Notes what of the payload is not to change from now on.
fn seal(record: &mut Record, image: &Image, layout: &Layout) {
    let place = layout.place(arena::page_address(0));
    let len = |range: Range| usize::try_from(range.len()).unwrap_or(0);
    let (text, rodata) = image.bytes.split_at(len(place.text).min(image.bytes.len()));
    let code = text.get(..usize::try_from(layout.text_len).unwrap_or(0));
    let labels = image.jumps.iter().filter_map(|j| j.label(record.text.0));
    record.code = Code::of(code.unwrap_or_default().to_vec(), labels.collect());
    let rodata = rodata.get(..len(place.rodata)).unwrap_or_default();
    record.rodata_len = place.rodata.len();
    // its room holds zeroes until it is written
    record.rodata_sha256 = digests::digest(rodata);
}

/// The payload must be built for this very kernel.
fn check_kernel(kernel: &Kernel<'_>, payload: &Payload) -> Result<()> {
    let running = kernel.vermagic()?;
    let wanted = payload.modinfo.vermagic.trim_end();
    if wanted != running {
        return Err(Error::not_applicable(format!(
            "payload {} is built for another kernel: its vermagic is {wanted:?}, the guest's is \
             {running:?}; build it against the guest's kernel ({})",
            payload.name, kernel.release
        )));
    }
    if let Some(wanted) = &payload.modinfo.target_build_id {
        let found = kernel.build_id.as_deref();
        if found != Some(&**wanted) {
            return Err(Error::not_applicable(format!(
                "payload {} was made for the kernel with build-id {}, and the guest's has {}: its \
                 text is another; make the payload from the guest's own kernel",
                payload.name,
                hex::encode(wanted),
                found.map_or_else(|| "none".into(), hex::encode)
            )));
        }
    }
    compat::check_layout(kernel.btf()?, payload)
}

fn find_functions(
    kernel: &Kernel<'_>,
    objects: &Objects<'_, '_>,
    payload: &Payload,
    stack: &Stack<'_>,
    supersedes: bool,
) -> Result<(Vec<Function>, Option<redirect::Returns>)> {
    let subject = format!("payload {}", payload.name);
    let no = |why: String| Error::not_applicable(format!("{subject}: {why}"));
    let mut functions: Vec<Function> = Vec::new();
    let mut returns = None;
    for object in &payload.klp.objects {
        let name = object.name.as_deref();
        let owner = objects.owner(name).map_err(|e| e.context(&*subject))?;
        for func in &object.funcs {
            let old = objects
                .symbol(name, &func.old_name, func.old_sympos)
                .map_err(|e| e.context(format!("{subject}: function {}", func.old_name)))?;
            if functions.iter().any(|f| f.old == old) {
                return Err(no(format!("it replaces {} twice", func.old_name)));
            }
            let standing = stack.layers(old).map(Layers::standing);
            let examined =
                redirect::examine(kernel, owner, &func.old_name, old, standing.as_ref())?;
            let original = examined.site.old;
            let found = standing.map_or(original, |ours| ours.jump);
            returns = returns.or(examined.returns);
            functions.push(Function {
                name: func.old_name.clone(),
                object: name.unwrap_or(VMLINUX).to_owned(),
                old,
                old_size: examined.range.len(),
                old_cold: examined.cold.iter().map(|r| (r.start, r.len())).collect(),
                new: Gva(0),
                new_size: func.new_size,
                new_cold: split::parts(payload, func)
                    .map(|part| (Gva(0), part.size))
                    .collect(),
                site: examined.site.at,
                found,
                old_bytes: if supersedes { original } else { found },
                new_bytes: [0; 5],
            });
        }
    }
    if functions.is_empty() {
        return Err(no("it replaces no function".into()));
    }
    Ok((functions, returns))
}
