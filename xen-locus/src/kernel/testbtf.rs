//! Small BTF blobs, for tests.

#![allow(clippy::cast_possible_truncation)] // small blobs

/// Types, numbered from 1 in the order in which they are added.
pub struct Types {
    strings: Vec<u8>,
    words: Vec<u32>,
    count: u32,
}

impl Types {
    /// Nothing but `u8`, `u16`, `u32` and `u64`, as types 1 to 4.
    pub fn new() -> Types {
        let mut types = Types {
            strings: vec![0],
            words: Vec::new(),
            count: 0,
        };
        for (name, size) in [("u8", 1), ("u16", 2), ("u32", 4), ("u64", 8)] {
            types.head(name, 1 << 24, size);
            types.words.push(8 * size);
        }
        types
    }

    fn name(&mut self, name: &str) -> u32 {
        if name.is_empty() {
            return 0;
        }
        let at = self.strings.len() as u32;
        self.strings.extend(name.as_bytes());
        self.strings.push(0);
        at
    }

    fn head(&mut self, name: &str, info: u32, size: u32) -> u32 {
        let name = self.name(name);
        self.words.extend([name, info, size]);
        self.count += 1;
        self.count
    }

    /// A structure; members are name, type, offset in bits, width in bits (0: no bit field).
    pub fn structure(&mut self, name: &str, size: u32, members: &[(&str, u32, u32, u32)]) -> u32 {
        let id = self.head(name, 1 << 31 | 4 << 24 | members.len() as u32, size);
        for &(name, ty, at, width) in members {
            let name = self.name(name);
            self.words.extend([name, ty, width << 24 | at]);
        }
        id
    }

    /// An array.
    pub fn array(&mut self, of: u32, len: u32) -> u32 {
        let id = self.head("", 3 << 24, 0);
        self.words.extend([of, 3, len]);
        id
    }

    /// An enumeration.
    pub fn enumeration(&mut self, name: &str, constants: &[(&str, i32)]) -> u32 {
        let id = self.head(name, 1 << 31 | 6 << 24 | constants.len() as u32, 4);
        for &(name, value) in constants {
            let name = self.name(name);
            self.words.extend([name, value.cast_unsigned()]);
        }
        id
    }

    /// The blob.
    pub fn blob(&self) -> Vec<u8> {
        let types = 4 * self.words.len() as u32;
        let mut out = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, types, types, self.strings.len() as u32] {
            out.extend(word.to_le_bytes());
        }
        out.extend(self.words.iter().flat_map(|w| w.to_le_bytes()));
        out.extend(&self.strings);
        out
    }
}
