//! Functions of Xen's shared libraries, loaded at run time.
//!
//! [`functions!`] lists the functions that are used of one library, each with its C prototype. A prototype that differs
//! from Xen's header makes undefined behaviour of every call, so each one is compared with the header:
//!
//! - `libxenctrl`: when this crate is compiled, with the declarations that bindgen made of `xenctrl.h` for
//!   `xenctrl-sys`. The declarations are compared in constants, which no code refers to, so the program does not
//!   link with `libxenctrl`.
//! - `libxenforeignmemory`, `libxencall`, `libxenstore`: `xenctrl-sys` has no declarations of them, because `xenctrl.h`
//!   does not include their headers. The tests of this file compare them, with the C compiler.

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::Error;

/// Declares a structure with the functions that are used of one library. Each field has the name of its function.
///
/// `checked by xenctrl_sys` compares each prototype with the declaration in `xenctrl-sys`. A structure without it must
/// be in the test of this file.
macro_rules! functions {
    (
        $(#[$attribute:meta])*
        struct $name:ident checked by xenctrl_sys { $(fn $symbol:ident($($argument:ty),*) $(-> $result:ty)?;)* }
    ) => {
        $crate::library::functions! {
            @define $(#[$attribute])* $name { $(fn $symbol($($argument),*) $(-> $result)?;)* }
        }
        $(const _: unsafe extern "C" fn($($argument),*) $(-> $result)? = xenctrl_sys::$symbol;)*
    };
    (
        $(#[$attribute:meta])*
        struct $name:ident { $(fn $symbol:ident($($argument:ty),*) $(-> $result:ty)?;)* }
    ) => {
        $crate::library::functions! {
            @define $(#[$attribute])* $name { $(fn $symbol($($argument),*) $(-> $result)?;)* }
        }
        #[cfg(test)]
        impl $name {
            /// Name and Rust type of each function.
            pub(super) fn prototypes() -> Vec<(&'static str, &'static str)> {
                vec![$((
                    stringify!($symbol),
                    std::any::type_name::<unsafe extern "C" fn($($argument),*) $(-> $result)?>(),
                ),)*]
            }
        }
    };
    (@define $(#[$attribute:meta])* $name:ident { $(fn $symbol:ident($($argument:ty),*) $(-> $result:ty)?;)* }) => {
        $(#[$attribute])*
        pub(super) struct $name {
            $(pub(super) $symbol: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            /// Keeps the code of the functions mapped.
            _library: libloading::os::unix::Library,
        }

        impl $name {
            /// Loads the library with this file name.
            ///
            /// # Errors
            /// [`Error::Library`]: there is no such library, or it lacks one of the functions.
            pub(super) fn load(file: &str) -> Result<$name, $crate::Error> {
                let library = $crate::library::load(file)?;
                Ok($name {
                    // SAFETY: the prototypes are those of Xen's headers: see the head of `library.rs`.
                    $($symbol: unsafe { $crate::library::symbol(&library, file, stringify!($symbol))? },)*
                    _library: library,
                })
            }
        }
    };
}
pub(super) use functions;

/// Loads the shared library with this file name.
pub(super) fn load(file: &str) -> Result<Library, Error> {
    // SAFETY: the initialisers of Xen's libraries have no preconditions.
    unsafe { Library::open(Some(file), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| Error::Library {
        library: file.into(),
        why: e.to_string(),
    })
}

/// Looks up the function `name`.
///
/// # Safety
/// `T` is the `extern "C"` function pointer type of `name` in the library.
pub(super) unsafe fn symbol<T: Copy>(
    library: &Library,
    file: &str,
    name: &str,
) -> Result<T, Error> {
    // SAFETY: the caller guarantees the type.
    let found = unsafe { library.get::<T>(name.as_bytes()) };
    found.map(|s| *s).map_err(|e| Error::Library {
        library: file.into(),
        why: e.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use crate::{foreign_memory, hypercall, xenstore_list};

    /// The C type of a Rust type, as `type_name` writes it. Only what the prototypes use.
    fn c_type(rust: &str) -> String {
        if let Some(to) = rust.strip_prefix("*mut ") {
            return format!("{} *", c_type(to));
        }
        if let Some(to) = rust.strip_prefix("*const ") {
            return format!("const {} *", c_type(to));
        }
        match rust.rsplit("::").next().unwrap() {
            "()" | "c_void" => "void",
            "i32" => "int",
            "u32" => "unsigned int",
            "u64" => "uint64_t",
            "i8" => "char",
            "bool" => "bool",
            "usize" => "size_t",
            "xentoollog_logger" => "struct xentoollog_logger",
            "xs_handle" => "struct xs_handle",
            "xs_permissions" => "struct xs_permissions",
            handle @ ("xencall_handle" | "xenforeignmemory_handle") => handle,
            other => panic!("no C type for {other}"),
        }
        .to_owned()
    }

    /// A C statement that compiles only if `name` is declared, with the prototype that is the Rust type `prototype`.
    fn assertion(name: &str, prototype: &str) -> String {
        let signature = prototype.strip_prefix("unsafe extern \"C\" fn(").unwrap();
        let (arguments, result) = signature.split_once(')').unwrap();
        let result = result.strip_prefix(" -> ").unwrap_or("()");
        let arguments: Vec<String> = arguments.split(", ").map(c_type).collect();
        format!(
            "_Static_assert(__builtin_types_compatible_p(__typeof__(&{name}), {} (*)({})), \"{name}\");\n",
            c_type(result),
            arguments.join(", ")
        )
    }

    /// Whether the C compiler takes `assertions` below an include of `header`; else what it says.
    fn compile(header: &str, assertions: &str) -> Result<(), String> {
        let mut compiler = Command::new("cc")
            .args(["-fsyntax-only", "-x", "c", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        write!(
            compiler.stdin.take().unwrap(),
            "#include <{header}>\n{assertions}"
        )
        .unwrap();
        let output = compiler.wait_with_output().unwrap();
        match output.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    #[test]
    fn the_prototypes_of_the_stable_libraries_are_those_of_their_headers() {
        for (header, prototypes) in [
            ("xencall.h", hypercall::Functions::prototypes()),
            (
                "xenforeignmemory.h",
                foreign_memory::Functions::prototypes(),
            ),
            ("xenstore.h", xenstore_list::Functions::prototypes()),
        ] {
            let assertions: String = prototypes.iter().map(|(n, p)| assertion(n, p)).collect();
            assert_eq!(compile(header, &assertions), Ok(()));
        }
    }

    #[test]
    fn a_prototype_that_differs_from_its_header_is_found() {
        let handle = "*mut xenctrl_sys::gen::xencall_handle";
        let close = |result| format!("unsafe extern \"C\" fn({handle}){result}");
        let check = |name, prototype: &str| compile("xencall.h", &assertion(name, prototype));
        assert_eq!(check("xencall_close", &close(" -> i32")), Ok(()));
        assert!(check("xencall_close", &close("")).is_err());
        assert!(check("xencall_close", &close(" -> u32")).is_err());
        assert!(check("xencall_end", &close(" -> i32")).is_err());
        let two = format!("unsafe extern \"C\" fn({handle}, u32) -> i32");
        assert!(check("xencall_close", &two).is_err());
    }
}
