//! A writer for the `newc` cpio format, the one the kernel unpacks as an initramfs
//! (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! No root is needed to build an archive: the owner is always 0:0, and no device node is read from the
//! host.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context, Result};

const DIR: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// An archive under construction, in memory.
#[derive(Debug, Default)]
pub struct Cpio {
    out: Vec<u8>,
    inode: u32,
    seen: BTreeSet<String>,
}

impl Cpio {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory and its parents, except those that the archive already has.
    pub fn dir(&mut self, path: &str) -> Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || self.seen.contains(path) {
            return Ok(());
        }
        self.parents(path)?;
        self.entry(path, DIR | 0o755, &[])
    }

    /// Adds a file with these permission bits. A file whose path the archive already has is ignored, so
    /// that a caller may walk overlapping closures.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<()> {
        let path = path.trim_matches('/');
        if self.seen.contains(path) {
            return Ok(());
        }
        self.parents(path)?;
        self.entry(path, FILE | (mode & 0o7777), data)
    }

    /// Adds the content of a file of the host.
    pub fn host_file(&mut self, path: &str, mode: u32, from: &Path) -> Result<()> {
        let data = std::fs::read(from).with_context(|| format!("reading {}", from.display()))?;
        self.file(path, mode, &data)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, to: &str) -> Result<()> {
        let path = path.trim_matches('/');
        if self.seen.contains(path) {
            return Ok(());
        }
        self.parents(path)?;
        self.entry(path, LINK | 0o777, to.as_bytes())
    }

    /// Adds all below a folder of the host, at `path`; "" is the top.
    pub fn tree(&mut self, path: &str, from: &Path) -> Result<()> {
        let mut entries = std::fs::read_dir(from)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .with_context(|| format!("reading {}", from.display()))?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = format!("{path}/{name}");
            let path = path.trim_matches('/');
            let meta = entry.metadata()?;
            if meta.is_dir() {
                if !self.seen.contains(path) {
                    self.parents(path)?;
                    self.entry(path, DIR | (meta.mode() & 0o7777), &[])?;
                }
                self.tree(path, &entry.path())?;
            } else if meta.is_symlink() {
                let to = std::fs::read_link(entry.path())?;
                self.symlink(path, &to.to_string_lossy())?;
            } else {
                self.host_file(path, meta.mode(), &entry.path())?;
            }
        }
        Ok(())
    }

    /// Ends the archive. Archives may be concatenated afterwards.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        pad(&mut self.out, 512);
        Ok(self.out)
    }

    fn parents(&mut self, path: &str) -> Result<()> {
        match path.rsplit_once('/') {
            Some((parent, _)) => self.dir(parent),
            None => Ok(()),
        }
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<()> {
        let size = u32::try_from(data.len()).with_context(|| format!("{path}: over 4 GiB"))?;
        let name = u32::try_from(path.len() + 1).context("name too long")?;
        self.inode += 1;
        let links = if mode & DIR == DIR { 2 } else { 1 };
        // magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor,
        // rdevminor, namesize, check
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name, 0];
        self.out.extend_from_slice(b"070701");
        for field in fields {
            self.out
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.out.extend_from_slice(path.as_bytes());
        self.out.push(0);
        pad(&mut self.out, 4);
        self.out.extend_from_slice(data);
        pad(&mut self.out, 4);
        self.seen.insert(path.to_owned());
        Ok(())
    }
}

fn pad(out: &mut Vec<u8>, to: usize) {
    out.resize(out.len().next_multiple_of(to), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_the_110_byte_header_and_four_byte_padding() {
        let mut c = Cpio::new();
        c.file("a/b", 0o644, b"hello").unwrap();
        let out = c.finish().unwrap();
        assert_eq!(&out[..6], b"070701");
        // "a": header 110 + "a\0" = 112, no data
        assert_eq!(&out[112..118], b"070701");
        let size = std::str::from_utf8(&out[112 + 54..112 + 62]).unwrap();
        assert_eq!(size, "00000005");
        // header 110 + "a/b\0" = 114, padded to 116
        assert_eq!(&out[112 + 116..112 + 121], b"hello");
        assert_eq!(out.len() % 512, 0);
        assert!(out.windows(10).any(|w| w == b"TRAILER!!!"));
    }

    #[test]
    fn parents_are_made_once() {
        let mut c = Cpio::new();
        c.file("x/y/one", 0o644, b"").unwrap();
        c.file("x/y/two", 0o644, b"").unwrap();
        let out = c.finish().unwrap();
        assert_eq!(out.windows(6).filter(|w| w == b"070701").count(), 5);
    }
}
