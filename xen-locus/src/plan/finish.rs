//! The last phase: the record, and the writes that put the payload in force.

use std::ops::Range;

use locus_guest::addr::Gva;

use super::lay_out::LaidOut;
use super::place::{bytes_of, too_short, Placed};
use super::preconditions::Fitted;
use super::resolve::Resolved;
use super::{conditions, patch_stack, Plan, Prepared, Proposal};
use crate::arena;
use crate::arena::digests::{self, CodeDigests};
use crate::arena::record::{ModuleAt, Placement, Record};
use crate::error::{Error, Result};
use crate::link::fixups::KeyCount;
use crate::link::image::Image;
use crate::link::layout::ImageLayout;
use crate::link::module::lists::{self, ListChange};

/// Completes the image by what its module entry needs for the guest's lists and by the record, and makes the plan.
///
/// # Errors
/// [`Cause::Passing`](crate::error::Cause::Passing) while the guest loads or unloads a module or changes a static key.
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): a function is out of reach, or the guest's lists are not
/// as this tool knows them.
pub fn finish(
    fitted: &Fitted<'_, '_>,
    resolved: Resolved,
    laid_out: LaidOut<'_>,
    placed: Placed,
) -> Result<Prepared> {
    let layout = laid_out.layout;
    let Placed {
        first,
        parked,
        listed,
        record_place,
        mut image,
        mut entry,
    } = placed;
    let list_change = if listed {
        ListChange::default()
    } else {
        let uses: Vec<Gva> = resolved.depends.iter().map(|m| m.at).collect();
        lists::insert(fitted.kernel, &mut entry, &uses)?
    };
    image.put_module(&layout, &entry)?;
    let module = entry.place.module();
    let record = complete(&resolved, &image, &layout, (first, module))?;
    let record_json = record.encode()?;
    put_record(&mut image, record_place.clone(), &record_json)?;
    // What ran is left as the guest has it: it may have changed tables and branches of the code, and its timers and
    // lists may lead to the variables.
    let fresh = match listed {
        true => vec![record_place.clone()],
        false => std::iter::once(0..image.bytes.len()).collect(),
    };
    // Once the guest knows the entry, it writes its keys' changes into the payload itself.
    let keys = if listed { &[][..] } else { &image.keys };
    let plan = plan(fitted, &record, &resolved.depends, list_change, keys)?;
    let superseded = fitted.stack.applied().iter().filter(|_| fitted.supersedes);
    let superseded = superseded.map(|&r| r.clone()).collect();
    Ok(Prepared {
        layout,
        first,
        image,
        record,
        record_json,
        record_place,
        parked,
        listed,
        fresh,
        superseded,
        plan,
        depends: resolved.depends,
    })
}

/// The record of a payload whose image begins at arena page `first`, and whose `struct module` is at `module`. It says
/// which bytes of the image are not to change from now on.
fn complete(
    resolved: &Resolved,
    image: &Image,
    layout: &ImageLayout,
    (first, module): (usize, Gva),
) -> Result<Record> {
    let base = arena::page_address(first);
    let place = layout.place(base);
    let (text, rodata) = image
        .bytes
        .split_at_checked(bytes_of(place.text)?)
        .ok_or_else(too_short)?;
    let text_len = usize::try_from(layout.text_len).map_err(|_| too_short())?;
    let code = text.get(..text_len).ok_or_else(too_short)?;
    // The room of the records is zero until one is written.
    let rodata = rodata
        .get(..bytes_of(place.rodata)?)
        .ok_or_else(too_short)?;
    let labels = image.jumps.iter().filter_map(|jump| jump.recorded(base));
    resolved.draft.complete(Placement {
        functions: &image.functions,
        text: (base, layout.text_len),
        code: CodeDigests::of(code.to_vec(), labels.collect()),
        rodata_len: place.rodata.len(),
        rodata_sha256: digests::digest(rodata),
        module,
        record_room: layout.record.recorded(),
    })
}

fn put_record(image: &mut Image, place: Range<usize>, json: &[u8]) -> Result<()> {
    let room = image.bytes.get_mut(place).ok_or_else(too_short)?;
    let len = room.len();
    let place = room.get_mut(..json.len()).ok_or_else(|| {
        Error::failed(format!(
            "the record is {} bytes long, and its room {len}: this is a defect of xen-locus",
            json.len()
        ))
    })?;
    place.copy_from_slice(json);
    Ok(())
}

/// The writes, in their order, and where no thread may be at that moment. `depends` are the modules that the payload needs,
/// `keys` static keys whose counts it was linked for.
fn plan(
    fitted: &Fitted<'_, '_>,
    record: &Record,
    depends: &[ModuleAt],
    list_change: ListChange,
    keys: &[KeyCount],
) -> Result<Plan> {
    let (kernel, stack, supersedes) = (fitted.kernel, fitted.stack, fitted.supersedes);
    let functions = &record.functions;
    let mut modules = depends.to_vec();
    if supersedes {
        let others = stack.applied().iter().flat_map(|r| &r.record.objects);
        modules.extend(others.cloned());
    }
    let mut watched = list_change.watched;
    let entry_only = (record.entry_only && !supersedes).then(|| {
        let redirects = patch_stack::redirects(functions);
        watched.iter().cloned().chain(redirects).collect()
    });
    watched.extend(stack.watched(functions, supersedes));
    let proposal = Proposal {
        patch: &record.name,
        modules,
        keys,
        untraced: conditions::entries(functions).collect(),
        unprobed: stack.unprobed(functions, supersedes),
        data: list_change.writes,
        redirects: stack.writes(functions, supersedes),
        watched,
        entry_only,
    };
    Plan::to_begin(kernel, proposal)
}
