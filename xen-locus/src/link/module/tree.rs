//! Inserts a node into a red-black tree of the kernel (lib/rbtree.c, include/linux/rbtree_types.h).
//!
//! A node begins with `__rb_parent_color`: the address of its parent, and in bit 0 its colour, 1 for
//! black. The root's parent is 0.

use locus_guest::addr::Gva;

use super::structure::TreeNode;
use super::words::Words;
use crate::error::{Error, Result};

/// Deepest tree believed: a red-black tree of 2^32 nodes is at most 64 deep.
const DEPTH_MAX: usize = 64;
const BLACK: u64 = 1;
const COLOR: u64 = 3;

/// Offsets in `struct rb_node`.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Of `__rb_parent_color`.
    pub parent: u64,
    /// Of `rb_left`.
    pub left: u64,
    /// Of `rb_right`.
    pub right: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Left,
    Right,
}

impl Side {
    fn other(self) -> Side {
        match self {
            Side::Left => Side::Right,
            Side::Right => Side::Left,
        }
    }
}

struct Tree<'t, 'a, 'm> {
    words: &'t mut Words<'a, 'm>,
    shape: Shape,
    root: Gva,
}

fn odd(what: &str) -> Error {
    Error::not_applicable(format!(
        "the guest's tree of module addresses is not as it must be: {what}"
    ))
}

/// Inserts `new` into the tree whose root pointer is at `root`. `key_of` gives the key of a node that is in the
/// tree already.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): the tree is deeper than a tree can be, or breaks the rules; or memory
/// can't be read.
pub fn insert(
    words: &mut Words<'_, '_>,
    shape: Shape,
    root: Gva,
    new: TreeNode,
    key_of: impl Fn(&mut Words<'_, '_>, Gva) -> Result<u64>,
) -> Result<()> {
    let node = new.at;
    let mut link = root;
    let mut parent = Gva(0);
    let mut depth = 0;
    loop {
        let next = Gva(words.get(link)?);
        if next == Gva(0) {
            break;
        }
        depth += 1;
        if depth > DEPTH_MAX || next == node {
            return Err(odd("it has a loop, or our node already"));
        }
        parent = next;
        let left = new.key.0 < key_of(words, next)?;
        link = next.plus(if left { shape.left } else { shape.right });
    }
    words.set(node.plus(shape.parent), parent.0)?;
    words.set(node.plus(shape.left), 0)?;
    words.set(node.plus(shape.right), 0)?;
    words.set(link, node.0)?;
    let mut tree = Tree { words, shape, root };
    tree.balance(node)
}

impl Tree<'_, '_, '_> {
    fn at(&self, side: Side) -> u64 {
        match side {
            Side::Left => self.shape.left,
            Side::Right => self.shape.right,
        }
    }

    fn parent(&mut self, node: Gva) -> Result<Gva> {
        Ok(Gva(self.words.get(node.plus(self.shape.parent))? & !COLOR))
    }

    fn is_red(&mut self, node: Gva) -> Result<bool> {
        Ok(node != Gva(0) && self.words.get(node.plus(self.shape.parent))? & BLACK == 0)
    }

    fn set_parent(&mut self, node: Gva, parent: Gva) -> Result<()> {
        let at = node.plus(self.shape.parent);
        let color = self.words.get(at)? & COLOR;
        self.words.set(at, parent.0 | color)
    }

    fn paint(&mut self, node: Gva, color: u64) -> Result<()> {
        let at = node.plus(self.shape.parent);
        let parent = self.words.get(at)? & !COLOR;
        self.words.set(at, parent | color)
    }

    fn child(&mut self, node: Gva, side: Side) -> Result<Gva> {
        Ok(Gva(self.words.get(node.plus(self.at(side)))?))
    }

    /// Where `node` hangs below `parent`.
    fn side(&mut self, parent: Gva, node: Gva) -> Result<Side> {
        if self.child(parent, Side::Left)? == node {
            return Ok(Side::Left);
        }
        if self.child(parent, Side::Right)? == node {
            return Ok(Side::Right);
        }
        Err(odd("a node's parent does not know it"))
    }

    /// Turns `top` down to `side`; its child on the other side takes its place.
    fn rotate(&mut self, top: Gva, side: Side) -> Result<()> {
        let riser = self.child(top, side.other())?;
        if riser == Gva(0) {
            return Err(odd("a node that must be there is not"));
        }
        let inner = self.child(riser, side)?;
        let parent = self.parent(top)?;
        if parent == Gva(0) {
            self.words.set(self.root, riser.0)?;
        } else {
            let which = self.side(parent, top)?;
            let at = parent.plus(self.at(which));
            self.words.set(at, riser.0)?;
        }
        let (near, far) = (self.at(side), self.at(side.other()));
        self.words.set(riser.plus(near), top.0)?;
        self.words.set(top.plus(far), inner.0)?;
        self.set_parent(riser, parent)?;
        self.set_parent(top, riser)?;
        if inner != Gva(0) {
            self.set_parent(inner, top)?;
        }
        Ok(())
    }

    /// Restores the rules after `node` was hung in red.
    fn balance(&mut self, mut node: Gva) -> Result<()> {
        for _ in 0..=DEPTH_MAX {
            let parent = self.parent(node)?;
            if parent == Gva(0) {
                return self.paint(node, BLACK);
            }
            if !self.is_red(parent)? {
                return Ok(());
            }
            let grand = self.parent(parent)?;
            if grand == Gva(0) {
                return Err(odd("its root is red"));
            }
            let side = self.side(grand, parent)?;
            let uncle = self.child(grand, side.other())?;
            if self.is_red(uncle)? {
                self.paint(uncle, BLACK)?;
                self.paint(parent, BLACK)?;
                self.paint(grand, 0)?;
                node = grand;
                continue;
            }
            let mut top = parent;
            if self.side(parent, node)? != side {
                self.rotate(parent, side)?;
                top = node;
            }
            self.paint(top, BLACK)?;
            self.paint(grand, 0)?;
            return self.rotate(grand, side.other());
        }
        Err(odd("it has a loop"))
    }
}
