//! Prints a type of a saved guest's kernel as C, with the offset of each member, from the kernel's own BTF:
//!
//! ```text
//! cargo run -p locus-kernel --example types CORE task_struct
//! ```

use std::error::Error;
use std::path::Path;

use locus_guest::core::Core;
use locus_kernel::Kernel;

/// The types called `name` in the core at `path`, as C.
pub fn show(path: &Path, name: &str) -> Result<String, Box<dyn Error>> {
    let core = Core::open(path)?;
    let kernel = Kernel::of_saved(&core, core.kind(), core.vcpus())?;
    let found = kernel.btf()?.describe(name, kernel.space.budget())?;
    if found.is_empty() {
        return Err(format!("Linux {} has no type {name}", kernel.release).into());
    }
    Ok(found.into_iter().map(|described| described.text).collect())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [core, name] = arguments.as_slice() else {
        return Err("usage: types CORE NAME".into());
    };
    print!("{}", show(Path::new(core), name)?);
    Ok(())
}
