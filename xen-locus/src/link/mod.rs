//! From a payload and a kernel to what is written into the guest: the image for the arena, and the
//! place of each redirect. Nothing here changes a guest but [`arena`], which adds pages to it that
//! nothing in the guest refers to yet.

pub mod arena;
pub mod exports;
pub mod fit;
pub mod gate;
pub mod holder;
pub mod image;
pub mod module;
pub mod objects;
pub mod presence;
pub mod record;
pub mod reloc;
pub mod seal;
pub mod site;
pub mod sites;
pub mod split;
