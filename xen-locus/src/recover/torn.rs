//! A change that took place in part.

use locus_kernel::Kernel;

use super::way_back::roll_back;
use crate::apply::Options;
use crate::arena::Arena;
use crate::error::{Class, Error, Result};
use crate::machine::Machine;
use crate::plan::interrupted;
use crate::storage::journal::{Change, Intent};

/// If the change of the journal's `intent` took place in part, puts back what it had written, and says so. Nothing else is
/// undone: a record that is damaged or newer says nothing about this change.
pub(super) fn take_back(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    arena: &Arena,
    intent: Option<&Intent>,
    options: &Options,
) -> Result<String> {
    // Not what else may be torn: this journal is not about that.
    let resolved = arena.residents(kernel);
    let resolved = resolved.and_then(|mut all| interrupted::resolve_change(kernel, &mut all));
    let Err(error) = resolved else {
        return Ok(String::new());
    };
    let is_torn = |change: &Change| {
        let torn = error.torn();
        torn.is_some_and(|t| t.patch == change.patch && t.sha256 == change.sha256)
    };
    let Some(intent) = intent.filter(|i| is_torn(&i.change)) else {
        return Err(error);
    };
    roll_back(machine, kernel, &intent.change, options).map_err(|e| match e {
        e if e.class() == Class::TryAgain => e,
        e => Error::uncertain(format!("{error}; it could not be taken back: {e}")),
    })?;
    Ok("what it had written is put back by the journal".to_owned())
}
