//! Makes the image of a payload for a place in a guest's arena. It reads the guest and writes nothing.
//!
//! - [`layout`]: which part of the payload lies on which page;
//! - [`image`]: the bytes for a place in the arena;
//! - [`reloc`], [`fixups`]: what the module loader does to code: relocations, then the places it rewrites;
//! - [`module`]: the payload as a module of the guest, and how it is linked into the guest's lists;
//! - [`split`]: parts of functions that the compiler put elsewhere.

pub mod fixups;
pub mod image;
pub mod layout;
pub mod module;
pub mod reloc;
pub mod split;
