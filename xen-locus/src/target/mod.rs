//! What a payload refers to in the guest: the functions that it replaces and where they can be redirected,
//! the symbols and modules that it needs, and conflicts with other users of the same functions.

pub mod compat;
pub mod conflicts;
pub mod exports;
pub mod modules_present;
pub mod redirect;
pub mod symbols;
