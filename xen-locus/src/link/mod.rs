//! From a payload and a kernel to the image that is placed in the arena: pure, bytes in and bytes out.

pub mod fixups;
pub mod image;
pub mod module;
pub mod reloc;
pub mod split;
