//! Makes the image of a payload for a place in a guest's arena. It reads the guest and writes nothing.

pub mod fixups;
pub mod image;
pub mod layout;
pub mod module;
pub mod reloc;
pub mod split;
