//! BTF blobs made by hand, for tests.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // small blobs
#![allow(missing_debug_implementations, clippy::new_without_default)]

use super::TypeKind;

/// A BTF blob being written. What adds a type returns its id.
pub struct Blob {
    strings: Vec<u8>,
    words: Vec<u32>,
    next: u32,
    first_string: u32,
}

impl Blob {
    /// An empty blob of a kernel.
    #[must_use]
    pub fn new() -> Blob {
        Blob {
            strings: vec![0],
            words: Vec::new(),
            next: 1,
            first_string: 0,
        }
    }

    /// A kernel's blob with `u8`, `u16`, `u32` and `u64` as types 1 to 4.
    #[must_use]
    pub fn with_integers() -> Blob {
        let mut blob = Blob::new();
        for (name, size) in [("u8", 1), ("u16", 2), ("u32", 4), ("u64", 8)] {
            blob.int(name, size);
        }
        blob
    }

    /// An empty blob of a module on top of `base`.
    #[must_use]
    pub fn on(base: &Blob) -> Blob {
        Blob {
            strings: vec![0],
            words: Vec::new(),
            next: base.next,
            first_string: base.strings.len() as u32,
        }
    }

    /// Adds a string, and returns its offset.
    pub fn name(&mut self, name: &str) -> u32 {
        if name.is_empty() {
            return 0;
        }
        let at = self.first_string + self.strings.len() as u32;
        self.strings.extend(name.bytes().chain([0]));
        at
    }

    /// Adds a type; the number of its parts and its flag are in `info`.
    pub fn raw(&mut self, name: &str, kind: TypeKind, info: u32, value: u32, tail: &[u32]) -> u32 {
        let name = self.name(name);
        self.push([name, ((kind as u32) << 24) | info, value], tail)
    }

    fn push(&mut self, head: [u32; 3], tail: &[u32]) -> u32 {
        self.words.extend(head);
        self.words.extend(tail);
        self.next += 1;
        self.next - 1
    }

    /// An unsigned integer of `size` bytes.
    pub fn int(&mut self, name: &str, size: u32) -> u32 {
        self.raw(name, TypeKind::Int, 0, size, &[size * 8])
    }

    /// A type that only refers to another.
    pub fn refer(&mut self, name: &str, kind: TypeKind, to: u32) -> u32 {
        self.raw(name, kind, 0, to, &[])
    }

    /// An array of `n` elements.
    pub fn array(&mut self, of: u32, n: u32) -> u32 {
        self.raw("", TypeKind::Array, 0, 0, &[of, 1, n])
    }

    /// A structure or union: members by name, type and bit offset.
    pub fn composite(
        &mut self,
        kind: TypeKind,
        name: &str,
        size: u32,
        m: &[(&str, u32, u32)],
    ) -> u32 {
        let fields: Vec<_> = m.iter().map(|&(n, t, bit)| (n, t, bit, 0)).collect();
        self.fields(kind, name, size, &fields)
    }

    /// A structure: members by name, type and offset in bytes.
    pub fn structure(&mut self, name: &str, size: usize, m: &[(&str, u32, usize)]) -> u32 {
        let fields: Vec<_> = m.iter().map(|&(n, t, at)| (n, t, 8 * at as u32)).collect();
        self.composite(TypeKind::Struct, name, size as u32, &fields)
    }

    /// A structure whose members may be bit fields: name, type, bit offset, width.
    pub fn fields(
        &mut self,
        kind: TypeKind,
        name: &str,
        size: u32,
        m: &[(&str, u32, u32, u32)],
    ) -> u32 {
        let flag = u32::from(m.iter().any(|f| f.3 != 0)) << 31;
        let info = flag | ((kind as u32) << 24) | m.len() as u32;
        let head = [self.name(name), info, size];
        let tail: Vec<u32> = m
            .iter()
            .flat_map(|&(n, t, bit, width)| [self.name(n), t, (width << 24) | bit])
            .collect();
        self.push(head, &tail)
    }

    /// An enum of 4 bytes, signed if a value is negative.
    pub fn enumeration(&mut self, name: &str, values: &[(&str, i64)]) -> u32 {
        let flag = u32::from(values.iter().any(|v| v.1 < 0)) << 31;
        let info = flag | ((TypeKind::Enum as u32) << 24) | values.len() as u32;
        let head = [self.name(name), info, 4];
        let tail: Vec<u32> = values
            .iter()
            .flat_map(|&(n, v)| [self.name(n), v as u32])
            .collect();
        self.push(head, &tail)
    }

    /// A function's prototype: type of the result, names and types of the parameters.
    pub fn proto(&mut self, result: u32, parameters: &[(&str, u32)]) -> u32 {
        let tail: Vec<u32> = parameters
            .iter()
            .flat_map(|&(n, t)| [self.name(n), t])
            .collect();
        self.raw(
            "",
            TypeKind::FuncProto,
            parameters.len() as u32,
            result,
            &tail,
        )
    }

    /// The blob as it would be in memory.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let types = self.words.len() as u32 * 4;
        let mut out = vec![0x9f, 0xeb, 1, 0];
        for w in [24, 0, types, types, self.strings.len() as u32] {
            out.extend(w.to_le_bytes());
        }
        out.extend(self.words.iter().flat_map(|w| w.to_le_bytes()));
        out.extend(&self.strings);
        out
    }
}

/// `struct outer { int a; union { long b; struct inner c; }; int d:3, e:5; u8 f[7]; }` and more.
#[must_use]
pub fn sample() -> Blob {
    let mut b = Blob::new();
    let int = b.int("int", 4);
    let long = b.int("long", 8);
    let byte = b.int("unsigned char", 1);
    let u8_ = b.refer("u8", TypeKind::Typedef, byte);
    let inner = b.composite(
        TypeKind::Struct,
        "inner",
        8,
        &[("w", int, 0), ("x", int, 32)],
    );
    let either = b.composite(TypeKind::Union, "", 8, &[("b", long, 0), ("c", inner, 0)]);
    let array = b.array(u8_, 7);
    let members = [
        ("a", int, 0, 0),
        ("", either, 64, 0),
        ("d", int, 128, 3),
        ("e", int, 131, 5),
        ("f", array, 136, 0),
    ];
    let outer = b.fields(TypeKind::Struct, "outer", 24, &members);
    b.enumeration("state", &[("LIVE", 0), ("GOING", 2), ("BAD", 0xffff_ffff)]);
    let tail = [b.name("HUGE"), 5, 1];
    b.raw("wide", TypeKind::Enum64, 1, 8, &tail);
    let pointer = b.refer("", TypeKind::Ptr, outer);
    let constant = b.refer("", TypeKind::Const, outer);
    let to_constant = b.refer("", TypeKind::Ptr, constant);
    let tag = b.refer("user", TypeKind::TypeTag, byte);
    let to_user = b.refer("", TypeKind::Ptr, tag);
    let proto = b.proto(
        long,
        &[
            ("o", pointer),
            ("from", to_constant),
            ("buf", to_user),
            ("", 0),
        ],
    );
    b.raw("copy_outer", TypeKind::Func, 0, proto, &[]);
    let callback = b.refer("", TypeKind::Ptr, proto);
    b.refer("copy_fn", TypeKind::Typedef, callback);
    b
}
