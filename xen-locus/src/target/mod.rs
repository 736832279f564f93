//! What a payload refers to in the guest, and what speaks against it.
//!
//! - [`compat`]: whether the payload was built for this kernel;
//! - [`symbols`], [`exports`]: functions and symbols, found as livepatch and the module loader find them;
//! - [`rewritten`]: tables of places that the kernel rewrites while it runs;
//! - [`redirect`]: where a function can be redirected;
//! - [`conflicts`]: what else in the guest changes the same bytes: ftrace, kprobes, other livepatches;
//! - [`kprobes`]: where the guest's kprobes stand, and what they run;
//! - [`kernel_locks`]: locks of the guest's kernel that must be free;
//! - [`lkrg`]: what panics when the guest's code is changed from outside;
//! - [`modules_present`]: modules that must stay while the payload is applied.

pub mod compat;
pub mod conflicts;
pub mod exports;
pub mod kernel_locks;
pub mod kprobes;
pub mod lkrg;
pub mod modules_present;
pub mod redirect;
pub mod rewritten;
pub mod symbols;
